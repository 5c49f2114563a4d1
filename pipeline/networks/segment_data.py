"""Material to train the segmentation on: simulated images of known columns, and what denoisers leave of noise."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from pipeline.simulate import imaging
from pipeline.simulate.movie import Camera, polarity_of
from pipeline.simulate.scene import MovieSpec, build_scene, columns_of
from pipeline.steps.segment import FLATTEN, FLOOR, KNEE, smooth

LABEL_WIDTH = 0.35  # Å, standard deviation of the Gaussian that marks a column
CRYSTAL_REACH = 1.6  # Å around columns within which the sign of the contrast is to be told
DEFOCI = np.arange(-140.0, 141.0, 20.0)  # Å


class Example(NamedTuple):
    """One clean image (y, x) and its truth: target and known in 0…1 (y, x), crystal (y, x) bool, polarity ±1 or 0."""

    image: np.ndarray
    target: np.ndarray
    known: np.ndarray
    crystal: np.ndarray
    polarity: int
    mode: str


def random_spec(rng: np.random.Generator, *, edge: int, sampling: float) -> MovieSpec:
    """Any specimen and microscope. The sampling varies by a quarter, though the network is told it is `sampling`."""
    family = rng.choice(["particle", "sheet", "nothing"], p=[0.52, 0.29, 0.19])
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
        "carbon": float(rng.choice([0.0, rng.uniform(3, 12)], p=[0.15, 0.85])),
        "carbon_cover": float(rng.uniform(0.3, 1.2)),
    }
    if rng.random() < 0.3:
        common["mtf"] = (1.0, 0.0, float(rng.uniform(0.25, 0.5)), 2.5)
    if family == "sheet":
        kind = str(rng.choice(["graphene", "mos2", "wse2", "hbn"], p=[0.45, 0.3, 0.15, 0.1]))
        return MovieSpec(
            **common,
            kind=kind,
            mode=str(rng.choice(["hrtem", "haadf"], p=[0.55, 0.45])),
            energy=float(rng.choice([60.0, 80.0, 200.0, 300.0], p=[0.25, 0.45, 0.15, 0.15])),
            vacancies=float(rng.choice([0.0, 0.02, 0.08])),
            dopants=float(rng.choice([0.0, 0.02, 0.1], p=[0.4, 0.3, 0.3])),
            hole=float(rng.choice([0.0, rng.uniform(3, 12)])),
        )
    if family == "nothing":
        return MovieSpec(**common, kind=str(rng.choice(["carbon", "vacuum"], p=[0.7, 0.3])), energy=300.0)
    particles = int(rng.choice([1, 1, 1, 2, 3]))
    return MovieSpec(
        **common,
        kind="nanoparticle",
        mode=str(rng.choice(["hrtem", "haadf"], p=[0.87, 0.13])),
        energy=float(rng.choice([80.0, 200.0, 300.0], p=[0.1, 0.2, 0.7])),
        element=str(rng.choice(["Au", "Pt", "Ag", "Pd", "Cu", "Ni"], p=[0.55, 0.15, 0.1, 0.1, 0.05, 0.05])),
        zone=str(rng.choice(["110", "100", "111"], p=[0.45, 0.3, 0.25])),
        tilt=float(rng.uniform(0, 0.9)),
        thickness=float(rng.uniform(8, 30)),
        particles=particles,
        radius=float(rng.uniform(7, 18 if particles == 1 else 11)),
    )


def examples_of(spec: MovieSpec, rng: np.random.Generator, *, sampling: float, views: int) -> list[Example]:
    """Up to `views` images of one specimen at different defoci: the best of either contrast, then any clear one.

    Images in which the columns have mixed signs are left out.
    """
    scene = build_scene(spec, int(rng.integers(2**31)))
    camera = Camera(scene)
    truth = columns_of(scene, 0, camera.origin)
    if spec.mode == "haadf" or spec.kind == "vacuum":
        clean = camera.image(0, 0.0)
        return [labelled(clean, truth, 1 if len(truth) else 0, sampling=sampling, spec=spec)]
    wave = camera.wave(0, scene.drift[0])
    seen = []
    for defocus in (DEFOCI if len(truth) else rng.choice(DEFOCI, views, replace=False)) + rng.uniform(-10, 10):
        clean = camera.on_detector(camera.with_ctf(wave, float(defocus)))
        sign, _ = polarity_of(clean, truth, spec)
        if sign or not len(truth):
            seen.append((*_plainness(clean, truth, spec, sign), sign, clean))
    if not seen:
        return []
    merits = imaging.merit(np.array([item[0] for item in seen]), np.array([item[1] for item in seen]))
    found = [(float(m), sign, clean) for m, (_, _, sign, clean) in zip(merits, seen, strict=True)]
    found.sort(key=lambda item: -item[0])
    chosen = [next((item for item in found if item[1] == sign), None) for sign in (1, -1)]
    good = [item for item in found if item[0] > found[0][0] - 2.0]
    chosen += [good[int(rng.integers(len(good)))]] if good else []
    if not len(truth):
        chosen = list(found)
    best = found[0][0] if found else 0.0
    kept = [item for item in chosen if item is not None and item[0] >= best - 2.5][:views]
    return [labelled(clean, truth, sign, sampling=sampling, spec=spec) for _, sign, clean in kept]


def _plainness(clean: np.ndarray, truth: np.ndarray, spec: MovieSpec, sign: int) -> tuple[float, float]:
    """Clarity and mean contrast of the visible columns with the sign that they have; 1 where there are none."""
    y, x = (truth[axis][truth["visible"]] for axis in "yx")
    if not len(y):
        return 1.0, 1.0
    contrast = imaging.column_contrast(clean, y, x, 1.2 / spec.sampling)
    return imaging.clarity(sign * clean, y, x, spec.sampling), float(sign * contrast.mean())


def labelled(clean: np.ndarray, truth: np.ndarray, polarity: int, *, sampling: float, spec: MovieSpec) -> Example:
    """An image with its target; columns too thin or of the wrong sign are marked unknown rather than absent."""
    sure = truth["visible"].copy()
    if polarity and len(truth):
        values = polarity * imaging.column_contrast(clean, truth["y"], truth["x"], 1.2 / spec.sampling)
        sure &= values > 0
    shape = clean.shape
    distance = nearest(shape, truth["y"], truth["x"])
    yes = np.exp(-0.5 * (nearest(shape, truth["y"][sure], truth["x"][sure]) * sampling / LABEL_WIDTH) ** 2)
    doubtful = nearest(shape, truth["y"][~sure], truth["x"][~sure]) * sampling < 0.8
    return Example(
        clean.astype(np.float32),
        yes.astype(np.float16),
        (~doubtful | (yes > 0.5)),
        distance * sampling < CRYSTAL_REACH,
        polarity,
        spec.mode,
    )


def nearest(shape: tuple[int, ...], y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Distance [px] of every pixel (y, x) to the nearest of some points, at most 20."""
    out = np.full(shape, 20.0)
    for py, px in zip(y, x, strict=True):
        top, left = max(int(py) - 19, 0), max(int(px) - 19, 0)
        part = out[top : int(py) + 21, left : int(px) + 21]
        rows, cols = np.arange(part.shape[0]) + top - py, np.arange(part.shape[1]) + left - px
        np.minimum(part, np.hypot(rows[:, None], cols), out=part)
    return out


def degrade(image: np.ndarray, rng: np.random.Generator, *, mode: str) -> np.ndarray:
    """What a denoiser may make of a clean image (y, x): blurred, with smooth residual noise, uneven illumination.

    The residual has a standard deviation of 0.2 to 12 % of the mean and is correlated over 0 to 3 px, on two scales.
    """
    image = np.maximum(image, 0.0) ** rng.uniform(0.8, 1.25)
    if mode == "haadf" and rng.random() < 0.4:
        image = _scanned(image, rng)
    image = gaussian_filter(image, rng.uniform(0.0, 1.2)) if rng.random() < 0.6 else image
    level = np.sqrt(np.maximum(image, 0.02))
    strength = 10 ** rng.uniform(-2.7, -0.92)
    noise = np.zeros_like(image)
    for share in (1.0, rng.uniform(0, 1)):
        width = rng.choice([0.0, rng.uniform(0.5, 3.0)], p=[0.2, 0.8])
        field = rng.standard_normal(image.shape) * (1.0 if width else level)
        field = gaussian_filter(field, width, mode="reflect") * level if width else field
        if rng.random() < 0.3:  # denoisers that work at half resolution leave blocks
            field = np.kron(field[::2, ::2], np.ones((2, 2)))[: image.shape[0], : image.shape[1]]
        noise += share * field / max(float(field.std()), 1e-6)
    if rng.random() < 0.5:  # and are surer of themselves in some places than in others
        noise *= np.exp(rng.uniform(0, 1.2) * 15 * gaussian_filter(rng.standard_normal(image.shape), 4.0))
    image = image + strength * noise / max(float(noise.std()), 1e-6) * float(level.mean())
    if rng.random() < 0.4:
        rows, cols = (np.linspace(-1, 1, n) for n in image.shape)
        slope, bend = rng.normal(0, 0.08, 2), rng.normal(0, 0.05)
        image = image * (1 + slope[0] * rows[:, None] + slope[1] * cols + bend * rows[:, None] * cols)
    return image.astype(np.float32)


def _scanned(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows displaced and dimmed at random, as scanning does."""
    rows = np.arange(image.shape[0])
    moved = gaussian_filter(rng.normal(0, rng.uniform(0, 0.8), len(rows)), rng.uniform(0, 2))
    cols = np.arange(image.shape[1])
    out = np.stack([np.interp(cols + moved[row], cols, image[row]) for row in rows])
    return out * (1 + rng.normal(0, rng.uniform(0, 0.03), len(rows)))[:, None]


def network_input(image: np.ndarray, *, sampling: float, gain: float) -> Tensor:
    """As `segment.prepare` does at the network's own sampling, with the scale multiplied by `gain`.

    So the network learns frames whose contrast is spread differently from those that were simulated.
    """
    frame = torch.from_numpy(image)
    flat = frame - smooth(frame, FLATTEN / sampling)
    scale = torch.sqrt(flat.square().mean() + (FLOOR * frame.mean()).square()).clamp_min(1e-12)
    return KNEE * torch.asinh(gain * flat / (KNEE * scale))
