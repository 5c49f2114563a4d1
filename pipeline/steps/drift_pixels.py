"""A drift in whole pixels, by which frames are moved without a change of their counts, and the field that is left."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Double = NDArray[np.float64]
Integer = NDArray[np.int64]

_TAU = 2 * np.pi


def whole_pixels(drift: Double) -> Integer:
    """Round a drift (…, 2) [px] to whole pixels; halves go up, so that 0.5 → 1 and −0.5 → 0 everywhere."""
    return np.asarray(np.floor(np.asarray(drift, dtype=np.float64) + 0.5), dtype=np.int64)


def whole_path(drift: Double) -> Integer:
    """Round the drift of a whole movie (n, 2) [px] to whole pixels (n, 2), so that frames lie on each other well.

    Only differences between frames matter, so zero may lie anywhere between two pixels. It is put where the drift's
    fractions gather: a specimen that stands still, or steps by whole pixels, would else change its pixel by noise if
    the first frame was found half a pixel off. Fractions that gather nowhere lose nothing.
    """
    if len(drift) == 0:
        return np.zeros((0, 2), dtype=np.int64)
    origin = np.angle(np.exp(1j * _TAU * drift).mean(axis=0)) / _TAU
    return whole_pixels(drift - origin)


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
