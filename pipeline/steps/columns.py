"""Atomic columns of one frame: peaks of the probability map, and which refined columns are reported.

`find_columns` says where columns may be, `refine` (in `column_fit`) measures them against the electrons, `reported`
decides which of them a user sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from pipeline.steps.column_fit import evidence, refine

__all__ = ["Peaks", "evidence", "find_columns", "fringes", "inside", "refine", "reported", "roundness"]

STRONG = 0.9  # speckle may outnumber the columns of a small crystal several times over
AT_ONCE = 1024  # columns whose surroundings are held at a time
AROUND = 25  # peaks, itself and the nearest, whose median roundness tells whether they lie on fringes

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Indices = NDArray[np.intp]


class Peaks(NamedTuple):
    """Maxima of a map: y, x (column) [px, pixel centres on integers], probability (column), ordered by y then x."""

    y: Floats
    x: Floats
    probability: Floats


def find_columns(probability: ArrayLike | torch.Tensor, *, threshold: float, min_distance: float) -> Peaks:
    """Local maxima of a map, none closer than a distance, with sub-pixel positions.

    probability (y, x) [1], NumPy or torch on any device. A flat top counts once, at its centroid; a flat shelf below
    a higher neighbour does not count. Of two maxima closer than min_distance [px] the higher survives, of equal ones
    the one with the lower y, then the lower x. Maxima on the frame's edge are returned too (they are neighbours in the
    fit); `reported` removes them. Isolated maxima are moved to the vertex of a parabola through the logarithm of three
    pixels per axis (exact for a Gaussian). Peaks are those with probability >= threshold; NaN pixels are never peaks.
    """
    surface = torch.as_tensor(probability)
    if surface.ndim != 2:
        raise ValueError(f"probability has shape {tuple(surface.shape)}; expected the two axes (y, x) of one frame")
    surface = torch.nan_to_num(surface.to(torch.float64), nan=-torch.inf)
    height = _neighbourhood_maximum(surface)
    top = (surface == height) & (surface >= threshold) & torch.isfinite(surface)
    rest = _neighbourhood_maximum(torch.where(top, -torch.inf, surface))
    where = torch.nonzero(top)
    value = surface[where[:, 0], where[:, 1]]
    shelf = (rest[where[:, 0], where[:, 1]] == value).cpu().numpy()
    around = _patch3(surface, where).cpu().numpy()
    peaks = _one_per_plateau(where.cpu().numpy(), value.cpu().numpy(), shelf, around)
    chosen = _survivors(*peaks, min_distance)
    return Peaks(*(values[chosen] for values in peaks))


def _neighbourhood_maximum(surface: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(surface[None, None], 3, stride=1, padding=1)[0, 0]


def _patch3(surface: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The 3 x 3 pixels around each position, -inf outside the frame: (peak, 3, 3)."""
    padded = F.pad(surface[None, None], (1, 1, 1, 1), value=-torch.inf)[0, 0]
    step = torch.arange(3, device=surface.device)
    return padded[where[:, 0, None, None] + step[:, None], where[:, 1, None, None] + step]


def _one_per_plateau(where: NDArray[np.int64], value: Floats, shelf: Bools, around: Floats) -> Peaks:
    """Join touching candidates (necessarily of equal height) and drop those that touch an equal, lower-lying shelf."""
    count = len(where)
    if count == 0:
        return Peaks(np.empty(0), np.empty(0), np.empty(0))
    touching = cKDTree(where).query_pairs(1.5, output_type="ndarray")
    graph = coo_array((np.ones(len(touching), bool), (touching[:, 0], touching[:, 1])), shape=(count, count))
    groups, label = connected_components(graph, directed=False)
    size = np.bincount(label, minlength=groups)
    offset = np.where(size[label, None] == 1, _vertex(around), 0.0)
    position = where + offset
    centre = [np.bincount(label, weights=position[:, axis], minlength=groups) / size for axis in range(2)]
    first = np.unique(label, return_index=True)[1]
    keep = np.bincount(label, weights=shelf, minlength=groups) == 0
    return Peaks(centre[0][keep], centre[1][keep], value[first][keep])


def _vertex(around: Floats) -> Floats:
    """Offset (peak, 2) [px] of the parabola's vertex in log probability; 0 at the frame's edge and for values <= 0."""
    line = np.stack([around[:, :, 1], around[:, 1, :]], axis=1)
    usable = np.all(line > 0, axis=2)
    logs = np.log(np.where(usable[..., None], line, 1.0))
    left, middle, right = logs[..., 0], logs[..., 1], logs[..., 2]
    curvature = left - 2 * middle + right
    flat = ~usable | (curvature >= 0)
    shift = 0.5 * (left - right) / np.where(flat, 1.0, curvature)
    return np.where(flat, 0.0, np.clip(shift, -0.5, 0.5))


def _survivors(y: Floats, x: Floats, height: Floats, min_distance: float) -> Indices:
    """Indices, ordered by y then x, that greedy suppression from the highest down leaves.

    Decided a round at a time (all that no undecided one beats, then those they suppress): no loop over peaks, and the
    same answer as one by one.
    """
    order = np.lexsort((x, y, -height))
    pairs = np.sort(_closer_than(y[order], x[order], min_distance), axis=1)
    undecided, kept = np.ones(len(order), bool), np.zeros(len(order), bool)
    while undecided.any():
        open_pairs = pairs[undecided[pairs[:, 0]] & undecided[pairs[:, 1]]]
        beaten = np.zeros(len(order), bool)
        beaten[open_pairs[:, 1]] = True
        winners = undecided & ~beaten
        kept |= winners
        undecided &= beaten
        undecided[open_pairs[winners[open_pairs[:, 0]], 1]] = False
    chosen = order[kept]
    return chosen[np.lexsort((x[chosen], y[chosen]))]


def _closer_than(y: Floats, x: Floats, distance: float) -> Indices:
    if len(y) < 2 or distance <= 0:
        return np.empty((0, 2), np.intp)
    pairs = cKDTree(np.column_stack([y, x])).query_pairs(distance, output_type="ndarray")
    separation = np.hypot(y[pairs[:, 0]] - y[pairs[:, 1]], x[pairs[:, 0]] - x[pairs[:, 1]])
    return pairs[separation < distance]


def inside(y: Floats, x: Floats, *, shape: tuple[int, int], margin: float) -> Bools:
    """Which positions lie at least margin [px] inside the field of view, whose edges are at -0.5 and size - 0.5."""
    low, bottom, right = margin - 0.5, shape[0] - 0.5 - margin, shape[1] - 0.5 - margin
    return (y >= low) & (y <= bottom) & (x >= low) & (x <= right)


def roundness(image: NDArray[np.floating], y: Floats, x: Floats, *, polarity: int, width: float) -> Floats:
    """Least over greatest curvature of an image at points: (point,), 1 on a round peak, 0 on a fringe and off any peak.

    image (y, x) in any unit, smoothed here by a Gaussian of standard deviation width [px]; polarity 1 for bright peaks,
    −1 for dark ones. Outside the frame its border is repeated. After the roundness of Stetson, PASP 99, 191 (1987),
    but in all directions instead of along the axes.
    """
    parts = [slice(start, start + AT_ONCE) for start in range(0, max(len(y), 1), AT_ONCE)]
    return np.concatenate([_roundness(image, y[part], x[part], polarity, width) for part in parts])


def _roundness(image: NDArray[np.floating], y: Floats, x: Floats, polarity: int, width: float) -> Floats:
    radius = int(np.ceil(3.5 * width)) + 1
    rows, cols = (np.rint(axis).astype(np.int64)[:, None] + np.arange(-radius, radius + 1) for axis in (y, x))
    height, breadth = image.shape
    patch = image[np.clip(rows, 0, height - 1)[:, :, None], np.clip(cols, 0, breadth - 1)[:, None, :]].astype(
        np.float64
    )
    (y0, y1, y2), (x0, x1, x2) = (_derivatives((at - axis[:, None]) / width) for at, axis in ((rows, y), (cols, x)))
    scale = np.abs(patch).max(axis=(1, 2), initial=0.0)
    # Sampled, the kernels of derivatives do not quite sum to nothing.
    patch = patch - np.einsum("nij,ni,nj->n", patch, y0, x0)[:, None, None]
    down, across, mixed = (
        -polarity * np.einsum("nij,ni,nj->n", patch, *pair) for pair in ((y2, x0), (y0, x2), (y1, x1))
    )
    middle, spread = (down + across) / 2, np.hypot((down - across) / 2, mixed)
    greatest, least = middle + spread, middle - spread
    # Of a flat image rounding alone is left.
    return np.asarray(np.clip(least / np.where(greatest > 1e-9 * scale, greatest, np.inf), 0.0, 1.0))


def _derivatives(t: Floats) -> tuple[Floats, Floats, Floats]:
    """A Gaussian of unit sum over the last axis, and its first two derivatives in t."""
    bell = np.exp(-0.5 * t**2)
    bell = bell / bell.sum(axis=-1, keepdims=True)
    return bell, -t * bell, (t**2 - 1) * bell


def fringes(y: Floats, x: Floats, roundness: Floats, particle: Indices, *, least: float) -> Bools:
    """Which peaks (column,) are bright or dark spots on the fringes of a tilted crystal rather than columns.

    particle: the particle that a peak lies in or beside, −1 for none. A peak is taken for a part of a fringe where the
    median roundness of the AROUND nearest in its particle is below `least`: a round spot among stretched ones is where
    two fringes meet as often as a column, and a column on zone that an overlap or a vacancy stretches stays among round
    ones. Sheets, whose atoms noise may stretch, are in no particle.
    """
    found = np.zeros(len(y), bool)
    for index in np.unique(particle[particle >= 0]):
        mine = np.flatnonzero(particle == index)
        places = np.column_stack([y[mine], x[mine]])
        near = cKDTree(places).query(places, k=min(AROUND, len(mine)))[1].reshape(len(mine), -1)
        found[mine] = np.median(roundness[mine][near], axis=1) < least
    return found


def reported(
    columns: dict[str, NDArray[Any]],
    *,
    shape: tuple[int, int],
    margin: float,
    min_significance: float,
    min_relative: float,
    min_roundness: float,
    min_distance: float,
) -> Bools:
    """Which refined columns are reported: (column) bool.

    columns: the result of `refine`, their `roundness`, and `beside`, the particle in which they lie (see `fringes`). A
    column is reported if it lies at least margin [px] inside the field of view, its significance [1] reaches
    min_significance, it is no part of a fringe (`fringes` with min_roundness [1]), its significance reaches the part
    min_relative [1] of what STRONG of the columns that are left stay below (speckle of a support is weaker), and no
    more significant column that passes all that ended up within half of min_distance [px] of it (two starts that ran to
    one peak).
    """
    y, x, significance = columns["y"], columns["x"], columns["significance"]
    chosen = np.flatnonzero(inside(y, x, shape=shape, margin=margin) & (significance >= min_significance))
    around = (columns[name][chosen] for name in ("y", "x", "roundness", "beside"))
    chosen = chosen[~fringes(*around, least=min_roundness)]
    if len(chosen):
        strong = float(np.quantile(significance[chosen], STRONG))
        if strong > 0 and min_relative > 0:
            chosen = chosen[significance[chosen] >= min_relative * strong]
    survivors = _survivors(y[chosen], x[chosen], significance[chosen], min_distance / 2)
    passes = np.zeros(len(y), bool)
    passes[chosen[survivors]] = True
    return passes
