"""What surrounds a run that the command started: its logs, what signals do, and how to go on after a stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console

# A batch system sends TERM to every process of a job, and the shell of our driver passes its own on.
SAME_SIGNAL = 2.0  # s within which a second TERM is the first one again
CLOSING_SECONDS = 30.0  # for workers to end after a stop; then the driver leaves, and they with it


@contextmanager
def logs(folder: Path) -> Iterator[None]:
    """``user.log`` holds what matters to the user, ``debug.log`` all."""
    folder.mkdir(parents=True, exist_ok=True)
    logger, root = logging.getLogger("colonnade"), logging.getLogger()
    form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handlers = [logging.FileHandler(folder / "user.log"), logging.FileHandler(folder / "debug.log")]
    for handler, target, level in zip(handlers, (logger, root), (logging.INFO, logging.DEBUG), strict=True):
        handler.setFormatter(form)
        handler.setLevel(level)
        target.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        for handler, target in zip(handlers, (logger, root), strict=True):
            target.removeHandler(handler)
            handler.close()


class Signals:
    """First signal: stop after the tasks in flight, keeping what is done. Second signal: stop at once."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.number, self.since = 0, 0.0

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        if self.stop.is_set():  # the process is ending; a second signal must find us, not its default action
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.stop.is_set():
            if number == signal.SIGTERM == self.number and now - self.since < SAME_SIGNAL:
                return
            os._exit(128 + number)
        self.number, self.since = number, now
        self.stop.set()


def without_redo(words: list[str]) -> list[str]:
    """A command line without ``--redo STEP``: what was redone before the stop is not redone again."""
    kept = [word for i, word in enumerate(words) if word != "--redo" and words[max(0, i - 1)] != "--redo"]
    return [word for word in kept if not word.startswith("--redo=")]


@contextmanager
def resumable(again: str, signals: Signals, console: Console) -> Iterator[None]:
    """Say how to go on, before the workers are closed: that may take a while, and a user who stopped does not wait."""
    from pipeline.patience import Stopped

    try:
        yield
    except Stopped:
        code = 128 + signals.number
        console.print(f"stopped by signal {signals.number}; what is done is kept. To go on:", again, markup=False)
        closing = threading.Timer(CLOSING_SECONDS, os._exit, (code,))
        closing.daemon = True
        closing.start()
        raise typer.Exit(code) from None
    except BaseException:
        # The logs are closed when the error reaches `main`.
        logging.getLogger("colonnade").debug("the run stopped", exc_info=True)
        console.print("stopped; what is done is kept. To go on:", again, markup=False)
        raise
