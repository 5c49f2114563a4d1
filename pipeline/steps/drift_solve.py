"""From pairwise shifts with several candidates each to one drift path with standard errors.

The plan. (1) Pick a candidate for each pair by its likelihood and by how plausible the motion is. (2) Solve for the
path by least squares over all pairs at once. (3) Improve the choice: each pair takes the candidate that best fits the
path; then whole-path moves are tried, because a path wrong by one lattice vector is consistent with itself:
everything after a frame moves by the difference of two candidates, or one frame alone does, and the move is kept if
the pairs that span it like it better. (4) Solve again with Cauchy weights, and scale the variances of each lag until
residuals agree with them. (5) Of all paths that go with the pairs, `smooth_path` takes the mean, weighed by how the
specimen moves in the rest of the movie.

Errors. A pair's error has a part that belongs to its two frames (their own noise displaces them against every other
frame; it never shows in closures) and a part of its own, which does. The residuals measure the second, and what is
left of the pair's standard error is the first.
The normal matrix is banded by the largest lag: time and memory grow linearly with the number of frames.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve_banded, cholesky_banded

from pipeline.steps.drift_smooth import Links, smooth_path

Double = NDArray[np.float64]
Integer = NDArray[np.int64]
Bool = NDArray[np.bool_]

_ROUNDS = 12
# A pair cannot say more than this (natural logarithm) for or against a candidate: its likelihood is only a model.
_MOST_EVIDENCE = 8.0
_MOST_MISFIT = 8.0
_SMALLEST_ERROR = 1e-3
# A pair agrees with a path that leaves less than this of it [px], at a maximum of this part of its highest one. Only
# pairs beyond the shortest lag are asked, which the path must reach over others, and at least so many.
_AGREED, _HIGH, _ASKED = 1.5, 0.8, 3
LOST, DOUBTFUL = 0.3, 0.7
"""Agreement up to which a drift was not found, and below which its errors are widened by what pairs disagree."""


class DriftPath(NamedTuple):
    """Drift of a movie.

    drift: (n, 2) y, x [px], how the specimen moved since the first good frame (there 0).
    error: (n, 2) [px], standard errors of drift (0 at the first good frame); bad frames are interpolated, as uncertain
    as the specimen's motion makes them.
    residual: (m, 2) [px], pair minus path for the candidate chosen, NaN where a pair was not usable.
    chosen: (m,) index of the candidate, −1 where a pair was not usable.
    weight: (m,) 0 … 1, how far the robust solution believed each pair.
    agreement: share of the pairs of longer lags that agree with the path; NaN where there are too few to ask. Up to
    `LOST` the pairs have nothing in common: the drift is zero then, and its errors what the motion could be.
    """

    drift: Double
    error: Double
    residual: Double
    chosen: Integer
    weight: Double
    agreement: float = float("nan")


class _Pairs(NamedTuple):
    """Usable pairs; p of them with k candidates."""

    first: Integer
    second: Integer
    shift: Double  # (p, k, 2), +inf where there is no candidate
    score: Double  # (p, k), −inf where there is no candidate
    error: Double  # (p, 2)


def solve_path(
    n_frames: int, pairs: Integer, shifts: dict[str, Double], *, good: Bool, max_motion: float, cauchy: float
) -> DriftPath:
    """Solve for the drift of every frame from all pairs of a movie.

    pairs: (m, 2), frame numbers, first < second; shifts: from `pair_shifts`, arrays of m rows in the same order.
    good: (n_frames,). max_motion: largest plausible motion between frames [px/frame], a scale, not a limit.
    cauchy: residual, in standard errors, at which a pair counts half.
    Raises ValueError if pairs and shifts disagree.
    """
    if len(pairs) != len(shifts["dy"]):
        raise ValueError(f"{len(pairs)} pairs but shifts for {len(shifts['dy'])}; they must be in the same order")
    good = np.asarray(good, dtype=bool)
    usable, data = _usable(pairs, shifts, good)
    chosen, weight = np.full(len(pairs), -1), np.zeros(len(pairs))
    residual = np.full((len(pairs), 2), np.nan)
    if not usable.any():
        return DriftPath(*_unknown(n_frames, max_motion), residual, chosen, weight)
    start = int(np.flatnonzero(good)[0])
    choice = np.argmax(data.score + _prior(data, np.zeros(2), max_motion), axis=1)
    choice = _choose(n_frames, data, choice, good=good, max_motion=max_motion)
    links, believed = _measured(n_frames, data, choice, good=good, cauchy=cauchy)
    path, error = smooth_path(links, start=start, max_motion=max_motion)
    chosen[usable], weight[usable] = choice, believed
    residual[usable] = links.shift - (path[data.second] - path[data.first])
    lag, height = data.second - data.first, shifts["height"][usable]
    high = height[np.arange(len(choice)), choice] >= _HIGH * np.nanmax(height, axis=1)
    asked = lag > lag.min()
    left = np.hypot(*residual[usable][asked].T)
    agreement = float(np.mean((left < _AGREED) & high[asked])) if len(left) >= _ASKED else float("nan")
    if agreement <= LOST:
        path, error = _unknown(n_frames, max_motion)
    elif agreement < DOUBTFUL:
        # Two axes share what is left over of a pair; 68 % lie within one standard error.
        error = np.hypot(error, np.quantile(left, 0.68) / np.sqrt(2)) * (error > 0)
    return DriftPath(path, error, residual, chosen, weight, agreement)


def _unknown(n_frames: int, max_motion: float) -> tuple[Double, Double]:
    """Drift and standard errors (n, 2) [px] where the movie does not tell: still, or anywhere that motion leads to."""
    error = np.full((n_frames, 2), max_motion * np.sqrt(max(n_frames, 1)))
    return np.zeros((n_frames, 2)), error * (n_frames > 1)


def _usable(pairs: Integer, shifts: dict[str, Double], good: Bool) -> tuple[Bool, _Pairs]:
    first, second = pairs[:, 0], pairs[:, 1]
    usable = np.isfinite(shifts["dy"][:, 0]) & good[first] & good[second]
    shift = np.stack([shifts["dy"], shifts["dx"]], axis=2)[usable]
    score = np.maximum(shifts["loglik"][usable], -_MOST_EVIDENCE)
    score = np.where(np.isfinite(shift[:, :, 0]), score, -np.inf)
    error = np.stack([shifts["dy_err"], shifts["dx_err"]], axis=1)[usable]
    return usable, _Pairs(first[usable], second[usable], shift, score, _steadied(error, second[usable] - first[usable]))


def _steadied(error: Double, lag: Integer) -> Double:
    """Return standard errors drawn towards the median of their lag: one pair's own is uncertain, unless it is large."""
    result = np.empty_like(error)
    for value in np.unique(lag):
        rows = lag == value
        for axis in (0, 1):
            own = error[rows, axis]
            finite = np.isfinite(own)
            typical = max(float(np.median(own[finite])), _SMALLEST_ERROR) if finite.any() else 1.0
            ratio = np.where(finite, own, 10 * typical) / typical
            result[rows, axis] = typical * np.where(ratio < 2, np.sqrt(np.maximum(ratio, 0.1)), ratio - 2 + np.sqrt(2))
    return result


def _prior(data: _Pairs, velocity: Double, scale: float) -> Double:
    """Log-prior (p, k) of a candidate's motion per frame about `velocity` (2,) or (p, 2): Student's t, 3 degrees."""
    lag = (data.second - data.first)[:, None]
    speed = data.shift / lag[:, :, None] - np.broadcast_to(velocity, (len(lag), 2))[:, None]
    squared = np.where(np.isfinite(speed), speed, 0.0)
    return np.asarray(-2.5 * np.log1p((squared**2).sum(axis=2) / (3 * scale**2)))


def _picked(data: _Pairs, choice: Integer) -> Double:
    return data.shift[np.arange(len(choice)), choice]


def _choose(n: int, data: _Pairs, choice: Integer, *, good: Bool, max_motion: float) -> Integer:
    """Alternate between the path and the choice of candidates until neither changes."""
    # Short lags are the least ambiguous: they lead, longer ones only bridge what they leave open.
    lag = data.second - data.first
    rank = np.searchsorted(np.unique(lag), lag)
    path = _solve(n, data, choice, 1e-3 ** np.minimum(rank, 3), good=good)
    score = data.score + _prior(data, np.zeros(2), max_motion)
    choice = np.argmax(score - _misfit(data, path[data.second] - path[data.first]), axis=1)
    for _ in range(_ROUNDS):
        velocity, scale = _motion(n, data, choice, max_motion)
        score = data.score + _prior(data, velocity, scale)
        moved = _jumps(path, data, score)
        fresh = np.argmax(score - _misfit(data, moved[data.second] - moved[data.first]), axis=1)
        if np.array_equal(fresh, choice) and np.array_equal(moved, path):
            break
        choice = fresh
        weight = np.ones(len(choice))
        for _ in range(5):
            distance = _misfit(data, moved[data.second] - moved[data.first])[np.arange(len(choice)), choice]
            weight = np.exp(-distance) + 1e-6
            moved = _solve(n, data, choice, weight, good=good)
        path = moved
    return choice


def _motion(n: int, data: _Pairs, choice: Integer, max_motion: float) -> tuple[Double, float]:
    """Local velocity for each pair (p, 2) and the typical deviation from it [px/frame], from the shortest lags."""
    lag = data.second - data.first
    short = lag == lag.min()
    speed = _picked(data, choice)[short] / lag[short, None]
    local = np.stack([_running_median(speed[:, axis], 9) for axis in (0, 1)], axis=1)
    scale = 1.4826 * float(np.median(np.abs(speed - local)))
    place = np.searchsorted(data.first[short], (data.first + data.second) // 2).clip(max=len(local) - 1)
    return local[place], float(np.clip(2 * scale, 0.1 * max_motion, max_motion))


def _running_median(values: Double, width: int) -> Double:
    padded = np.pad(values, width // 2, mode="edge")
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1))


def _misfit(data: _Pairs, step: Double) -> Double:
    """Half the squared distance (p, k) in standard errors between candidates and the path's steps (p, 2), bounded."""
    error = np.maximum(2 * data.error, 0.25)
    distance = (((data.shift - step[:, None]) / error[:, None]) ** 2).sum(axis=2) / 2
    return np.asarray(np.minimum(np.nan_to_num(distance, nan=_MOST_MISFIT, posinf=_MOST_MISFIT), _MOST_MISFIT))


def _jumps(path: Double, data: _Pairs, score: Double) -> Double:
    """Move all frames from t on, or frame t alone, by the difference of two candidates where that raises the score."""
    n = len(path)
    lag = data.second - data.first
    table = {int(value): _rows(data.first, lag == value, n) for value in np.unique(lag)}
    for _ in range(_ROUNDS):
        step = path[data.second] - path[data.first]
        now = np.max(score - _misfit(data, step), axis=1)
        best = np.zeros(n)
        offset = np.zeros((n, 2))
        alone = np.zeros(n, dtype=bool)
        shortest = table[min(table)]
        for candidate in range(data.shift.shape[1]):
            rows = shortest[np.maximum(np.arange(n) - min(table), 0)]
            rows[: min(table)] = -1
            move = np.where((rows >= 0)[:, None], data.shift[rows, candidate] - step[rows], 0.0)
            move[~np.isfinite(move).all(axis=1) | (np.abs(move).max(axis=1) < 1)] = 0
            after, single = _gains(data, score, step, now, move=move, table=table)
            for gain, kind in ((after, False), (single, True)):
                better = (gain > best) & move.any(axis=1)
                best[better], offset[better], alone[better] = gain[better], move[better], kind
        kept = _separate(best, max(table))
        if not len(kept):
            break
        path = path.copy()
        for t in kept:
            if alone[t]:
                path[t] += offset[t]
            else:
                path[t:] += offset[t]
    return path


def _rows(first: Integer, rows: Bool, n: int) -> Integer:
    table = np.full(n, -1)
    table[first[rows]] = np.flatnonzero(rows)
    return table


def _gains(
    data: _Pairs, score: Double, step: Double, now: Double, *, move: Double, table: dict[int, Integer]
) -> tuple[Double, Double]:
    """Gain in score (n,) of moving all frames ≥ t, and frame t alone, by move[t] (n, 2)."""
    n = len(move)
    frames = np.arange(n)
    after, single = np.full(n, -1e-6), np.full(n, -1e-6)
    for lag, rows in table.items():
        for back in range(lag + 1):
            # The pair that starts `back` frames before t: it spans the border before t if 1 ≤ back ≤ lag.
            start = frames - back
            row = np.where(start >= 0, rows[np.maximum(start, 0)], -1)
            ok = (row >= 0) & move.any(axis=1)
            row = row[ok]
            part = _Pairs(data.first[row], data.second[row], data.shift[row], score[row], data.error[row])
            moved = step[row] + (move[ok] if back else -move[ok])
            # A lag counts once: its pairs that span one border say the same thing again.
            gain = (np.max(part.score - _misfit(part, moved), axis=1) - now[row]) / lag
            if back > 0:
                after[ok] += gain
            if back in (0, lag):
                single[ok] += gain
    return after, single


def _separate(gain: Double, distance: int) -> list[int]:
    """Return frames of positive gain, best first, none within `distance` of a better one."""
    kept: list[int] = []
    taken = np.zeros(len(gain), dtype=bool)
    for t in np.argsort(-gain, kind="stable"):
        if gain[t] <= 0:
            break
        if not taken[t]:
            kept.append(int(t))
            taken[max(0, t - distance) : t + distance + 1] = True
    return kept


def _normal_matrix(n: int, weight: Double, data: _Pairs, good: Bool) -> Double:
    """Banded normal matrix (lag + 1, n) of one axis, lower form; weak links hold the frames that no pair holds."""
    width = int((data.second - data.first).max())
    band = np.zeros((width + 1, n))
    np.add.at(band[0], data.first, weight)
    np.add.at(band[0], data.second, weight)
    np.add.at(band, (data.second - data.first, data.first), -weight)
    # Between good frames a link of 1e-6 of the typical weight; at bad ones the same link is all there is.
    link = np.full(n - 1, 1e-6 * float(np.median(weight[weight > 0])))
    band[0, :-1] += link
    band[0, 1:] += link
    band[1, :-1] -= link
    first = int(np.flatnonzero(good)[0])
    band[0, first] += 1e3 * float(band[0].max())
    return band


def _right_side(n: int, data: _Pairs, choice: Integer, weight: Double) -> Double:
    pull = _picked(data, choice) * weight
    side = np.zeros((n, 2))
    np.add.at(side, data.second, pull)
    np.add.at(side, data.first, -pull)
    return side


def _solve(n: int, data: _Pairs, choice: Integer, weight: Double, *, good: Bool) -> Double:
    path = np.zeros((n, 2))
    for axis in (0, 1):
        w = weight / data.error[:, axis] ** 2
        factor = cholesky_banded(_normal_matrix(n, w, data, good), lower=True)
        side = _right_side(n, data, choice, w[:, None])[:, axis]
        path[:, axis] = cho_solve_banded((factor, True), side)
    return path


def _measured(n: int, data: _Pairs, choice: Integer, *, good: Bool, cauchy: float) -> tuple[Links, Double]:
    """The shifts chosen with the variances that their residuals show, and how far each is believed (p,), 0 … 1."""
    lag = data.second - data.first
    typical = _medians(data.error**2, lag)
    excess = np.maximum(data.error**2 - typical, 0)
    factor = np.ones(len(lag))
    redundancy = max(1 - (int(good.sum()) - 1) / len(lag), 0.0)
    weight, path = np.ones(len(lag)), np.zeros((n, 2))
    for _ in range(20):
        own = data._replace(error=np.sqrt(excess + factor[:, None] * typical))
        fresh = _solve(n, own, choice, weight, good=good)
        residual = _picked(data, choice) - (fresh[data.second] - fresh[data.first])
        squared = ((residual / own.error) ** 2).mean(axis=1)
        weight = 1 / (1 + squared / cauchy**2)
        if redundancy > 0.05:
            # 0.693 is the median of the mean of two squared standard normals.
            change = _medians(squared[:, None], lag)[:, 0] / 0.693 / redundancy
            factor = np.clip(factor * np.clip(change, 0.25, 4), 1e-3, 100)
        moved = float(np.abs(fresh - path).max())
        path = fresh
        if moved < 1e-4:
            break
    variance = own.error**2 / weight[:, None]
    frame = _frame_variance(n, data, factor)
    return Links(data.first, data.second, _picked(data, choice), variance, frame), weight


def _medians(values: Double, lag: Integer) -> Double:
    """Return for each pair the median of `values` (p, a) over the pairs of its lag."""
    result = np.empty_like(values)
    for value in np.unique(lag):
        rows = lag == value
        result[rows] = np.median(values[rows], axis=0)
    return result


def _frame_variance(n: int, data: _Pairs, factor: Double) -> Double:
    """Variance (n, 2) [px²] of what each frame's own noise displaces it by: what the closures of pairs do not show."""
    short = (data.second - data.first) == (data.second - data.first).min()
    share = float(np.clip(1 - factor[short][0], 0, 1)) / 2
    # The quieter of the pairs a frame is in tells about the frame, the other about its partner.
    variance = np.full((n, 2), np.inf)
    for side in (data.first[short], data.second[short]):
        np.minimum.at(variance, side, share * data.error[short] ** 2)
    known = np.isfinite(variance).all(axis=1)
    variance[~known] = np.median(variance[known], axis=0)
    return np.asarray(np.maximum(variance, _SMALLEST_ERROR**2))
