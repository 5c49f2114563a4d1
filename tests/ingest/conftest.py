"""Writers of small files as microscopes write them, made from the descriptions of the formats."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest

DM_TYPES = {"int16": 1, "float32": 2, "uint8": 6, "int32": 7, "uint16": 10, "uint32": 11}
DM_ELEMENTS = {"int16": 2, "float32": 6, "uint8": 10, "int32": 3, "uint16": 4, "uint32": 5}


def movie(frames: int = 7, size: tuple[int, int] = (12, 20), dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    """Counts (time, y, x) of which no two frames or pixels are alike by accident."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 250, (frames, *size)).astype(dtype)


def dm4(path: Path, data: np.ndarray, axes: list[tuple[float, str]], tags: dict[str, Any] | None = None) -> Path:
    """A DM4 file; `axes` holds (scale, unit) of the axes of data from first to last. Pixels come before their shape."""
    dimension = {
        str(i): {"Origin": 0.0, "Scale": float(scale), "Units": unit} for i, (scale, unit) in enumerate(reversed(axes))
    }
    image = {
        "Calibrations": {"Brightness": {"Origin": 0.0, "Scale": 1.0, "Units": ""}, "Dimension": dimension},
        "Data": data,
        "DataType": DM_TYPES[data.dtype.name],
        "Dimensions": {str(i): int(n) for i, n in enumerate(reversed(data.shape))},
    }
    body = _dm_group({"ImageList": {"0": {"ImageData": image, "ImageTags": tags or {}, "Name": "movie"}}}, top=True)
    path.write_bytes(struct.pack(">IQI", 4, len(body), 1) + body)
    return path


def _dm_group(tree: dict[str, Any], top: bool = False) -> bytes:
    out = b""
    for name, value in tree.items():
        label = b"" if name.isdigit() else name.encode()
        if isinstance(value, dict):
            body = _dm_group(value)
            out += struct.pack(">BH", 20, len(label)) + label + struct.pack(">Q", len(body)) + body
        else:
            body = b"%%%%" + _dm_value(value)
            out += struct.pack(">BH", 21, len(label)) + label + struct.pack(">Q", len(body)) + body
    head = struct.pack(">BBQ", 1, 0, len(tree))
    return head + out


def _dm_value(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        kind = DM_ELEMENTS[value.dtype.name]
        return struct.pack(">QQQQ", 3, 20, kind, value.size) + value.astype(value.dtype.newbyteorder("<")).tobytes()
    if isinstance(value, str):
        return struct.pack(">QQQQ", 3, 20, 4, len(value)) + value.encode("utf-16-le")
    if isinstance(value, float):
        return struct.pack(">QQ", 1, 7) + struct.pack("<d", value)
    return struct.pack(">QQ", 1, 5) + struct.pack("<I", value)


def ser(path: Path, data: np.ndarray, delta: float, *, total: int | None = None, version: int = 0x0220) -> Path:
    """A TIA series whose images have pixels of `delta` metres; the bottom row comes first."""
    frames, (y, x) = len(data), data.shape[1:]
    total = frames if total is None else total
    code = {"uint8": 1, "uint16": 2, "int16": 5, "float32": 7}[data.dtype.name]
    width = 8 if version > 0x0210 else 4
    offset_format = "Q" if width == 8 else "I"
    dimension = struct.pack("<IddII", total, 0.0, 1.0, 0, 6) + b"Number" + struct.pack("<I", 0)
    table = 22 + width + 4 + len(dimension)
    first = table + 2 * width * total
    element = 50 + data[0].nbytes + 8
    starts = [first + i * element for i in range(frames)]
    out = struct.pack("<HHHIIII", 0x4949, 0x0197, version, 0x4122, 0x4152, total, frames)
    out += struct.pack(f"<{offset_format}I", table, 1) + dimension
    out += struct.pack(f"<{total}{offset_format}", *starts, *[0] * (total - frames))
    out += struct.pack(f"<{total}{offset_format}", *[at + element - 8 for at in starts], *[0] * (total - frames))
    for i in range(frames):
        out += struct.pack("<ddiddiHII", 0.0, delta, 0, 0.0, delta, 0, code, x, y)
        out += data[i, ::-1].tobytes() + struct.pack("<HHI", 0x4152, 0, 1_000_000 + i // 3)
    path.write_bytes(out)
    return path


def tvips(
    folder: Path, data: np.ndarray, parts: list[int], *, pixel: int = 1, mode: int = 1, step_ms: int = 40
) -> list[Path]:
    """A TVIPS recording split into parts of so many frames each."""
    head = np.dtype([("num", "<u4"), ("timestamp", "<u4"), ("ms", "<u4"), ("LUTidx", "<u4"), ("fcurrent", "<f4"),
                     ("mag", "<u4"), ("mode", "<u4"), ("rest", "V36")])  # fmt: skip
    y, x = data.shape[1:]
    fields = (256, 2, x, y, 8 * data.itemsize, 0, 0, 1, 1, pixel, 300, 1_000_000, head.itemsize)
    main = struct.pack("<13I", *fields).ljust(256, b"T")
    paths, frame = [], 0
    for number, count in enumerate(parts):
        out = main if number == 0 else b""
        for _ in range(count):
            record = np.zeros(1, head)
            ms = frame * step_ms
            record["timestamp"], record["ms"], record["mode"] = 1_000_000 + ms // 1000, ms % 1000, mode
            out += record.tobytes() + data[frame].tobytes()
            frame += 1
        paths.append(folder / f"run_{number:03d}.tvips")
        paths[-1].write_bytes(out)
    return paths


def velox(
    path: Path, detectors: dict[str, np.ndarray], *, pixel: float, frame_time: float | None = 0.5, **more: Any
) -> Path:
    """A Velox EMD file with one image (time, y, x) per detector; `stamps` [µs] writes camera time stamps."""
    with h5py.File(path, "w") as file:
        for i, (name, data) in enumerate(detectors.items()):
            group = file.create_group(f"Data/Image/{i:032x}")
            group.create_dataset("Data", data=data.transpose(1, 2, 0), chunks=(*data.shape[1:], 1))
            metadata = np.zeros((5000, len(data)), np.uint8)
            for frame in range(len(data)):
                record: dict[str, Any] = {
                    "BinaryResult": {
                        "Detector": name, "DetectorIndex": str(i), "PixelUnitX": "m", "PixelUnitY": "m",
                        "PixelSize": {"width": repr(pixel), "height": repr(pixel)},
                    },
                    "Optics": {"AccelerationVoltage": "300000"},
                    "Scan": {} if frame_time is None else {"FrameTime": repr(frame_time)},
                }  # fmt: skip
                if "stamps" in more:
                    stamp = {"type": "int64", "value": str(more["stamps"][frame])}
                    record["CustomProperties"] = {f"Detectors[{name}].TimeStamp": stamp}
                text = json.dumps(record).encode()
                metadata[: len(text), frame] = np.frombuffer(text, np.uint8)
            group.create_dataset("Metadata", data=metadata, chunks=(5000, 1))
    return path


def berkeley(path: Path, data: np.ndarray, axes: list[tuple[str, str, np.ndarray]]) -> Path:
    """A Berkeley EMD file; `axes` holds (name, unit, positions) of the axes of data."""
    with h5py.File(path, "w") as file:
        group = file.create_group("data/movie")
        group.attrs["emd_group_type"] = 1
        group["data"] = data
        for i, (name, unit, values) in enumerate(axes):
            item = group.create_dataset(f"dim{i + 1}", data=values)
            item.attrs["name"], item.attrs["units"] = np.bytes_(name), np.bytes_(unit)
        file.create_group("microscope").attrs["high tension"] = 300_000.0
    return path


def mrc(path: Path, data: np.ndarray, sampling: float | None = 0.5, extended: np.ndarray | None = None) -> Path:
    """An MRC stack; `extended` becomes its extended header (FEI1, or Direct Electron bytes of unknown type)."""
    with mrcfile.new(path, data=data, overwrite=True) as file:
        if extended is not None:
            file.set_extended_header(extended)
            file.header.exttyp = b"FEI1" if extended.dtype.names else b"DEEL"
        if sampling is not None:
            file.voxel_size = sampling
    return path


def cut(path: Path, size: int) -> Path:
    """Truncate a file to so many bytes (counted from its end where negative)."""
    with path.open("r+b") as file:
        file.truncate(size if size >= 0 else path.stat().st_size + size)
    return path


@pytest.fixture
def write() -> SimpleNamespace:
    """The writers of this file."""
    return SimpleNamespace(movie=movie, dm4=dm4, ser=ser, tvips=tvips, velox=velox, berkeley=berkeley, mrc=mrc, cut=cut)
