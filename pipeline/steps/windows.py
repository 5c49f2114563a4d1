"""Run a network over a large image in windows, and blend what it says without seams."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from schemas.errors import SettingsError


def blend(
    function: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    window: int | None,
    halo: int,
    receptive_radius: int,
    batch: int,
    alignment: int = 1,
) -> Tensor:
    """Output (c_out, y, x) of `function` on image (c, y, x), computed in windows of edges up to `window` [px].

    `function` maps (batch, c, h, w) to (batch, c_out, h, w). The image is continued by reflection by `halo` on each
    side, once; a window is a core and a halo per side. As few windows as need be, of equal size, cover each axis. In
    each window the border of `receptive_radius`, which depends on where the window was cut, is trimmed *before* what is
    left is weighted by a Hamming window and added up. So every window size gives the same answer up to rounding.
    `window` None computes the image in one piece. The last batch is padded, so that all batches have one shape. What
    `function` says of a pixel may depend on where that lies among blocks of `alignment` pixels. Raises SettingsError
    where sizes do not fit.
    """
    _check(window, halo, receptive_radius)
    height, width = image.shape[-2:]
    core_y, core_x = (_core(size, window, halo, alignment) for size in (height, width))
    if (core_y, core_x) == (height, width):
        rows, cols = (reflected(-halo, n + halo, n, device=image.device) for n in (height, width))
        padded = image.index_select(-2, rows).index_select(-1, cols)
        return function(padded[None])[0, :, halo : halo + height, halo : halo + width].clone()
    total = torch.empty(0)
    weights = image.new_zeros(height, width)
    places = [(y, x) for y in _starts(height, core_y, halo, alignment) for x in _starts(width, core_x, halo, alignment)]
    edges = core_y + 2 * halo, core_x + 2 * halo
    for first in range(0, len(places), batch):
        group = places[first : first + batch]
        stack = torch.stack([_cut(image, (y, x), edges) for y, x in group + [group[-1]] * (batch - len(group))])
        made = function(stack)
        if not total.numel():
            total = made.new_zeros(made.shape[1], height, width)
        for (y, x), output in zip(group, made, strict=False):
            _add(total, weights, output, (y, x), receptive_radius)
    return total.div_(weights)


def _check(window: int | None, halo: int, receptive_radius: int) -> None:
    if halo < receptive_radius:
        raise SettingsError(
            f"the halo is {halo} px; expected at least the receptive radius of the network, {receptive_radius} px"
        )
    if window is not None and window <= 2 * halo:
        raise SettingsError(
            f"the window is {window} px; expected more than two halos of {halo} px; set segment.window to at least "
            f"{4 * halo} or to none"
        )


def reflected(start: int, stop: int, size: int, *, device: torch.device | None = None) -> Tensor:
    """Indices (stop − start,) into an axis of `size` that is continued by reflection about its end pixels."""
    period = max(2 * (size - 1), 1)
    index = torch.arange(start, stop, device=device).remainder(period)
    return torch.minimum(index, period - index) if size > 1 else torch.zeros_like(index)


def _core(size: int, window: int | None, halo: int, alignment: int = 1) -> int:
    """Core of each window along an axis: with the fewest windows, so small that they hardly overlap."""
    most = size if window is None else window - 2 * halo
    if most >= size:
        return size
    most = max(most // alignment, 1) * alignment
    return math.ceil(size / math.ceil(size / most) / alignment) * alignment


def _starts(size: int, core: int, halo: int, alignment: int = 1) -> Iterator[int]:
    """First pixel of each window along an axis; cores tile the axis, the last window ends with or behind the halo."""
    last = math.ceil(max(size - core, 0) / alignment) * alignment - halo
    yield from range(-halo, last, core)
    yield last


def _cut(image: Tensor, place: tuple[int, int], edges: tuple[int, int]) -> Tensor:
    rows, cols = (
        reflected(start, start + edge, size, device=image.device)
        for start, edge, size in zip(place, edges, image.shape[-2:], strict=True)
    )
    return image.index_select(-2, rows).index_select(-1, cols)


def _add(total: Tensor, weights: Tensor, output: Tensor, place: tuple[int, int], trim: int) -> None:
    """Add one window's trimmed, weighted output at its place; what lies outside the image is dropped."""
    slices, parts = [], []
    for start, edge, size in zip(place, output.shape[-2:], weights.shape, strict=True):
        inner = start + trim, start + edge - trim
        kept = max(inner[0], 0), min(inner[1], size)
        slices.append(slice(*kept))
        parts.append(slice(kept[0] - start, kept[1] - start))
    vertical, horizontal = (
        torch.hamming_window(edge - 2 * trim, periodic=False, dtype=output.dtype, device=output.device)[
            part.start - trim : part.stop - trim
        ]
        for part, edge in zip(parts, output.shape[-2:], strict=True)
    )
    weight = vertical[:, None] * horizontal
    total[:, slices[0], slices[1]] += output[:, parts[0], parts[1]] * weight
    weights[slices[0], slices[1]] += weight
