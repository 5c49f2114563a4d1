"""Specimens to train the column network on: simulated images of known columns, and of what is not a column."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

from pipeline.simulate import imaging
from pipeline.simulate.movie import Camera, MovieSpec, polarity_of
from pipeline.simulate.scene import Scene, build_scene, columns_of

LABEL_WIDTH = 0.35  # Å, standard deviation of the Gaussian that marks a column
CRYSTAL_REACH = 1.6  # Å around columns within which the sign of the contrast is to be told
DOUBT = 0.8  # Å around columns that are too thin or blurred to be demanded
LOST = 2.0  # Å that a tilted column's atoms are spread over; from there on it shows fringes rather than a spot
DEFOCI = np.arange(-140.0, 141.0, 20.0)  # Å
VIEWS = 3  # images of one specimen at different defoci
SHAPES = ("faceted", "sphere", "truncated octahedron", "cuboctahedron")
FAMILIES = {"particle": 0.56, "sheet": 0.24, "film": 0.1, "vacuum": 0.03, "singles": 0.07}


Found = list[tuple[float, int, np.ndarray]]  # merit, sign of the contrast, image


class Example(NamedTuple):
    """One clean image (y, x) and its truth: target in 0…1, known and crystal bool (y, x), polarity ±1 or 0 for none.

    points (column, 2): y, x [px] of the columns that are to be found.
    """

    image: np.ndarray
    target: np.ndarray
    known: np.ndarray
    crystal: np.ndarray
    points: np.ndarray
    polarity: int
    mode: str


def random_examples(rng: np.random.Generator, *, edge: int, sampling: float) -> list[Example]:
    """Up to VIEWS images of one random specimen, edge × edge pixels of about `sampling` [Å/px]."""
    family = str(rng.choice(list(FAMILIES), p=list(FAMILIES.values())))
    if family == "singles":
        return [singles(rng, edge=edge, sampling=sampling)]
    spec = random_spec(rng, family, edge=edge, sampling=sampling)
    return examples_of(spec, rng, sampling=sampling)


def random_spec(rng: np.random.Generator, family: str, *, edge: int, sampling: float) -> MovieSpec:
    """Any specimen and microscope. The sampling varies by a quarter, though the network is told it is `sampling`."""
    common: dict[str, Any] = {
        "shape": (edge, edge),
        "frames": 1,
        "sampling": float(sampling * rng.uniform(0.78, 1.25)),
        "vibration": float(rng.uniform(0.02, 0.08)),
        "events": 0,
        "min_atoms": 2 if family == "particle" else 1,
        "focal_spread": float(rng.uniform(10, 40)),
        "angular_spread": float(rng.uniform(0.1, 0.5)),
        "spherical": float(
            rng.choice([-5e4 * rng.uniform(0.6, 1.6), rng.choice([-1, 1]) * 10 ** rng.uniform(3.7, 5.1)])
        ),
        "probe": float(rng.uniform(0.7, 1.3)),
        "carbon": float(rng.choice([0.0, rng.uniform(3, 16)], p=[0.15, 0.85])),
        "carbon_cover": float(rng.choice([1.0, rng.uniform(0.3, 1.0)])),
    }
    if rng.random() < 0.3:
        common["mtf"] = (1.0, 0.0, float(rng.uniform(0.25, 0.5)), 2.5)
    if family == "sheet":
        return _sheet(rng, common)
    if family == "film":
        common |= {"carbon": float(rng.uniform(3, 30)), "energy": float(rng.choice([80.0, 200.0, 300.0]))}
        return MovieSpec(**common, kind="carbon", mode=str(rng.choice(["hrtem", "haadf"], p=[0.85, 0.15])))
    if family == "vacuum":
        return MovieSpec(**common, kind="vacuum")
    return _particles(rng, common)


def _sheet(rng: np.random.Generator, common: dict[str, Any]) -> MovieSpec:
    kind = str(rng.choice(["graphene", "mos2", "wse2", "hbn"], p=[0.45, 0.3, 0.15, 0.1]))
    return MovieSpec(
        **common,
        kind=kind,
        mode=str(rng.choice(["hrtem", "haadf"], p=[0.6, 0.4])),
        energy=float(rng.choice([60.0, 80.0, 200.0, 300.0], p=[0.25, 0.45, 0.15, 0.15])),
        vacancies=float(rng.choice([0.0, 0.02, 0.08])),
        dopants=float(rng.choice([0.0, 0.02, 0.1], p=[0.4, 0.3, 0.3])),
        groups=("trimer", "dimer") if kind == "graphene" and rng.random() < 0.3 else (),
        substitutions=float(rng.choice([0.0, 0.15])) if kind == "wse2" else 0.0,
        hole=float(rng.choice([0.0, rng.uniform(3, 12)])),
    )


def _particles(rng: np.random.Generator, common: dict[str, Any]) -> MovieSpec:
    particles = int(rng.choice([1, 2, 3], p=[0.6, 0.15, 0.25]))
    near = rng.uniform(0, 0.9, particles)
    far = rng.uniform(4, 22, particles)
    tilts = np.where((np.arange(particles) > 0) & (rng.random(particles) < 0.7), far, near)
    return MovieSpec(
        **common,
        kind="nanoparticle",
        mode=str(rng.choice(["hrtem", "haadf"], p=[0.88, 0.12])),
        energy=float(rng.choice([80.0, 200.0, 300.0], p=[0.1, 0.2, 0.7])),
        element=str(rng.choice(["Au", "Pt", "Ag", "Pd", "Cu", "Ni"], p=[0.6, 0.18, 0.07, 0.07, 0.04, 0.04])),
        zone=str(rng.choice(["110", "100", "111"], p=[0.55, 0.25, 0.2])),
        tilts=tuple(float(tilt) for tilt in tilts),
        shapes=SHAPES,
        particle_vacancies=float(rng.choice([0.0, 0.02, 0.06])),
        adatoms=int(rng.choice([0, 3])),
        thickness=float(rng.uniform(8, 34)),
        particles=particles,
        radius=float(rng.uniform(8, 18) if particles == 1 else rng.uniform(4.5, 8)),
    )


def examples_of(spec: MovieSpec, rng: np.random.Generator, *, sampling: float) -> list[Example]:
    """Up to VIEWS images of one specimen at different defoci: the best of either contrast, then any clear one.

    Images in which the columns have mixed signs are left out.
    """
    scene = build_scene(spec, int(rng.integers(2**31)))
    camera = Camera(scene)
    truth = columns_of(scene, 0, camera.origin)
    tilted = _tilted(scene, truth)
    if spec.mode == "haadf" or spec.kind == "vacuum":
        clean = camera.image(0, 0.0)
        return [labelled(clean, truth, 1 if len(truth) else 0, sampling=sampling, spec=spec, tilted=tilted)]
    wave = camera.wave(0, scene.drift[0])
    seen = []
    shown = truth[~tilted]
    for defocus in (DEFOCI if len(shown) else rng.choice(DEFOCI, VIEWS, replace=False)) + rng.uniform(-10, 10):
        clean = camera.on_detector(camera.with_ctf(wave, float(defocus)))
        sign, _ = polarity_of(clean, shown, spec)
        if sign or not len(shown):
            seen.append((*_plainness(clean, shown, spec, sign), sign, clean))
    if not seen:
        return []
    merits = imaging.merit(np.array([item[0] for item in seen]), np.array([item[1] for item in seen]))
    found = [(float(m), sign, clean) for m, (_, _, sign, clean) in zip(merits, seen, strict=True)]
    kept = _chosen(found, rng) if len(shown) else found
    return [labelled(clean, truth, sign, sampling=sampling, spec=spec, tilted=tilted) for _, sign, clean in kept]


def _chosen(
    found: list[tuple[float, int, np.ndarray]], rng: np.random.Generator
) -> list[tuple[float, int, np.ndarray]]:
    """Of images with (merit, sign, image): the best of either sign and any good one, none much worse than the best."""
    found = sorted(found, key=lambda item: -item[0])
    chosen = [next((item for item in found if item[1] == sign), None) for sign in (1, -1)]
    good = [item for item in found if item[0] > found[0][0] - 2.0]
    chosen += [good[int(rng.integers(len(good)))]]
    return [item for item in chosen if item is not None and item[0] >= found[0][0] - 2.5][:VIEWS]


def _tilted(scene: Scene, truth: np.ndarray) -> np.ndarray:
    """Which columns (column,) are tilted so far that nothing is to be found there."""
    return np.asarray(scene.smear[truth["column"]] > LOST)


def _plainness(clean: np.ndarray, truth: np.ndarray, spec: MovieSpec, sign: int) -> tuple[float, float]:
    """Clarity and mean contrast of the visible columns with the sign that they have; 1 where there are none."""
    y, x = (truth[axis][truth["visible"]] for axis in "yx")
    if not len(y):
        return 1.0, 1.0
    contrast = imaging.column_contrast(clean, y, x, 1.2 / spec.sampling)
    return imaging.clarity(sign * clean, y, x, spec.sampling), float(sign * contrast.mean())


def labelled(
    clean: np.ndarray, truth: np.ndarray, polarity: int, *, sampling: float, spec: MovieSpec, tilted: np.ndarray
) -> Example:
    """An image with its target.

    Columns too thin, somewhat blurred or of the wrong sign are marked unknown rather than absent; those tilted far off
    the beam (`tilted`, (column,)) are absent.
    """
    sure = truth["visible"] & ~tilted
    if polarity and len(truth):
        values = polarity * imaging.column_contrast(clean, truth["y"], truth["x"], 1.2 / spec.sampling)
        sure &= values > 0
    shown = truth[~tilted]
    return _example(clean, shown["y"], shown["x"], sure[~tilted], polarity, mode=spec.mode, sampling=sampling)


def _example(
    image: np.ndarray, y: np.ndarray, x: np.ndarray, sure: np.ndarray, polarity: int, *, mode: str, sampling: float
) -> Example:
    shape = image.shape
    yes = np.exp(-0.5 * (nearest(shape, y[sure], x[sure]) * sampling / LABEL_WIDTH) ** 2)
    doubtful = nearest(shape, y[~sure], x[~sure]) * sampling < DOUBT
    crystal = nearest(shape, y, x) * sampling < CRYSTAL_REACH
    known = ~doubtful | (yes > 0.5)
    points = np.column_stack([y[sure], x[sure]])
    return Example(image.astype(np.float32), yes.astype(np.float16), known, crystal, points, polarity, mode)


def nearest(shape: tuple[int, ...], y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Distance [px] of every pixel (y, x) to the nearest of some points, at most 20."""
    out = np.full(shape, 20.0)
    for py, px in zip(y, x, strict=True):
        top, left = max(int(py) - 19, 0), max(int(px) - 19, 0)
        part = out[top : int(py) + 21, left : int(px) + 21]
        rows, cols = np.arange(part.shape[0]) + top - py, np.arange(part.shape[1]) + left - px
        np.minimum(part, np.hypot(rows[:, None], cols), out=part)
    return out


def singles(rng: np.random.Generator, *, edge: int, sampling: float) -> Example:
    """Single heavy atoms, some in clusters, on a film of uneven thickness in HAADF; the fainter ones are unknown.

    The film's texture has the size of the probe, like the atoms, and any strength up to a third of theirs.
    """
    width = float(np.hypot(rng.uniform(0.7, 1.6) / 2.3548, 0.1) / sampling)
    count = int(rng.integers(3, 90))
    y, x = rng.uniform(2, edge - 3, (2, count))
    mates = rng.random(count) < rng.choice([0.0, 0.3])
    turn, apart = rng.uniform(0, 2 * np.pi, count), rng.uniform(2.0, 4.0, count) / sampling
    y, x = np.append(y, (y + apart * np.sin(turn))[mates]), np.append(x, (x + apart * np.cos(turn))[mates])
    y, x = (values[((y >= 0) & (x >= 0) & (np.maximum(y, x) <= edge - 1))] for values in (y, x))
    strength = rng.normal(1.0, rng.choice([0.05, 0.25]), len(y)).clip(0.2)
    atoms = np.zeros((edge, edge))
    rows = np.arange(edge)
    for py, px, height in zip(y, x, strength, strict=True):
        atoms += height * np.outer(*(np.exp(-0.5 * ((rows - p) / width) ** 2) for p in (py, px)))
    film = 1.0 + rng.uniform(0.02, 0.3) * _blobs(rng, edge, rng.uniform(12, 50))
    contrast = 10 ** rng.uniform(-0.4, 0.7)
    film += rng.uniform(0.0, 0.17) * contrast * _blobs(rng, edge, width)
    image = np.maximum(film, 0.05) + contrast * atoms
    return _example(image, y, x, strength > 0.6, 1, mode="haadf", sampling=sampling)


def _blobs(rng: np.random.Generator, edge: int, size: float) -> np.ndarray:
    """Noise (y, x) smoothed over `size` [px], of unit standard deviation."""
    field = gaussian_filter(rng.standard_normal((edge, edge)), size, mode="wrap")
    return np.asarray(field / max(float(field.std()), 1e-9))
