"""What a simulated frame holds besides its columns: lattice sites and outlines of particles, in pixels."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import binary_fill_holes
from scipy.spatial import cKDTree

from pipeline.simulate.scene import Scene, members_of
from pipeline.simulate.structures.specimen import named, turned

SITE_DTYPE = np.dtype([("site", "i4"), ("y", "f8"), ("x", "f8"), ("species", "U8")])


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
