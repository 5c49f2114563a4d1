"""Windows of a frame around its columns, what may be used in them, and how wide the columns' images are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

NEIGHBOURS = 8  # nearest columns whose tails are subtracted; the ninth is at least two distances away in any packing
REACH = 2.5  # window radius in widths where neighbours leave room: 98 % of the position information
SMALLEST_WINDOW = 1.5  # [px] below it the four parameters are not determined
FLOOR = 0.1  # of the frame's mean: least expected electrons per pixel, so that empty pixels are not infinitely certain
PORTION = 512  # columns fitted at a time
PROFILED = 2048  # columns that the mean profile is taken from, evenly among all
HALF_WIDTH = float(np.sqrt(2 * np.log(2)))  # half width at half maximum of a Gaussian, in standard deviations


class Neighbourhood(NamedTuple):
    """Nearest columns of each: which and exists (1 or 0), both (column, neighbour), nearest (column) distance [px]."""

    which: torch.Tensor
    exists: torch.Tensor
    nearest: torch.Tensor


class Scene(NamedTuple):
    """What stays fixed in the fit of some columns: axes (column, window y, window x) unless said otherwise."""

    rows: slice  # which of the frame's columns these are
    measured: torch.Tensor
    denoised: torch.Tensor
    weight: torch.Tensor  # 1 / variance of the measured pixel, 0 where it is not used
    centre: torch.Tensor  # (column, 2) integer pixel in the middle of each window
    offset: torch.Tensor  # (window) pixel offsets from it
    neighbour: torch.Tensor  # (column, neighbour) among all the frame's columns
    exists: torch.Tensor  # (column, neighbour) 1 or 0
    radius: torch.Tensor  # (column) [px]


def cut_windows(
    measured: torch.Tensor,
    denoised: torch.Tensor,
    place: torch.Tensor,
    near: Neighbourhood,
    *,
    width: float,
    readout_variance: float,
) -> list[Scene]:
    """Cut the windows. Pixels outside the frame, not finite, or past half way to a neighbour weigh nothing.

    measured, denoised (y, x) [electrons]; place (column, 2) [px]; width [px] of a column's image. In portions of
    PORTION columns, so that what a step computes stays in the cache and memory bounded.
    """
    floor = FLOOR * float(torch.nan_to_num(denoised, nan=0.0).mean().clamp(min=1e-3))
    starts = range(0, len(place), PORTION)
    portions = [slice(start, min(start + PORTION, len(place))) for start in starts]
    return [_cut(measured, denoised, place, near, rows, width, readout_variance, floor) for rows in portions]


def _cut(
    measured: torch.Tensor,
    denoised: torch.Tensor,
    place: torch.Tensor,
    near: Neighbourhood,
    rows: slice,
    width: float,
    readout_variance: float,
    floor: float,
) -> Scene:
    place = place[rows]
    radius = torch.clamp(torch.clamp(near.nearest[rows] / 2, max=REACH * width), min=SMALLEST_WINDOW)
    centre, offset, (raw, soft), within = _windows(place, max(REACH * width, SMALLEST_WINDOW), measured, denoised)
    away = centre[:, :, None] + offset - place[:, :, None]
    distance = torch.hypot(away[:, 0, :, None], away[:, 1, None, :])
    # The rim fades over a pixel: a hard one would tie the position to the pixel grid.
    rim = (radius[:, None, None] + 0.5 - distance).clamp(0, 1)
    usable = within & torch.isfinite(raw) & torch.isfinite(soft)
    variance = torch.nan_to_num(soft).clamp(min=floor) + readout_variance
    weight = torch.where(usable, rim / variance, 0.0)
    raw, soft = torch.where(usable, raw, 0.0), torch.where(usable, soft, 0.0)
    return Scene(rows, raw, soft, weight, centre, offset, near.which[rows], near.exists[rows], radius)


def _windows(
    place: torch.Tensor, reach: float, *frames: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Centres (column, 2), offsets (window), the frames' windows (column, y, x), and which pixels lie in the frame."""
    height, breadth = frames[0].shape
    half = int(np.ceil(reach)) + 1
    offset = torch.arange(-half, half + 1, device=place.device, dtype=torch.float64)
    centre = torch.round(place)
    rows, columns = centre[:, :1] + offset, centre[:, 1:] + offset
    within = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < breadth))[:, None, :]
    row, column = rows.clamp(0, height - 1).long()[:, :, None], columns.clamp(0, breadth - 1).long()[:, None, :]
    return centre, offset, [frame[row, column] for frame in frames], within


def neighbours(place: torch.Tensor) -> Neighbourhood:
    """The nearest other columns of each, place (column, 2) [px]."""
    # A tree on the host: n x n distances would need gigabytes for a 4096² frame's 40,000 columns.
    count, device = len(place), place.device
    wanted = min(NEIGHBOURS, count - 1)
    if wanted == 0:
        none = torch.zeros((count, 1), dtype=torch.long, device=device)
        far = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
        return Neighbourhood(none, none.to(torch.float64), far)
    points = place.cpu().numpy()
    found = cKDTree(points).query(points, k=wanted + 1)
    distance, index = np.asarray(found[0]), np.asarray(found[1])
    own = index == np.arange(count)[:, None]
    own[~own.any(axis=1), -1] = True  # several columns on one spot may crowd a point out of its own list
    index, distance = index[~own].reshape(count, wanted), distance[~own].reshape(count, wanted)
    exists = torch.ones((count, wanted), dtype=torch.float64, device=device)
    nearest = torch.as_tensor(distance[:, 0].copy(), device=device)
    return Neighbourhood(torch.as_tensor(index, device=device), exists, nearest)


def common_width(
    denoised: torch.Tensor, place: torch.Tensor, near: Neighbourhood, *, polarity: int, width: float
) -> float:
    """Standard deviation [px] of the Gaussian with the half width that the columns' mean radial profile has.

    It asks nothing of the profile's shape, so that rims and flat or dented tops (HRTEM) do no harm; where neighbours
    overlap it comes out 10 to 15 % narrow. denoised (y, x);
    place (column, 2) [px]; the profile goes to the smaller of three times width [px] and half the median distance of
    neighbours. Without a half maximum in reach, width is returned; and never less than half or more than twice of it.
    """
    reach = max(min(3 * width, 0.5 * float(near.nearest.median())), 2.0)
    place = place[:: -(-len(place) // PROFILED)]
    centre, offset, (values,), within = _windows(place, reach, denoised)
    away = centre[:, :, None] + offset - place[:, :, None]
    distance = torch.hypot(away[:, 0, :, None], away[:, 1, None, :])
    profile = polarity * _radial_mean(distance, values, within & torch.isfinite(values), int(2 * reach))
    top = int(profile.argmax())
    level = (profile[top] + profile[top:].min()) / 2
    below = top + np.flatnonzero(profile[top:] < level)
    if len(below) == 0:
        return width
    last = int(below[0])
    part = (profile[last - 1] - level) / (profile[last - 1] - profile[last])
    return float(np.clip(0.5 * (last - 1 + part) / HALF_WIDTH, width / 2, 2 * width))


def _radial_mean(distance: torch.Tensor, values: torch.Tensor, usable: torch.Tensor, count: int) -> NDArray[np.float64]:
    """Mean of the usable values at distances 0, 0.5, 1 … [px] from 0 on, `count` of them; linear binning."""
    # On the host: a bin's sum would depend on the order in which a GPU's threads arrive.
    where, number = 2 * distance[usable].cpu().numpy(), values[usable].cpu().numpy()
    low = np.floor(where).astype(np.intp)
    upper = where - low
    sums, weights = np.zeros(count + 1), np.zeros(count + 1)
    for bin_, share in ((low, 1 - upper), (low + 1, upper)):
        index = np.minimum(bin_, count)
        sums += np.bincount(index, weights=share * number, minlength=count + 1)
        weights += np.bincount(index, weights=share, minlength=count + 1)
    return np.asarray(sums[:count] / np.maximum(weights[:count], 1e-12))
