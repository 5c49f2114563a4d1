"""Particles of face-centred cubic metals with facets, on a zone axis or tilted off it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.spatial import cKDTree

from pipeline.simulate.structures.specimen import PARTICLE_DTYPE, Specimen, grouped, specimen, turned
from schemas.errors import SettingsError

LATTICES = {  # face-centred cubic metals: lattice constant [Å] and atomic number
    "Au": (4.078, 79),
    "Pt": (3.924, 78),
    "Ag": (4.086, 47),
    "Pd": (3.891, 46),
    "Cu": (3.615, 29),
    "Ni": (3.524, 28),
}
ZONES = {"100": ((0, 0, 1), (1, 0, 0)), "110": ((1, 1, 0), (0, 0, 1)), "111": ((1, 1, 1), (1, -1, 0))}
OUTLINE = 0.42  # lattice constants: discs this large around atoms leave no gap between columns of any zone above


def frame_of(zone: str) -> np.ndarray:
    """Rows (3, 3): the crystal's directions that lie along y, x and the beam."""
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


def nanoparticle(
    rng: np.random.Generator, *, element: str, zone: str, radius: float, thickness: float, tilt: float
) -> Specimen:
    """A face-centred cubic particle with rim columns that may come and go.

    radius, thickness (most along the beam) [Å]; tilt [rad] off the zone is about a random axis in the plane.
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
    flat = np.abs(crystal @ frame_of(zone)[2]) <= thickness / 2
    core = flat & _inside(crystal, radius, facets)
    shell = flat & ~core & _inside(crystal, radius + 3.0, facets)
    shell[shell] = cKDTree(crystal[core]).query(crystal[shell])[0] < 0.74 * constant
    chosen = crystal[core | shell] @ frame_of(zone).T
    is_core = core[core | shell]
    group = grouped(chosen)
    # A column of the shell may be added as a whole where the core has none; shell atoms that cap core columns stay out.
    has_core = np.bincount(group, weights=is_core) > 0
    enough = np.bincount(group) >= 3
    keep = is_core | (~has_core & enough)[group]
    column = np.unique(group[keep], return_inverse=True)[1].ravel()
    movable = np.ones(column.max() + 1, bool)
    movable[column[is_core[keep]]] = False
    axis = rng.uniform(0, np.pi)
    placed = turned(tilted(turned(chosen[keep], -axis), tilt), axis + rng.uniform(0, 2 * np.pi))
    placed[:, 2] -= placed[:, 2].min()
    made = specimen(placed, np.full(len(placed), number), column, movable)
    return of_particle(made, element=element, shape="faceted", zone=zone, tilt=tilt, radius=radius)


def of_particle(made: Specimen, *, element: str, shape: str, zone: str, tilt: float, radius: float) -> Specimen:
    """A specimen whose columns belong to one particle; tilt [rad], radius [Å]."""
    row = np.zeros(1, PARTICLE_DTYPE)
    row["element"], row["shape"], row["zone"], row["radius"] = element, shape, zone, radius
    row["tilt"], row["outline"] = np.rad2deg(tilt), OUTLINE * LATTICES[element][0]
    return replace(made, particle=np.zeros(made.count, int), particles=row)


def tilted(points: np.ndarray, tilt: float) -> np.ndarray:
    """Points (n, 3) turned by an angle [rad] about an axis in the plane of the detector."""
    cos, sin = np.cos(tilt), np.sin(tilt)
    return np.asarray(points @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]).T)
