"""Drift: how far the specimen has moved since frame 0, from the shifts between pairs of frames.

The plan. Each frame is windowed and transformed once. The cross-power of two frames is weighted per frequency by what
an optimal delay estimator would use, S/(N(N + 2S)) for signal power S and noise power N (Hannan & Thomson, IEEE
Trans. ASSP 21, 1973; the periodic case: Savitzky et al., Ultramicroscopy 191, 2018), where S and N come from a sample
of the whole movie, so that strong lattice peaks, amorphous support and edges all count for what they tell. The best
few maxima of the correlation are kept, because in a lattice the highest can be wrong by a lattice vector;
`solve_path` picks among them with the whole movie in view. The best maximum is measured again with the window moved
along with the specimen: a window that stands still pulls towards zero.

Sign: if the specimen moved by +d between frames i and j, the shift of the pair (i, j) is +d; −drift is what aligns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.steps.drift_solve import DriftPath, solve_path

__all__ = ["DriftPath", "common_field", "pair_list", "pair_shifts", "solve_path", "spectral_weight", "whole_pixels"]

Float = NDArray[np.float32]
Double = NDArray[np.float64]
Integer = NDArray[np.int64]
Bool = NDArray[np.bool_]

_TAU = 2 * np.pi
_NEWTON_STEPS = 3
# What covers more of the field than the rest of this is never limited.
_COMMON = 0.9
# Electrons have Poisson noise, of which the detector's transfer leaves at least so much in power.
_LEAST_NOISE = 0.05


def pair_list(n_frames: int, *, start: int, stop: int, lags: Sequence[int]) -> Integer:
    """List the pairs (t, t + lag) owned by frames start ≤ t < stop: (pairs, 2), ordered by t, then by lag.

    The lists of blocks that tile the movie tile the list of the movie.
    """
    pairs = [(t, t + lag) for t in range(start, min(stop, n_frames)) for lag in sorted(set(lags)) if t + lag < n_frames]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def spectral_weight(
    sample: Float, *, band: tuple[float, float], taper: float, change: float, limit: float, device: str = "cpu"
) -> Float:
    """Learn from a sample of the movie how to weigh its spatial frequencies.

    sample: (time, y, x) frames spread over the movie [electrons], finite.
    band: (low, high) [cycles/px]: half-points of the smooth limits; low keeps uneven illumination out.
    taper: part of the field on each side over which the window falls to zero.
    change: part of the signal that differs between frames for other reasons than drift; it counts as noise, which turns
    the weights from a matched filter (0) towards phase correlation.
    limit: see `pair_shifts`.
    Returns (2, y, x // 2 + 1) float32 in rfft2 layout: the weights of the cross-power, normalised so that a frame
    correlates with itself to about 1, and the Wiener filter S/(S + N) that shows what of a frame is not noise.
    """
    if len(sample) == 0:
        raise ValueError("spectral_weight got no frames; it needs at least one good frame of the movie")
    shape = (sample.shape[1], sample.shape[2])
    window = _window(shape, taper, device)
    ky, kx = _frequencies(shape, device)
    radius = torch.sqrt(ky[:, None] ** 2 + kx[None, :] ** 2)
    limits = torch.exp(-np.log(2) * (radius / band[1]) ** 8) * (1 - torch.exp(-np.log(2) * (radius / band[0]) ** 2))
    frames = [_tensor(frame, device) for frame in sample]
    power = _mean_power(frames, window)
    noise = _noise_power(power, radius, max(float(np.mean(sample)), 0.0) * float((window**2).sum()))
    signal = (power - noise * (1 + len(sample) ** -0.5)).clamp(min=0)
    wiener = (limits * signal / (signal + noise)).to(torch.float32)
    power = _mean_power([_limited(frame, wiener, limit) for frame in frames], window)
    signal = (power - noise * (1 + len(sample) ** -0.5)).clamp(min=0)
    noise = noise + change * signal
    weight = signal / (noise * (noise + 2 * signal)) * limits
    if not float(weight.max()) > 0:
        weight = limits / noise
    weight = torch.where(weight > 1e-5 * weight.max(), weight, 0.0)
    weight = weight / (_multiplicity(shape, device) * weight * power).sum()
    return np.asarray(torch.stack([weight.to(torch.float32), wiener]).cpu().numpy())


def _mean_power(frames: list[torch.Tensor], window: torch.Tensor) -> torch.Tensor:
    power = torch.zeros(window.shape[0], window.shape[1] // 2 + 1, dtype=torch.float64, device=window.device)
    for frame in frames:
        power += _spectrum(frame, window).abs().double() ** 2
    return _smooth(power / len(frames))


def _limited(frame: torch.Tensor, wiener: torch.Tensor, limit: float) -> torch.Tensor:
    """Return the frame less what of its filtered image is out of bounds (see `pair_shifts`); its noise stays."""
    image = torch.fft.irfft2(torch.fft.rfft2(frame - frame.mean()) * wiener, s=frame.shape)
    few = image[::4, ::4].abs().ravel()
    bound = limit * float(torch.kthvalue(few, max(1, int(_COMMON * len(few)))).values)
    excess: torch.Tensor = image - image.clamp(-bound, bound)
    return frame - excess


def _noise_power(power: torch.Tensor, radius: torch.Tensor, poisson: float) -> torch.Tensor:
    """Return the noise power at each frequency: the median of its ring, but neither above Poisson nor below the floor.

    Lattice peaks do not move the median; of what fills a ring (amorphous film) all that exceeds Poisson is signal.
    """
    ring = (radius * 2 * max(power.shape)).round().long().clamp(max=max(power.shape)).ravel()
    order = torch.argsort(ring, stable=True)
    counts = torch.bincount(ring)
    groups = torch.split(power.ravel()[order], counts.tolist())
    median: torch.Tensor = torch.stack([group.median() if len(group) else power.median() for group in groups])
    floor = float(median[-max(1, len(median) // 8) :].mean())
    floor = max(floor, _LEAST_NOISE * poisson, 1e-12 * float(power.max()), 1e-30)
    return median.clamp(min=floor, max=max(poisson, floor))[ring].reshape(power.shape)


def _smooth(power: torch.Tensor) -> torch.Tensor:
    """Binomial 3 × 3 mean in rfft2 layout: periodic in y; column −1 is column 1 with y reversed."""
    flipped = torch.roll(torch.flip(power, [0]), 1, 0)
    wide = torch.cat([flipped[:, 1:2], power, flipped[:, -2:-1] if power.shape[1] > 1 else power], dim=1)
    wide = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
    return (torch.roll(wide, 1, 0) + 2 * wide + torch.roll(wide, -1, 0)) / 4


def pair_shifts(
    frames: Float,
    pairs: Integer,
    *,
    good: Bool,
    weight: Float,
    candidates: int,
    max_shift: float,
    taper: float,
    limit: float,
    device: str = "cpu",
) -> dict[str, Double]:
    """Measure the shift of each pair of frames.

    frames: (n, y, x) [electrons]; pairs: (m, 2) indices into frames; good: (n,), frames that may be used.
    weight: from `spectral_weight`, of the movie. candidates: how many maxima to keep per pair.
    max_shift: largest shift looked for, as a part of the field. taper: as in `spectral_weight`.
    limit: bound on what stands out of a frame, in units of the amplitude that 90 % of its filtered image stays below,
    so that a small bright object that changes (an impurity, a cluster) does not drown the lattice or the support.
    Returns float64 arrays: dy, dx (m, candidates) [px], best first by height; height (m, candidates), the weighted
    coherence (1 for equal frames, about 0 for unrelated ones); loglik (m, candidates), log-likelihood relative to the
    best, calibrated by the scatter of the phases; dy_err, dx_err (m,) [px], standard errors of the best. Missing
    values (pairs with a bad frame, fewer maxima than asked for) are NaN. Each pair depends on its two frames and on
    the weight alone.
    """
    shapes = dict.fromkeys(("dy", "dx", "height", "loglik"), (len(pairs), candidates))
    shapes |= dict.fromkeys(("dy_err", "dx_err"), (len(pairs), 1))
    result: dict[str, Double] = {name: np.full(size, np.nan) for name, size in shapes.items()}
    correlator = _Correlator((frames.shape[1], frames.shape[2]), weight[0], taper, device)
    wiener = _tensor(weight[1], device)
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for row, (i, j) in enumerate(pairs):
        if not (good[i] and good[j]):
            continue
        for index in [k for k in known if k < i]:
            del known[index]
        for index in (int(i), int(j)):
            if index not in known:
                frame = _limited(_tensor(frames[index], device), wiener, limit)
                known[index] = frame, _spectrum(frame, correlator.window)
        first, second = known[int(i)], known[int(j)]
        measured = correlator.measure(first[1], second[1], second[0], candidates=candidates, max_shift=max_shift)
        for name, value in measured.items():
            result[name][row] = value
    return {name: value[:, 0] if name.endswith("_err") else value for name, value in result.items()}


class _Peak(NamedTuple):
    """Correlation c, gradient and curvature at positions (k, 2) [px]."""

    value: torch.Tensor
    gradient: torch.Tensor
    hessian: torch.Tensor


class _Correlator:
    """What the pairs of one movie share."""

    def __init__(self, shape: tuple[int, int], weight: Float, taper: float, device: str) -> None:
        self.shape = shape
        self.window = _window(shape, taper, device)
        self.weight = _tensor(weight, device)
        # The window correlates neighbouring frequencies, so fewer are independent than there are.
        square = self.window.double() ** 2
        self.redundancy = float(square.numel() * (square**2).sum() / square.sum() ** 2)
        ky, kx = _frequencies(shape, device)
        self.rows = torch.nonzero(self.weight.amax(dim=1) > 0).ravel()
        self.columns = torch.nonzero(self.weight.amax(dim=0) > 0).ravel()
        self.ky, self.kx = _TAU * ky[self.rows].float(), _TAU * kx[self.columns].float()
        full = self.weight * _multiplicity(shape, device).float()
        self.active = full[self.rows][:, self.columns].contiguous()

    def measure(
        self, first: torch.Tensor, second: torch.Tensor, frame: torch.Tensor, *, candidates: int, max_shift: float
    ) -> dict[str, Double]:
        """Return the row of `pair_shifts` for spectra `first`, `second`; `frame` is the second one in real space."""
        positions = self._maxima(first.conj() * second * self.weight, candidates, max_shift)
        cross = self._crop(first, second)
        positions, peak = self._climb(cross, positions)
        order = torch.argsort(peak.value, descending=True, stable=True)
        positions, value = positions[order], peak.value[order]
        whole = torch.round(positions[0])
        moved = second
        if bool(whole.any()):
            moved = _spectrum(_moved(frame, int(whole[0]), int(whole[1])), self.window)
            cross = self._crop(first, moved)
        rest, peak = self._climb(cross, (positions[0] - whole)[None])
        scale, error = self._scatter(cross, rest, peak)
        # A maximum that runs away with the moved window was none; its first measurement then stays.
        if float((rest[0] + whole - positions[0]).abs().max()) < 1:
            positions[0] = rest[0] + whole
        norm = torch.sqrt(
            (self.active * self._crop(first, first, weighted=False).real).sum()
            * (self.active * self._crop(moved, moved, weighted=False).real).sum()
        )
        missing = candidates - len(positions)
        pad = [np.nan] * missing
        found = positions.double().cpu().numpy()
        heights = (value.double() / norm.double()).cpu().numpy()
        loglik = (scale * (value.double() - value[0].double())).cpu().numpy()
        return {
            "dy": np.append(found[:, 0], pad),
            "dx": np.append(found[:, 1], pad),
            "height": np.append(heights, pad),
            "loglik": np.append(loglik, pad),
            "dy_err": np.array([error[0]]),
            "dx_err": np.array([error[1]]),
        }

    def _crop(self, first: torch.Tensor, second: torch.Tensor, *, weighted: bool = True) -> torch.Tensor:
        cross = first[self.rows][:, self.columns].conj() * second[self.rows][:, self.columns]
        return cross * self.active if weighted else cross

    def _maxima(self, cross: torch.Tensor, candidates: int, max_shift: float) -> torch.Tensor:
        """Return the highest local maxima (k, 2) [px], on whole pixels, of the correlation within max_shift."""
        correlation = torch.fft.irfft2(cross, s=self.shape)
        reach = [max(1, min(int(max_shift * n), (n - 1) // 2 - 1)) for n in self.shape]
        index = [torch.arange(-r - 1, r + 2, device=cross.device) for r in reach]
        area = correlation[index[0] % self.shape[0]][:, index[1] % self.shape[1]]
        around = torch.nn.functional.max_pool2d(area[None, None], 3, stride=1)[0, 0]
        inner = area[1:-1, 1:-1]
        peaks = torch.where(inner >= around, inner, -torch.inf).ravel()
        height, place = torch.topk(peaks, min(candidates, peaks.numel()))
        place = place[torch.isfinite(height)]
        width = inner.shape[1]
        if len(place) == 0:
            place = inner.argmax()[None]
        return torch.stack([place // width - reach[0], place % width - reach[1]], dim=1).float()

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

    def _scatter(self, cross: torch.Tensor, position: torch.Tensor, peak: _Peak) -> tuple[float, tuple[float, float]]:
        """Return the factor from correlation to log-likelihood, and the standard errors (y, x) of a maximum [px].

        At the maximum the phases scatter about zero; H⁻¹ V H⁻¹ with V from that scatter is the covariance whatever
        the source (shot noise, correlated noise, a changing specimen); H/V makes a log-likelihood of the correlation
        (White, Econometrica 50, 1982).
        """
        turn = torch.outer(
            torch.polar(torch.ones_like(self.ky), self.ky * position[0, 0]),
            torch.polar(torch.ones_like(self.kx), self.kx * position[0, 1]),
        )
        turned = (cross * turn).to(torch.complex128)
        square = turned.imag**2
        ky, kx = self.ky.double(), self.kx.double()
        mixed = float((square @ kx * ky).sum())
        v = np.array([[float((square.sum(1) * ky**2).sum()), mixed], [mixed, float((square.sum(0) * kx**2).sum())]])
        h = -peak.hessian[0].double().cpu().numpy()
        if not (h[0, 0] > 0 and np.linalg.det(h) > 0):
            return 0.0, (float("nan"), float("nan"))
        # Each axis has used up one of the independent phases; of a lattice there are few.
        used = []
        for information in (turned.real * ky[:, None] ** 2, turned.real * kx**2):
            independent = float(information.sum() ** 2 / (information**2).sum()) / self.redundancy
            used.append(1 / (1 - 1 / max(independent, 1.5)))
        v *= self.redundancy * np.sqrt(np.outer(used, used))
        inverse = np.linalg.inv(h)
        covariance = inverse @ v @ inverse
        scale = float(np.trace(h) / max(np.trace(v), 1e-300))
        return scale, (float(np.sqrt(covariance[0, 0])), float(np.sqrt(covariance[1, 1])))


def _tensor(array: Float, device: str) -> torch.Tensor:
    # A copy of its own: transforms may differ in the last bit with the alignment of a view.
    return torch.tensor(np.asarray(array, dtype=np.float32), device=device)


def _window(shape: tuple[int, int], taper: float, device: str) -> torch.Tensor:
    """Flat window whose edges fall to zero as cos²."""
    sides = []
    for n in shape:
        place = torch.arange(n, dtype=torch.float64) + 0.5
        distance = torch.minimum(place, n - place)
        sides.append(torch.sin(0.5 * np.pi * (distance / max(taper * n, 1.0)).clamp(max=1)) ** 2)
    window: torch.Tensor = torch.outer(sides[0], sides[1]).to(device=device, dtype=torch.float32)
    return window


def _spectrum(frame: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    mean = (frame.double() * window).sum() / window.double().sum()
    spectrum: torch.Tensor = torch.fft.rfft2((frame - mean.float()) * window)
    return spectrum


def _moved(frame: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """Return frame(y + dy, x + dx), the mean where that lies outside."""
    result = torch.full_like(frame, float(frame.double().mean()))
    height, width = frame.shape
    result[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)] = frame[
        max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)
    ]
    return result


def _frequencies(shape: tuple[int, int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    ky = torch.fft.fftfreq(shape[0], dtype=torch.float64, device=device)
    return ky, torch.fft.rfftfreq(shape[1], dtype=torch.float64, device=device)


def _multiplicity(shape: tuple[int, int], device: str) -> torch.Tensor:
    """How often each entry of an rfft2 counts in the full plane: (1, x // 2 + 1)."""
    counts = torch.full((1, shape[1] // 2 + 1), 2.0, dtype=torch.float64, device=device)
    counts[0, 0] = 1
    if shape[1] % 2 == 0:
        counts[0, -1] = 1
    return counts


def whole_pixels(drift: Double) -> Integer:
    """Round a drift (…, 2) [px] to whole pixels; halves go up, so that 0.5 → 1 and −0.5 → 0 everywhere."""
    return np.asarray(np.floor(np.asarray(drift, dtype=np.float64) + 0.5), dtype=np.int64)


def common_field(drift: Double, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Return the part (y, x) of frame 0's axes that is inside the field of view in every frame.

    drift: (n, 2) [px], specimen motion. A point p of frame 0 is seen in frame t at p + drift[t].
    Slices are empty where no point is seen throughout.
    """
    fields = []
    for axis, n in enumerate(shape):
        low, high = np.nanmin(drift[:, axis]), np.nanmax(drift[:, axis])
        first = max(0, int(np.ceil(-low)))
        last = min(n - 1, int(np.floor(n - 1 - high)))
        fields.append(slice(first, max(first, last + 1)))
    return fields[0], fields[1]
