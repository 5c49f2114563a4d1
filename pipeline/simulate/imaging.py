"""Images of atoms: HRTEM by abTEM multislice with a quasi-coherent CTF, HAADF by convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import abtem
import dask
import numpy as np
from ase import Atoms
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates

SLICE = 2.0  # Å; the projected potential of a slice is applied at once

# By default FFTW picks its plans by stop-watch, so that the last bits differ from one process to the next.
ABTEM = {"device": "cpu", "precision": "float32", "fft": "fftw", "fftw.planning_effort": "FFTW_ESTIMATE"}


def exit_wave(positions: np.ndarray, numbers: np.ndarray, *, gpts: int, sampling: float, energy: float) -> Any:
    """abTEM wave (y, x) below the specimen for a plane wave of `energy` [keV].

    positions (atom, 3) [Å] in (y, x, z) with the origin at the canvas' pixel (0, 0), inside the canvas, z ≥ 0.
    """
    extent = gpts * sampling
    top = float(positions[:, 2].max()) if len(positions) else 0.0
    cell = (extent, extent, (np.ceil((top + 1.5) / SLICE) + 1) * SLICE)
    shifted = positions + np.array([0.0, 0.0, 1.0])
    atoms = Atoms(numbers=numbers, positions=shifted, cell=cell, pbc=(True, True, False))
    with dask.config.set(scheduler="synchronous"), abtem.config.set(ABTEM):
        potential = abtem.Potential(
            atoms, gpts=(gpts, gpts), slice_thickness=SLICE, projection="infinite", parametrization="lobato"
        )
        built: Any = potential.build(lazy=False)
        wave: Any = abtem.PlaneWave(energy=energy * 1e3).multislice(built, lazy=False)
    return wave


@dataclass(frozen=True)
class Lens:
    """A lens: energy [keV], spherical aberration, focal spread, astigmatism and coma [Å], angular spread [mrad].

    Angles of astigmatism and coma in degrees. Aberrations as abTEM's C12, phi12, C21, phi21.
    """

    energy: float
    spherical: float
    focal_spread: float
    angular_spread: float
    astigmatism: float = 0.0
    astigmatism_angle: float = 0.0
    coma: float = 0.0
    coma_angle: float = 0.0

    def ctf(self, defocus: float) -> abtem.CTF:
        """The transfer function at a defocus [Å]; > 0 is underfocus (abTEM's C10 is its negative)."""
        residual: dict[str, Any] = {}
        if self.astigmatism:
            residual |= {"C12": self.astigmatism, "phi12": np.deg2rad(self.astigmatism_angle)}
        if self.coma:
            residual |= {"C21": self.coma, "phi21": np.deg2rad(self.coma_angle)}
        return abtem.CTF(
            energy=self.energy * 1e3, C10=-defocus, Cs=self.spherical, focal_spread=self.focal_spread,
            angular_spread=self.angular_spread, **residual,
        )  # fmt: skip


def hrtem(wave: Any, *, lens: Lens, defocus: float, complex_wave: bool = False) -> np.ndarray:
    """Intensity (y, x) behind the lens, 1 without a specimen, or the wave it is the square of."""
    with dask.config.set(scheduler="synchronous"), abtem.config.set(ABTEM):
        imaged = np.asarray(wave.apply_ctf(lens.ctf(defocus)).array)
    return imaged if complex_wave else (np.abs(imaged) ** 2).astype(np.float32)


def haadf(positions: np.ndarray, numbers: np.ndarray, *, gpts: int, sampling: float, probe: float) -> np.ndarray:
    """Incoherent image (y, x): each atom adds Z^1.7 times a Gaussian probe of full width at half maximum `probe` [Å].

    No channelling, no tails of the probe: fast, and good enough for contrast and positions in thin specimens.
    A weak background stands for scattering that is not atomic. The mean is 1.
    """
    image = np.zeros((gpts, gpts))
    sigma = np.hypot(probe / 2.3548, 0.1) / sampling
    half = int(np.ceil(5 * sigma))
    centre = np.rint(positions[:, :2] / sampling).astype(int)
    offsets = np.arange(-half, half + 1)
    rest = (positions[:, :2] / sampling - centre)[:, :, None]
    profile = np.exp(-((offsets - rest) ** 2) / (2 * sigma**2))
    rows = (centre[:, 0, None] + offsets) % gpts
    cols = (centre[:, 1, None] + offsets) % gpts
    for start in range(0, len(positions), 512):
        part = slice(start, start + 512)
        stamp = profile[part, 0, :, None] * profile[part, 1, None, :]
        stamp *= (numbers[part] ** 1.7)[:, None, None]
        np.add.at(image, (rows[part, :, None], cols[part, None, :]), stamp)
    image /= 2 * np.pi * sigma**2
    level = image.mean() if image.any() else 1.0
    image += 0.15 * level
    return np.asarray(image / image.mean(), dtype=np.float32)


def scanned(image: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """An image (y, x) whose rows were scanned off their places, by offsets (row, 2) [px] along y and x.

    What a row shows is what lies `offsets` from where it should be.
    """
    rows = np.arange(image.shape[0])[:, None] + offsets[:, :1]
    cols = np.arange(image.shape[1])[None] + offsets[:, 1:]
    read = map_coordinates(image, np.broadcast_arrays(rows, cols), order=3, mode="grid-wrap")
    return np.asarray(read, dtype=np.float32)


def clarity(image: np.ndarray, y: np.ndarray, x: np.ndarray, sampling: float) -> float:
    """How plainly columns at y, x [px] stand out as bright spots from all that lies between them.

    The brightness that 90 % of the columns reach, minus that which 98 % of the image (y, x) between columns stays below
    (0.8 to 1.8 Å from the nearest), over the standard deviation of both. Positive where hardly anything is mistaken.
    """
    apart = np.ones(image.shape, bool)
    rows, cols = (np.clip(np.rint(v).astype(int), 0, n - 1) for v, n in zip((y, x), image.shape, strict=True))
    apart[rows, cols] = False
    distance = distance_transform_edt(apart) * sampling
    smooth = gaussian_filter(image, 0.15 / sampling)
    between = smooth[(distance > 0.8) & (distance < 1.8)]
    at = smooth[rows, cols]
    if not len(between) or not len(at):
        return 0.0
    spread = float(np.std(smooth[distance < 1.8])) + 1e-9
    return float(np.quantile(at, 0.1) - np.quantile(between, 0.98)) / spread


def merit(clarity: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """What makes one of several defoci (defocus,) the best: columns that are clear, but not where they are faint.

    clarity of each, and mean contrast of the columns in each, both positive for the wanted sign.
    """
    return np.asarray(np.minimum(clarity, 2.0) + 2.0 * contrast / (np.abs(contrast).max() + 1e-12))


def column_contrast(image: np.ndarray, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """Contrast (column,) of an image (y, x) at columns [px]: value there minus the mean on a circle of `radius`."""
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    ring_y = y[:, None] + radius * np.sin(angles)
    ring_x = x[:, None] + radius * np.cos(angles)
    ring = map_coordinates(image, [ring_y, ring_x], order=1, mode="nearest").mean(1)
    return np.asarray(map_coordinates(image, [y, x], order=1, mode="nearest") - ring)
