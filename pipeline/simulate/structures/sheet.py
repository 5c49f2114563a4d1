"""Hexagonal sheets one layer thick: vacancies single and double, substitutions, groups of silicon, a hole."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial import cKDTree

from pipeline.simulate.structures.silicon import with_groups
from pipeline.simulate.structures.specimen import Move, Sites, Specimen, grouped, specimen, turned
from schemas.errors import SettingsError

SHEETS = {  # hexagonal sheets: lattice constant [Å], then (number, fractional y, fractional x, z [Å]) of each atom
    "graphene": (2.46, ((6, 0.0, 0.0, 0.0), (6, 1 / 3, 2 / 3, 0.0))),
    "hbn": (2.504, ((5, 0.0, 0.0, 0.0), (7, 1 / 3, 2 / 3, 0.0))),
    "mos2": (3.18, ((42, 0.0, 0.0, 0.0), (16, 1 / 3, 2 / 3, -1.56), (16, 1 / 3, 2 / 3, 1.56))),
    "wse2": (3.32, ((74, 0.0, 0.0, 0.0), (34, 1 / 3, 2 / 3, -1.67), (34, 1 / 3, 2 / 3, 1.67))),
}
FOREIGN = {"mos2": {16: 34, 42: 74}, "wse2": {34: 52, 74: 42}}  # what replaces an element: Se for S, W for Mo, …


@dataclass(frozen=True)
class Defects:
    """What is wrong with a sheet. Shares: vacancies (of chalcogens, or of any atom), double_vacancies (of pairs),
    dopants (Si for C), substitutions (of chalcogens) and metal_substitutions by FOREIGN.

    groups: names of groups of silicon, each put once near the middle; hole: radius [Å] of a round hole; atomwise:
    single atoms of a pair come and go; mobile: vacancies and silicon may hop to a neighbouring site.
    """

    vacancies: float = 0.0
    dopants: float = 0.0
    hole: float = 0.0
    double_vacancies: float = 0.0
    substitutions: float = 0.0
    metal_substitutions: float = 0.0
    groups: tuple[str, ...] = ()
    atomwise: bool = False
    mobile: bool = False


def sheet(rng: np.random.Generator, *, kind: str, reach: float, defects: Defects) -> Specimen:
    """A 2D crystal of half-width `reach` [Å] with its defects; a lattice site is where one atom belongs, or a pair.

    Raises SettingsError for an unknown kind.
    """
    if kind not in SHEETS:
        raise SettingsError(f"kind is {kind!r}; expected one of {sorted(SHEETS)}")
    points, numbers, site = _lattice(rng, kind, reach)
    light = numbers < 40 if numbers.max() > 40 else np.ones(len(numbers), bool)
    lattice = np.abs(points[:, :2]).max(1) < reach
    gone = light & (rng.random(len(points)) < defects.vacancies)
    if defects.hole:
        middle = rng.uniform(-1.2 * defects.hole, 1.2 * defects.hole, 2)
        lattice &= np.linalg.norm(points[:, :2] - middle, axis=1) > defects.hole
    points, numbers, light, gone = points[lattice], numbers[lattice], light[lattice], gone[lattice]
    sites, site = _sites(points, numbers, site[lattice])
    pairs = bool(sites.capacity.max() > 1)
    if defects.double_vacancies:
        gone |= light & (rng.random(len(sites.host)) < defects.double_vacancies)[site]
    if not (pairs and defects.mobile):  # else what is gone may come back from elsewhere, and is listed as absent
        points, numbers, light, site, gone = (a[~gone] for a in (points, numbers, light, site, gone))
    numbers = np.where((rng.random(len(points)) < defects.dopants) & (numbers == 6), 14, numbers)
    for (host, foreign), share in zip(
        FOREIGN.get(kind, {}).items(), (defects.substitutions, defects.metal_substitutions), strict=False
    ):
        if share:
            numbers = np.where((rng.random(len(numbers)) < share) & (numbers == host) & ~gone, foreign, numbers)
    column = grouped(points)
    movable = np.zeros(column.max() + 1, bool)
    movable[column[light]] = True
    made = replace(specimen(points, numbers, column, movable), site=site, sites=sites)
    if pairs and (defects.atomwise or defects.mobile):
        made = replace(made, unit=np.arange(len(points)), movable=light & ~gone, absent=gone)
    if pairs and defects.mobile:
        made = replace(made, moves=_vacancy_hops(made, light, SHEETS[kind][0]))
    return with_groups(rng, made, defects.groups, mobile=defects.mobile) if kind == "graphene" else made


def _vacancy_hops(made: Specimen, light: np.ndarray, constant: float) -> tuple[Move, ...]:
    """Chalcogens that may fill a vacancy of their kind beside them in their own plane."""
    tree = cKDTree(made.positions)
    moves = []
    for hole in np.flatnonzero(made.absent).tolist():
        for atom in sorted(tree.query_ball_point(made.positions[hole], 1.05 * constant)):
            same_plane = abs(made.positions[atom, 2] - made.positions[hole, 2]) < 0.5
            if atom != hole and light[atom] and same_plane and made.numbers[atom] == made.numbers[hole]:
                moves.append(Move("hop", (atom,), (hole,), int(made.column[atom]), int(made.column[hole])))
    return tuple(moves)


def _lattice(rng: np.random.Generator, kind: str, reach: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (atom, 3) [Å], numbers (atom,) and site (atom,) of a perfect sheet, turned and shifted at random."""
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
    return turned(np.column_stack([flat, depth]), rng.uniform(0, 2 * np.pi)), numbers, site


def _sites(points: np.ndarray, numbers: np.ndarray, site: np.ndarray) -> tuple[Sites, np.ndarray]:
    """The sites of a lattice without defects, and the row among them that each atom (atom,) belongs to."""
    _, first, row = np.unique(site, return_index=True, return_inverse=True)
    return Sites(points[first, :2], numbers[first], np.bincount(row)), row.ravel()
