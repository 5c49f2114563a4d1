"""How specimens move: drift, turning, and columns that come and go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.simulate.structures.specimen import Move


@dataclass(frozen=True)
class ColumnEvent:
    """What happens: kind, the first frame of the new state, which column, and the one that it becomes (or −1).

    kind: appear, vanish, hop, or coordination (an atom that stays about where it is gets another number of bonds).
    """

    kind: str
    frame: int
    column: int
    to: int = -1


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


def hops(
    rng: np.random.Generator, there: np.ndarray, moves: Sequence[Move], *, count: int, eligible: np.ndarray
) -> tuple[ColumnEvent, ...]:
    """Let up to `count` moves happen, one in a frame, changing there (time, unit) in place; returns what happened when.

    A move is possible while all that leaves is there, all that comes is not, and neither comes or goes by itself later;
    its columns must be eligible (column,) bool.
    """
    frames = len(there)
    usable = [way for move in moves if eligible[[move.column, move.to]].all() for way in (move, move.back)]
    found = []
    times = rng.permutation(np.arange(min(2, frames - 1), max(frames - 1, 1)))[:count]
    for frame in np.sort(times[times > 0]).tolist():
        now, steady = there[frame], (there[frame:] == there[frame]).all(0)
        possible = [
            way
            for way in usable
            if now[list(way.off)].all() and not now[list(way.on)].any() and steady[[*way.off, *way.on]].all()
        ]
        if not possible:
            continue
        chosen = possible[int(rng.integers(len(possible)))]
        there[frame:, list(chosen.off)] = False
        there[frame:, list(chosen.on)] = True
        found.append(ColumnEvent(chosen.kind, frame, chosen.column, chosen.to))
    return tuple(found)
