"""What lies under the beam in each frame of a movie, before any image is made of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from ase.data import chemical_symbols

from pipeline.simulate import motion
from pipeline.simulate.spec import KINDS, MovieSpec
from pipeline.simulate.structures.field import field
from pipeline.simulate.structures.film import carbon
from pipeline.simulate.structures.nanoparticle import Particle, nanoparticle
from pipeline.simulate.structures.sheet import SHEETS, Defects, sheet
from pipeline.simulate.structures.silicon import pushed
from pipeline.simulate.structures.specimen import Specimen, empty, joined, moved, named, turned

__all__ = ["BORDER", "COLUMN_DTYPE", "KINDS", "MovieSpec", "Scene", "build_scene", "columns_of"]

BORDER = 4.0  # Å simulated around the view, where the periodic canvas wraps round
FIELD_RADIUS = 20.0  # Å, where a field names no radius
MOST_SMEAR = 1.2  # Å across which the atoms of a tilted column may be spread for it to count as visible
COLUMN_DTYPE = np.dtype(
    [
        *(("column", "i4"), ("y", "f8"), ("x", "f8"), ("atoms", "i4"), ("visible", "?"), ("species", "U8")),
        *(("particle", "i4"), ("site", "i4")),
    ]
)


@dataclass(frozen=True)
class Scene:
    """A specimen in motion: crystal, film (atom, 3) [Å], drift (time, 2) [Å], angle (time,) [rad], presence, events."""

    spec: MovieSpec
    crystal: Specimen
    film: np.ndarray
    drift: np.ndarray
    angle: np.ndarray
    there: np.ndarray
    events: tuple[motion.ColumnEvent, ...]
    seed: int

    def atoms(self, frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions (atom, 3) [Å] without drift, numbers (atom,), column (atom,) (−1: film) of one frame."""
        spec, crystal = self.spec, self.crystal
        rng = np.random.default_rng([self.seed, 11, frame])
        present = self.present(frame)
        points = turned(crystal.positions, float(self.angle[frame]))
        if crystal.pushing is not None:
            points = points + pushed(points, crystal.pushing & present)
        points = (points + rng.normal(0, spec.vibration, points.shape) if spec.vibration else points)[present]
        film = self.film
        if spec.carbon_walk and frame and len(film):
            film = film + self._walk(frame)
            film[:, 2] = np.clip(film[:, 2], 0.0, spec.carbon)
        numbers = np.concatenate([crystal.numbers[present], np.full(len(film), 6)])
        column = np.concatenate([crystal.column[present], np.full(len(film), -1)])
        return np.concatenate([points, film]), numbers, column

    def present(self, frame: int) -> np.ndarray:
        """Which atoms of the crystal are there in a frame, (atom,) bool."""
        return np.asarray(self.there[frame][self.crystal.unit])

    @cached_property
    def smear(self) -> np.ndarray:
        """How far the atoms of each column are spread in projection (column,) [Å], as they are where it is tilted."""
        crystal = self.crystal
        count = np.maximum(np.bincount(crystal.column, minlength=crystal.count), 1)
        middle = np.stack([np.bincount(crystal.column, crystal.positions[:, k], crystal.count) for k in (0, 1)], 1)
        off = np.linalg.norm(crystal.positions[:, :2] - (middle / count[:, None])[crystal.column], axis=1)
        far = np.zeros(crystal.count)
        np.maximum.at(far, crystal.column, off)
        return 2 * far

    def _walk(self, frame: int) -> np.ndarray:
        """How far film atoms have gone by this frame: white steps, summed over at most the last 64 frames."""
        total = np.zeros_like(self.film)
        for past in range(max(1, frame - 63), frame + 1):
            total += np.random.default_rng([self.seed, 12, past]).normal(0, self.spec.carbon_walk, total.shape)
        return total


def build_scene(spec: MovieSpec, seed: int) -> Scene:
    """The specimen and its motion; the same spec and seed give the same scene."""
    rng = np.random.default_rng([seed, 1])
    reach = max(spec.field_of_view) / 2 + BORDER + spec.drift_limit
    crystal = _crystal(rng, spec, reach)
    bare = spec.kind in ("vacuum", "field", *SHEETS) or not spec.carbon
    film = np.zeros((0, 3)) if bare else carbon(rng, reach=reach, thickness=spec.carbon, cover=spec.carbon_cover)
    lift = spec.carbon + 1.0 if len(film) else 0.0
    crystal = replace(crystal, positions=crystal.positions + np.array([0.0, 0.0, lift]))
    drift = motion.drift_path(rng, spec.frames, step=spec.drift_step, jitter=spec.drift_jitter, limit=spec.drift_limit)
    angle = motion.turning(rng, spec.frames, np.deg2rad(spec.rotation_step))
    eligible = _well_inside(crystal, spec, np.abs(drift).max(0))
    thick = np.bincount(crystal.column, minlength=crystal.count) >= spec.least_atoms
    there, events = motion.presence(
        rng,
        crystal.movable,
        spec.frames,
        eligible=_units(crystal, eligible & thick),
        events=spec.events,
        at_first={"nanoparticle": 0.4, "field": 0.9}.get(spec.kind, 1.0),
    )
    there[:, crystal.absent] = False
    column = np.zeros(len(crystal.movable), int)
    column[crystal.unit] = crystal.column
    events = tuple(replace(event, column=int(column[event.column])) for event in events)
    if spec.hops:
        hopping = np.random.default_rng([seed, 4])
        hops = motion.hops(hopping, there, crystal.moves, count=spec.hops, eligible=eligible)
        events = tuple(sorted((*events, *hops), key=lambda event: (event.frame, event.column)))
    return Scene(spec, crystal, film, drift, angle, there, events, seed)


def _units(crystal: Specimen, columns: np.ndarray) -> np.ndarray:
    """Which units (unit,) lie in columns (column,) of which something is true."""
    of_unit = np.zeros(len(crystal.movable), bool)
    of_unit[crystal.unit] = columns[crystal.column]
    return of_unit


def _well_inside(crystal: Specimen, spec: MovieSpec, reach: np.ndarray) -> np.ndarray:
    """Columns that stay in the view throughout."""
    half = np.array(spec.field_of_view) / 2 - reach - 1.0
    far = np.zeros(crystal.count)
    np.maximum.at(far, crystal.column, (np.abs(crystal.positions[:, :2]) - half).max(1))
    return np.asarray(far <= 0)


def _crystal(rng: np.random.Generator, spec: MovieSpec, reach: float) -> Specimen:
    if spec.kind in SHEETS:
        defects = Defects(
            vacancies=spec.vacancies, dopants=spec.dopants if spec.kind == "graphene" else 0.0, hole=spec.hole,
            double_vacancies=spec.double_vacancies, substitutions=spec.substitutions,
            metal_substitutions=spec.metal_substitutions, groups=spec.groups, atomwise=spec.atomwise,
            mobile=spec.hops > 0,
        )  # fmt: skip
        return sheet(rng, kind=spec.kind, reach=reach, defects=defects)
    half = np.array(spec.field_of_view) / 2
    if spec.kind == "field":
        radius = spec.radius or FIELD_RADIUS
        return field(
            rng, element=spec.element, shapes=spec.shapes, count=spec.particles, radius=radius,
            size_spread=spec.size_spread, half=half + radius, gap=spec.gap,
        )  # fmt: skip
    if spec.kind != "nanoparticle":
        return empty()
    parts: list[Specimen] = []
    taken: list[np.ndarray] = []
    tilts = spec.tilts or (spec.tilt,) * spec.particles
    for index in range(spec.particles):
        radius = spec.radius or float(min(0.34 * half.min() * 2 / np.sqrt(spec.particles), 17.0)) * rng.uniform(0.85, 1)
        plan = Particle(
            spec.element, radius, spec.thickness, zone=spec.zone, tilt=np.deg2rad(tilts[index]),
            shape=spec.shapes[0 if len(spec.shapes) == 1 else int(rng.integers(len(spec.shapes)))],
            vacancies=spec.particle_vacancies, adatoms=spec.adatoms, mobile=spec.hops > 0,
        )  # fmt: skip
        part = nanoparticle(rng, plan)
        centre = _free_place(rng, np.maximum(half - radius - 2, 0), taken, 2 * radius + 5, len(parts) == 0)
        if centre is None:
            break
        taken.append(centre)
        parts.append(moved(part, centre))
    return joined(parts)


def _free_place(
    rng: np.random.Generator, room: np.ndarray, taken: list[np.ndarray], distance: float, first: bool
) -> np.ndarray | None:
    for _ in range(200):
        place = rng.uniform(-room, room) * (0.5 if first else 1.0)
        if all(np.linalg.norm(place - other) >= distance for other in taken):
            return place
    return None


def columns_of(scene: Scene, frame: int, origin: np.ndarray) -> np.ndarray:
    """Truth of one frame: a structured array (column,) of COLUMN_DTYPE with the columns inside the view.

    y, x [px] on the detector, whose pixel (0, 0) lies `origin` [px] from the specimen's zero. particle: its row among
    the particles; site: the lattice site; −1 where there is none.
    """
    spec, crystal = scene.spec, scene.crystal
    if spec.kind == "field":
        return np.zeros(0, COLUMN_DTYPE)
    points, numbers, column = scene.atoms(frame)
    points, numbers, column = (a[column >= 0] for a in (points, numbers, column))
    count = np.bincount(column, minlength=crystal.count)
    index = np.flatnonzero(count)
    place = np.stack([np.bincount(column, points[:, k], crystal.count)[index] / count[index] for k in (0, 1)], 1)
    place = (place + scene.drift[frame]) / spec.sampling - origin
    inside = ((place >= 0) & (place <= np.array(spec.shape) - 1)).all(1)
    index, place = index[inside], place[inside]
    out = np.zeros(len(index), COLUMN_DTYPE)
    out["column"], out["y"], out["x"], out["atoms"] = index, place[:, 0], place[:, 1], count[index]
    out["visible"] = (count[index] >= spec.least_atoms) & (scene.smear[index] <= MOST_SMEAR)
    site = np.full(crystal.count, -1)
    site[crystal.column] = crystal.site
    out["particle"], out["site"] = crystal.particle[index], site[index]
    out["species"] = _species(scene, numbers, column, index)
    return out


def _species(scene: Scene, numbers: np.ndarray, column: np.ndarray, index: np.ndarray) -> list[str]:
    """What the columns of the given indices are: the element, or what a lattice site of several atoms is called."""
    crystal = scene.crystal
    if crystal.sites is None:
        element = np.zeros(crystal.count, int)
        element[column] = numbers
        return [chemical_symbols[number] for number in element[index]]
    site = np.zeros(crystal.count, int)
    site[crystal.column] = crystal.site
    members = members_of(column, numbers)
    return [named(members[i], 0, int(crystal.sites.capacity[site[i]])) for i in index]


def members_of(index: np.ndarray, numbers: np.ndarray) -> dict[int, list[int]]:
    """Numbers of the atoms (atom,) that share an index (atom,)."""
    members: dict[int, list[int]] = {}
    for where, number in zip(index.tolist(), numbers.tolist(), strict=True):
        members.setdefault(where, []).append(number)
    return members
