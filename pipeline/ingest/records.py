"""Frames stored as plain bytes at known offsets: most detector formats come down to this."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from schemas.errors import SourceError


def layout(
    dtype: np.dtype[Any], offsets: Sequence[int] | None = None, *, offset: int = 0, stride: int = 0
) -> dict[str, Any]:
    """Where each frame lies: a first offset and a stride, or one offset per frame [bytes]."""
    dtype = np.dtype("u1") if dtype.kind == "b" else dtype
    if offsets is not None and len(offsets) > 0:
        steps = np.unique(np.diff(np.asarray(offsets, np.int64)))
        if len(steps) > 1:
            return {"kind": "records", "dtype": dtype.str, "offsets": [int(at) for at in offsets]}
        offset, stride = int(offsets[0]), int(steps[0]) if len(steps) else 0
    return {"kind": "records", "dtype": dtype.str, "offset": int(offset), "stride": int(stride)}


def missing(size: int, where: dict[str, Any], plane: Sequence[int], planes: int) -> tuple[int, ...]:
    """Frames whose last byte lies beyond the end of a file of `size` bytes."""
    length = frame_bytes(where, plane)
    if "offsets" in where:
        return tuple(i for i, at in enumerate(where["offsets"]) if at <= 0 or at + length > size)
    room = size - where["offset"] - length
    fitting = 0 if room < 0 else (planes if where["stride"] <= 0 else room // where["stride"] + 1)
    return tuple(range(min(fitting, planes), planes))


def frame_bytes(where: dict[str, Any], plane: Sequence[int]) -> int:
    """Bytes of the pixels of one frame."""
    return int(np.prod(plane, dtype=np.int64)) * np.dtype(where["dtype"]).itemsize


def damage(size: int, where: dict[str, Any], plane: Sequence[int], planes: int) -> str:
    """Says how much of a truncated file is there."""
    last = where["offsets"][-1] if "offsets" in where else where["offset"] + (planes - 1) * where["stride"]
    return f"the file has {size:,} bytes, its {planes} frames need {last + frame_bytes(where, plane):,}"


def read(path: Path, where: dict[str, Any], plane: Sequence[int], start: int, stop: int) -> np.ndarray:
    """Frames start…stop, (stop - start, *plane), in native byte order; raises SourceError where the file ends early."""
    stored = np.dtype(where["dtype"])
    out = np.empty((stop - start, *plane), stored)
    if out.size == 0:
        return out.view(stored.newbyteorder("="))
    with path.open("rb") as file:
        if "offsets" not in where and where["stride"] == frame_bytes(where, plane):
            _fill(file, out, where["offset"] + start * where["stride"], path, start)
        else:
            for i, frame in enumerate(range(start, stop)):
                at = where["offsets"][frame] if "offsets" in where else where["offset"] + frame * where["stride"]
                _fill(file, out[i], at, path, frame)
    if not stored.isnative:
        out.byteswap(inplace=True)
    if where.get("upside_down"):
        for frame in out:
            frame[:] = frame[::-1].copy()
    return out.view(stored.newbyteorder("="))


def _fill(file: BinaryIO, out: np.ndarray, offset: int, path: Path, frame: int) -> None:
    view = out.view(out.dtype.newbyteorder("=")).data.cast("B")
    file.seek(offset)
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise SourceError(
                f"{path}: ends inside frame {frame} (byte {offset + done:,} is beyond its end). "
                "Was it changed after it was described? Copy it again, then ingest it again."
            )
        done += got
