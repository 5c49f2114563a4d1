"""Kill at random, again and again, and count what is lost by it: what scripts/soak and its tests share.

A movie is run into one output folder after the other. Every second one runs on a site's scheduler, nannies and workers,
which are started again when they have ended, the others on workers of the driver's own. While a run goes on it is read
by others; whoever is to die is killed once so many blocks are on disk; and a driver that has ended is started again,
until it is done. Then the run must equal that which nobody disturbed, bit for bit.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import xarray as xr

from pipeline.parts import read_part
from pipeline.plan import step_blocks
from pipeline.story import TASKS
from tests import e2e_tools as tools
from tests.kill_tools import Running, Site, computed_twice, false_counts, false_values, kill_all, stacks

SHAPE, FRAMES = (64, 72), 48
ONE_BY_ONE = {"blocks.frames": 1, "images.examples": 0}  # many short blocks: most kills hit one
TOGETHER = {"blocks.frames": 16, "images.examples": 0}
# Who is killed in a run on a site, and in one with workers of its own.
VICTIMS = {"site": {"worker": 5, "nanny": 6, "scheduler": 3, "driver": 1}, "local": {"worker": 3, "driver": 2}}
LONG_PAUSE, SHORT_PAUSE = 4.0, 0.3  # s
POLL = 0.03  # s
PATIENCE = 120.0  # s
SHARE_READ = 0.03  # of the looks that are taken each POLL seconds
LOST = 4  # exit code of a driver whose scheduler was killed


class Kill(NamedTuple):
    """Whom to kill once how many blocks are on disk, and how many seconds later."""

    victim: str
    blocks: int
    pause: float


def rounds(seed: int, blocks: int) -> Iterator[tuple[str, list[Kill]]]:
    """Where to run next, and whom to kill there, for ever; a movie has so many ``blocks``, all steps together."""
    dice = random.Random(seed)
    while True:
        for place, victims in VICTIMS.items():
            names = [victim for victim, number in victims.items() for _ in range(number)]
            dice.shuffle(names)
            moments = sorted(dice.randrange(blocks) for _ in names)
            # Whoever is killed at once dies in a block; some must have the time to start first, and die in that.
            early = [moment < blocks / 2 and dice.random() < 0.5 for moment in moments]
            pauses = [dice.uniform(0, LONG_PAUSE if long else SHORT_PAUSE) for long in early]
            yield place, list(map(Kill, names, moments, pauses))


@dataclass
class Report:
    """What was done, and what went wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    completed: int = 0
    reads: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    KINDS = (
        "lost blocks", "torn reads", "recomputed blocks", "hangs", "different runs", "wrong exit codes", "left behind",
    )  # fmt: skip

    def note(self, kind: str, number: int, remark: object) -> None:
        """Count something that is wrong, if there is any."""
        if number:
            self.wrong[kind] += number
            self.remarks.append(f"{kind}: {remark}")

    def table(self) -> str:
        """All of it, a line each."""
        rows: list[tuple[str, object]] = [(f"kills of a {victim}", self.kills[victim]) for victim in VICTIMS["site"]]
        rows += [("kills", self.kills.total()), ("runs completed", self.completed), ("reads", self.reads)]
        rows += [(kind, self.wrong[kind]) for kind in self.KINDS]
        rows += [
            ("seconds", f"{self.seconds:.0f}"),
            ("kills per minute", f"{60 * self.kills.total() / self.seconds:.1f}"),
        ]
        return "\n".join(f"{name:<20}{value!s:>8}" for name, value in rows)


@dataclass(frozen=True)
class Known:
    """The movie, and what is found in it when nobody disturbs."""

    movie: Path
    counts: np.ndarray
    run: Path

    @classmethod
    def make(cls, folder: Path) -> Known:
        """Simulate it, and run it in this process."""
        counts, _ = tools.lattice(SHAPE, frames=FRAMES, seed=4)
        movie = tools.write_movie(folder / "lattice.tif", counts)
        (outcome,) = tools.run_job(movie, folder / "undisturbed", **TOGETHER)
        return cls(movie, counts, outcome.path)

    @cached_property
    def tables(self) -> dict[str, xr.Dataset]:
        return tools.tables(self.run)


def soak(
    known: Known,
    folder: Path,
    *,
    kills: int,
    seed: int,
    patience: float = PATIENCE,
    say: Callable[[str], object] = print,
) -> Report:
    """Make so many kills, and let the last run come to its end."""
    begin, report = time.monotonic(), Report()
    blocks = sum(1 for step in TASKS for _ in step_blocks(step, FRAMES, ONE_BY_ONE["blocks.frames"]))
    with Site(folder) as site:
        for number, (place, planned) in enumerate(rounds(seed, blocks)):
            if (left := kills - report.kills.total()) <= 0:
                break
            before = len(report.remarks)
            Round(known, folder / f"run{number}", site if place == "site" else None, report, patience).go(
                planned[:left]
            )
            report.seconds = time.monotonic() - begin
            say(f"{report.seconds:6.0f} s  {report.kills.total():5d} kills, run{number} ({place}) is complete")
            for remark in report.remarks[before:]:
                say(remark)
    return report


MOST_DRIVERS = 60
"""More than the kills of a round and what comes of them can explain."""


class Round:
    """One output folder, from nothing until it is complete."""

    def __init__(self, known: Known, output: Path, site: Site | None, report: Report, patience: float) -> None:
        self.known, self.output, self.site, self.report, self.patience = known, output, site, report, patience
        self.drivers: list[Running] = []
        self.seen: dict[str, int] = {}
        self.dice = random.Random(output.name)

    def go(self, kills: Iterable[Kill]) -> None:
        """Start the driver again until it is done, with these kills on the way; then look at what it made."""
        pending = deque(kills)
        try:
            while self.attend(pending) != 0:
                if len(self.drivers) > MOST_DRIVERS:
                    raise AssertionError(f"{self.output}: still not done after {MOST_DRIVERS} drivers")
        finally:
            kill_all([driver.process for driver in self.drivers])
        self._compare()

    def attend(self, pending: deque[Kill]) -> int:
        """Start a driver; kill, read and watch while it runs; and return its exit code."""
        self.driver = Running(
            self.known.movie, self.output, ONE_BY_ONE, cluster=self.site.address if self.site else ""
        )  # fmt: skip
        self.drivers.append(self.driver)
        hurt: set[str] = set()
        reached, sign, moved = 0.0, None, time.monotonic()
        while (code := self.driver.process.poll()) is None:
            if self.site:
                self.site.tend()
            self._look()
            now = time.monotonic()
            if pending and len(self.seen) >= pending[0].blocks:
                reached = reached or now
                if now - reached >= pending[0].pause and self._strike(pending[0].victim):
                    hurt.add(pending.popleft().victim)
                    reached = 0.0
            if sign != (sign := (len(self.seen), len(pending))):
                moved = now
            if now - moved > self.patience:
                return self._hang()
            time.sleep(POLL)
        allowed = {0, *([-signal.SIGKILL] if "driver" in hurt else []), *([LOST] if "scheduler" in hurt else [])}
        self.report.note("wrong exit codes", code not in allowed, f"{code} after {hurt}\n{self.driver.said()[-3000:]}")
        return code

    def _strike(self, victim: str) -> bool:
        """Kill one of the kind; False if there is none at the moment."""
        if victim == "driver":
            found = [self.driver.process]
        else:
            found = self.site.processes(victim) if self.site else self.driver.workers()
        if not found:
            return False
        with suppress(psutil.NoSuchProcess):
            self.dice.choice(found).kill()
            self.report.kills[victim] += 1
            return True
        return False

    def _look(self) -> None:
        """Read what is new: each part as soon as it is there, and at random moments the stack and the tables."""
        for part in self.driver.parts():
            if self.seen.get(part.name) != (file := part.stat().st_ino):
                self.report.note("recomputed blocks", part.name in self.seen, f"{part.name} was written again")
                self.seen[part.name] = file
                self._read(lambda part=part: read_part(part) and [])
        run, rarely = self.output / "lattice.zarr", self.dice.random() < SHARE_READ
        if rarely or (run / "frames").exists():  # tables are there for the last moments of a run only
            self._read(lambda: false_values(run, self.known.tables))
        if rarely:
            self._read(lambda: false_counts(self.output / "stacks" / "lattice.zarr", self.known.counts))

    def _read(self, read: Callable[[], list[str]]) -> None:
        try:
            found = read()
        except (FileNotFoundError, KeyError):  # a table that is made anew goes away for a moment
            return
        except Exception as error:  # each codec has errors of its own
            found = [f"{type(error).__name__}: {error}"]
        self.report.reads += 1
        self.report.note("torn reads", len(found), found)

    def _hang(self) -> int:
        """Show where every process is; then all of them are gone, and the run begins again."""
        self.report.note("hangs", 1, f"nothing moved for {self.patience:g} s; {len(self.seen)} blocks are done")
        workers = self.site.processes("worker") if self.site else self.driver.workers()
        daemons = [*self.site.processes("nanny"), *self.site.processes("scheduler")] if self.site else []
        self.report.remarks.append(stacks([*workers, self.driver.process, *daemons], self.output.parent))
        kill_all([self.driver.process])
        return self.driver.process.wait()

    def _compare(self) -> None:
        note, run = self.report.note, self.output / "lattice.zarr"
        lost = self.seen.keys() - {part.name for part in self.driver.parts()}
        twice = computed_twice(self.output)
        different = tools.differences(self.known.run, run)
        left = [process for driver in self.drivers for process in driver.gone()]
        note("lost blocks", len(lost), sorted(lost))
        note("recomputed blocks", len(twice), twice)
        note("different runs", bool(different), different)
        note("left behind", len(left), left)
        note("left behind", (self.output / "ledger" / "lease.json").exists(), "the lease")
        self.report.completed += 1
