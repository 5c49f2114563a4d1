"""Readers of formats without a microscope's metadata tree: NPY and MRC."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np

from pipeline.ingest import records
from pipeline.ingest.facts import MAX_SIDE, Clock, Facts, Spacing, json_able, plain_dtype, positive
from schemas.errors import SourceError

FEI_HEADERS = (b"FEI1", b"FEI2")
MAX_FRAMES = 10_000_000  # beyond this a header is no header
MRC_MODES = {0: "i1", 1: "i2", 2: "f4", 4: "c8", 6: "u2", 12: "f2"}


def inspect_npy(path: Path, dataset: str | None) -> Facts:
    """A NumPy file: (y, x), (time, y, x) or (time, defocus, y, x); it holds no calibration."""
    del dataset
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        offset = file.tell()
    name = plain_dtype(path, dtype)
    leading, plane = split_shape(path, shape)
    if fortran:
        raise SourceError(f"{path}: is in Fortran order; save it with np.save(path, np.ascontiguousarray(array)).")
    stride = plane[0] * plane[1] * dtype.itemsize
    where = records.layout(np.dtype(dtype), offset=offset, stride=stride)
    return records_facts(path, leading, plane, dtype=name, where=where)


def inspect_mrc(path: Path, dataset: str | None) -> Facts:
    """An MRC stack: sections are frames in the order and orientation stored; extended headers are honoured.

    Source: the MRC2014 specification, doi:10.1016/j.jsb.2015.04.002; FEI extended header as typed by mrcfile.
    """
    del dataset
    header, extended, notes = _mrc_header(path)
    nx, ny, nz = int(header.nx), int(header.ny), int(header.nz)
    mode = int(header.mode)
    if mode not in MRC_MODES:
        raise SourceError(f"{path}: has MRC mode {mode}; expected one of {sorted(MRC_MODES)}.")
    dtype = np.dtype(MRC_MODES[mode]).newbyteorder(header.mode.dtype.byteorder)
    offset = 1024 + max(int(header.nsymbt), 0)
    where = records.layout(dtype, offset=offset, stride=nx * ny * dtype.itemsize)
    vendor: dict[str, Any] = {"header": {name: header[name] for name in header.dtype.names}}
    extra: dict[str, Any] = {}
    if extended is not None:
        vendor["extended_header"] = {name: extended[name] for name in extended.dtype.names}
        extra = _fei_facts(extended, nz)
    spacing = extra.pop("spacing", None) or _mrc_spacing(header)
    return records_facts(
        path,
        (nz,),
        (ny, nx),
        dtype=plain_dtype(path, dtype),
        where=where,
        spacing=spacing,
        vendor=json_able(vendor),
        notes=notes,
        **extra,
    )


def _mrc_header(path: Path) -> tuple[Any, Any, tuple[str, ...]]:
    with path.open("rb") as raw:
        start = raw.read(1024)
    if not any(_plausible(start, order, path.stat().st_size) for order in "<>"):
        raise SourceError(f"{path}: is not an MRC file, or ends within its header of 1,024 bytes.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mrcfile.open(path, permissive=True, header_only=True) as file:
            header = file.header.copy()
            known = bytes(header.exttyp) in FEI_HEADERS and file.extended_header.size > 0
            extended = file.indexed_extended_header.copy() if known else None
    return header, extended, tuple(f"mrcfile: {item.message}" for item in caught)


def _plausible(header: bytes, order: str, size: int) -> bool:
    """Whether the numbers of a header can be those of an MRC file of so many bytes, in one byte order."""
    if len(header) < 1024:
        return False
    words = np.frombuffer(header, np.dtype("i4").newbyteorder("<" if order == "<" else ">"))
    nx, ny, nz, mode, extended = (int(words[i]) for i in (0, 1, 2, 3, 23))
    sizes = 0 < nx <= MAX_SIDE and 0 < ny <= MAX_SIDE and 0 < nz <= MAX_FRAMES
    return sizes and 0 <= mode <= 1000 and extended <= size


def _mrc_spacing(header: Any) -> Spacing | None:
    cell = (float(header.cella.y), float(header.cella.x))
    if cell == (0.0, 0.0):
        return None
    grid = (int(header.my), int(header.mx))
    if min(grid) < 1:
        return None
    return Spacing(cell[0] / grid[0], "Å", cell[1] / grid[1], "Å", "the MRC header (cell / intervals)")


def _fei_facts(extended: Any, frames: int) -> dict[str, Any]:
    names = extended.dtype.names
    facts: dict[str, Any] = {}

    def first(name: str) -> Any:
        return extended[name][0] if name in names and len(extended) else None

    y, x = positive(first("Pixel size Y")), positive(first("Pixel size X"))
    if y and x:
        facts["spacing"] = Spacing(y, "m", x, "m", "the FEI extended header")
    facts["energy"] = positive(first("HT"), 1e-3)
    facts["dose"] = positive(first("Dose"), 1e-20)  # e-/m² -> e-/Å²
    if "Timestamp" in names and len(extended) >= frames > 1:
        days = np.asarray(extended["Timestamp"][:frames], np.float64)
        if days.any():
            facts["clock"] = Clock("the FEI extended header", "s", stamps=tuple((days - days[0]) * 86_400.0))
    return facts


def split_shape(path: Path | str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The axes before (y, x) and (y, x) itself, from the shape of a stored array (time, [defocus,] y, x)."""
    shape = tuple(int(n) for n in shape)
    if len(shape) not in (2, 3, 4):
        raise SourceError(f"{path}: has the shape {shape}; expected (y, x), (time, y, x) or (time, defocus, y, x).")
    leading = shape[:-2] or (1,)
    if min(shape[1:]) < 1 or min(shape[-2:]) < 1:
        raise SourceError(f"{path}: has the shape {shape}; expected frames that hold pixels.")
    return leading, (shape[-2], shape[-1])


def records_facts(
    path: Path, leading: tuple[int, ...], plane: tuple[int, int], *, dtype: str, where: dict[str, Any], **more: Any
) -> Facts:
    """Facts of a file of plain records, with the planes that its size cannot hold marked bad."""
    size, planes = path.stat().st_size, math.prod(leading)
    bad = records.missing(size, where, plane, planes)
    reason = records.damage(size, where, plane, planes) if bad else ""
    return Facts(leading, plane, dtype, where, bad=bad, damage=reason, **more)
