"""Train a denoising network on the very movie it will denoise: seeded, a fixed number of steps, checked afterwards."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.networks.adapt_sample import SLOT_DROPOUT, Batches, Sample, Seen, held_out, seen, turned, turned_back
from pipeline.networks.blindspot import CONTEXT_RADIUS, BlindSpot, rebuilt, scale_of
from pipeline.networks.risk import Judge, Look, beats, mean_risk
from pipeline.networks.threads import side_by_side
from pipeline.networks.weights import build
from pipeline.networks.wiener import NeighbourWiener, wiener_kernel
from pipeline.steps.denoise import DType, one_thread, reduced_precision
from pipeline.steps.motion import learnt_spread
from pipeline.steps.neighbours import DenoisingNetwork, FrameLinks, Level, compared

# Looks at the running mean of the weights in a training, and how many in a row may be no better. A look costs as much
# as some thirty steps, so they lie at least so many apart.
CHECKS, PATIENCE, APART = 6, 2, 300
# Steps of that mean at most, and as a share of all: what a short training learns last is not to be averaged away.
MEMORY, MEMORY_SHARE = 150, 1 / 10
SURE = 2.0
# The last part of the steps, in which a network is trained on its own estimates. With fewer than MANY steps that is not
# worth it, for making these takes as long as a hundred; nor is leaving out neighbours, lest noise be learnt by heart:
# that begins after some 700 of them on the darkest movies, and sooner or later a look ends it.
LAST_SHARE, MANY = 1 / 3, 900
SYMMETRIES = 8  # of the square, over which these are averaged
# Frames on which it is learnt how far parts of them move.
MOTION_FRAMES = 8
# Part of the movie's mean variance below which no pixel's variance is believed to lie.
DIMMEST = 0.1


class Adapted(NamedTuple):
    """A network in evaluation mode, and what its training did."""

    network: nn.Module
    record: dict[str, Any]


def untrained(architecture: str, config: dict[str, Any], *, seed: int) -> nn.Module:
    """A network of a registered architecture with seeded initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(architecture, config)


def adapt(
    network: nn.Module,
    sample: Sample,
    *,
    steps: int,
    crop: int,
    batch: int,
    learning_rate: float,
    seed: int,
    dtype: DType,
) -> Adapted:
    """Train a copy of `network` for at most `steps` steps; keep the best of both and of a plain Wiener filter.

    The loss is the squared difference to the noisy frame over the variance of the noise where the network itself
    estimates the frame to be so bright: its gradient is that of the likelihood of counts, it takes negative values too,
    and, the network being blind, it is minimal for the expected image. One in ten squares of 16 px is never a target;
    there the risk of both networks and of a `NeighbourWiener` is compared (see `Judge`). Of the training, the running
    mean of the weights is looked at up to CHECKS times and the best kept; it ends when PATIENCE looks in a row were no
    better: few or dark frames are soon learnt by heart. The last third of the steps of a BlindSpot, if they are many,
    trains the best network on its own estimates, averaged over the eight symmetries of the square: nearer to the truth
    than one of them alone, and with little noise; that is kept unless it did harm beyond chance. Training that did not
    help is thrown away, and so is a network that does not beat the filter, by more than chance where that found
    nothing: of noise it makes a constant. `crop` [px], `batch` crops per step; Adam, a learning rate that falls as a
    cosine. The same arguments give the same bits on one machine, on one core or two.
    """
    begin = time.perf_counter()
    network = with_context(network, sample)
    held = held_out(sample, seed=seed)
    with one_thread():
        told = seen(network, sample)
        judge = Judge(sample, held if steps else torch.ones_like(held), told, dtype)  # untrained: all pixels tell
        first = judge.look(network)
        untouched, trained = judge.completed(first), None
        if steps and sample.links.good.any():
            whole = seen(network, sample, whole=True) if len(told.contexts) > 1 else told
            draws = partial(_shares, sample, held, whole, device=_device(network), crop=crop, batch=batch)
            train = partial(_train, look=judge.look, learning_rate=learning_rate, dtype=dtype)
            averaged = partial(_averaged, sample=sample, told=whole, dtype=dtype)
            trained = _in_two_parts(network, draws, train, averaged, steps=steps, seed=seed)
        made = untouched if trained is None else judge.completed(trained.look)
        before, after, plain = untouched.risks, made.risks, _wiener(network)
        none = np.full_like(before, np.nan)
        filtered = none if plain is None else judge.look(plain).risks
        kept = _kept(judge, first, plain, (before, none if trained is None else after, filtered))
    chosen = {"adapted": made.network, "initial": untouched.network, "wiener": plain}[kept]
    record = {
        "initial_risk": mean_risk(before),
        "final_risk": mean_risk(after),
        "wiener_risk": mean_risk(filtered),
        "kept": kept,
        "steps": steps,
        "best_step": trained.step if trained else 0,
        "seconds": time.perf_counter() - begin,
        "step_seconds": trained.pace if trained else 0.0,
        "sample_frames": len(sample.frames),
        "motion": list(cast(DenoisingNetwork, network).motion),
        "device": str(_device(network)),
    }
    return Adapted(copy.deepcopy(cast(nn.Module, chosen)).eval(), record)


def _kept(judge: Judge, first: Look, plain: NeighbourWiener | None, risks: tuple[NDArray[np.float64], ...]) -> str:
    """What to keep of a network as it came, adapted, and the filter, by their risks."""
    # Behind a filter that found nothing a network must not find something by chance.
    sure = 0.0 if plain is not None and bool(plain.kernel.any()) else SURE
    kept = _which(*risks, sure=sure)
    if kept == "initial" and plain is not None and not bool(judge.held.all()):
        # What was not trained on the sample may be judged by all pixels.
        everywhere = judge._replace(held=torch.ones_like(judge.held))
        initial, filtered = everywhere.completed(first).risks, everywhere.look(plain).risks
        kept = _which(initial, np.full_like(initial, np.nan), filtered, sure=sure)
    return kept


def _which(
    initial: NDArray[np.float64], adapted: NDArray[np.float64], wiener: NDArray[np.float64], *, sure: float
) -> str:
    """What to keep, by the risks of the three, frame by frame; not finite: there is none. A network is kept if it is
    better than the filter by `sure` standard errors."""
    gained = mean_risk(adapted) < mean_risk(initial) or not np.isfinite(mean_risk(initial))
    kept, risks = ("adapted", adapted) if np.isfinite(mean_risk(adapted)) and gained else ("initial", initial)
    known = len(wiener) > 0 and bool(np.isfinite(wiener).all())
    return "wiener" if known and not (np.isfinite(risks).all() and beats(risks, wiener, sure=sure)) else kept


def _wiener(network: nn.Module) -> NeighbourWiener | None:
    """The Wiener filter over the neighbours that a BlindSpot with context looks at; None for other networks."""
    if not isinstance(network, BlindSpot) or not network.context_radius:
        return None
    plain = NeighbourWiener(
        frames=len(network.offsets), context=network.context_radius, around=len(network.around), motion=network.motion
    )
    plain.kernel.copy_(network.kernel)
    return plain.to(network.kernel.device)


def _offsets(network: nn.Module) -> tuple[int, ...]:
    return cast(DenoisingNetwork, network).offsets


def with_context(network: nn.Module, sample: Sample) -> nn.Module:
    """A copy of `network` with the filter of its neighbours, if it uses one, and their `motion`, both of the sample.

    A BlindSpot that was not trained with filtered neighbours is given them too; it estimates as before.
    """
    if not isinstance(network, BlindSpot) or len(network.offsets) == 1:
        return copy.deepcopy(network)
    reach, frames = network.context_radius or CONTEXT_RADIUS, len(network.offsets)
    plain = NeighbourWiener(frames=frames, context=reach, around=len(network.around))
    fit_filter(plain, sample)
    return rebuilt(network, {"context": reach, "motion": plain.motion, "leftover": False}, {"kernel": plain.kernel})


def fit_filter(network: DenoisingNetwork, sample: Sample) -> None:
    """Give a network the filter of its neighbours and its `motion`, both of the sample.

    Parts can only be followed behind a filter, and once they are, neighbours have more in common with a frame.
    """
    network.motion = ()
    measured = partial(wiener_kernel, network, sample.frames, links=sample.links, level=sample.level)
    network.kernel.copy_(measured())
    network.motion = spread_of_motion(network, sample) if sample.moving else ()
    if any(network.motion):
        network.kernel.copy_(measured())
        network.motion = spread_of_motion(network, sample)


def spread_of_motion(network: DenoisingNetwork, sample: Sample) -> tuple[float, ...]:
    """How far parts of the frames move on their own [px], for each of `motion.WINDOWS`, from a few frames."""
    usable = np.flatnonzero(sample.links.good)
    chosen = (
        usable[np.unique(np.linspace(0, len(usable) - 1, MOTION_FRAMES).round().astype(int))] if len(usable) else []
    )
    found = side_by_side(partial(compared, network, sample.frames, links=sample.links, level=sample.level), chosen)
    return learnt_spread([moments for moments in found if moments is not None])


def bound(
    network: nn.Module, frames: NDArray[np.float32], *, links: FrameLinks, level: Level, motion: bool = True
) -> DenoisingNetwork:
    """A network for the frames (m, y, x) [electrons] of a movie, with the filters that are measured on them."""
    sample = Sample(torch.from_numpy(np.ascontiguousarray(frames)), links, level, motion)
    told = with_context(network, sample).eval()
    if not isinstance(told, BlindSpot):
        return cast(DenoisingNetwork, told)
    with one_thread():
        judge = Judge(sample, torch.ones_like(sample.frames, dtype=torch.bool), seen(told, sample), "auto")
        return cast(DenoisingNetwork, judge.completed(judge.look(told)).network.eval())


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _shares(
    sample: Sample, held: Tensor, told: Seen, *, device: torch.device, batch: int, seed: int, part: int, **how: Any
) -> list[Batches]:
    """Draws that together make the batches of one part of a training; a CPU computes them side by side."""
    many = 1 if device.type == "cuda" else min(2, batch)
    sizes = [(batch + share) // many for share in range(many)]
    seeds = np.random.SeedSequence([seed, part]).generate_state(many)
    return [
        Batches(sample, held, told, batch=size, seed=int(one), **how) for size, one in zip(sizes, seeds, strict=True)
    ]


def _in_two_parts(
    network: nn.Module,
    draws: Callable[..., list[Batches]],
    train: Callable[..., _Best],
    averaged: Callable[[nn.Module], Tensor],
    *,
    steps: int,
    seed: int,
) -> _Best:
    """Train on the noisy frames, then, if it is a BlindSpot, on the averaged estimates of what that gave."""
    many = steps >= MANY
    last = round(LAST_SHARE * steps) if isinstance(network, BlindSpot) and many else 0
    best = train(network, draws(seed=seed, part=0, dropout=SLOT_DROPOUT if many else 0.0), steps=steps - last)
    if not last:
        return best
    # Estimates have no noise of single pixels that could be learnt by heart, and at low dose what this gains is less
    # than what is known of its risk.
    again = draws(seed=seed, part=1, targets=averaged(best.look.network), dropout=0.0)
    second = train(best.look.network, again, steps=last, most_checks=1)
    before, after = best.look.risks, second.look.risks
    harmed = beats(before, after, sure=SURE) or not np.isfinite(mean_risk(after))
    return best if harmed else second._replace(step=steps - last + second.step)


def _averaged(network: nn.Module, sample: Sample, told: Seen, *, dtype: DType) -> Tensor:
    """What a network makes of the sample, averaged over its frames turned and mirrored, (m, y, x) [electrons]."""
    device = _device(network)
    level = torch.tensor(sample.level, dtype=torch.float32, device=device)

    def averaged(index: int) -> Tensor:
        made = torch.zeros_like(sample.frames[index])
        with torch.inference_mode(), reduced_precision(str(device), dtype):
            parts = [part.to(device) for part in told.inputs(sample, 0, index, _offsets(network), None)]
            for turn in range(SYMMETRIES):
                stack, valid, context = (turned(part, turn)[None] for part in parts)
                made += turned_back(network(stack, valid, level, context)[0].float(), turn).cpu() / SYMMETRIES
        return made

    out = torch.zeros_like(sample.frames)
    usable = np.flatnonzero(sample.links.good).tolist()
    for index, made in zip(usable, side_by_side(averaged, usable), strict=True):
        out[index] = made
    return out


class _Best(NamedTuple):
    """A look at a network, after how many steps it was, and what a step took of one core [s]."""

    look: Look
    step: int
    pace: float = 0.0


class _Slope(NamedTuple):
    """Gradients of a loss, summed over so many pixels; None for parameters that have no part in it."""

    gradients: tuple[Tensor | None, ...]
    pixels: Tensor


def _slope(network: nn.Module, batches: Batches, *, dtype: DType) -> _Slope:
    """Of the squared error over the variance of the noise, for the next draw."""
    device = _device(network)
    level = torch.tensor(batches.sample.level, dtype=torch.float32, device=device)
    least, common = DIMMEST * level[1], level[1] / scale_of(level) ** 2
    stack, valid, target, weight, context = (part.to(device) for part in batches.draw(_offsets(network)))
    with reduced_precision(str(device), dtype):
        estimate = network(stack, valid, level, context)
    variance = (estimate.detach() + level[1] - level[0]).clamp_min(least)
    loss = common * (weight * (target - estimate) ** 2 / variance).sum()
    return _Slope(torch.autograd.grad(loss, list(network.parameters()), allow_unused=True), weight.sum())


def _train(
    start: nn.Module,
    shares: Sequence[Batches],
    look: Callable[[nn.Module], Look],
    *,
    steps: int,
    learning_rate: float,
    dtype: DType,
    most_checks: int = CHECKS,
) -> _Best:
    """Minimise the squared error over the variance of the noise in `steps` batches, each drawn in `shares`; the running
    mean of least risk."""
    network, average = copy.deepcopy(start).train(), copy.deepcopy(start).eval()
    device, slope = _device(network), partial(_slope, network, dtype=dtype)
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    warm_up, memory = max(1, min(100, steps // 10)), max(1, min(MEMORY, round(MEMORY_SHARE * steps)))
    checks = max(1, min(most_checks, steps // APART))
    looks, best, since = set(np.linspace(0, steps, checks + 1).round().astype(int)[1:].tolist()), None, 0
    pace, done, begin = np.inf, 0, _now(device)
    for step in range(1, steps + 1):
        rate = min(1.0, step / warm_up) * 0.5 * (1 + np.cos(np.pi * (step - 1) / steps))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * rate
        slopes = list(side_by_side(slope, shares))
        pixels = torch.stack([share.pixels for share in slopes]).sum().clamp_min(1)
        for parameter, *parts in zip(network.parameters(), *(share.gradients for share in slopes), strict=True):
            told = [part for part in parts if part is not None]
            parameter.grad = torch.stack(told).sum(0) / pixels if told else None
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        blend(average, network, 1 / min(step, memory))
        if step in looks:
            # The quickest run of steps between two looks: the first one also warms up.
            pace, done = min(pace, (_now(device) - begin) / (step - done)), step
            found = look(average)
            if best is None or mean_risk(found.risks) < mean_risk(best.look.risks):
                best, since = _Best(found._replace(network=copy.deepcopy(average)), step), 0
            elif (since := since + 1) == PATIENCE:
                break
            begin = _now(device)
    best = best or _Best(look(average), steps)
    return best._replace(pace=float(pace) if np.isfinite(pace) else 0.0)


def _now(device: torch.device) -> float:
    """Seconds that a device was at work, all cores together: what counts where every core has a movie of its own."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def blend(average: nn.Module, network: nn.Module, share: float) -> None:
    """Move the weights of `average` towards those of `network` by `share` of the way."""
    for kept, new in zip(average.parameters(), network.parameters(), strict=True):
        kept.lerp_(new, share)
