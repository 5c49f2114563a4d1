"""Part files: whole or absent, checked when they are read, and orphans are swept without touching anything else."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import parts
from pipeline.parts import part_path, read_meta, read_part, replace_atomically, sweep, write_part
from schemas.errors import SchemaError

ARRAYS = {
    "y": np.arange(5.0),
    "none": np.zeros((0, 3), np.float32),
    "reason": np.array(["", "all pixels are zero"]),
    "good": np.array([True, False]),
    "images": np.arange(24, dtype=np.uint16).reshape(2, 3, 4),
}
META = {"fingerprint": "abc", "rows": 5, "nested": {"a": [1, 2.5, None]}}


def test_arrays_and_record_are_read_back(tmp_path: Path) -> None:
    path = part_path(tmp_path / "parts", "process", 4, 8, "f" * 64)
    write_part(path, ARRAYS, META)
    arrays, meta = read_part(path)
    assert meta == META == read_meta(path)
    assert set(arrays) == set(ARRAYS)
    for name, values in ARRAYS.items():
        assert np.array_equal(arrays[name], values), name
        assert arrays[name].dtype == values.dtype, name


def test_the_name_carries_step_frames_and_fingerprint(tmp_path: Path) -> None:
    names = {
        part_path(tmp_path, step, start, stop, key * 32).name
        for step in ("survey", "process") for start, stop in ((0, 4), (0, 8), (4, 8)) for key in ("ab", "cd")
    }  # fmt: skip
    assert len(names) == 12
    assert part_path(tmp_path, "a", 5, 6, "k").name < part_path(tmp_path, "a", 40, 50, "k").name


def test_objects_are_never_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"[Oo]bject"):
        write_part(tmp_path / "p.npz", {"species": np.array(["Au", None], dtype=object)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("part") / "p.npz"
    write_part(path, ARRAYS, META)
    return path.read_bytes()


def check_flipped(whole: bytes, place: int, path: Path) -> None:
    """A part with one bit flipped must be an error, or read as if nothing had happened."""
    broken = bytearray(whole)
    broken[place // 8] ^= 1 << (place % 8)
    path.write_bytes(broken)
    try:
        arrays, meta = read_part(path)
    except SchemaError as error:
        assert "remove it and run again" in str(error)
        return
    assert meta == META
    assert {name: values.tolist() for name, values in arrays.items()} == {k: v.tolist() for k, v in ARRAYS.items()}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_an_error_or_changes_nothing(
    data: st.DataObject, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = data.draw(st.integers(0, len(whole) * 8 - 1))
    check_flipped(whole, place, tmp_path_factory.getbasetemp() / "flipped.npz")


def test_no_flipped_bit_of_the_directory_hides_an_array(whole: bytes, tmp_path: Path) -> None:
    for place in range(whole.index(b"PK\x01\x02") * 8, len(whole) * 8):
        check_flipped(whole, place, tmp_path / "flipped.npz")


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_cut_part_is_an_error_with_its_remedy(whole: bytes, tmp_path: Path, size: int) -> None:
    path = tmp_path / "p.npz"
    path.write_bytes(whole[:size])
    with pytest.raises(SchemaError, match=r"p\.npz is damaged .* remove it"):
        read_part(path)
    assert read_meta(path) is None


def test_an_absent_part_is_no_damage(tmp_path: Path) -> None:
    assert read_meta(tmp_path / "p.npz") is None
    with pytest.raises(FileNotFoundError):
        read_part(tmp_path / "p.npz")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p"
    replace_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(parts.os, "fsync", lambda descriptor: seen.append((tmp_path / "p").exists()))
    replace_atomically(tmp_path / "p", b"x")
    assert seen == [False]


def test_orphans_are_swept_and_nothing_else(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    orphans = [
        tmp_path / "parts" / f".p.npz.{mark}.partial",
        tmp_path / "stacks" / "s.zarr" / "c" / f"0.{mark}.partial",
    ]
    store = tmp_path / "stacks" / f".s.zarr.{mark}.partial"
    theirs = [tmp_path / "parts" / "download.partial", tmp_path / f".p.{mark}.partial", tmp_path / "parts" / "p.npz"]
    for file in (*orphans, *theirs, store / "zarr.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    assert sweep([tmp_path / "parts", tmp_path / "stacks", tmp_path / "absent"]) == 3
    assert not any(path.exists() for path in (*orphans, store))
    assert all(path.exists() for path in theirs)
