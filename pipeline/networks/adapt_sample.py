"""What a denoiser is trained on of a movie: a bounded sample, the squares held out of it, and random crops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.networks.threads import side_by_side
from pipeline.steps.motion import BLOCK, squares, without
from pipeline.steps.neighbours import (
    DenoisingNetwork,
    FrameLinks,
    Level,
    compared,
    frame_context,
    looked_at,
    neighbour_stack,
    relative_shifts,
)

# Squares of this many pixels are held out, one in HOLD_SHARE: wider than the noise of any detector is correlated.
HOLD_SQUARE = 16
HOLD_SHARE = 10
RUN_LENGTH = 12
SLOT_DROPOUT = 0.2
END_DROPOUT = 0.1


class SamplePlan(NamedTuple):
    """Which parts of which frames a training sample is made of; chosen from the movie by a fixed rule."""

    frames: NDArray[np.int64]
    """(m,) frame numbers."""
    run: NDArray[np.int64]
    """(m,): frames of one run follow each other in the movie and show one region."""
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    """(m,) corner of the region that is read [px]."""
    height: int
    width: int


class Sample(NamedTuple):
    """Frames (m, y, x) [electrons] to train on, how they are linked, the brightness of the movie, and whether parts of
    the view may move on their own."""

    frames: Tensor
    links: FrameLinks
    level: Level
    moving: bool = True


def plan_sample(
    shape: tuple[int, int, int], *, good: NDArray[np.bool_], run: NDArray[np.int64], max_frames: int, max_side: int
) -> SamplePlan:
    """Choose at most `max_frames` regions of at most `max_side` squared pixels from a movie of `shape` (time, y, x).

    A movie that fits is taken whole. Otherwise runs of consecutive frames are spread evenly over time, each showing
    another region, spread over the frame by a low-discrepancy sequence. `good` (n,) and `run` (n,) describe the frames
    of the movie (see `FrameLinks`); bad frames are planned like others and stay marked in the links of the sample.
    """
    n, rows, columns = shape
    height, width = min(rows, max_side), min(columns, max_side)
    whole = (height, width) == (rows, columns)
    if n <= max_frames and whole:
        frames = np.arange(n)
        return SamplePlan(
            frames, np.asarray(run, dtype=np.int64), np.zeros_like(frames), np.zeros_like(frames), rows, columns
        )
    length = min(RUN_LENGTH, max_frames, n)
    count = max(1, min(max_frames // length, -(-n // length) if whole else max_frames // length))
    starts = np.round(np.linspace(0, n - length, count)).astype(np.int64)
    # Multiples of the inverse powers of the plastic number (Roberts' R2 sequence).
    spread = (0.5 + np.outer(np.arange(count), [0.7548776662, 0.5698402910])) % 1
    corners = np.floor(spread * [rows - height + 1, columns - width + 1]).astype(np.int64)
    frames = (starts[:, None] + np.arange(length)).ravel()
    # A gap in the movie inside one of our runs must stay a gap.
    joint = np.repeat(np.arange(count), length) * (int(np.max(run)) + 1) + np.asarray(run)[frames]
    top, left = np.repeat(corners, length, axis=0).T
    return SamplePlan(frames, joint, top, left, height, width)


def training_sample(
    frames: NDArray[np.float32],
    *,
    plan: SamplePlan,
    whole_px_drift: NDArray[np.int64],
    good: NDArray[np.bool_],
    level: Level,
) -> Sample:
    """Bind planned regions (m, y, x) [electrons] to the drift (n, 2) [whole px] and good (n,) of the whole movie."""
    links = FrameLinks(np.asarray(whole_px_drift)[plan.frames], np.asarray(good)[plan.frames], plan.run)
    return Sample(torch.as_tensor(np.ascontiguousarray(frames, dtype=np.float32)), links, level)


def held_out(sample: Sample, *, seed: int) -> Tensor:
    """Pixels that are never a training target, (m, y, x) bool."""
    m, height, width = sample.frames.shape
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (m, -(-height // HOLD_SQUARE), -(-width // HOLD_SQUARE))
    held = torch.randint(0, HOLD_SHARE, shape, generator=generator) == 0
    held[:, 0, 0] |= ~held.flatten(1).any(1)  # a frame of few squares holds out one at least
    held = held.repeat_interleave(HOLD_SQUARE, 1).repeat_interleave(HOLD_SQUARE, 2)
    return held[:, :height, :width].contiguous()


class Seen(NamedTuple):
    """What a network is told of the frames of a sample besides their counts, in one or two views.

    How the parts of a frame have moved is read from its own counts too, which betrays some of the noise that it is
    judged by. So there are two views, each ignorant of every other square of the frame: an estimate is judged in the
    squares of which its view knows nothing. The `whole` view knows them all, as a denoised frame does; training takes
    that: two numbers for a window betray too little to be learnt, and every pixel is a target, which is worth more.
    """

    contexts: Tensor
    """(view, m, k, y, x) [electrons about the mean]: the filtered mean of the neighbours."""
    shifts: Tensor | None
    """(view, m, slot, 2, by, bx) [px], see `pipeline.steps.neighbours.local_shifts`; None: no motion."""

    def judged(self, view: int) -> Tensor:
        """Where an estimate in this view is independent of the noise of the frame, (y, x) bool."""
        height, width = self.contexts.shape[-2:]
        if len(self.contexts) == 1:
            return torch.ones(height, width, dtype=torch.bool)
        mask = squares(height, width, odd=bool(view))
        return mask.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:height, :width]

    def inputs(
        self, sample: Sample, view: int, index: int, offsets: Sequence[int], region: tuple[int, int, int, int] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stack, validity (slot, y, x) and context (k, y, x) of one frame, or of a region of it."""
        shifts = None if self.shifts is None else self.shifts[view, index]
        stack, valid = neighbour_stack(
            sample.frames, index, offsets=offsets, links=sample.links, fill=sample.level.mean, region=region,
            shifts=shifts,
        )  # fmt: skip
        context = self.contexts[view, index]
        if region is not None:
            top, left, height, width = region
            context = context[:, top : top + height, left : left + width]
        return stack, valid, context


def seen(network: nn.Module, sample: Sample, *, whole: bool = False) -> Seen:
    """What `network` is told of a sample: in two views if parts of it move, unless one `whole` view is asked for."""
    told = cast(DenoisingNetwork, network)
    links, level = sample.links, sample.level
    frames = sample.frames.to(told.kernels.device if told.context_radius else "cpu")
    moving = any(told.motion) and bool(told.context_radius)
    views = 2 if moving and not whole else 1
    many, size = len(told.kernels) if told.context_radius else 1, sample.frames.shape[-2:]
    contexts = torch.zeros(views, len(frames), many, *size)
    shifts = None

    def of_one(index: int) -> list[tuple[Tensor | None, Tensor | None]]:
        moments, made = compared(told, frames, index, links=links, level=level) if moving else None, []
        for view in range(views):
            own = None
            if moments is not None:
                hidden = squares(*frames.shape[-2:], odd=bool(view)).to(frames.device)
                known = without(moments, told.around.index(0), hidden) if views == 2 else moments
                own = relative_shifts(told, known)
            context = frame_context(told, frames, index, links=links, level=level, shifts=own)
            made.append((context, None if own is None else own[looked_at(told)]))
        return made

    usable = np.flatnonzero(links.good).tolist() if told.context_radius else []
    for index, made in zip(usable, side_by_side(of_one, usable), strict=True):
        for view, (context, looked) in enumerate(made):
            if context is not None:
                contexts[view, index] = context.cpu()
            if looked is not None:
                shifts = torch.zeros(views, len(frames), *looked.shape) if shifts is None else shifts
                shifts[view, index] = looked.cpu()
    return Seen(contexts, shifts)


class Batches:
    """Random crops of a sample with their neighbours, turned and mirrored in space and time.

    seen: in one view. targets (m, y, x) [electrons]: what is to be estimated; by default the frames themselves.
    dropout: share of the neighbours that are left out.
    """

    def __init__(
        self, sample: Sample, held: Tensor, seen: Seen, *, crop: int, batch: int, seed: int,
        targets: Tensor | None = None, dropout: float,
    ) -> None:  # fmt: skip
        self.sample, self.held, self.seen, self.batch = sample, held, seen, batch
        self.targets, self.dropout = sample.frames if targets is None else targets, dropout
        self.generator = torch.Generator().manual_seed(seed)
        self.usable = np.flatnonzero(sample.links.good)
        self.side = max(2, min(crop, *sample.frames.shape[-2:]) // 2 * 2)

    def _random(self, stop: int) -> int:
        return int(torch.randint(0, stop, (), generator=self.generator))

    def draw(self, offsets: Sequence[int]) -> tuple[Tensor, ...]:
        """Stack, validity (batch, slot, y, x), target, weight (batch, y, x) and context (batch, k, y, x)."""
        crops = [self._one(offsets) for _ in range(self.batch)]
        return tuple(torch.stack(parts) for parts in zip(*crops, strict=True))

    def _one(self, offsets: Sequence[int]) -> tuple[Tensor, ...]:
        frames, level = self.sample.frames, self.sample.level
        index = int(self.usable[self._random(len(self.usable))])
        top, left = (self._random(size - self.side + 1) for size in frames.shape[-2:])
        region = (top, left, self.side, self.side)
        stack, valid, context = self.seen.inputs(self.sample, 0, index, offsets, region)
        here = (index, slice(top, top + self.side), slice(left, left + self.side))
        target = self.targets[here]
        weight = (~self.held[here] & torch.isfinite(target)).float()
        target = torch.nan_to_num(target, nan=level.mean, posinf=level.mean, neginf=level.mean)
        turn = self._random(16)
        if turn & 8:
            stack, valid = stack.flip(0), valid.flip(0)
        for slot in self._dropped(offsets):
            stack[slot], valid[slot] = level.mean, False
        return tuple(turned(part, turn) for part in (stack, valid, target, weight, context))

    def _dropped(self, offsets: Sequence[int]) -> list[int]:
        """Neighbours to leave out: any of them, lest noise be learnt by heart; and now and then all at one end."""
        rolls = torch.rand(len(offsets), generator=self.generator)
        dropped = [slot for slot, offset in enumerate(offsets) if offset and rolls[slot] < self.dropout]
        if self._random(1000) < 1000 * END_DROPOUT:
            reach, side = self._random(max(abs(o) for o in offsets) + 1), self._random(2) * 2 - 1
            dropped += [slot for slot, offset in enumerate(offsets) if offset * side > reach]
        return dropped


def turned(image: Tensor, turn: int) -> Tensor:
    """One of the eight symmetries of the square, applied to the last two axes."""
    if turn & 1:
        image = image.flip(-1)
    if turn & 2:
        image = image.flip(-2)
    return image.transpose(-1, -2) if turn & 4 else image


def turned_back(image: Tensor, turn: int) -> Tensor:
    """Undo ``turned``."""
    return turned(turned(image, turn & 4), turn & 3)
