"""Many particles on a film, as seen at low magnification: of all sizes, shapes and orientations, some touching."""

from __future__ import annotations

import numpy as np

from pipeline.simulate.structures.nanoparticle import Particle, solid
from pipeline.simulate.structures.specimen import Specimen, empty, joined, moved

TRIES = 60  # places tried for one particle before it is left out


def field(
    rng: np.random.Generator, *, element: str, shapes: tuple[str, ...], count: int, radius: float, size_spread: float,
    half: np.ndarray, gap: float,
) -> Specimen:  # fmt: skip
    """Up to `count` particles of log-normal radius (median [Å], spread of its logarithm) within half (y, x) [Å].

    gap: least distance of their spheres [Å]; negative lets them overlap in projection. Middles lie anywhere within
    `half`, so that particles near the edge are cut. A particle is one unit; its atoms form no columns.
    """
    parts: list[Specimen] = []
    places, radii = np.zeros((0, 2)), np.zeros(0)
    for _ in range(count):
        size = float(radius * np.exp(np.clip(rng.normal(0, size_spread), -2, 2) if size_spread else 0.0))
        place = _free(rng, places, radii + size + gap, half)
        if place is None:
            continue
        shape = shapes[int(rng.integers(len(shapes)))]
        plan = Particle(element, size, 2 * size * rng.uniform(0.6, 1.0), zone="random", shape=shape)
        part = solid(rng, plan)
        parts.append(moved(part, place))
        places, radii = np.vstack([places, place]), np.append(radii, size)
    return joined(parts) if parts else empty()


def _free(rng: np.random.Generator, places: np.ndarray, distances: np.ndarray, half: np.ndarray) -> np.ndarray | None:
    for _ in range(TRIES):
        place = rng.uniform(-half, half)
        if (np.linalg.norm(places - place, axis=1) >= distances).all():
            return np.asarray(place)
    return None
