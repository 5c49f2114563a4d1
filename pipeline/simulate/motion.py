"""How specimens move: drift, turning, and columns that come and go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ColumnEvent:
    """A column that appears or vanishes: kind, the first frame of the new state, and which column."""

    kind: str
    frame: int
    column: int


def drift_path(rng: np.random.Generator, frames: int, *, step: float, jitter: float, limit: float) -> np.ndarray:
    """Drift (time, 2) [Å], zero in frame 0: a smooth walk of rms `step` per frame with white jitter on top.

    The walk turns back softly before it has gone `limit` in either direction.
    """
    velocity = rng.normal(0, step / np.sqrt(2), 2)
    position = np.zeros(2)
    path = np.zeros((frames, 2))
    for frame in range(1, frames):
        kick = rng.normal(0, 0.3 * step, 2)
        velocity = 0.9 * velocity + kick - 0.1 * step * (position / limit) ** 3 * 10
        position = np.clip(position + velocity, -limit, limit)
        path[frame] = np.clip(position + rng.normal(0, jitter, 2), -limit, limit)
    return path


def turning(rng: np.random.Generator, frames: int, step: float) -> np.ndarray:
    """Angle (time,) [rad] of a slow random walk that starts at zero; `step` [rad] is its rms per frame."""
    return np.concatenate([[0.0], np.cumsum(rng.normal(0, step, max(frames - 1, 0)))])


def presence(
    rng: np.random.Generator,
    movable: np.ndarray,
    frames: int,
    *,
    eligible: np.ndarray,
    events: int,
    at_first: float,
) -> tuple[np.ndarray, tuple[ColumnEvent, ...]]:
    """Which columns are there: (time, column) bool, and the list of what changed when.

    Fixed columns are always there; of the movable ones a share `at_first` is. Each event toggles one movable, eligible
    column for good, never one twice, and leaves at least two frames before and after where the movie is long enough.
    """
    there = np.ones((frames, len(movable)), bool)
    candidates = np.flatnonzero(movable)
    there[:, candidates] = rng.random(len(candidates)) < at_first
    candidates = np.flatnonzero(movable & eligible)
    margin = 2 if frames > 4 else 1
    if frames <= margin or not len(candidates):
        return there, ()
    chosen = rng.choice(candidates, min(events, len(candidates)), replace=False)
    found = []
    for column in chosen:
        frame = int(rng.integers(margin, max(frames - margin + 1, margin + 1)))
        there[frame:, column] = ~there[frame, column]
        found.append(ColumnEvent("appear" if there[frame, column] else "vanish", frame, int(column)))
    return there, tuple(sorted(found, key=lambda event: (event.frame, event.column)))
