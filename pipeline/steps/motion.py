"""How the parts of a view move between frames taken close together: what one drift for the whole frame leaves over.

A particle turns while its support stays, a sheet rotates, the drift has fractions of a pixel. Each image is compared
with a guide, an image of what all of them show, by least squares in Gaussian windows (Lucas and Kanade 1981): the
displacement, a change of contrast and one of brightness. Displacements are small against their prior spread where the
counts say little, so that noise does not move anything; the spread is learnt from the movie (empirical Bayes). Two
sizes of window: the finer one estimates what the coarser one left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

_P = ParamSpec("_P")
_R = TypeVar("_R")
BLOCK = 16
"""Edge [px] of the squares over which sums are taken; displacements are given at their centres."""
WINDOWS = (4.0, 2.0)
"""Standard deviations of the windows [blocks], the coarser first."""
FARTHEST = 8.0
"""No part is moved farther than this [px]: beyond half a lattice spacing the linear estimate means nothing."""
# Pixels of all neighbours together that are moved at a time: what stays in cache.
_BAND = 500_000
# Prior spreads of a change of contrast and of brightness, relative.
_CONTRAST, _BRIGHTNESS = 0.5, 0.2
# By how much a guide may be fainter, or stronger, than the images.
_CONTRASTS = 0.5, 4.0
# Where learning the spread of displacements begins [px], its rounds, and below what it is none.
_FIRST, _ROUNDS, _LEAST = 0.5, 30, 0.05
_PAIRS = [(i, j) for i in range(4) for j in range(i, 4)]


class Moments(NamedTuple):
    """What the counts say, block by block: normal equations for displacement (y, x), contrast and brightness."""

    normal: Tensor
    """(by, bx, 10): upper triangle of the products of the four regressors, over the variance of the noise."""
    right: Tensor
    """(image, by, bx, 4): products of regressors and differences from the guide, over that variance."""
    share: Tensor
    """(image, by, bx): part of each block that an image has."""


def _in_full(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Products of matrices in float32 also where a network computes in fewer bits: displacements need them."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


class Comparison:
    """Collects the `Moments` of images against some rows of a guide (y, x), one image at a time.

    Guide and images are relative to the mean brightness, about zero; `variance` is that of an image's noise. `rows`
    begin at a multiple of `BLOCK`.
    """

    def __init__(self, guide: Tensor, rows: slice, *, variance: float) -> None:
        first = max(rows.start - 1, 0)
        near = guide[first : rows.stop + 1]
        down, across = torch.zeros_like(near), torch.zeros_like(near)
        down[1:-1] = (near[2:] - near[:-2]) / 2
        across[:, 1:-1] = (near[:, 2:] - near[:, :-2]) / 2
        down, across, own = (part[rows.start - first :][: rows.stop - rows.start] for part in (down, across, near))
        self._guide, self._variance = own, variance
        # An image displaced by d is, to first order, the guide less d times its gradient.
        self._regressors = _blocks(torch.stack([-down, -across, own, torch.ones_like(own)]))
        self._differences: list[Tensor] = []
        self._share: list[Tensor] = []

    def add(self, image: Tensor, valid: Tensor) -> None:
        """The same rows of one image (y, x), and where they are valid (y, x) bool."""
        difference = image - self._guide
        everywhere = bool(valid.all())
        self._differences.append(_blocks((difference if everywhere else difference * valid)[None])[0])
        share = torch.ones(difference.shape, device=difference.device) if everywhere else valid.to(image.dtype)
        self._share.append(functional.avg_pool2d(share[None, None], BLOCK, ceil_mode=True)[0, 0])

    @_in_full
    def moments(self) -> Moments:
        """Of all images so far, in their order."""
        regressors = self._regressors.permute(1, 2, 0, 3)
        products = regressors @ torch.stack([*self._regressors, *self._differences], -1)
        normal = torch.stack([products[..., i, j] for i, j in _PAIRS], -1)
        right = products[..., 4:].permute(3, 0, 1, 2)
        return Moments(normal / self._variance, right / self._variance, torch.stack(self._share))


def joined(parts: Sequence[Moments]) -> Moments:
    """The moments of a whole image from those of its rows, in their order."""
    normal, right, share = zip(*parts, strict=True)
    return Moments(torch.cat(normal), torch.cat(right, 1), torch.cat(share, 1))


def squares(height: int, width: int, *, odd: bool) -> Tensor:
    """The blocks of one colour of a chessboard over an image, (by, bx) bool."""
    rows, columns = -(-height // BLOCK), -(-width // BLOCK)
    return (torch.arange(rows)[:, None] + torch.arange(columns)) % 2 == int(odd)


def without(moments: Moments, image: int, hidden: Tensor) -> Moments:
    """The moments as if nothing were known of the blocks `hidden` (by, bx) of one image."""
    right, share = moments.right.clone(), moments.share.clone()
    right[image] *= ~hidden[..., None]
    share[image] *= ~hidden
    return moments._replace(right=right, share=share)


@_in_full
def displacements(moments: Moments, spread: Sequence[float]) -> Tensor:
    """How far what each image shows lies from where the guide shows it, (image, 2, by, bx) [px], y then x.

    spread: the prior standard deviation [px] of the displacements in each of `WINDOWS`.
    """
    moments = _at_full_contrast(moments)
    total = torch.zeros(*moments.right.shape[:-1], 2, device=moments.right.device)
    for size, deviation in zip(WINDOWS, spread, strict=True):
        if deviation > 0:
            normal, right = _windowed(moments, total, size)
            total = total + _posterior(normal, right, deviation)[0]
    return total.clamp(-FARTHEST, FARTHEST).permute(0, 3, 1, 2)


@_in_full
def learnt_spread(found: Sequence[Moments]) -> tuple[float, ...]:
    """The spread of displacements [px] in each of `WINDOWS` that best explains some frames of a movie.

    Each round takes the mean of squared estimates and their variances, weighted by how much the counts told; zero
    where they tell nothing.
    """
    spread: list[float] = []
    found = [_at_full_contrast(moments) for moments in found]
    totals = [torch.zeros(*m.right.shape[:-1], 2, device=m.right.device) for m in found]
    for size in WINDOWS:
        systems = [_windowed(m, total, size) for m, total in zip(found, totals, strict=True)]
        deviation = _FIRST
        for _ in range(_ROUNDS):
            power, weight = 0.0, 0.0
            for normal, right in systems:
                estimate, variance = _posterior(normal, right, deviation)
                told = (1 - variance / deviation**2).clamp_min(0).double()
                power += float((told * (estimate.double() ** 2 + variance)).sum())
                weight += float(told.sum())
            deviation = (power / weight) ** 0.5 if weight > 1 else 0.0
            if deviation < _LEAST:
                deviation = 0.0
                break
        spread.append(deviation)
        if deviation:
            totals = [t + _posterior(*system, deviation)[0] for t, system in zip(totals, systems, strict=True)]
    return tuple(spread)


@_in_full
def field_at(field: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Fields (…, by, bx) at pixels of some rows and columns, (…, rows, columns): linear between block centres."""
    return _linear(rows, field.shape[-2]) @ field @ _linear(columns, field.shape[-1]).mT


def moved(
    frames: Sequence[Tensor],
    corners: Sequence[tuple[int, int]],
    field: Tensor,
    region: tuple[int, int, int, int],
    *,
    fill: float,
) -> tuple[Tensor, Tensor]:
    """Frames (h, w) of one size at the pixels of a region displaced by `field`, (frame, rows, columns), and where they
    have any.

    region (top, left, rows, columns) [px] of the view that `field` (frame, 2, by, bx) [px] describes; corners: where
    the region's first pixel lies in each of the frames. Linear between pixels in either direction; where one of the
    four is not finite or outside there is no value, but `fill`.
    """
    top, left, rows, columns = region
    parts = []
    across = left + torch.arange(columns, device=field.device)
    band = max(BLOCK, _BAND // max(len(frames) * columns, 1))
    for first in range(0, rows, band):
        down = top + torch.arange(first, min(first + band, rows), device=field.device)
        shift = field_at(field, down, across)
        parts.append(_moved(frames, [(y + first, x) for y, x in corners], shift, fill))
    found, valid = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return found, valid


@_in_full
def _moved(
    frames: Sequence[Tensor], corners: Sequence[tuple[int, int]], shift: Tensor, fill: float
) -> tuple[Tensor, Tensor]:
    """Frames at the pixels behind their corners displaced by `shift` (frame, 2, y, x) [px], and where they have any."""
    size, near, bounds = frames[0].shape, [], []
    low, high = torch.stack(torch.aminmax(shift)).tolist()
    first, extent = math.floor(low), [many + math.ceil(high) - math.floor(low) for many in shift.shape[2:]]
    for frame, corner in zip(frames, corners, strict=True):  # only the part that can be seen, zeros beyond the frame
        down, across = (_within(corner[axis] + first, extent[axis], size[axis]) for axis in (0, 1))
        near.append(functional.pad(frame[down[0], across[0]].float(), (*across[1], *down[1])))
        bounds.append([(-start, many - 1 - start) for start, many in zip(corner, size, strict=True)])
    images = torch.stack(near)
    valid = torch.ones(shift[:, 0].shape, dtype=torch.bool, device=shift.device)
    grid = torch.empty(*valid.shape, 2, device=shift.device)
    for axis, many in enumerate(shift.shape[2:]):
        pixel = torch.arange(many, device=shift.device).view((-1, 1) if axis == 0 else (-1,))
        place = shift[:, axis] + pixel
        for one, image in enumerate(bounds):
            least, most = image[axis]
            if low < least or high + many - 1 > most:
                valid[one] &= (place[one] >= least) & (place[one] <= most)
        scale = 2 / max(extent[axis] - 1, 1)
        grid[..., 1 - axis] = torch.add(-first * scale - 1, place, alpha=scale)
    finite = torch.isfinite(images)
    layers = [images] if bool(finite.all()) else [torch.where(finite, images, 0), finite.float()]
    found = functional.grid_sample(
        torch.stack(layers, 1), grid, mode="bilinear", padding_mode="border", align_corners=True
    )
    if len(layers) > 1:
        valid &= found[:, 1] > 1 - 1e-3
    return found[:, 0] if bool(valid.all()) else torch.where(valid, found[:, 0], fill), valid


def _within(first: int, many: int, size: int) -> tuple[slice, tuple[int, int]]:
    """Of `many` pixels from `first` on those on an axis of `size`, and how many are missing before and behind them."""
    start, stop = min(max(first, 0), size), min(max(first + many, 0), size)
    before = min(max(-first, 0), many)
    return slice(start, stop), (before, many - before - (stop - start))


def _blocks(images: Tensor) -> Tensor:
    """(n, y, x) as (n, by, bx, BLOCK²), zeros behind the edges."""
    n, height, width = images.shape
    images = functional.pad(images, (0, -width % BLOCK, 0, -height % BLOCK))
    rows, columns = images.shape[1] // BLOCK, images.shape[2] // BLOCK
    return images.view(n, rows, BLOCK, columns, BLOCK).transpose(2, 3).flatten(3)


def _at_full_contrast(moments: Moments) -> Moments:
    """The moments as if the guide had the contrast of the images.

    A guide that is filtered, or a mean of what moved, is fainter than they are, hence a displacement changes it less
    than them; from that alone they would all seem to move too far. All images tell its contrast together.
    """
    normal, right = _windowed(moments, None, WINDOWS[0])
    inverse = torch.linalg.inv(normal.sum(0) + _prior(_FIRST, normal))
    contrast = 1 + (inverse[..., 2, :] * right.sum(0)).sum(-1)
    # Once for each displacement among the regressors; (y, x) are the first two.
    factor = contrast.clamp(*_CONTRASTS)[..., None]
    powers = torch.tensor([(i < 2) + (j < 2) for i, j in _PAIRS], device=factor.device)
    return moments._replace(
        normal=moments.normal * factor**powers,
        right=torch.cat([moments.right[..., :2] * factor, moments.right[..., 2:]], -1),
    )


def _windowed(moments: Moments, known: Tensor | None, size: float) -> tuple[Tensor, Tensor]:
    """Normal equations (image, by, bx, 4, 4), (…, 4) of windows, displacements `known` (image, by, bx, 2) taken out."""
    normal = _square(moments.normal) * moments.share[..., None, None]
    right = moments.right if known is None else moments.right - (normal[..., :2] @ known[..., None])[..., 0]
    # Gaussian weights of sum one keep 1/n of the information of n = 4 pi size² blocks of full weight.
    count = 4 * torch.pi * size**2
    packed = torch.stack([normal[..., i, j] for i, j in _PAIRS] + list(right.unbind(-1)), -1)
    smooth = count * _smoothed(packed, size)
    return _square(smooth[..., :10]), smooth[..., 10:]


def _posterior(normal: Tensor, right: Tensor, deviation: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of the displacements (…, 2) [px, px²] for a prior standard deviation [px]."""
    inverse = torch.linalg.inv(normal + _prior(deviation, normal))
    mean = (inverse[..., :2, :] @ right[..., None])[..., 0]
    return mean, torch.stack([inverse[..., 0, 0], inverse[..., 1, 1]], -1)


def _prior(deviation: float, like: Tensor) -> Tensor:
    """Precision (4, 4) of what is known before the counts: displacements of this deviation [px]."""
    precision = [deviation**-2] * 2 + [_CONTRAST**-2, _BRIGHTNESS**-2]
    return torch.diag(torch.tensor(precision, dtype=like.dtype, device=like.device))


def _square(packed: Tensor) -> Tensor:
    """The symmetric matrices (…, 4, 4) of upper triangles (…, 10)."""
    place = [[_PAIRS.index((min(i, j), max(i, j))) for j in range(4)] for i in range(4)]
    return packed[..., place]


def _smoothed(packed: Tensor, size: float) -> Tensor:
    """A Gaussian mean over blocks, (image, by, bx, c); outside the image there is nothing."""
    images, rows, columns, count = packed.shape
    reach = int(3 * size + 0.5)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=packed.device) / size) ** 2)
    weights = (weights / weights.sum()).to(packed.dtype)
    flat = packed.permute(0, 3, 1, 2).reshape(images * count, 1, rows, columns)
    flat = functional.conv2d(flat, weights[None, None, :, None], padding=(reach, 0))
    flat = functional.conv2d(flat, weights[None, None, None, :], padding=(0, reach))
    return flat.view(images, count, rows, columns).permute(0, 2, 3, 1)


def _linear(pixels: Tensor, blocks: int) -> Tensor:
    """Weights (pixel, block) of linear interpolation between the centres of blocks; constant beyond the last."""
    place = ((pixels.float() - (BLOCK - 1) / 2) / BLOCK).clamp(0, blocks - 1)
    return (1 - (place[:, None] - torch.arange(blocks, device=pixels.device)).abs()).clamp_min(0)
