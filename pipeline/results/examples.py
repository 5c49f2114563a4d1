"""The frames that a report shows, with the columns found in them in pixels of the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import xarray as xr

from pipeline import store
from pipeline.results.open import columns_of_frame, particles_of_frame, provenance, to_detector
from pipeline.steps.residual import residual
from schemas.errors import ColonnadeError, SettingsError


@dataclass(frozen=True)
class Example:
    """A crop of one frame: images (y, x); sampling [Å/px]; its facts.

    points, errors (column, 2): y, x of columns in it [px]; species (column,): their names.

    residual (y, x): raw less denoised in units of the noise predicted, None where nothing was denoised; spread and
    correlation of that of the whole frame (see `pipeline.steps.residual`), NaN where they are not known.

    labels (y, x): n in the n-th particle of the frame, 0 elsewhere; ratios (particle,): their Fourier ratios.
    """

    frame: int
    time: float
    raw: np.ndarray
    denoised: np.ndarray
    points: np.ndarray
    errors: np.ndarray
    species: np.ndarray
    sampling: float
    snr: float
    dose: float
    labels: np.ndarray
    ratios: np.ndarray
    residual: np.ndarray | None = None
    spread: float = float("nan")
    correlation: float = float("nan")


def examples(
    run: xr.DataTree, frames: Sequence[int] | None = None, *, folder: Path | None = None, most: int = 4
) -> Iterator[Example]:
    """``most`` of the examples that the run holds, spread over the movie, or the ``frames`` that are asked for.

    A frame that is no example is taken from the kept images and the stack (below ``folder``, where the run lies); where
    either is missing, the example nearest to it stands in. Raises ``SettingsError`` for a frame outside the movie.
    """
    stored = run["examples"].to_dataset() if "examples" in run.children else None
    index = stored["frame"].values if stored is not None else np.zeros(0, dtype=int)
    if frames is None:
        spread = np.linspace(0, len(index) - 1, min(most, len(index))).round().astype(int)
        frames = [int(index[i]) for i in np.unique(spread)]
    total = run["frames"].sizes["time"]
    shown = set()
    for frame in frames:
        if not -total <= frame < total:
            raise SettingsError(f"frame {frame} is outside the movie; expected 0 to {total - 1}")
        picture = None if frame % total in index else _from_images(run, frame % total, folder)
        if picture is None and stored is not None and index.size:
            picture = stored.isel(example=int(np.argmin(np.abs(index - frame % total)))).load()
        if picture is not None and int(picture["frame"]) not in shown:
            shown.add(int(picture["frame"]))
            yield _example(run, picture)


def _from_images(run: xr.DataTree, frame: int, folder: Path | None) -> xr.Dataset | None:
    """One frame from the stack (in electrons) and from the kept images; None where either is not there."""
    made = provenance(run)
    if folder is None or "images" not in run.children or "denoised" not in run["images"].children:
        return None
    try:
        stack = store.open_stack(folder / str(made.get("stack", "")))
        plane = int(made.get("settings", {}).get("source", {}).get("defocus_plane", 0))
        raw = stack.read(frame, frame + 1, plane=plane)[0].astype(np.float32)
        noise = (made.get("prepare") or {}).get("noise") or {}
        raw = (raw - noise.get("offset", 0.0)) / noise.get("counts_per_electron", 1.0)
    except (ColonnadeError, OSError, IndexError):
        return None
    denoised = run["images/denoised/s0"].to_dataset()["denoised"].isel(time=frame).values
    dims = ("y_example", "x_example")
    images = {"frame": ((), frame), "raw": (dims, raw), "denoised": (dims, denoised)}
    if "labels" in run["images"].children:
        labels = run["images/labels/s0"].to_dataset()["labels"].isel(time=frame).values
        images["labels"] = (dims, labels)
    y, x = stack.origin
    return xr.Dataset(images, attrs={"sampling": stack.sampling, "origin_y": y, "origin_x": x})


def _example(run: xr.DataTree, picture: xr.Dataset) -> Example:
    frame, sampling = int(picture["frame"]), float(picture.attrs["sampling"])
    origin = np.array([picture.attrs["origin_y"], picture.attrs["origin_x"]], dtype=float)
    points, errors, species = np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, dtype=object)
    if "columns" in run.children:
        columns = to_detector(run, columns_of_frame(run, frame))
        points = np.stack([columns["y_detector"].values, columns["x_detector"].values], axis=1)
        points = (points - origin) / sampling
        errors = np.stack([columns["y_err"].values, columns["x_err"].values], axis=1) / sampling
        height, width = picture["raw"].shape
        inside = ((points > -0.5) & (points < np.array([height, width]) - 0.5)).all(axis=1)
        points, errors, species = points[inside], errors[inside], columns["species"].values.astype(object)[inside]
    raw = picture["raw"].values
    labels = picture["labels"].values.astype(np.int64) if "labels" in picture else np.zeros(raw.shape, np.int64)
    ratios = particles_of_frame(run, frame)["fourier_ratio"].values if labels.any() else np.zeros(0)
    table = run["frames"].to_dataset()
    names = ["snr", "dose", *(name for name in ("residual_spread", "residual_correlation") if name in table)]
    facts = cast(xr.Dataset, table[names].isel(time=frame))
    denoised = picture["denoised"].values
    noise = (provenance(run).get("prepare") or {}).get("noise") or {}
    taken = None
    if "readout_variance" in noise and not np.array_equal(raw, denoised):
        taken = residual(raw, denoised, readout_variance=float(noise["readout_variance"]))
    return Example(
        frame=frame,
        time=float(facts["time"]),
        raw=raw,
        denoised=denoised,
        points=points,
        errors=errors,
        species=species,
        sampling=sampling,
        snr=float(facts["snr"]),
        dose=float(facts["dose"]),
        labels=labels,
        ratios=ratios,
        residual=taken,
        spread=float(facts.get("residual_spread", np.nan)),
        correlation=float(facts.get("residual_correlation", np.nan)),
    )
