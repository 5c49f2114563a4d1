"""Train a denoising network on the very movie it will denoise: seeded, a fixed number of steps, checked afterwards."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.networks.adapt_sample import Batches, Sample, Seen, held_out, seen, turned, turned_back
from pipeline.networks.blindspot import CONTEXT_RADIUS, BlindSpot, scale_of
from pipeline.networks.weights import build
from pipeline.networks.wiener import NeighbourWiener, leftover_filter, wiener_kernel
from pipeline.steps.denoise import DType, one_thread, reduced_precision
from pipeline.steps.motion import learnt_spread
from pipeline.steps.neighbours import DenoisingNetwork, FrameLinks, Level, compared, convolved

CHECK_FRAMES = 32
# Looks at the running mean over about MEMORY steps in a training, and how many in a row may be no better. A look costs
# as much as some twenty steps, so they lie at least so many apart.
CHECKS, PATIENCE, APART = 6, 2, 100
MEMORY = 150
SURE = 2.0
# The last part of the steps, in which a network is trained on its own estimates, and the fewest steps in which that is
# worth it: making these takes as long as a hundred steps.
LAST_SHARE, LAST_FROM = 1 / 3, 900
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
    there the risk of both networks and of a `NeighbourWiener` is compared (E(y - mu)² - variance estimates the error of
    a blind estimate; the same pixels for all, so that their noise cancels). Of the training, the running mean of the
    weights is looked at up to CHECKS times and the best kept; it ends when PATIENCE looks in a row were no better: few
    or dark frames are soon learnt by heart. The last third of the steps of a BlindSpot, if they are many, trains the
    best network on its own estimates, averaged over the eight symmetries of the square: nearer to the truth than one of
    them alone, and with little noise; that is kept unless it did harm beyond chance. Training that did not help is
    thrown away, and so is a network that does not beat the filter, by more than chance where the filter found nothing:
    a movie of mere noise, say, is left to the filter, which makes a constant of it. `crop` [px], `batch` crops per
    step; Adam with a learning rate that falls as a cosine. The same arguments give the same bits on one machine (one
    thread).
    """
    begin = time.perf_counter()
    network = with_context(network, sample)
    device = next(network.parameters()).device
    held = held_out(sample, seed=seed)
    with one_thread():
        told = seen(network, sample)
        # Where nothing is trained, all pixels are as good as those held out, and tell more.
        judge = Judge(sample, held if steps else torch.ones_like(held), told, dtype)
        completed, before = judge.completed(network)
        trained = None
        if steps and sample.links.good.any():
            draws = partial(Batches, sample, held, seen=told, crop=crop, batch=batch)
            train = partial(_train, risk=judge.risks, learning_rate=learning_rate, dtype=dtype)
            trained = _in_two_parts(network, draws, train, steps=steps, seed=seed, dtype=dtype)
        made, after = (completed, before) if trained is None else judge.completed(trained.network)
        plain = _wiener(network)
        filtered = np.full_like(before, np.nan) if plain is None else judge.risks(plain)
    # Behind a filter that found nothing a network must not find something by chance.
    sure = 0.0 if plain is not None and bool(plain.kernel.any()) else SURE
    kept = _which(before, np.full_like(before, np.nan) if trained is None else after, filtered, sure=sure)
    chosen = {"adapted": made, "initial": completed, "wiener": plain}[kept]
    record = {
        "initial_risk": _mean(before),
        "final_risk": _mean(after),
        "wiener_risk": _mean(filtered),
        "kept": kept,
        "steps": steps,
        "best_step": trained.step if trained else 0,
        "seconds": time.perf_counter() - begin,
        "step_seconds": trained.pace if trained else 0.0,
        "sample_frames": len(sample.frames),
        "motion": list(cast(DenoisingNetwork, network).motion),
        "device": str(device),
    }
    return Adapted(copy.deepcopy(cast(nn.Module, chosen)).eval(), record)


def _which(
    initial: NDArray[np.float64], adapted: NDArray[np.float64], wiener: NDArray[np.float64], *, sure: float
) -> str:
    """What to keep, by the risks of the three, frame by frame; not finite: there is none. A network is kept if it is
    better than the filter by `sure` standard errors."""
    gained = _mean(adapted) < _mean(initial) or not np.isfinite(_mean(initial))
    kept, risks = ("adapted", adapted) if np.isfinite(_mean(adapted)) and gained else ("initial", initial)
    known = len(wiener) > 0 and bool(np.isfinite(wiener).all())
    return "wiener" if known and not (np.isfinite(risks).all() and _beats(risks, wiener, sure=sure)) else kept


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
    return _rebuilt(network, {"context": reach, "motion": plain.motion, "leftover": False}, {"kernel": plain.kernel})


def _rebuilt(network: BlindSpot, config: dict[str, Any], tensors: dict[str, Tensor]) -> BlindSpot:
    """A copy with another configuration, some of its tensors given; what only one of both has is new or lost."""
    made = cast(BlindSpot, build("blindspot", {**network.config, **config}))
    known = {**network.state_dict(), **tensors}
    made.load_state_dict({name: known.get(name, value) for name, value in made.state_dict().items()})
    return made.to(next(network.parameters()).device)


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
    found = [compared(network, sample.frames, int(i), links=sample.links, level=sample.level) for i in chosen]
    return learnt_spread([moments for moments in found if moments is not None])


def bound(
    network: nn.Module, frames: NDArray[np.float32], *, links: FrameLinks, level: Level, motion: bool = True
) -> DenoisingNetwork:
    """A network for the frames (m, y, x) [electrons] of a movie, with the filters that are measured on them."""
    sample = Sample(torch.from_numpy(np.ascontiguousarray(frames)), links, level, motion)
    told = with_context(network, sample).eval()
    with one_thread():
        judge = Judge(sample, torch.ones_like(sample.frames, dtype=torch.bool), seen(told, sample), "auto")
        return cast(DenoisingNetwork, judge.completed(told)[0].eval())


def _in_two_parts(
    network: nn.Module,
    draws: Callable[..., Batches],
    train: Callable[..., _Best],
    *,
    steps: int,
    seed: int,
    dtype: DType,
) -> _Best:
    """Train on the noisy frames, then, if it is a BlindSpot, on the averaged estimates of what that gave."""
    last = round(LAST_SHARE * steps) if isinstance(network, BlindSpot) and steps >= LAST_FROM else 0
    batches = draws(seed=seed)
    best = train(network, batches, steps=steps - last)
    if not last:
        return best
    # Estimates as targets have no noise of single pixels that could be betrayed: all that is known may be told.
    whole = seen(network, batches.sample, whole=True)
    calm = _averaged(best.network, batches.sample, whole, dtype=dtype)
    # It has hardly anything to learn by heart, and at low dose its gain is less than what is known of its risk.
    second = train(best.network, draws(seed=seed + 1, targets=calm, seen=whole, dropout=0.0), steps=last, most_checks=1)
    harmed = _beats(best.risks, second.risks, sure=SURE) or not np.isfinite(_mean(second.risks))
    return best if harmed else second._replace(step=steps - last + second.step)


def _averaged(network: nn.Module, sample: Sample, told: Seen, *, dtype: DType) -> Tensor:
    """What a network makes of the sample, averaged over its frames turned and mirrored, (m, y, x) [electrons]."""
    device = next(network.parameters()).device
    level = torch.tensor(sample.level, dtype=torch.float32, device=device)
    out = torch.zeros_like(sample.frames)
    with torch.inference_mode(), reduced_precision(str(device), dtype):
        for index in np.flatnonzero(sample.links.good):
            parts = [part.to(device) for part in told.inputs(sample, 0, int(index), _offsets(network), None)]
            for turn in range(SYMMETRIES):
                made = network(*(turned(part, turn)[None] for part in parts[:2]), level, turned(parts[2], turn)[None])
                out[index] += turned_back(made[0].float(), turn).cpu() / SYMMETRIES
    return out


class _Best(NamedTuple):
    """A network, its risk frame by frame, after how many steps it was, and what a step took [s]."""

    network: nn.Module
    risks: NDArray[np.float64]
    step: int
    pace: float = 0.0


def _train(
    start: nn.Module,
    batches: Batches,
    risk: Callable[[nn.Module], NDArray[np.float64]],
    *,
    steps: int,
    learning_rate: float,
    dtype: DType,
    most_checks: int = CHECKS,
) -> _Best:
    """Minimise the squared error over the variance of the noise in `steps` batches; the running mean of least risk."""
    network, average = copy.deepcopy(start).train(), copy.deepcopy(start).eval()
    device = next(network.parameters()).device
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    warm_up = max(1, min(100, steps // 10))
    level = torch.tensor(batches.sample.level, dtype=torch.float32, device=device)
    least, common = DIMMEST * level[1], level[1] / scale_of(level) ** 2
    checks = max(1, min(most_checks, steps // APART))
    looks, best, since = set(np.linspace(0, steps, checks + 1).round().astype(int)[1:].tolist()), None, 0
    pace, done, begin = np.inf, 0, time.perf_counter()
    for step in range(1, steps + 1):
        rate = min(1.0, step / warm_up) * 0.5 * (1 + np.cos(np.pi * (step - 1) / steps))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * rate
        stack, valid, target, weight, context = (part.to(device) for part in batches.draw(_offsets(network)))
        with reduced_precision(str(device), dtype):
            estimate = network(stack, valid, level, context)
        variance = (estimate.detach() + level[1] - level[0]).clamp_min(least)
        loss = common * (weight * (target - estimate) ** 2 / variance).sum() / weight.sum().clamp_min(1)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        blend(average, network, 1 / min(step, MEMORY))
        if step in looks:
            # The quickest run of steps between two looks: the first one also warms up.
            pace, done = min(pace, (_now(device) - begin) / (step - done)), step
            found = risk(average)
            if best is None or _mean(found) < _mean(best.risks):
                best, since = _Best(copy.deepcopy(average), found, step), 0
            elif (since := since + 1) == PATIENCE:
                break
            begin = time.perf_counter()
    best = best or _Best(average, risk(average), steps)
    return best._replace(pace=float(pace) if np.isfinite(pace) else 0.0)


def _now(device: torch.device) -> float:
    """The clock [s], once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def blend(average: nn.Module, network: nn.Module, share: float) -> None:
    """Move the weights of `average` towards those of `network` by `share` of the way."""
    for kept, new in zip(average.parameters(), network.parameters(), strict=True):
        kept.lerp_(new, share)


class Judge(NamedTuple):
    """Estimates of a sample that are independent of the noise of what they are compared with."""

    sample: Sample
    held: Tensor
    told: Seen
    dtype: DType

    @property
    def chosen(self) -> NDArray[np.int64]:
        """Frames that are looked at."""
        usable = np.flatnonzero(self.sample.links.good)
        return (
            usable[np.unique(np.linspace(0, len(usable) - 1, CHECK_FRAMES).round().astype(int))]
            if len(usable)
            else usable
        )

    def risks(self, network: nn.Module) -> NDArray[np.float64]:
        """Estimated mean squared error over the squared mean, frame by frame, from pixels that were never a target."""
        return self._risks(self._estimates(network))

    def completed(self, network: nn.Module) -> tuple[nn.Module, NDArray[np.float64]]:
        """A BlindSpot with what it left over of the sample, and its risks then."""
        estimates = self._estimates(network)
        told = isinstance(network, BlindSpot) and network.context_radius and bool(network.kernel.any())
        if not isinstance(network, BlindSpot) or not told or not len(estimates):
            return network, self._risks(estimates)
        contexts = self.told.contexts[:, self.chosen, 0]
        found = leftover_filter(self.sample.frames[self.chosen] - estimates, self._joined(contexts))
        kernel = convolved(network.kernel, found.to(network.kernel.device))
        grown = _rebuilt(network, {"leftover": True}, {"leftover_kernel": kernel})
        return grown.train(network.training), self._risks(estimates + self._joined(convolved(contexts, found)))

    def _estimates(self, network: nn.Module) -> Tensor:
        """Of the frames that are looked at, (m, y, x) [electrons]."""
        device = next(chain(network.parameters(), network.buffers())).device
        level = torch.tensor(self.sample.level, dtype=torch.float32, device=device)
        views = range(len(self.told.contexts))
        made = torch.zeros(len(views), len(self.chosen), *self.sample.frames.shape[-2:])
        with torch.inference_mode(), reduced_precision(str(device), self.dtype):
            for row, index in enumerate(self.chosen):
                for view in views:
                    parts = self.told.inputs(self.sample, view, int(index), _offsets(network), None)
                    stack, valid, context = (part[None].to(device) for part in parts)
                    made[view, row] = network(stack, valid, level, context)[0].float().cpu()
        return self._joined(made)

    def _joined(self, views: Tensor) -> Tensor:
        """Of images (view, m, y, x) those pixels whose view knows nothing of the frame there, (m, y, x)."""
        out = views[0].clone()
        for view in range(1, len(views)):
            out[:, self.told.judged(view)] = views[view][:, self.told.judged(view)]
        return out

    def _risks(self, estimates: Tensor) -> NDArray[np.float64]:
        frames, level = self.sample.frames, self.sample.level
        # The noise of a count is estimated by the count itself; that of a difference of networks cancels.
        readout = level.variance - level.mean
        risks = []
        for index, estimate in zip(self.chosen, estimates, strict=True):
            use = self.held[index] & torch.isfinite(frames[index])
            counts = frames[index][use].double()
            excess = (counts - estimate[use]) ** 2 - counts - readout
            if len(excess):
                risks.append(float(excess.mean()) / level.mean**2)
        return np.array(risks)


def _mean(risks: NDArray[np.float64]) -> float:
    return float(risks.mean()) if len(risks) else float("nan")


def _beats(one: NDArray[np.float64], other: NDArray[np.float64], *, sure: float) -> bool:
    """Whether the risks `one` are below `other`, frame by frame, by `sure` standard errors of their difference."""
    gain = other - one
    chance = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    return bool(gain.mean() > sure * chance) if len(gain) else False
