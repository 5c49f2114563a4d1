"""Which species a column is. One class for now: without a model every column gets the name the job states, or none."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

UNKNOWN = "unknown"


class Species(NamedTuple):
    """name (column) str, probability (column) [1], NaN where no statement is made; classes: names in a fixed order."""

    name: NDArray[np.str_]
    probability: NDArray[np.float64]
    classes: tuple[str, ...]


def assign_species(count: int, *, only: str | None) -> Species:
    """Species of count columns when no model tells them apart.

    only: the one species that the job says the movie holds; every column gets it with probability 1. None or "unknown":
    every column is "unknown", with probability NaN, since nothing was measured.
    """
    name = only or UNKNOWN
    probability = np.nan if name == UNKNOWN else 1.0
    width = f"<U{max(len(name), 1)}"
    return Species(np.full(count, name, dtype=width), np.full(count, probability), (name,))


def count_species(name: NDArray[np.str_], *, classes: tuple[str, ...]) -> NDArray[np.int64]:
    """How many columns of each class: (species_class), in the order of classes; other names are not counted."""
    return np.array([np.count_nonzero(name == one) for one in classes], dtype=np.int64)
