"""What a denoiser is trained on of a movie: a bounded sample, the squares held out of it, and random crops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.steps.denoise import FrameLinks, Level, neighbour_stack

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
    """Frames (m, y, x) [electrons] to train on, how they are linked, and the brightness of the movie."""

    frames: Tensor
    links: FrameLinks
    level: Level


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


class Batches:
    """Random crops of a sample with their neighbours, turned and mirrored in space and time.

    targets (m, y, x) [electrons]: what is to be estimated; by default the frames themselves.
    """

    def __init__(
        self, sample: Sample, held: Tensor, contexts: Tensor, *, crop: int, batch: int, seed: int,
        targets: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.sample, self.held, self.contexts, self.batch = sample, held, contexts, batch
        self.targets = sample.frames if targets is None else targets
        self.generator = torch.Generator().manual_seed(seed)
        self.usable = np.flatnonzero(sample.links.good)
        self.side = max(2, min(crop, *sample.frames.shape[-2:]) // 2 * 2)

    def _random(self, stop: int) -> int:
        return int(torch.randint(0, stop, (), generator=self.generator))

    def draw(self, offsets: Sequence[int]) -> tuple[Tensor, ...]:
        """Stack, validity (batch, slot, y, x), target, weight and context (batch, y, x)."""
        crops = [self._one(offsets) for _ in range(self.batch)]
        return tuple(torch.stack(parts) for parts in zip(*crops, strict=True))

    def _one(self, offsets: Sequence[int]) -> tuple[Tensor, ...]:
        frames, links, level = self.sample
        index = int(self.usable[self._random(len(self.usable))])
        top, left = (self._random(size - self.side + 1) for size in frames.shape[-2:])
        region = (top, left, self.side, self.side)
        stack, valid = neighbour_stack(frames, index, offsets=offsets, links=links, fill=level.mean, region=region)
        here = (index, slice(top, top + self.side), slice(left, left + self.side))
        target = self.targets[here]
        weight = (~self.held[here] & torch.isfinite(target)).float()
        target = torch.nan_to_num(target, nan=level.mean, posinf=level.mean, neginf=level.mean)
        turn = self._random(16)
        if turn & 8:
            stack, valid = stack.flip(0), valid.flip(0)
        for slot in self._dropped(offsets):
            stack[slot], valid[slot] = level.mean, False
        return tuple(turned(part, turn) for part in (stack, valid, target, weight, self.contexts[here]))

    def _dropped(self, offsets: Sequence[int]) -> list[int]:
        """Neighbours to leave out: any of them, lest noise be learnt by heart; and now and then all at one end."""
        rolls = torch.rand(len(offsets), generator=self.generator)
        dropped = [slot for slot, offset in enumerate(offsets) if offset and rolls[slot] < SLOT_DROPOUT]
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
