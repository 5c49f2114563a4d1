"""From files to a stack: the cut that was asked for, resumable, bounded in memory, and hashed by its pixels."""

from __future__ import annotations

import dataclasses
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import store
from pipeline.ingest import to_stack
from pipeline.ingest.describe import Description, SourceOverrides, describe
from pipeline.ingest.sources import discover
from pipeline.ingest.to_stack import Cut, binned_dtype, is_current, open_ingested, plan_cut, source_key, write_stack
from pipeline.patience import Stopped
from schemas.errors import SettingsError, SourceError
from schemas.settings import Source, Stacks

FRAMES = np.random.default_rng(0).integers(0, 60000, (10, 13, 17)).astype(np.uint16)
OVERRIDES = SourceOverrides(sampling=0.2, frame_interval=0.5)
SMALL = Stacks(shard_megabytes=3 * 13 * 17 * 2 / 2**20)  # three frames


@pytest.fixture(autouse=True)
def one_frame_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny frames would all share one chunk, hence one shard."""
    monkeypatch.setattr("pipeline.layout.SMALL_CHUNK", 1)


@pytest.fixture
def described(tmp_path: Path) -> Description:
    path = tmp_path / "movie.tif"
    tifffile.imwrite(path, FRAMES, photometric="minisblack")
    (movie,) = discover([path]).movies
    return describe(movie, OVERRIDES)


def ingest(description: Description, path: Path, stacks: Stacks = SMALL, **source: Any) -> store.Stack:
    write_stack(
        description, path, source=Source.model_validate(source), stacks=stacks, client=None, stop=threading.Event()
    )
    return store.open_stack(path)


# --------------------------------------------------------------------------------------------------------------- cut


def test_a_movie_is_copied_as_it_is(described: Description, tmp_path: Path) -> None:
    stack = ingest(described, tmp_path / "s.zarr")
    assert stack.counts.shards is not None
    assert stack.counts.shards[0] == 3
    assert stack.counts.dtype == np.uint16
    assert np.array_equal(stack.read(0, 10), FRAMES)
    assert stack.time.tolist() == (0.5 * np.arange(10)).tolist()
    assert not (tmp_path / "s.ingest").exists()


def test_frames_region_and_binning(described: Description, tmp_path: Path) -> None:
    stack = ingest(described, tmp_path / "s.zarr", frames=[2, 9], region=[1, 12, 4, 17], binning=3)
    expected = FRAMES[2:9, 1:10, 4:16].reshape(7, 3, 3, 4, 3).sum((2, 4), dtype=np.int64)
    assert np.array_equal(stack.read(0, 7), expected)  # sums do not overflow, the rest of the edge is left out
    assert stack.sampling == pytest.approx(0.6)
    # The centre of the first binned pixel, in Å on the whole detector.
    assert stack.origin == pytest.approx((0.2 * (1 + 1), 0.2 * (4 + 1)))
    assert stack.time[0] == 0
    assert stack.attributes["source"]["cut"] == {"frames": [2, 9], "region": [1, 12, 4, 17], "binning": 3}


def test_more_frames_than_there_are_means_all(described: Description, tmp_path: Path) -> None:
    assert ingest(described, tmp_path / "s.zarr", frames=[8, 99]).shape[0] == 2


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"frames": [10, 12]}, r"source\.frames is \[10, 12\], but movie has 10 frames"),
        ({"region": [0, 14, 0, 5]}, r"source\.region is \[0, 14, 0, 5\] .* are 13 x 17"),
        ({"binning": 14}, "with binning 14"),
    ],
)
def test_cuts_outside_the_movie_are_refused(described: Description, source: dict[str, Any], said: str) -> None:
    with pytest.raises(SourceError, match=said):
        plan_cut(described, Source.model_validate(source))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "float32", "float64"])
def test_binned_sums_fit(dtype: str) -> None:
    wide = binned_dtype(dtype, 8)
    if np.dtype(dtype).kind == "f":
        assert wide == np.dtype(dtype)
    else:
        assert np.iinfo(wide).max >= 64 * np.iinfo(dtype).max
        assert np.iinfo(wide).min <= 64 * np.iinfo(dtype).min
    assert binned_dtype(dtype, 1) == np.dtype(dtype)


@settings(deadline=None)
@given(st.data())
def test_cut_and_bin_like_a_slow_loop(data: st.DataObject) -> None:
    y0, x0 = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    n = data.draw(st.integers(1, 3))
    y1, x1 = data.draw(st.integers(y0 + n, 13)), data.draw(st.integers(x0 + n, 17))
    cut = Cut((0, 2), (y0, y1, x0, x1), n)
    found = cut.apply(FRAMES[:2])
    assert found.shape == cut.shape
    for y in range(found.shape[1]):
        for x in range(found.shape[2]):
            block = FRAMES[:2, y0 + y * n : y0 + (y + 1) * n, x0 + x * n : x0 + (x + 1) * n]
            assert (found[:, y, x] == block.sum((1, 2), dtype=np.int64)).all()


# ----------------------------------------------------------------------------------------------------------- content


def test_the_content_hash_depends_on_the_pixels_only(described: Description, tmp_path: Path) -> None:
    hashes = {
        ingest(described, tmp_path / f"{megabytes}.zarr", Stacks(shard_megabytes=megabytes)).attributes["content_hash"]
        for megabytes in (0.0005, 0.0013, 64.0)
    }
    finer = dataclasses.replace(described, sampling=0.1)
    hashes.add(ingest(finer, tmp_path / "finer.zarr").attributes["content_hash"])
    assert len(hashes) == 1
    hashes.add(ingest(described, tmp_path / "cut.zarr", frames=[0, 9]).attributes["content_hash"])
    hashes.add(ingest(described, tmp_path / "region.zarr", region=[0, 13, 0, 16]).attributes["content_hash"])
    assert len(hashes) == 3


def test_one_flipped_bit_in_the_source_is_other_content(described: Description, tmp_path: Path) -> None:
    before = ingest(described, tmp_path / "a.zarr").attributes["content_hash"]
    frames = FRAMES.copy()
    frames[7, 3, 3] ^= 1
    tifffile.imwrite(described.paths[0], frames, photometric="minisblack")
    (movie,) = discover([described.paths[0]]).movies
    assert ingest(describe(movie, OVERRIDES), tmp_path / "b.zarr").attributes["content_hash"] != before


# ------------------------------------------------------------------------------------------------------------ resume


def count_reads(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[tuple[int, int]]:
    """Ranges of frames that are read from now on; reading frame ``fail_at`` is interrupted."""
    seen: list[tuple[int, int]] = []
    original = to_stack.read_frames

    def reader(description: Description, start: int, stop: int) -> np.ndarray:
        if fail_at is not None and start <= fail_at < stop:
            raise KeyboardInterrupt
        seen.append((start, stop))
        return original(description, start, stop)

    monkeypatch.setattr(to_stack, "read_frames", reader)
    return seen


def test_an_interrupted_ingest_goes_on_where_it_was(
    described: Description, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.zarr"
    with monkeypatch.context() as patch:
        first = count_reads(patch, fail_at=7)
        with pytest.raises(KeyboardInterrupt):
            ingest(described, path)
    assert first == [(0, 3), (3, 6)]
    with pytest.raises(Exception, match="running"):
        store.open_stack(path)
    second = count_reads(monkeypatch)
    assert np.array_equal(ingest(described, path).read(0, 10), FRAMES)
    assert second == [(6, 9), (9, 10)]
    ingest(described, path)
    assert second == [(6, 9), (9, 10)]  # complete: nothing is read again


@pytest.mark.parametrize("change", ["shards", "cut", "sampling", "file"])
def test_what_was_begun_for_something_else_is_begun_anew(
    described: Description, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = tmp_path / "s.zarr"
    with monkeypatch.context() as patch:
        count_reads(patch, fail_at=7)
        with pytest.raises(KeyboardInterrupt):
            ingest(described, path)
    stacks, source, expected = SMALL, {}, FRAMES
    if change == "shards":
        stacks = Stacks(shard_megabytes=2 * 13 * 17 * 2 / 2**20)
    elif change == "cut":
        source, expected = {"frames": [1, 10]}, FRAMES[1:]
    elif change == "sampling":
        described = dataclasses.replace(described, sampling=0.3)
    else:
        tifffile.imwrite(described.paths[0], expected := FRAMES[::-1].copy(), photometric="minisblack")
        described = describe(discover([described.paths[0]]).movies[0], OVERRIDES)
    stack = ingest(described, path, stacks, **source)
    assert np.array_equal(stack.read(0, len(expected)), expected)
    assert stack.sampling == described.sampling


def test_a_stop_is_heard_between_shards(described: Description, tmp_path: Path) -> None:
    stop = threading.Event()
    with pytest.raises(Stopped):
        write_stack(
            described, tmp_path / "s.zarr", source=Source(), stacks=SMALL, client=None, stop=stop,
            progress=lambda frames: stop.set() if frames else None,
        )  # fmt: skip
    assert store.attributes_of(tmp_path / "s.zarr")["state"] == "running"


def test_a_stack_is_current_for_its_files_calibration_and_cut(described: Description, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    cut = plan_cut(described, Source())
    assert not is_current(path, source_key(described, cut))
    ingest(described, path)
    assert is_current(path, source_key(described, cut))
    others = [dataclasses.replace(described, sampling=0.3), dataclasses.replace(described, energy=80.0)]
    assert not any(is_current(path, source_key(other, cut)) for other in others)
    assert not is_current(path, source_key(described, dataclasses.replace(cut, binning=2)))


def test_a_folder_of_others_is_not_replaced(described: Description, tmp_path: Path) -> None:
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "thesis.tex").write_text("x")
    with pytest.raises(SettingsError, match="no store of ours"):
        ingest(described, tmp_path / "s.zarr")
    assert (tmp_path / "s.zarr" / "thesis.tex").exists()


# ------------------------------------------------------------------------------------------------- a stack as source


def test_settings_that_a_finished_stack_cannot_follow_are_refused(described: Description, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    ingest(described, path)
    assert open_ingested(path, Source()).shape == (10, 13, 17)
    assert open_ingested(path, Source(sampling=0.2, frame_interval=0.5)).sampling == 0.2
    for source in ({"sampling": 0.3}, {"frames": [0, 2]}, {"region": [0, 4, 0, 4]}, {"binning": 2}):
        with pytest.raises(SourceError, match=f"source.{next(iter(source))} = .* would have no effect"):
            open_ingested(path, Source.model_validate(source))


# ------------------------------------------------------------------------------------------------------------ memory


def peak(description: Description, path: Path, **source: Any) -> int:
    tracemalloc.start()
    try:
        ingest(description, path, Stacks(shard_megabytes=0.25), **source)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_movie_nor_with_a_small_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small region lets a shard hold very many frames of the detector: they are not held at once."""
    monkeypatch.setattr(to_stack, "PIECE_BYTES", 2**18)
    monkeypatch.setattr("pipeline.layout.SMALL_CHUNK", 2**16)
    peaks = {}
    for frames in (64, 640):
        path = tmp_path / f"{frames}.npy"
        np.save(path, np.ones((frames, 128, 128), np.uint16))
        description = describe(discover([path]).movies[0], OVERRIDES)
        peaks[frames] = peak(description, tmp_path / f"{frames}.zarr")
        peaks[-frames] = peak(description, tmp_path / f"{frames}-cut.zarr", region=[0, 4, 0, 4])
    assert peaks[640] < 1.3 * peaks[64] + 2**19
    assert peaks[-640] < 1.3 * peaks[-64] + 2**19
    assert peaks[-640] < 640 * 128 * 128 * 2 / 4
