"""What a species network is to learn: material, classes, microscope, training; and how such a file of YAML is read."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ase.data import atomic_numbers, chemical_symbols
from scipy.spatial import cKDTree

from pipeline.networks import species_images as images
from pipeline.simulate.structures.sheet import SHEETS
from schemas.errors import SettingsError

Range = tuple[float, float]


@dataclass(frozen=True)
class SpeciesSpec:
    """How to train a species network; everything follows from seed. Lengths in Å, energies in keV, doses in e⁻/Å².

    host: a sheet of simulate.structures; columns: for each element of the host the classes its sites may have, its own
    first; shares: range of the share of sites with each other class, drawn anew for every specimen (log-uniform);
    clusters: most share of sites that begin a group of foreign atoms (pairs, triples, one atom in a double vacancy);
    absent: most share of sites that are empty and of no class; holes: share of the sheets that have one or end in the
    view; vacuum: share of the views that hold nothing; sampling: of the network; sampling_range: of frames it
    may be shown. Ranges (low, high) are uniform unless said otherwise; dose is log-uniform, per image.
    """

    title: str
    host: str
    mode: str
    columns: Mapping[str, tuple[str, ...]]
    shares: Mapping[str, Range]
    seed: int
    clusters: float = 0.0
    absent: float = 0.0
    holes: float = 0.25
    vacuum: float = 0.05
    strain: float = 0.02
    sampling: float = 0.2
    sampling_range: Range = (0.1, 0.25)
    edge: float = 30.0
    scenes: int = 400
    steps: int = 1500
    batch: int = 6
    rate: float = 3e-3
    check_every: int = 250
    width: int = 8
    dilations: tuple[int, ...] = (1, 2, 4, 8, 6, 2)
    dose: Range = (200.0, 4000.0)
    vibration: Range = (0.02, 0.08)
    phase: images.Phase = field(default_factory=images.Phase)
    scan: images.Scan = field(default_factory=images.Scan)

    def __post_init__(self) -> None:
        if self.host not in SHEETS:
            raise SettingsError(f"host is {self.host!r}; expected one of {', '.join(sorted(SHEETS))}")
        if self.mode not in ("hrtem", "haadf"):
            raise SettingsError(f"mode is {self.mode!r}; expected hrtem or haadf")
        elements = {chemical_symbols[number] for number, *_ in SHEETS[self.host][1]}
        if set(self.columns) != elements:
            raise SettingsError(f"columns name {sorted(self.columns)}; {self.host} has the elements {sorted(elements)}")
        if len(self.columns) > 2:
            raise SettingsError(f"{self.host} has {len(self.columns)} elements; expected one or two")
        foreign = {name for names in self.columns.values() for name in names[1:]}
        if set(self.shares) != foreign:
            raise SettingsError(
                f"shares name {sorted(self.shares)}; expected each class that is not the host's own: {sorted(foreign)}"
            )
        for element, names in self.columns.items():
            for name in names:
                if len(atoms_of(name)) > len(self.heights(element)):
                    raise SettingsError(f"class {name!r} has more atoms than a site of {element} in {self.host}")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all classes, in the order of the network's outputs after "no site"."""
        return tuple(name for names in self.columns.values() for name in names)

    @property
    def missing(self) -> tuple[int, ...]:
        """Atoms that a site of each class lacks."""
        return tuple(
            len(self.heights(element)) - len(atoms_of(name))
            for element, names in self.columns.items()
            for name in names
        )

    @property
    def hosts(self) -> tuple[int, ...]:
        """For each class the number of the element of the host whose site it is."""
        return tuple(index for index, names in enumerate(self.columns.values()) for _ in names)

    @property
    def planes(self) -> int:
        """Images that the network takes at once."""
        return self.phase.planes if self.mode == "hrtem" else 1

    @property
    def distance(self) -> float:
        """Least distance of two sites: 0.7 of that in the host [Å]."""
        places = lattice(self.host, 4.0)
        points = np.concatenate(list(places.values()))
        distances, _ = cKDTree(points).query(points, k=[2])
        return round(0.7 * float(np.min(distances)), 3)

    def heights(self, element: str) -> list[float]:
        """z [Å] of the atoms of one site of an element of the host."""
        basis = [atom for atom in SHEETS[self.host][1] if chemical_symbols[atom[0]] == element]
        place = basis[0][1:3]
        return [atom[3] for atom in basis if atom[1:3] == place]


def atoms_of(name: str) -> list[int]:
    """Atomic numbers of a class: "2S" → [16, 16], "TeSe" → [52, 34], "0S" → []. Raises SettingsError otherwise."""
    parts = re.findall(r"(\d*)([A-Z][a-z]?)", name)
    if "".join(count + symbol for count, symbol in parts) != name or not parts:
        raise SettingsError(f"class {name!r} is no formula; expected one such as Mo, 2S, TeSe, or 0S for an empty site")
    unknown = [symbol for _, symbol in parts if symbol not in atomic_numbers]
    if unknown:
        raise SettingsError(f"class {name!r} names {unknown[0]!r}, which is no element")
    return [atomic_numbers[symbol] for count, symbol in parts for _ in range(int(count or 1))]


def lattice(host: str, half: float) -> dict[str, np.ndarray]:
    """Sites (site, 2) [Å] of each element of the host, in a square of this half-width and some more."""
    constant, basis = SHEETS[host]
    cells = int(np.ceil(1.7 * half / constant)) + 2
    grid = np.stack(np.meshgrid(*[np.arange(-cells, cells + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    vectors = constant * np.array([[1.0, 0.0], [-0.5, np.sqrt(3) / 2]])
    places: dict[str, dict[tuple[float, float], np.ndarray]] = {}
    for number, fy, fx, _ in basis:
        places.setdefault(chemical_symbols[number], {})[(fy, fx)] = (grid + np.array([fy, fx])) @ vectors
    return {element: np.concatenate(list(parts.values())) for element, parts in places.items()}


def load(path: Path) -> SpeciesSpec:
    """A specification from a YAML file whose keys are the fields of ``SpeciesSpec``.

    Raises SettingsError for keys that are none (with the nearest that is) and for values that do not fit.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(data, dict):
        raise SettingsError(f"{path} holds {type(data).__name__}; expected fields such as `host: mos2`")
    values = {key: _plain(value) for key, value in data.items()}
    for name, kind in (("phase", images.Phase), ("scan", images.Scan)):
        if isinstance(values.get(name), dict):
            values[name] = _made(kind, values[name], f"{path}: {name}")
    return _made(SpeciesSpec, values, str(path))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    """Lists as tuples, also inside mappings."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return tuple(_plain(item) for item in value) if isinstance(value, list) else value


def _made(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    known = {item.name for item in dataclasses.fields(kind)}
    problems = []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected some of: {', '.join(sorted(known))}"
            problems.append(f"{key} is no field; {hint}")
    if problems:
        raise SettingsError(f"{where}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{where}: {error}") from None
