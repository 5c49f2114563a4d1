"""A live view of what ``status`` knows, from the files alone: refreshed until there is nothing more to wait for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.results.history import History
from pipeline.results.status import FolderStatus, MovieStatus, StepStatus, as_text, duration, errors, head, status
from schemas.errors import SettingsError

ORDER = ("running", "stopped", "waiting", "quarantined", "complete")
ENDED = ("complete", "quarantined")
ERRORS_SHOWN = 5
BATCH_SECONDS = 30.0  # between two questions to a batch system: it serves others too


class Site:
    """What a batch system says of driver and workers, asked now and then: lines, and whether the driver will come."""

    def __init__(self, ask: Callable[[], tuple[list[str], bool]]) -> None:
        self._ask, self._asked = ask, -BATCH_SECONDS
        self.lines: list[str] = []
        self.expected = False

    def look(self) -> None:
        """Ask, unless that was done lately."""
        if time.monotonic() - self._asked >= BATCH_SECONDS:
            self.lines, self.expected = self._ask()
            self._asked = time.monotonic()


def watch(path: Path, console: Console, *, interval: float, ask: Callable[[], tuple[list[str], bool]]) -> None:
    """Show how far the runs are every ``interval`` seconds, until all have ended or nobody works on them.

    On a terminal one view that changes; elsewhere, as ``squeue --iterate``, the plain status again and again.
    """
    site, histories = Site(ask), dict[str, History]()
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    try:
        if live is not None:
            live.start()
        while True:
            site.look()
            found = _status(path, histories, site)
            if live is not None:
                live.update(view(found, site.lines, rows=max(3, console.height - 12)), refresh=True)
            else:
                said = [
                    f"{datetime.now():%Y-%m-%d %H:%M:%S}",
                    *site.lines,
                    as_text(found) if found else "not begun",
                    "",
                ]
                console.print("\n".join(said), markup=False)
            if is_over(found, expected=site.expected):
                return
            time.sleep(interval)
    except KeyboardInterrupt:
        return
    finally:
        if live is not None:
            live.stop()


def _status(path: Path, histories: dict[str, History], site: Site) -> FolderStatus | None:
    """How far the runs are; None while a driver that is still in a queue has not begun."""
    try:
        return status(path, histories)
    except SettingsError:
        if site.expected:
            return None
        raise


def is_over(found: FolderStatus | None, *, expected: bool) -> bool:
    """Whether nothing will change any more: all has ended, or no driver lives and none is ``expected``."""
    if found is None:
        return not expected
    alive = found.driver is not None and found.driver.alive
    return all(movie.state in ENDED for movie in found.movies) or not (alive or expected)


def view(found: FolderStatus | None, lines: Sequence[str], *, rows: int) -> RenderableType:
    """The driver, the workers, one row per movie (at most ``rows``, those that run first), and the last errors."""
    if found is None:
        return Group(*map(Text, lines), Text("not begun"))
    movies = sorted(found.movies, key=lambda movie: ORDER.index(movie.state))
    table = Table(
        "movie", "state", "step", "", "blocks", "running", "failed", "quarantined", "frames/s", "left", "until"
    )
    for movie in movies[:rows]:
        table.add_row(*_row(movie))
    if hidden := movies[rows:]:
        table.caption = f"and {len(hidden)} more"
    told = [f"{movie.name}: {line}" for movie in movies for line in errors(movie)][:ERRORS_SHOWN]
    return Group(*map(Text, (*head(found), *lines)), table, *(Text(line, "red") for line in told))


def _row(movie: MovieStatus) -> list[RenderableType]:
    name = [Text(movie.name), Text(movie.state)]
    step = _current(movie)
    if step is None:
        return [*name, Text(movie.reason[:60])]
    rate = "" if step.rate is None or step.total == 1 or movie.state != "running" else f"{step.rate:.3g}"
    left = until = ""
    if movie.remaining is not None:
        left = duration(movie.remaining)
        until = f"{datetime.now() + timedelta(seconds=movie.remaining):%a %H:%M}"
    counts = [str(n) if n else "" for n, _ in step.counts]
    texts = [f"{step.done}/{step.total}", *counts, rate, left, until]
    return [*name, Text(step.step), ProgressBar(max(1, step.total), step.done, width=16), *map(Text, texts)]


def _current(movie: MovieStatus) -> StepStatus | None:
    """The step that a movie is at: the first that is not finished, else the last."""
    unfinished = [step for step in movie.steps if not step.finished]
    return next(iter(unfinished), movie.steps[-1] if movie.steps else None)
