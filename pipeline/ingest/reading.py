"""Pixels of a described movie: any range of frames, from files opened here and closed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.ingest.describe import Description
from pipeline.ingest.readers import read_planes
from schemas.errors import SourceError


def read_frames(description: Description, start: int, stop: int) -> np.ndarray:
    """Frames start…stop, (stop - start, [defocus,] y, x), in the detector's dtype; frames marked bad are zeros.

    Only the files and bytes of the range are touched. Raises SourceError for a range outside of the movie, and naming
    file and frame where a file changed or cannot be decoded.
    """
    frames = description.shape[0]
    if not 0 <= start <= stop <= frames:
        raise SourceError(f"{description.name}: frames {start} to {stop} are asked for; it has frames 0 to {frames}.")
    inner = description.shape[1:]
    good = np.asarray(description.good_frames[start:stop], bool)
    if good.all() and len(good):
        return _read(description, start, stop)
    out = np.zeros((stop - start, *inner), description.dtype)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], good, [False])).astype(np.int8)))
    for first, last in edges.reshape(-1, 2):
        out[first:last] = _read(description, start + int(first), start + int(last))
    return out


def read_frames_flagged(description: Description, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """As read_frames, but damage found only now costs single frames: (frames, good), bad frames being zeros."""
    good = np.asarray(description.good_frames[start:stop], bool)
    try:
        return read_frames(description, start, stop), good
    except SourceError:
        out = np.zeros((stop - start, *description.shape[1:]), description.dtype)
        for i in range(stop - start):
            try:
                out[i] = read_frames(description, start + i, start + i + 1)[0]
            except SourceError:
                good[i] = False
        return out, good


def _read(description: Description, start: int, stop: int) -> np.ndarray:
    inner = description.shape[1:]
    per_time = int(np.prod(inner[:-2], dtype=np.int64))
    plane = (inner[-2], inner[-1])
    span = (start * per_time, stop * per_time)
    pieces = _pieces(description, span)
    if len(pieces) == 1:
        return _piece(description, pieces[0], plane).reshape(stop - start, *inner)
    out = np.empty((span[1] - span[0], *plane), description.dtype)
    at = 0
    for file, first, last in pieces:
        out[at : at + last - first] = _piece(description, (file, first, last), plane)
        at += last - first
    return out.reshape(stop - start, *inner)


def _pieces(description: Description, span: tuple[int, int]) -> list[tuple[dict[str, Any], int, int]]:
    """Which planes of which files make up a range of planes of the movie."""
    pieces, begin = [], 0
    for file in description.files:
        end = begin + file["frames"]
        first, last = max(span[0], begin), min(span[1], end)
        if first < last:
            pieces.append((file, first - begin, last - begin))
        begin = end
    return pieces


def _piece(description: Description, piece: tuple[dict[str, Any], int, int], plane: tuple[int, int]) -> np.ndarray:
    file, first, last = piece
    path = Path(file["path"])
    if path.is_file() and path.stat().st_size != file["size"]:
        raise SourceError(
            f"{path}: has {path.stat().st_size:,} bytes, it had {file['size']:,} when it was described. "
            "Wait until it is written completely, then ingest it again."
        )
    return read_planes(path, description.reader, file["layout"], plane, (first, last))
