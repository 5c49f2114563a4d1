"""Material to train the segmentation of particles on: simulated images, their outlines, and frames of any dose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional

from pipeline.networks.adapt import bound
from pipeline.networks.blindspot import BlindSpot
from pipeline.networks.training import Plan
from pipeline.simulate.detector import apply_mtf
from pipeline.simulate.movie import Camera, MovieSpec
from pipeline.simulate.scene import build_scene
from pipeline.simulate.truth import mask_of
from pipeline.steps import segment
from pipeline.steps.denoise import denoise
from pipeline.steps.neighbours import FrameLinks, measure_level
from schemas.errors import SettingsError

ELEMENTS = {"Au": 0.4, "Pt": 0.2, "Pd": 0.15, "Ag": 0.1, "Cu": 0.08, "Ni": 0.07}
FAMILIES = {"particles": 0.66, "film": 0.15, "sheet": 0.15, "vacuum": 0.04}
VIEWS = 3  # images of one specimen at different defoci


@dataclass(frozen=True)
class ParticleSpec:
    """How the particle network is trained; the defaults are those of the shipped weights. All follows from `seed`.

    scenes, check_scenes: random specimens to train on and to validate with, simulated on `edge` × `edge` pixels of
    `fine` [Å/px]; a step sees `crop` × `crop` pixels at the network's own `sampling` [Å/px]; coarsest: detector
    [Å/px] up to which frames are made; doses: least and greatest [e⁻/Å² per frame], drawn evenly in their logarithm;
    tilt: greatest angle off the zone [degrees]; raw: share of frames that no denoiser has seen; outlines: weight of
    pixels within 1.5 Å of an outline, those elsewhere have 1. denoised: frames made by the shipped denoiser itself, of
    which one in three crops is taken.
    """

    seed: int = 51
    scenes: int = 420
    denoised: int = 500
    check_scenes: int = 40
    steps: int = 3000
    batch: int = 6
    rate: float = 4e-3
    check_every: int = 375
    edge: int = 288
    fine: float = 0.25
    crop: int = 128
    sampling: float = 0.45
    coarsest: float = 1.2
    width: int = 8
    dilations: tuple[int, ...] = (1, 2, 4, 8, 16, 8, 4, 2)
    doses: tuple[float, float] = (20.0, 1500.0)
    tilt: float = 20.0
    raw: float = 0.5
    outlines: float = 2.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if np.min(value) < 0 or (np.min(value) == 0 and item.name not in ("seed", "raw", "tilt", "denoised")):
                raise SettingsError(f"{item.name} of the training is {value!r}; expected a positive number")
        if self.crop * self.sampling > 0.9 * self.edge * self.fine:
            raise SettingsError(
                f"crop is {self.crop} px of {self.sampling} Å; expected at most nine tenths of a simulated image, "
                f"{0.9 * self.edge * self.fine:.0f} Å"
            )

    @property
    def plan(self) -> Plan:
        """What `training.fit` wants to know."""
        return Plan(self.seed, self.steps, self.batch, self.rate, self.check_every)


class Example(NamedTuple):
    """An image (y, x), mean about 1, on pixels of `sampling` [Å/px], and where its particles are (y, x) bool.

    clean: without noise; else it is a frame as it leaves a denoiser.
    """

    image: np.ndarray
    mask: np.ndarray
    sampling: float
    clean: bool = True


class Prepared(NamedTuple):
    """What the network sees (1, y, x), and what it is to say: share of each pixel in a particle (1, y, x)."""

    image: Tensor
    target: Tensor


def random_movie(rng: np.random.Generator, spec: ParticleSpec) -> MovieSpec:
    """Any specimen and microscope: several particles on and off zone, bare film, sheets, vacuum."""
    family = str(rng.choice(list(FAMILIES), p=list(FAMILIES.values())))
    fine = float(spec.fine * rng.uniform(0.85, 1.15))
    common: dict[str, Any] = {
        "shape": (spec.edge, spec.edge),
        "frames": 1,
        "sampling": fine,
        "mode": str(rng.choice(["hrtem", "haadf"], p=[0.85, 0.15])),
        "energy": float(rng.choice([80.0, 200.0, 300.0], p=[0.1, 0.2, 0.7])),
        "vibration": float(rng.uniform(0.02, 0.08)),
        "events": 0,
        "drift_limit": 0.5,
        "focal_spread": float(rng.uniform(10, 40)),
        "angular_spread": float(rng.uniform(0.1, 0.5)),
        "spherical": float(rng.choice([-5e4 * rng.uniform(0.6, 1.6), rng.choice([-1, 1]) * 10 ** rng.uniform(4, 5.8)])),
        "probe": float(rng.uniform(0.7, 1.5)),
        "carbon": float(rng.choice([0.0, rng.uniform(3, 15)], p=[0.12, 0.88])),
        "carbon_cover": float(rng.choice([1.0, rng.uniform(0.3, 1.0)])),
    }
    if rng.random() < 0.3:
        common["mtf"] = (1.0, 0.0, float(rng.uniform(0.25, 0.5)), 2.5)
    if family == "vacuum":
        return MovieSpec(**common | {"kind": "vacuum", "mode": "hrtem"})
    if family == "film":
        return MovieSpec(**common | {"kind": "carbon", "carbon": float(rng.uniform(4, 30))})
    if family == "sheet":
        kind = str(rng.choice(["graphene", "hbn", "mos2", "wse2"], p=[0.4, 0.1, 0.3, 0.2]))
        common |= {"mode": str(rng.choice(["hrtem", "haadf"])), "hole": float(rng.choice([0.0, rng.uniform(3, 15)]))}
        if kind == "graphene" and rng.random() < 0.5:
            common |= {"groups": ("trimer", "dimer"), "dopants": float(rng.choice([0.0, 0.01]))}
        return MovieSpec(**common, kind=kind, vacancies=float(rng.choice([0.0, 0.03])))
    count = int(rng.choice([1, 2, 3, 5], p=[0.35, 0.3, 0.2, 0.15]))
    return MovieSpec(
        **common,
        kind="nanoparticle",
        element=str(rng.choice(list(ELEMENTS), p=list(ELEMENTS.values()))),
        zone=str(rng.choice(["110", "100", "111"], p=[0.45, 0.3, 0.25])),
        thickness=float(rng.uniform(8, 34)),
        particles=count,
        tilts=tuple(float(v) for v in rng.choice([0.0, 1.0], count, p=[0.4, 0.6]) * rng.uniform(0, spec.tilt, count)),
        radius=float(rng.uniform(6, {1: 24, 2: 15, 3: 12, 5: 9}[count])),
    )


def examples_of(movie: MovieSpec, rng: np.random.Generator) -> list[Example]:
    """VIEWS images of one specimen, in HRTEM at defoci within 200 Å of focus, most within 100 Å."""
    scene = build_scene(movie, int(rng.integers(2**31)))
    camera = Camera(scene)
    mask = mask_of(scene, 0, camera.origin) > 0
    if movie.mode == "haadf" or movie.kind == "vacuum":
        # Every specimen counts as much, whatever its number of images.
        return [Example(camera.image(0, 0.0), mask, movie.sampling)] * VIEWS
    wave = camera.wave(0, scene.drift[0])
    defoci = rng.uniform(-1, 1, VIEWS) * rng.choice([100.0, 200.0], VIEWS)
    return [
        Example(camera.on_detector(camera.with_ctf(wave, float(defocus))), mask, movie.sampling) for defocus in defoci
    ]


def simulate(spec: ParticleSpec, numbers: Sequence[int]) -> list[Example]:
    """Images of the specimens with these numbers; the same number always gives the same images."""
    found: list[Example] = []
    for number in numbers:
        rng = np.random.default_rng([spec.seed, 7, number])
        found += examples_of(random_movie(rng, spec), rng)
    return found


def denoised_examples(
    examples: Sequence[Example], denoiser: BlindSpot, spec: ParticleSpec, numbers: Sequence[int]
) -> list[Example]:
    """Random examples at random doses behind a denoiser: the middle of as many still frames as it looks at."""
    found = []
    for number in numbers:
        rng = np.random.default_rng([spec.seed, 11, number])
        image, mask, sampling, _ = examples[int(rng.integers(len(examples)))]
        dose = float(np.exp(rng.uniform(*np.log(spec.doses))))
        count = len(denoiser.around)
        clean = np.broadcast_to(np.maximum(image, 0), (count, *image.shape))
        frames = rng.poisson(dose * sampling**2 * clean).astype(np.float32)
        links = FrameLinks(np.zeros((count, 2), np.int64), np.ones(count, bool), np.zeros(count, np.int64))
        level = measure_level(frames, readout_variance=0.0)
        told = bound(denoiser, frames, links=links, level=level)
        made = denoise(told, frames, [count // 2], links=links, level=level, tile=None, dtype="float32")[0]
        found.append(Example(made / max(float(made.mean()), 1e-9), mask, sampling, clean=False))
    return found


# ------------------------------------------------------------------------------------------------------------ frames


def frame_of(image: np.ndarray, rng: np.random.Generator, *, sampling: float, dose: float, raw: bool) -> np.ndarray:
    """What is given to the network of a clean image (y, x): one noisy frame of `dose` [e⁻/Å²], or one denoised.

    A denoised frame is as if it had 2 to 20 times the dose, blurred by 0.2 to 0.9 Å along with its noise; some keep
    blotches of 0.5 to 2 % of the mean, a few Å wide.
    """
    if raw:
        return _counted(image, rng, dose * sampling**2)
    gain = float(np.exp(rng.uniform(np.log(2), np.log(20))))
    made = gaussian_filter(_counted(image, rng, gain * dose * sampling**2), rng.uniform(0.2, 0.9) / sampling)
    if rng.random() < 0.4:
        blotches = gaussian_filter(rng.standard_normal(image.shape), rng.uniform(1.0, 4.0) / sampling)
        made += rng.uniform(0.005, 0.02) * blotches / max(float(blotches.std()), 1e-9)
    return made


def _counted(image: np.ndarray, rng: np.random.Generator, electrons: float) -> np.ndarray:
    """Image with the noise of `electrons` per pixel, as a counting camera has it, or blurred as an integrating one."""
    counted = rng.poisson(np.maximum(image, 0) * electrons) / electrons
    if rng.random() < 0.2:
        counted = apply_mtf(counted, (1.0, 0.0, float(rng.uniform(0.2, 0.5)), 2.5))
    return np.asarray(counted, dtype=np.float32)


def prepared(example: Example, rng: np.random.Generator, spec: ParticleSpec, *, dose: float, raw: bool) -> Prepared:
    """One frame of an example at `dose` [e⁻/Å²] with its target, both on the network's grid.

    Now and then the detector is coarser than the simulation, or an illumination that falls off to one side is added.
    """
    image, mask, sampling, clean = example
    if clean and rng.random() < 0.3:
        coarse = float(rng.uniform(2 * spec.fine, spec.coarsest))
        image, sampling = _binned(image, sampling / coarse), coarse
    frame = frame_of(image, rng, sampling=sampling, dose=dose, raw=raw) if clean else image
    if rng.random() < 0.4:
        rows, cols = (np.linspace(-1, 1, n) for n in frame.shape)
        slope = rng.normal(0, 0.05, 2)
        frame = frame * (1 + slope[0] * rows[:, None] + slope[1] * cols)
    tensor = torch.from_numpy(np.ascontiguousarray(frame, dtype=np.float32))
    shown = segment.prepare_particles(tensor, sampling=sampling, model_sampling=spec.sampling)
    target = torch.from_numpy(mask.astype(np.float32))[None, None]
    target = functional.interpolate(target, size=shown.shape, mode="bilinear", antialias=True, align_corners=False)
    return Prepared(shown[None], target[0].clamp(0.0, 1.0))


def _binned(image: np.ndarray, factor: float) -> np.ndarray:
    """Image (y, x) on `factor` times the pixels along each axis, each the mean of what it covers."""
    size = [max(8, round(n * factor)) for n in image.shape]
    tensor = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None, None]
    return np.asarray(functional.interpolate(tensor, size=size, mode="area")[0, 0].numpy())


def sample(
    examples: Sequence[Example], rng: np.random.Generator, spec: ParticleSpec, *, frames: Sequence[Example] = ()
) -> tuple[Tensor, Tensor]:
    """Input and target (1, crop, crop) of a random crop of a random frame, turned and flipped.

    One in three is of `frames` that left a denoiser, if there are any.
    """
    chosen = frames if len(frames) and rng.random() < 0.33 else examples
    example = chosen[int(rng.integers(len(chosen)))]
    dose = float(np.exp(rng.uniform(*np.log(spec.doses))))
    made = prepared(example, rng, spec, dose=dose, raw=bool(rng.random() < spec.raw))
    gain = float(np.exp(rng.uniform(-0.3, 0.3)))
    top, left = (int(rng.integers(0, n - spec.crop + 1)) for n in made.image.shape[1:])
    turns, flip = int(rng.integers(4)), bool(rng.integers(2))
    out = []
    for tensor in (gain * made.image, made.target):
        part = torch.rot90(tensor[:, top : top + spec.crop, left : left + spec.crop], turns, (1, 2))
        out.append((part.flip(2) if flip else part).contiguous())
    return out[0], out[1]
