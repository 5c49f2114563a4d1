"""As many worker jobs of a batch system as were asked for, for as long as a run takes.

dask-jobqueue replaces no worker that died, never notices a job that was cancelled while it waited, and only logs a
refused one; so the batch system is asked, and what is missing is submitted again.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.batch import COMMAND_SECONDS, alive, cancel, states_of, step_command, submit, worker_script
from schemas.errors import ResourceError
from schemas.profiles import Profile

log = logging.getLogger("colonnade")

# So many jobs in a row that ended without their worker ever calling are no bad luck.
FAILURES = 4
DRIVER_FILE, WORKERS_FILES = "driver.json", ("workers.json", "workers-cpu.json")
GONE_SECONDS = 60.0  # s without a word after which a worker's job counts as ended, where the batch system is not asked


@dataclass
class Worker:
    """One job: what the batch system says of it, and whether its worker has called."""

    job: str
    submitted: float
    state: str = "PENDING"
    reason: str = ""
    called: bool = False
    seen: float = 0.0


@dataclass
class Pool:
    """As many worker jobs as the profile asks for, until it is closed; one thread watches.

    folder: where its scripts, logs and ``state.json`` go, for ``colonnade status`` and ``colonnade cancel``.
    names: the names of the workers that the scheduler knows, which are the numbers of their jobs.
    file: name of its state file.
    """

    profile: Profile
    scheduler: str
    folder: Path
    settings: str
    names: Callable[[], Collection[str]]
    file: str = WORKERS_FILES[0]
    workers: dict[str, Worker] = field(default_factory=dict)
    ended: int = 0
    failures: int = 0
    refused: str = ""

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="batch-pool", daemon=True)

    @property
    def wanted(self) -> int:
        """Worker jobs to keep."""
        return self.profile.workers or 1

    def start(self) -> None:
        """Submit the first jobs; raises ``ResourceError`` if they are refused."""
        for _ in range(self.wanted):
            self._submit()
        self._write()
        self._thread.start()

    def close(self) -> None:
        """Cancel all jobs and stop watching; jobs that cannot be cancelled stay in the state file, and are named."""
        self._stop.set()
        self._cancel()  # first, since the thread may be waiting for an answer
        if self._thread.is_alive():
            self._thread.join(2 * COMMAND_SECONDS)
        self._cancel()
        with suppress(OSError):  # a full disk must not hide why the run ended
            self._write()

    def _cancel(self) -> None:
        with self._lock:
            known = list(self.workers)
        try:
            cancel(self.profile, known)
        except ResourceError as error:
            log.error("jobs %s could not be cancelled: %s", ", ".join(known), error)
            return
        with self._lock:
            for job in known:  # one that ended meanwhile may be gone
                self.workers.pop(job, None)

    def reasons(self) -> str:
        """What the batch system says of the jobs, in words."""
        with self._lock:
            said = sorted({f"{w.state} ({w.reason})" if w.reason else w.state for w in self.workers.values()})
        text = f"{len(self.workers)} job(s) of {self.profile.kind}: {', '.join(said) or 'none left'}"
        text += f"; {self.ended} ended" if self.ended else ""
        text += f"; refused: {self.refused}" if self.refused else ""
        return f"{text}; their logs are in {self.folder / 'logs'}"

    def _submit(self) -> None:
        script = worker_script(
            self.profile, scheduler=self.scheduler, logs=self.folder / "logs", settings=self.settings
        )
        job = submit(self.profile, script, self.folder)
        with self._lock:
            self.workers[job] = Worker(job, time.time())  # closing looks here once more after this thread

    def _watch(self) -> None:
        while not self._stop.wait(self.profile.batch.poll):
            try:
                self._look()
            except Exception:  # the night must not end because a question was answered oddly
                log.exception("looking after the worker jobs failed; trying again")

    def _look(self) -> None:
        states, names, now = states_of(self.profile, list(self.workers)), set(self.names()), time.time()
        with self._lock:
            for worker in self.workers.values():
                if worker.job in names:
                    worker.called, worker.seen = True, now
                    worker.state = "RUNNING" if states is None else worker.state
                if states is not None and worker.job in states:
                    worker.state, worker.reason = states[worker.job]
            gone = [] if self._stop.is_set() else [w for w in self.workers.values() if self._has_ended(w, states, now)]
            for worker in gone:
                del self.workers[worker.job]
                self.ended += 1
                self.failures = 0 if worker.called else self.failures + 1
        for worker in gone:
            log.warning("worker job %s has ended%s", worker.job, "" if worker.called else " before its worker called")
        if states is None and gone:  # silent, but perhaps not dead: two would be one too many
            with suppress(ResourceError):
                cancel(self.profile, [worker.job for worker in gone])
        if self.failures < FAILURES:
            try:
                while len(self.workers) < self.wanted and not self._stop.is_set():
                    self._submit()
                self.refused = ""
            except ResourceError as error:
                self.refused = str(error)
                log.warning("no new worker: %s; trying again", error)
        elif gone:
            log.error("%d worker jobs in a row ended before their worker called; no more are submitted", self.failures)
        self._write()

    def _has_ended(self, worker: Worker, states: Mapping[str, tuple[str, str]] | None, now: float) -> bool:
        """By the batch system's word; where none can be had, by the silence of a worker that had called."""
        if states is not None:
            return not alive(states.get(worker.job))
        return (
            self.profile.kind != "slurm"
            and worker.called
            and now - worker.seen > max(GONE_SECONDS, 3 * self.profile.batch.poll)
        )

    def _write(self) -> None:
        state = {
            "kind": self.profile.kind,
            "resources": ", ".join(self.profile.resources),
            "wanted": self.wanted,
            "workers": [asdict(worker) for worker in self.workers.values()],
            "ended": self.ended,
            "refused": self.refused,
            "updated": time.time(),
        }
        write_state(self.folder / self.file, state)


@dataclass
class Step:
    """All workers as one step of the job that this process runs in, where jobs may submit no jobs."""

    profile: Profile
    scheduler: str
    folder: Path
    settings: str
    _process: subprocess.Popen[bytes] | None = None

    @property
    def failures(self) -> int:
        """Many, once the step has ended: nothing will start it again within this job."""
        return 0 if self._process is None or self._process.poll() is None else FAILURES

    def start(self) -> None:
        """Start the workers; raises ``ResourceError`` outside of a job."""
        if "SLURM_JOB_ID" not in os.environ:
            raise ResourceError(
                "batch.one_allocation starts workers inside a Slurm job, and this is none; use `colonnade submit`"
            )
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DASK_INTERNAL_INHERIT_CONFIG": self.settings}
        with (self.folder / "logs" / "workers.log").open("ab") as file:
            self._process = subprocess.Popen(
                step_command(self.profile, self.scheduler), env=environment, stdout=file, stderr=file
            )

    def close(self) -> None:
        """End the workers."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def reasons(self) -> str:
        """How the step is, in words."""
        code = None if self._process is None else self._process.poll()
        state = "runs" if code is None else f"ended with {code}"
        return f"the step of the workers {state}; its log is {self.folder / 'logs' / 'workers.log'}"


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Replace a small JSON file in one step; whoever reads it sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    fresh.write_text(json.dumps(state))
    fresh.replace(path)


def read_state(path: Path) -> dict[str, Any]:
    """A small JSON file, empty if there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def is_queued(folder: Path) -> bool:
    """Whether the batch system still has the driver's job: it runs, waits, or waits to come back."""
    if not (driver := read_state(folder / DRIVER_FILE)):
        return False
    states = states_of(Profile(kind=driver["kind"]), [driver["job"]])
    return states is not None and driver["job"] in states  # also while it ends: it may be requeueing itself


def describe(folder: Path) -> list[str]:
    """Lines on the driver and the workers, from the files beside the runs and, if it can be asked, the batch system."""
    lines = []
    driver, *pools = (read_state(folder / name) for name in (DRIVER_FILE, *WORKERS_FILES))
    known = [state for state in (driver, *pools) if state]
    jobs = [
        state["job"] for state in (driver, *(worker for pool in pools for worker in pool.get("workers", []))) if state
    ]
    states = states_of(Profile(kind=known[0]["kind"]), jobs) if known else None
    if driver:
        state = (
            "not asked" if states is None else " ".join(filter(None, states.get(driver["job"], ("no longer queued",))))
        )
        lines.append(f"driver job {driver['job']} of {driver['kind']}: {state}")
    for pool in filter(None, pools):
        workers = [(worker["state"], worker["reason"]) for worker in pool["workers"]]
        if states is not None:  # a driver that was killed cannot have noted what became of its workers
            workers = [states.get(worker["job"], ("gone", "")) for worker in pool["workers"]]
        count = Counter(state.lower() for state, _ in workers)
        said = ", ".join(f"{number} {state}" for state, number in sorted(count.items())) or "none"
        age = time.time() - pool["updated"]
        kind = f"workers with {pool['resources']}" if len(list(filter(None, pools))) > 1 else "workers"
        lines.append(f"{kind}: {said} of {pool['wanted']} wanted, {pool['ended']} ended, as of {age:.0f} s ago")
        reasons = {reason for state, reason in workers if state == "PENDING"} - {""}
        lines += [f"waiting for: {', '.join(sorted(reasons))}"] if reasons else []
        lines += [f"refused: {pool['refused']}"] if pool["refused"] else []
    return lines
