"""The known answer of a simulated movie, as a file and in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from schemas.errors import SchemaError, SettingsError

NEEDED = ("frame", "y", "x", "visible", "drift", "sampling", "shape")


@dataclass(frozen=True)
class Truth:
    """The known answer of a movie: what was where on the detector.

    frame, y, x, visible, species (column,): every column of every frame, positions [px]; a column that is not visible
    is neither demanded nor spurious. drift (time, 2) [px]: how the specimen moved since frame 0. sampling [Å/px];
    shape (y, x).
    What only some truths know is None elsewhere: site_frame, site_y, site_x [px], site_species (site,): every lattice
    site of every frame, empty ones too; masks (time, y, x): labels of particles, 0 outside; particle_tilt (particle,):
    degrees off the zone axis, of label 1 first; clean (time, y, x): relative intensity without noise, of which 1 is
    `electrons` per pixel; readout: noise beside counting [electrons].
    """

    frame: np.ndarray
    y: np.ndarray
    x: np.ndarray
    visible: np.ndarray
    drift: np.ndarray
    sampling: float
    shape: tuple[int, int]
    species: np.ndarray | None = None
    site_frame: np.ndarray | None = None
    site_y: np.ndarray | None = None
    site_x: np.ndarray | None = None
    site_species: np.ndarray | None = None
    masks: np.ndarray | None = None
    particle_tilt: np.ndarray | None = None
    clean: np.ndarray | None = None
    electrons: float | None = None
    readout: float = 0.0

    def save(self, path: str | Path) -> None:
        """Write the truth as one npz file."""
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in vars(self).items() if value is not None}
        with Path(path).open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @property
    def has_sites(self) -> bool:
        """Whether lattice sites are known, as they are of sheets."""
        return self.site_frame is not None and len(self.site_frame) > 0


def truth_of(movie: Any) -> Truth:
    """The truth of a simulated movie; of a focal series the clean images are left out."""
    flat = np.concatenate(list(movie.columns))
    frame = np.repeat(np.arange(len(movie.columns)), [len(columns) for columns in movie.columns])
    sites = list(getattr(movie, "sites", []))
    every = np.concatenate(sites) if sites and sum(map(len, sites)) else None
    masks = getattr(movie, "masks", None)
    spec = movie.spec
    return Truth(
        frame=frame,
        y=flat["y"],
        x=flat["x"],
        visible=flat["visible"],
        drift=np.asarray(movie.drift, dtype=float),
        sampling=float(movie.sampling),
        shape=(int(movie.counts.shape[-2]), int(movie.counts.shape[-1])),
        species=flat["species"],
        site_frame=None if every is None else np.repeat(np.arange(len(sites)), [len(one) for one in sites]),
        site_y=None if every is None else every["y"],
        site_x=None if every is None else every["x"],
        site_species=None if every is None else every["species"],
        masks=masks if masks is not None and masks.any() else None,
        particle_tilt=movie.particles["tilt"] if masks is not None and masks.any() else None,
        clean=np.asarray(movie.clean, np.float32) if movie.clean.ndim == 3 else None,
        electrons=float(spec.dose * spec.sampling**2),
        readout=float(spec.readout / spec.counts_per_electron),
    )


def load_truth(source: str | Path | Mapping[str, Any]) -> Truth:
    """A truth from the file that ``Truth.save`` wrote, from a simulated stack, or from a mapping of its fields."""
    if isinstance(source, Mapping):
        given = dict(source)
    elif Path(source).is_dir():
        given = _of_stack(Path(source))
    else:
        if not Path(source).exists():
            raise SettingsError(
                f"{source} does not exist; expected what `colonnade simulate` writes: a stack (.zarr), or the truth "
                "beside a movie (.truth.npz)"
            )
        with np.load(source, allow_pickle=False) as file:
            given = dict(file)
    missing = [name for name in NEEDED if given.get(name) is None]
    if missing:
        raise SchemaError(f"the truth lacks {', '.join(missing)}; expected {', '.join(NEEDED)}")
    known: dict[str, Any] = {item.name: given[item.name] for item in fields(Truth) if given.get(item.name) is not None}
    height, width = (int(size) for size in np.asarray(known.pop("shape")))
    final: dict[str, Any] = {name: np.asarray(value) for name, value in known.items()}
    final |= {name: float(final[name]) for name in ("sampling", "electrons", "readout") if name in final}
    return Truth(**final, shape=(height, width))


def _of_stack(path: Path) -> dict[str, Any]:
    """Fields of a truth that lies in a simulated stack."""
    from pipeline.truth import read_truth

    given = read_truth(path)
    given |= {name: given[f"column_{name}"] for name in ("frame", "y", "x", "visible", "species")}
    if np.ndim(given.get("clean", 0)) != 3:
        given.pop("clean", None)
    if not np.any(given.get("masks", 0)):
        given.pop("masks", None)
    return {
        name: np.array([str(one) for one in value]) if "species" in name else value for name, value in given.items()
    }
