"""Batch scripts, as text: what each system is told."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from cluster import batch, pool
from cluster.pool import DRIVER_FILE, Step, write_state
from schemas.errors import ResourceError, SettingsError
from schemas.profiles import BATCH_KINDS, CpuPool, Profile, load_profile
from tests import e2e_tools as tools

LOGS = Path("logs")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Scripts make the folder of their logs."""
    monkeypatch.chdir(tmp_path)


def made(kind: str, **options) -> Profile:
    return Profile(kind=kind, memory=8.0, batch={"queue": "gpu", "walltime": "02:30:00", **options})


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("slurm", ["#SBATCH -p gpu", "-t 02:30:00", "--mem=8G", "--cpus-per-task=2", "#SBATCH --no-requeue"]),
        ("pbs", ["#PBS -q gpu", "#PBS -l walltime=02:30:00", "select=1:ncpus=2:mem=7630MB"]),
        ("lsf", ["#BSUB -q gpu", "#BSUB -W 02:30\n", "#BSUB -n 2"]),
        ("sge", ["#$ -q gpu", "#$ -l h_rt=02:30:00"]),
        ("htcondor", ["RequestCpus", "MY.DaskWorkerCores = 2", "MY.DaskWorkerMemory = 8000000000"]),
    ],
)
def test_each_system_is_told_in_its_own_words(kind, lines):
    script = batch.worker_script(made(kind, cores=2), scheduler="tcp://10.0.0.1:7", logs=LOGS)
    for line in lines:
        assert line in script
    # One thread computes whatever the cores; the worker leaves before the batch system ends it.
    for word in ("tcp://10.0.0.1:7", "--nthreads 1 ", "CPU=1", "--lifetime 8100s --lifetime-stagger 900s"):
        assert word in script
    assert "colonnade-worker --nthreads" not in script  # names of workers must differ
    assert "--memory-limit 7.750GB" in script  # of its job's 8, some is the nanny's: the kernel must not be the first


def test_gpus_are_asked_for_and_declared():
    script = batch.worker_script(made("slurm", gpus=1), logs=LOGS)
    assert "#SBATCH --gres=gpu:1" in script and '"CPU=1,GPU=1"' in script
    assert made("slurm", gpus=1).device == "cuda" and made("slurm").device == "cpu"


def test_workers_without_a_gpu_have_a_script_of_their_own():
    mixed = made("slurm", gpus=1).model_copy(update={"cpu": CpuPool(workers=2, batch={"queue": "cpu"})})
    first, second = (batch.worker_script(one, logs=LOGS) for one in mixed.pools)
    assert '--resources "GPU=1"' in first and "--gres=gpu:1" in first and "#SBATCH -p gpu" in first
    assert '--resources "CPU=1"' in second and "--gres" not in second and "#SBATCH -p cpu" in second


def test_a_worker_that_fell_silent_is_replaced_where_nobody_can_be_asked(tmp_path, monkeypatch):
    """Of PBS, LSF and SGE only the scheduler knows; what stands in for their commands writes down what it is told."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for command in ("qsub", "qdel"):
        (bin_folder / command).write_text(
            f'#!/bin/sh\necho {command} "$@" >> {tmp_path}/said\nwc -l < {tmp_path}/said\n'
        )
        (bin_folder / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setattr(pool, "GONE_SECONDS", 0.5)
    called = {"1", "2"}
    workers = pool.Pool(
        made("pbs", poll=0.1).model_copy(update={"workers": 2}), "tcp://x:1", tmp_path, "", lambda: called
    )
    workers.start()
    try:
        end = time.monotonic() + 30
        while not all(worker.called for worker in workers.workers.values()):
            assert time.monotonic() < end
            time.sleep(0.05)
        called.discard("2")
        while workers.ended < 1 or len(workers.workers) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert "1" in workers.workers and "2" not in workers.workers
        assert "qdel 2" in (tmp_path / "said").read_text()
    finally:
        workers.close()
    # One that never called may wait in the queue for hours, and is left alone.
    assert workers.ended == 1


def test_the_users_own_jobqueue_file_is_honoured(monkeypatch):
    import dask.config

    own = {"jobqueue.slurm.account": "m1234", "jobqueue.slurm.walltime": "00:45:00", "jobqueue.slurm.memory": "3GB"}
    with dask.config.set(own):
        script = batch.worker_script(load_profile("slurm"), logs=LOGS)
        assert "#SBATCH -A m1234" in script and "#SBATCH -t 00:45:00" in script and "#SBATCH --mem=3G" in script
        assert "#SBATCH -t 02:30:00" in batch.worker_script(made("slurm"), logs=LOGS)


@pytest.mark.parametrize("kind", [kind for kind in BATCH_KINDS if kind != "htcondor"])
def test_drivers_save_and_requeue_on_a_warning_and_only_stop_on_a_cancel(kind, tmp_path):
    profile = made(kind, warning=240, driver_walltime="12:00:00", driver_queue="long")
    script = batch.driver_script(profile, ["colonnade", "run", "it's.yaml"], folder=tmp_path, logs=LOGS)
    assert "'colonnade' 'run' 'it'\\''s.yaml' &" in script and "long" in script
    assert ("#SBATCH --signal=B:USR1@240" in script) == (kind == "slurm")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_htcondor_runs_no_driver_of_ours(tmp_path):
    with pytest.raises(SettingsError, match="submit node"):
        batch.driver_script(made("htcondor"), ["x"], folder=tmp_path, logs=LOGS)


def test_show_prints_the_scripts_and_submits_nothing(tmp_path):
    shown = tools.colonnade("cluster", "show", "slurm", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "#SBATCH -J colonnade-worker" in shown.stdout and "#SBATCH -J colonnade-driver" in shown.stdout
    refused = tools.colonnade("cluster", "show", "local", cwd=tmp_path)
    assert refused.returncode == 2
    assert "expected a batch system" in refused.stderr


@pytest.mark.parametrize(
    ("walltime", "seconds"),
    [("00:05:00", 300), ("2-01:00:00", 176400), ("30:00", 1800), ("45", 2700), ("1-12", 129600)],
)
def test_walltimes(walltime, seconds):
    assert batch.seconds_of(walltime) == seconds


def test_cancel_without_a_submitted_job_says_so(tmp_path):
    done = tools.colonnade("cancel", tmp_path)
    assert done.returncode == 2
    assert "holds no submitted job" in done.stderr


def test_a_request_names_memory_walltime_and_allocations():
    profile = made("slurm", walltime="04:00:00", driver_walltime="24:00:00")
    facts = {"workers": 16, "memory": 2e9, "driver": 1e9}
    short = batch.request(profile, seconds=3600, **facts)
    assert short[:2] == ["workers: 16", "memory: 3            # GB of each; 2.00 expected"]
    assert short[2].startswith('batch.walltime: "01:30:00"')  # an hour and a quarter, of which 0.9 are worked
    assert short[3].startswith("batch.driver_memory: 1.5 ")
    assert short[4:] == ["# workers: one allocation of 04:00:00", "# driver: one allocation of 24:00:00"]
    long = batch.request(profile, seconds=7 * 3600, **facts)
    assert not any("batch.walltime" in line for line in long)
    assert "# workers: two allocations of 04:00:00" in long
    assert "# driver: 5 allocations of 24:00:00" in batch.request(profile, seconds=4 * 86400, **facts)


def test_a_request_of_one_allocation_counts_the_whole():
    profile = made("slurm", one_allocation=True, driver_walltime="04:00:00", warning=600)
    lines = batch.request(profile, workers=4, seconds=4 * 3600, memory=1e9, driver=1e9)
    assert lines[-1] == "# driver, workers and all: two allocations of 04:00:00"


def test_a_request_without_a_batch_system_says_how_long_one_would_last():
    lines = batch.request(Profile(kind="local"), workers=2, seconds=40 * 3600, memory=1e9, driver=1e9)
    assert lines[-1] == "# of a batch job that holds all of it: 2-07:40:00"


def test_a_job_that_waits_in_its_queue_has_a_status(tmp_path):
    write_state(tmp_path / "cluster" / DRIVER_FILE, {"kind": "pbs", "job": "7", "command": "", "submitted": 0.0})
    done = tools.colonnade("status", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "driver job 7 of pbs: not asked" in done.stdout and "no movie has begun" in done.stdout


def test_one_allocation_needs_a_job_around_it(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ResourceError, match="inside a Slurm job, and this is none; use `colonnade submit`"):
        Step(made("slurm", one_allocation=True), "tcp://127.0.0.1:1", tmp_path, "").start()
