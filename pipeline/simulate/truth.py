"""What a simulated frame holds besides its columns: lattice sites and outlines of particles, in pixels."""

from __future__ import annotations

import numpy as np
from ase.data import chemical_symbols
from scipy.ndimage import binary_fill_holes
from scipy.spatial import cKDTree

from pipeline.simulate.scene import Scene, members_of
from pipeline.simulate.structures.specimen import Specimen, named, turned

SITE_DTYPE = np.dtype([("site", "i4"), ("y", "f8"), ("x", "f8"), ("species", "U8")])
EVENT_DTYPE = np.dtype(
    [
        *(("kind", "U16"), ("frame", "i4"), ("column", "i4"), ("to", "i4"), ("y", "f8"), ("x", "f8")),
        *(("to_y", "f8"), ("to_x", "f8"), ("before", "U8"), ("after", "U8")),
    ]
)


def sites_of(scene: Scene, frame: int, origin: np.ndarray) -> np.ndarray:
    """Lattice sites of a sheet inside the view of one frame: a structured array (site,) of SITE_DTYPE, y, x [px].

    Every site has a row, empty ones too: Mo, 2S, 1S, 0S; C, Si, 0C. Positions are those of the lattice, free of
    vibration. What is no sheet has no sites.
    """
    spec, sites = scene.spec, scene.crystal.sites
    if sites is None:
        return np.zeros(0, SITE_DTYPE)
    place = (turned(sites.place, float(scene.angle[frame])) + scene.drift[frame]) / spec.sampling - origin
    present = scene.present(frame)
    members = members_of(scene.crystal.site[present], scene.crystal.numbers[present])
    inside = ((place >= 0) & (place <= np.array(spec.shape) - 1)).all(1)
    known = [i for i in np.flatnonzero(inside).tolist() if sites.host[i] or i in members]
    out = np.zeros(len(known), SITE_DTYPE)
    out["site"], out["y"], out["x"] = known, place[known, 0], place[known, 1]
    out["species"] = [named(members.get(i, []), int(sites.host[i]), int(sites.capacity[i])) for i in known]
    return out


def mask_of(scene: Scene, frame: int, origin: np.ndarray) -> np.ndarray:
    """Particles' labels (y, x) uint16: 1 + row among the particles, 0 where there is none.

    A particle's outline holds all within its outline distance of an atom, and what is enclosed by that; where two
    overlap in projection, the one with the nearer atom has the pixel.
    """
    spec, crystal = scene.spec, scene.crystal
    mask = np.zeros(spec.shape, np.uint16)
    if not len(crystal.particles):
        return mask
    present = scene.present(frame)
    points = turned(crystal.positions[present, :2], float(scene.angle[frame]))
    place = (points + scene.drift[frame]) / spec.sampling - origin
    nearest = np.full(spec.shape, np.inf)
    owner = crystal.particle[crystal.column[present]]
    for row, outline in enumerate(crystal.particles["outline"] / spec.sampling):
        of_this = place[owner == row]
        if not len(of_this):
            continue
        low = np.maximum(np.floor(of_this.min(0) - outline).astype(int), 0)
        high = np.minimum(np.ceil(of_this.max(0) + outline).astype(int) + 1, spec.shape)
        if (high <= low).any():
            continue
        window = tuple(slice(*edges) for edges in zip(low, high, strict=True))
        rows, cols = (np.arange(*edges) for edges in zip(low, high, strict=True))
        grid = np.stack(np.meshgrid(rows, cols, indexing="ij"), -1)
        distance = np.asarray(cKDTree(of_this).query(grid, distance_upper_bound=outline)[0])
        filled = binary_fill_holes(np.isfinite(distance))
        distance = np.where(filled & ~np.isfinite(distance), outline, distance)
        closer = filled & (distance < nearest[window])
        mask[window][closer] = row + 1
        nearest[window][closer] = distance[closer]
    return mask


def events_of(scene: Scene, origin: np.ndarray) -> np.ndarray:
    """What happens in a movie: a structured array (event,) of EVENT_DTYPE, in the order of time.

    y, x and to_y, to_x [px]: where the column is, and where it goes to, in the first frame of the new state (NaN if it
    goes nowhere). before, after: what the column's place holds; for a change of coordination how the atom is bound.
    """
    crystal, spec = scene.crystal, scene.spec
    out = np.zeros(len(scene.events), EVENT_DTYPE)
    first = np.full(crystal.count, -1)
    first[crystal.column[::-1]] = np.arange(len(crystal.column))[::-1]
    for row, event in zip(out, scene.events, strict=True):
        row["kind"], row["frame"], row["column"], row["to"] = event.kind, event.frame, event.column, event.to
        for name, column in (("", event.column), ("to_", event.to)):
            place = np.full(2, np.nan)
            if column >= 0:
                atoms = turned(crystal.positions[crystal.column == column, :2], float(scene.angle[event.frame]))
                place = (atoms.mean(0) + scene.drift[event.frame]) / spec.sampling - origin
            row[f"{name}y"], row[f"{name}x"] = place
        if event.kind == "coordination" and crystal.pushing is not None:
            bonds = ["3-fold" if crystal.pushing[first[column]] else "4-fold" for column in (event.column, event.to)]
            row["before"], row["after"] = bonds
        else:
            states = (scene.present(event.frame - 1), scene.present(event.frame))
            row["before"], row["after"] = (_held(crystal, event.column, present) for present in states)
    return out


def _held(crystal: Specimen, column: int, present: np.ndarray) -> str:
    """What the place of a column holds: its lattice site's name, or its atoms'; nothing if it is empty."""
    sites, site = crystal.sites, int(crystal.site[crystal.column == column][0])
    if sites is not None and site >= 0:
        members = crystal.numbers[(crystal.site == site) & present].tolist()
        empty = not members and not sites.host[site]
        return "" if empty else named(members, int(sites.host[site]), int(sites.capacity[site]))
    there = np.unique(crystal.numbers[(crystal.column == column) & present]).tolist()
    return "".join(chemical_symbols[number] for number in there)
