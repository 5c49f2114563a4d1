"""What every family of structures returns: atoms, the columns and lattice sites they form, and who comes and goes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from ase.data import chemical_symbols
from scipy.spatial import cKDTree

PARTICLE_DTYPE = np.dtype(
    [
        *(("particle", "i4"), ("y", "f8"), ("x", "f8"), ("radius", "f8"), ("element", "U2"), ("shape", "U24")),
        *(("zone", "U8"), ("tilt", "f8"), ("outline", "f8")),
    ]
)
"""One particle: centre [Å], radius [Å], tilt [degrees] off its zone, how far its outline lies from its atoms [Å]."""


@dataclass(frozen=True)
class Sites:
    """Lattice sites of a sheet: place (site, 2) [Å] and host (site,), the number of the element that belongs there.

    host 0: a place between lattice sites, which is no site while nothing sits there. capacity (site,): atoms of a site.
    """

    place: np.ndarray
    host: np.ndarray
    capacity: np.ndarray


@dataclass(frozen=True)
class Move:
    """Something that may happen either way round: the units off leave and the units on come.

    column, to: the columns before and after, for the truth. kind: hop, or coordination where bonds change in number.
    """

    kind: str
    off: tuple[int, ...]
    on: tuple[int, ...]
    column: int
    to: int

    @property
    def back(self) -> Move:
        """The same, the other way round."""
        return Move(self.kind, self.on, self.off, self.to, self.column)

    def shifted(self, units: int, columns: int) -> Move:
        """The same, of a specimen whose units and columns follow those of others."""
        off, on = (tuple(unit + units for unit in side) for side in (self.off, self.on))
        return Move(self.kind, off, on, self.column + columns, self.to + columns)


@dataclass(frozen=True)
class Specimen:
    """A crystal: positions (atom, 3) [Å], numbers (atom,), column (atom,) index, movable (unit,) bool.

    unit (atom,): atoms of a unit come and go together; by default those of a column. absent (unit,): not there at first
    whatever happens. particle (column,): row in particles, −1 for none. site (atom,): row in sites. pushing (atom,)
    bool: too large for its site, so it pushes its neighbours outwards.
    """

    positions: np.ndarray
    numbers: np.ndarray
    column: np.ndarray
    movable: np.ndarray
    unit: np.ndarray
    absent: np.ndarray
    particle: np.ndarray
    site: np.ndarray
    particles: np.ndarray = field(default_factory=lambda: np.zeros(0, PARTICLE_DTYPE))
    sites: Sites | None = None
    moves: tuple[Move, ...] = ()
    pushing: np.ndarray | None = None

    @property
    def count(self) -> int:
        """How many columns there are, those that are absent at first included."""
        return len(self.particle)


def specimen(positions: np.ndarray, numbers: np.ndarray, column: np.ndarray, movable: np.ndarray) -> Specimen:
    """A specimen whose columns come and go as a whole, without particles or sites."""
    none = np.full(len(positions), -1)
    return Specimen(
        positions, numbers, column, movable, column, np.zeros(len(movable), bool), np.full(len(movable), -1), none
    )


def empty() -> Specimen:
    """No crystal at all."""
    return specimen(np.zeros((0, 3)), np.zeros(0, int), np.zeros(0, int), np.zeros(0, bool))


def joined(parts: list[Specimen]) -> Specimen:
    """Several particles, or parts of one, as one specimen; the particles are numbered in this order."""
    if not parts:
        return empty()
    columns, units, rows = (
        np.cumsum([0, *sizes])
        for sizes in (
            [part.count for part in parts],
            [len(part.movable) for part in parts],
            [len(part.particles) for part in parts],
        )
    )

    def chained(name: str, shift: np.ndarray | None = None) -> np.ndarray:
        values = [getattr(part, name) for part in parts]
        return np.concatenate(values if shift is None else [v + s for v, s in zip(values, shift, strict=False)])

    particles = chained("particles")
    particles["particle"] = np.arange(len(particles))
    return replace(
        parts[0], positions=chained("positions"), numbers=chained("numbers"), column=chained("column", columns),
        movable=chained("movable"), unit=chained("unit", units), absent=chained("absent"),
        particle=chained("particle", rows), site=chained("site"), particles=particles,
        moves=tuple(
            move.shifted(int(unit), int(column))
            for part, unit, column in zip(parts, units, columns, strict=False)
            for move in part.moves
        ),
    )  # fmt: skip


def moved(part: Specimen, centre: np.ndarray) -> Specimen:
    """A specimen shifted by centre (y, x) [Å]."""
    particles = part.particles.copy()
    particles["y"] += centre[0]
    particles["x"] += centre[1]
    return replace(part, positions=part.positions + np.array([*centre, 0.0]), particles=particles)


def turned(points: np.ndarray, angle: float) -> np.ndarray:
    """Points (n, 2 or 3) turned in the plane of the detector by an angle [rad]."""
    cos, sin = np.cos(angle), np.sin(angle)
    out = points.copy()
    out[:, 0] = cos * points[:, 0] - sin * points[:, 1]
    out[:, 1] = sin * points[:, 0] + cos * points[:, 1]
    return out


def grouped(points: np.ndarray) -> np.ndarray:
    """Index of the projected column of each atom; ideal lattice positions (n, 3) are grouped within 0.3 Å."""
    if not len(points):
        return np.zeros(0, int)
    pairs = cKDTree(points[:, :2]).query_pairs(0.3, output_type="ndarray")
    root = np.arange(len(points))
    for first, second in np.sort(pairs, axis=1)[np.argsort(pairs.min(1), kind="stable")] if len(pairs) else ():
        root[second] = min(root[second], root[first])
    return np.unique(root, return_inverse=True)[1].ravel()


def named(numbers: list[int], host: int, capacity: int) -> str:
    """Name of what a site holds: Mo or Si; where the lattice has pairs 2S, TeSe (heavier first) or 1S; or 0S, 0C."""
    symbols = [chemical_symbols[number] for number in sorted(numbers, reverse=True)]
    if not symbols:
        return f"0{chemical_symbols[host]}"
    if capacity == 1 and len(symbols) == 1:
        return symbols[0]
    if len(set(symbols)) == 1:
        return f"{len(symbols)}{symbols[0]}"
    return "".join(symbols)
