"""A movie written straight into a stack: the same bits however it is cut and whoever computes it, and its truth."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from cluster import connect
from pipeline import simulation, store
from pipeline.cli import app
from pipeline.ingest.sources import discover
from pipeline.patience import Stopped
from pipeline.results.truth import load_truth, truth_of
from pipeline.simulate.movie import MovieSpec, simulate_movie
from pipeline.simulation import layout_of, simulate_stack
from pipeline.truth import read_truth
from schemas.errors import SchemaError, SettingsError
from schemas.profiles import Profile
from schemas.truth import TRUTH_FRAMES, TRUTH_TABLES

SPEC = MovieSpec(
    shape=(104, 104), frames=7, radius=7.0, defocus=-40.0, hops=2, adatoms=3, gain_spread=0.02, hot_pixels=0.002,
    rotation_step=0.3,
)  # fmt: skip
SERIES = MovieSpec(kind="mos2", shape=(64, 72), sampling=0.15, frames=5, defoci=(-50.0, 60.0), plane_drift=0.3)


def contents(path: Path) -> dict[str, Any]:
    stack = store.open_stack(path)
    attributes = {k: v for k, v in stack.attributes.items() if k not in ("movie", "shard_frames")}
    return {"counts": np.asarray(stack.counts[...]), "time": stack.time, **attributes, **read_truth(path)}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one.keys() == other.keys()
    different = [
        k for k, v in one.items() if not np.array_equal(v, other[k], equal_nan=np.asarray(v).dtype.kind == "f")
    ]
    assert not different, different
    return True


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Both movies simulated in this process, one frame to a task."""
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for name, spec in (("particle", SPEC), ("series", SERIES)):
        simulate_stack(spec, folder / f"{name}.zarr", seed=3, block=1)
        found[name] = contents(folder / f"{name}.zarr")
    return found


@pytest.mark.parametrize("block", [2, 3, 7, None])
def test_any_cut_gives_the_same_bits(alone: dict[str, dict[str, Any]], tmp_path: Path, block: int | None) -> None:
    simulate_stack(SPEC, tmp_path / "one.zarr", seed=3, block=block)
    assert same(contents(tmp_path / "one.zarr"), alone["particle"])


def test_any_number_of_workers_gives_the_same_bits(alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """None (as in the fixture), two, and one that is left of the two."""
    with connect(Profile(kind="local", workers=2, memory=1.5)) as client:
        assert client is not None
        for workers in (2, 1):
            assert len(client.nthreads()) == workers
            simulate_stack(SPEC, tmp_path / f"particle{workers}.zarr", seed=3, block=2, client=client)
            simulate_stack(SERIES, tmp_path / f"series{workers}.zarr", seed=3, block=workers, client=client)
            client.retire_workers([next(iter(client.nthreads()))])
    for name, expected in alone.items():
        for workers in (1, 2):
            assert same(contents(tmp_path / f"{name}{workers}.zarr"), expected)


def test_the_stack_is_the_movie_that_python_simulates(alone: dict[str, dict[str, Any]]) -> None:
    for name, spec in (("particle", SPEC), ("series", SERIES)):
        movie, found = simulate_movie(spec, 3), alone[name]
        assert np.array_equal(found["counts"], movie.counts) and np.array_equal(found["clean"], movie.clean)
        assert np.array_equal(found["masks"], movie.masks) and np.array_equal(found["drift"], movie.drift)
        for table, truth in (("column", movie.columns), ("site", movie.sites)):
            flat = np.concatenate(truth)
            for field in ("y", "x", "species"):
                assert np.array_equal(found[f"{table}_{field}"], flat[field])
        assert found["polarity"] == movie.polarity and found["defocus"][0] == movie.defocus
    assert np.array_equal(alone["series"]["plane_shifts"], simulate_movie(SERIES, 3).plane_shifts)


def test_truth_is_read_for_evaluation(tmp_path: Path) -> None:
    spec = MovieSpec(shape=(80, 80), frames=2, radius=6.0, defocus=-40.0)
    simulate_stack(spec, tmp_path / "a.zarr", seed=3)
    stored, expected = load_truth(tmp_path / "a.zarr"), truth_of(simulate_movie(spec, 3))
    for field in ("frame", "y", "x", "visible", "species", "drift", "sampling", "shape", "masks", "clean", "electrons"):
        assert np.array_equal(getattr(stored, field), getattr(expected, field)), field


def test_the_group_holds_what_the_schema_says(alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    wanted = {v.name: v for v in (*TRUTH_FRAMES.variables, *(v for table in TRUTH_TABLES.values() for v in table))}
    for found in alone.values():
        assert wanted.keys() <= found.keys()
        for name, variable in wanted.items():
            assert variable.dtype == "string" or found[name].dtype == variable.dtype
    simulate_stack(SERIES, tmp_path / "a.zarr", seed=3)
    tree = xr.open_datatree(tmp_path / "a.zarr", engine="zarr", consolidated=False)
    assert tree["truth/clean"].dims == ("time", "defocus", "y", "x") == tree["counts"].dims
    assert tree["truth/masks"].dims == ("time", "y", "x")
    assert all("long_name" in tree["truth"][name].attrs for name in wanted)
    tree.close()


def test_events_are_told_where_and_how(alone: dict[str, dict[str, Any]]) -> None:
    found = alone["particle"]
    kinds = list(found["event_kind"])
    assert kinds.count("hop") == 2
    for row, kind in enumerate(kinds):
        frame, column = found["event_frame"][row], found["event_column"][row]
        states = (found["event_before"][row], found["event_after"][row])
        assert states == (("", "Au") if kind == "appear" else ("Au", ""))
        goes = np.isfinite(found["event_to_y"][row])
        assert goes == (kind == "hop")
        moment = frame if kind == "appear" else frame - 1
        here = (found["column_frame"] == moment) & (found["column_id"] == column)
        assert np.abs(found["column_y"][here] - found["event_y"][row]) < 4  # px; it may drift and turn a little


def test_an_interrupted_simulation_goes_on(
    alone: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stop, done = tmp_path / "a.zarr", threading.Event(), []

    def counted(task: simulation.Simulation) -> int:
        done.append(task.start)
        if len(done) == 2:
            stop.set()
        return original(task)

    original = simulation.write_block
    monkeypatch.setattr(simulation, "write_block", counted)
    with pytest.raises(Stopped):
        simulate_stack(SPEC, path, seed=3, block=2, stop=stop)
    assert done == [0, 2] and store.attributes_of(path)["state"] == "running"
    stop.clear()
    written = simulate_stack(SPEC, path, seed=3, block=2)
    assert done == [0, 2, 4, 6] and (written.frames, written.computed) == (7, 3)
    assert same(contents(path), alone["particle"])
    again = simulate_stack(SPEC, path, seed=3, block=2)
    assert done == [0, 2, 4, 6] and again == written._replace(computed=0)
    simulate_stack(SPEC, path, seed=4, block=4)
    assert len(done) == 6 and not np.array_equal(contents(path)["counts"], alone["particle"]["counts"])


def test_what_is_no_stack_of_ours_is_not_overwritten_and_what_has_no_truth_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "data").write_text("mine")
    with pytest.raises(SettingsError, match="no store of ours"):
        simulate_stack(SPEC, tmp_path / "a.zarr", seed=1)
    assert (tmp_path / "a.zarr" / "data").read_text() == "mine"
    spec = MovieSpec(kind="vacuum", shape=(16, 16), frames=2)
    simulate_stack(spec, tmp_path / "b.zarr", seed=1)
    shutil.rmtree(tmp_path / "b.zarr" / "truth")
    with pytest.raises(SchemaError, match="holds no truth"):
        read_truth(tmp_path / "b.zarr")


def test_a_task_holds_a_bounded_share_of_a_long_movie() -> None:
    for shape in ((64, 64), (1024, 1024), (4096, 4096)):
        layout = layout_of(MovieSpec(kind="vacuum", shape=shape, frames=100_000), None)
        held = layout.shard_frames * shape[0] * shape[1] * 8
        assert held <= max(simulation.BLOCK_BYTES, shape[0] * shape[1] * 8) and layout.shard_frames <= 32
    assert layout_of(MovieSpec(kind="vacuum", frames=5), 3).shard_frames == 3


def test_the_verb_writes_a_stack_and_says_how_fast(tmp_path: Path) -> None:
    (tmp_path / "movie.yaml").write_text("kind: graphene\nmode: haadf\nshape: [48, 48]\nframes: 3\n")
    words = ["simulate", str(tmp_path / "movie.yaml"), str(tmp_path / "movie.zarr"), "--seed", "5"]
    first, again = (CliRunner().invoke(app, words) for _ in range(2))
    assert first.exit_code == again.exit_code == 0
    assert "3 frames" in first.output and re.search(r"3 images in [\d.]+ s: [\d.]+ images/s", first.output)
    assert "0 images in" in again.output
    expected = simulate_movie(MovieSpec(kind="graphene", mode="haadf", shape=(48, 48), frames=3), 5)
    assert np.array_equal(contents(tmp_path / "movie.zarr")["counts"], expected.counts)
    (files,) = discover([tmp_path / "movie.zarr"]).movies
    assert files.reader == "stack"
