"""Columns of few atoms beside the rim of a particle, and the places beside them where they may hop to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.spatial import cKDTree

from pipeline.simulate.structures.shapes import LATTICES
from pipeline.simulate.structures.specimen import Move, Specimen, empty, grouped, specimen

DEEPEST = 3  # most atoms of a column of adatoms


def adatoms(
    rng: np.random.Generator, crystal: Specimen, places: np.ndarray, *, element: str, count: int, mobile: bool
) -> Specimen:
    """Up to `count` columns of 1 to 3 adatoms at some of the free lattice places (n, 3), seen along the columns.

    Mobile ones may hop to places within a lattice constant, whose columns are listed but absent at first.
    """
    constant, number = LATTICES[element]
    # What is above or below a column of the crystal only makes it longer.
    places = places[cKDTree(crystal.positions[:, :2]).query(places[:, :2])[0] > 0.3]
    if not len(places):
        return empty()
    group = grouped(places)
    middle = np.stack([np.bincount(group, places[:, k]) for k in (0, 1)], 1) / np.bincount(group)[:, None]
    chosen = _apart(rng, middle, count, constant)
    listed = np.asarray(cKDTree(middle[chosen]).query(middle)[0] < (constant if mobile else 1e-6))
    atoms = np.concatenate([_few(rng, np.flatnonzero(group == i), places[:, 2]) for i in np.flatnonzero(listed)])
    column = (np.cumsum(listed) - 1)[group[atoms]]
    made = specimen(places[atoms], np.full(len(atoms), number), column, np.zeros(listed.sum(), bool))
    middle = middle[listed]
    pairs = cKDTree(middle).query_pairs(constant) if mobile else ()
    moves = tuple(Move("hop", (a,), (b,), a, b) for a, b in sorted((int(a), int(b)) for a, b in pairs))
    absent = ~np.isin(np.flatnonzero(listed), chosen)
    return replace(made, absent=absent, particle=np.zeros(made.count, int), moves=moves)


def _few(rng: np.random.Generator, members: np.ndarray, z: np.ndarray) -> np.ndarray:
    """One to three neighbours along the beam among the members of a column."""
    members = members[np.argsort(z[members], kind="stable")]
    size = min(int(rng.integers(1, DEEPEST + 1)), len(members))
    start = int(rng.integers(len(members) - size + 1))
    return members[start : start + size]


def _apart(rng: np.random.Generator, places: np.ndarray, count: int, distance: float) -> list[int]:
    """Up to `count` of the places (n, 2), in random order, no two nearer than `distance`."""
    chosen: list[int] = []
    for index in rng.permutation(len(places)).tolist():
        if len(chosen) < count and all(np.linalg.norm(places[index] - places[i]) >= distance for i in chosen):
            chosen.append(index)
    return chosen
