"""The movies that the shipped denoiser learns from, and what is drawn of them: noisy crops whose truth is known.

Simulated specimens or made-up lattices, brightened, dimmed or inverted, at a random dose, with readout noise, flicker
and wrong alignment now and then; parts that move on their own are followed, as in use. Gold and MoS2 are left out:
benchmarks use them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.networks.adapt import spread_of_motion
from pipeline.networks.adapt_sample import Sample
from pipeline.networks.blindspot import AROUND, CONTEXT_RADIUS
from pipeline.networks.phantoms import CleanMovie, phantom
from pipeline.networks.wiener import NeighbourWiener, common_power, kernel_of, scatter_of, wiener_kernel
from pipeline.simulate.movie import MovieSpec, simulate_movie
from pipeline.steps.neighbours import FrameLinks, Level, context_of, local_shifts, looked_at, neighbour_stack

FRAMES = 16
SIDE = 208
DOSES = (0.03, 30.0)
# Scatter above which the power of a movie of usual length counts as signal, and its frames.
CLEARLY = 6.0
LENGTHS = (16, 64)
# Electrons per pixel at which it is measured how far parts of a movie move.
MANY = 10.0
# Spread [px] of drift that is wrong by a pixel here and there.
WRONG = 0.8


class Drawn(NamedTuple):
    """One batch: stack and validity (batch, slot, y, x), clean target (batch, y, x) [electrons], level (2,), and the
    filtered mean of the neighbours (batch, y, x) [electrons about the mean]."""

    stack: Tensor
    valid: Tensor
    target: Tensor
    level: Tensor
    context: Tensor


class Known(NamedTuple):
    """A clean movie, the smoothed power per pixel (ky, kx) of its frames about their mean, of mean one, and how far
    parts of it move on their own [px], see `pipeline.steps.motion`."""

    movie: CleanMovie
    power: NDArray[np.float64]
    motion: tuple[float, ...]


def random_spec(rng: np.random.Generator) -> MovieSpec:
    """A specimen of any kind but those of the benchmarks."""
    kind = str(rng.choice(["nanoparticle", "graphene", "hbn", "carbon", "vacuum"], p=[0.62, 0.12, 0.1, 0.08, 0.08]))
    mode = "haadf" if kind != "vacuum" and rng.random() < 0.25 else "hrtem"
    return MovieSpec(
        kind=kind,
        shape=(SIDE, SIDE),
        frames=FRAMES,
        mode=mode,
        sampling=float(rng.uniform(0.08, 0.3)),
        energy=float(rng.choice([80.0, 200.0, 300.0])),
        element=str(rng.choice(["Pt", "Pd", "Cu", "Ni"])),
        zone=str(rng.choice(["100", "110", "111"])),
        tilt=float(rng.choice([0.0, 1.0, 3.0])),
        carbon=float(rng.choice([0.0, 4.0, 9.0])),
        carbon_cover=float(rng.uniform(0.3, 1)),
        contrast=str(rng.choice(["bright", "dark"])),
        defocus=None if rng.random() < 0.7 or mode == "haadf" else float(rng.uniform(-150, 150)),
        vacancies=float(rng.uniform(0, 0.05)),
        hole=float(rng.choice([0.0, 5.0, 10.0])),
        rotation_step=float(rng.choice([0.0, 0.2, 0.5])),
        drift_step=float(np.exp(rng.uniform(np.log(0.01), np.log(0.25)))),
    )


def movie_bank(*, simulated: int, phantoms: int, seed: int, report: Callable[[str], None]) -> list[Known]:
    """So many simulated movies and phantoms, each of its own seed."""
    bank = []
    for i in range(simulated):
        rng = np.random.default_rng([seed, 1, i])
        spec = random_spec(rng)
        movie = simulate_movie(spec, int(rng.integers(2**31)))
        bank.append(known(CleanMovie(movie.clean, movie.drift)))
        if i % 20 == 0:
            report(f"simulated {i + 1} of {simulated} movies ({spec.kind}, {spec.mode})")
    for i in range(phantoms):
        bank.append(known(phantom(np.random.default_rng([seed, 2, i]), frames=FRAMES, side=SIDE)))
    return bank


def known(movie: CleanMovie) -> Known:
    """A movie with its spectrum, and its motion as many electrons show it."""
    mean = float(movie.frames.mean())
    relative = torch.from_numpy(movie.frames / mean - 1)
    n, level = len(relative), Level(MANY, MANY)
    links = FrameLinks(np.round(movie.drift).astype(np.int64), np.ones(n, dtype=bool), np.zeros(n, dtype=np.int64))
    guide = NeighbourWiener(frames=AROUND, context=CONTEXT_RADIUS)
    bright = MANY * (1 + relative)
    guide.kernel.copy_(wiener_kernel(guide, bright, links=links, level=level))
    guide.motion = spread_of_motion(guide, Sample(bright, links, level))
    power, _ = common_power(guide, bright, links=links, level=level)
    return Known(movie, power, guide.motion)


def _filter(
    signal: NDArray[np.float64], length: int, level: Level, *, frames: int = AROUND, motion: Sequence[float] = ()
) -> NeighbourWiener:
    """The filter that a movie of `length` frames and this power [electrons²] is given, for a network of `frames`."""
    made = NeighbourWiener(frames=frames, context=CONTEXT_RADIUS, around=AROUND, motion=motion)
    place, radius = np.arange(length), max(made.around)
    scatter = scatter_of(np.minimum(place, radius) + np.minimum(place[::-1], radius).astype(float))
    made.kernel.copy_(kernel_of(signal, CLEARLY * scatter, level, around=made.around, reach=CONTEXT_RADIUS))
    return made


def draw(bank: Sequence[Known], rng: np.random.Generator, *, frames: int, crop: int, batch: int) -> Drawn:
    """Noisy crops of one frame of one movie at one dose, with the clean crops behind them."""
    movie, power, motion = bank[int(rng.integers(len(bank)))]
    factor = _factor(rng)
    clean = torch.from_numpy(_restyled(movie.frames, factor))
    dose = float(np.exp(rng.uniform(*np.log(DOSES))))
    readout = float(rng.uniform(0, 1)) if rng.random() < 0.2 else 0.0
    mean = dose * float(clean.mean())
    level = Level(mean, mean + readout)
    index = int(rng.integers(len(clean)))
    near = slice(max(0, index - AROUND // 2), index + AROUND // 2 + 1)
    wrong = rng.random() < 0.25
    links = _links(movie.drift[near], rng, wrong=wrong)
    index -= near.start
    bright = clean[near]
    target = dose * bright[index]
    if rng.random() < 0.15:
        flicker = torch.from_numpy(rng.normal(1, 0.05, (len(bright), 1, 1)).astype(np.float32))
        bright = bright * flicker.clamp_min(0.5)
    if rng.random() < 0.15:  # a short movie: no neighbours beyond some distance, none at all in a third of the cases
        links.good[np.abs(np.arange(len(bright)) - index) > rng.integers(0, AROUND // 2)] = False
    noisy = torch.from_numpy(rng.poisson(dose * bright.numpy()).astype(np.float32))
    if readout:
        noisy += float(np.sqrt(readout)) * torch.from_numpy(rng.standard_normal(noisy.shape, dtype=np.float32))
    # The filter that a movie of some length would be given: the longer, the more of its lattice it lets through. And
    # its motion about as such a movie would tell it, at times not at all.
    length = int(np.exp(rng.uniform(*np.log(LENGTHS))))
    told = rng.random() > 0.2
    spread = [float(part * np.exp(rng.normal(0, 0.3))) for part in motion] if told else []
    if wrong and told:
        spread[0] = float(np.hypot(spread[0], WRONG))
    guide = _filter(power * (factor * mean) ** 2, length, level, frames=frames, motion=spread)
    shifts = local_shifts(guide, noisy, index, links=links, level=level)
    stack, valid = neighbour_stack(noisy, index, offsets=guide.around, links=links, fill=mean, shifts=shifts)
    context, looked = context_of(guide, stack, valid, level), looked_at(guide)
    stack, valid = stack[looked], valid[looked]
    crops = []
    for _ in range(batch):
        top, left = (int(rng.integers(size - crop + 1)) for size in clean.shape[1:])
        here, turn = (..., slice(top, top + crop), slice(left, left + crop)), _turn(rng)
        crops.append([turn(part[here]) for part in (stack, valid, target, context)])
    stacks, valids, targets, contexts = (torch.stack(parts) for parts in zip(*crops, strict=True))
    return Drawn(stacks, valids, targets, torch.tensor(level, dtype=torch.float32), contexts)


def _factor(rng: np.random.Generator) -> float:
    """By how much to change a contrast; inverted in a third of the cases."""
    return float(np.exp(rng.uniform(np.log(0.3), np.log(1.5)))) * (-1 if rng.random() < 0.33 else 1)


def _restyled(frames: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """The contrast times a factor; never negative."""
    mean = float(frames.mean())
    return np.maximum(1 + factor * (frames / mean - 1), 0.01).astype(np.float32)


def _links(drift: NDArray[np.float64], rng: np.random.Generator, *, wrong: bool) -> FrameLinks:
    """The true drift in whole pixels, or `wrong` by a pixel here and there; now and then with bad frames."""
    n = len(drift)
    whole = np.round(drift).astype(np.int64)
    if wrong:
        whole = whole + rng.integers(-1, 2, whole.shape)
    good = rng.random(n) > (0.15 if rng.random() < 0.15 else 0.0)
    return FrameLinks(whole, good, np.zeros(n, dtype=np.int64))


def _turn(rng: np.random.Generator) -> Callable[[Tensor], Tensor]:
    """One of the eight symmetries of the square, for the last two axes."""
    flips, swap = [axis for axis in (-1, -2) if rng.random() < 0.5], rng.random() < 0.5
    return lambda image: image.flip(flips).transpose(-1, -2) if swap else image.flip(flips)
