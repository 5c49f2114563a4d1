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


def record_scintillator(
    incident: np.ndarray,
    rng: np.random.Generator,
    *,
    mtf: tuple[float, float, float, float],
    electrons_per_pixel: float,
    counts_per_electron: float = 1.0,
    offset: float = 0.0,
    readout: float = 0.0,
) -> np.ndarray:
    """Counts (…, y, x), uint16, of a camera that sees the light of electrons: noise is blurred as the image is.

    incident (…, y, x): relative intensity before any blur. Electrons are drawn first, then the light that they leave is
    spread by the MTF, then readout noise [counts rms] is added, so that only this is white. `record`, with a blurred
    image, is the counting detector: it draws electrons last.
    """
    electrons = rng.poisson(np.maximum(incident, 0) * electrons_per_pixel).astype(np.float32)
    planes = electrons.reshape(-1, *incident.shape[-2:])
    light = np.stack([_spread(plane, mtf) for plane in planes]).reshape(incident.shape)
    counts = light * counts_per_electron + offset
    if readout:
        counts = counts + rng.normal(0, readout, incident.shape)
    return np.asarray(np.clip(np.rint(counts), 0, 65535), dtype=np.uint16)


def _spread(plane: np.ndarray, mtf: tuple[float, float, float, float]) -> np.ndarray:
    """An image (y, x) blurred by an MTF, as if it went on beyond its edges."""
    rim = min(16, *plane.shape)
    blurred = apply_mtf(np.pad(plane, rim, mode="symmetric"), mtf)
    return blurred[rim:-rim, rim:-rim]
