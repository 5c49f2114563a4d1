"""Reader of TIFF, BigTIFF, ImageJ and OME stacks.

Uncompressed pages are read by offset; compressed ones one page at a time, each found by the offset of its directory,
so that a range costs the same at the end of a movie as at its start.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from pipeline.ingest import records, tiff_metadata
from pipeline.ingest.facts import Facts, json_able, number, plain_dtype
from schemas.errors import SourceError


def inspect_tiff(path: Path, dataset: str | None) -> Facts:
    """Facts of the (only, or chosen) series of pages of a TIFF file."""
    with collected_log() as complaints, tifffile.TiffFile(path, _multifile=False) as file:
        return _inspect(path, file, dataset, complaints)  # (an OME file may name other files anywhere)


def _inspect(path: Path, file: tifffile.TiffFile, dataset: str | None, complaints: list[str]) -> Facts:
    series = _choose(path, file, dataset)
    leading, plane = _axes(path, series)
    dtype = np.dtype(series.dtype)
    stored = dtype.newbyteorder(file.byteorder)
    where, bad, promised = _layout(file, series, leading, dtype=stored, plane=plane)
    whole = promised - len(bad)
    damage = "; ".join(complaints[:3]) or (f"{whole} of {promised} frames are complete" if bad else "")
    spacing, clock = tiff_metadata.calibration(file)
    odd = "C" in series.axes and series.shape[series.axes.index("C")] > 1
    return Facts(
        leading if promised == math.prod(leading) else (promised,),
        plane,
        plain_dtype(path, dtype),
        where,
        bad=bad,
        damage=damage,
        spacing=spacing,
        clock=clock,
        energy=tiff_metadata.energy(file),
        vendor=json_able(tiff_metadata.vendor(file)),
        notes=(f"the axis that the file calls channel ({series.axes}) is taken as time",) if odd else (),
    )


def _layout(
    file: tifffile.TiffFile,
    series: tifffile.TiffPageSeries,
    leading: tuple[int, ...],
    *,
    dtype: np.dtype[Any],
    plane: tuple[int, int],
) -> tuple[dict[str, Any], tuple[int, ...], int]:
    """How to reach the planes, which of them are lost, and how many the file promises."""
    planes, size = math.prod(leading), file.filehandle.size
    images = number((file.imagej_metadata or {}).get("images"))
    promised = max(planes, int(images)) if images and len(leading) == 1 else planes
    offset = series.dataoffset
    if offset is None and promised > planes and _is_plain(series.keyframe, dtype):
        offset = series.keyframe.dataoffsets[0]  # ImageJ writes all images in one run, the directories may be cut off
    if offset is not None:
        where = records.layout(dtype, offset=offset, stride=plane[0] * plane[1] * dtype.itemsize)
        return where, records.missing(size, where, plane, promised), promised
    where, bad = _pages(file, series, dtype)
    return where, (*bad, *range(planes, promised)), promised


def _choose(path: Path, file: tifffile.TiffFile, dataset: str | None) -> tifffile.TiffPageSeries:
    found = [series for series in file.series if not series.keyframe.is_reduced] or list(file.series)
    if not found:
        raise SourceError(f"{path}: holds no image.")
    if dataset is not None:
        if not dataset.isdigit() or int(dataset) >= len(found):
            raise SourceError(f"{path}: source.dataset is {dataset!r}; expected an index from 0 to {len(found) - 1}.")
        return found[int(dataset)]
    if len(found) > 1:
        shapes = ", ".join(f"{i}: {series.shape} {series.dtype}" for i, series in enumerate(found))
        raise SourceError(
            f"{path}: its pages disagree: {len(found)} series ({shapes}). Set source.dataset to an index."
        )
    return found[0]


def _axes(path: Path, series: tifffile.TiffPageSeries) -> tuple[tuple[int, ...], tuple[int, int]]:
    axes, shape = series.axes, series.shape
    sizes = [(axis, n) for axis, n in zip(axes, shape, strict=True) if n != 1 or axis in "YX"]
    names = "".join(axis for axis, _ in sizes)
    channels = "C" in names and len(names) > 3  # a lone axis is time whatever a writer called it
    if "S" in names or channels or not names.endswith("YX"):
        raise SourceError(f"{path}: has the axes {axes}, shape {shape} (colours or channels); expected grey images.")
    if len(sizes) > 4:
        raise SourceError(f"{path}: has the axes {axes} with shape {shape}; expected at most (time, defocus, y, x).")
    numbers = [n for _, n in sizes]
    return tuple(numbers[:-2]) or (1,), (numbers[-2], numbers[-1])


def _is_plain(page: Any, dtype: np.dtype[Any]) -> bool:
    """Whether the pixels of a page are stored as they are."""
    plain = page.compression == 1 and page.predictor == 1 and page.fillorder == 1 and not page.is_tiled
    return bool(plain and dtype.itemsize * 8 == page.bitspersample)


def _pages(
    file: tifffile.TiffFile, series: tifffile.TiffPageSeries, dtype: np.dtype[Any]
) -> tuple[dict[str, Any], tuple[int, ...]]:
    plain = _is_plain(series.keyframe, dtype)
    offsets, directories, bad = [], [], []
    for i, page in enumerate(series.pages):
        if page is None:
            raise SourceError(
                f"{file.filename}: page {i} lies in another file or is lost. Save the series as one file."
            )
        ends = [at + n for at, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if not ends or max(ends) > file.filehandle.size or min(page.databytecounts) <= 0:
            bad.append(i)
        plain = plain and ends[:-1] == list(page.dataoffsets[1:])
        offsets.append(page.dataoffsets[0] if page.dataoffsets else -1)
        directories.append(page.offset)
    if plain:
        return records.layout(dtype, offsets), tuple(bad)
    return {"kind": "tiff", "directories": directories}, tuple(bad)


def read_tiff(path: Path, layout: dict[str, Any], plane: tuple[int, int], start: int, stop: int) -> np.ndarray:
    """Planes start…stop of a compressed file, (stop - start, y, x)."""
    planes = []
    with collected_log(), tifffile.TiffFile(path) as file:
        for i in range(start, stop):
            try:
                file.filehandle.seek(layout["directories"][i])
                planes.append(tifffile.TiffPage(file, index=i).asarray().reshape(plane))
            except Exception as error:  # decoders raise whatever the damaged bytes lead them to
                raise SourceError(f"{path}: frame {i} cannot be decoded ({type(error).__name__}: {error}).") from error
    return np.stack(planes)


@contextmanager
def collected_log() -> Iterator[list[str]]:
    """What tifffile would print about damage, as a list."""
    logger = logging.getLogger("tifffile")
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                messages.append(record.getMessage())

    handler, propagate = Collector(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
