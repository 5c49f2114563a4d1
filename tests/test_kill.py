"""Stop or kill a run, start the same command again: the same result, nothing computed twice, nothing left.

tests/test_soak.py kills single processes at random.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter

import numpy as np
import pytest

from tests import e2e_tools as tools
from tests.kill_tools import Running, computed_twice, false_values, kill_all

FRAMES, BLOCK = 40, 4


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


def finish_and_compare(movie, output, settings, undisturbed) -> None:
    """The same command again must end well, with the undisturbed result, and leave nothing behind."""
    done_before = Counter(tools.computed(output))
    again = Running(movie, output, settings)
    code, said = again.finish()
    assert code == 0, said
    assert tools.differences(undisturbed, output / "lattice.zarr") == []
    assert computed_twice(output) == {}
    assert not (Counter(tools.computed(output)) - done_before).keys() & {b for b in done_before if b[0] != "collect"}
    assert list(output.rglob("*.partial")) == []
    assert not (output / "ledger" / "lease.json").exists()
    assert again.gone() == []


@pytest.mark.slow
def test_everything_is_killed_and_the_next_run_goes_on(movie, settings, undisturbed, tmp_path):
    dice, truth = random.Random(2), tools.tables(undisturbed)
    for blocks in (1, 14, 24):
        run = Running(movie, tmp_path / "out", settings)
        run.wait_for_parts(blocks)
        time.sleep(dice.uniform(0, 0.3))
        kill_all(run.family())
        run.process.wait()
        assert false_values(tmp_path / "out" / "lattice.zarr", truth) == []
        assert run.gone() == []
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
    returned, said = run.finish()
    assert returned == code, said
    assert "To go on:" in said and "--set blocks.frames=4" in said.replace("\n", " ")
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
        run.process.wait()
