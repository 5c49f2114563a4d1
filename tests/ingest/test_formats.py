"""Every format: what is written comes back, in any cut, with its calibration; what is lost is named."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tifffile
import zarr

from pipeline.ingest.describe import Description, SourceOverrides, describe
from pipeline.ingest.reading import read_frames
from pipeline.ingest.sources import discover
from schemas.errors import SourceError

SAMPLING = 0.2
Writer = Callable[[SimpleNamespace, Path, np.ndarray], Path]


def one(path: Path | str, **overrides: object) -> Description:
    """The description of the one movie that a name leads to."""
    found = discover([path], dataset=overrides.get("dataset"))  # type: ignore[arg-type]
    assert len(found.movies) == 1, found
    return describe(found.movies[0], SourceOverrides(**overrides))  # type: ignore[arg-type]


def _dm4(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    return write.dm4(folder / "a.dm4", data, [(0.4, "s"), (0.02, "nm"), (0.02, "nm")])


def _ser(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    return write.ser(folder / "a_1.ser", data, 2e-11, total=11)


def _old_ser(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    return write.ser(folder / "a_1.ser", data, 2e-11, version=0x0210)


def _tvips(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    return write.tvips(folder, data, [3, 3, len(data) - 6])[0]


def _velox(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    return write.velox(folder / "a.emd", {"HAADF": data}, pixel=2e-11, frame_time=0.4)


def _berkeley(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    n, y, x = data.shape
    axes = [("time", "s", 0.4 * np.arange(n)), ("y", "n_m", 0.02 * np.arange(y)), ("x", "n_m", 0.02 * np.arange(x))]
    return write.berkeley(folder / "a.emd", data, axes)


def _berkeley_xyt(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    n, y, x = data.shape
    axes = [("x", "pm", 20.0 * np.arange(x)), ("y", "pm", 20.0 * np.arange(y)), ("time", "ms", 400.0 * np.arange(n))]
    return write.berkeley(folder / "a.emd", data.transpose(2, 1, 0), axes)


def _mrc(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    return write.mrc(folder / "a.mrc", data, SAMPLING)


def _npy(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    np.save(folder / "a.npy", data)
    return folder / "a.npy"


def _imagej(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    metadata = {"unit": "nm", "finterval": 0.4, "axes": "TYX"}
    tifffile.imwrite(folder / "a.tif", data, imagej=True, resolution=(50, 50), metadata=metadata)
    return folder / "a.tif"


def _bigtiff(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    tifffile.imwrite(folder / "a.tif", data, bigtiff=True, byteorder=">", photometric="minisblack")
    return folder / "a.tif"


def _pages(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    with tifffile.TiffWriter(folder / "a.tiff") as file:
        for i, frame in enumerate(data):  # descriptions of growing length: pages at irregular distances
            file.write(frame, description="x" * (3 * i), contiguous=False, metadata=None)
    return folder / "a.tiff"


def _compressed(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    tifffile.imwrite(folder / "a.tif", data, compression="zlib", predictor=True, photometric="minisblack")
    return folder / "a.tif"


def _ome(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    metadata = {"axes": "TYX", "PhysicalSizeX": 20.0, "PhysicalSizeXUnit": "pm", "PhysicalSizeY": 0.02,
                "PhysicalSizeYUnit": "nm", "TimeIncrement": 400.0, "TimeIncrementUnit": "ms"}  # fmt: skip
    tifffile.imwrite(folder / "a.ome.tif", data, metadata=metadata, photometric="minisblack")
    return folder / "a.ome.tif"


def _hdf5(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("entry/data", data=data, chunks=(1, 5, 5), compression="gzip", fletcher32=True)
        file["entry/offsets"] = np.arange(4)
    return folder / "a.h5"


def _hspy(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    with h5py.File(folder / "a.hspy", "w") as file:
        group = file.create_group("Experiments/movie")
        group["data"] = data
        for i, (name, scale, unit) in enumerate((("time", 0.4, "s"), ("y", 0.2, "Å"), ("x", 0.2, "Å"))):
            group.create_group(f"axis-{i}").attrs.update({"name": name, "scale": scale, "units": unit})
    return folder / "a.hspy"


def _zarr2(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    array = zarr.create_array(folder / "a.zarr", shape=data.shape, chunks=(2, 5, 5), dtype=data.dtype, zarr_format=2)
    array[:] = data
    return folder / "a.zarr"


def _zarr3(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    group = zarr.open_group(folder / "a.zarr", mode="w")
    array = group.create_array("counts", shape=data.shape, chunks=(2, 5, 5), dtype=data.dtype,
                               dimension_names=("time", "y", "x"))  # fmt: skip
    array[:] = data
    for name, unit, step, n in zip(["time", "y", "x"], ("s", "nm", "nm"), (0.4, 0.02, 0.02), data.shape, strict=True):
        axis = group.create_array(name, shape=(n,), dtype="float64", dimension_names=(name,))
        axis[:] = step * np.arange(n)
        axis.attrs["units"] = unit
    return folder / "a.zarr"


def _omezarr(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    group = zarr.open_group(folder / "a.zarr", mode="w")
    stored = data[:, None, None]
    group.create_array("s0", shape=stored.shape, dtype=data.dtype)[:] = stored
    group.create_array("s1", shape=(1, 1, 1, 2, 2), dtype=data.dtype)
    units = {"t": "second", "z": "micrometer", "y": "nanometer", "x": "nanometer"}
    axes = [{"name": name, "type": "space", **({"unit": units[name]} if name in units else {})} for name in "tczyx"]
    scale = [{"type": "scale", "scale": [0.4, 1.0, 1.0, 0.02, 0.02]}]
    levels = [{"path": name, "coordinateTransformations": scale} for name in ("s0", "s1")]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": levels}]}
    return folder / "a.zarr"


CALIBRATED = {  # format: does the file itself hold frame times of 0.4 s?
    _dm4: True, _ser: False, _old_ser: False, _velox: True, _berkeley: True, _berkeley_xyt: True, _mrc: False,
    _imagej: True, _ome: True, _hspy: True, _zarr3: True, _omezarr: True,
}  # fmt: skip
BARE = (_tvips, _npy, _bigtiff, _pages, _compressed, _hdf5, _zarr2)


def names(writers: object) -> list[str]:
    return [writer.__name__.strip("_") for writer in writers]  # type: ignore[attr-defined]


@pytest.mark.parametrize("writer", [*CALIBRATED, *BARE], ids=names([*CALIBRATED, *BARE]))
def test_any_cut_reads_what_was_written(writer: Writer, write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(8)
    described = one(writer(write, tmp_path, data), sampling=0.3, frame_interval=0.5)
    assert described.shape == data.shape
    assert described.dtype == "uint16"
    assert described.axes == ("time", "y", "x")
    assert described.good_frames == (True,) * 8
    np.testing.assert_array_equal(read_frames(described, 0, 8), data)
    for start, stop in ((0, 1), (7, 8), (2, 5), (3, 3), (1, 8)):
        part = read_frames(described, start, stop)
        assert part.dtype == np.uint16
        np.testing.assert_array_equal(part, data[start:stop])
    pieces = [read_frames(described, start, min(start + 3, 8)) for start in range(0, 8, 3)]
    np.testing.assert_array_equal(np.concatenate(pieces), data)


@pytest.mark.parametrize("writer", CALIBRATED, ids=names(CALIBRATED))
def test_calibration_comes_from_the_file(writer: Writer, write: SimpleNamespace, tmp_path: Path) -> None:
    path = writer(write, tmp_path, write.movie(8))
    interval = None if CALIBRATED[writer] else 0.4
    if interval is not None:
        with pytest.raises(SourceError, match=r"no frame times for its 8 frames.*source\.frame_interval"):
            one(path)
    described = one(path, frame_interval=interval)
    assert described.sampling == pytest.approx(SAMPLING, rel=1e-6)
    np.testing.assert_allclose(described.time, 0.4 * np.arange(8), rtol=1e-9)


@pytest.mark.parametrize(
    "writer", [w for w in BARE if w is not _tvips], ids=names([w for w in BARE if w is not _tvips])
)
def test_missing_calibration_names_both_settings(writer: Writer, write: SimpleNamespace, tmp_path: Path) -> None:
    path = writer(write, tmp_path, write.movie(8))
    with pytest.raises(SourceError, match="no pixel size") as caught:
        one(path)
    assert "--set source.sampling=0.17" in str(caught.value)
    assert "--set source.frame_interval=0.4" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("writer", [*CALIBRATED, *BARE], ids=names([*CALIBRATED, *BARE]))
def test_one_frame_needs_no_clock_and_descriptions_travel(
    writer: Writer, write: SimpleNamespace, tmp_path: Path
) -> None:
    if writer is _tvips:
        path = write.tvips(tmp_path, write.movie(1), [1])[0]
    else:
        path = writer(write, tmp_path, write.movie(1))
    described = one(path, sampling=0.3)
    assert described.shape[0] == 1
    assert described.time == (0.0,)
    np.testing.assert_array_equal(read_frames(described, 0, 1), write.movie(1))
    assert Description.from_dict(json.loads(json.dumps(described.to_dict()))) == described
    assert pickle.loads(pickle.dumps(described)) == described


def _size_of_frames(data: np.ndarray, frames: float) -> int:
    return int(data[0].nbytes * frames)


# format, bytes cut off its end, frames that are then whole
TRUNCATED = [
    (_ser, 1.5, 6), (_old_ser, 1.5, 6), (_mrc, 1.5, 6), (_npy, 1.5, 6), (_imagej, 1.5, 6), (_bigtiff, 1.5, 6),
    (_pages, 1.5, 6), (_mrc, 7.5, 0), (_npy, 7.5, 0),
]  # fmt: skip


@pytest.mark.parametrize(("writer", "lost", "whole"), TRUNCATED)
def test_truncation_names_the_last_good_frame(
    writer: Writer, lost: float, whole: int, write: SimpleNamespace, tmp_path: Path
) -> None:
    data = write.movie(8, (64, 64))
    path = writer(write, tmp_path, data)
    write.cut(path, -_size_of_frames(data, lost))
    settings = {"sampling": 0.3, "frame_interval": 0.5}
    if not whole:
        with pytest.raises(SourceError, match="no complete frame"):
            one(path, on_error="quarantine", **settings)
        return
    with pytest.raises(SourceError, match=f"last good frame is {whole - 1} .*quarantine") as caught:
        one(path, **settings)
    assert str(path) in str(caught.value)
    described = one(path, on_error="quarantine", **settings)
    assert sum(described.good_frames) == whole
    assert all(described.good_frames[:whole])
    frames = read_frames(described, 0, described.shape[0])
    np.testing.assert_array_equal(frames[:whole], data[:whole])
    assert not frames[whole:].any()
    assert any("quarantined" in note for note in described.notes)


def test_truncated_split_recording(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(8, (64, 64))
    paths = write.tvips(tmp_path, data, [3, 5])
    write.cut(paths[1], -100)
    with pytest.raises(SourceError, match=r"run_001.tvips.*last good frame is 3 "):
        one(paths[0], sampling=0.2)
    described = one(paths[0], sampling=0.2, on_error="quarantine")
    assert described.good_frames == (*[True] * 7, False)
    np.testing.assert_allclose(described.time, 0.04 * np.arange(8), atol=1e-6)
    np.testing.assert_array_equal(read_frames(described, 2, 7), data[2:7])


@pytest.mark.parametrize("writer", [_dm4, _velox, _hdf5], ids=["dm4", "velox", "hdf5"])
@pytest.mark.parametrize("on_error", ["stop", "quarantine"])
def test_formats_that_cannot_be_read_in_part(
    writer: Writer, on_error: str, write: SimpleNamespace, tmp_path: Path
) -> None:
    data = write.movie(8, (64, 64))
    path = write.cut(writer(write, tmp_path, data), -_size_of_frames(data, 4))
    with pytest.raises(SourceError, match="no frame can be recovered") as caught:
        one(path, on_error=on_error)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["a.dm3", "a.dm4", "a.ser", "a.emd", "a.mrc", "a.tvips", "a.tif", "a.h5", "a.npy"])
@pytest.mark.parametrize("content", [b"", b"not what its name says, by far" * 100])
def test_other_content_than_the_name_says(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceError, match=name):
        one(path, sampling=0.2, frame_interval=0.5)


def test_range_outside_of_the_movie(write: SimpleNamespace, tmp_path: Path) -> None:
    described = one(_mrc(write, tmp_path, write.movie(8)), frame_interval=0.5)
    for start, stop in ((-1, 2), (5, 9), (4, 3)):
        with pytest.raises(SourceError, match="it has frames 0 to 8"):
            read_frames(described, start, stop)


def test_a_file_that_changed_is_refused(write: SimpleNamespace, tmp_path: Path) -> None:
    path = _mrc(write, tmp_path, write.movie(8))
    described = one(path, frame_interval=0.5)
    write.cut(path, -10)
    with pytest.raises(SourceError, match="when it was described"):
        read_frames(described, 0, 2)
