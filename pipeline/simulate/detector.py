"""From relative intensity to what a detector writes."""

from __future__ import annotations

import numpy as np


def apply_mtf(image: np.ndarray, coefficients: tuple[float, float, float, float]) -> np.ndarray:
    """Image (y, x) with the Fourier amplitude multiplied by (c0 − c1) / (1 + (k / 2 c2)^|c3|) + c1, k in cycles/pixel.

    Normalised to 1 at k = 0, so that the mean stays. Form of Madsen et al., arXiv 1802.03008; there its square root
    multiplies the amplitude, here the MTF itself does.
    """
    c0, c1, c2, c3 = coefficients
    k = np.hypot(np.fft.fftfreq(image.shape[0])[:, None], np.fft.rfftfreq(image.shape[1]))
    mtf = (c0 - c1) / (1 + (k / (2 * c2)) ** abs(c3)) + c1
    return np.fft.irfft2(np.fft.rfft2(image) * (mtf / mtf[0, 0]), s=image.shape).astype(np.float32)


def record(
    clean: np.ndarray,
    rng: np.random.Generator,
    *,
    electrons_per_pixel: float,
    counts_per_electron: float = 1.0,
    offset: float = 0.0,
    readout: float = 0.0,
) -> np.ndarray:
    """Counts of any shape, uint16: Poisson electrons × counts_per_electron + offset + readout noise [counts rms]."""
    electrons = rng.poisson(np.maximum(clean, 0) * electrons_per_pixel)
    counts = electrons * counts_per_electron + offset
    if readout:
        counts = counts + rng.normal(0, readout, clean.shape)
    return np.asarray(np.clip(np.rint(counts), 0, 65535), dtype=np.uint16)
