"""Train the shipped denoiser on movies with a known answer, so that a movie needs little training of its own.

The target is the clean image (the network stays blind by construction, so it can be adapted later without one). Each
step draws two movies (see `pretrain_movies`). The loss is the mean over crops of log(squared error), that is the mean
PSNR, so that no dose outweighs another.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.networks.adapt import blend, bound, untrained
from pipeline.networks.pretrain_movies import Known, draw, movie_bank
from pipeline.simulate.movie import MovieSpec, simulate_movie
from pipeline.steps.denoise import denoise_with_errors, one_thread, reduced_precision
from pipeline.steps.neighbours import FrameLinks, measure_level

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
    bank = movie_bank(simulated=settings.simulated, phantoms=settings.phantoms, seed=settings.seed, report=report)
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
