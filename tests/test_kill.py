"""Kill anything at any moment, run the same command again: the same result, nothing computed twice, nothing left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import xarray as xr
from zarr.errors import ZarrUserWarning

from schemas.conventions import STATUS
from tests import e2e_tools as tools

FRAMES, BLOCK = 40, 4
WAIT = 120.0  # s


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    """A movie of ten blocks."""
    folder = tmp_path_factory.mktemp("movie")
    counts, _ = tools.lattice((64, 72), frames=FRAMES, seed=4)
    return tools.write_movie(folder / "lattice.tif", counts)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    facts = {"sampling": 0.4, "sampling_range": [0.1, 0.8]}
    bright = tools.linear(folder / "bright.safetensors", np.array([[8.0]]), np.array([0.0]), **facts)
    particles = {"particles.model": bright, "particles.min_area": 1.0}
    return {**tools.untrained(folder), **particles, "blocks.frames": BLOCK, "images.examples": 0}


@pytest.fixture(scope="module")
def undisturbed(movie, settings, tmp_path_factory):
    """The run that nobody killed."""
    (outcome,) = tools.run_job(movie, tmp_path_factory.mktemp("undisturbed"), **settings)
    assert outcome.particles > FRAMES
    return outcome.path


class Running:
    """A ``colonnade run`` in a session of its own, and the processes that belong to it."""

    def __init__(self, movie: Path, output: Path, settings: dict, *, workers: int = 2) -> None:
        profile = output.parent / "profile.yaml"
        profile.write_text(f"kind: local\nworkers: {workers}\nmemory: 3.0\n")
        words = [word for key, value in {**tools.QUICK, **settings}.items() for word in ("--set", f"{key}={value}")]
        self.output = output
        self.process = subprocess.Popen(
            tools.command("run", movie, "-o", output, "--cluster", profile, *words),
            env=tools.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def workers(self) -> list[psutil.Process]:
        """Worker processes that exist now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        return []

    def family(self) -> list[psutil.Process]:
        """Every process of the run's session."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def parts(self, step: str = "*") -> int:
        """Blocks that are on disk."""
        return len(list((self.output / "parts").glob(f"*/{step}-*.npz")))

    def wait_for_parts(self, number: int, step: str = "*") -> None:
        """Wait until so many blocks are on disk; fail if the run ends before."""
        end = time.monotonic() + WAIT
        while self.parts(step) < number:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, f"{self.parts(step)} of {number} blocks after {WAIT} s"
            time.sleep(0.005)

    def finish(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of the whole command."""
        out, err = self.process.communicate(timeout=WAIT)
        return self.process.returncode, out, err

    def gone(self) -> list[psutil.Process]:
        """What still lives of the run some seconds after its end."""
        end = time.monotonic() + 20
        while (left := self.family()) and time.monotonic() < end:
            time.sleep(0.1)
        return left


def computed_twice(output: Path) -> dict:
    """Blocks that were recorded done and then computed again with the same fingerprint; tables do not count."""
    blocks = Counter(block for block in tools.computed(output) if block[0] != "collect")
    return {block: number for block, number in blocks.items() if number > 1}


def assert_no_false_zeros(path: Path) -> None:
    """What an interrupted run holds must not read as results."""
    if not (path / "zarr.json").exists():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)  # of a variable that had a folder and no metadata yet
        tree = xr.open_datatree(path, engine="zarr", consolidated=False)
    with tree:
        said = tree.attrs.get("colonnade", {"state": "running"})
        if said["state"] == "complete":
            return
        assert said["state"] == "running"
        frames = tree["frames"].to_dataset().load() if "frames" in tree.children else xr.Dataset()
        # A table that was being made has some of its variables; what was not computed reads as fill values.
        unknown = frames.get("status", xr.full_like(frames.get("time", xr.DataArray([])), STATUS["not_computed"]))
        for name in {"column_count", "species_count", "snr", "drift_y"} & set(frames):
            values = frames[name].values[(unknown == STATUS["not_computed"]).values]
            assert (np.isnan(values) if values.dtype.kind == "f" else values == -1).all()


def finish_and_compare(movie, output, settings, undisturbed) -> None:
    """The same command again must end well, with the undisturbed result, and leave nothing behind."""
    done_before = Counter(tools.computed(output))
    again = Running(movie, output, settings)
    code, _, err = again.finish()
    assert code == 0, err
    assert tools.differences(undisturbed, output / "lattice.zarr") == []
    assert computed_twice(output) == {}
    assert not (Counter(tools.computed(output)) - done_before).keys() & {b for b in done_before if b[0] != "collect"}
    assert list(output.rglob("*.partial")) == []
    assert not (output / "ledger" / "lease.json").exists()
    assert again.gone() == []


def kill_all(processes) -> None:
    """SIGKILL to all of them, the parents first."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.slow
def test_killed_worker_is_replaced_and_its_blocks_are_done_again(movie, settings, undisturbed, tmp_path):
    dice = random.Random(1)
    run = Running(movie, tmp_path / "out", settings)
    for threshold in (3, 12, 16):
        run.wait_for_parts(threshold)
        time.sleep(dice.uniform(0, 0.3))
        kill_all(dice.sample(run.workers(), k=1) if run.workers() else [])
    code, _, err = run.finish()
    assert code == 0, err
    assert tools.differences(undisturbed, tmp_path / "out" / "lattice.zarr") == []
    assert computed_twice(tmp_path / "out") == {}
    assert run.gone() == []


def kill_again_and_again(movie, output, settings, moments, *, everything: bool, seed: int) -> None:
    """Start the run, kill the driver (or all of its processes) after so many blocks; once more, and so on."""
    dice = random.Random(seed)
    for blocks in moments:
        run = Running(movie, output, settings)
        run.wait_for_parts(blocks)
        time.sleep(dice.uniform(0, 0.3 if blocks else 3.0))
        kill_all(run.family() if everything else [run.process])
        run.process.communicate()
        assert_no_false_zeros(output / "lattice.zarr")
        assert run.gone() == []


@pytest.mark.slow
def test_killed_driver_leaves_no_process_and_the_next_one_goes_on(movie, settings, undisturbed, tmp_path):
    kill_again_and_again(movie, tmp_path / "out", settings, (0, 3, 13, 17, 22), everything=False, seed=1)
    finish_and_compare(movie, tmp_path / "out", settings, undisturbed)


@pytest.mark.slow
def test_everything_is_killed_and_the_next_run_goes_on(movie, settings, undisturbed, tmp_path):
    kill_again_and_again(movie, tmp_path / "out", settings, (1, 7, 14, 24), everything=True, seed=2)
    finish_and_compare(movie, tmp_path / "out", settings, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_the_run_and_says_how_to_go_on(movie, settings, undisturbed, tmp_path, number, code):
    run = Running(movie, tmp_path / "out", settings)
    run.wait_for_parts(12)
    if number == signal.SIGINT:
        os.killpg(run.process.pid, number)  # what a terminal does: Ctrl-C reaches the workers too
    else:
        run.process.send_signal(number)
    returned, _, err = run.finish()
    assert returned == code, err
    assert "To go on:" in err and "--set blocks.frames=4" in err.replace("\n", " ")
    assert run.gone() == []
    assert not (tmp_path / "out" / "ledger" / "lease.json").exists()
    finish_and_compare(movie, tmp_path / "out", settings, undisturbed)


def test_second_driver_is_refused_while_the_first_lives(movie, settings, tmp_path):
    run = Running(movie, tmp_path / "out", settings, workers=1)
    try:
        run.wait_for_parts(1)
        run.process.send_signal(signal.SIGSTOP)  # alive, and not done before the second one tries
        second = tools.colonnade("run", movie, "-o", tmp_path / "out", "--cluster", "serial")
        assert second.returncode == 4
        assert f"process {run.process.pid}" in second.stderr.replace("\n", " ")
    finally:
        kill_all(run.family())
        run.process.communicate()
