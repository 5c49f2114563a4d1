"""Processes to kill: runs, and the scheduler, nannies and workers of a site; and what a store may say meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import psutil
import xarray as xr
from zarr.errors import ZarrUserWarning

from pipeline import store
from pipeline.collect import TABLES
from schemas.errors import SchemaError
from tests import e2e_tools as tools

WAIT = 120.0  # s
# A process that is sent SIGABRT prints the stacks of all its threads before it ends.
SAYS_WHERE_IT_IS = {"PYTHONFAULTHANDLER": "1"}


def start(words: Iterable[object], log: Path) -> subprocess.Popen[str]:
    """A process in a session of its own, so that all that it starts can be told from what others started."""
    with log.open("a") as file:
        return subprocess.Popen(
            [*map(str, words)], env={**tools.environment(), **SAYS_WHERE_IT_IS}, text=True,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def workers_of(pid: int) -> list[psutil.Process]:
    """Dask's worker processes that a process has started and that exist now."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child)
    return found


def family(pid: int) -> list[psutil.Process]:
    """Every process of the session that a process leads, or led."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_all(processes: Iterable[psutil.Process | subprocess.Popen[str]]) -> None:
    """SIGKILL to all of them, the parents first."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


class Running:
    """A ``colonnade run`` in a session of its own, and the processes that belong to it."""

    def __init__(self, movie: Path, output: Path, settings: dict, *, cluster: str = "", workers: int = 2) -> None:
        """Start it on the scheduler at ``cluster``, or on so many local workers."""
        if not cluster:
            profile = output.parent / "profile.yaml"
            profile.write_text(f"kind: local\nworkers: {workers}\nmemory: 3.0\n")
            cluster = str(profile)
        words = [word for key, value in {**tools.QUICK, **settings}.items() for word in ("--set", f"{key}={value}")]
        self.output, self.log = output, output.parent / f"{output.name}.log"
        self._said = self.log.stat().st_size if self.log.exists() else 0
        self.process = start(tools.command("run", movie, "-o", output, "--cluster", cluster, *words), self.log)

    def workers(self) -> list[psutil.Process]:
        """Its local worker processes that exist now."""
        return workers_of(self.process.pid)

    def family(self) -> list[psutil.Process]:
        """Every process of the run's session."""
        return family(self.process.pid)

    def said(self) -> str:
        """What it has printed."""
        return self.log.read_bytes()[self._said :].decode()

    def parts(self, step: str = "*") -> list[Path]:
        """Blocks that are on disk."""
        return list((self.output / "parts").glob(f"*/{step}-*.npz"))

    def wait_for_parts(self, number: int, step: str = "*") -> None:
        """Wait until so many blocks are on disk; fail if the run ends before."""
        end = time.monotonic() + WAIT
        while len(self.parts(step)) < number:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, f"{len(self.parts(step))} of {number} blocks after {WAIT} s"
            time.sleep(0.005)

    def finish(self) -> tuple[int, str]:
        """Exit code and output of the whole command."""
        return self.process.wait(WAIT), self.said()

    def gone(self) -> list[psutil.Process]:
        """What still lives of the run some seconds after its end."""
        end = time.monotonic() + 20
        while (left := self.family()) and time.monotonic() < end:
            time.sleep(0.1)
        return left


class Site:
    """A scheduler, and nannies with a worker each: processes that are started again, as a site would, when they end."""

    def __init__(self, folder: Path, *, nannies: int = 2) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{port}"
        dask = [sys.executable, "-m", "dask"]
        quiet = ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
        worker = ["--nanny", "--nthreads", 1, "--resources", "CPU=1", "--local-directory", folder / "scratch"]
        self._commands: dict[str, list[object]] = {
            "scheduler": [*dask, "scheduler", "--host", "127.0.0.1", "--port", port, *quiet],
            **{f"nanny{index}": [*dask, "worker", self.address, *worker, *quiet] for index in range(nannies)},
        }
        self._daemons: dict[str, subprocess.Popen[str]] = {}
        self._led: list[int] = []

    def __enter__(self) -> Site:
        self.tend()
        return self

    def __exit__(self, *exc: object) -> None:
        kill_all(self._daemons.values())
        for pid in self._led:
            kill_all(family(pid))
        for daemon in self._daemons.values():
            daemon.wait(WAIT)

    def tend(self) -> None:
        """Start what is not running."""
        for name, words in self._commands.items():
            if name not in self._daemons or self._daemons[name].poll() is not None:
                self._daemons[name] = start(words, self.folder / f"{name}.log")
                self._led.append(self._daemons[name].pid)

    def processes(self, kind: str) -> list[psutil.Process | subprocess.Popen[str]]:
        """Those processes that are a scheduler, nanny or worker, and exist now."""
        alive = {name: daemon for name, daemon in self._daemons.items() if daemon.poll() is None}
        if kind == "worker":
            return [worker for daemon in alive.values() for worker in workers_of(daemon.pid)]
        return [daemon for name, daemon in alive.items() if name.startswith(kind)]


def computed_twice(output: Path) -> dict:
    """Blocks that were recorded done and then computed again with the same fingerprint; tables do not count."""
    blocks = Counter(block for block in tools.computed(output) if block[0] != "collect")
    return {block: number for block, number in blocks.items() if number > 1}


def false_values(path: Path, truth: dict[str, xr.Dataset]) -> list[str]:
    """What a run that is interrupted, or being written, says that is neither true nor "not computed"."""
    if not (path / "zarr.json").exists():
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)  # of a variable that had a folder and no metadata yet
        tree = xr.open_datatree(path, engine="zarr", consolidated=False)
    with tree:
        complete = tree.attrs.get("colonnade", {"state": "running"})["state"] == "complete"
        found = []
        for table in truth.keys() & set(tree.children):
            found += [f"/{table}/{text}" for text in _false(tree[table].to_dataset(), truth[table], table, complete)]
        return found


def _false(given: xr.Dataset, truth: xr.Dataset, table: str, complete: bool) -> list[str]:
    found = []
    fills = {variable.name: variable.fill_value for variable in TABLES[table].variables}
    for name in given.variables.keys() & truth.variables.keys():
        values, true = given[name].values, truth[name].values
        if values.shape != true.shape or values.dtype != true.dtype:
            found.append(f"{name} is {values.shape} {values.dtype}, expected {true.shape} {true.dtype}")
            continue
        wrong = ~_same(values, true)
        if not complete:  # a table that is being made has some of its values; the others read as fill values
            wrong &= ~_same(values, np.full_like(values, fills.get(name, np.nan)))
        if wrong.any():
            found.append(f"{name}: {wrong.sum()} of {wrong.size} are false, such as {values[wrong][0]!r}")
    return found


def _same(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Where two arrays are the same; NaN is the same as NaN."""
    return (values == others) | ((values != values) & (others != others))


def false_counts(path: Path, truth: np.ndarray) -> list[str]:
    """What a stack that says it is complete holds in place of the counts (time, y, x) of its source."""
    try:
        counts = store.open_stack(path).read(0, len(truth))
    except SchemaError:  # not there yet, or not complete
        return []
    return [] if np.array_equal(counts, truth) else [f"{path} holds other counts than its source"]


def stacks(processes: Iterable[psutil.Process | subprocess.Popen[str]], folder: Path) -> str:
    """End processes, those that have no children first, and return what they then write to the logs in the folder."""
    before = {log: log.stat().st_size for log in folder.glob("*.log")}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGABRT)
            process.wait(10)
    return "\n".join(f"--- {log.name}\n{log.read_bytes()[size:].decode()}" for log, size in before.items())
