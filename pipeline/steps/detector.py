"""The detector: bad pixels, gain correction, what can be told from a frame's numbers alone, and which frames to drop.

`corrected = (raw − dark) × gain`, then bad pixels repaired. The noise model that turns corrected frames into
electrons is in `pipeline.steps.noise` and re-exported here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.steps.noise import NoiseModel, fit_noise, noise_variance, to_electrons

__all__ = [
    "NoiseModel",
    "correct",
    "find_bad_pixels",
    "fit_noise",
    "frame_flags",
    "frame_statistics",
    "noise_variance",
    "to_electrons",
]

Float = NDArray[np.float32]
Double = NDArray[np.float64]
Bool = NDArray[np.bool_]

_RING1 = np.ones((3, 3), bool)
_RING1[1, 1] = False
_EDGES = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]]) / 4.0
_RING2 = np.ones((5, 5), bool)
_RING2[1:4, 1:4] = False
# An atom imaged with a Gaussian spread of 0.3 px (standard deviation), centred on a pixel, gives its four edge
# neighbours 5.3 % of the centre (and more when it is not centred); a defective pixel gives them nothing.
_ATOM_EDGE_FRACTION = 0.03


def find_bad_pixels(sample: NDArray[np.generic], *, threshold: float) -> Bool:
    """Find hot, cold, blinking and dead pixels from frames spread over the movie, without flagging atoms.

    sample: (time, y, x) raw frames; frames with non-finite values are left out.
    threshold: how many standard errors a pixel's temporal mean (or variance) must stand off its surroundings.
    Returns (y, x), True where the pixel is bad. A pixel is hot (cold) if its excess (deficit) is significant and its
    four edge neighbours carry significantly less of it than they would of the narrowest atom; blinking if the same
    holds of its variance over time, the largest deviation left out (one X-ray is no defect); dead if it never changes
    although its neighbours do. Adjacent bad pixels are recognised only when dead.
    """
    if sample.ndim != 3:
        raise ValueError(f"the sample of frames has shape {sample.shape}; expected (time, y, x)")
    frames = [frame for frame in sample if np.isfinite(frame).all()]
    if not frames:
        return np.zeros(sample.shape[1:], bool)
    seen = _look(frames)
    n = len(frames)
    if n < 4:
        error = np.full_like(seen.mean, _spatial_scatter(seen.mean))
        return _isolated(seen.mean, error, threshold, 0.0) | _isolated(-seen.mean, error, threshold, 0.0)
    # The neighbours' variance is the yardstick: a defective pixel's own says nothing about a sound pixel in its place.
    variance = seen.squares / (n - 1)
    around = ndimage.median_filter(variance, footprint=_RING1, mode="mirror")
    around = np.maximum(around, 0.5 * ndimage.uniform_filter(variance, 7, mode="mirror"))
    error = np.sqrt(around / n)
    hot = _isolated(seen.mean, error, threshold, seen.quantum / n)
    cold = _isolated(-seen.mean, error, threshold, seen.quantum / n)
    trimmed = (seen.squares - seen.largest) / (n - 2)
    return hot | cold | _blinking(trimmed, n, threshold, seen.quantum) | _dead(seen.equal, n)


class _Seen(NamedTuple):
    """Per pixel (y, x): mean, sum of squared deviations and the largest of them, how often two readings in a row agree.

    quantum: the reading of one electron where readings are sparse multiples of it, else the size of the noise.
    """

    mean: Double
    squares: Double
    largest: Double
    equal: Double
    quantum: float


def _look(frames: list[NDArray[np.generic]]) -> _Seen:
    """Go through the frames one by one, so that memory does not grow with their number."""
    mean = sum((frame.astype(np.float64) for frame in frames), start=np.zeros(frames[0].shape)) / len(frames)
    squares, largest, equal = np.zeros_like(mean), np.zeros_like(mean), np.zeros_like(mean)
    total, count = 0.0, 0
    for index, frame in enumerate(frames):
        deviation = (frame.astype(np.float64) - mean) ** 2
        squares += deviation
        np.maximum(largest, deviation, out=largest)
        if index:
            step = np.abs(frame.astype(np.float64) - frames[index - 1].astype(np.float64))
            equal += step == 0
            total, count = total + float(step.sum()), count + int(np.count_nonzero(step))
    return _Seen(mean, squares, largest, equal, total / max(count, 1))


def _spatial_scatter(image: Double) -> float:
    residual = np.abs(image - ndimage.median_filter(image, footprint=_RING1, mode="mirror"))
    return float(max(1.4826 * np.median(residual), residual.mean()))


def _isolated(image: Double, error: Double, threshold: float, quantum: float) -> Bool:
    """Return where one pixel rises above its surroundings alone.

    image, error: (y, x), same unit. quantum: what one event adds; few of them have longer tails than a Gaussian
    (Bernstein's inequality: exp(−z²/2) is passed at z·error + z²·quantum/3).
    """
    background = ndimage.median_filter(image, footprint=_RING2, mode="mirror")
    # Where events are sparse the median is zero.
    background = np.maximum(background, ndimage.correlate(image, _RING2 / 16.0, mode="mirror") - error)
    height = image - background
    edges = ndimage.correlate(image, _EDGES, mode="mirror") - background
    # `error` is two standard errors of the mean of four neighbours. A deficit at the edges belongs to a dead neighbour.
    alone = (edges + error < _ATOM_EDGE_FRACTION * height) & (edges > -0.1 * height)
    return np.asarray((height > threshold * error + threshold**2 / 3 * quantum) & alone, dtype=bool)


def _blinking(variance: Double, n: int, threshold: float, quantum: float) -> Bool:
    around = ndimage.median_filter(variance, footprint=_RING2, mode="mirror")
    around = np.maximum(around, 0.5 * ndimage.uniform_filter(variance, 7, mode="mirror"))
    # Standard error of the variance of Poisson counts λ of q each, q²·√((λ + 2λ²)/n).
    error = np.sqrt((quantum**2 * around + 2 * around**2) / n)
    return _isolated(variance, error, threshold, quantum**2 / n)


def _dead(equal: Double, n: int) -> Bool:
    """Return pixels that never change, where chance cannot explain it.

    With s the probability that two readings of a sound neighbour are equal, n equal readings in a row have a
    probability below s^((n-1)/2), whatever the distribution.
    """
    pairs = n - 1
    around = ndimage.convolve(equal, _RING1.astype(np.float64), mode="mirror")
    same = (around + 1.0) / (8.0 * pairs + 1.0)
    chance = 0.5 * pairs * np.log(same)
    return np.asarray((equal == pairs) & (chance < np.log(0.01 / equal.size)), dtype=bool)


def correct(counts: NDArray[np.generic], *, dark: Float | None, gain: Float | None, bad: Bool) -> Float:
    """Return (counts − dark) × gain with bad pixels replaced by the mean of their sound neighbours.

    counts: (time, y, x) raw; dark: (y, x) counts, gain: (y, x) factor, either may be None; bad: (y, x).
    Returns (time, y, x) float32. Bad regions wider than one pixel are filled from their rim inwards.
    """
    shape = counts.shape[1:]
    for name, array in (("dark", dark), ("gain", gain), ("bad", bad)):
        if array is not None and array.shape != shape:
            raise ValueError(f"the {name} map has shape {array.shape}, the frames {shape}; they must agree")
    corrected = np.array(counts, dtype=np.float32)
    if dark is not None:
        corrected -= dark.astype(np.float32)
    if gain is not None:
        corrected *= gain.astype(np.float32)
    _repair(corrected, bad)
    return corrected


def _repair(frames: Float, bad: Bool) -> None:
    """Fill bad pixels in place."""
    bad = bad.copy()
    height, width = bad.shape
    while bad.any() and not bad.all():
        y, x = np.nonzero(bad)
        near = [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
        inside = [(a >= 0) & (a < height) & (b >= 0) & (b < width) for a, b in near]
        near = [(a.clip(0, height - 1), b.clip(0, width - 1)) for a, b in near]
        sound = np.stack([ok & ~bad[a, b] for ok, (a, b) in zip(inside, near, strict=True)])
        total = sound.sum(axis=0)
        rim = total > 0
        y, x, sound, total = y[rim], x[rim], sound[:, rim], total[rim]
        for frame in frames:
            values = np.stack([frame[a[rim], b[rim]] for a, b in near])
            frame[y, x] = np.where(sound, values, 0).sum(axis=0) / total
        bad[y, x] = False


def frame_statistics(counts: NDArray[np.generic], *, saturation: float | None) -> dict[str, Double]:
    """Summarise each raw frame.

    counts: (time, y, x) raw; saturation: reading at and above which a pixel is saturated, None if there is none.
    Returns arrays (time,): mean, variance, minimum, maximum over the finite pixels [counts; NaN where there are none],
    saturated_fraction and finite_fraction.
    """
    names = ("mean", "variance", "minimum", "maximum", "saturated_fraction", "finite_fraction")
    result = {name: np.full(len(counts), np.nan) for name in names}
    for i, frame in enumerate(counts):
        values = np.asarray(frame, dtype=np.float64).ravel()
        finite = values[np.isfinite(values)]
        result["finite_fraction"][i] = finite.size / values.size
        high = 0 if saturation is None else np.count_nonzero(finite >= saturation)
        result["saturated_fraction"][i] = high / values.size
        if finite.size:
            result["mean"][i], result["variance"][i] = finite.mean(), finite.var()
            result["minimum"][i], result["maximum"][i] = finite.min(), finite.max()
    return result


def frame_flags(statistics: dict[str, Double], *, max_saturated_fraction: float) -> tuple[Bool, list[str]]:
    """Decide which frames carry no usable image.

    statistics: from `frame_statistics`; max_saturated_fraction: the largest tolerated part of a frame at saturation.
    Returns (time,) True where dropped, and per frame the reason ("" where the frame is good).
    """
    reasons = []
    for finite, saturated, low, high in zip(
        statistics["finite_fraction"],
        statistics["saturated_fraction"],
        statistics["minimum"],
        statistics["maximum"],
        strict=True,
    ):
        reason = ""
        if finite < 1:
            reason = f"{1 - finite:.2%} of the pixels are not finite"
        elif low == high:
            reason = "all pixels are zero" if low == 0 else f"all pixels hold {low:g}"
        elif saturated > max_saturated_fraction:
            reason = f"{saturated:.2%} of the pixels are saturated (at most {max_saturated_fraction:.2%} allowed)"
        reasons.append(reason)
    return np.array([bool(reason) for reason in reasons], dtype=bool), reasons
