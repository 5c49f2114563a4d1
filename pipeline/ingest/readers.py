"""Which reader claims which file."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.ingest import records
from pipeline.ingest.facts import Facts
from schemas.errors import SourceError


@dataclass(frozen=True)
class Reader:
    """A format: the name endings it claims and, as "module:function", how to inspect a file and to read its planes."""

    name: str
    endings: tuple[str, ...]
    inspect: str
    read: str = ""


READERS = {
    reader.name: reader
    for reader in (
        Reader("dm", (".dm3", ".dm4"), "formats_dm:inspect_dm"),
        Reader("mrc", (".mrc", ".mrcs", ".rec", ".ali", ".st"), "formats_plain:inspect_mrc"),
        Reader("tiff", (".tif", ".tiff", ".btf", ".tf8"), "formats_tiff:inspect_tiff", "formats_tiff:read_tiff"),
        Reader("ser", (".ser",), "formats_fei:inspect_ser"),
        Reader("tvips", (".tvips",), "formats_tvips:inspect_tvips"),
        Reader("emd", (".emd",), "formats_hdf5:inspect_hdf5", "formats_hdf5:read_hdf5"),
        Reader(
            "hdf5",
            (".h5", ".hdf5", ".hdf", ".he5", ".hspy", ".nxs"),
            "formats_hdf5:inspect_hdf5",
            "formats_hdf5:read_hdf5",
        ),
        Reader("zarr", (".zarr",), "formats_zarr:inspect_zarr", "formats_zarr:read_zarr"),
        Reader("npy", (".npy",), "formats_plain:inspect_npy"),
    )
}
STACK = "stack"  # a stack of Colonnade itself


def reader_for(path: Path) -> Reader | None:
    """The reader that claims a file by its name, or None."""
    ending = path.suffix.lower()
    return next((reader for reader in READERS.values() if ending in reader.endings), None)


def inspect(path: Path, reader: str, dataset: str | None) -> Facts:
    """Facts of one file; every failure is a SourceError that names the file.

    Damaged bytes lead the parsers to exceptions of every kind: this is the one place where they are translated.
    """
    try:
        return _function(READERS[reader].inspect)(path, dataset)  # type: ignore[no-any-return]
    except (SourceError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file.") from error
    except Exception as error:
        raise SourceError(
            f"{path}: cannot be read as {reader}: it is damaged, or not what its name says "
            f"({type(error).__name__}: {error}). Open it in the software that wrote it, or copy it again."
        ) from error


def read_planes(
    path: Path, reader: str, layout: dict[str, Any], plane: tuple[int, int], span: tuple[int, int]
) -> np.ndarray:
    """Planes span[0]…span[1] of one file, (n, y, x), in native byte order."""
    try:
        if layout.get("kind") == "records":
            return records.read(path, layout, plane, *span)
        return _function(READERS[reader].read)(path, layout, plane, *span)  # type: ignore[no-any-return]
    except (SourceError, MemoryError):
        raise
    except Exception as error:
        raise SourceError(
            f"{path}: frames {span[0]} to {span[1] - 1} cannot be decoded ({type(error).__name__}: {error})."
        ) from error


def _function(name: str) -> Callable[..., Any]:
    module, function = name.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"pipeline.ingest.{module}"), function)
    return found
