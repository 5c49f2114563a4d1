"""The most plausible path: the pairs, and how specimens move, each weighed by what the movie itself says of it.

The plan. The velocity of a specimen wanders about a mean m that is not known: v(t) − m = φ (v(t−1) − m) + kick. That is
a random walk for φ = 0 and a smooth one for φ near 1. A pair (i, j) measures (p + u)(j) − (p + u)(i): the path p, and
what the noise of each frame displaces it by against all others, u, which no closure shows. For given φ and size of the
kicks all is Gaussian, and banded by the largest lag: one Cholesky factor gives path, errors and evidence (Rasmussen &
Williams, Gaussian Processes for Machine Learning, 2006, ch. 5). The answer is the mean over a grid of φ and of sizes,
each counted by its evidence, so that a short movie, which cannot say how it moves, is not believed to be still.

A hop is a kick far out of size. Such kicks count less, as in Student's t, and are neither smeared over their
neighbours nor taken as the way in which the rest of the movie moves.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve_banded, cholesky_banded

Double = NDArray[np.float64]
Integer = NDArray[np.int64]

_PERSISTENCE = (0.0, 0.5, 0.8, 0.95)
# Sizes of the velocity's scatter, in geometric steps from this part of the largest plausible motion to all of it.
_SIZES, _SMALLEST = 9, 1 / 400
# After the first round only sizes so many steps from the best are looked at again.
_NEAR = 2
_ROUNDS, _SETTLED = 6, 0.02
_DEGREES = 3.0
# Motions of less weight than this do not matter for the errors.
_NEGLIGIBLE = 0.01


class Links(NamedTuple):
    """What was measured, of p pairs and n frames.

    first, second: (p,) frame numbers; shift: (p, 2) y, x [px]; variance: (p, 2) [px²], of the pair alone;
    frame: (n, 2) [px²], of what each frame is displaced by against all others.
    """

    first: Integer
    second: Integer
    shift: Double
    variance: Double
    frame: Double


class _System(NamedTuple):
    """One axis without its prior, for the unknowns p(0), u(0), p(1), u(1), …

    start: the frame in which p is zero; matrix: (width, 2 n) lower banded; sides: (2 n, 2), of the shifts and of a
    motion of 1 px per frame; moments: of the shifts' squares, shifts times lags, squares of lags, over the variance.
    """

    start: int
    matrix: Double
    sides: Double
    moments: tuple[float, float, float]


class _Answer(NamedTuple):
    """Of one axis for one motion: log-evidence, path (n,), its change with m (n,), variance of m, Cholesky factor."""

    evidence: float
    path: Double
    slope: Double
    variance: float
    factor: Double


def smooth_path(links: Links, *, start: int, max_motion: float) -> tuple[Double, Double]:
    """Path (n, 2) [px], zero in frame `start`, and its standard errors against that frame (n, 2) [px].

    max_motion: largest plausible motion between frames [px/frame], a scale, not a limit.
    """
    n = len(links.frame)
    systems = [_system(links, axis, start) for axis in (0, 1)]
    sizes = max_motion * np.geomspace(_SMALLEST, 1, _SIZES)
    near = np.ones(_SIZES, dtype=bool)
    trust = np.ones(n)
    for _ in range(_ROUNDS):
        grid = [(phi, float(size) ** 2 * (1 - phi**2)) for phi in _PERSISTENCE for size in sizes[near]]
        answers = [[_solve(one, phi, kick, trust, max_motion) for one in systems] for phi, kick in grid]
        evidence = np.array([y.evidence + x.evidence for y, x in answers])
        weight = np.exp(evidence - evidence.max())
        weight /= weight.sum()
        paths = np.array([np.stack([y.path, x.path], axis=1) for y, x in answers])
        path = np.tensordot(weight, paths, axes=1)
        phi, kick = grid[int(weight.argmax())]
        fresh = _trust(path, phi, kick)
        if np.abs(fresh - trust).max() < _SETTLED:
            break
        trust = fresh
        best = int(np.abs(sizes - np.sqrt(kick / (1 - phi**2))).argmin())
        near = np.abs(np.arange(_SIZES) - best) <= _NEAR
    variance = np.zeros((n, 2))
    counted = np.flatnonzero(weight >= _NEGLIGIBLE)
    for k in counted:
        own = np.stack([_inverse_diagonal(a.factor)[::2] + a.slope**2 * a.variance for a in answers[k]], axis=1)
        variance += weight[k] / weight[counted].sum() * (own + (paths[k] - path) ** 2)
    error = np.sqrt(variance)
    error[start] = 0
    return path - path[start], error


def _system(links: Links, axis: int, start: int) -> _System:
    n, lag = len(links.frame), links.second - links.first
    weight, shift = 1 / links.variance[:, axis], links.shift[:, axis]
    matrix = np.zeros((max(2 * int(lag.max()) + 2, 5), 2 * n))
    i, j = 2 * links.first, 2 * links.second
    for a in (0, 1):
        for b in (0, 1):
            np.add.at(matrix, (j + b - i - a, i + a), -weight)
        np.add.at(matrix[0], i + a, weight)
        np.add.at(matrix[0], j + a, weight)
    np.add.at(matrix[1], i, weight)
    np.add.at(matrix[1], j, weight)
    matrix[0, 1::2] += 1 / links.frame[:, axis]
    matrix[0, 2 * start] += 1e3 * float(matrix[0].max())
    sides = np.zeros((2 * n, 2))
    for column, pull in enumerate((weight * shift, weight * lag)):
        for kind in (0, 1):
            np.add.at(sides[:, column], j + kind, pull)
            np.add.at(sides[:, column], i + kind, -pull)
    moments = (weight @ shift**2, weight @ (shift * lag), weight @ lag.astype(float) ** 2)
    return _System(start, matrix, sides, (float(moments[0]), float(moments[1]), float(moments[2])))


def _solve(system: _System, phi: float, kick: float, trust: Double, max_motion: float) -> _Answer:
    """Path of one axis for kicks of variance `kick` [px²], those into frame t counted trust[t] (n,) of it."""
    n = len(trust)
    factor = cholesky_banded(system.matrix + _prior(phi, trust, len(system.matrix)) / kick, lower=True)
    solved = cho_solve_banded((factor, True), system.sides)
    plain, mixed, square = system.moments
    precision = square - float(system.sides[:, 1] @ solved[:, 1]) + 1 / max_motion**2
    mean = (mixed - float(system.sides[:, 1] @ solved[:, 0])) / precision
    misfit = plain - float(system.sides[:, 0] @ solved[:, 0]) - mean**2 * precision
    volume = 2 * float(np.log(factor[0]).sum()) + np.log(precision) + (n - 1) * np.log(kick) - np.log(1 - phi**2)
    slope = np.arange(n) - solved[::2, 1]
    slope -= slope[system.start]
    return _Answer(-(misfit + volume) / 2, solved[::2, 0] + mean * slope, slope, 1 / precision, factor)


def _prior(phi: float, trust: Double, width: int) -> Double:
    """Precision of the path, less its mean motion, for kicks of variance 1, in the layout of `_System.matrix`."""
    n = len(trust)
    band = np.zeros((width, 2 * n))
    if n > 1:  # the first velocity, as it is in the long run
        first = 1 - phi**2
        band[0, 0], band[0, 2], band[2, 0] = first, first, -first
    terms = (phi, -(1 + phi), 1.0)  # of p(t − 2), p(t − 1), p(t) in the kick into frame t
    kicks = max(n - 2, 0)
    for late in range(3):
        for early in range(late + 1):
            place = slice(2 * early, 2 * (early + kicks), 2)
            band[2 * (late - early), place] += trust[2:] * terms[late] * terms[early]
    return band


def _trust(path: Double, phi: float, kick: float) -> Double:
    """How far each frame's kick (n,) is one of the common size: Student's t, and never more than 1."""
    velocity = np.diff(path, axis=0) - np.diff(path, axis=0).mean(axis=0) if len(path) > 1 else path
    trust = np.ones(len(path))
    kicks = velocity[1:] - phi * velocity[:-1]
    trust[2:] = np.minimum(1, (_DEGREES + 2) / (_DEGREES + (kicks**2).sum(axis=1) / kick))
    return trust


def _inverse_diagonal(factor: Double) -> Double:
    """Diagonal (n,) of the inverse of a banded matrix from its lower Cholesky factor (width + 1, n).

    Takahashi's recurrence: only entries of the inverse inside the band are needed to find the next
    (Erisman & Tinney, Comm. ACM 18, 1975).
    """
    width, n = factor.shape[0] - 1, factor.shape[1]
    diagonal = np.zeros(n)
    near = np.zeros((width, width))
    for j in range(n - 1, -1, -1):
        lower = factor[1:, j]
        row = -(near @ lower) / factor[0, j]
        diagonal[j] = 1 / factor[0, j] ** 2 - (lower @ row) / factor[0, j]
        near[1:, 1:] = near[:-1, :-1].copy()
        near[0, 0] = diagonal[j]
        near[0, 1:] = near[1:, 0] = row[:-1]
    return diagonal
