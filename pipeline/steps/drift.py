"""Drift: how far the specimen has moved since frame 0, from the shifts between pairs of frames.

The plan. Each frame is windowed and transformed once. The cross-power of two frames is weighted per frequency by what
an optimal delay estimator would use, S/(N(N + 2S)) for signal power S and noise power N (Hannan & Thomson, IEEE
Trans. ASSP 21, 1973; the periodic case: Savitzky et al., Ultramicroscopy 191, 2018), where S and N come from a sample
of the whole movie, so that strong lattice peaks, amorphous support and edges all count for what they tell. The best
few maxima of the correlation are kept, because in a lattice the highest can be wrong by a lattice vector;
`solve_path` picks among them with the whole movie in view. The best maximum, of equally likely ones the nearest, is
measured again with the window moved along with the specimen: a window that stands still pulls towards zero.

Sign: if the specimen moved by +d between frames i and j, the shift of the pair (i, j) is +d; −drift is what aligns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.steps.drift_pixels import common_field, whole_path, whole_pixels
from pipeline.steps.drift_solve import DriftPath, solve_path
from pipeline.steps.drift_weight import (
    frequencies,
    limited,
    masked,
    multiplicity,
    spectral_weight,
    spectrum,
    tensor,
    window_of,
)

__all__ = [
    "DriftPath",
    "common_field",
    "estimate",
    "pair_list",
    "pair_shifts",
    "solve_path",
    "spectral_weight",
    "whole_path",
    "whole_pixels",
]

Float = NDArray[np.float32]
Double = NDArray[np.float64]
Integer = NDArray[np.int64]
Bool = NDArray[np.bool_]

_TAU = 2 * np.pi
_NEWTON_STEPS = 3
# Part of the greatest height from which on a maximum may be the shift because it is near.
_PROMINENT = 0.5
# Maxima within _EVEN (natural logarithm of the likelihood) of the highest are told apart by their nearness alone. It is
# asked only if a nearer one has _ALIKE of its height, since it costs time.
_EVEN, _ALIKE = 4.0, 0.8
# Edge [px] of the square over which a frame is averaged to know how strong its noise is from place to place.
_LOCAL = 15


def pair_list(n_frames: int, *, start: int, stop: int, lags: Sequence[int]) -> Integer:
    """List the pairs (t, t + lag) owned by frames start ≤ t < stop: (pairs, 2), ordered by t, then by lag.

    The lists of blocks that tile the movie tile the list of the movie.
    """
    pairs = [(t, t + lag) for t in range(start, min(stop, n_frames)) for lag in sorted(set(lags)) if t + lag < n_frames]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def pair_shifts(
    frames: Float,
    pairs: Integer,
    *,
    good: Bool | Float,
    weight: Float,
    candidates: int,
    max_shift: float,
    taper: float,
    limit: float,
    device: str = "cpu",
) -> dict[str, Double]:
    """Measure the shift of each pair of frames.

    frames: (n, y, x) [electrons]; pairs: (m, 2) indices into frames. good: (n,), frames that may be used; or (n, y, x)
    from 0 to 1, masks of what counts of each frame, which may be used if that is not nothing.
    weight: from `spectral_weight`, of the movie. candidates: how many of the highest maxima to keep per pair, and how
    many of the nearest: the maxima of a perfect sheet are legion and noise alone says which is the highest.
    max_shift: largest shift looked for, as a part of the field. taper: as in `spectral_weight`.
    limit: bound on what stands out of a frame, in units of the amplitude that 90 % of its filtered image stays below,
    so that a small bright object that changes (an impurity, a cluster) does not drown the lattice or the support.
    Returns float64 arrays: dy, dx (m, 2 candidates) [px], best first, the others by height; height (m, 2 candidates),
    the weighted coherence (1 for equal frames, about 0 for unrelated ones); loglik (m, 2 candidates), log-likelihood
    relative to the highest, calibrated by the scatter of the phases; dy_err, dx_err (m,) [px], of the best. Missing
    values (pairs with a bad frame, fewer maxima than asked for) are NaN. Each pair depends on its two frames and on
    the weight alone.
    """
    shapes = dict.fromkeys(("dy", "dx", "height", "loglik"), (len(pairs), 2 * candidates))
    shapes |= dict.fromkeys(("dy_err", "dx_err"), (len(pairs), 1))
    result: dict[str, Double] = {name: np.full(size, np.nan) for name, size in shapes.items()}
    correlator = _Correlator((frames.shape[1], frames.shape[2]), weight, taper, device)
    wiener = tensor(weight[1], device)
    known: dict[int, _Frame] = {}
    usable = _usable(good)
    for row, (i, j) in enumerate(pairs):
        if not (usable[i] and usable[j]):
            continue
        for index in [k for k in known if k < i]:
            del known[index]
        for index in (int(i), int(j)):
            if index not in known:
                image, within = limited(tensor(frames[index], device), wiener, limit)
                mask = tensor(good[index], device) if good.ndim > 1 else None
                image = image if mask is None else masked(image, mask)
                known[index] = correlator.transform(image, correlator.gathering(image, within, mask))
        measured = correlator.measure(known[int(i)], known[int(j)], candidates=candidates, max_shift=max_shift)
        for name, value in measured.items():
            result[name][row] = value
    return {name: value[:, 0] if name.endswith("_err") else value for name, value in result.items()}


def _usable(good: Bool | Float) -> Bool:
    """Which frames may be used (n,), by flags (n,) or masks (n, y, x)."""
    return np.asarray(good, dtype=bool) if good.ndim == 1 else np.asarray((good > 0).any(axis=(1, 2)))


def estimate(frames: Float, good: Bool | Float, **options: Any) -> DriftPath:
    """The drift of a movie (n, y, x) [electrons] that fits in memory: what a run does block by block, in one go.

    good: as in `pair_shifts`. options: all settings of `spectral_weight`, `pair_list`, `pair_shifts` and `solve_path`,
    by their names there.
    """

    def chosen(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names}

    usable = _usable(good)
    masks = np.asarray(good[usable], dtype=np.float32) if good.ndim > 1 else None
    weight = spectral_weight(frames[usable], masks=masks, **chosen("band", "taper", "change", "limit"))
    pairs = pair_list(len(frames), start=0, stop=len(frames), lags=options["lags"])
    correlation = chosen("candidates", "max_shift", "taper", "limit")
    shifts = pair_shifts(frames, pairs, good=good, weight=weight, **correlation)
    return solve_path(len(frames), pairs, shifts, good=usable, **chosen("max_motion", "cauchy"))


class _Frame(NamedTuple):
    """An image (y, x), the columns of its spectrum that have weight, of these the rows that have, and their power.

    gathering: (2,) y, x: the variance that noise makes of its shift, over that of noise spread evenly over the field
    and independent from frequency to frequency.
    """

    image: torch.Tensor
    spectrum: torch.Tensor
    inner: torch.Tensor
    power: torch.Tensor
    gathering: Double


class _Peak(NamedTuple):
    """Correlation c, gradient and curvature at positions (k, 2) [px]."""

    value: torch.Tensor
    gradient: torch.Tensor
    hessian: torch.Tensor

    def of(self, order: torch.Tensor) -> _Peak:
        """These positions alone, in this order."""
        return _Peak(self.value[order], self.gradient[order], self.hessian[order])


class _Correlator:
    """What the pairs of one movie share."""

    def __init__(self, shape: tuple[int, int], weight: Float, taper: float, device: str) -> None:
        self.shape = shape
        self.window = window_of(shape, taper, device)
        self.weight = tensor(weight[0], device)
        # The window correlates neighbouring frequencies, so fewer are independent than there are.
        square = self.window.double() ** 2
        self.redundancy = float(square.numel() * (square**2).sum() / square.sum() ** 2)
        ky, kx = frequencies(shape, device)
        self.rows = torch.nonzero(self.weight.amax(dim=1) > 0).ravel()
        self.columns = slice(0, int(torch.nonzero(self.weight.amax(dim=0) > 0).max()) + 1)
        self.weight = self.weight[:, self.columns].contiguous()
        self.full_ky, self.full_kx = _TAU * ky.float(), _TAU * kx[self.columns].float()
        self.ky, self.kx = self.full_ky[self.rows], self.full_kx
        self.active = (self.weight * multiplicity(shape, device)[:, self.columns].float())[self.rows]
        self.noise = tensor(weight[2], device)[self.rows, self.columns].double()

    def transform(self, image: torch.Tensor, gathering: Double) -> _Frame:
        """Return what the pairs of a frame need of it."""
        columns = spectrum(image, self.window)[:, self.columns].contiguous()
        inner = columns[self.rows]
        return _Frame(image, columns, inner, (inner.real.square() + inner.imag.square()).double(), gathering)

    def gathering(self, image: torch.Tensor, within: torch.Tensor, mask: torch.Tensor | None) -> Double:
        """How noise gathers where the image tells about its shift (see `_Frame`), (2,) y, x.

        The window makes neighbouring frequencies share their noise, counts vary from place to place, and what was
        limited, outside of `within` (y, x), has lost its noise with its excess, as has what a mask hides. What matters
        is the noise where the gradient is, weighted like the correlation.
        """
        near = image[None, None]
        for kernel in ((_LOCAL, 1), (1, _LOCAL)):  # a mean over a square is one of means along its sides
            near = torch.nn.functional.avg_pool2d(
                near, kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2), count_include_pad=False
            )
        window = self.window if mask is None else self.window * mask
        noise = window.square() * near[0, 0].clamp(min=0)
        average = float(noise.double().mean())
        weighted = spectrum(image, self.window)[:, self.columns] * self.weight
        found = np.full(2, self.redundancy)
        for axis, slope in enumerate((self.full_ky[:, None], self.full_kx)):
            square = torch.fft.irfft2(weighted * (1j * slope), s=self.shape).square()
            total = float(square.double().sum()) * average
            if total > 0:
                found[axis] = float((square * noise * within).double().sum()) / total
        return found

    def measure(self, first: _Frame, second: _Frame, *, candidates: int, max_shift: float) -> dict[str, Double]:
        """Return the row of `pair_shifts` for two frames."""
        positions = self._maxima(first.spectrum.conj() * second.spectrum * self.weight, candidates, max_shift)
        cross = first.inner.conj() * second.inner * self.active
        positions, peak = self._climb(cross, positions)
        order = torch.argsort(peak.value, descending=True, stable=True)
        positions, peak = positions[order], peak.of(order)
        power, gathering = (first.power + second.power) / 2, (first.gathering + second.gathering) / 2
        nearer = positions.square().sum(1) < positions[0].square().sum()
        if bool((nearer & (peak.value > _ALIKE * peak.value[0])).any()):
            scale, _ = self._scatter(cross, positions[:1], peak, power, gathering)
            alike = torch.nonzero(scale * (peak.value.double() - peak.value[0].double()) > -_EVEN).ravel()
            lead = alike[positions[alike].square().sum(1).argmin()]
            others = torch.arange(len(positions), device=lead.device)
            order = torch.cat([lead[None], others[others != lead]])
            positions, peak = positions[order], peak.of(order)
        value = peak.value
        whole = torch.round(positions[0])
        moved = second
        if bool(whole.any()):
            moved = self.transform(_moved(second.image, int(whole[0]), int(whole[1])), second.gathering)
            cross = first.inner.conj() * moved.inner * self.active
        rest, peak = self._climb(cross, (positions[0] - whole)[None])
        scale, error = self._scatter(cross, rest, peak, (first.power + moved.power) / 2, gathering)
        # A maximum that runs away with the moved window was none; its first measurement then stays.
        if float((rest[0] + whole - positions[0]).abs().max()) < 1:
            positions[0] = rest[0] + whole
        norm = torch.sqrt((self.active * first.power).sum() * (self.active * moved.power).sum())
        missing = 2 * candidates - len(positions)
        pad = [np.nan] * missing
        found = positions.double().cpu().numpy()
        heights = (value.double() / norm.double()).cpu().numpy()
        loglik = (scale * (value.double() - value.max().double())).cpu().numpy()
        return {
            "dy": np.append(found[:, 0], pad),
            "dx": np.append(found[:, 1], pad),
            "height": np.append(heights, pad),
            "loglik": np.append(loglik, pad),
            "dy_err": np.array([error[0]]),
            "dx_err": np.array([error[1]]),
        }

    def _maxima(self, cross: torch.Tensor, candidates: int, max_shift: float) -> torch.Tensor:
        """Return local maxima (k, 2) [px], on whole pixels, of the correlation within max_shift.

        The highest, and of those at least half as high the nearest to no shift at all.
        """
        correlation = torch.fft.irfft2(cross, s=self.shape)
        reach = [max(1, min(int(max_shift * n), (n - 1) // 2 - 1)) for n in self.shape]
        index = [torch.arange(-r - 1, r + 2, device=cross.device) for r in reach]
        area = correlation[index[0] % self.shape[0]].index_select(1, index[1] % self.shape[1])
        around = torch.nn.functional.max_pool2d(area[None, None], 3, stride=1)[0, 0]
        inner = area[1:-1, 1:-1]
        peaks = torch.where(inner >= around, inner, -torch.inf).ravel()
        width = inner.shape[1]
        place = torch.nonzero(torch.isfinite(peaks)).ravel()
        if len(place) == 0:
            place = inner.argmax()[None]
        place = place[torch.argsort(peaks[place], descending=True, stable=True)]
        where = torch.stack([place // width - reach[0], place % width - reach[1]], dim=1)
        prominent = int((peaks[place] >= _PROMINENT * peaks[place[0]]).sum())
        nearest = torch.argsort(where[:prominent].square().sum(1), stable=True)[:candidates]
        chosen = torch.zeros(len(place), dtype=torch.bool, device=cross.device)
        chosen[:candidates] = True
        chosen[nearest] = True
        return where[chosen].float()

    def _evaluate(self, cross: torch.Tensor, positions: torch.Tensor) -> _Peak:
        """Evaluate the correlation exactly, as the trigonometric polynomial it is."""
        along_x = torch.polar(torch.ones_like(positions[:, 1:] * self.kx), positions[:, 1:] * self.kx)
        along_y = torch.polar(torch.ones_like(positions[:, :1] * self.ky), positions[:, :1] * self.ky)
        bases = torch.cat([along_x, along_x * self.kx, along_x * self.kx**2])
        rows = (bases @ cross.T).reshape(3, len(positions), -1)
        c0, c1, c2 = (rows * along_y).unbind(0)
        value = c0.sum(1).real
        gradient = -torch.stack([(c0 * self.ky).sum(1).imag, c1.sum(1).imag], dim=1)
        yy, yx, xx = (c0 * self.ky**2).sum(1).real, (c1 * self.ky).sum(1).real, c2.sum(1).real
        hessian = -torch.stack([torch.stack([yy, yx], 1), torch.stack([yx, xx], 1)], 1)
        return _Peak(value, gradient, hessian)

    def _climb(self, cross: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, _Peak]:
        """Newton's method from the nearest whole pixel; never further than a pixel."""
        start = positions
        peak = self._evaluate(cross, positions)
        for _ in range(_NEWTON_STEPS):
            h = peak.hessian.double()
            g = peak.gradient.double()
            determinant = h[:, 0, 0] * h[:, 1, 1] - h[:, 0, 1] ** 2
            step = (
                torch.stack(
                    [h[:, 1, 1] * g[:, 0] - h[:, 0, 1] * g[:, 1], h[:, 0, 0] * g[:, 1] - h[:, 0, 1] * g[:, 0]], dim=1
                )
                / determinant[:, None]
            )
            concave = (determinant > 0) & (h[:, 0, 0] < 0)
            step = torch.where(concave[:, None], -step, 0.0).float().clamp(-0.5, 0.5)
            positions = start + (positions + step - start).clamp(-1, 1)
            peak = self._evaluate(cross, positions)
        return positions, peak

    def _scatter(
        self, cross: torch.Tensor, position: torch.Tensor, peak: _Peak, power: torch.Tensor, gathering: Double
    ) -> tuple[float, tuple[float, float]]:
        """Return the factor from correlation to log-likelihood, and the standard errors (y, x) of a maximum [px].

        At the maximum the phases scatter about zero; H⁻¹ V H⁻¹ with V from that scatter is the covariance whatever
        the source (shot noise, correlated noise, a changing specimen); H/V makes a log-likelihood of the correlation
        (White, Econometrica 50, 1982). A lattice has too few phases to tell; the detector's noise, which makes
        (P N − N²/2) of variance per frequency in frames of power P, is therefore the least that is believed.
        """
        turn = torch.outer(
            torch.polar(torch.ones_like(self.ky), self.ky * position[0, 0]),
            torch.polar(torch.ones_like(self.kx), self.kx * position[0, 1]),
        )
        turned = cross * turn
        real, square = turned.real.double(), turned.imag.double().square()
        ky, kx = self.ky.double(), self.kx.double()
        shot = (power * self.noise - self.noise**2 / 2).clamp(min=0) * self.active.double() ** 2
        v, least = self._moments(square), self._moments(shot)
        h = -peak.hessian[0].double().cpu().numpy()
        if not (h[0, 0] > 0 and np.linalg.det(h) > 0):
            return 0.0, (float("nan"), float("nan"))
        # Each axis has used up one of the independent phases; of a lattice there are few.
        used = []
        for information in (real * ky[:, None] ** 2, real * kx**2):
            independent = float(information.sum() ** 2 / (information**2).sum()) / self.redundancy
            used.append(1 / (1 - 1 / max(independent, 1.5)))
        raised = np.sqrt(np.maximum(np.array(used), np.diag(least) / np.maximum(np.diag(v), 1e-300)))
        raised *= np.sqrt(gathering)
        v *= np.outer(raised, raised)
        inverse = np.linalg.inv(h)
        covariance = inverse @ v @ inverse
        scale = float(np.trace(h) / max(np.trace(v), 1e-300))
        return scale, (float(np.sqrt(covariance[0, 0])), float(np.sqrt(covariance[1, 1])))

    def _moments(self, variance: torch.Tensor) -> Double:
        """Return the covariance (2, 2) of the gradient, for the variance of each term of the correlation."""
        ky, kx = self.ky.double(), self.kx.double()
        mixed = float((variance @ kx * ky).sum())
        yy, xx = float((variance.sum(1) * ky**2).sum()), float((variance.sum(0) * kx**2).sum())
        return np.array([[yy, mixed], [mixed, xx]])


def _moved(frame: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """Return frame(y + dy, x + dx), the mean where that lies outside."""
    result = torch.full_like(frame, float(frame.double().mean()))
    height, width = frame.shape
    result[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)] = frame[
        max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)
    ]
    return result
