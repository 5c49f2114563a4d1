"""What a ledger tells of a movie: which blocks are done, what failed and why, and where the time went."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STEPS = ("ingest", "calibrate", "survey", "drift", "adapt", "vote", "process", "collect")
"""Order in which steps are shown; others follow as they come."""


@dataclass(frozen=True)
class BlockRecord:
    """The newest word on one block: frames [start, stop) of a step."""

    step: str
    start: int
    stop: int
    fingerprint: str
    status: str
    reason: str
    seconds: Mapping[str, float]
    device: str
    worker: str
    time: float | None

    @property
    def frames(self) -> int:
        """Frames that the block owns."""
        return self.stop - self.start


@dataclass
class History:
    """All that the records of one movie say; blocks by (step, start, stop), each as it stands now.

    ``stops``: the (step, reason) of each error that stopped the last attempt; ``read``: names of the files read so far.
    """

    movie: str
    blocks: dict[tuple[str, int, int], BlockRecord] = field(default_factory=dict)
    attempts: int = 0
    planned: dict[str, int] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    stops: list[tuple[str, str]] = field(default_factory=list)
    state: str | None = None
    reason: str = ""
    unreadable: int = 0
    read: set[str] = field(default_factory=set)

    def steps(self) -> list[str]:
        """Steps that are planned or have records, in the order of the story."""
        seen = dict.fromkeys([*self.planned, *(step for step, _, _ in self.blocks)])
        return [*(s for s in STEPS if s in seen), *(s for s in seen if s not in STEPS)]

    def current(self, step: str) -> list[BlockRecord]:
        """Blocks of a step that answer today's settings, by frame."""
        mine = [record for record in self.blocks.values() if record.step == step]
        wanted = self.fingerprints.get(step)
        return sorted((r for r in mine if wanted is None or r.fingerprint == wanted), key=lambda r: r.start)

    def problems(self) -> list[BlockRecord]:
        """Blocks that failed or were quarantined and were not done since, oldest first."""
        found = [r for step in self.steps() for r in self.current(step) if r.status in ("failed", "quarantined")]
        return sorted(found, key=lambda r: r.time or 0.0)

    def seconds(self) -> dict[tuple[str, str], float]:
        """Time spent in each part of each step [s], (step, part), summed over the blocks that are done."""
        spent: dict[tuple[str, str], float] = {}
        for step in self.steps():
            for record in self.current(step):
                for part, value in record.seconds.items() if record.status == "done" else ():
                    spent[step, part] = spent.get((step, part), 0.0) + value
        return spent

    def rate(self, step: str, *, since: float = 0.0, records: int = 50) -> float | None:
        """Frames per second that a step is done at, from its newest records; None where nothing tells.

        Blocks taken over from an earlier attempt carry no seconds and say nothing about the pace.
        """
        timed = [r for r in self.current(step) if r.status == "done" and r.seconds and (r.time or 0.0) > since]
        newest = sorted(timed, key=lambda r: r.time or 0.0)[-records:]
        span = _span(newest)
        return sum(record.frames for record in newest) / span if span else None

    def span(self) -> float | None:
        """Seconds from the start of the first block that is done to the end of the last; idle time counts."""
        done = [r for step in self.steps() for r in self.current(step) if r.status == "done" and r.time is not None]
        return _span(done)


def _span(records: Sequence[BlockRecord]) -> float | None:
    """Seconds from the beginning of the first of some blocks to the end of the last."""
    ends = [(record.time or 0.0, sum(record.seconds.values())) for record in records]
    return max(end for end, _ in ends) - min(end - spent for end, spent in ends) if ends else None


def read_history(folder: Path, movie: str, known: History | None = None) -> History:
    """The history of a movie from FOLDER/ledger/<movie>/*.jsonl; empty where there is none, damaged lines counted.

    Files never change, so a history that is ``known`` only takes up what is new.
    """
    history = known or History(movie)
    for file in sorted((folder / "ledger" / movie).glob("*.jsonl")):
        if file.name in history.read:
            continue
        history.read.add(file.name)
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                _add(history, json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                history.unreadable += 1
    return history


def movies_of(folder: Path) -> list[str]:
    """Names of the movies that have a ledger in a folder of runs."""
    return sorted(entry.name for entry in (folder / "ledger").glob("*") if entry.is_dir())


def _add(history: History, record: Mapping[str, Any]) -> None:
    kind = record["kind"]
    if kind == "block":
        block = _block(record)
        history.blocks[(block.step, block.start, block.stop)] = block
        history.attempts += 1
        history.fingerprints[block.step] = block.fingerprint
    elif kind == "deps":
        history.fingerprints[str(record["step"])] = str(record["fingerprint"])
    elif kind == "plan":  # a new attempt begins
        history.planned = {str(step): int(count) for step, count in record["blocks"].items()}
        history.fingerprints |= {str(k): str(v) for k, v in record.get("fingerprints", {}).items()}
        history.stops, history.state, history.reason = [], "started", ""
    elif kind == "redo":
        for key in [key for key in history.blocks if key[0] in record["steps"]]:
            del history.blocks[key]
    elif kind == "failure":
        history.stops.append((str(record["step"]), str(record.get("reason") or "")))
    elif kind == "movie":
        history.state, history.reason = str(record["status"]), str(record.get("reason") or "")


def _block(record: Mapping[str, Any]) -> BlockRecord:
    return BlockRecord(
        step=str(record["step"]),
        start=int(record["start"]),
        stop=int(record["stop"]),
        fingerprint=str(record.get("fingerprint", "")),
        status=str(record["status"]),
        reason=str(record.get("reason") or ""),
        seconds={str(k): float(v) for k, v in (record.get("seconds") or {}).items()},
        device=str(record.get("device") or ""),
        worker=str(record.get("worker") or ""),
        time=_epoch(record.get("time")),
    )


def _epoch(value: Any) -> float | None:
    try:
        when = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def frames_text(start: int, stop: int) -> str:
    """``frame 3`` or ``frames 3–7`` for frames [start, stop)."""
    return f"frame {start}" if stop - start == 1 else f"frames {start}–{stop - 1}"


def runs_of(indices: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Consecutive indices joined to [start, stop)."""
    start = previous = None
    for index in indices:
        if previous is not None and index == previous + 1:
            previous = index
            continue
        if start is not None and previous is not None:
            yield start, previous + 1
        start = previous = index
    if start is not None and previous is not None:
        yield start, previous + 1
