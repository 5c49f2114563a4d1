"""The quick HAADF image against abTEM's multislice scan of the same atoms."""

from __future__ import annotations

import abtem
import dask
import numpy as np
import pytest
from ase import Atoms
from scipy.ndimage import gaussian_filter, map_coordinates

from pipeline.simulate import imaging

EDGE, SCANNED = 12.0, 48  # Å, points
MOS2 = 3.18


def flake() -> tuple[np.ndarray, np.ndarray]:
    """A flake of MoS2 with a single and a double vacancy: positions (atom, 3) [Å] in (y, x, z), numbers (atom,)."""
    grid = np.stack(np.meshgrid(np.arange(-3, 4), np.arange(-3, 4), indexing="ij"), -1).reshape(-1, 2)
    vectors = MOS2 * np.array([[1.0, 0.0], [-0.5, np.sqrt(3) / 2]])
    metal = np.column_stack([grid @ vectors, np.full(len(grid), 1.56)])
    pairs = [np.column_stack([(grid + np.array([1 / 3, 2 / 3])) @ vectors, np.full(len(grid), z)]) for z in (0.0, 3.12)]
    place, numbers = np.concatenate([metal, *pairs]), np.repeat([42, 16, 16], len(grid))
    keep = np.linalg.norm(place[:, :2], axis=1) < 4.2
    place, numbers = place[keep], numbers[keep]
    sulphur = np.flatnonzero(numbers == 16)
    sites = np.unique(place[sulphur, :2].round(3), axis=0)
    gone = [sulphur[(np.abs(place[sulphur, :2] - site) < 0.01).all(1)] for site in sites[[2, 4]]]
    keep = ~np.isin(np.arange(len(place)), [gone[0][0], *gone[1]])
    return place[keep] + np.array([EDGE / 2, EDGE / 2, 0.0]), numbers[keep]


def scanned(place: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """abTEM's HAADF image (y, x): 80 keV, 30 mrad, detector from 80 to 200 mrad, source of 0.7 Å."""
    cell = (EDGE, EDGE, place[:, 2].max() + 3)
    atoms = Atoms(numbers=numbers, positions=place + np.array([0, 0, 1.0]), cell=cell, pbc=(True, True, False))
    with dask.config.set(scheduler="synchronous"), abtem.config.set({"diagnostics.progress_bar": False}):
        potential = abtem.Potential(atoms, sampling=0.06, slice_thickness=2.0).build(lazy=False)
        probe = abtem.Probe(energy=80e3, semiangle_cutoff=30.0)
        probe.grid.match(potential)
        grid = abtem.GridScan((0, 0), (EDGE, EDGE), gpts=(SCANNED, SCANNED), endpoint=False)
        measured = probe.scan(
            potential, scan=grid, detectors=abtem.AnnularDetector(inner=80, outer=200), max_batch=32, lazy=False
        )
    return gaussian_filter(np.asarray(measured.array, dtype=float), 0.7 / 2.3548 * SCANNED / EDGE, mode="wrap")


@pytest.mark.slow
def test_the_quick_image_agrees_with_multislice() -> None:
    place, numbers = flake()
    exact = scanned(place, numbers)
    sampling = EDGE / SCANNED
    widths = np.arange(0.8, 1.6, 0.05)
    images = [
        imaging.haadf(place, numbers, gpts=SCANNED, sampling=sampling, probe=float(width)).astype(float)
        for width in widths
    ]
    agreement = np.array([np.corrcoef(image.ravel(), exact.ravel())[0, 1] for image in images])
    best = int(agreement.argmax())
    quick = images[best] - images[best].min()
    exact = exact - exact.min()
    print(f"probe {widths[best]:.2f} Å, correlation {agreement[best]:.4f}")
    assert agreement[best] > 0.98
    columns, index = np.unique(place[:, :2].round(3), axis=0, return_inverse=True)
    heavy = np.bincount(index.ravel(), numbers == 42) > 0
    count = np.bincount(index.ravel())
    at = [map_coordinates(image, (columns / sampling).T, order=3, mode="grid-wrap") for image in (quick, exact)]
    for group in (~heavy & (count == 2), ~heavy & (count == 1)):
        ratios = [values[group].mean() / values[heavy].mean() for values in at]
        print(f"column over Mo: quick {ratios[0]:.3f}, multislice {ratios[1]:.3f}")
        assert ratios[0] == pytest.approx(ratios[1], abs=0.1)
