"""How a camera blurs and how noisy it is: MTF, gain and readout noise from the noise where there is only the beam.

A scintillator spreads the light of every counted electron, so its noise is blurred as its image is. The noise power
spectrum of vacuum is  P(k) = g · (S − o) · MTF(k)² + r² + rounding  [counts² per pixel], with S the mean reading, o the
reading without beam, g the counts per electron, r the readout noise [counts rms], and
MTF(k) = (1 − c1) / (1 + (k / 2 c2)^c3) + c1, k in cycles per pixel. It multiplies the Fourier amplitude and is 1 at
k = 0: the c0 of the usual form (c0 − c1) / (1 + (k / 2 c2)^|c3|) + c1 cannot be told from the gain, so c0 = 1.
An electron that leaves now more, now less light makes more noise, so g includes 1 + (relative rms of that light)².
What noise gives is strictly the noise transfer function: the MTF as far as all electrons leave the same light, and
above it where they do not. Form of Madsen et al., arXiv 1802.03008.

A plateau c1 and readout noise look alike in the spectrum. The third moments of the noise part them: those of electrons
are blurred like their spectrum, those of a symmetric readout noise vanish (`vacuum.third_moments`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

from pipeline.steps.vacuum import Level, Third, expected_third
from schemas.errors import SourceError

Floats = NDArray[np.float64]

STARTS = (0.06, 0.12, 0.25, 0.5)  # of c2, cycles/px
LOW = np.array([1e-9, 0.0, np.log(0.01), np.log(0.3), 0.0])
HIGH = np.array([np.inf, 0.95, np.log(3.0), np.log(12.0), np.inf])
BLURRED = 25.0  # by how much the blur must lower chi² to be believed: three parameters, about 4 sigma
TELLING = 2.0  # standard errors at which c1 is told from zero
POOR, MISFIT = 3.0, 0.1  # chi², and rms relative difference, from which on a spectrum is not of this form
HOPELESS = 0.1  # standard error of c1 beyond which it is left out: it is 0 to 0.1 in cameras
BLUNT = 0.1  # relative standard error of c1 from which on a remedy is named
# A ring's mean scatters less than the bins that its tile has in common with other rings would let expect: only
# neighbours along the ring count, (35 / 18) for a Hann window, not (35 / 18)².
RING_SCATTER = 35 / 18


class DetectorFit(NamedTuple):
    """A camera, with standard errors (NaN where a number was given or assumed, not fitted).

    mtf: (c0, c1, c2, c3), c0 = 1, or None where noise is white; counts_per_electron [counts]; readout [counts rms],
    rounding not included; offset [counts], the reading without beam; signal: mean reading of each level [counts]; chi2:
    of the fit per degree of freedom, by which standard errors are widened where it is above 1; notes: what could not be
    known, in words.
    """

    mtf: tuple[float, float, float, float] | None
    mtf_errors: tuple[float, float, float, float]
    counts_per_electron: float
    counts_per_electron_error: float
    readout: float
    readout_error: float
    offset: float
    offset_error: float
    signal: tuple[float, ...]
    chi2: float
    notes: tuple[str, ...]


class _Solution(NamedTuple):
    values: Floats  # gain [counts], c1, log c2, log c3, white noise power [counts²], offset [counts]
    errors: Floats
    correlation: Floats
    chi2: float
    freedom: int


def transfer(k: ArrayLike, mtf: tuple[float, float, float, float] | None) -> Floats:
    """MTF at k [cycles/px], 1 at k = 0; all 1 for None."""
    at = np.asarray(k, np.float64)
    if mtf is None:
        return np.ones_like(at)
    c0, c1, c2, c3 = mtf
    return np.asarray(((c0 - c1) / (1 + (at / (2 * c2)) ** abs(c3)) + c1) / c0)


def noise_power(k: ArrayLike, fit: DetectorFit, signal: float, *, rounding: float) -> Floats:
    """Noise power [counts² per pixel] that a fit expects at k [cycles/px] and a mean reading [counts]."""
    shot = fit.counts_per_electron * (signal - fit.offset)
    return np.asarray(shot * transfer(k, fit.mtf) ** 2 + fit.readout**2 + rounding)


def fit_detector(
    levels: list[Level],
    *,
    offset: float | None,
    readout: float | None,
    rounding: float,
    third: Third | None = None,
) -> DetectorFit:
    """Fit MTF and noise to spectra of vacuum at one or several levels of brightness.

    offset [counts] and readout [counts rms] are believed where they are given (from frames without beam, say). Without,
    readout is fitted as the white part of the noise that `third` does not see, and offset too if levels differ enough
    to tell it, else it is taken as 0. rounding: variance that rounding to whole counts adds [counts²], 1/12 or 0.
    Weighted least squares of the spectra's rings, whose relative errors are known, from several starts, and then of the
    third moments too, of unknown strength.
    """
    given = np.full(6, np.nan)  # what is not fitted, in the order of _Solution.values
    given[4] = np.nan if readout is None else readout**2 + rounding
    given[5] = offset if offset is not None else np.nan if len(levels) > 1 else 0.0
    third = third if readout is None else None
    notes = []
    best = _solve(levels, given, third)
    if not best.errors[5] < 0.1 * max(level.mean for level in levels) and offset is None:
        given[5] = 0.0
        best = _solve(levels, given, third)
    if third is not None and np.square(_skew(best.values, third)).mean() > POOR:
        notes.append("third moments are not those of electrons that a camera blurs; they are left aside")
        third, best = None, _solve(levels, given)
    misfit = _misfit(best.values, levels)
    if best.chi2 > POOR * best.freedom and misfit > MISFIT:
        notes.append(
            f"the spectrum is not of this form (off by {misfit:.0%} rms, chi² {best.chi2 / best.freedom:.1f}): no "
            "vacuum, frames that were scanned or processed, or a camera of another kind"
        )
    if offset is None and given[5] == 0.0:
        notes.append("the reading without beam cannot be known from one brightness; taken as 0 (give offset or dark)")
    white = given.copy()
    white[1:5] = 1.0, 0.0, 0.0, 0.0 if readout is None else given[4]
    flat = _solve(levels, white, third)
    if flat.chi2 - best.chi2 < BLURRED * max(best.chi2 / best.freedom, 1.0):
        notes.append("the noise is white: the camera counts electrons, or blurs before it counts; vacuum shows no MTF")
        if readout is None:
            notes.append("readout noise cannot be told from counting noise; all of it is taken as that of counting")
            flat.values[4] = rounding
        return _result(levels, flat, rounding, notes)
    if best.errors[1] > HOPELESS:
        notes.append(f"c1 is not seen (± {best.errors[1]:.2g}) and is taken as 0, which the other errors presuppose")
        given[1] = 0.0
        best = _solve(levels, given, third)
    elif best.values[1] < TELLING * best.errors[1]:
        notes.append(f"c1 cannot be told from 0 (below {best.values[1] + 2 * best.errors[1]:.2g} at 95 %)")
    elif readout is None and best.errors[1] > BLUNT * best.values[1]:
        rho = best.correlation[1, 4]
        notes.append(f"c1 and readout noise are entangled (correlation {rho:+.3f}): give readout or dark to part them")
    return _result(levels, best, rounding, notes)


def _result(levels: list[Level], found: _Solution, rounding: float, notes: list[str]) -> DetectorFit:
    gain, plateau, c2, c3, white, offset = (float(value) for value in found.values)
    errors = found.errors
    blurred = plateau < 1
    readout = max(white - rounding, 0.0) ** 0.5
    # The error of a root: of what is near zero, the root of the error.
    spread = errors[4] / (2 * readout) if readout**2 > errors[4] else errors[4] ** 0.5
    return DetectorFit(
        mtf=(1.0, plateau, float(np.exp(c2)), float(np.exp(c3))) if blurred else None,
        mtf_errors=(np.nan, float(errors[1]), float(np.exp(c2) * errors[2]), float(np.exp(c3) * errors[3])),
        counts_per_electron=gain,
        counts_per_electron_error=float(errors[0]),
        readout=readout,
        readout_error=float(spread),
        offset=offset,
        offset_error=float(errors[5]),
        signal=tuple(level.mean for level in levels),
        chi2=found.chi2 / found.freedom,
        notes=tuple(notes),
    )


def _model(values: Floats, level: Level) -> Floats:
    gain, white, offset = values[[0, 4, 5]]
    return np.asarray(np.maximum(gain * (level.mean - offset) * _mtf(values, level.k) ** 2 + white, 1e-12), np.float64)


def _mtf(values: Floats, k: Floats) -> Floats:
    plateau, c2, c3 = values[1:4]
    return np.asarray((1 - plateau) / (1 + (k / (2 * np.exp(c2))) ** np.exp(c3)) + plateau)


def _skew(values: Floats, third: Third) -> Floats:
    """Third moments less those expected, of the factor that fits best, in standard errors (pair,)."""
    size = third.low.shape[0]
    k = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    found, expected = third.moment / third.error, expected_third(third, _mtf(values, k)) / third.error
    return np.asarray(found - expected * (found @ expected) / max(float(expected @ expected), 1e-300))


def _misfit(values: Floats, levels: list[Level]) -> float:
    """Root of the mean squared relative difference between spectra and model."""
    off = np.concatenate([level.power / _model(values, level) - 1 for level in levels])
    return float(np.sqrt(np.mean(np.square(off))))


def _deviance(values: Floats, levels: list[Level]) -> Floats:
    """Signed roots of the deviance of each ring: their squares sum to twice what the likelihood lacks of its best.

    The mean of n exponential variables of mean P is gamma distributed; least squares of these roots is maximum
    likelihood.
    """
    out = []
    for level in levels:
        off = level.power / _model(values, level) - 1
        near = np.abs(off) < 1e-3
        root = np.sqrt(2 * np.where(near, 0.0, off - np.log1p(np.maximum(off, -1 + 1e-12))))
        out.append(np.sqrt(level.values) * np.where(near, off * (1 - off / 3), np.sign(off) * root))
    return np.concatenate(out)


def _solve(levels: list[Level], given: Floats, third: Third | None = None) -> _Solution:
    """The most likely values where `given` is NaN, from several starts of c2; third moments only end the search."""
    brightest, darkest = max(level.mean for level in levels), min(level.mean for level in levels)
    floor, top = (pick(float(pick(level.power)) for level in levels) for pick in (min, max))
    scale = np.array([top / brightest, 0.1, 0.3, 0.3, floor, 0.1 * brightest])
    free = np.isnan(given)
    low, high = np.append(LOW, darkest - 10 * brightest)[free], np.append(HIGH, 0.999 * darkest)[free]
    start = np.array([top / brightest, 0.02, 0.0, np.log(2.5), 0.5 * floor, 0.0])

    def residuals(part: Floats) -> Floats:
        return _deviance(_filled(given, part), levels)

    def all_residuals(part: Floats) -> Floats:
        skew = np.zeros(0) if third is None else _skew(_filled(given, part), third) / RING_SCATTER**0.5
        return np.append(residuals(part), skew)

    found = []
    for c2 in STARTS if free[2] else STARTS[:1]:
        start[2] = np.log(c2)
        begin = np.clip(start[free], low, high)
        found.append(least_squares(residuals, begin, bounds=(low, high), x_scale=scale[free], xtol=1e-12))
    best = min(found, key=lambda one: float(one.cost))
    if third is not None:
        best = least_squares(all_residuals, best.x, bounds=(low, high), x_scale=scale[free], xtol=1e-9)
    freedom = max(best.fun.size - int(free.sum()), 1)
    chi2 = RING_SCATTER * 2 * float(best.cost)
    jacobian = best.jac * scale[free]
    covariance = np.linalg.pinv(jacobian.T @ jacobian, rcond=1e-14) * np.outer(scale[free], scale[free])
    spread = np.sqrt(np.maximum(np.diag(covariance), 0))
    errors, correlation = np.full(6, np.nan), np.zeros((6, 6))
    errors[free] = spread * np.sqrt(max(chi2 / freedom, 1.0))
    correlation[np.ix_(free, free)] = covariance / np.maximum(np.outer(spread, spread), 1e-300)
    return _Solution(_filled(given, best.x), errors, correlation, chi2, freedom)


def _filled(given: Floats, part: Floats) -> Floats:
    values = given.copy()
    values[np.isnan(given)] = part
    return values


class Dark(NamedTuple):
    """Frames without beam: mean reading [counts] and readout noise [counts rms], rounding not included; and whether
    readings below zero were cut off, so that both had to be found from the upper half."""

    offset: float
    readout: float
    clipped: bool


def fit_dark(frames: NDArray[np.floating], *, rounding: float) -> Dark:
    """Offset and readout noise of frames (time, y, x) [counts] without beam.

    The noise is that over time; of a single frame, that of neighbouring pixels against one another. Where more than 2 %
    of the readings are zero, the median and the spread above it are taken. Raises SourceError where half of them are
    zero or more.
    """
    zeros = float(np.mean(frames <= 0))
    if zeros >= 0.6:
        raise SourceError(f"{zeros:.0%} of the dark readings are zero; expected a camera that adds an offset to them")
    if zeros > 0.02:
        middle = float(np.median(frames))
        above = frames[frames > middle].astype(np.float64) - middle
        variance = float(np.square(above).sum()) / (0.5 * frames.size)
        return Dark(middle, max(variance - rounding, 0.0) ** 0.5, True)
    if len(frames) > 1:
        variance = float(frames.var(0, ddof=1, dtype=np.float64).mean())
    else:
        variance = float(np.diff(frames[0].astype(np.float64), axis=1).var() / 2)
    return Dark(float(frames.mean(dtype=np.float64)), max(variance - rounding, 0.0) ** 0.5, False)
