"""Material to train species networks on: sheets with known atoms at every lattice site, and images of them.

A specimen is a sheet of `pipeline.simulate` whose lattice sites are given classes: "2S" is a site with two S, "0S" an
empty one, "TeSe" one with a Te and a Se. Focal series are made from one multislice exit wave each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.spatial import cKDTree
from torch import Tensor

from pipeline.networks import species_images as images
from pipeline.networks.species_spec import SpeciesSpec, atoms_of, lattice
from pipeline.simulate.structures.specimen import turned
from pipeline.steps.species import prepare

LABEL = 0.45  # Å around a site that belong to it
DOUBTFUL = 0.70  # Å up to which pixels are neither of the site nor of none
IGNORED = -1
CANVAS = 48  # px; canvases of waves are multiples of it


class Specimen(NamedTuple):
    """Atoms (atom, 3) [Å], y and x around the middle, with numbers (atom,); sites (site, 2) [Å], classes (site,)."""

    atoms: np.ndarray
    numbers: np.ndarray
    sites: np.ndarray
    classes: np.ndarray


class Example(NamedTuple):
    """What the network is shown (plane, y, x), labels (y, x), sites (site, 2) [px of it] and classes (site,)."""

    image: Tensor
    labels: np.ndarray
    sites: np.ndarray
    classes: np.ndarray


def specimen(spec: SpeciesSpec, rng: np.random.Generator, *, half: float) -> Specimen:
    """A sheet over a square of half-width `half` [Å], turned, strained, with foreign classes, perhaps with a hole."""
    sites, own, heights = [], [], []
    for element, places in lattice(spec.host, half).items():
        sites.append(places)
        own.append(np.full(len(places), spec.classes.index(spec.columns[element][0])))
        heights += [spec.heights(element)] * len(places)
    points, classes = np.concatenate(sites), np.concatenate(own)
    points = turned(points + rng.uniform(-2, 2, 2), rng.uniform(0, 2 * np.pi))
    points = points @ (np.eye(2) + rng.uniform(-spec.strain, spec.strain, (2, 2)))
    inside = np.flatnonzero(np.abs(points).max(1) < half)
    points, classes = points[inside], classes[inside]
    stacks = [heights[index] for index in inside]
    for element, names in spec.columns.items():
        host = np.flatnonzero(classes == spec.classes.index(spec.columns[element][0]))
        for name in names[1:]:
            low, high = spec.shares[name]
            share = np.exp(rng.uniform(np.log(max(low, 1e-4)), np.log(max(high, 1e-4)))) if high else 0.0
            classes[host[rng.random(len(host)) < share]] = spec.classes.index(name)
    keep = rng.random(len(points)) >= rng.uniform(0, spec.absent) if spec.absent else np.ones(len(points), bool)
    if rng.random() < spec.holes:
        keep &= _outside_hole(points, rng, half)
    if rng.random() < spec.vacuum:
        keep[:] = False
    points, classes = points[keep], classes[keep]
    stacks = [stack for stack, kept in zip(stacks, keep, strict=True) if kept]
    if spec.clusters and len(points):
        points, classes, stacks = _clustered(spec, rng, points, classes, stacks)
    return _filled(spec, rng, points, classes, stacks)


def _outside_hole(points: np.ndarray, rng: np.random.Generator, half: float) -> np.ndarray:
    """Which points lie outside a round hole or beyond the edge of the sheet."""
    if rng.random() < 0.5:
        centre, radius = rng.uniform(-half, half, 2), rng.uniform(2, 0.5 * half)
        return np.asarray(np.linalg.norm(points - centre, axis=1) > radius)
    angle = rng.uniform(0, 2 * np.pi)
    return np.asarray(points @ [np.cos(angle), np.sin(angle)] < rng.uniform(-0.2, 0.9) * half)


def _clustered(
    spec: SpeciesSpec, rng: np.random.Generator, points: np.ndarray, classes: np.ndarray, stacks: list[list[float]]
) -> tuple[np.ndarray, np.ndarray, list[list[float]]]:
    """Groups of foreign atoms: neighbours in pairs or triples, triples around a void, one in a double void."""
    foreign = [i for names in spec.columns.values() for i in map(spec.classes.index, names[1:])]
    bond = spec.distance / 0.7
    near = cKDTree(points).query_ball_point(points, 1.25 * bond)
    points, classes, keep = points.copy(), classes.copy(), np.ones(len(points), bool)
    for first in rng.permutation(len(points))[: rng.poisson(rng.uniform(0, spec.clusters) * len(points))]:
        around = [i for i in near[first] if i != first and keep[i]]
        kind, name = rng.integers(5), int(rng.choice(foreign))
        if not keep[first] or len(around) < 3:
            continue
        if kind == 0:  # one atom in a double void
            keep[around[0]] = False
            points[first] = points[[first, around[0]]].mean(0)
            members = [first]
        elif kind <= 2:  # three around a void, drawn towards it
            keep[first] = False
            members = around[:3]
            points[members] += rng.uniform(0.0, 0.12) * (points[first] - points[members])
        else:  # a pair or a chain of three
            members = [first, *around[: kind - 2]]
        classes[members] = name
        middle = points[members].mean(0)
        points[members] += (points[members] - middle) * (rng.uniform(0.2, 0.7) if kind > 2 else 0.0)
        points[members] += rng.normal(0, 0.08, (len(members), 2))
    # Atoms around foreign ones give way.
    pushed = np.flatnonzero(np.isin(classes, foreign) & keep)
    for index in pushed:
        apart = points - points[index]
        length = np.linalg.norm(apart, axis=1)
        moved = (length > 0.1) & (length < 2.2) & ~np.isin(classes, foreign)
        points[moved] += apart[moved] / length[moved, None] * rng.uniform(0.0, 0.3)
    return points[keep], classes[keep], [stack for stack, kept in zip(stacks, keep, strict=True) if kept]


def _filled(
    spec: SpeciesSpec, rng: np.random.Generator, points: np.ndarray, classes: np.ndarray, stacks: list[list[float]]
) -> Specimen:
    """Atoms at the sites, displaced at random as by vibration."""
    contents = [atoms_of(name) for name in spec.classes]
    numbers, rows, depths = [], [], []
    for row, (name, stack) in enumerate(zip(classes, stacks, strict=True)):
        for number, depth in zip(rng.permutation(contents[name]), rng.permutation(stack), strict=False):
            numbers.append(int(number))
            rows.append(row)
            depths.append(depth)
    atoms = np.column_stack([points[rows], np.array(depths) + 2.0]) if rows else np.zeros((0, 3))
    atoms = atoms + rng.normal(0, 1, atoms.shape) * rng.uniform(*spec.vibration)
    return Specimen(atoms, np.array(numbers, int), points, classes)


class Scene(NamedTuple):
    """A specimen, sampling [Å/px] and size [px] of its images, its waves (hrtem), its labels for the network (y, x)."""

    specimen: Specimen
    sampling: float
    size: int
    waves: Any
    labels: np.ndarray
    sites: np.ndarray


def scene(spec: SpeciesSpec, rng: np.random.Generator) -> Scene:
    """A specimen with what its images have in common."""
    sampling = float(rng.uniform(*spec.sampling_range))
    size = 2 * int(np.ceil(spec.edge / sampling / 2))
    # Few different canvases, for abTEM plans its transforms anew for each.
    canvas = CANVAS * int(np.ceil((spec.edge + 2 * images.BORDER) / sampling / CANVAS))
    made = specimen(spec, rng, half=canvas * sampling / 2)
    waves = images.exit_spectrum(made, spec.phase, rng, canvas, sampling) if spec.mode == "hrtem" else None
    grid = max(1, round(size * sampling / spec.sampling))
    sites = (made.sites / sampling + size / 2 + 0.5) * (grid / size) - 0.5
    return Scene(made, sampling, size, waves, labels(sites, made.classes, (grid, grid), spec.sampling), sites)


def recorded(spec: SpeciesSpec, one: Scene, rng: np.random.Generator, *, dose: float | None) -> np.ndarray:
    """Planes (plane, y, x) of a scene as a detector records them [electrons]; dose: of each image, None: drawn."""
    dose = float(np.exp(rng.uniform(*np.log(spec.dose)))) if dose is None else dose
    if spec.mode == "hrtem":
        return images.focal_series(one.waves, spec.phase, rng, dose=dose, sampling=one.sampling, size=one.size)
    return images.scanned(one.specimen, spec.scan, rng, size=one.size, sampling=one.sampling, dose=dose)


def example(spec: SpeciesSpec, one: Scene, rng: np.random.Generator, *, dose: float | None = None) -> Example:
    """An image of a scene as the network is shown it, and its truth."""
    planes = recorded(spec, one, rng, dose=dose)
    image = prepare(planes, sampling=one.sampling, model_sampling=spec.sampling, mode=spec.mode)
    return Example(image, one.labels, one.sites, one.specimen.classes)


def labels(sites: np.ndarray, classes: np.ndarray, shape: tuple[int, ...], sampling: float) -> np.ndarray:
    """Labels (y, x) for sites (site, 2) [px]: 1 + class near a site, 0 far from all, IGNORED between."""
    out = np.zeros(shape, np.int8)
    if len(sites):
        rows, cols = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
        distance, nearest = cKDTree(sites).query(np.stack([rows, cols], -1).reshape(-1, 2), distance_upper_bound=9.0)
        distance, nearest = distance * sampling, np.minimum(nearest, len(sites) - 1)
        flat = np.where(distance < LABEL, classes[nearest] + 1, np.where(distance < DOUBTFUL, IGNORED, 0))
        out = flat.reshape(shape).astype(np.int8)
    return out
