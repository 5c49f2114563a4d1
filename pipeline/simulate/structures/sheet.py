"""Hexagonal sheets one layer thick, with vacancies, foreign atoms and a hole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.simulate.structures.specimen import Sites, Specimen, grouped, specimen, turned
from schemas.errors import SettingsError

SHEETS = {  # hexagonal sheets: lattice constant [Å], then (number, fractional y, fractional x, z [Å]) of each atom
    "graphene": (2.46, ((6, 0.0, 0.0, 0.0), (6, 1 / 3, 2 / 3, 0.0))),
    "hbn": (2.504, ((5, 0.0, 0.0, 0.0), (7, 1 / 3, 2 / 3, 0.0))),
    "mos2": (3.18, ((42, 0.0, 0.0, 0.0), (16, 1 / 3, 2 / 3, -1.56), (16, 1 / 3, 2 / 3, 1.56))),
    "wse2": (3.32, ((74, 0.0, 0.0, 0.0), (34, 1 / 3, 2 / 3, -1.67), (34, 1 / 3, 2 / 3, 1.67))),
}


def sheet(
    rng: np.random.Generator, *, kind: str, reach: float, vacancies: float, dopants: float, hole: float
) -> Specimen:
    """A 2D crystal of half-width `reach` [Å] with a share of vacancies (chalcogens, or any atom) and of Si dopants.

    `hole` is the radius [Å] of a round hole near the middle, 0 for none. A lattice site is where one atom belongs, or
    two above each other.
    Raises SettingsError for an unknown kind.
    """
    if kind not in SHEETS:
        raise SettingsError(f"kind is {kind!r}; expected one of {sorted(SHEETS)}")
    constant, basis = SHEETS[kind]
    cells = int(np.ceil(1.6 * reach / constant)) + 2
    grid = np.stack(np.meshgrid(*[np.arange(-cells, cells + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    vectors = constant * np.array([[1.0, 0.0], [-0.5, np.sqrt(3) / 2]])
    parts = [(grid + np.array([fy, fx])) @ vectors for _, fy, fx, _ in basis]
    flat = np.concatenate(parts) + rng.uniform(-2, 2, 2)
    numbers = np.repeat([atom[0] for atom in basis], len(grid))
    depth = np.repeat([atom[3] for atom in basis], len(grid)) + 1.8
    places = list(dict.fromkeys(atom[1:3] for atom in basis))
    site = np.concatenate([np.arange(len(grid)) + len(grid) * places.index(atom[1:3]) for atom in basis])
    points = turned(np.column_stack([flat, depth]), rng.uniform(0, 2 * np.pi))
    light = numbers < 40 if numbers.max() > 40 else np.ones(len(numbers), bool)
    lattice = np.abs(points[:, :2]).max(1) < reach
    gone = light & (rng.random(len(points)) < vacancies)
    if hole:
        lattice &= np.linalg.norm(points[:, :2] - rng.uniform(-1.2 * hole, 1.2 * hole, 2), axis=1) > hole
    sites, site = _sites(points[lattice], numbers[lattice], site[lattice])
    keep = ~gone[lattice]
    points, numbers, light, site = points[lattice][keep], numbers[lattice][keep], light[lattice][keep], site[keep]
    numbers = np.where((rng.random(len(points)) < dopants) & (numbers == 6), 14, numbers)
    column = grouped(points)
    movable = np.zeros(column.max() + 1, bool)
    movable[column[light]] = True
    return replace(specimen(points, numbers, column, movable), site=site, sites=sites)


def _sites(points: np.ndarray, numbers: np.ndarray, site: np.ndarray) -> tuple[Sites, np.ndarray]:
    """The sites of a lattice without defects, and the row among them that each atom (atom,) belongs to."""
    _, first, row = np.unique(site, return_index=True, return_inverse=True)
    return Sites(points[first, :2], numbers[first], np.bincount(row)), row.ravel()
