"""Is what a run holds what its movie gives? Random frames computed again with another cut, and every checksum read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import blocks, plan, store
from pipeline.collect import TABLES
from pipeline.graph import single_threaded
from pipeline.ingest.to_stack import calibration_of
from pipeline.movie import Clock, Task
from pipeline.provenance import versions
from schemas.errors import SettingsError
from schemas.settings import Settings

# On another device, or with another build, the last bits of convolutions differ: what of it may reach the tables.
CLOSE = 0.02  # Å, of positions, and the part by which other values may differ


@dataclass(frozen=True)
class Verified:
    """Frames that were computed again, arrays that were read, and all that is wrong, a line each."""

    frames: int
    arrays: int
    exact: bool
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def task_of(run: Path, *, device: str) -> Task:
    """The task that made a run, from what the run says of itself. ``SettingsError`` if it is not complete."""
    said = store.attributes_of(run)
    if store.kind_of(run) != "run" or said.get("state") != "complete":
        raise SettingsError(f"{run} is no complete run; expected FOLDER/<movie>.zarr of a job that has ended")
    stack = run.parent / said["stack"]
    if not stack.exists():
        raise SettingsError(f"{run} was computed from {stack}, which is gone: nothing can be computed again from it")
    settings, opened = Settings.model_validate(said["settings"]), store.open_stack(stack)
    keys = said["plan"]["fingerprints"]
    content, facts = str(opened.attributes["content_hash"]), calibration_of(settings, opened)
    lead = str(said["models"]["denoise"].get("lead", {}).get("fingerprint", ""))
    if plan.fingerprints(plan.dependencies(settings, content, facts, lead=lead)) != keys:
        raise SettingsError(
            f"{run} was computed by another version of a step, or its stack or weights have changed since; give the "
            "command of the run again first"
        )
    parts = run.parent / "parts" / said["movie"]
    return Task(str(stack), str(run), str(parts), opened.shape[0], settings, tuple(keys.items()), device)


def verify(run: Path, *, count: int, seed: int, device: str = "cpu") -> Verified:
    """Compute `count` random cuts of a run again, here, one after the other, and read every stored chunk.

    The cuts have other lengths and beginnings than the run's blocks; the tables must not show it. With the device and
    versions of the run every value must be the same, bit for bit; otherwise positions within CLOSE Å.
    """
    task = task_of(run, device=device)
    then, now = store.attributes_of(run)["versions"], versions()
    remarks = [f"{name} was {then.get(name)}, here {now[name]}" for name in now if then.get(name) != now[name]]
    problems, arrays = [], 0
    for path in (run, Path(task.stack)):
        for name, trouble in store.read_through(path):
            arrays += 1
            problems += [f"{path.name}/{name}: {trouble}"] if trouble else []
    frames, same_device = 0, True
    if not problems:
        stored = _Stored(run)
        problems += stored.miscounted()
        for start, stop in _cuts(task, count, seed):
            part = dataclasses.replace(task, start=start, stop=stop)
            found = single_threaded(lambda one: blocks.tables_of(one, Clock())[0], part)
            same_device &= bool((stored.rows("frames", start, stop)["device"] == found["frames"]["device"]).all())
            exact = not remarks and same_device
            for table, values in found.items():
                kept = stored.rows(table, start, stop)
                problems += [
                    f"frames {start} to {stop - 1}, {text}" for text in _differences(table, kept, values, exact)
                ]
            frames += stop - start
    if not same_device:
        remarks.append("the run was computed on another device")
    return Verified(frames, arrays, not remarks, tuple(problems), tuple(remarks))


def _cuts(task: Task, count: int, seed: int) -> Iterator[tuple[int, int]]:
    """Random ranges of frames whose ends are hardly ever those of blocks."""
    dice = np.random.default_rng(seed)
    longest = max(1, min(task.frames, (task.settings.blocks.frames or 1) + 1))
    for _ in range(count):
        length = int(dice.integers(1, longest + 1))
        start = int(dice.integers(0, task.frames - length + 1))
        yield start, start + length


class _Stored:
    """The tables of a run, row ranges by frames."""

    def __init__(self, run: Path) -> None:
        with store.open_tree(run) as tree:
            self._tables = {name: tree[name].to_dataset().load() for name in TABLES}
        counts = {"columns": "column_count", "particles": "particle_count"}
        self._first = {
            table: np.concatenate([[0], np.cumsum(np.maximum(self._tables["frames"][name].values, 0))])
            for table, name in counts.items()
        }

    def miscounted(self) -> list[str]:
        """Tables that do not have as many rows as the frames say."""
        lengths = {table: self._tables[table].sizes[TABLES[table].row] for table in self._first}
        return [
            f"/{table} has {lengths[table]} rows, /frames says {int(first[-1])}"
            for table, first in self._first.items()
            if lengths[table] != first[-1]
        ]

    def rows(self, table: str, start: int, stop: int) -> dict[str, np.ndarray]:
        """The values of frames [start, stop)."""
        first = self._first.get(table)
        part = slice(start, stop) if first is None else slice(int(first[start]), int(first[stop]))
        return {
            str(name): values.values for name, values in self._tables[table].isel({TABLES[table].row: part}).items()
        }


def _differences(
    table: str, stored: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], exact: bool
) -> Iterator[str]:
    """What of newly computed rows is not as stored, a line each."""
    if lost := sorted(set(found) - set(stored)):
        yield f"/{table}: {', '.join(lost)} are computed, but not stored"
    for name in sorted(set(stored) & set(found)):
        kept = np.asarray(stored[name])
        if len(kept) != len(found[name]):
            yield f"/{table}: {len(kept)} rows are stored, {len(found[name])} computed"
            return
        if kept.dtype.kind in "OUT":
            wrong = np.array([str(a) != str(b) for a, b in zip(kept, found[name], strict=True)], dtype=bool)
            wrong &= exact or name != "device"
        else:
            fresh = found[name].astype(kept.dtype)
            limits = (0.0, 0.0)
            if not exact and kept.dtype.kind == "f":
                largest = np.max(np.abs(kept[np.isfinite(kept)]), initial=0.0)
                limits = (0.0, CLOSE) if name in ("y", "x") else (CLOSE, CLOSE * float(largest))
            wrong = ~np.isclose(kept, fresh, rtol=limits[0], atol=limits[1], equal_nan=kept.dtype.kind == "f")
        if wrong.any():
            at = int(np.flatnonzero(wrong.reshape(len(kept), -1).any(1))[0])
            text = f"{int(wrong.sum())} of {wrong.size} differ, first {kept[at]} stored, {found[name][at]} computed"
            yield f"/{table}/{name}: {text}"


def as_text(run: Path, done: Verified) -> str:
    """The outcome in words."""
    how = "bit for bit" if done.exact else f"within {CLOSE:g} Å"
    lines = [f"{run}: {done.arrays} arrays read, {done.frames} frames computed again, compared {how}"]
    lines += [f"  {text}" for text in done.remarks]
    lines += [f"  WRONG: {text}" for text in done.problems] or ["  nothing differs"]
    return "\n".join(lines)
