"""Shapes of metal clusters: cut from the face-centred cubic lattice, or twinned five- or twentyfold (by ASE)."""

from __future__ import annotations

import numpy as np
from ase.cluster import Decahedron, Icosahedron

from schemas.errors import SettingsError

LATTICES = {  # face-centred cubic metals: lattice constant [Å] and atomic number
    "Au": (4.078, 79),
    "Pt": (3.924, 78),
    "Ag": (4.086, 47),
    "Pd": (3.891, 46),
    "Cu": (3.615, 29),
    "Ni": (3.524, 28),
}
# Distance of the {100} and {111} planes from the centre, for corners at distance 1; None: any, drawn for each particle.
CUT: dict[str, tuple[float, float] | None] = {
    "faceted": None,
    "sphere": (1.0, 1.0),
    "cuboctahedron": (np.sqrt(1 / 2), np.sqrt(2 / 3)),
    "truncated octahedron": (2 / np.sqrt(5), 3 / np.sqrt(15)),
    "octahedron": (1.0, np.sqrt(1 / 3)),
    "cube": (np.sqrt(1 / 3), 1.0),
}
TWINNED = ("icosahedron", "decahedron")
SHAPES = (*CUT, *TWINNED)


def lattice(constant: float, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Points (n, 3) [Å] of a face-centred cubic lattice, at a random place of its cell, in a cube around a sphere."""
    reach = int(np.ceil(radius / constant)) + 1
    cells = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    return np.asarray((cells[:, None] + basis).reshape(-1, 3) * constant + rng.uniform(-0.5, 0.5, 3) * constant)


def planes_of(shape: str, rng: np.random.Generator) -> np.ndarray:
    """Distances (2,) of the {100} and {111} facets in radii."""
    cut = CUT[shape]
    return np.array([rng.uniform(0.78, 1.0), rng.uniform(0.82, 1.0)] if cut is None else cut)


def inside(points: np.ndarray, radius: float, facets: np.ndarray) -> np.ndarray:
    """Which points (n, 3) lie in a sphere cut by {100} and {111} planes at facets[0] and facets[1] times the radius."""
    cube = np.abs(points)
    round_off = np.linalg.norm(points, axis=1) <= radius
    limits = (cube.max(1) <= facets[0] * radius) & (cube.sum(1) / np.sqrt(3) <= facets[1] * radius)
    return np.asarray(round_off & limits)


def twinned(shape: str, element: str, radius: float) -> np.ndarray:
    """Atoms (n, 3) [Å] of a multiply twinned cluster about its centre; a decahedron's fivefold axis lies along z."""
    constant, _ = LATTICES[element]
    near = constant / np.sqrt(2)
    if shape == "icosahedron":
        cluster = Icosahedron(element, max(2, round(radius / (0.95 * near)) + 1), latticeconstant=constant)
    else:
        edge = max(2, round(radius / near))
        cluster = Decahedron(element, edge, max(1, edge // 2), 1, latticeconstant=constant)
    points = cluster.get_positions()
    return np.asarray(points - points.mean(0))


def check_shape(shape: str, element: str) -> None:
    """Raise ``SettingsError`` for a shape or element that is not known."""
    if element not in LATTICES:
        raise SettingsError(f"element is {element!r}; expected one of {sorted(LATTICES)}")
    if shape not in SHAPES:
        raise SettingsError(f"shapes holds {shape!r}; expected some of {', '.join(SHAPES)}")
