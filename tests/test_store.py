"""Stores: what is written is read back, what is missing or damaged is an error, and others can read them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st
from ome_zarr_models.v05 import Image

from pipeline import store
from pipeline.layout import pyramid_levels, stack_layout
from schemas.columns import COLUMNS
from schemas.conventions import SCHEMA_VERSION, STATUS
from schemas.errors import SchemaError, SettingsError, SourceError
from schemas.frames import FRAMES
from schemas.stack import STACK
from schemas.variables import check

FRAMES_OF_STACK = np.random.default_rng(0).poisson(20, (7, 12, 16)).astype(np.uint16)


def make_stack(path: Path, frames: np.ndarray = FRAMES_OF_STACK, *, finish: bool = True, shard: int = 2) -> Path:
    """A stack with shards of ``shard`` frames, one chunk per frame."""
    layout = store.StackLayout((1, *frames.shape[1:]), (shard, *frames.shape[1:]))
    defocus = None if frames.ndim == 3 else [100.0 * k for k in range(frames.shape[1])]
    store.create_stack(
        path, shape=frames.shape, dtype=frames.dtype, time=0.5 * np.arange(len(frames)), sampling=0.2, layout=layout,
        attributes={"sampling": 0.2, "energy": 300.0, "content_hash": "x"}, origin=(1.0, 2.0), defocus=defocus,
    )  # fmt: skip
    for start in range(0, len(frames), shard):
        store.write_frames(path, start, frames[start : start + shard])
    if finish:
        store.finish_stack(path, frame_ok=np.ones(len(frames), bool), attributes={})
    return path


def make_run(path: Path, *, rows: int = 3, frames: int = 4) -> Path:
    store.create_run(path, {"movie": "m"})
    known = {"time": np.arange(frames) * 0.5, "species_class": ["unknown"]}
    store.create_table(path, FRAMES, frames, sizes={"species_class": 1}, coordinates=known)
    store.create_table(path, COLUMNS, rows, sizes={}, coordinates={})
    return path


def column_rows(rows: int) -> dict[str, np.ndarray]:
    return {
        v.name: np.full(rows, "Au", dtype=object) if v.dtype == "string" else np.arange(rows).astype(v.dtype)
        for v in COLUMNS.variables
    }


# ------------------------------------------------------------------------------------------------------------ layout


@given(
    frames=st.integers(1, 3000), planes=st.integers(0, 4), height=st.integers(1, 3000), width=st.integers(1, 3000),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]), megabytes=st.floats(0.01, 200),
)  # fmt: skip
def test_shards_tile_the_frames_once(
    frames: int, planes: int, height: int, width: int, dtype: str, megabytes: float
) -> None:
    shape = (frames, *((planes,) if planes else ()), height, width)
    layout = stack_layout(shape, dtype, shard_megabytes=megabytes)
    assert all(s % c == 0 for s, c in zip(layout.shard, layout.chunk, strict=True))
    assert all(s >= n for s, n in zip(layout.shard[1:], shape[1:], strict=True))  # a shard owns whole frames
    starts = range(0, frames, layout.shard_frames)
    owned = [i for start in starts for i in range(start, min(start + layout.shard_frames, frames))]
    assert owned == list(range(frames))
    size = math.prod(layout.shard[1:]) * np.dtype(dtype).itemsize
    # One chunk is the least that a shard can hold; beyond that the limit holds, up to the rounding of chunks' edges.
    assert layout.shard_frames == layout.chunk[0] or layout.shard_frames * size <= megabytes * 2**20 * 4
    assert layout.shard_frames < frames + layout.chunk[0]


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_pyramids_end_small_and_not_empty(height: int, width: int) -> None:
    levels = pyramid_levels(height, width)
    assert min(height, width) >> (levels - 1) >= 1
    assert max(height, width) >> (levels - 1) <= 256 or min(height, width) >> levels == 0


# ------------------------------------------------------------------------------------------------------------ stacks


def test_a_stack_returns_what_was_written(tmp_path: Path) -> None:
    stack = store.open_stack(make_stack(tmp_path / "s.zarr"))
    assert np.array_equal(stack.read(0, 7), FRAMES_OF_STACK)
    assert np.array_equal(stack.read_frames([6, 0, 3]), FRAMES_OF_STACK[[6, 0, 3]])
    assert stack.counts.dtype == np.uint16
    assert (stack.shape, stack.sampling, stack.origin) == ((7, 12, 16), 0.2, (1.0, 2.0))
    assert stack.frame_ok.all()


@pytest.mark.parametrize(("start", "count"), [(1, 2), (0, 1), (0, 3), (2, 1), (6, 2)])
def test_unaligned_writes_are_refused(tmp_path: Path, start: int, count: int) -> None:
    path = make_stack(tmp_path / "s.zarr")
    with pytest.raises(ValueError, match="whole shards of 2 rows"):
        store.write_frames(path, start, np.zeros((count, 12, 16), np.uint16))
    assert np.array_equal(store.open_stack(path).read(0, 7), FRAMES_OF_STACK)


def test_shards_of_zeros_are_stored(tmp_path: Path) -> None:
    path = make_stack(tmp_path / "s.zarr", np.zeros_like(FRAMES_OF_STACK))
    assert len(list((path / "counts" / "c").rglob("0"))) >= 4
    assert not store.open_stack(path).read(0, 7).any()
    store.write_frames(path, 0, np.zeros((2, 12, 16), np.uint16))  # Zarr deletes a shard that is overwritten with fill
    assert shard_files(path)[0].is_file()


def shard_files(path: Path) -> list[Path]:
    return sorted(p for p in (path / "counts" / "c").rglob("*") if p.is_file())


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit_is_an_error_and_can_be_overwritten(tmp_path: Path, where: str) -> None:
    path = make_stack(tmp_path / "s.zarr")
    file = shard_files(path)[1]
    data = bytearray(file.read_bytes())
    data[{"first": 20, "middle": len(data) // 3, "last": -3}[where]] ^= 1
    file.write_bytes(data)
    with pytest.raises(SourceError, match=r"frames 2 to 3 cannot be read .* ingest its source again"):
        store.open_stack(path).read(2, 4)
    assert np.array_equal(store.open_stack(path).read(0, 2), FRAMES_OF_STACK[:2])
    store.write_frames(path, 2, FRAMES_OF_STACK[2:4])
    assert np.array_equal(store.open_stack(path).read(0, 7), FRAMES_OF_STACK)


@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
def test_a_lost_shard_never_reads_as_zeros(tmp_path: Path, how: str) -> None:
    path = make_stack(tmp_path / "s.zarr")
    file = shard_files(path)[-1]
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(b"" if how == "empty" else file.read_bytes()[:100])
    stack = store.open_stack(path)
    assert np.array_equal(stack.read(0, 6), FRAMES_OF_STACK[:6])
    with pytest.raises(SourceError, match="ingest its source again"):
        stack.read(5, 7)


def test_an_unfinished_stack_is_refused(tmp_path: Path) -> None:
    path = make_stack(tmp_path / "s.zarr", finish=False)
    with pytest.raises(SchemaError, match="state 'running'; expected a complete stack"):
        store.open_stack(path)
    with xr.open_zarr(path, consolidated=False) as dataset:
        assert (dataset.frame_ok == -1).all()


def test_xarray_reads_a_stack_with_its_axes(tmp_path: Path) -> None:
    with xr.open_zarr(make_stack(tmp_path / "s.zarr"), consolidated=False) as dataset:
        assert dataset.counts.dims == ("time", "y", "x")
        assert dataset.counts.dtype == np.uint16
        assert np.allclose(dataset.time, 0.5 * np.arange(7))
        assert np.allclose(dataset.y, 1.0 + 0.2 * np.arange(12))
        assert np.allclose(dataset.x, 2.0 + 0.2 * np.arange(16))
        units = {name: dataset[name].attrs["units"] for name in ("time", "y", "x")}
        assert units == {"time": "s", "y": "angstrom", "x": "angstrom"}
        assert np.array_equal(dataset.counts, FRAMES_OF_STACK)
        check(dataset, STACK)


def test_a_focal_series_has_its_defoci(tmp_path: Path) -> None:
    frames = np.arange(4 * 3 * 6 * 5, dtype=np.uint16).reshape(4, 3, 6, 5)
    path = make_stack(tmp_path / "s.zarr", frames)
    with xr.open_zarr(path, consolidated=False) as dataset:
        assert dataset.counts.dims == ("time", "defocus", "y", "x")
        assert dataset.defocus.values.tolist() == [0.0, 100.0, 200.0]
        assert dataset.defocus.attrs["units"] == "angstrom"
    assert np.array_equal(store.open_stack(path).read(1, 3, plane=2), frames[1:3, 2])
    shard_files(path)[0].unlink()
    with pytest.raises(SourceError, match="missing"):
        store.open_stack(path).read(0, 1)


@pytest.mark.parametrize("planes", [0, 3])
def test_a_stack_is_an_ome_zarr_image(tmp_path: Path, planes: int) -> None:
    frames = np.zeros((4, *((planes,) if planes else ()), 6, 5), np.uint16)
    image = Image.from_zarr(zarr.open_group(str(make_stack(tmp_path / "s.zarr", frames)), mode="r"))
    (multiscale,) = image.ome_attributes.multiscales
    names = ["time", *(["defocus"] if planes else []), "y", "x"]
    assert [axis.name for axis in multiscale.axes] == names
    scale, translation = multiscale.datasets[0].coordinateTransformations
    assert scale.scale == [0.5, *([1.0] if planes else []), 0.2, 0.2]
    assert translation.translation == [0.0, *([0.0] if planes else []), 1.0, 2.0]


def test_a_newer_layout_is_refused(tmp_path: Path) -> None:
    path = make_stack(tmp_path / "s.zarr")
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"]["colonnade"]["schema_version"] = SCHEMA_VERSION + 1
    (path / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(SchemaError, match=f"schema_version {SCHEMA_VERSION + 1}.*upgrade colonnade"):
        store.open_stack(path)


@pytest.mark.parametrize("what", ["nothing", "a file", "an array", "a run"])
def test_what_is_no_stack_is_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "s.zarr"
    if what == "a file":
        path.write_text("x")
    elif what == "an array":
        zarr.create_array(str(path), shape=(3, 4, 4), dtype="u2")
    elif what == "a run":
        make_run(path)
    with pytest.raises(SchemaError, match=str(path)):
        store.open_stack(path)


# ------------------------------------------------------------------------------------------- nothing of others is lost


def test_a_stack_never_replaces_what_is_not_a_stack_of_ours(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.zarr"
    zarr.create_array(str(theirs), shape=(3, 4, 4), dtype="u2")[...] = 7
    run = make_run(tmp_path / "run.zarr")
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "one.png").write_text("x")
    for path in (theirs, run, folder):
        with pytest.raises(SettingsError, match="choose another folder or name"):
            make_stack(path)
    assert (np.asarray(zarr.open_array(str(theirs), mode="r")[...]) == 7).all()
    assert (folder / "one.png").exists()
    assert store.kind_of(run) == "run"


def test_a_run_never_replaces_what_is_not_a_run_of_ours(tmp_path: Path) -> None:
    """`colonnade run movie.zarr -o .` would write the run over the movie."""
    path = make_stack(tmp_path / "movie.zarr")
    with pytest.raises(SettingsError, match="is a stack; a run would be written there"):
        store.create_run(path, {})
    assert np.array_equal(store.open_stack(path).read(0, 7), FRAMES_OF_STACK)


def test_a_run_of_a_newer_version_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
        path = make_run(tmp_path / "r.zarr")
    with pytest.raises(SchemaError, match="upgrade"):
        store.create_run(path, {})


def test_a_stack_is_replaced_whole(tmp_path: Path) -> None:
    path = make_stack(tmp_path / "s.zarr")
    make_stack(path, FRAMES_OF_STACK[:4] + 1)
    assert np.array_equal(store.open_stack(path).read(0, 4), FRAMES_OF_STACK[:4] + 1)
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


def test_a_removal_that_is_interrupted_leaves_no_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_stack(tmp_path / "s.zarr")
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # killed before the first file was removed
    store.remove(path)
    assert not path.exists()


# -------------------------------------------------------------------------------------------------------- run tables


def test_unwritten_tables_cannot_be_taken_for_results(tmp_path: Path) -> None:
    with store.open_tree(make_run(tmp_path / "r.zarr")) as tree:
        frames, columns = tree["frames"].dataset.load(), tree["columns"].dataset.load()
    assert (frames.status == STATUS["not_computed"]).all()
    assert (frames.column_count == -1).all()
    assert (frames.species_count == -1).all()
    for dataset in (frames, columns):
        for name, array in dataset.data_vars.items():
            if array.dtype.kind == "f":
                assert array.isnull().all(), name
    assert (columns.frame == -1).all()
    check(frames, FRAMES)
    check(columns, COLUMNS)


def test_tables_without_rows_exist(tmp_path: Path) -> None:
    path = make_run(tmp_path / "r.zarr", rows=0)
    with xr.open_datatree(path, engine="zarr", consolidated=False) as tree:
        assert tree["columns"].sizes == {"column": 0}
        check(tree["columns"].dataset, COLUMNS)
        assert tree["frames"].sizes == {"time": 4, "species_class": 1}


def test_rows_are_read_back(tmp_path: Path) -> None:
    path = make_run(tmp_path / "r.zarr", rows=5)
    rows = column_rows(5)
    store.write_rows(path, COLUMNS, 0, rows)
    with store.open_tree(path) as tree:
        for name, values in rows.items():
            assert tree["columns"][name].values.tolist() == values.tolist(), name


def test_rows_are_written_in_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ROWS_PER_CHUNK", 4)
    monkeypatch.setattr(store, "ROWS_PER_SHARD", 8)
    path = make_run(tmp_path / "r.zarr", rows=19)
    rows = column_rows(19)
    for start in (0, 8, 16):
        store.write_rows(path, COLUMNS, start, {k: v[start : start + 8] for k, v in rows.items()})
    with store.open_tree(path) as tree:
        assert tree["columns"].frame.values.tolist() == list(range(19))
    for start, stop in ((4, 8), (0, 4), (8, 15), (16, 24)):
        with pytest.raises(ValueError, match=r"whole shards|rows of one length"):
            store.write_rows(path, COLUMNS, start, {k: v[: stop - start] for k, v in rows.items()})


def test_rows_that_lack_a_variable_are_refused(tmp_path: Path) -> None:
    path = make_run(tmp_path / "r.zarr")
    rows = column_rows(3)
    for wrong in (
        {k: v for k, v in rows.items() if k != "y_err"},
        {**rows, "y": rows["y"][:2]},
        {**rows, "colour": rows["y"]},
    ):
        with pytest.raises(ValueError, match="expected rows of one length"):
            store.write_rows(path, COLUMNS, 0, wrong)
    with store.open_tree(path) as tree:
        assert (tree["columns"].frame == -1).all()


def test_a_smaller_table_replaces_a_larger(tmp_path: Path) -> None:
    path = make_run(tmp_path / "r.zarr", rows=9)
    store.write_rows(path, COLUMNS, 0, column_rows(9))
    store.create_table(path, COLUMNS, 2, sizes={}, coordinates={})
    with store.open_tree(path) as tree:
        assert tree["columns"].frame.values.tolist() == [-1, -1]


def test_attributes_are_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "r.zarr"
    facts: dict[str, Any] = {"a": np.float32(0.5), "b": float("nan"), "c": Path("/x"), "d": (1, np.int8(2)), "e": None}
    store.create_run(path, facts)
    store.update_run(path, {"state": "complete"})
    found = store.attributes_of(path)
    assert (found["a"], found["b"], found["c"], found["d"], found["e"]) == (0.5, "nan", "/x", [1, 2], None)
    assert found["state"] == "complete"
