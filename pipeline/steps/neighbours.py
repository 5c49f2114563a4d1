"""What a denoiser is given of a frame: its neighbours, moved onto it, and their filtered mean.

The drift is taken out in whole pixels, which leaves the counts as they are; parts of a view that move on their own are
followed between the pixels of the neighbours, never of the frame itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from torch import Tensor

from pipeline.steps import motion

BAND = 16 * motion.BLOCK
"""Rows [px] in which sums over the neighbours of a whole frame are taken."""


class FrameLinks(NamedTuple):
    """How frames follow each other: what a frame may take from which other frame."""

    drift: NDArray[np.int64]
    """(n, 2) [whole px], y then x: how the specimen moved since frame 0."""
    good: NDArray[np.bool_]
    """(n,): frames that can be used."""
    run: NDArray[np.int64]
    """(n,): frames of another run are not neighbours (a gap in time lies between)."""


class Level(NamedTuple):
    """Brightness of the whole movie, which fixes the input scale of the network."""

    mean: float
    """Mean of the good frames [electrons per pixel]."""
    variance: float
    """Noise variance at the mean [electrons²]."""


class DenoisingNetwork(Protocol):
    """What this step needs of a network (see `pipeline.networks.blindspot` and `wcvd`)."""

    offsets: tuple[int, ...]
    """Frames that the network itself looks at, counted from the one that it estimates."""
    around: tuple[int, ...]
    """Frames whose mean is the context; these and more: `offsets` are the middle ones of them."""
    receptive_radius: int
    periodic: bool
    context_radius: int
    kernel: Tensor
    """(2 r + 1, 2 r + 1): the filter of the mean of the neighbours; r is `context_radius`, zero where there is none."""
    motion: tuple[float, ...]

    @property
    def kernels(self) -> Tensor:
        """(k, 2 r + 1, 2 r + 1): `kernel`, and others that each make a context too."""

    def __call__(self, frames: Tensor, valid: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """(batch, slot, y, x) electrons and validity, (2,) level, (batch, k, y, x) contexts, to (batch, y, x)
        electrons."""


def frame_runs(time: NDArray[np.float64], *, max_gap: float) -> NDArray[np.int64]:
    """Number the runs of frames between gaps, (n,).

    time (n,) [s]; a gap is an interval of more than `max_gap` times the median interval, or one that is not positive.
    """
    steps = np.diff(np.asarray(time, dtype=np.float64))
    typical = np.median(steps) if len(steps) else 0.0
    breaks = (steps > max_gap * typical) | (steps <= 0) if typical > 0 else np.zeros(len(steps), dtype=bool)
    return np.concatenate([[0], np.cumsum(breaks)]).astype(np.int64)[: len(time)]


def measure_level(frames: NDArray[np.float32], *, readout_variance: float) -> Level:
    """Mean and noise variance of sample frames (n, y, x) [electrons] of one movie, from their finite pixels.

    A mean that is not positive (frames of readout noise only) is replaced by a thousandth of an electron.
    """
    values = [frame[np.isfinite(frame)] for frame in frames]
    count = sum(v.size for v in values)
    mean = max(sum(float(v.sum(dtype=np.float64)) for v in values) / max(count, 1), 1e-3)
    return Level(mean, mean + max(float(readout_variance), 0.0))


def neighbour_stack(
    frames: NDArray[np.float32] | Tensor,
    index: int,
    *,
    offsets: Sequence[int],
    links: FrameLinks,
    fill: float,
    region: tuple[int, int, int, int] | None = None,
    shifts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Frame `index` between its neighbours, each moved onto its detector grid by whole pixels, and parts by `shifts`.

    frames (n, y, x) [electrons]; `links` describe the same n frames; `region` (top, left, height, width) [px] cuts a
    window of frame `index`, by default the whole; `shifts` (slot, 2, by, bx) [px]: how far what blocks of the frame
    show has moved in a neighbour beyond that (see `local_shifts`). Returns the stack (slot, y, x), slots in the order
    of `offsets`, and where it is valid, (slot, y, x) bool. Pixels from outside a neighbour, and slots of frames that
    do not exist, are bad or lie beyond a gap, are not valid and hold `fill`. No neighbour slot ever holds frame
    `index`.
    """
    frames = torch.as_tensor(frames)
    height, width = (int(size) for size in frames.shape[-2:])
    top, left, rows, columns = region or (0, 0, height, width)
    stack = torch.full((len(offsets), rows, columns), float(fill), dtype=torch.float32, device=frames.device)
    valid = torch.zeros(stack.shape, dtype=torch.bool, device=frames.device)
    between: dict[int, tuple[int, int, int]] = {}
    for slot, offset in enumerate(offsets):
        other = index + offset
        if not 0 <= other < len(frames) or not links.good[other] or links.run[other] != links.run[index]:
            continue
        dy, dx = (int(d) for d in links.drift[other] - links.drift[index])
        # What the specimen shows at pixel p of frame `index` lies at p + (dy, dx) in the neighbour.
        y0, y1 = max(0, -top - dy), min(rows, height - top - dy)
        x0, x1 = max(0, -left - dx), min(columns, width - left - dx)
        if y0 >= y1 or x0 >= x1:
            continue
        if shifts is not None and offset:
            between[slot] = (other, top + dy, left + dx)
            continue
        part = frames[other, top + dy + y0 : top + dy + y1, left + dx + x0 : left + dx + x1].float()
        finite = torch.isfinite(part)
        stack[slot, y0:y1, x0:x1] = torch.where(finite, part, stack[slot, y0:y1, x0:x1])
        valid[slot, y0:y1, x0:x1] = finite
    if shifts is not None and between:
        slots, near = list(between), [frames[other] for other, _, _ in between.values()]
        corners = [(y, x) for _, y, x in between.values()]
        region = (top, left, rows, columns)
        stack[slots], valid[slots] = motion.moved(near, corners, shifts[slots], region, fill=float(fill))
    return stack, valid


def neighbourhood(
    frames: NDArray[np.float32] | Tensor, index: int, *, offsets: Sequence[int], links: FrameLinks
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean (y, x) [electrons] of frame `index` and its neighbours on its own grid, and how many frames each pixel has.

    The frames that a network of these `offsets` looks at, moved by whole pixels only; see `neighbour_stack`.
    """
    total, depth = _added(torch.as_tensor(frames), index, offsets, links=links, level=0.0)
    return (total / depth.clamp_min(1)).cpu().numpy(), depth.cpu().numpy()


def _added(
    frames: Tensor, index: int, offsets: Sequence[int], *, links: FrameLinks, level: float
) -> tuple[Tensor, Tensor]:
    """Sum (y, x) over neighbours of what exceeds `level`, and how many each pixel has; one at a time, for memory."""
    total = torch.zeros(frames.shape[-2:], dtype=torch.float32, device=frames.device)
    count = torch.zeros_like(total)
    for offset in offsets:
        stack, valid = neighbour_stack(frames, index, offsets=(offset,), links=links, fill=level)
        total += stack[0] - level
        count += valid[0]
    return total, count


def frame_context(
    network: DenoisingNetwork,
    frames: Tensor,
    index: int,
    *,
    links: FrameLinks,
    level: Level,
    shifts: Tensor | None = None,
) -> Tensor | None:
    """The mean of a frame's neighbours, filtered by the kernels of the network, (k, y, x) [electrons about the mean].

    The frame itself has no part in it, but for what `shifts` owe to it. None for a network that does not use it.
    """
    if not network.context_radius:
        return None
    mean, _ = mean_of_neighbours(network, frames, index, links=links, level=level, shifts=shifts)
    return convolved(mean, network.kernels)


def context_of(network: DenoisingNetwork, stack: Tensor, valid: Tensor, level: Level) -> Tensor:
    """The context (k, y, x) of a frame whose neighbours are at hand, (slot, y, x), slots in the order of `around`."""
    return convolved(_mean_of(network, stack, valid, level)[0], network.kernels)


def mean_of_neighbours(
    network: DenoisingNetwork, frames: Tensor, index: int, *, links: FrameLinks, level: Level, shifts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean (y, x) [electrons about the mean] of the frames `around` one, without it, parts moved by `shifts`, and how
    many each pixel has."""
    if shifts is None:
        others = [offset for offset in network.around if offset]
        total, count = _added(frames, index, others, links=links, level=level.mean)
        return total / count.clamp_min(1), count
    stack, valid = neighbour_stack(frames, index, offsets=network.around, links=links, fill=level.mean, shifts=shifts)
    return _mean_of(network, stack, valid, level)


def _mean_of(network: DenoisingNetwork, stack: Tensor, valid: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    others = [slot for slot, offset in enumerate(network.around) if offset]
    count = valid[others].sum(0)
    return (stack[others].sum(0) - level.mean * len(others)) / count.clamp_min(1), count


def compared(
    network: DenoisingNetwork, frames: Tensor, index: int, *, links: FrameLinks, level: Level
) -> motion.Moments | None:
    """A frame and its neighbours, slot by slot, against the filtered mean of the neighbours; see `motion`.

    None for a network without such a filter.
    """
    if not network.context_radius:
        return None
    mean, _ = mean_of_neighbours(network, frames, index, links=links, level=level, shifts=None)
    guide, parts = convolved(mean, network.kernel) / level.mean, []
    for top, rows in _bands(guide.shape[0]):
        comparison = motion.Comparison(guide, slice(top, top + rows), variance=level.variance / level.mean**2)
        for offset in network.around:
            stack, valid = neighbour_stack(
                frames, index, offsets=(offset,), links=links, fill=level.mean, region=(top, 0, rows, guide.shape[1])
            )
            comparison.add(stack[0] / level.mean - 1, valid[0])
        parts.append(comparison.moments())
    return motion.joined(parts)


def _bands(height: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of the bands that a frame is cut into, so that what is computed stays in cache."""
    for top in range(0, height, BAND):
        yield top, min(BAND, height - top)


def local_shifts(
    network: DenoisingNetwork, frames: Tensor, index: int, *, links: FrameLinks, level: Level
) -> Tensor | None:
    """How far what blocks of a frame show has moved in the frames `around` it, (slot, 2, by, bx) [px]; whole pixels are
    apart.

    None where the network's movie was found to have no such motion (`network.motion`).
    """
    if not any(network.motion):
        return None
    moments = compared(network, frames, index, links=links, level=level)
    return None if moments is None else relative_shifts(network, moments)


def looked_at(network: DenoisingNetwork) -> slice:
    """Which slots of the frames `around` one the network itself looks at."""
    first = network.around.index(network.offsets[0])
    return slice(first, first + len(network.offsets))


def relative_shifts(network: DenoisingNetwork, moments: motion.Moments) -> Tensor:
    """Displacements of the frames `around` one from it, (slot, 2, by, bx) [px]."""
    found = motion.displacements(moments, network.motion)
    return found - found[network.around.index(0)]


def convolved(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolution of images (…, y, x) with kernels (…, 2 r + 1, 2 r + 1), as if there were zeros around them."""
    reach, size = kernels.shape[-1] // 2, images.shape[-2:]
    shape = [next_fast_len(int(many) + reach, real=True) for many in size]
    wrapped = torch.zeros(*kernels.shape[:-2], *shape, dtype=torch.float32, device=images.device)
    if min(shape) < kernels.shape[-1]:
        keep = (min(shape) - 1) // 2
        kernels = kernels[..., reach - keep : reach + keep + 1, reach - keep : reach + keep + 1]
        reach = keep
    wrapped[..., : 2 * reach + 1, : 2 * reach + 1] = kernels
    wrapped = wrapped.roll((-reach, -reach), (-2, -1))
    product = torch.fft.rfft2(images, s=shape) * torch.fft.rfft2(wrapped)
    convolved: Tensor = torch.fft.irfft2(product, s=shape)
    return convolved[..., : size[0], : size[1]]
