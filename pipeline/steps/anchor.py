"""What drift is measured by: the whole view, what lies outside of particles, the particles, or the largest of them.

A particle that moves on its support has a motion of its own. A mask, soft at its edge, leaves what moves otherwise out
of the correlation; it is made frame by frame, from the probability of particles in the frame behind a Wiener filter,
so that it moves with them.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

Anchor = Literal["frame", "support", "particle", "largest"]
EDGE = 12
"""Width [px] over which a mask rises outside of what it keeps, or falls before what it leaves out."""
LEAST = 0.01
"""Part of a frame that a mask must keep: of less, no drift is measured."""


def filtered(frame: NDArray[np.floating], wiener: NDArray[np.floating]) -> NDArray[np.float32]:
    """A frame (y, x) behind the Wiener filter of its movie, (y, x // 2 + 1) in rfft2 layout, about its own mean."""
    mean = frame.mean()
    image = np.fft.irfft2(np.fft.rfft2(frame - mean) * wiener, s=frame.shape)
    return np.asarray(mean + image, dtype=np.float32)


def mask(labels: NDArray[np.int32], anchor: Anchor) -> NDArray[np.float32]:
    """What of a frame counts, (y, x) from 0 to 1; zero all over where that is less than `LEAST` of it.

    labels (y, x): particles from 1 on, 0 elsewhere.
    """
    kept = labels > 0
    if anchor == "largest" and kept.any():
        kept = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    if anchor == "frame" or (anchor == "support" and not kept.any()):
        return np.ones(labels.shape, dtype=np.float32)
    if not kept.any():
        return np.zeros(labels.shape, dtype=np.float32)
    # A smooth step from 0 at the particle's outline to 1 at EDGE from it, or the other way round.
    away = np.sin(0.5 * np.pi * np.clip(distance_transform_edt(~kept) / EDGE, 0, 1)) ** 2
    found = away if anchor == "support" else 1 - away
    return np.asarray(found if found.mean() >= LEAST else np.zeros_like(found), dtype=np.float32)
