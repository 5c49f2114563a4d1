"""Amorphous films that carry particles."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from pipeline.simulate.structures.specimen import turned


def carbon(rng: np.random.Generator, *, reach: float, thickness: float, cover: float) -> np.ndarray:
    """Amorphous carbon atoms (n, 3) [Å] at 0.095 Å⁻³ over a share `cover` of the square of half-width `reach`.

    The film ends at a wavy edge that runs in a random direction; beyond it is vacuum.
    """
    count = int(4 * reach * reach * thickness * 0.095)
    points = np.column_stack([rng.uniform(-reach, reach, (count, 2)), rng.uniform(0, thickness, count)])
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    along = turned(points, angle)
    edge = reach * (2 * cover - 1) + 3 * np.sin(along[:, 1] / 11 + phase) if cover < 1 else np.inf
    points = points[along[:, 0] < edge]
    for _ in range(12):  # push apart pairs closer than a bond, as random points would cluster
        pairs = cKDTree(points).query_pairs(1.42, output_type="ndarray")
        if not len(pairs):
            break
        gap = points[pairs[:, 0]] - points[pairs[:, 1]]
        length = np.linalg.norm(gap, axis=1)[:, None] + 1e-6
        step = 0.4 * (1.42 - length) * gap / length
        np.add.at(points, pairs[:, 0], step)
        np.add.at(points, pairs[:, 1], -step)
    points[:, 2] = np.clip(points[:, 2], 0.0, thickness)
    return points
