"""What lies under the beam in each frame of a movie, before any image is made of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pipeline.simulate import motion, structures
from pipeline.simulate.structures import SHEETS, SYMBOLS, Specimen
from schemas.errors import SettingsError

KINDS = ("nanoparticle", *SHEETS, "carbon", "vacuum")
BORDER = 4.0  # Å simulated around the view, where the periodic canvas wraps round
COLUMN_DTYPE = np.dtype(
    [("column", "i4"), ("y", "f8"), ("x", "f8"), ("atoms", "i4"), ("visible", "?"), ("species", "U8")]
)


@dataclass(frozen=True)
class MovieSpec:
    """What to simulate. Lengths in Å, energy in keV, dose in e⁻/Å² per frame, angles in degrees, times in seconds.

    kind: nanoparticle, graphene, hbn, mos2, wse2, carbon (film only) or vacuum (pure noise).
    contrast: bright or dark atoms in HRTEM; the defocus (> 0 is underfocus) is then found by a scan unless it is given.
    drift_step and drift_jitter are per frame; drift_limit bounds the drift. mtf: coefficients c0, c1, c2, c3 or None.
    thickness: particles are flattened to this along the beam, as supported ones are; much thicker gold reverses its
    contrast. hole: radius of a hole in a sheet.
    min_atoms: columns with fewer atoms are kept in the truth but not marked visible (default 3, sheets 1).
    For HAADF, dose counts the electrons that reach the detector.
    """

    kind: str = "nanoparticle"
    shape: tuple[int, int] = (256, 256)
    frames: int = 40
    sampling: float = 0.17
    mode: str = "hrtem"
    energy: float = 300.0
    dose: float = 1000.0
    frame_interval: float = 0.1
    element: str = "Au"
    zone: str = "110"
    radius: float | None = None
    thickness: float = 22.0
    particles: int = 1
    tilt: float = 0.0
    carbon: float = 6.0
    carbon_cover: float = 0.6
    carbon_walk: float = 0.1
    vibration: float = 0.05
    vacancies: float = 0.01
    dopants: float = 0.004
    hole: float = 0.0
    events: int = 6
    rotation_step: float = 0.0
    drift_step: float = 0.06
    drift_jitter: float = 0.03
    drift_limit: float = 4.0
    contrast: str = "bright"
    defocus: float | None = None
    spherical: float = -5e4
    focal_spread: float = 25.0
    angular_spread: float = 0.3
    probe: float = 0.9
    mtf: tuple[float, float, float, float] | None = None
    min_atoms: int | None = None
    counts_per_electron: float = 1.0
    offset: float = 0.0
    readout: float = 0.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, KINDS),
            ("mode", self.mode, ("hrtem", "haadf")),
            ("contrast", self.contrast, ("bright", "dark")),
        ):
            if value not in allowed:
                raise SettingsError(f"MovieSpec.{name} is {value!r}; expected one of {', '.join(allowed)}")
        for name in ("sampling", "energy", "dose", "frames", "frame_interval", "particles"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"MovieSpec.{name} is {getattr(self, name)!r}; expected a positive number")

    @property
    def field_of_view(self) -> tuple[float, float]:
        """Height and width of the view [Å]."""
        return self.shape[0] * self.sampling, self.shape[1] * self.sampling

    @property
    def still(self) -> bool:
        """Whether nothing but drift and events changes, so that one wave serves many frames."""
        return not (self.carbon_walk or self.vibration or self.rotation_step)

    @property
    def least_atoms(self) -> int:
        """Atoms that a column needs to count as visible."""
        return self.min_atoms if self.min_atoms is not None else (3 if self.kind == "nanoparticle" else 1)


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
        present = self.there[frame][crystal.column] if crystal.count else np.zeros(0, bool)
        points = structures.turned(crystal.positions, float(self.angle[frame]))
        points = (points + rng.normal(0, spec.vibration, points.shape) if spec.vibration else points)[present]
        film = self.film
        if spec.carbon_walk and frame and len(film):
            film = film + self._walk(frame)
            film[:, 2] = np.clip(film[:, 2], 0.0, spec.carbon)
        numbers = np.concatenate([crystal.numbers[present], np.full(len(film), 6)])
        column = np.concatenate([crystal.column[present], np.full(len(film), -1)])
        return np.concatenate([points, film]), numbers, column

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
    bare = spec.kind in ("vacuum", *SHEETS) or not spec.carbon
    film = (
        np.zeros((0, 3))
        if bare
        else structures.carbon(rng, reach=reach, thickness=spec.carbon, cover=spec.carbon_cover)
    )
    lift = spec.carbon + 1.0 if len(film) else 0.0
    crystal = replace(crystal, positions=crystal.positions + np.array([0.0, 0.0, lift]))
    drift = motion.drift_path(rng, spec.frames, step=spec.drift_step, jitter=spec.drift_jitter, limit=spec.drift_limit)
    angle = motion.turning(rng, spec.frames, np.deg2rad(spec.rotation_step))
    there, events = motion.presence(
        rng,
        crystal.movable,
        spec.frames,
        eligible=_well_inside(crystal, spec, np.abs(drift).max(0)),
        events=spec.events,
        at_first=0.4 if spec.kind == "nanoparticle" else 1.0,
    )
    return Scene(spec, crystal, film, drift, angle, there, events, seed)


def _well_inside(crystal: Specimen, spec: MovieSpec, reach: np.ndarray) -> np.ndarray:
    """Columns that stay in the view throughout and are thick enough to be seen."""
    if not crystal.count:
        return np.zeros(0, bool)
    thick = np.bincount(crystal.column, minlength=crystal.count)
    half = np.array(spec.field_of_view) / 2 - reach - 1.0
    far = np.zeros(crystal.count)
    np.maximum.at(far, crystal.column, (np.abs(crystal.positions[:, :2]) - half).max(1))
    return (far <= 0) & (thick >= spec.least_atoms)


def _crystal(rng: np.random.Generator, spec: MovieSpec, reach: float) -> Specimen:
    if spec.kind in SHEETS:
        dopants = spec.dopants if spec.kind == "graphene" else 0.0
        return structures.sheet(
            rng, kind=spec.kind, reach=reach, vacancies=spec.vacancies, dopants=dopants, hole=spec.hole
        )
    if spec.kind != "nanoparticle":
        return structures.empty()
    half = np.array(spec.field_of_view) / 2
    parts: list[Specimen] = []
    taken: list[np.ndarray] = []
    for _ in range(spec.particles):
        radius = spec.radius or float(min(0.34 * half.min() * 2 / np.sqrt(spec.particles), 17.0)) * rng.uniform(0.85, 1)
        part = structures.nanoparticle(
            rng,
            element=spec.element,
            zone=spec.zone,
            radius=radius,
            thickness=spec.thickness,
            tilt=np.deg2rad(spec.tilt),
        )
        centre = _free_place(rng, np.maximum(half - radius - 2, 0), taken, 2 * radius + 5, len(parts) == 0)
        if centre is None:
            break
        taken.append(centre)
        parts.append(replace(part, positions=part.positions + np.array([*centre, 0.0])))
    offsets = np.cumsum([0, *(part.count for part in parts)])
    return Specimen(
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.numbers for part in parts]),
        np.concatenate([part.column + start for part, start in zip(parts, offsets, strict=False)]),
        np.concatenate([part.movable for part in parts]),
    )


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

    y, x [px] on the detector, whose pixel (0, 0) lies `origin` [px] from the specimen's zero.
    """
    spec = scene.spec
    points, numbers, column = scene.atoms(frame)
    points, numbers, column = (a[column >= 0] for a in (points, numbers, column))
    count = np.bincount(column, minlength=scene.crystal.count)
    index = np.flatnonzero(count)
    place = np.stack([np.bincount(column, points[:, k], scene.crystal.count)[index] / count[index] for k in (0, 1)], 1)
    place = (place + scene.drift[frame]) / spec.sampling - origin
    inside = ((place >= 0) & (place <= np.array(spec.shape) - 1)).all(1)
    element = np.zeros(scene.crystal.count, int)
    element[column] = numbers
    index, place = index[inside], place[inside]
    out = np.zeros(len(index), COLUMN_DTYPE)
    out["column"], out["y"], out["x"], out["atoms"] = index, place[:, 0], place[:, 1], count[index]
    out["visible"] = count[index] >= spec.least_atoms
    pairs = spec.kind in SHEETS
    out["species"] = [
        SYMBOLS[z] + (str(n) if pairs and n > 1 else "") for z, n in zip(element[index], count[index], strict=True)
    ]
    return out
