"""Specimens: atoms in ångström around the centre of the view, and the columns they form.

Positions are (y, x, z): y down and x right on the detector, z along the beam (the electron meets small z first).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from schemas.errors import SettingsError

LATTICES = {  # face-centred cubic metals: lattice constant [Å] and atomic number
    "Au": (4.078, 79),
    "Pt": (3.924, 78),
    "Ag": (4.086, 47),
    "Pd": (3.891, 46),
    "Cu": (3.615, 29),
    "Ni": (3.524, 28),
}
SYMBOLS = {6: "C", 5: "B", 7: "N", 14: "Si", 16: "S", 34: "Se", 42: "Mo", 74: "W"} | {
    number: name for name, (_, number) in LATTICES.items()
}
ZONES = {"100": ((0, 0, 1), (1, 0, 0)), "110": ((1, 1, 0), (0, 0, 1)), "111": ((1, 1, 1), (1, -1, 0))}
SHEETS = {  # hexagonal sheets: lattice constant [Å], then (number, fractional y, fractional x, z [Å]) of each atom
    "graphene": (2.46, ((6, 0.0, 0.0, 0.0), (6, 1 / 3, 2 / 3, 0.0))),
    "hbn": (2.504, ((5, 0.0, 0.0, 0.0), (7, 1 / 3, 2 / 3, 0.0))),
    "mos2": (3.18, ((42, 0.0, 0.0, 0.0), (16, 1 / 3, 2 / 3, -1.56), (16, 1 / 3, 2 / 3, 1.56))),
    "wse2": (3.32, ((74, 0.0, 0.0, 0.0), (34, 1 / 3, 2 / 3, -1.67), (34, 1 / 3, 2 / 3, 1.67))),
}


@dataclass(frozen=True)
class Specimen:
    """A crystal: positions (atom, 3) [Å], numbers (atom,), column (atom,) index, movable (column,) bool."""

    positions: np.ndarray
    numbers: np.ndarray
    column: np.ndarray
    movable: np.ndarray

    @property
    def count(self) -> int:
        """How many columns there are, those that are absent at first included."""
        return len(self.movable)


def empty() -> Specimen:
    """No crystal at all."""
    return Specimen(np.zeros((0, 3)), np.zeros(0, int), np.zeros(0, int), np.zeros(0, bool))


def turned(points: np.ndarray, angle: float) -> np.ndarray:
    """Points (n, 2 or 3) turned in the plane of the detector by an angle [rad]."""
    cos, sin = np.cos(angle), np.sin(angle)
    out = points.copy()
    out[:, 0] = cos * points[:, 0] - sin * points[:, 1]
    out[:, 1] = sin * points[:, 0] + cos * points[:, 1]
    return out


def _frame_of(zone: str) -> np.ndarray:
    if zone not in ZONES:
        raise SettingsError(f"zone is {zone!r}; expected one of {sorted(ZONES)}")
    beam, side = (np.array(v, float) / np.linalg.norm(v) for v in ZONES[zone])
    return np.array([side, np.cross(beam, side), beam])


def _inside(points: np.ndarray, radius: float, facets: np.ndarray) -> np.ndarray:
    """Truncated shape: a sphere cut by {100} and {111} planes at facets[0] and facets[1] times the radius."""
    cube = np.abs(points)
    round_off = np.linalg.norm(points, axis=1) <= radius
    limits = (cube.max(1) <= facets[0] * radius) & (cube.sum(1) / np.sqrt(3) <= facets[1] * radius)
    return np.asarray(round_off & limits)


def _grouped(points: np.ndarray) -> np.ndarray:
    """Index of the projected column of each atom; ideal lattice positions (n, 3) are grouped within 0.3 Å."""
    if not len(points):
        return np.zeros(0, int)
    pairs = cKDTree(points[:, :2]).query_pairs(0.3, output_type="ndarray")
    root = np.arange(len(points))
    for first, second in np.sort(pairs, axis=1)[np.argsort(pairs.min(1), kind="stable")] if len(pairs) else ():
        root[second] = min(root[second], root[first])
    return np.unique(root, return_inverse=True)[1].ravel()


def nanoparticle(
    rng: np.random.Generator, *, element: str, zone: str, radius: float, thickness: float, tilt: float
) -> Specimen:
    """A face-centred cubic particle on zone, with rim columns that may come and go.

    radius, thickness (most along the beam) [Å]; tilt [rad] is about a random axis in the plane.
    Raises SettingsError for an unknown element or zone.
    """
    if element not in LATTICES:
        raise SettingsError(f"element is {element!r}; expected one of {sorted(LATTICES)}")
    constant, number = LATTICES[element]
    reach = int(np.ceil((radius + 4) / constant)) + 1
    cells = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    crystal = (cells[:, None] + basis).reshape(-1, 3) * constant + rng.uniform(-0.5, 0.5, 3) * constant
    facets = np.array([rng.uniform(0.78, 1.0), rng.uniform(0.82, 1.0)])
    flat = np.abs(crystal @ _frame_of(zone)[2]) <= thickness / 2
    core = flat & _inside(crystal, radius, facets)
    shell = flat & ~core & _inside(crystal, radius + 3.0, facets)
    shell[shell] = cKDTree(crystal[core]).query(crystal[shell])[0] < 0.74 * constant
    chosen = crystal[core | shell] @ _frame_of(zone).T
    is_core = core[core | shell]
    group = _grouped(chosen)
    # A column of the shell may be added as a whole where the core has none; shell atoms that cap core columns stay out.
    has_core = np.bincount(group, weights=is_core) > 0
    enough = np.bincount(group) >= 3
    keep = is_core | (~has_core & enough)[group]
    column = np.unique(group[keep], return_inverse=True)[1].ravel()
    movable = np.ones(column.max() + 1, bool)
    movable[column[is_core[keep]]] = False
    axis = rng.uniform(0, np.pi)
    placed = turned(_tilted(turned(chosen[keep], -axis), tilt), axis + rng.uniform(0, 2 * np.pi))
    placed[:, 2] -= placed[:, 2].min()
    return Specimen(placed, np.full(len(placed), number), column, movable)


def _tilted(points: np.ndarray, tilt: float) -> np.ndarray:
    cos, sin = np.cos(tilt), np.sin(tilt)
    return np.asarray(points @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]).T)


def sheet(
    rng: np.random.Generator, *, kind: str, reach: float, vacancies: float, dopants: float, hole: float
) -> Specimen:
    """A 2D crystal of half-width `reach` [Å] with a share of vacancies (chalcogens, or any atom) and of Si dopants.

    `hole` is the radius [Å] of a round hole near the middle, 0 for none.
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
    points = turned(np.column_stack([flat, depth]), rng.uniform(0, 2 * np.pi))
    light = numbers < 40 if numbers.max() > 40 else np.ones(len(numbers), bool)
    keep = (np.abs(points[:, :2]).max(1) < reach) & ~(light & (rng.random(len(points)) < vacancies))
    if hole:
        keep &= np.linalg.norm(points[:, :2] - rng.uniform(-1.2 * hole, 1.2 * hole, 2), axis=1) > hole
    points, numbers, light = points[keep], numbers[keep], light[keep]
    numbers = np.where((rng.random(len(points)) < dopants) & (numbers == 6), 14, numbers)
    column = _grouped(points)
    movable = np.zeros(column.max() + 1, bool)
    movable[column[light]] = True
    return Specimen(points, numbers, column, movable)


def carbon(rng: np.random.Generator, *, reach: float, thickness: float, cover: float) -> np.ndarray:
    """Amorphous carbon atoms (n, 3) [Å] at 0.095 Å⁻³ over a share `cover` of the square of half-width `reach`.

    The film ends at a wavy edge that runs in a random direction; beyond it is vacuum.
    """
    count = int(4 * reach * reach * thickness * 0.095)
    points = np.column_stack([rng.uniform(-reach, reach, (count, 2)), rng.uniform(0, thickness, count)])
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    along = turned(points, angle)
    edge = reach * (2 * cover - 1) + 3 * np.sin(along[:, 1] / 11 + phase) if cover < 1 else np.inf
    points = points[along[:, 0] < edge]
    for _ in range(12):  # push apart pairs closer than a bond, as random points would cluster
        pairs = cKDTree(points).query_pairs(1.42, output_type="ndarray")
        if not len(pairs):
            break
        gap = points[pairs[:, 0]] - points[pairs[:, 1]]
        length = np.linalg.norm(gap, axis=1)[:, None] + 1e-6
        step = 0.4 * (1.42 - length) * gap / length
        np.add.at(points, pairs[:, 0], step)
        np.add.at(points, pairs[:, 1], -step)
    points[:, 2] = np.clip(points[:, 2], 0.0, thickness)
    return points
