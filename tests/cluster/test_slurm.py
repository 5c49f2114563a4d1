"""A real Slurm of three nodes: submitted jobs survive what a night brings, and say what happened."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml

from cluster import batch
from cluster.pool import Pool, read_state
from schemas.errors import ResourceError
from schemas.profiles import Profile
from tests import e2e_tools as tools

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SCRIPT = tools.ROOT / "scripts" / "slurm"
MOVIES, FRAMES, BLOCK = 2, 90, 2
WAIT = 150.0  # s


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory):
    """A Slurm of our own for these tests; skipped, with the reason, where it cannot be had."""
    # A socket's path must be short, which those of pytest are not.
    place = {"COLONNADE_SLURM": f"/tmp/cs-{os.getpid()}"}
    up = subprocess.run([SCRIPT, "up"], capture_output=True, text=True, env={**os.environ, **place}, check=False)
    if up.returncode == 3:
        pytest.skip(f"no Slurm here: {up.stderr.strip()}")
    assert up.returncode == 0, up.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", up.stdout.strip())
        yield
    subprocess.run([SCRIPT, "down"], env={**os.environ, **place}, check=True)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Callable[[Path], Path]:
    """Writes a job file of two movies of thirty blocks for an output folder."""
    folder = tmp_path_factory.mktemp("movies")
    movies = []
    for index in range(MOVIES):
        counts, _ = tools.lattice((160, 176), frames=FRAMES, seed=index)
        movies.append(tools.write_movie(folder / f"movie{index}.tif", counts))
    bright = tools.linear(
        folder / "bright.safetensors", np.array([[8.0]]), np.array([0.0]), sampling=0.4, sampling_range=[0.1, 0.8]
    )
    settings = {**tools.untrained(folder), "particles.model": bright, "particles.min_area": 1.0}

    def write(output: Path) -> Path:
        output.parent.mkdir(parents=True, exist_ok=True)
        return tools.write_jobfile(
            output.parent / f"{output.name}.yaml", movies, output, blocks__frames=BLOCK, **settings
        )

    return write


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory) -> Path:
    """The folder of a local run that nobody disturbed."""
    output = tmp_path_factory.mktemp("local") / "out"
    done = tools.colonnade("run", job(output), "--cluster", "serial")
    assert done.returncode == 0, done.stderr
    return output


def profile(folder: Path, **changes) -> Path:
    """A profile of two workers on the loopback interface."""
    settings = {"queue": "main", "walltime": "00:08:00", "interface": "lo", "poll": 0.5, "driver_memory": 0.5}
    settings |= {"driver_walltime": "00:08:00", **changes.pop("batch", {})}
    path = folder / "slurm.yaml"
    facts = {"kind": "slurm", "workers": 2, "memory": 2.0, "start_timeout": 90, "batch": settings, **changes}
    path.write_text(yaml.safe_dump(facts))
    return path


def slurm_says(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout


def jobs(name: str, state: str = "RUNNING") -> list[str]:
    return slurm_says("squeue", "-h", "-n", f"colonnade-{name}", "-t", state, "-o", "%i").split()


def until(found: Callable[[], object], what: str, *, seconds: float = WAIT) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, f"no {what} within {seconds:g} s"
        time.sleep(0.1)


@contextmanager
def halted() -> Iterator[None]:
    """Stop the workers, so that what a command says of them can be compared with what they are."""
    stopped = jobs("worker")
    for name in stopped:
        slurm_says("scancel", "-f", "-s", "STOP", name)
    yield
    for name in stopped:
        subprocess.run(["scancel", "-f", "-s", "CONT", name], check=False)


def parts(output: Path) -> int:
    """Blocks of the longest step that are on disk."""
    return len(list((output / "parts").glob("*/process-*.npz")))


def ended() -> bool:
    return not slurm_says("squeue", "-h", "-o", "%i").split()


def logs(output: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted((output / "cluster" / "logs").glob("*driver*")))


def restarted(job: str) -> bool:
    return "Restarts=1" in slurm_says("scontrol", "show", "job", job)


def assert_as_undisturbed(output: Path, undisturbed: Path) -> None:
    for index in range(MOVIES):
        assert tools.differences(undisturbed / f"movie{index}.zarr", output / f"movie{index}.zarr") == []
    count = Counter(block for block in tools.computed(output) if block[0] != "collect")
    # Records do not name the movie: two movies of one length share steps, ranges and, rarely, a fingerprint.
    assert max(count.values()) <= 1


def test_a_submitted_job_survives_lost_workers_and_its_walltime(job, undisturbed, tmp_path):
    output = tmp_path / "out"
    said = tools.colonnade("submit", job(output), "--cluster", profile(tmp_path))
    assert said.returncode == 0, said.stderr
    (driver,) = jobs("driver", "RUNNING,PENDING,CONFIGURING")
    assert f"job {driver}" in said.stdout

    until(lambda: parts(output) >= 4 and len(jobs("worker")) == 2, "blocks")
    with halted():
        again = tools.colonnade("submit", job(output), "--cluster", profile(tmp_path))
        assert again.returncode == 2
        assert f"job {driver} works on" in again.stderr.replace("\n", " ")
        told = tools.colonnade("status", output).stdout
        assert f"driver job {driver} of slurm: RUNNING" in told
        assert "2 stopped of 2 wanted" in told  # which is what they are just now
        assert "running" in told.split("movies, ")[1].split("\n")[0]

    before = parts(output)
    for threshold in (before + 3, before + 10):
        until(lambda: parts(output) >= threshold and jobs("worker"), "blocks")  # noqa: B023
        slurm_says("scancel", jobs("worker")[0])
    until(lambda: parts(output) >= before + 15, "blocks")
    before = parts(output)
    slurm_says("scancel", "-b", "-s", "USR1", driver)  # the warning that comes ahead of the walltime
    until(lambda: restarted(driver), "requeued driver")
    assert before < MOVIES * FRAMES // BLOCK

    until(ended, "end of all jobs")
    told = tools.colonnade("status", output).stdout
    assert f"{MOVIES} movies, {MOVIES} complete" in told, logs(output)
    assert "no longer queued" in told
    assert_as_undisturbed(output, undisturbed)


def test_a_cancelled_job_stays_cancelled_and_goes_on_when_submitted_or_requeued(job, undisturbed, tmp_path):
    output, place = tmp_path / "out", profile(tmp_path)
    assert tools.colonnade("submit", job(output), "--cluster", place).returncode == 0
    until(lambda: parts(output) >= 6, "blocks")
    with halted():
        done = tools.colonnade("cancel", output)
    assert done.returncode == 0, done.stderr
    until(ended, "end of all jobs", seconds=40)
    time.sleep(3)  # a job that requeues itself would be back by now
    assert ended()
    told = tools.colonnade("status", output).stdout
    assert "stopped" in told and "no longer queued" in told
    assert 6 <= parts(output) < MOVIES * FRAMES // BLOCK
    assert tools.colonnade("submit", job(output), "--cluster", place).returncode == 0
    until(lambda: jobs("driver") and parts(output) >= 30, "blocks of the second submission")
    (driver,) = jobs("driver")
    slurm_says("scontrol", "requeue", driver)  # what an administrator does
    until(lambda: restarted(driver), "requeued driver")
    until(ended, "end of all jobs")
    assert_as_undisturbed(output, undisturbed)


def test_one_allocation_holds_driver_and_workers(job, undisturbed, tmp_path):
    output, place = tmp_path / "out", profile(tmp_path, batch={"one_allocation": True})
    outside = tools.colonnade("run", job(output), "--cluster", place)
    assert outside.returncode == 4 and "inside a Slurm job" in outside.stderr.replace("\n", " ")
    said = tools.colonnade("submit", job(output), "--cluster", place)
    assert said.returncode == 0, said.stderr
    until(lambda: parts(output) >= 6, "blocks")
    assert len(slurm_says("squeue", "-h", "-o", "%i").split()) == 1
    (driver,) = jobs("driver")
    assert len(slurm_says("squeue", "-h", "-s", "-j", driver, "-o", "%i").split()) == 2  # the batch script, the workers
    slurm_says("scancel", "-b", "-s", "USR1", driver)
    until(lambda: restarted(driver), "requeued driver")
    until(ended, "end of all jobs")
    assert_as_undisturbed(output, undisturbed)


def test_a_queue_that_starts_nothing_is_left_with_the_reason(job, tmp_path):
    place = profile(tmp_path, batch={"queue": "short"}, start_timeout=4)  # whose longest walltime is two minutes
    done = tools.colonnade("run", job(tmp_path / "out"), "--cluster", place)
    assert done.returncode == 4
    said = done.stderr.replace("\n", " ")
    assert "no worker came within 4 s" in said and "PENDING (PartitionTimeLimit)" in said
    assert ended()


def test_a_stop_is_heard_while_the_first_worker_is_waited_for(job, tmp_path):
    place = profile(tmp_path, batch={"directives": ["--hold"]}, start_timeout=600)
    words = tools.command("run", job(tmp_path / "out"), "--cluster", place)
    run = subprocess.Popen(words, env=tools.environment(), stderr=subprocess.PIPE, text=True)
    until(lambda: len(jobs("worker", "PENDING")) == 2, "jobs that wait", seconds=60)
    run.terminate()
    _, said = run.communicate(timeout=60)
    assert run.returncode == 143
    assert "waited for the first worker" in said and "To go on:" in said
    until(ended, "end of all jobs", seconds=20)


def test_a_refused_submission_is_told_in_the_words_of_the_batch_system(job, tmp_path):
    place = profile(tmp_path, batch={"queue": "nowhere"})
    for verb in ("run", "submit"):
        done = tools.colonnade(verb, job(tmp_path / "out"), "--cluster", place)
        assert done.returncode == 4
        assert "invalid partition specified: nowhere" in done.stderr.replace("\n", " ")


def test_workers_that_never_call_are_not_submitted_for_ever(job, tmp_path):
    place = profile(tmp_path, batch={"prologue": ["exit 7"]})
    done = tools.colonnade("run", job(tmp_path / "out"), "--cluster", place)
    assert done.returncode == 4
    assert "ended before their worker called" in done.stderr.replace("\n", " ")
    assert ended()


def test_a_worker_that_dies_in_the_queue_is_submitted_again(tmp_path):
    settings = {"queue": "main", "directives": ["--hold"], "poll": 0.3, "walltime": "00:05:00"}
    pool = Pool(Profile(kind="slurm", workers=2, memory=1.0, batch=settings), "tcp://127.0.0.1:1", tmp_path, "", list)
    pool.start()
    try:
        first = set(pool.workers)
        until(lambda: {w.state for w in pool.workers.values()} == {"PENDING"}, "pending jobs", seconds=20)
        lost = sorted(first)[0]
        slurm_says("scancel", lost)
        until(lambda: len(pool.workers) == 2 and lost not in pool.workers, "replacement", seconds=20)
        assert len(set(pool.workers) & first) == 1
        until(lambda: read_state(tmp_path / "workers.json").get("ended") == 1, "record", seconds=5)
    finally:
        pool.close()
    until(ended, "end of all jobs", seconds=20)


def test_a_cluster_is_tried_out_from_inside_a_job(job, tmp_path):
    done = tools.colonnade("check", job(tmp_path / "out"), "--cluster", profile(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "runs this copy, sees no GPU, and reaches" in done.stdout.replace("\n", " ")
    asked = tools.colonnade(
        "check", job(tmp_path / "out"), "--cluster", profile(tmp_path, batch={"gpus": 1}, start_timeout=60)
    )
    assert asked.returncode == 4
    assert "a GPU was asked for, but torch sees none" in asked.stderr.replace("\n", " ")


def test_an_absent_batch_system_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="sbatch is not on this machine"):
        batch.submit(Profile(kind="slurm"), "#!/bin/sh\n", tmp_path)


def test_a_pilot_on_a_worker_job_leaves_its_logs_alone(job, tmp_path):
    output = tmp_path / "out"
    path = job(output)
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    where = profile(tmp_path)
    done = tools.colonnade("plan", path, "--pilot", "--cluster", where)
    assert done.returncode == 0, done.stderr
    assert "pilot: 6 frames of movie0 on 1 worker(s)" in done.stdout
    assert "takes on 2" in done.stdout and "# workers: one allocation of 00:08:00" in done.stdout
    assert "2 worker(s) run" in done.stdout.splitlines()[-1]
    left = {file for file in tmp_path.rglob("*") if file.is_file()} - before - {where}
    assert all((output / "cluster" / "pilot") in file.parents for file in left), left
    until(ended, "end of the worker job")


def test_a_monitor_follows_a_job_from_the_queue_to_its_end(job, tmp_path):
    output = tmp_path / "out"
    submitted = tools.colonnade("submit", job(output), "--cluster", profile(tmp_path))
    assert submitted.returncode == 0, submitted.stderr
    seen = tools.colonnade("status", output, "--monitor", "--interval", 1)
    assert seen.returncode == 0, seen.stderr
    assert "movie0: running" in seen.stdout and " running, " in seen.stdout
    assert f"{MOVIES} movies, {MOVIES} complete" in seen.stdout.rsplit("driver", 1)[-1]
    until(ended, "end of the job")
