"""Particles of face-centred cubic metals: any shape, on a zone axis or off it, with vacancies and adatoms that hop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from pipeline.simulate.structures.adatoms import adatoms
from pipeline.simulate.structures.shapes import LATTICES, TWINNED, check_shape, inside, lattice, planes_of, twinned
from pipeline.simulate.structures.specimen import PARTICLE_DTYPE, Specimen, grouped, joined, specimen, turned
from schemas.errors import SettingsError

ZONES = {"100": ((0, 0, 1), (1, 0, 0)), "110": ((1, 1, 0), (0, 0, 1)), "111": ((1, 1, 1), (1, -1, 0))}
OUTLINE = 0.42  # lattice constants: discs this large around atoms leave no gap between columns of any zone above
BOND = 0.74  # lattice constants: a little more than the distance of nearest neighbours


@dataclass(frozen=True)
class Particle:
    """One particle to build: radius, thickness (most along the beam) [Å], tilt [rad] off its zone.

    zone: one of ZONES, or random. vacancies: share of missing atoms; adatoms: columns of 1 to 3 atoms on the rim;
    mobile: whether these may hop to places beside them.
    """

    element: str
    radius: float
    thickness: float
    zone: str = "110"
    shape: str = "faceted"
    tilt: float = 0.0
    vacancies: float = 0.0
    adatoms: int = 0
    mobile: bool = False


def frame_of(zone: str) -> np.ndarray:
    """Rows (3, 3): the crystal's directions that lie along y, x and the beam."""
    if zone not in ZONES:
        raise SettingsError(f"zone is {zone!r}; expected one of {sorted(ZONES)} or random")
    beam, side = (np.array(v, float) / np.linalg.norm(v) for v in ZONES[zone])
    return np.array([side, np.cross(beam, side), beam])


def nearest_zone(beam: np.ndarray) -> tuple[str, np.ndarray, float]:
    """Which of ZONES a direction (3,) of the crystal is nearest to: its name, its frame (3, 3), the angle [rad]."""
    best = ("", np.eye(3), np.inf)
    for name, (axis, side) in ZONES.items():
        for signs in product((1, -1), repeat=3):
            for shift in range(3):
                along, across = (np.roll(np.array(v, float) * signs, shift) for v in (axis, side))
                along, across = along / np.linalg.norm(along), across / np.linalg.norm(across)
                angle = float(np.arccos(np.clip(along @ beam, -1, 1)))
                if angle < best[2]:
                    best = (name, np.array([across, np.cross(along, across), along]), angle)
    return best


def nanoparticle(rng: np.random.Generator, plan: Particle) -> Specimen:
    """A particle about the middle, z ≥ 0, whose rim columns may come and go.

    Raises SettingsError for an unknown element, zone or shape.
    """
    check_shape(plan.shape, plan.element)
    turn = Rotation.random(random_state=rng).as_matrix() if plan.zone == "random" else None
    zone, frame, tilt = _orientation(plan, turn)
    points, core, rim = _cut(rng, plan, frame if turn is None else turn)
    points, rim = points @ frame.T, rim @ frame.T
    group = grouped(points)
    # A column of the shell may be added as a whole where the core has none; shell atoms that cap core columns stay out.
    has_core = np.bincount(group, weights=core) > 0
    enough = np.bincount(group) >= 3
    shell = ~has_core & enough
    if plan.adatoms:  # half of the places beside the core are for adatoms, the others for whole columns
        shell &= rng.random(len(shell)) < 0.5
    keep = core | shell[group]
    rim = np.concatenate([rim, points[~keep]])
    kept, core = points[keep], core[keep]
    column = np.unique(group[keep], return_inverse=True)[1].ravel()
    movable = np.ones(column.max() + 1, bool)
    movable[column[core]] = False
    axis = rng.uniform(0, np.pi) if turn is None else 0.0
    around = axis + rng.uniform(0, 2 * np.pi) if turn is None else 0.0
    made = specimen(kept, np.full(len(kept), LATTICES[plan.element][1]), column, movable)
    if plan.vacancies:
        made = _with_vacancies(rng, made, plan.vacancies)
    if plan.adatoms and len(rim):
        made = joined([made, adatoms(rng, made, rim, element=plan.element, count=plan.adatoms, mobile=plan.mobile)])
    if turn is None:
        placed = turned(tilted(turned(made.positions, -axis), plan.tilt), around)
    else:
        placed = made.positions @ frame @ turn.T
    placed[:, 2] -= placed[:, 2].min()
    row = _row(plan, zone, tilt)
    return replace(made, positions=placed, particle=np.zeros(made.count, int), particles=row)


def solid(rng: np.random.Generator, plan: Particle) -> Specimen:
    """A particle in a random orientation as one unit whose atoms form no columns: quick, for large fields."""
    check_shape(plan.shape, plan.element)
    turn = Rotation.random(random_state=rng).as_matrix()
    zone, _, tilt = _orientation(plan, turn)
    if plan.shape in TWINNED:
        points = twinned(plan.shape, plan.element, plan.radius)
    else:
        points = lattice(LATTICES[plan.element][0], plan.radius, rng)
        points = points[inside(points, plan.radius, planes_of(plan.shape, rng))]
    points = points @ turn.T
    points = points[np.abs(points[:, 2]) <= plan.thickness / 2]
    one = np.zeros(len(points), int)
    made = specimen(points, np.full(len(points), LATTICES[plan.element][1]), one, np.ones(1, bool))
    return replace(made, particle=np.zeros(1, int), particles=_row(plan, zone, tilt))


def _row(plan: Particle, zone: str, tilt: float) -> np.ndarray:
    row = np.zeros(1, PARTICLE_DTYPE)
    row["element"], row["shape"], row["zone"], row["radius"] = plan.element, plan.shape, zone, plan.radius
    row["tilt"], row["outline"] = np.rad2deg(tilt), OUTLINE * LATTICES[plan.element][0]
    return row


def _orientation(plan: Particle, turn: np.ndarray | None) -> tuple[str, np.ndarray, float]:
    """Zone, frame (3, 3) in which columns are counted, and tilt [rad] off it; twinned shapes have no zone."""
    if plan.shape in TWINNED:
        return "", np.eye(3), np.nan
    return (plan.zone, frame_of(plan.zone), plan.tilt) if turn is None else nearest_zone(turn[2])


def _cut(rng: np.random.Generator, plan: Particle, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atoms (n, 3) [Å] in the crystal's axes, which of them (n,) are the core, and free places (m, 3) beside the core.

    The rest of the atoms are a shell that may be there. frame: rows that are y, x and the beam.
    """
    constant, _ = LATTICES[plan.element]
    if plan.shape in TWINNED:
        points = twinned(plan.shape, plan.element, plan.radius)
        points = points[np.abs(points @ frame[2]) <= plan.thickness / 2]
        return points, np.ones(len(points), bool), np.zeros((0, 3))
    points = lattice(constant, plan.radius + 4, rng)
    facets = planes_of(plan.shape, rng)
    flat = np.abs(points @ frame[2]) <= plan.thickness / 2
    core = flat & inside(points, plan.radius, facets)
    beside = flat & ~core
    beside[beside] = cKDTree(points[core]).query(points[beside])[0] < BOND * constant
    shell = beside & inside(points, plan.radius + 3.0, facets)
    return points[core | shell], core[core | shell], points[beside & ~shell]


def _with_vacancies(rng: np.random.Generator, made: Specimen, share: float) -> Specimen:
    """A specimen without a share of its atoms, one of each column excepted."""
    gone = rng.random(len(made.positions)) < share
    gone[np.unique(made.column, return_index=True)[1]] = False
    keep = ~gone
    return replace(
        made, positions=made.positions[keep], numbers=made.numbers[keep], column=made.column[keep],
        unit=made.unit[keep], site=made.site[keep],
    )  # fmt: skip


def tilted(points: np.ndarray, tilt: float) -> np.ndarray:
    """Points (n, 3) turned by an angle [rad] about an axis in the plane of the detector."""
    cos, sin = np.cos(tilt), np.sin(tilt)
    return np.asarray(points @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]).T)
