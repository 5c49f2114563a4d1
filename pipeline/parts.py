"""Part files: what one block found, written whole or not at all, each naming the fingerprint that it answers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from schemas.errors import SchemaError

_META = "__meta__"
_NAMES = "__arrays__"  # the archive's own directory carries no checksum: a flipped bit there may hide an array
_ORPHAN = re.compile(r"\.[0-9a-f]{32}\.partial$")  # ours and Zarr's temporary names
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError)


def part_path(folder: Path, step: str, start: int, stop: int, fingerprint: str) -> Path:
    """Where the part of frames [start, stop) lies; the name carries the fingerprint, so stale parts are never read."""
    return folder / f"{step}-{start:09d}-{stop:09d}-{fingerprint[:16]}.npz"


def replace_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or the old one, also after the machine lost power."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def write_part(path: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Write arrays and a JSON record as one file; its appearance under ``path`` is what makes a block finished."""
    import io

    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps({**meta, _NAMES: sorted(arrays)}).encode(), dtype=np.uint8)
    np.savez(buffer, allow_pickle=False, **{_META: text}, **arrays)
    replace_atomically(path, buffer.getvalue())


def read_part(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and record of a part; the archive's CRCs are checked on the way. A damaged one is a ``SchemaError``."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name != _META}
            meta: dict[str, Any] = json.loads(bytes(file[_META]))
        if sorted(arrays) != meta.pop(_NAMES, sorted(arrays)):
            raise ValueError(f"it holds {', '.join(sorted(arrays)) or 'no array'}, which is not what was written")
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise SchemaError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove it and run again; only its frames are redone"
        ) from None
    return arrays, meta


def read_meta(path: Path) -> dict[str, Any] | None:
    """The record of a part alone, or None where there is no readable part."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            meta: dict[str, Any] = json.loads(bytes(file[_META]))
            meta.pop(_NAMES, None)
            return meta
    except _DAMAGE:
        return None


def sweep(folders: Iterable[Path]) -> int:
    """Remove what writers that were killed left behind; call only while no writer is alive. Returns how many.

    Only names that carry a writer's random mark are removed: a user may have partial files of his own.
    """
    found = [path for folder in folders for path in folder.rglob("*.partial") if _ORPHAN.search(path.name)]
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(found)
