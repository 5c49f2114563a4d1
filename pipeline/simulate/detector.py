"""From relative intensity to what a detector writes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.simulate.spec import MovieSpec

Mtf = tuple[float, float, float, float]
PAD = 16  # px drawn around the view, so that noise does not wrap round where it is blurred


@dataclass(frozen=True)
class Detector:
    """One camera: what an electron becomes.

    mtf: how an integrating camera blurs its noise (None: it does not); excess: relative rms of the signal that one
    electron leaves; gain (y, x): counts of a pixel relative to others, mean 1; hot (y, x): electrons that a pixel adds
    of its own; offset and readout (rms) in counts.
    """

    counts_per_electron: float = 1.0
    offset: float = 0.0
    readout: float = 0.0
    mtf: Mtf | None = None
    excess: float = 0.0
    gain: np.ndarray | None = None
    hot: np.ndarray | None = None


PERFECT = Detector()


def detector_of(spec: MovieSpec, seed: int) -> Detector:
    """The camera of a movie: its gain map and hot pixels are the same in all frames."""
    rng = np.random.default_rng([seed, 3])
    gain = hot = None
    if spec.gain_spread:
        gain = np.maximum(rng.normal(1, spec.gain_spread, spec.shape), 0.1)
        gain /= gain.mean()
    if spec.hot_pixels:
        chosen = rng.random(spec.shape) < spec.hot_pixels
        hot = np.where(chosen, rng.uniform(3, 30, spec.shape) * max(spec.dose * spec.sampling**2, 1.0), 0.0)
    integrating = spec.noise == "integrating"
    return Detector(
        spec.counts_per_electron, spec.offset, spec.readout, spec.mtf if integrating else None,
        spec.excess if integrating else 0.0, gain, hot,
    )  # fmt: skip


def mtf_at(k: np.ndarray, coefficients: Mtf) -> np.ndarray:
    """(c0 − c1) / (1 + (k / 2 c2)^|c3|) + c1 at k [cycles/pixel], normalised to 1 at k = 0.

    Form of Madsen et al., arXiv 1802.03008; there its square root multiplies the amplitude, here the MTF itself does.
    """
    c0, c1, c2, c3 = coefficients
    return np.asarray(((c0 - c1) / (1 + (k / (2 * c2)) ** abs(c3)) + c1) / c0)


def apply_mtf(image: np.ndarray, coefficients: Mtf) -> np.ndarray:
    """Image (…, y, x) with the Fourier amplitude multiplied by the MTF, so that the mean stays."""
    k = np.hypot(np.fft.fftfreq(image.shape[-2])[:, None], np.fft.rfftfreq(image.shape[-1]))
    blurred = np.fft.irfft2(np.fft.rfft2(image) * mtf_at(k, coefficients), s=image.shape[-2:])
    return blurred.astype(np.float32)


def record(
    clean: np.ndarray, rng: np.random.Generator, *, electrons_per_pixel: float, detector: Detector = PERFECT
) -> np.ndarray:
    """Counts ([defocus,] y, x) uint16 of a clean image that the MTF has blurred already.

    A counting detector counts each electron in one pixel: noise is white. An integrating one spreads each over the
    pixels around, so its noise is blurred as the image is, and an electron's signal varies. Then gain, offset, readout.
    """
    expected = np.maximum(clean, 0) * electrons_per_pixel
    if detector.hot is not None:
        expected = expected + detector.hot
    if detector.mtf is None:
        electrons: np.ndarray = rng.poisson(expected)
    else:
        edges = [(0, 0)] * (clean.ndim - 2) + [(PAD, PAD)] * 2
        wide = np.pad(expected, edges, mode="symmetric")
        arrived: np.ndarray = rng.poisson(wide).astype(float)
        if detector.excess:
            arrived += detector.excess * np.sqrt(arrived) * rng.standard_normal(arrived.shape)
        inner = (..., slice(PAD, -PAD), slice(PAD, -PAD))
        electrons = expected + apply_mtf(arrived - wide, detector.mtf)[inner]
    if detector.gain is not None:
        electrons = electrons * detector.gain
    counts = electrons * detector.counts_per_electron + detector.offset
    if detector.readout:
        counts = counts + rng.normal(0, detector.readout, clean.shape)
    return np.asarray(np.clip(np.rint(counts), 0, 65535), dtype=np.uint16)
