"""Cheap images of large fields: the specimen as one phase and amplitude object, then the same lens as for multislice.

At 0.5 to 3 Å per pixel a field holds 10⁵ to 10⁶ atoms on a film, for which multislice needs minutes. What such images
show is the phase of the mean potential, Fresnel fringes, granular film, lattice fringes where the sampling resolves
them, and electrons lost to angles that do not take part. So: the projected potential of all atoms gives the phase; each
atom removes intensity by a cross-section ∝ Z^1.5, more for particles near a zone axis, as diffraction does. Left out
is dynamical diffraction itself: bend contours, thickness fringes and the exact strength of lattice fringes.

Atoms are binned at no more than 0.5 Å, so that no lattice period is aliased, and cut to the band of a grid twice as
fine as the detector's; the intensity is then summed over its pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from abtem.core.energy import energy2sigma
from abtem.parametrizations import LobatoParametrization
from ase.data import chemical_symbols
from scipy.fft import irfft2, rfft2

FINEST = 0.5  # Å
LOSS, LOSS_POWER = 0.07, 1.5  # Å² that one gold atom takes from the intensity; power of Z for other elements
DEBYE_WALLER = 0.6  # Å²
LOSS_BLUR = 8.0  # Å²: losses are spread over about an atom's distance to its neighbours
OVERSAMPLING = 2  # of the grid on which waves are formed, against the detector's


def grids(gpts: int, sampling: float) -> tuple[int, int]:
    """Points along the edge of the grid on which atoms are binned, and of the one on which waves are formed."""
    wave = OVERSAMPLING * gpts
    return wave * max(1, int(np.ceil(sampling / OVERSAMPLING / FINEST))), wave


def binned(points: np.ndarray, weights: np.ndarray, gpts: int, extent: float) -> np.ndarray:
    """Density (y, x) float32 of weighted points (n, 2) [Å], shared between the four nearest grid points, periodic."""
    place = points * (gpts / extent)
    low = np.floor(place).astype(np.int64)
    rest = place - low
    out = np.zeros(gpts * gpts, np.float32)
    for dy in (0, 1):
        for dx in (0, 1):
            share = np.abs(1 - dy - rest[:, 0]) * np.abs(1 - dx - rest[:, 1]) * weights
            index = ((low[:, 0] + dy) % gpts) * gpts + (low[:, 1] + dx) % gpts
            np.add.at(out, index, share.astype(np.float32))
    return out.reshape(gpts, gpts)


def cut(spectrum: np.ndarray, gpts: int) -> np.ndarray:
    """A real image's half spectrum on a coarser grid (gpts, gpts // 2 + 1): its middle."""
    if spectrum.shape[0] == gpts:
        return spectrum
    top, bottom = gpts // 2, gpts - gpts // 2
    return np.concatenate([spectrum[:bottom, : gpts // 2 + 1], spectrum[-top:, : gpts // 2 + 1]])


def frequencies(gpts: int, extent: float) -> np.ndarray:
    """Square of the spatial frequency [1/Å²] of a half spectrum."""
    y, x = np.fft.fftfreq(gpts, extent / gpts), np.fft.rfftfreq(gpts, extent / gpts)
    return np.asarray((y[:, None] ** 2 + x**2).astype(np.float32))


def scattering(number: int, k2: np.ndarray) -> np.ndarray:
    """Fourier transform [V Å³] of an atom's potential, spread by its vibration, over k² [1/Å²] (Lobato's tables)."""
    form: Any = LobatoParametrization().projected_scattering_factor(chemical_symbols[number])
    return np.asarray(form(k2) * np.exp(-DEBYE_WALLER * k2 / 4), dtype=np.float32)


def loss(numbers: np.ndarray) -> np.ndarray:
    """Cross-section [Å²] (atom,) for electrons that do not come back into the image."""
    return np.asarray(LOSS * (numbers / 79) ** LOSS_POWER)


def density(points: np.ndarray, weights: np.ndarray, gpts: int, sampling: float) -> np.ndarray:
    """Half spectrum, on the grid of waves, of weighted points (n, 2) [Å] on a canvas of gpts pixels of the detector."""
    extent = gpts * sampling
    fine, wave = grids(gpts, sampling)
    spectrum = cut(rfft2(binned(points, weights, fine, extent)), wave)
    y, x = np.fft.fftfreq(wave, extent / wave), np.fft.rfftfreq(wave, extent / wave)
    spread = np.sinc(y * extent / fine)[:, None] ** 2 * np.sinc(x * extent / fine) ** 2  # of sharing among four points
    return np.asarray(spectrum / spread.astype(np.float32))


def film(lit: np.ndarray, thickness: float, extent: float, rng: np.random.Generator | None = None) -> np.ndarray:
    """Half spectrum of the carbon of a film [Å] thick where lit (y, x) is 1; with rng what a random one adds to it."""
    expected = lit * np.float32(0.095 * thickness * (extent / lit.shape[0]) ** 2)
    return np.asarray(rfft2(expected if rng is None else (rng.poisson(expected) - expected).astype(np.float32)))


def transmitted(potential: np.ndarray, lost: np.ndarray, *, energy: float, extent: float) -> np.ndarray:
    """Wave (y, x) behind an object given by half spectra of its potential [V Å³] and of its losses [Å²]."""
    gpts = potential.shape[0]
    per_area, k2 = (gpts / extent) ** 2, frequencies(gpts, extent)
    band = k2 < (gpts / extent / 3) ** 2
    projected = irfft2(potential * band, s=(gpts, gpts)) * per_area
    missing = np.maximum(irfft2(lost * np.exp(-LOSS_BLUR * k2), s=(gpts, gpts)) * per_area, 0.0)
    return np.asarray(np.exp(1j * energy2sigma(energy * 1e3) * projected - missing / 2), dtype=np.complex64)


def incoherent(strength: np.ndarray, *, probe: float, extent: float) -> np.ndarray:
    """HAADF image (y, x) on the grid of waves, mean 1, of the half spectrum of atoms weighted by Z^1.7; probe [Å]."""
    gpts = strength.shape[0]
    variance = (probe / 2.3548) ** 2 + 0.1**2
    blur = np.exp(-2 * np.pi**2 * variance * frequencies(gpts, extent))
    image = np.maximum(irfft2(strength * blur, s=(gpts, gpts)), 0.0)
    level = float(image.mean()) or 1.0
    return np.asarray((image + 0.15 * level) / (1.15 * level), dtype=np.float32)


def onto_detector(intensity: np.ndarray) -> np.ndarray:
    """Intensity summed over the detector's pixels, two grid points wide, the first of which is centred on (0, 0)."""
    wide = np.pad(intensity, 1, mode="wrap")
    rows = 0.25 * wide[:-2:2] + 0.5 * wide[1:-1:2] + 0.25 * wide[2::2]
    return np.asarray(0.25 * rows[:, :-2:2] + 0.5 * rows[:, 1:-1:2] + 0.25 * rows[:, 2::2], dtype=np.float32)
