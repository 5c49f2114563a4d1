"""Denoise frames with a blind-spot network that sees each frame's neighbours, moved onto it.

Whatever the result of frame t depends on is chosen from the movie: its neighbours t + k, the path of the drift, which
frames are good. Frames are processed one by one on a fixed grid of windows, so that no cut into blocks can matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.steps.gpu import Results, uploaded
from pipeline.steps.neighbours import (
    DenoisingNetwork,
    FrameLinks,
    Level,
    context_of,
    frame_context,
    local_shifts,
    looked_at,
    neighbour_stack,
)

DType = Literal["auto", "float32", "bfloat16"]


def windows(size: int, tile: int | None, halo: int) -> list[tuple[slice, slice]]:
    """Cut [0, size) into cores of `tile` pixels; (core, core with halo) pairs whose windows stay inside.

    `tile` is rounded up to even and `halo` too, so that every window begins on an even pixel, as the whole frame does.
    """
    step = size if tile is None else tile + tile % 2
    halo += halo % 2
    cores = [slice(start, min(start + step, size)) for start in range(0, size, step)]
    return [(core, slice(max(core.start - halo, 0), min(core.stop + halo, size))) for core in cores]


def denoise(
    network: DenoisingNetwork,
    frames: NDArray[np.float32] | Tensor,
    indices: Sequence[int],
    *,
    links: FrameLinks,
    level: Level,
    tile: int | None,
    dtype: DType,
    device: str = "cpu",
) -> NDArray[np.float32]:
    """Estimate the frames `indices`, (len(indices), y, x) [electrons], each on its own detector grid.

    frames (n, y, x) [electrons]: the frames wanted and all their neighbours that the movie has; `links` describe the
    same n frames; `level` is that of the whole movie. `tile` [px] bounds the memory (none: whole frames at once) and,
    like `dtype` (auto: bfloat16 where the processor has it), may change the last bits. `network` must be on `device`.
    """
    how = {"links": links, "level": level, "tile": tile}
    return _each(network, network, frames, indices, dtype=dtype, device=device, **how)[:, 0]


def denoise_with_errors(
    network: DenoisingNetwork,
    frames: NDArray[np.float32] | Tensor,
    indices: Sequence[int],
    *,
    dtype: DType,
    device: str = "cpu",
    **how: Any,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """As `denoise`, with the same arguments, and the standard deviation of the estimate's error that the network
    expects, (len(indices), y, x) [electrons]; NaN where it knows none."""
    run = getattr(network, "with_errors", None)
    made = _each(network, run or network, frames, indices, dtype=dtype, device=device, **how)
    return made[:, 0], made[:, 1] if run else np.full_like(made[:, 0], np.nan)


def _each(
    network: DenoisingNetwork,
    run: Callable[..., Tensor],
    frames: NDArray[np.float32] | Tensor,
    indices: Sequence[int],
    *,
    dtype: DType,
    device: str,
    **how: Any,
) -> NDArray[np.float32]:
    """What `run`, a way to call the network, makes of frames one by one, (len(indices), 1 or 2, y, x)."""
    if not len(indices):
        return np.empty((0, 2, *frames.shape[-2:]), dtype=np.float32)
    results, reach = Results(len(indices), device), max(network.around)
    with (
        torch.inference_mode(),
        one_thread(),
        reduced_precision(device, dtype),
        uploaded(frames, device) as (images, arrive),
    ):
        for index in indices:
            arrive(int(index) + reach)
            results.add(_one_frame(network, run, images, int(index), **how))
        return results.all()


def _one_frame(
    network: DenoisingNetwork, run: Callable[..., Tensor], frames: Tensor, index: int, *, links: FrameLinks,
    level: Level, tile: int | None,
) -> Tensor:  # fmt: skip
    """One frame, window by window; each window carries as many neighbouring pixels as the network can see."""
    height, width = (int(size) for size in frames.shape[-2:])
    halo = network.receptive_radius
    # Not copied from the host, which would wait for a GPU.
    levels = torch.stack([torch.full((), value, dtype=torch.float32, device=frames.device) for value in level])
    if network.periodic:
        return _one_periodic_frame(network, frames, index, links=links, levels=levels, tile=tile)[None]
    shifts = local_shifts(network, frames, index, links=links, level=level)
    whole = None
    if shifts is None:
        context = frame_context(network, frames, index, links=links, level=level)
    else:  # each neighbour is moved only once
        stack, valid = neighbour_stack(
            frames, index, offsets=network.around, links=links, fill=level.mean, shifts=shifts
        )
        context, near = context_of(network, stack, valid, level), looked_at(network)
        whole = stack[near], valid[near]
    out: Tensor | None = None
    for y, wy in windows(height, tile, halo):
        for x, wx in windows(width, tile, halo):
            if whole is None:
                region = (wy.start, wx.start, wy.stop - wy.start, wx.stop - wx.start)
                stack, valid = neighbour_stack(
                    frames, index, offsets=network.offsets, links=links, fill=level.mean, region=region
                )
            else:
                stack, valid = (part[:, wy, wx] for part in whole)
            told = None if context is None else context[None, :, wy, wx]
            made = run(stack[None], valid[None], levels, told).view(-1, *stack.shape[-2:])
            if out is None:
                out = torch.empty((len(made), height, width), dtype=torch.float32, device=frames.device)
            out[:, y, x] = made[:, y.start - wy.start : y.stop - wy.start, x.start - wx.start : x.stop - wx.start]
    return cast(Tensor, out)


def _one_periodic_frame(
    network: DenoisingNetwork, frames: Tensor, index: int, *, links: FrameLinks, levels: Tensor, tile: int | None
) -> Tensor:
    """As `_one_frame` for a network that joins opposite edges: windows are cut from the wrapped frame."""
    fill = float(levels[0])
    stack, valid = neighbour_stack(frames, index, offsets=network.offsets, links=links, fill=fill)
    if tile is None:
        return network(stack[None], valid[None], levels)[0]
    r = network.receptive_radius
    stack = torch.nn.functional.pad(stack[None], (r, r, r, r), mode="circular")
    valid = torch.nn.functional.pad(valid[None].float(), (r, r, r, r), mode="circular") > 0
    out = torch.empty(frames.shape[-2:], dtype=torch.float32, device=frames.device)
    for y, _ in windows(out.shape[0], tile, 0):
        for x, _ in windows(out.shape[1], tile, 0):
            cut = (..., slice(y.start, y.stop + 2 * r), slice(x.start, x.stop + 2 * r))
            estimate = network(stack[cut], valid[cut], levels)[0]
            out[y, x] = estimate[r : r + y.stop - y.start, r : r + x.stop - x.start]
    return out


def has_bfloat16(device: str) -> bool:
    """Whether bfloat16 convolutions are faster than float32 on `device`."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(check()) for check in (getattr(torch.cpu, name, None) for name in names) if check is not None)


@contextmanager
def reduced_precision(device: str, dtype: DType) -> Iterator[None]:
    """Compute in bfloat16 if `dtype` asks for it, or leaves it open and the device gains from it."""
    enabled = dtype == "bfloat16" or (dtype == "auto" and has_bfloat16(device))
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=enabled):
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one CPU thread: the last bits of a convolution depend on how many share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
