"""Runs open lazily, and ragged columns go to frames and back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from pipeline import store
from pipeline.layout import stack_layout
from pipeline.results import open as opening
from schemas.errors import SchemaError


def _slow_rows(counts: np.ndarray, frames: list[int]) -> list[int]:
    owner = [f for f, count in enumerate(counts) for _ in range(max(count, 0))]
    return [row for f in frames for row, o in enumerate(owner) if o == f % len(counts)]


def test_a_run_opens_with_its_provenance(run_path: Path) -> None:
    run = opening.open_run(run_path)
    assert opening.provenance(run)["state"] == "complete"
    assert opening.movie_name(run, run_path) == "movie"
    assert run["columns"].sizes["column"] == 10


def test_a_run_in_progress_opens(make_run: Callable[..., Path]) -> None:
    assert opening.provenance(opening.open_run(make_run(state="running")))["state"] == "running"


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"absent\.zarr does not exist; expected a run"):
        opening.open_run(tmp_path / "absent.zarr")


def test_a_foreign_store_is_refused(tmp_path: Path) -> None:
    zarr.create_group(str(tmp_path / "other.zarr"), zarr_format=3)
    with pytest.raises(SchemaError, match="not a store that colonnade wrote"):
        opening.open_run(tmp_path / "other.zarr")


def test_a_stack_is_not_a_run(tmp_path: Path) -> None:
    layout = stack_layout((2, 8, 8), "uint16", shard_megabytes=1)
    attributes = {"sampling": 0.2}
    store.create_stack(
        tmp_path / "s.zarr", shape=(2, 8, 8), dtype="uint16", time=np.arange(2.0), sampling=0.2, layout=layout,
        attributes=attributes,
    )  # fmt: skip
    with pytest.raises(SchemaError, match="is a stack; expected a run"):
        opening.open_run(tmp_path / "s.zarr")


def test_a_newer_version_is_refused(run_path: Path) -> None:
    store.update_run(run_path, {"schema_version": 99})
    with pytest.raises(SchemaError, match="schema_version 99; this version reads up to 1"):
        opening.open_run(run_path)


def test_runs_of_a_folder_leave_stacks_out(make_run: Callable[..., Path], tmp_path: Path) -> None:
    a, b = make_run("b"), make_run("a")
    zarr.create_group(str(tmp_path / "other.zarr"), zarr_format=3)
    assert opening.find_runs(tmp_path) == [b, a]
    assert opening.find_runs(a) == [a]
    assert opening.find_runs(tmp_path / "nowhere") == []


@given(st.lists(st.integers(-1, 6), max_size=30))
def test_offsets_give_each_frame_its_rows(counts: list[int]) -> None:
    offsets = opening.frame_index(np.array(counts, dtype="int32"))
    assert len(offsets) == len(counts) + 1
    for f in range(len(counts)):
        assert list(range(offsets[f], offsets[f + 1])) == _slow_rows(np.array(counts), [f])


@pytest.mark.parametrize("frame", [0, 1, 2, 3, 4, 5, -1, -3])
def test_columns_of_one_frame(run_path: Path, frame: int) -> None:
    run = opening.open_run(run_path)
    counts = run["frames/column_count"].values
    found = opening.columns_of_frame(run, frame)
    assert np.array_equal(found["x"].values, run["columns/x"].values[_slow_rows(counts, [frame])])
    assert set(found["frame"].values) <= {frame % len(counts)}


@pytest.mark.parametrize("frame", [6, -7])
def test_a_frame_outside_the_movie_is_refused(run_path: Path, frame: int) -> None:
    run = opening.open_run(run_path)
    with pytest.raises(IndexError, match="outside the movie"):
        opening.columns_of_frame(run, frame)
    with pytest.raises(IndexError, match="outside the movie"):
        opening.rows_of_frames(run, [0, frame])


@pytest.mark.parametrize("frames", [[], [0], [3, 0], [0, 1, 2, 3], [4, 4], [-2, -1], [5, 2, 1], [2, 3, 0, 1]])
def test_rows_of_several_frames_in_their_order(run_path: Path, frames: list[int]) -> None:
    run = opening.open_run(run_path)
    rows = _slow_rows(run["frames/column_count"].values, frames)
    found = opening.rows_of_frames(run, frames)
    assert np.array_equal(found["y"].values, run["columns/y"].values[rows])
    assert found["species"].values.tolist() == ["Au"] * len(rows)


def test_rows_of_a_mask_over_frames(run_path: Path) -> None:
    run = opening.open_run(run_path)
    mask = run["frames/snr"].values > 4
    assert opening.rows_of_frames(run, mask)["frame"].values.tolist() == [4, 4]
    with pytest.raises(IndexError, match=r"shape \(2,\); expected \(6,\)"):
        opening.rows_of_frames(run, np.array([True, False]))


def test_only_the_needed_rows_are_read(run_path: Path) -> None:
    """Removing what other variables hold does not disturb reading one."""
    shutil.rmtree(run_path / "columns" / "intensity" / "c")
    found = opening.columns_of_frame(opening.open_run(run_path), 3)
    assert np.all(found["probability"].values > 0)


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_batches_tile_the_table(run_path: Path, rows: int) -> None:
    run = opening.open_run(run_path)
    pieces = [batch["x"].values for batch in opening.row_batches(run, rows)]
    assert max(map(len, pieces)) <= rows
    assert np.array_equal(np.concatenate(pieces), run["columns/x"].values)


def test_frames_are_spread_over_their_columns(run_path: Path) -> None:
    run = opening.open_run(run_path)
    columns = opening.columns_of_frame(run, 3)
    frames = opening.frames_of_columns(run, columns)
    assert frames["snr"].values.tolist() == [4.0] * 5
    assert frames["time"].values.tolist() == [1.5] * 5
    assert set(opening.frames_of_columns(run, columns, ["dose"]).data_vars) == {"dose"}


def test_detector_positions_add_the_drift(run_path: Path) -> None:
    run = opening.open_run(run_path)
    columns = opening.columns_of_frame(run, 4)
    there = opening.to_detector(run, columns)
    assert np.allclose(there["y_detector"] - there["y"], 0.3 * 2.0)
    assert np.allclose(there["x_detector"] - there["x"], -0.7 * 2.0)
    assert there["x_detector"].attrs["units"] == "angstrom"
