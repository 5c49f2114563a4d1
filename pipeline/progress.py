"""Progress of a run: bars on a terminal, a plain line now and then where there is none."""

from __future__ import annotations

import sys
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

STEPS = {
    "simulate": "simulate",
    "ingest": "ingest",
    "calibrate": "survey: detector",
    "survey": "survey: drift of pairs",
    "drift": "prepare: drift path",
    "adapt": "prepare: denoiser",
    "vote": "prepare: contrast",
    "process": "process",
    "collect": "collect",
}
PLAIN_SECONDS = 10.0


class Bars:
    """One bar per movie that is being worked on."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("[bold]{task.fields[movie]}"), TextColumn("{task.description}"), BarColumn(),
            MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def begin(self, movie: str, step: str, frames: int) -> None:
        """Start a step's bar in the movie's line."""
        with self._lock:
            if movie not in self._tasks:
                self._tasks[movie] = self._bars.add_task("", total=frames, movie=movie)
            self._bars.reset(self._tasks[movie], total=frames, description=STEPS[step])

    def advance(self, movie: str, step: str, frames: int) -> None:
        """Move the bar."""
        with self._lock:
            if movie in self._tasks:
                self._bars.advance(self._tasks[movie], frames)


class Lines:
    """Plain lines for logs: one when a step begins, and one every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._done: dict[tuple[str, str], tuple[int, int]] = {}
        self._said: dict[str, float] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def begin(self, movie: str, step: str, frames: int) -> None:
        """Say that a step begins."""
        with self._lock:
            self._done[(movie, step)] = (0, frames)
            self._said[movie] = time.monotonic()
        self._console.print(f"{movie}: {STEPS[step]}", highlight=False)

    def advance(self, movie: str, step: str, frames: int) -> None:
        """Say how far a step is, if it was quiet for a while."""
        with self._lock:
            done, total = self._done[(movie, step)]
            self._done[(movie, step)] = (done + frames, total)
            quiet = time.monotonic() - self._said[movie] > PLAIN_SECONDS
            if quiet:
                self._said[movie] = time.monotonic()
        if quiet:
            self._console.print(f"{movie}: {STEPS[step]} {done + frames}/{total} frames", highlight=False)


def display(console: Console) -> Bars | Lines:
    """Bars on a terminal, lines elsewhere."""
    return Bars(console) if console.is_terminal and sys.stderr.isatty() else Lines(console)
