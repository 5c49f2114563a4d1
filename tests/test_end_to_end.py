"""A movie from file to tables, for real: the same bits however it is cut and wherever, and readable by all."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import xarray as xr

from pipeline import open_run
from schemas import variables
from schemas.columns import COLUMNS
from schemas.frames import FRAMES
from tests import e2e_tools as tools

ADAPTED = {"denoise.weights": "adapt", "denoise.steps": 20, "denoise.crop": 32}


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    """A TIFF of 13 frames, and the drift [px] behind it."""
    counts, path = tools.lattice((72, 80), frames=13)
    return tools.write_movie(tmp_path_factory.mktemp("movie") / "lattice.tif", counts), path


@pytest.fixture(scope="module")
def reference(movie, tmp_path_factory):
    """The run of the movie without any scheduler, in blocks of 4, with a denoiser that was adapted to it."""
    output = tmp_path_factory.mktemp("reference")
    (outcome,) = tools.run_job(movie[0], output, blocks__frames=4, **ADAPTED)
    assert (outcome.status, outcome.frames, outcome.dropped) == ("complete", 13, 0)
    return outcome.path


@pytest.mark.parametrize("block", [8, 32])
def test_block_length_changes_no_bit(movie, reference, tmp_path, block):
    (outcome,) = tools.run_job(movie[0], tmp_path, blocks__frames=block, **ADAPTED)
    assert tools.differences(reference, outcome.path) == []


@pytest.mark.parametrize(("workers", "block"), [(1, 8), (2, 4)])
def test_worker_processes_change_no_bit(movie, reference, tmp_path, workers, block):
    (outcome,) = tools.run_job(movie[0], tmp_path, workers=workers, blocks__frames=block, **ADAPTED)
    assert tools.differences(reference, outcome.path) == []


def test_command_gives_the_same_bits_and_says_what_it_found(movie, reference, tmp_path):
    options = {**tools.QUICK, **ADAPTED, "blocks.frames": 5}
    words = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    done = tools.colonnade("run", movie[0], "-o", tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    assert "lattice: 13 frames" in done.stdout
    assert tools.differences(reference, tmp_path / "out" / "lattice.zarr") == []
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert [name for name in names if name.endswith(".zarr")] == ["lattice.zarr"]
    assert {"user.log", "debug.log", "ledger", "stacks"} <= set(names)


def test_result_is_right(movie, reference):
    found = tools.tables(reference)["frames"]
    drift = np.stack([found["drift_y"], found["drift_x"]], 1) / tools.SAMPLING
    assert np.sqrt(((drift - movie[1]) ** 2).sum(1).mean()) < 0.15
    assert (found["status"] == 0).all() and (found["reason"] == "").all()
    np.testing.assert_allclose(found["time"], tools.INTERVAL * np.arange(13))
    assert int(found["column_count"].sum()) == tools.tables(reference)["columns"].sizes["column"] > 13 * 20
    assert (found["dose"] > 0).all()


def test_tables_hold_what_the_schema_promises(reference):
    found = tools.tables(reference)
    variables.check(found["frames"], FRAMES)
    variables.check(found["columns"], COLUMNS)
    frame = found["columns"]["frame"].values
    np.testing.assert_array_equal(frame, np.repeat(np.arange(13), found["frames"]["column_count"].values))


def test_run_records_where_it_came_from(reference, movie):
    with xr.open_datatree(reference, engine="zarr", consolidated=False) as tree:
        said = tree.attrs["colonnade"]
    assert said["state"] == "complete"
    assert said["settings"]["denoise"]["steps"] == 20
    assert said["sources"][0]["path"].endswith(movie[0].name)
    assert len(said["models"]["segment"]["sha256"]) == 64
    assert {"python", "torch", "zarr", "colonnade"} <= set(said["versions"])
    of_frames = tools.tables(reference)["frames"]
    (device,), (denoiser,) = (set(of_frames[name].values) for name in ("device", "denoiser"))
    assert "cpu, " in device and f"torch {torch.__version__}, CUDA " in device
    blocks = [record for record in tools.records(reference.parent) if record.get("step") == "process"]
    blocks = [record for record in blocks if record["kind"] == "block"]
    assert len(blocks) == 4
    for block in blocks:
        assert block["device"] == device and block["models"]["denoise"] == denoiser
        for use, digits in block["models"].items():
            assert use == "denoise" or said["models"][use]["sha256"].startswith(digits)


READ = """
import json, sys
import xarray as xr
tree = xr.open_datatree(sys.argv[1], engine="zarr", consolidated=False)
count = tree["frames"]["column_count"].values
ours = [name for name in sys.modules if name.split(".")[0] in ("pipeline", "schemas", "cluster")]
print(json.dumps({"groups": sorted(tree.children), "count": count.tolist(), "ours": ours}))
"""


def test_xarray_opens_a_run_without_us(reference):
    done = subprocess.run([sys.executable, "-c", READ, reference], capture_output=True, text=True, check=True, cwd="/")
    said = json.loads(done.stdout)
    assert said["ours"] == []
    assert {"frames", "columns"} <= set(said["groups"])
    assert said["count"] == tools.tables(reference)["frames"]["column_count"].values.tolist()


def test_same_command_again_computes_nothing(movie, reference, tmp_path):
    first = tools.run_job(movie[0], tmp_path, blocks__frames=8, **ADAPTED)
    before = tools.computed(tmp_path)
    again = tools.run_job(movie[0], tmp_path, blocks__frames=8, **ADAPTED)
    assert tools.computed(tmp_path) == before and len(before) >= 8
    assert tools.differences(reference, again[0].path) == []
    assert again[0].columns == first[0].columns


def test_redo_computes_a_step_and_what_follows(movie, reference, tmp_path):
    tools.run_job(movie[0], tmp_path, blocks__frames=8, **ADAPTED)
    before = tools.computed(tmp_path)
    (outcome,) = tools.run_job(movie[0], tmp_path, blocks__frames=8, redo="vote", **ADAPTED)
    redone = tools.computed(tmp_path)[len(before) :]
    assert sorted({step for step, *_ in redone}) == ["collect", "process", "vote"]
    assert tools.differences(reference, outcome.path) == []


def test_other_settings_of_columns_recompute_process_alone(movie, tmp_path):
    tools.run_job(movie[0], tmp_path, blocks__frames=8)
    before = tools.computed(tmp_path)
    tools.run_job(movie[0], tmp_path, blocks__frames=8, columns__threshold=0.7)
    redone = tools.computed(tmp_path)[len(before) :]
    assert {step for step, *_ in redone} == {"process", "collect"}


@pytest.mark.slow
def test_windows_agree(tmp_path):
    counts, _ = tools.lattice((440, 300), frames=2, seed=3)
    movie = tools.write_movie(tmp_path / "wide.tif", counts)
    found = {}
    for window in (256, 512, None):
        (outcome,) = tools.run_job(
            movie, tmp_path / str(window), segment__window=window, images__save=["probability"], images__examples=0
        )
        with xr.open_datatree(outcome.path, engine="zarr", consolidated=False) as tree:
            probability = tree["images/probability/s0/probability"].values
        found[window] = probability, open_run(outcome.path)["columns"].to_dataset().load()
    whole, columns = found[None]
    assert columns.sizes["column"] > 1000
    for window in (256, 512):
        probability, other = found[window]
        assert np.abs(probability - whole).max() <= 1e-3
        assert tools.matched(columns, other, within=0.05) >= 0.999
        assert tools.matched(other, columns, within=0.05) >= 0.999
