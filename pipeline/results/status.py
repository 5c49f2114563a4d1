"""How far the runs in a folder are, from the files alone: no scheduler is asked, any machine that sees them will do."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.ledger import is_alive
from pipeline.pulse import read_pulse
from pipeline.results.history import BlockRecord, History, frames_text, movies_of, read_history
from schemas.errors import ColonnadeError, SettingsError

_ERRORS_SHOWN = 3


@dataclass(frozen=True)
class Driver:
    """The process that a movie's lease names."""

    host: str
    pid: int
    alive: bool
    silence: float
    started: float


@dataclass(frozen=True)
class StepStatus:
    """Blocks of one step that answer today's settings. ``rate`` [frames/s] comes from the newest records."""

    step: str
    done: int
    running: int
    failed: int
    quarantined: int
    total: int
    frames: int
    rate: float | None

    @property
    def counts(self) -> tuple[tuple[int, str], ...]:
        """Blocks that are not done, by what they are instead."""
        return (self.running, "running"), (self.failed, "failed"), (self.quarantined, "quarantined")

    @property
    def finished(self) -> bool:
        """Whether all blocks are done."""
        return self.done >= self.total


@dataclass(frozen=True)
class MovieStatus:
    """One movie: ``state`` is complete, running, stopped, quarantined or waiting; ``remaining`` [s] may be unknown."""

    name: str
    state: str
    reason: str
    steps: tuple[StepStatus, ...]
    remaining: float | None
    problems: tuple[BlockRecord, ...]
    stops: tuple[tuple[str, str], ...]
    driver: Driver | None
    unreadable: int


@dataclass(frozen=True)
class FolderStatus:
    """All movies of a folder of runs, by name. ``workers``: that the driver has, if there is one and it says so."""

    folder: Path
    movies: tuple[MovieStatus, ...]
    workers: int | None = None

    @property
    def driver(self) -> Driver | None:
        """The process that works on the folder, or did."""
        return self.movies[0].driver


def status(path: str | Path, histories: dict[str, History] | None = None) -> FolderStatus:
    """How far the movies of a folder, or the movie of one run, are. Raises ``SettingsError`` where there is nothing.

    ``histories``: those read before, by movie; they are brought up to date instead of read again.
    """
    path = Path(path)
    if path.suffix == ".zarr":
        folder, names = path.parent, [path.stem]
        known = path.exists() or (folder / "ledger" / path.stem).is_dir()
    else:
        folder, runs = path, sorted(run.stem for run in path.glob("*.zarr"))
        names = sorted({*runs, *movies_of(path)})
        known = bool(names)
    if not known:
        raise SettingsError(
            f"{path} holds no run and no ledger; expected FOLDER, or FOLDER/<movie>.zarr, of `colonnade run`"
        )
    histories = {} if histories is None else histories
    driver = _driver(folder / "ledger" / "lease.json")
    pulse = read_pulse(folder / "ledger") if driver and driver.alive else None
    workers, running = pulse or (None, {})
    for name in names:
        histories[name] = read_history(folder, name, histories.get(name))
    return FolderStatus(folder, tuple(_movie(folder, histories[name], driver, running) for name in names), workers)


def _movie(
    folder: Path, history: History, driver: Driver | None, running: Mapping[tuple[str, str], int]
) -> MovieStatus:
    name = history.movie
    since = driver.started if driver and driver.alive else 0.0
    steps = tuple(_step(history, step, since, running.get((name, step), 0)) for step in history.steps())
    state = _state(folder / f"{name}.zarr", history, driver)
    return MovieStatus(
        name=name,
        state=state,
        reason=history.reason,
        steps=steps,
        remaining=_remaining(steps) if state == "running" else None,
        problems=tuple(history.problems()),
        stops=tuple(history.stops),
        driver=driver,
        unreadable=history.unreadable,
    )


def _driver(path: Path) -> Driver | None:
    try:
        holder: Mapping[str, Any] = json.loads(path.read_text())
        silence = time.time() - float(holder["heartbeat"])
        started = float(holder.get("started", 0.0))
        return Driver(str(holder["host"]), int(holder["pid"]), is_alive(holder), silence, started)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _step(history: History, step: str, since: float, running: int) -> StepStatus:
    records = history.current(step)
    count = Counter(record.status for record in records)
    frames = sum(record.frames for record in records if record.status == "done")
    total = history.planned.get(step, len(records))
    rate = history.rate(step, since=since)
    return StepStatus(step, count["done"], running, count["failed"], count["quarantined"], total, frames, rate)


def _state(run: Path, history: History, driver: Driver | None) -> str:
    if history.state in ("quarantined", "complete"):
        return history.state
    try:
        stored = store.attributes_of(run)["state"] if run.exists() else None
    except ColonnadeError:
        stored = None
    if history.state is None and stored == "complete":
        return "complete"
    alive = driver is not None and driver.alive
    ingested = (run.parent / "stacks" / run.name).exists()  # or about to be
    begun = history.attempts or history.state or stored or ingested
    if not begun:
        return "waiting"
    return "running" if alive else "stopped"


def _remaining(steps: tuple[StepStatus, ...]) -> float | None:
    """Seconds until the steps are done at the rates seen; unknown while a long step has none."""
    seconds = 0.0
    for step in steps:
        left = step.total - step.done - step.quarantined
        if left <= 0 or step.total == 1:
            continue
        if not step.rate or not step.done:
            return None
        seconds += left * (step.frames / step.done) / step.rate
    return seconds


def as_text(found: FolderStatus) -> str:
    """The driver, then a few plain lines per movie."""
    lines = head(found)
    if any(movie.state == "stopped" for movie in found.movies):
        lines.append("stopped movies continue where they stopped when the same command is given again")
    for movie in found.movies:
        lines += ["", *_movie_text(movie)]
    return "\n".join(lines)


def head(found: FolderStatus) -> list[str]:
    """How many movies are in which state, and how the driver is."""
    count = Counter(movie.state for movie in found.movies)
    states = ", ".join(f"{number} {state}" for state, number in sorted(count.items()))
    lines = [f"{found.folder}: {len(found.movies)} movie{'' if len(found.movies) == 1 else 's'}, {states}"]
    if (driver := found.driver) is not None:
        life = "alive" if driver.alive else "gone"
        workers = "" if found.workers is None else f", {found.workers} worker{'' if found.workers == 1 else 's'}"
        place = f"process {driver.pid} on {driver.host}"
        lines.append(f"driver {life}: {place}, last heartbeat {duration(driver.silence)} ago{workers}")
    return lines


def _movie_text(movie: MovieStatus) -> list[str]:
    lines = [f"{movie.name}: {movie.state}" + (f" ({movie.reason})" if movie.reason else "")]
    lines += [f"  {_step_text(step)}" for step in movie.steps]
    if movie.remaining is not None:
        end = datetime.now(UTC) + timedelta(seconds=movie.remaining)
        lines.append(f"  about {duration(movie.remaining)} left, until {end:%Y-%m-%d %H:%M} UTC")
    lines += [f"  {line}" for line in errors(movie)]
    if hidden := len(movie.problems) - _ERRORS_SHOWN if len(movie.problems) > _ERRORS_SHOWN else 0:
        lines.append(f"  and {hidden} more; `colonnade report` lists them all")
    if movie.unreadable:
        lines.append(f"  {movie.unreadable} lines of the ledger could not be read")
    return lines


def errors(movie: MovieStatus) -> list[str]:
    """What stopped the last attempt, and the newest blocks that failed or were quarantined."""
    lines = [f"stopped in {step}: {reason}" for step, reason in movie.stops[-_ERRORS_SHOWN:]]
    for record in movie.problems[-_ERRORS_SHOWN:]:
        lines.append(f"{record.status}: {record.step}, {frames_text(record.start, record.stop)}: {record.reason}")
    return lines


def _step_text(step: StepStatus) -> str:
    parts = [f"{step.step:<10}{step.done}/{step.total} block{'' if step.total == 1 else 's'}"]
    parts += [f"{n} {what}" for n, what in step.counts if n]
    if step.rate is not None and step.total > 1:
        parts.append(f"{step.rate:.3g} frames/s")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """A time span in words: 4.2 s, 3 min 20 s, 5 h 07 min."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
