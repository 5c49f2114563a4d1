"""A range of frames costs the bytes of that range, wherever it lies and however long the movie is."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import mrcfile
import numpy as np
import pytest
import tifffile
import zarr

from pipeline.ingest.describe import Description, SourceOverrides, describe
from pipeline.ingest.reading import read_frames
from pipeline.ingest.sources import discover

FRAMES, SIDE = 240, 256
FRAME_BYTES = 2 * SIDE * SIDE
SET = SourceOverrides(sampling=0.2, frame_interval=0.5)
Writer = Callable[[SimpleNamespace, Path, np.ndarray], Path]


def one(path: Path) -> Description:
    (files,) = discover([path]).movies
    return describe(files, SET)


def _npy(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    np.save(folder / "a.npy", data)
    return folder / "a.npy"


def _tiff(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    tifffile.imwrite(folder / "a.tif", data, photometric="minisblack")
    return folder / "a.tif"


def _compressed_tiff(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    tifffile.imwrite(folder / "a.tif", data, compression="zlib", photometric="minisblack")
    return folder / "a.tif"


def _hdf5(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("data", data=data, chunks=(1, SIDE, SIDE))
    return folder / "a.h5"


def _zarr(write: SimpleNamespace, folder: Path, data: np.ndarray) -> Path:
    zarr.create_array(folder / "a.zarr", data=data, chunks=(1, SIDE, SIDE), compressors=None)
    return folder / "a.zarr"


WRITERS: dict[str, Writer] = {
    "dm4": lambda write, folder, data: write.dm4(folder / "a.dm4", data, [(1, "s"), (0.02, "nm"), (0.02, "nm")]),
    "ser": lambda write, folder, data: write.ser(folder / "a_1.ser", data, 2e-11),
    "tvips": lambda write, folder, data: write.tvips(folder, data, [100, 140])[0],
    "velox": lambda write, folder, data: write.velox(folder / "a.emd", {"HAADF": data}, pixel=2e-11),
    "mrc": lambda write, folder, data: write.mrc(folder / "a.mrc", data),
    "npy": _npy,
    "tiff": _tiff,
    "compressed tiff": _compressed_tiff,
    "hdf5": _hdf5,
    "zarr": _zarr,
}


def bytes_read() -> int:
    """Bytes that this process has asked files for so far (file maps are not counted)."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("the system does not count bytes read")
    return int(counters.read_text().split("rchar:")[1].split()[0])


@pytest.mark.parametrize("name", WRITERS)
def test_a_range_reads_and_holds_its_own_bytes_only(name: str, write: SimpleNamespace, tmp_path: Path) -> None:
    data = np.arange(FRAMES * SIDE * SIDE, dtype="u4").astype("u2").reshape(FRAMES, SIDE, SIDE)
    path = WRITERS[name](write, tmp_path, data)
    described = one(path)
    read_frames(described, 0, 1)  # imports happen here
    for start in (0, 117, FRAMES - 4):
        tracemalloc.start()
        before = bytes_read()
        frames = read_frames(described, start, start + 4)
        cost, (_, peak) = bytes_read() - before, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        np.testing.assert_array_equal(frames, data[start : start + 4])
        # the range itself, its copy while decoding or joining, and headers; the movie is 60 times the range
        assert peak < 2.5 * 4 * FRAME_BYTES, f"{peak / FRAME_BYTES:.1f} frames held for 4 read"
        assert cost < 2 * 4 * FRAME_BYTES, f"{cost / FRAME_BYTES:.1f} frames fetched for 4 read"


@pytest.mark.parametrize("name", WRITERS)
def test_description_reads_no_pixels(name: str, write: SimpleNamespace, tmp_path: Path) -> None:
    data = np.zeros((FRAMES, SIDE, SIDE), "u2")
    path = WRITERS[name](write, tmp_path, data)
    one(path)  # imports happen here
    tracemalloc.start()
    before = bytes_read()
    described = one(path)
    cost, (_, peak) = bytes_read() - before, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert described.shape == data.shape
    assert peak < data.nbytes / 10
    assert cost < data.nbytes / 5


def sparse_mrc(path: Path, frames: int, side: int, marked: dict[int, int]) -> Path:
    """An MRC file with an extended header and mostly holes, so that it takes no space on disk."""
    header = np.zeros(1, mrcfile.dtypes.HEADER_DTYPE)
    header["nx"] = header["ny"] = header["mx"] = header["my"] = side
    header["nz"] = header["mz"] = frames
    header["mode"], header["nsymbt"], header["exttyp"] = 1, 4096, b"SERI"
    header["cella"] = (0.5 * side, 0.5 * side, 0.5 * frames)
    header["map"], header["machst"] = b"MAP ", (0x44, 0x44, 0, 0)
    with path.open("wb") as file:
        file.write(header.tobytes())
        for frame, value in marked.items():
            file.seek(1024 + 4096 + frame * side * side * 2)
            file.write(np.full((side, side), value, "<i2").tobytes())
        file.truncate(1024 + 4096 + frames * side * side * 2)
    return path


def test_an_mrc_file_beyond_two_gib_with_an_extended_header(tmp_path: Path) -> None:
    frames, side = 400, 2048
    path = sparse_mrc(tmp_path / "long.mrc", frames, side, {0: 1, 1: 2, 255: 3, 399: 4})
    assert path.stat().st_size > 3 << 30
    described = one(path)
    assert described.shape == (frames, side, side)
    assert described.sampling == pytest.approx(0.2)
    for frame, value in ((0, 1), (1, 2), (255, 3), (256, 0), (399, 4)):
        assert (read_frames(described, frame, frame + 1) == value).all()


def test_peak_memory_of_a_process_does_not_know_the_length_of_the_movie(tmp_path: Path) -> None:
    """Resident memory, also of C libraries: 8 frames out of 20 and out of 400 cost the same."""
    script = (
        "import sys, resource\n"
        "from pathlib import Path\n"
        "from pipeline.ingest.describe import SourceOverrides, describe\n"
        "from pipeline.ingest.reading import read_frames\n"
        "from pipeline.ingest.sources import discover\n"
        "described = describe(discover([sys.argv[1]]).movies[0], SourceOverrides(0.2, 0.5))\n"
        "for start in range(0, described.shape[0], 8):\n"
        "    read_frames(described, start, min(start + 8, described.shape[0]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    root = Path(__file__).parents[2]
    peaks = []
    for frames in (20, 200):
        with h5py.File(tmp_path / f"{frames}.h5", "w") as file:
            stored = file.create_dataset("data", (frames, 512, 512), "u2", chunks=(1, 512, 512), compression="gzip")
            for i in range(frames):
                stored[i] = i
        command = [sys.executable, "-c", script, str(tmp_path / f"{frames}.h5")]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.1 * peaks[0]
