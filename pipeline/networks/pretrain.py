"""Train the shipped denoiser on movies with a known answer, so that a movie needs little training of its own.

The target is the clean image (the network stays blind by construction, so it can be adapted later without one). Each
step draws two movies: simulated specimens or made-up lattices, brightened, dimmed or inverted, at a random dose, with
readout noise, flicker and wrong alignment now and then; parts that move on their own are followed, as in use. The loss
is the mean over crops of log(squared error), that is the mean PSNR, so that no dose outweighs another. Gold and MoS2
are left out: benchmarks use them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.networks.adapt import blend, bound, spread_of_motion, untrained
from pipeline.networks.adapt_sample import Sample
from pipeline.networks.blindspot import AROUND, CONTEXT_RADIUS
from pipeline.networks.phantoms import CleanMovie, phantom
from pipeline.networks.wiener import NeighbourWiener, common_power, kernel_of, scatter_of, wiener_kernel
from pipeline.simulate.movie import MovieSpec, simulate_movie
from pipeline.steps.denoise import denoise_with_errors, one_thread, reduced_precision
from pipeline.steps.neighbours import (
    FrameLinks,
    Level,
    context_of,
    local_shifts,
    looked_at,
    measure_level,
    neighbour_stack,
)

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
# Squared relative error below which a crop counts as solved; without it pure noise would outweigh everything.
FLOOR = 1e-4
# Steps over which weights are averaged.
MEMORY = 500
# The learning rate of a second round, over that of the first.
AGAIN_RATE = 2 / 3
# Steps in which a network learns how far off it is, and their learning rate.
ERROR_STEPS, ERROR_RATE = 1500, 0.03


class PretrainSettings(NamedTuple):
    """How much to train, and on what; `again`: steps of a second round, from what the first one gave."""

    steps: int
    simulated: int
    phantoms: int
    crop: int
    batch: int
    learning_rate: float
    seed: int
    again: int = 0


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


def movie_bank(settings: PretrainSettings, *, report: Callable[[str], None]) -> list[Known]:
    """Simulated movies and phantoms, each of its own seed; a specimen too large to simulate is drawn anew."""
    bank = []
    for i in range(settings.simulated):
        rng = np.random.default_rng([settings.seed, 1, i])
        spec = random_spec(rng)
        movie = simulate_movie(spec, int(rng.integers(2**31)))
        bank.append(known(CleanMovie(movie.clean, movie.drift)))
        if i % 20 == 0:
            report(f"simulated {i + 1} of {settings.simulated} movies ({spec.kind}, {spec.mode})")
    for i in range(settings.phantoms):
        bank.append(known(phantom(np.random.default_rng([settings.seed, 2, i]), frames=FRAMES, side=SIDE)))
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


def pretrain(
    config: dict[str, Any],
    settings: PretrainSettings,
    *,
    report: Callable[[str], None],
    snapshot: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Train a blind-spot network of `config` from scratch; one thread, the same bits for the same settings.

    The result is a running average of the weights over about MEMORY steps, and `snapshot` is given it now and then.
    """
    average = untrained("blindspot", config, seed=settings.seed)
    bank = movie_bank(settings, report=report)
    with one_thread():
        for cycle in range(2):
            average = _round(average.eval(), bank, settings, cycle=cycle, report=report, snapshot=snapshot)
    learn_errors(average, bank, settings, report=report)
    return average


def _round(
    start: nn.Module,
    bank: Sequence[Known],
    settings: PretrainSettings,
    *,
    cycle: int,
    report: Callable[[str], None],
    snapshot: Callable[[nn.Module], None] | None,
) -> nn.Module:
    """The running average of the weights at the end of the first or second round of steps."""
    network: Any = copy.deepcopy(start).train()
    average, frames = copy.deepcopy(start), len(network.offsets)
    steps, most = (settings.steps, 1.0) if cycle == 0 else (settings.again, AGAIN_RATE)
    rng = np.random.default_rng([settings.seed, 3, cycle])
    optimiser = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    begin, recent = time.perf_counter(), 0.0
    for step, rate in enumerate(_rates(steps)):
        optimiser.param_groups[0]["lr"] = settings.learning_rate * most * rate
        optimiser.zero_grad(set_to_none=True)
        for _ in range(2):
            part = draw(bank, rng, frames=frames, crop=settings.crop, batch=settings.batch // 2)
            with reduced_precision("cpu", "auto"):
                estimate = network(part.stack, part.valid, part.level, part.context)
            error = ((estimate - part.target) / part.level[0]).square().mean((1, 2))
            loss = (error + FLOOR).log().mean() / 2
            loss.backward()
            recent = 0.998 * recent + 0.004 * loss.item()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        blend(average, network, 1 / min(step + 1, MEMORY))
        if step % 500 == 499:
            seconds = time.perf_counter() - begin
            report(f"round {cycle + 1}, step {step + 1} of {steps}: mean log error {recent:.3f}, {seconds:.0f} s")
            if snapshot is not None:
                snapshot(average)
    return average


def learn_errors(
    network: Any, bank: Sequence[Known], settings: PretrainSettings, *, report: Callable[[str], None]
) -> None:
    """Teach a network with an output for it how far off its estimates are; they stay what they are.

    The loss is the negative logarithm of a normal likelihood, least where the stated variance is the mean of the
    squared error of all pixels that look alike to the network.
    """
    head: nn.Module | None = network.error
    if head is None:
        return
    steps = min(ERROR_STEPS, settings.steps)
    rng, frames = np.random.default_rng([settings.seed, 4]), len(network.offsets)
    network.requires_grad_(False)
    head.requires_grad_(True)
    optimiser, recent = torch.optim.Adam(head.parameters(), lr=ERROR_RATE), 0.0
    with one_thread():
        for step, rate in enumerate(_rates(steps)):
            optimiser.param_groups[0]["lr"] = ERROR_RATE * rate
            part = draw(bank, rng, frames=frames, crop=settings.crop, batch=settings.batch)
            with reduced_precision("cpu", "auto"):
                estimate, error = network.with_errors(part.stack, part.valid, part.level, part.context).unbind(1)
            loss = (error.log() + ((estimate.detach() - part.target) / error).square() / 2).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            recent = 0.99 * recent + 0.01 * ((estimate - part.target) / error).detach().square().mean().item()
            if step % 500 == 499:
                report(f"errors, step {step + 1} of {steps}: mean square of error over stated error {recent:.2f}")
    network.requires_grad_(True)


def _rates(steps: int) -> Iterator[float]:
    """Learning rate over its maximum: a short rise, then half a cosine."""
    rise = max(1, min(300, steps // 10))
    for step in range(steps):
        yield min(1.0, (step + 1) / rise) * 0.5 * (1 + float(np.cos(np.pi * step / steps)))


def card_figures(network: nn.Module, *, seed: int) -> dict[str, float]:
    """Figures for the model card on movies never trained on: PSNR [dB] by dose, and what becomes of pure noise.

    `within_68` and `within_95`: share of the pixels whose error is below the stated one, and below twice that;
    `noise_std`: standard deviation of denoised pure noise over its mean; `noise_ring`: largest over median amplitude in
    the ring of 0.06 to 0.16 cycles per pixel of the mean spectrum (a lattice made up by the network would show there).
    """
    figures = {}
    made = simulate_movie(MovieSpec(element="Ag", frames=12, rotation_step=0.2, drift_step=0.1), seed)
    for dose in (0.05, 0.2, 1.0, 5.0):
        clean = made.clean / made.clean.mean()
        counts = np.random.default_rng(seed).poisson(dose * clean)
        estimate, expected = (part / dose for part in _denoised(network, counts, np.round(made.drift)))
        inner = (slice(3, -3), slice(16, -16), slice(16, -16))
        error = float(np.mean((estimate[inner] - clean[inner]) ** 2))
        off = np.abs(estimate[inner] - clean[inner])
        for share, times in ((68, 1), (95, 2)):
            figures[f"within_{share}_{dose:g}"] = round(float(np.mean(off < times * expected[inner])), 3)
        figures[f"psnr_{dose:g}"] = round(10 * np.log10(float(np.ptp(clean[inner])) ** 2 / error), 2)
        noise = _denoised(network, np.random.default_rng(seed).poisson(dose, clean.shape), np.zeros((12, 2)))[0] / dose
        figures[f"noise_std_{dose:g}"] = round(float(noise.std()), 4)
        spectrum = np.abs(np.fft.fft2(noise - noise.mean((1, 2), keepdims=True))).mean(0)
        f = np.hypot(*np.meshgrid(*[np.fft.fftfreq(s) for s in spectrum.shape], indexing="ij"))
        ring = spectrum[(f > 0.06) & (f < 0.16)]
        figures[f"noise_ring_{dose:g}"] = round(float(ring.max() / np.median(ring)), 2)
    return figures


def _denoised(
    network: nn.Module, counts: NDArray[Any], drift: NDArray[Any]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    frames = counts.astype(np.float32)
    n = len(frames)
    links = FrameLinks(drift.astype(np.int64), np.ones(n, dtype=bool), np.zeros(n, dtype=np.int64))
    level = measure_level(frames, readout_variance=0.0)
    told = bound(network, frames, links=links, level=level)
    return denoise_with_errors(told, frames, range(n), links=links, level=level, tile=None, dtype="float32")
