"""The noise model: how the variance of a corrected pixel depends on its mean, and the way to electrons.

Corrected readings c have mean m and variance  g·(m − offset) + r·g²,  g = counts per electron, r = readout variance
[electrons²]; electrons = (c − offset) / g have variance  electrons + r. Where the variance does not depend on the
mean (frames rescaled or filtered by someone else), g and offset are chosen such that the mean of a frame equals its
variance, and the model says that the noise is constant. Photon-transfer method: Janesick, "Photon Transfer" (SPIE
2007).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Float = NDArray[np.float32]
Double = NDArray[np.float64]

_BOXES = (5, 9, 17)
_BINS = 32

_TILE = 32  # px, of the squares whose spectra are averaged
_COARSEST = 0.25  # cycles/px, below which a moving specimen may outdo the noise
_SQUARES = 16  # fewer tell nothing
_LAGS = 3  # px, farthest correlation that is looked at


class NoiseModel(NamedTuple):
    """Noise of a corrected movie.

    offset: reading at zero electrons [counts]; counts_per_electron [counts]; readout_variance [electrons²].
    calibrated: electrons are true electrons, so that a dose may be computed from them.
    signal_dependent: False where the variance is constant; it then equals readout_variance.
    """

    offset: float
    counts_per_electron: float
    readout_variance: float
    calibrated: bool
    signal_dependent: bool


def to_electrons(corrected: NDArray[np.generic], noise: NoiseModel) -> Float:
    """Return (corrected − offset) / counts_per_electron as float32; any shape."""
    frames = np.asarray(corrected, dtype=np.float32)
    return (frames - np.float32(noise.offset)) / np.float32(noise.counts_per_electron)


def noise_variance(electrons: Float, noise: NoiseModel) -> Float:
    """Return the variance expected of readings whose mean is `electrons` [electrons²]; any shape."""
    readout = np.float32(noise.readout_variance)
    if not noise.signal_dependent:
        return np.full_like(electrons, readout)
    return np.maximum(electrons, np.float32(0)) + readout


def fit_noise(sample: Float, *, counts_per_electron: float | None) -> NoiseModel:
    """Fit the noise model to frames spread over the movie.

    sample: (time, y, x) corrected frames; frames with non-finite values are left out.
    counts_per_electron: of the detector [counts], None if unknown. Given, it is believed, and only the readout noise
    is fitted. Non-negative integers whose variance agrees with their mean are electrons. Otherwise the local
    variance, from differences of consecutive frames of the sample (from one frame: of its Laplacian) after a
    high-pass that removes what moves, is fitted as a line in the local mean by robust regression, corrected for the
    noise of the local mean; a line through the origin is preferred where it fits, and a line that does not rise
    significantly becomes a constant variance.
    Raises ValueError if no frame is usable.
    """
    frames = [frame for frame in sample if np.isfinite(frame).all()]
    if not frames:
        raise ValueError(
            f"none of the {len(sample)} sampled frames is finite, so no noise model can be fitted; drop them"
        )
    mean, variance, spread = _binned(frames)
    level, scatter = float(np.mean(mean)), float(np.mean(variance))
    if counts_per_electron is not None:
        if not counts_per_electron > 0:
            raise ValueError(f"counts_per_electron is {counts_per_electron}; it must be positive")
        return _given(mean, variance, counts_per_electron)
    if _is_counting(frames, level, scatter):
        return NoiseModel(0.0, 1.0, 0.0, calibrated=True, signal_dependent=True)
    line = _line(mean, variance, spread)
    if line is None or line.slope <= 3 * line.slope_error or line.slope * float(np.ptp(mean)) < 0.05 * scatter:
        return _constant(frames, level, scatter)
    slope, intercept = line.slope, line.intercept
    if level > 0 and abs(intercept) < 2 * line.slope_error * level:
        slope, intercept = scatter / level, 0.0
    offset, readout = (-intercept / slope, 0.0) if intercept < 0 else (0.0, intercept / slope**2)
    return NoiseModel(float(offset), float(slope), float(readout), calibrated=False, signal_dependent=True)


class Correlation(NamedTuple):
    """How alike the noise of pixels nearby is.

    largest: correlation of a pixel with one at most 3 px away, of all directions together, the largest in size.
    shrunk: by how much that makes the variance of a pixel smaller than the noise of the electrons is (1 if white).
    Both NaN where they are not known.
    """

    largest: float
    shrunk: float


def noise_correlation(pairs: Iterable[tuple[Float, Float]]) -> Correlation:
    """Measure the correlation of the noise on pairs of frames.

    pairs: frames (y, x) of one scene, or parts of them, whose noise is independent, such as consecutive ones once the
    drift is taken out. The spectrum of their differences is averaged over squares of 32 px, of which 16 are needed, and
    its median taken over rings, in which the few peaks of a crystal that moved do not count; coarse frequencies, where
    a film that moved would look like correlated noise, are taken to be as strong as those of 0.25 cycles per pixel, but
    for ``shrunk``, which continues the fall as a Gaussian's. A camera whose scintillator spreads light leaves little at
    high frequencies; of white noise all are alike.
    """
    line = np.hanning(_TILE + 1)[:-1]
    window = np.outer(line, line)
    power, count = np.zeros((_TILE, _TILE)), 0
    for one, other in pairs:
        difference = one.astype(np.float64) - other
        for top, left in itertools.product(*(range(0, size - _TILE + 1, _TILE) for size in difference.shape)):
            square = difference[top : top + _TILE, left : left + _TILE]
            if np.isfinite(square).all():
                power += np.abs(np.fft.fft2((square - square.mean()) * window)) ** 2
                count += 1
    if count < _SQUARES or not power.any():
        return Correlation(float("nan"), float("nan"))
    k = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.fftfreq(_TILE)) * _TILE
    rings = np.arange(round(_COARSEST * _TILE), int(k.max()) + 1)
    levels = np.array([np.median(power[np.abs(k - ring) <= 0.5]) for ring in rings])
    lags = np.fft.ifft2(np.interp(k, rings, levels)).real[: _LAGS + 1, : _LAGS + 1]
    others = lags.ravel()[1:] / lags[0, 0]
    fall = max(0.0, float(np.log(levels[0] / levels[4]) / (rings[4] ** 2 - rings[0] ** 2)))
    # In place of what lies below 0.25 cycles per pixel: a Gaussian through the first rings.
    whole = np.where(k < rings[0], levels[0] * np.exp(fall * (rings[0] ** 2 - k**2)), np.interp(k, rings, levels))
    return Correlation(float(others[np.argmax(np.abs(others))]), float(whole[0, 0] / whole.mean()))


def _given(mean: Double, variance: Double, gain: float) -> NoiseModel:
    # What the darkest parts scatter beyond Poisson; correlated noise (a scintillator's) scatters less and leaves
    # nothing.
    excess = float(
        np.median(variance[: max(1, len(variance) // 4)] - gain * np.maximum(mean[: max(1, len(mean) // 4)], 0))
    )
    readout = max(0.0, excess) / gain**2
    dark = max(float(mean[0]) / gain, 0.0)
    # Within the error of the fit a counting detector has no readout noise.
    return NoiseModel(
        0.0, float(gain), readout if readout > 0.05 * dark else 0.0, calibrated=True, signal_dependent=True
    )


def _constant(frames: list[Float], level: float, scatter: float) -> NoiseModel:
    """Constant variance: electrons start at the darkest reading, and at average brightness variance = mean."""
    offset = float(np.min([np.percentile(frame, 0.1) for frame in frames]))
    above = level - offset
    gain = scatter / above if scatter > 0 and above > 1e-9 * abs(level) else 1.0
    return NoiseModel(offset, float(gain), float(scatter / gain**2), calibrated=False, signal_dependent=False)


def _is_counting(frames: list[Float], level: float, scatter: float) -> bool:
    whole = all(bool((frame >= 0).all() and (frame == np.rint(frame)).all()) for frame in frames)
    return whole and level > 0 and 0.8 * level < scatter < 1.25 * level


def _binned(frames: list[Float]) -> tuple[Double, Double, float]:
    """Return local mean and variance in bins of equal population, by rising mean, and the true part of the spread.

    The means' own noise widens their distribution and would flatten a line; the smallest box is taken in which at
    least 70 % of the spread is real. Both are averaged over the same box, so that a line in the pixels stays the same
    line.
    """
    averaged = 2 if len(frames) > 1 else 1
    for box in _BOXES:
        mean, square = _smoothed(frames, box)
        spread = 1 - float(square.mean()) / (averaged * box**2) / max(float(mean.var()), 1e-300)
        if spread >= 0.7:
            break
    groups = [group for group in np.array_split(np.argsort(mean, kind="stable"), _BINS) if len(group)]
    return np.array([mean[g].mean() for g in groups]), np.array([square[g].mean() for g in groups]), spread


def _smoothed(frames: list[Float], box: int) -> tuple[Double, Double]:
    """Return the mean and the squared noise of a pixel, averaged over boxes, at up to some two million places."""
    pairs = list(pairwise(frames)) if len(frames) > 1 else [(frames[0], None)]
    step = max(1, int(np.sqrt(len(pairs) * frames[0].size / 2e6)))
    means: list[Double] = []
    squares: list[Double] = []
    for first, second in pairs:
        for image, kept in zip(_moments(first, second), (means, squares), strict=True):
            kept.append(ndimage.uniform_filter(image, box, mode="mirror")[::step, ::step].ravel())
    return np.concatenate(means), np.concatenate(squares)


def _moments(first: Float, second: Float | None) -> tuple[Double, Double]:
    """Return images of the mean of two frames and of the squared noise of a pixel."""
    one = np.asarray(first, dtype=np.float64)
    if second is None:
        mask = np.outer([1.0, -2.0, 1.0], [1.0, -2.0, 1.0]) / 6
        return one, _clipped(ndimage.convolve(one, mask, mode="mirror") ** 2)
    other = np.asarray(second, dtype=np.float64)
    difference = (one - other) / np.sqrt(2)
    # The narrowest box: what has moved between the two frames passes least (period 12 px: 1 % of the power).
    residual = difference - ndimage.uniform_filter(difference, 3, mode="mirror")
    return (one + other) / 2, _clipped(residual**2 / (1 - 1 / 9))


def _clipped(square: Double) -> Double:
    """Limit X-rays and defects; a Poisson count is beyond 20 standard deviations only where it hardly weighs."""
    return np.asarray(np.minimum(square, 400 * square.mean()))


class _Line(NamedTuple):
    slope: float
    intercept: float
    slope_error: float


def _line(mean: Double, variance: Double, spread: float) -> _Line | None:
    """Fit variance = intercept + slope·mean robustly; None where the means hardly differ."""
    if spread < 0.3 or variance.min() <= 0:
        return None
    weight = 1 / variance**2
    for _ in range(20):
        centre = np.average(mean, weights=weight)
        moment = float(np.sum(weight * (mean - centre) ** 2))
        slope = float(np.sum(weight * (mean - centre) * variance) / moment)
        residual = (variance - np.average(variance, weights=weight) - slope * (mean - centre)) / variance
        scale = max(1.4826 * float(np.median(np.abs(residual))), 1e-12)
        weight = np.minimum(1, 2 * scale / np.maximum(np.abs(residual), 1e-300)) / variance**2
    slope /= spread
    intercept = float(np.average(variance - slope * mean, weights=weight))
    return _Line(slope, intercept, scale / spread / np.sqrt(moment))
