"""Images of sheets to train species networks on: focal series from one exit wave, and scanned images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import abtem
import numpy as np
from abtem.core.energy import energy2wavelength
from scipy.fft import fft2, ifft2, irfft2, next_fast_len, rfft2
from scipy.ndimage import gaussian_filter

from pipeline.simulate import detector, imaging

BORDER = 3.0  # Å around the view, where the periodic canvas of a wave wraps round
CLOUD = 0.5  # Å, the grid on which uneven brightness is drawn
Range = tuple[float, float]


@dataclass(frozen=True)
class Phase:
    """Microscope and camera of a focal series; ranges (low, high) are uniform. Lengths in Å, angles in mrad.

    energies [keV], one is drawn; planes: images per series, `step` apart around a `centre` (defocus > 0 is underfocus);
    aberrations: astigmatism, coma and threefold up to these values at any angle; shift: error of the alignment of each
    plane [px]; mtf_share: of series through a camera with an MTF whose c2 is in mtf.
    """

    energies: tuple[float, ...] = (80.0,)
    planes: int = 3
    centre: Range = (-40.0, 60.0)
    step: Range = (40.0, 60.0)
    spherical: Range = (-1.5e5, 5e4)
    focal_spread: Range = (10.0, 35.0)
    angular_spread: Range = (0.05, 0.4)
    astigmatism: float = 20.0
    coma: float = 200.0
    threefold: float = 200.0
    shift: float = 0.5
    mtf_share: float = 0.5
    mtf: Range = (0.25, 0.6)


@dataclass(frozen=True)
class Scan:
    """Microscope and scan of HAADF images; ranges (low, high) are uniform. Lengths in Å.

    probe: full width at half maximum; exponent: intensity of an atom goes as its number to this power; tail: share of
    the probe in a wide tail, tail_width times as wide; jitter: of rows; background: of the mean, and uneven by
    `cloud`; electrons: dose counts those that reach the detector; readout: noise in units of Poisson's.
    """

    probe: Range = (0.7, 1.5)
    exponent: Range = (1.4, 2.0)
    tail: Range = (0.0, 0.5)
    tail_width: Range = (2.0, 4.0)
    jitter: Range = (0.0, 0.15)
    background: Range = (0.0, 1.5)
    cloud: Range = (0.0, 0.3)
    readout: Range = (0.0, 1.0)
    smear: Range = (0.0, 0.8)


class Atoms(Protocol):
    """Atoms (atom, 3) [Å] around the middle of the view, and their numbers (atom,)."""

    @property
    def atoms(self) -> np.ndarray: ...  # noqa: D102
    @property
    def numbers(self) -> np.ndarray: ...  # noqa: D102


class Waves(NamedTuple):
    """Fourier transform of an exit wave (y, x), and its energy [keV]."""

    spectrum: np.ndarray
    energy: float


def exit_spectrum(specimen: Atoms, phase: Phase, rng: np.random.Generator, gpts: int, sampling: float) -> Waves:
    """The exit wave of a specimen on a canvas of gpts pixels of `sampling` [Å/px]."""
    energy = float(rng.choice(phase.energies))
    extent = gpts * sampling
    points = specimen.atoms + np.array([extent / 2, extent / 2, 0.0])
    inside = ((points[:, :2] >= 0) & (points[:, :2] < extent)).all(1)
    with abtem.config.set({"fft": "numpy"}):  # FFTW would be planned anew for every wave
        wave: Any = imaging.exit_wave(
            points[inside], specimen.numbers[inside], gpts=gpts, sampling=sampling, energy=energy
        )
    return Waves(np.asarray(fft2(np.asarray(wave.array)), dtype=np.complex64), energy)


def transfer(
    gpts: int,
    *,
    sampling: float,
    energy: float,
    defocus: float,
    spherical: float,
    spread: Range,
    residual: tuple[complex, complex, complex] = (0j, 0j, 0j),
) -> np.ndarray:
    """Transfer of the wave (ky, kx) by an objective lens; defocus > 0 is underfocus, lengths in Å.

    spread: focal [Å] and angular [mrad]; residual: astigmatism, coma, threefold [Å], each with its azimuth as the phase
    of a complex number. Quasi-coherent envelopes as in abTEM (Kirkland, Advanced Computing in Electron Microscopy).
    """
    wavelength = float(energy2wavelength(energy * 1e3))
    k = np.fft.fftfreq(gpts, sampling).astype(np.float32) * np.float32(wavelength)
    ay, ax = k[:, None], k[None, :]
    square = ay**2 + ax**2
    chi = (0.25 * spherical * square - 0.5 * defocus) * square
    if any(residual):
        angle = ax + np.complex64(1j) * ay
        first, second, third = (np.complex64(complex(value).conjugate()) for value in residual)
        chi += (angle * angle * (first / 2 + third / 3 * angle) + square * (angle * (second / 3))).real
    focal, angular = spread
    slope = (np.pi / wavelength * angular * 1e-3) * (spherical * square - defocus)
    damped = (0.5 * np.pi / wavelength * focal) ** 2 * square**2 + slope**2 * square
    phase = (-2 * np.pi / wavelength) * chi
    out = np.empty((gpts, gpts), np.complex64)
    weight = np.exp(-damped)
    out.real, out.imag = np.cos(phase) * weight, np.sin(phase) * weight
    return out


def _residual(rng: np.random.Generator, phase: Phase) -> tuple[complex, complex, complex]:
    first, second, third = (
        complex(most * rng.random() * np.exp(2j * np.pi * rng.random()))
        for most in (phase.astigmatism, phase.coma, phase.threefold)
    )
    return first, second, third


def focal_series(
    waves: Waves, phase: Phase, rng: np.random.Generator, *, dose: float, sampling: float, size: int
) -> np.ndarray:
    """Electrons (plane, y, x) of a series of defoci of one wave, through a camera: the middle of the wave's canvas."""
    gpts = len(waves.spectrum)
    part = slice((gpts - size) // 2, (gpts - size) // 2 + size)
    centre, step = rng.uniform(*phase.centre), rng.uniform(*phase.step)
    spherical = rng.uniform(*phase.spherical)
    spread = (rng.uniform(*phase.focal_spread), rng.uniform(*phase.angular_spread))
    residual = _residual(rng, phase)
    camera = (1.0, float(rng.uniform(0, 0.1)), float(rng.uniform(*phase.mtf)), float(rng.uniform(2, 3)))
    through = rng.random() < phase.mtf_share
    k = np.fft.fftfreq(gpts).astype(np.float32)
    out = []
    for index in range(phase.planes):
        lens = transfer(
            gpts,
            sampling=sampling,
            energy=waves.energy,
            defocus=centre + (index - (phase.planes - 1) / 2) * step,
            spherical=spherical,
            spread=spread,
            residual=residual,
        )
        dy, dx = rng.uniform(-phase.shift, phase.shift, 2)
        lens *= np.exp(-2j * np.pi * k * dy).astype(np.complex64)[:, None]
        lens *= np.exp(-2j * np.pi * k * dx).astype(np.complex64)
        lens *= waves.spectrum
        wave = ifft2(lens, overwrite_x=True)
        image = wave.real**2 + wave.imag**2
        image = detector.apply_mtf(image, camera) if through else image
        out.append(rng.poisson(np.maximum(image[part, part], 0) * dose * sampling**2))
    return np.asarray(out, dtype=np.float32)


def scanned(
    specimen: Atoms, scan: Scan, rng: np.random.Generator, *, size: int, sampling: float, dose: float
) -> np.ndarray:
    """A HAADF image (1, y, x) of a sheet with the faults of probe, scan and detector; offset and gain mean nothing."""
    sigma = rng.uniform(*scan.probe) / 2.3548 / sampling
    weight = specimen.numbers.astype(float) ** rng.uniform(*scan.exponent)
    places = specimen.atoms[:, :2] / sampling + size / 2
    tail = (rng.uniform(*scan.tail), sigma * rng.uniform(*scan.tail_width))
    image = _spots(places, weight, size, sigma, tail)
    level = float(image.mean()) or 1.0
    image = image / level + rng.uniform(*scan.background) + _cloud(rng, size, sampling) * rng.uniform(*scan.cloud)
    image = _jittered(np.maximum(image, 0), rng, rng.uniform(*scan.jitter) / sampling)
    electrons = dose * sampling**2
    noisy = rng.poisson(image * electrons).astype(float)
    noisy += rng.normal(0, 1, image.shape) * np.sqrt(electrons * image.mean()) * rng.uniform(*scan.readout)
    smear = rng.uniform(*scan.smear)
    noisy = gaussian_filter(noisy, (0.3 * smear, smear)) if rng.random() < 0.5 else noisy
    return np.asarray(noisy[None], dtype=np.float32)


def _spots(places: np.ndarray, weight: np.ndarray, size: int, sigma: float, tail: Range) -> np.ndarray:
    """Sum (y, x) of spots at places (atom, 2) [px], each of a volume given by its weight.

    A spot is a Gaussian of sigma [px] of which a share has another sigma, both in `tail`.
    """
    border = int(np.ceil(2 * sigma)) + 2  # what lies just outside the view shines into it
    edge = next_fast_len(size + 2 * border, real=True)
    first = np.floor(places).astype(int)
    rest = places - first
    grid = np.zeros((edge, edge), np.float32)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rows, cols = first[:, 0] + border + dy, first[:, 1] + border + dx
        inside = (rows >= 0) & (rows < edge) & (cols >= 0) & (cols < edge)
        share = np.abs(1 - dy - rest[:, 0]) * np.abs(1 - dx - rest[:, 1]) * weight
        np.add.at(grid, (rows[inside], cols[inside]), share[inside].astype(np.float32))
    square = np.fft.fftfreq(edge)[:, None] ** 2 + np.fft.rfftfreq(edge) ** 2
    share, wide = tail
    blur = (1 - share) * np.exp(-2 * (np.pi * sigma) ** 2 * square) + share * np.exp(-2 * (np.pi * wide) ** 2 * square)
    image = irfft2(rfft2(grid) * blur.astype(np.float32), s=(edge, edge))
    return np.asarray(image[border : border + size, border : border + size])


def _cloud(rng: np.random.Generator, size: int, sampling: float) -> np.ndarray:
    """Uneven brightness (y, x), at least 0 and about 1 where it is brightest: what lies on a sheet."""
    coarse = int(np.ceil(size * sampling / CLOUD)) + 1
    cloud = np.zeros((coarse, coarse))
    for _ in range(2):
        width = np.exp(rng.uniform(np.log(0.6), np.log(8.0))) / CLOUD
        part = gaussian_filter(rng.standard_normal((coarse, coarse)), width, mode="wrap", truncate=3.0)
        cloud += rng.random() * part / max(float(part.std()), 1e-9)
    cloud = np.maximum(cloud, 0) / max(float(np.abs(cloud).max()), 1e-9)
    fine = np.linspace(0, coarse - 1, size)
    rows = np.stack([np.interp(fine, np.arange(coarse), line) for line in cloud])
    return np.stack([np.interp(fine, np.arange(coarse), line) for line in rows.T], axis=1)


def _jittered(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Rows displaced [px] and dimmed at random, as scanning does."""
    rows = np.arange(len(image))
    moved = rng.normal(0, strength, len(rows))
    slow = gaussian_filter(rng.normal(0, 1, len(rows)), 8.0)
    moved = moved + slow / max(float(slow.std()), 1e-9) * strength
    out = np.stack([np.interp(rows + shift, rows, line) for shift, line in zip(moved, image, strict=True)])
    return np.asarray(out * (1 + rng.normal(0, rng.uniform(0, 0.02), len(rows)))[:, None])
