"""A real Slurm of three nodes: submitted jobs survive what a night brings, and say what happened."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from cluster import batch
from cluster.pool import Pool, Worker, describe, read_state, write_state
from schemas.errors import ResourceError
from schemas.profiles import Profile
from tests import e2e_tools as tools
from tests.slurm_tools import (
    BLOCK,
    BLOCKS,
    FRAMES,
    MOVIES,
    WAIT,
    Pace,
    assert_as_undisturbed,
    assert_status_is_true,
    at_once,
    blocks_told,
    called,
    closed,
    ended,
    fact,
    finished,
    halted,
    jobs,
    logs,
    lost_node,
    noted,
    parts,
    profile,
    requeued,
    slurm_says,
    started,
    until,
)

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SCRIPT = tools.ROOT / "scripts" / "slurm"


@pytest.fixture(scope="module", autouse=True)
def slurm() -> Iterator[Path]:
    """The folder of a Slurm of our own for these tests; where it cannot be had they are skipped, in CI they fail."""
    # A socket's path must be short, which those of pytest are not.
    base = Path(f"/tmp/cs-{os.getpid()}")
    place = {**os.environ, "COLONNADE_SLURM": str(base)}
    up = subprocess.run([SCRIPT, "up"], capture_output=True, text=True, env=place, check=False)
    if up.returncode == 3 and not os.environ.get("COLONNADE_REQUIRE_SLURM"):
        pytest.skip(f"no Slurm here: {up.stderr.strip()}")
    assert up.returncode == 0, f"no Slurm here: {up.stderr.strip()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", up.stdout.strip())
        yield base
    subprocess.run([SCRIPT, "down"], env=place, check=True)


@pytest.fixture(autouse=True)
def nothing_left(slurm) -> Iterator[None]:
    """A test that fails leaves no job to the next one."""
    yield
    if not ended():
        subprocess.run(["scancel", "-f", "-s", "KILL", *slurm_says("squeue", "-h", "-o", "%i").split()], check=False)
        until(ended, "end of what a test left")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Callable[..., Path]:
    """Writes a job file of the first of twelve movies for an output folder."""
    folder = tmp_path_factory.mktemp("movies")
    movies = []
    # An untrained denoiser leaves no column to be found; these movies go without, and have some.
    columns = {"denoise.network": "none", "segment.model": "columns"}
    for index in range(MOVIES):
        counts, _ = tools.lattice((64, 72), frames=FRAMES, seed=index)
        path = tools.write_movie(folder / f"movie{index:02d}.tif", counts)
        movies.append({"source": str(path), "set": {} if index % 3 else columns})
    bright = tools.linear(
        folder / "bright.safetensors", np.array([[8.0]]), np.array([0.0]), sampling=0.4, sampling_range=[0.1, 0.8]
    )
    settings = {**tools.untrained(folder), "particles.model": bright, "particles.min_area": 1.0}

    def write(output: Path, count: int = MOVIES) -> Path:
        output.parent.mkdir(parents=True, exist_ok=True)
        return tools.write_jobfile(
            output.parent / f"{output.name}.yaml", movies[:count], output, blocks__frames=BLOCK, **settings
        )

    return write


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory) -> Iterator[Callable[[], Path]]:
    """The folder of a local run of all movies that nobody disturbed; it is made while the first test mostly waits."""
    output = tmp_path_factory.mktemp("local") / "out"
    with (
        (output.parent / "log").open("w") as log,
        subprocess.Popen(
            tools.command("run", job(output), "--cluster", "serial"), env=tools.environment(), stdout=log, stderr=log
        ) as run,
    ):

        def made() -> Path:
            assert run.wait(WAIT) == 0, (output.parent / "log").read_text()
            return output

        yield made
        run.terminate()


def test_twelve_movies_survive_killed_workers_and_real_walltimes_and_status_tells_the_truth(job, undisturbed, tmp_path):
    output = tmp_path / "out"
    # Slurm looks at walltimes every 30 s and warns up to 30 s early: workers end 60 to 90 s after they started, and the
    # driver is warned 90 to 120 s after it started.
    place = profile(tmp_path, batch={"walltime": "00:01:00", "driver_walltime": "00:03:00", "warning": 60})
    with closed("main"):
        done = tools.colonnade("submit", job(output), "--cluster", place)
        assert done.returncode == 0, done.stderr
        (driver,) = jobs("driver", "PENDING")
        assert f"job {driver}" in done.stdout
        assert "PENDING PartitionDown" in assert_status_is_true(output, driver)
        again = tools.colonnade("submit", job(output), "--cluster", place)
        assert again.returncode == 2
        assert f"job {driver} works on" in again.stderr.replace("\n", " ")

    total = MOVIES * BLOCKS
    pace = Pace(output, total, seconds=130)
    until(lambda: parts(output) >= 6 and len(jobs("worker")) == 2, "blocks of two workers", pace=pace)
    with halted():
        said = assert_status_is_true(output, driver)
        assert "RUNNING" in said and "2 running of 2 wanted, 0 ended" in said
    kept = finished(output)

    oldest = jobs("worker")[0]
    if (late := started(oldest) - started(driver)) > 30:  # a slow machine; its driver would be warned before that
        slurm_says("scontrol", "update", f"JobId={driver}", f"TimeLimit={math.ceil((late + 150) / 60)}")
    for number in (1, 2):  # the oldest is left to its walltime
        until(lambda: len(called(output)) == 2, "two workers at work", pace=pace)
        slurm_says("scancel", called(output)[-1])
        until(lambda: len(jobs("worker", "CANCELLED", after=driver)) == number, "end of a worker", pace=pace)  # noqa: B023
    until(lambda: len(called(output)) == 2, "replacement", pace=pace)
    with halted():
        middle = assert_status_is_true(output, driver)
        assert f"{len(jobs('worker', 'CANCELLED,TIMEOUT', after=driver))} ended" in middle
        assert len(kept) and blocks_told(said) < blocks_told(middle) < total
    kept = finished(output)

    until(lambda: requeued(driver), "end of the driver's walltime", pace=pace)  # it requeues itself; nobody told it to
    until(lambda: oldest in jobs("worker", "TIMEOUT"), "end of a worker's walltime")
    kept |= finished(output)
    assert parts(output) < total
    until(lambda: called(output), "workers of the requeued driver", pace=pace)
    with halted():
        said = assert_status_is_true(output, driver)
        assert blocks_told(middle) <= blocks_told(said) < total

    until(ended, "end of all jobs")
    said = assert_status_is_true(output, driver)
    assert f"{MOVIES} movies, {MOVIES} complete" in said, logs(output)
    assert blocks_told(said) == total
    assert_as_undisturbed(output, undisturbed(), kept)


def test_workers_survive_a_dead_node_preemption_and_memory(slurm, job, undisturbed, tmp_path):
    output, count = tmp_path / "out", 4
    # A process beside the worker in its job, which takes more memory than the job has once it is told to.
    greed = f"{sys.executable} -c 'import time; held = b\"x\" * 2_500_000_000; time.sleep(60)'"
    leak = f"(until [ -e {tmp_path}/leak-$SLURM_JOB_ID ]; do kill -0 $$ || exit; sleep 0.2; done; exec {greed}) &"
    place = profile(tmp_path, batch={"queue": "low", "driver_queue": "main", "cores": 5, "prologue": [leak]})
    assert tools.colonnade("submit", job(output, count), "--cluster", place).returncode == 0
    pace = Pace(output, count * BLOCKS, seconds=60)
    until(lambda: len(called(output)) == 2, "two workers at work", pace=pace)
    (driver,), (greedy, cut_off) = jobs("driver"), jobs("worker")
    seat = {name: slurm_says("squeue", "-h", "-j", name, "-o", "%N").strip() for name in (driver, greedy, cut_off)}
    assert len(set(seat.values())) == 3  # of eight cores a node has not enough for two of five
    before = parts(output)
    until(lambda: parts(output) >= before + 2, "blocks", pace=pace)
    kept = finished(output)

    with lost_node(slurm, seat[cut_off]):
        (tmp_path / f"leak-{greedy}").touch()
        until(lambda: fact(greedy, "JobState") in ("FAILED", "OUT_OF_MEMORY"), "end by memory", pace=pace)
        said = (output / "cluster" / "logs" / f"colonnade-worker-{greedy}.err").read_text()
        assert f"StepId={greedy}.batch exceeded memory limit" in said

        until(lambda: set(called(output)) - {cut_off}, "replacement", pace=pace)
        (evicted,) = set(called(output)) - {cut_off}
        urgent = f"-p main -w {seat[greedy]} -N 1 -n 8 -J urgent -o /dev/null --wrap"
        slurm_says("sbatch", *urgent.split(), "sleep 600")
        until(lambda: fact(evicted, "JobState") == "PREEMPTED", "preemption", pace=pace)
        until(lambda: fact(cut_off, "JobState") in ("NODE_FAIL", "COMPLETING"), "dead node", pace=pace)
        daemon = (slurm / "log" / "slurmctld.log").read_text()
        assert f"preempted JobId={evicted}" in daemon
        assert f"Killing JobId={cut_off} on failed node {seat[cut_off]}" in daemon
        kept |= finished(output)
        assert parts(output) < count * BLOCKS
        with halted():  # what ran on the dead node still runs, and might end the movies before anything is compared
            until(lambda: len(waiting := jobs("worker", "PENDING")) == 2 and noted(output) == waiting, "replacements")
            assert "2 pending of 2 wanted, 3 ended" in assert_status_is_true(output, driver, count)
        slurm_says("scancel", "-n", "urgent")
    until(ended, "end of all jobs")
    assert_as_undisturbed(output, undisturbed(), kept, count)


def test_a_driver_stays_cancelled_and_one_allocation_goes_on_and_is_requeued(job, undisturbed, tmp_path):
    output, count = tmp_path / "out", 4
    assert tools.colonnade("submit", job(output, count), "--cluster", profile(tmp_path)).returncode == 0
    until(lambda: len(called(output)) == 2 and parts(output) >= 4, "blocks")
    (driver,) = jobs("driver")
    with halted():
        slurm_says("scancel", driver)  # of its workers it takes care itself
    until(ended, "end of all jobs")
    time.sleep(3)  # a job that requeues itself would be back by now
    assert ended() and fact(driver, "JobState") == "CANCELLED" and not requeued(driver)
    told = tools.colonnade("status", output).stdout
    assert "stopped" in told and "no longer queued" in told
    assert 4 <= parts(output) < count * BLOCKS
    kept = finished(output)

    place = profile(tmp_path, batch={"one_allocation": True})
    assert tools.colonnade("submit", job(output, count), "--cluster", place).returncode == 0
    (driver,) = jobs("driver", "PENDING,RUNNING")
    for number, words in enumerate((["scontrol", "requeue"], ["scancel", "-b", "-s", "USR1"]), 1):
        before = parts(output)
        until(lambda: parts(output) >= before + 3, "blocks")  # noqa: B023
        assert len(slurm_says("squeue", "-h", "-o", "%i").split()) == 1
        assert len(slurm_says("squeue", "-h", "-s", "-j", driver, "-o", "%i").split()) == 2  # the script, the workers
        kept |= finished(output)
        slurm_says(*words, driver)  # an administrator; the warning ahead of the walltime
        until(lambda: requeued(driver) == number, "requeued driver")  # noqa: B023
    seen = tools.colonnade("status", output, "--monitor", "--interval", 2)  # waits for the driver to come back
    assert seen.returncode == 0, seen.stderr
    assert f"{count} movies, {count} complete" in seen.stdout.rsplit("driver job", 1)[-1]
    until(ended, "end of all jobs")
    assert_as_undisturbed(output, undisturbed(), kept, count)


def test_a_queue_that_starts_nothing_is_left_with_the_reason(job, tmp_path):
    place = profile(tmp_path, batch={"queue": "short"}, start_timeout=4)  # whose longest walltime is two minutes
    done = tools.colonnade("run", job(tmp_path / "out", 1), "--cluster", place)
    assert done.returncode == 4
    said = done.stderr.replace("\n", " ")
    assert "no worker came within 4 s" in said and "PENDING (PartitionTimeLimit)" in said
    assert ended()


def test_a_stop_is_heard_while_the_first_worker_is_waited_for(job, tmp_path):
    place = profile(tmp_path, batch={"directives": ["--hold"]}, start_timeout=600)
    words = tools.command("run", job(tmp_path / "out", 1), "--cluster", place)
    run = subprocess.Popen(words, env=tools.environment(), stderr=subprocess.PIPE, text=True)
    until(lambda: len(jobs("worker", "PENDING")) == 2, "jobs that wait")
    run.terminate()
    _, said = run.communicate(timeout=60)
    assert run.returncode == 143
    assert "waited for the first worker" in said and "To go on:" in said
    until(ended, "end of all jobs")


def test_a_refused_submission_is_told_in_the_words_of_the_batch_system(job, tmp_path):
    place = profile(tmp_path, batch={"queue": "nowhere"})
    for done in at_once(*([verb, job(tmp_path / verb, 1), "--cluster", place] for verb in ("run", "submit"))):
        assert done.returncode == 4
        assert "invalid partition specified: nowhere" in done.stderr.replace("\n", " ")


def test_workers_that_never_call_are_not_submitted_for_ever(job, tmp_path):
    place = profile(tmp_path, batch={"prologue": ["exit 7"]})
    done = tools.colonnade("run", job(tmp_path / "out", 1), "--cluster", place)
    assert done.returncode == 4
    assert "ended before their worker called" in done.stderr.replace("\n", " ")
    assert ended()


def test_a_worker_that_dies_in_the_queue_is_submitted_again(tmp_path):
    settings = {"queue": "main", "directives": ["--hold"], "poll": 0.3, "walltime": "00:05:00"}
    pool = Pool(Profile(kind="slurm", workers=2, memory=1.0, batch=settings), "tcp://127.0.0.1:1", tmp_path, "", list)
    pool.start()
    try:
        first = set(pool.workers)
        until(lambda: {w.state for w in pool.workers.values()} == {"PENDING"}, "pending jobs")
        lost = sorted(first)[0]
        slurm_says("scancel", lost)
        until(lambda: len(pool.workers) == 2 and lost not in pool.workers, "replacement")
        assert len(set(pool.workers) & first) == 1
        until(lambda: read_state(tmp_path / "workers.json").get("ended") == 1, "record")
    finally:
        pool.close()
    until(ended, "end of all jobs")
    # What a driver left that had no time to note the end of its workers.
    workers = [asdict(Worker(lost, 0.0, "RUNNING"))]
    state = {"kind": "slurm", "wanted": 2, "workers": workers, "ended": 0, "refused": "", "updated": time.time()}
    write_state(tmp_path / "workers.json", state)
    assert "1 gone of 2 wanted" in "\n".join(describe(tmp_path))


def test_a_cluster_is_tried_out_from_inside_a_job(job, tmp_path):
    (tmp_path / "gpu").mkdir()
    plain, gpu = profile(tmp_path), profile(tmp_path / "gpu", batch={"gpus": 1}, start_timeout=60)
    wanted = job(tmp_path / "out", 1)
    done, asked = at_once(*(["check", wanted, "--cluster", place] for place in (plain, gpu)))
    assert done.returncode == 0, done.stderr
    assert "runs this copy, sees no GPU, and reaches" in done.stdout.replace("\n", " ")
    assert asked.returncode == 4
    assert "a GPU was asked for, but torch sees none" in asked.stderr.replace("\n", " ")


def test_an_absent_batch_system_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="sbatch is not on this machine"):
        batch.submit(Profile(kind="slurm"), "#!/bin/sh\n", tmp_path)


def test_a_pilot_on_a_worker_job_leaves_its_logs_alone(job, tmp_path):
    output = tmp_path / "out"
    path = job(output, 1)
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    where = profile(tmp_path)
    done = tools.colonnade("plan", path, "--pilot", "--cluster", where)
    assert done.returncode == 0, done.stderr
    assert "pilot: 6 frames of movie00 on 1 worker(s)" in done.stdout
    assert "takes on 2" in done.stdout and "# workers: one allocation of 00:08:00" in done.stdout
    assert "2 worker(s) run" in done.stdout.splitlines()[-1]
    left = {file for file in tmp_path.rglob("*") if file.is_file()} - before - {where}
    assert all((output / "cluster" / "pilot") in file.parents for file in left), left
    until(ended, "end of the worker job")
