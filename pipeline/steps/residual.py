"""What a denoiser took away: is it as strong as the noise that the model predicts, and is it white?

Structure in it is signal that was lost; too little of it is noise that was kept; neighbours that are alike say that the
detector's noise is correlated, which a blind-spot network sees through its blind spot.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

REACH = 3  # px, farthest lag along each axis whose correlation is looked at
FLOOR = 0.1  # of the mean: least electrons expected of a pixel
LIMIT = 4.0  # sigma of one lag that the largest of all lags of white noise hardly ever exceeds
MEANINGLESS = 0.05  # correlation that harms nothing, however many pixels prove it


class Whiteness(NamedTuple):
    """spread: rms residual over what the model predicts (1 if all noise was taken and nothing else); correlation: of a
    pixel with one nearby, the largest in size; limit: which size that of white noise stays below."""

    spread: float
    correlation: float
    limit: float

    @property
    def white(self) -> bool:
        """Whether the residual is as good as white."""
        return abs(self.correlation) <= max(self.limit, MEANINGLESS)


def residual(
    electrons: NDArray[np.floating[Any]], denoised: NDArray[np.floating[Any]], *, readout_variance: float
) -> NDArray[np.float32]:
    """Measured less denoised frame (y, x) [both electrons], in units of the noise expected of each pixel."""
    floor = FLOOR * max(float(np.nanmean(denoised)), 1e-3)
    variance = np.maximum(denoised, floor) + readout_variance
    return np.asarray((electrons - denoised) / np.sqrt(variance), dtype=np.float32)


def whiteness(standardised: NDArray[np.floating[Any]]) -> Whiteness:
    """Judge a residual (y, x) in units of the noise; NaN throughout for one that is not finite or zero."""
    values = np.asarray(standardised, dtype=np.float32)
    height, width = values.shape
    if not np.isfinite(values).all() or not values.any() or min(height, width) <= 2 * REACH:
        return Whiteness(np.nan, np.nan, np.nan)
    power, rest = float(np.mean(values**2, dtype=np.float64)), values - values.mean(dtype=np.float64).astype(np.float32)
    variance = max(float(np.mean(rest**2, dtype=np.float64)), 1e-300)
    worst = 0.0
    for down in range(REACH + 1):
        for right in range(-REACH if down else 1, REACH + 1):
            one = rest[: height - down, max(0, -right) : width - max(0, right)]
            other = rest[down:, max(0, right) : width - max(0, -right)]
            found = float(np.mean(one * other, dtype=np.float64)) / variance
            worst = found if abs(found) > abs(worst) else worst
    return Whiteness(power**0.5, worst, LIMIT / (height * width) ** 0.5)
