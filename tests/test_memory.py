"""Memory is a promise: bounded whatever the movie's length, and no more than was predicted."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader

import numpy as np
import pytest

from pipeline import plan, store
from tests import e2e_tools as tools

SCRIPT = tools.ROOT / "scripts" / "measure_memory"
# Small networks and few columns: what must not grow is what surrounds them.
CHEAP = {"drift.lags": "[1]", "blocks.frames": 8, "images.examples": 1, "segment.halo": "null"}


@pytest.fixture(scope="module")
def measure():
    """The functions of scripts/measure_memory."""
    loader = SourceFileLoader("measure_memory", str(SCRIPT))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def test_peak_of_a_process_is_found(measure):
    code = "import time; held = bytearray(200_000_000); del held; time.sleep(3)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        peaks = measure.watch(process)
    assert 200e6 < peaks["driver"] < 260e6
    assert peaks["worker"] == 0.0


def test_movie_of_the_measurement_is_as_long_as_asked(measure, tmp_path):
    measure.write_movie(tmp_path / "movie.npy", 70, 32)
    movie = np.load(tmp_path / "movie.npy", mmap_mode="r")
    assert movie.shape == (70, 32, 32) and movie.dtype == np.uint16
    np.testing.assert_array_equal(movie[3], movie[67])


@pytest.mark.slow
def test_ten_times_the_frames_take_no_more_memory(measure, tmp_path):
    settings = [f"{key}={value}" for key, value in {**CHEAP, **tools.untrained(tmp_path)}.items()]
    short, long = (measure.measure(tmp_path, frames, 64, workers=2, settings=settings) for frames in (160, 1600))
    for kind in ("driver", "worker", "sum"):
        assert long[kind] <= 1.15 * short[kind], (kind, short, long)


PEAK = """
import sys
from pipeline import graph, story
from tests import e2e_tools as tools

compute = graph.single_threaded
peak = 0

def measured(function, item):
    global peak
    # Only what tasks need counts: forget the peak of making the movie and of importing.
    open("/proc/self/clear_refs", "w").write("5")
    result = compute(function, item)
    with open("/proc/self/status") as file:
        peak = max(peak, *(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")))
    return result

graph.single_threaded = measured
story.run(tools.job(sys.argv[1], sys.argv[2], **{"source.sampling": 0.1, "source.frame_interval": 0.1}))
print(peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("edge", "frames"), [(256, 40), (900, 10)])
def test_prediction_holds(measure, tmp_path, edge, frames):
    measure.write_movie(tmp_path / "movie.npy", frames, edge)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "movie.npy", tmp_path / "out"],
        env=tools.environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak = float(done.stdout.splitlines()[-1])
    job = tools.job(tmp_path / "movie.npy", tmp_path / "out")
    shape = store.open_stack(tmp_path / "out" / "stacks" / "movie.zarr").shape
    size, halo = plan.block_frames(job, shape), plan.denoiser_halo(job)
    predicted = plan.predict_memory(job, shape, 2, size, halo)
    assert peak <= predicted <= 2 * peak, (peak, predicted)
