"""A disk that fills up or turns read-only during a run: it waits, goes on when there is room, and loses nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import graph, patience
from tests import e2e_tools as tools


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small file system of its own; skipped, with the reason, where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def movie(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("movie")
    counts, _ = tools.lattice((64, 72), frames=24, seed=4)
    bright = tools.linear(
        folder / "bright.safetensors", np.array([[8.0]]), np.array([0.0]), sampling=0.4, sampling_range=[0.1, 0.8]
    )
    settings = {**tools.untrained(folder), "particles.model": bright, "particles.min_area": 1.0, "blocks.frames": 2}
    return tools.write_movie(folder / "lattice.tif", counts), settings


@pytest.fixture(scope="module")
def undisturbed(movie, tmp_path_factory) -> Path:
    (outcome,) = tools.run_job(movie[0], tmp_path_factory.mktemp("undisturbed"), **movie[1])
    return outcome.path


class Trouble:
    """Makes trouble as soon as a few blocks are done, and mends it a while after the run has begun to wait."""

    def __init__(self, output: Path, begin, mend) -> None:
        self.output, self.begin, self.mend, self.waited = output, begin, mend, False
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while len(list((self.output / "parts").glob("*/process-*.npz"))) < 3:
            time.sleep(0.002)
        self.begin()
        time.sleep(2.5)
        self.mend()


def fill(disk: Path) -> None:
    """Take all the room there is."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
        try:
            while True:
                file.write(bytes(64))
        except OSError:
            pass


@pytest.mark.parametrize("workers", [None, 2])
def test_a_full_disk_is_waited_for(disk, movie, undisturbed, workers, caplog, monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.2)
    output = disk / "out"
    trouble = Trouble(output, lambda: fill(disk), (disk / "ballast").unlink)
    trouble.thread.start()
    with caplog.at_level("WARNING", logger="colonnade"):
        (outcome,) = tools.run_job(movie[0], output, workers=workers, **movie[1])
    assert "No space left on device" in caplog.text and "trying again" in caplog.text
    assert tools.differences(undisturbed, outcome.path) == []
    assert list(output.rglob("*.partial")) == []


# Without the command's log files, which would keep the file system busy.
IMPATIENT = """
import sys
from pathlib import Path
import pipeline.patience
from pipeline.story import run
from schemas.jobfile import load_job
pipeline.patience.FIRST_PAUSE, pipeline.patience.PATIENCE = 0.1, 0.5
run(load_job(Path(sys.argv[1]), []))
"""


def test_a_disk_that_stays_read_only_ends_the_run_and_it_goes_on_later(disk, movie, undisturbed, tmp_path):
    output = disk / "out"

    def remount(how: str) -> None:
        while subprocess.run(["mount", "-o", f"remount,{how}", disk], capture_output=True, check=False).returncode:
            time.sleep(0.002)  # busy, while a file is being written

    Trouble(output, lambda: remount("ro"), lambda: None).thread.start()
    job = tools.write_jobfile(tmp_path / "job.yaml", movie[0], output, **movie[1])
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, job],
        env=tools.environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "ResourceError: Read-only file system" in done.stderr, done.stderr
    remount("rw")
    before = len(list((output / "parts").glob("*/process-*.npz")))
    assert 3 <= before < 12
    again = tools.colonnade("run", job, "--cluster", "serial")
    assert again.returncode == 0, again.stderr
    assert tools.differences(undisturbed, output / "lattice.zarr") == []
    assert len(tools.computed(output)) == len(set(tools.computed(output)))


def test_errors_of_other_kinds_are_not_waited_for():
    with pytest.raises(PermissionError):
        list(graph.stream(None, refuse, [1], label="x", stop=threading.Event()))


def refuse(item: int) -> None:
    raise PermissionError(13, "not yours")
