"""Detected against true columns: one-to-one matching, precision, recall, position error, and a yardstick detector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from pipeline.steps.bound import cramer_rao
from pipeline.steps.columns import Peaks, find_columns, inside

__all__ = [
    "Match", "Score", "Tally", "best_threshold", "cramer_rao", "difference_of_gaussians", "match_columns", "merge",
    "score", "tally_frame",
]  # fmt: skip

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


class Match(NamedTuple):
    """Partners `detected[i]` and `true[i]` (indices, in the order of detected), and who has none."""

    detected: Indices
    true: Indices
    distance: Floats
    spurious: Indices
    lost: Indices


def match_columns(detected: NDArray[np.floating], true: NDArray[np.floating], *, max_distance: float) -> Match:
    """Pair detected with true columns, each at most once: as many pairs as possible, then the least total distance.

    detected, true (column, 2): y, x in any one unit; pairs are at most max_distance apart in that unit. Solved exactly,
    by the assignment problem of each group of columns within reach of one another.
    """
    detected, true = (np.asarray(points, np.float64).reshape(-1, 2) for points in (detected, true))
    near = cKDTree(detected).sparse_distance_matrix(cKDTree(true), max_distance, output_type="coo_matrix")
    rows, columns, distance = near.row.astype(np.intp), near.col.astype(np.intp), near.data
    nodes = len(detected) + len(true)
    graph = coo_array((np.ones(len(rows)), (rows, columns + len(detected))), shape=(nodes, nodes))
    label = connected_components(graph, directed=False)[1][rows]
    chosen = np.zeros(len(rows), bool)
    order = np.argsort(label, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(label[order])) + 1):
        chosen[_assign(rows[group], columns[group], distance[group], max_distance, group)] = True
    picked = np.flatnonzero(chosen)
    picked = picked[np.argsort(rows[picked])]
    first, second = rows[picked], columns[picked]
    spurious, lost = np.setdiff1d(np.arange(len(detected)), first), np.setdiff1d(np.arange(len(true)), second)
    return Match(first, second, np.hypot(*(detected[first] - true[second]).T), spurious, lost)


def _assign(rows: Indices, columns: Indices, distance: Floats, max_distance: float, group: Indices) -> Indices:
    """The members of a group of candidate pairs that are chosen."""
    if len(group) < 2:
        return group
    row, r = np.unique(rows, return_inverse=True)
    column, c = np.unique(columns, return_inverse=True)
    # A pair out of reach costs more than any number of pairs within reach, so that the count comes first.
    forbidden = (min(len(row), len(column)) + 1) * max(max_distance, 1e-12)
    cost = np.full((len(row), len(column)), forbidden)
    pair = np.full((len(row), len(column)), -1, np.intp)
    cost[r, c], pair[r, c] = distance, group
    picked = pair[linear_sum_assignment(cost)]
    return picked[picked >= 0]


class Tally(NamedTuple):
    """Sums over frames from which a score is made; `merge` adds them, so frames may be scored in any grouping."""

    detected: int
    true: int
    matched: int
    moved: int
    sum_y: float
    sum_x: float
    sum_square: float
    within_error: int
    frames: int


def tally_frame(
    detected: NDArray[np.floating],
    true: NDArray[np.floating],
    *,
    max_distance: float,
    moved_distance: float,
    errors: NDArray[np.floating] | None = None,
) -> Tally:
    """Score of one frame as sums.

    detected, true (column, 2): y, x; errors (column, 2): standard errors of detected; all in one unit, and so
    max_distance, beyond which columns are not the same, and moved_distance, beyond which a matched one counts as moved.
    """
    match = match_columns(detected, true, max_distance=max_distance)
    off = np.asarray(detected, np.float64).reshape(-1, 2)[match.detected] - np.asarray(true).reshape(-1, 2)[match.true]
    covered = 0
    if errors is not None:
        covered = int(np.count_nonzero(np.abs(off) <= np.asarray(errors).reshape(-1, 2)[match.detected]))
    count, moved = len(match.detected), int(np.count_nonzero(match.distance > moved_distance))
    sums = float(off[:, 0].sum()), float(off[:, 1].sum()), float(np.square(off).sum())
    return Tally(count + len(match.spurious), count + len(match.lost), count, moved, *sums, covered, 1)


def merge(tallies: Iterable[Tally]) -> Tally:
    """Sum of tallies; of none: all zero."""
    sums = [0.0] * len(Tally._fields)
    for tally in tallies:
        sums = [a + b for a, b in zip(sums, tally, strict=True)]
    counts = [int(value) for value in sums]
    return Tally(*counts[:4], *sums[4:7], *counts[7:])


class Score(NamedTuple):
    """What a tally says; ratios with nothing to divide by are NaN. Lengths in the unit of the positions."""

    precision: float
    recall: float
    f1: float
    rms: float  # root of the mean squared distance (both axes together) of matched columns
    bias_y: float  # mean of detected - true
    bias_x: float
    coverage: float  # share of coordinates within one standard error; NaN-free only where errors were given
    lost: int
    spurious: int
    moved: int
    per_frame: float  # detected columns per frame


def score(tally: Tally) -> Score:
    """Precision, recall, F1, position errors and counts of a tally."""

    def ratio(numerator: float, denominator: float) -> float:
        return numerator / denominator if denominator else float("nan")

    matched = tally.matched
    return Score(
        precision=ratio(matched, tally.detected),
        recall=ratio(matched, tally.true),
        f1=ratio(2 * matched, tally.detected + tally.true),
        rms=ratio(tally.sum_square, matched) ** 0.5,
        bias_y=ratio(tally.sum_y, matched),
        bias_x=ratio(tally.sum_x, matched),
        coverage=ratio(tally.within_error, 2 * matched),
        lost=tally.true - matched,
        spurious=tally.detected - matched,
        moved=tally.moved,
        per_frame=ratio(tally.detected, tally.frames),
    )


def difference_of_gaussians(image: NDArray[np.floating], *, polarity: int, width: float) -> NDArray[np.float64]:
    """Response (y, x) of the plain blob filter G(width) - G(1.6 width) [unit of image], positive on columns.

    image (y, x); polarity +1 for bright columns, -1 for dark; width [px] standard deviation of a column's image.
    """
    image = np.asarray(image, np.float64)
    inner, outer = (gaussian_filter(image, sigma, mode="reflect") for sigma in (width, 1.6 * width))
    return polarity * (inner - outer)


def best_threshold(
    responses: Sequence[NDArray[np.floating]],
    truths: Sequence[NDArray[np.floating]],
    *,
    min_distance: float,
    max_distance: float,
    margin: float,
) -> tuple[float, Score]:
    """The yardstick: threshold of a response map with the best F1 against the truth, and the score it reaches.

    responses: maps (y, x); truths: y, x (column, 2) [px] of each; min_distance, max_distance, margin [px] as in
    find_columns, match_columns and inside. The threshold is picked from the very truth it is scored with, which no real
    detector can do.
    """
    found: list[Peaks] = []
    for response in responses:
        peaks = find_columns(response, threshold=0.0, min_distance=min_distance)
        keep = inside(peaks.y, peaks.x, shape=(response.shape[0], response.shape[1]), margin=margin)
        found.append(Peaks(*(values[keep] for values in peaks)))
    heights = np.concatenate([peaks.probability for peaks in found])
    best = (float("nan"), score(merge([])))
    for threshold in np.unique(np.quantile(heights, np.linspace(0, 1, 61))) if len(heights) else ():
        points = [np.column_stack([p.y, p.x])[p.probability >= threshold] for p in found]
        both = zip(points, truths, strict=True)
        tallies = [tally_frame(a, b, max_distance=max_distance, moved_distance=max_distance) for a, b in both]
        reached = score(merge(tallies))
        if not reached.f1 <= best[1].f1:
            best = (float(threshold), reached)
    return best
