"""What the tests on a real Slurm share: to ask Slurm and the disk, to disturb, to compare."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import psutil
import yaml

from cluster.pool import read_state
from pipeline import store
from tests import e2e_tools as tools

MOVIES, FRAMES, BLOCK = 12, 24, 2
BLOCKS = FRAMES // BLOCK  # of the longest step of one movie
WAIT = 240.0  # s


def profile(folder: Path, **changes) -> Path:
    """A profile of two workers on the loopback interface."""
    settings = {"queue": "main", "walltime": "00:08:00", "interface": "lo", "poll": 0.5, "driver_memory": 1.0}
    settings |= {"driver_walltime": "00:08:00", **changes.pop("batch", {})}
    path = folder / "slurm.yaml"
    facts = {"kind": "slurm", "workers": 2, "memory": 2.0, "start_timeout": 90, "batch": settings, **changes}
    path.write_text(yaml.safe_dump(facts))
    return path


# --------------------------------------------------------------------------------------- what Slurm and the disk say


def slurm_says(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout


def jobs(name: str, state: str = "RUNNING", *, after: str = "0") -> list[str]:
    """Jobs in such a state, the oldest first; ``after``: submitted later than this one."""
    found = slurm_says("squeue", "-h", "-n", f"colonnade-{name}", "-t", state, "-o", "%i").split()
    return sorted((job for job in found if int(job) > int(after)), key=int)


def fact(job: str, name: str) -> str:
    """One word of what Slurm knows of a job, also of one that has ended."""
    found = re.search(rf"\b{name}=(\S*)", slurm_says("scontrol", "show", "job", job))
    assert found, f"no {name} of job {job}"
    return found.group(1)


def started(job: str) -> float:
    """When a job began to run [s]."""
    return datetime.fromisoformat(fact(job, "StartTime")).timestamp()


def requeued(job: str) -> int:
    """How often Slurm has put a job back into its queue."""
    return int(fact(job, "Restarts"))


def ended() -> bool:
    return not slurm_says("squeue", "-h", "-o", "%i").split()


def parts(output: Path, movie: str = "*") -> int:
    """Blocks of the longest step that are on disk."""
    return len(list((output / "parts").glob(f"{movie}/process-*.npz")))


def _known(output: Path) -> list[dict[str, object]]:
    return list(read_state(output / "cluster" / "workers.json").get("workers", []))


def noted(output: Path) -> list[str]:
    """Jobs of workers that the driver has noted, the oldest first."""
    return sorted((str(worker["job"]) for worker in _known(output)), key=int)


def called(output: Path) -> list[str]:
    """Jobs of workers that are at work, the oldest first."""
    return [job for job in jobs("worker") if job in {worker["job"] for worker in _known(output) if worker["called"]}]


def finished(output: Path) -> dict[Path, int]:
    """Every block that is on disk, of any step, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in (output / "parts").glob("*/*.npz")}


def logs(output: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted((output / "cluster" / "logs").glob("*driver*")))


# ----------------------------------------------------------------------------------------------- what the tests do


def processes() -> Iterator[psutil.Process]:
    """Those of our workers that compute."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            facts, words = process.environ(), " ".join(process.cmdline())
            ours = facts.get("SLURM_CONF") == os.environ["SLURM_CONF"]
            if ours and facts.get("SLURM_JOB_NAME") == "colonnade-worker" and "spawn_main" in words:
                yield process


def halt_workers() -> None:
    for process in processes():
        with suppress(psutil.Error):
            process.suspend()


def let_workers_go_on() -> None:
    for process in processes():
        with suppress(psutil.Error):
            process.resume()


class Pace:
    """Halts the workers whenever blocks come faster than evenly over so many seconds, and at last keeps some back.

    Walltimes and lost nodes take Slurm a minute or two, on any machine; so long must few small blocks last.
    """

    def __init__(self, output: Path, blocks: int, *, seconds: float) -> None:
        self.output, self.blocks, self.seconds, self.begin = output, blocks, seconds, time.monotonic()

    def __call__(self) -> None:
        due = self.blocks * min(0.8, (time.monotonic() - self.begin) / self.seconds)
        # Workers that have not called yet are let alone: halted before they can, they would be waited for in vain.
        (halt_workers if parts(self.output) > due and called(self.output) else let_workers_go_on)()


def until(found: Callable[[], object], what: str, *, pace: Pace | None = None) -> None:
    end = time.monotonic() + WAIT
    while not found():
        assert time.monotonic() < end, f"no {what} within {WAIT:g} s"
        if pace is not None:
            pace()
        time.sleep(0.1)


def at_once(*commands: list[object]) -> list[subprocess.CompletedProcess[str]]:
    """Several ``colonnade`` commands side by side."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(lambda words: tools.colonnade(*words), commands))


@contextmanager
def halted() -> Iterator[None]:
    """Stop the workers, so that what a command says of their work can be compared with what they did."""
    halt_workers()
    try:
        yield
    finally:
        let_workers_go_on()


@contextmanager
def closed(partition: str) -> Iterator[None]:
    """Nothing of a partition starts meanwhile."""
    slurm_says("scontrol", "update", f"PartitionName={partition}", "State=DOWN")
    try:
        yield
    finally:
        slurm_says("scontrol", "update", f"PartitionName={partition}", "State=UP")


@contextmanager
def lost_node(base: Path, node: str) -> Iterator[None]:
    """A node whose slurmd is gone, until it is started again."""
    os.kill(int((base / "run" / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)
    try:
        yield
    finally:
        path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
        bare = {"PATH": path, "SLURM_CONF": os.environ["SLURM_CONF"]}
        subprocess.run([shutil.which("slurmd", path=path), "-N", node], env=bare, cwd="/", check=True)


# --------------------------------------------------------------------------------------------- what the tests assert


def assert_as_undisturbed(output: Path, undisturbed: Path, kept: dict[Path, int], count: int = MOVIES) -> None:
    """The tables are those of the local run, bit for bit, and what was finished before was not written again."""
    names = [path.name for path in sorted(undisturbed.glob("*.zarr"))][:count]
    assert len(names) == count == len(list(output.glob("*.zarr")))
    for index, name in enumerate(names):
        found = tools.tables(output / name)
        assert found["particles"].sizes["particle"] > FRAMES and (
            index % 3 or found["columns"].sizes["column"] > FRAMES
        )
        assert tools.differences(undisturbed / name, output / name) == []
    now = finished(output)
    assert [path for path, written in kept.items() if now[path] != written] == []
    twice = {block: n for block, n in Counter(tools.computed(output)).items() if n > 1 and block[0] != "collect"}
    assert twice == {}


def truth(output: Path, count: int) -> dict[str, object]:
    """What Slurm says of the driver and the workers now, and which movies the disk holds, and how much of them."""
    rows = [row.split("|") for row in slurm_says("squeue", "-h", "-o", "%j|%i|%T|%r").splitlines()]
    movies = {}
    for index in range(count):
        run, stack = (output / folder / f"movie{index:02d}.zarr" for folder in (".", "stacks"))
        begun = run.exists() or stack.exists()
        complete = run.exists() and store.attributes_of(run)["state"] == "complete"
        movies[run.stem] = "complete" if complete else "begun" if begun else "waiting"
    return {
        "driver": [row[1:] for row in rows if row[0] == "colonnade-driver"],
        "workers": sorted(row[1:] for row in rows if row[0] == "colonnade-worker" and row[2] != "COMPLETING"),
        "movies": movies,
        "blocks": {name: parts(output, name) for name in movies},
    }


def assert_status_is_true(output: Path, driver: str, count: int = MOVIES) -> str:
    """Compare what `colonnade status` says with what is so, both while it is asked and afterwards."""
    before, said = None, ""
    while before != (now := truth(output, count)):
        before, done = now, tools.colonnade("status", output)
        assert done.returncode == 0, done.stderr
        said = done.stdout
    state = " ".join(word for word in now["driver"][0][1:] if word != "None") if now["driver"] else "no longer queued"
    assert f"driver job {driver} of slurm: {state}\n" in said
    if found := re.search(r"^workers: (.*) of 2 wanted", said, re.MULTILINE):
        number = Counter(state.lower() for _, state, _ in now["workers"])
        assert found.group(1) == (", ".join(f"{n} {state}" for state, n in sorted(number.items())) or "none")
        reasons = {reason for _, state, reason in now["workers"] if state == "PENDING"} - {"None"}
        assert (f"waiting for: {', '.join(sorted(reasons))}\n" in said) == bool(reasons)
    else:
        assert not now["workers"]

    life = re.search(r"^driver (alive|gone): process (\d+)", said, re.MULTILINE)
    alive = life is not None and life.group(1) == "alive"
    if alive:
        assert psutil.Process(int(life.group(2))).environ()["SLURM_JOB_ID"] == driver
    words = {"complete": "complete", "begun": "running" if alive else "stopped", "waiting": "waiting"}
    movies = dict(re.findall(r"^(movie\d\d): (\w+)", said, re.MULTILINE))
    if not any((output / "ledger").glob("*/")):
        assert movies == {} and "no movie has begun" in said
        return said
    assert movies == {name: words[state] for name, state in now["movies"].items()}
    states = ", ".join(f"{n} {state}" for state, n in sorted(Counter(movies.values()).items()))
    assert f"{count} movies, {states}\n" in said
    for name, section in re.findall(r"^(movie\d\d): (.*?)(?=^movie|\Z)", said, re.MULTILINE | re.DOTALL):
        told = re.search(r"process +(\d+)/(\d+) blocks", section)
        blocks, total = (int(told.group(1)), int(told.group(2))) if told else (0, BLOCKS)
        assert total == BLOCKS
        # Records reach the disk in batches, some time after their blocks.
        assert blocks == now["blocks"][name] if movies[name] == "complete" else blocks <= now["blocks"][name]
    return said


def blocks_told(said: str) -> int:
    """How many blocks of the longest step `colonnade status` says are done."""
    return sum(int(number) for number in re.findall(r"process +(\d+)/", said))
