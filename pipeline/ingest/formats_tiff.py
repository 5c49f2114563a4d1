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
from xml.etree import ElementTree

import numpy as np
import tifffile

from pipeline.ingest import records
from pipeline.ingest.facts import Clock, Facts, Spacing, json_able, number, plain_dtype
from schemas.errors import SourceError

PRINT_UNITS = ("inch", "inches", "cm", "pixel", "pixels", "px", "")


def inspect_tiff(path: Path, dataset: str | None) -> Facts:
    """Facts of the (only, or chosen) series of pages of a TIFF file."""
    with collected_log() as complaints:
        try:
            with tifffile.TiffFile(path) as file:
                return _inspect(path, file, dataset, complaints)
        except SourceError:
            raise
        except Exception as error:  # tifffile raises whatever the damaged bytes lead it to
            raise SourceError(f"{path}: cannot be read as TIFF ({type(error).__name__}: {error}).") from error


def _inspect(path: Path, file: tifffile.TiffFile, dataset: str | None, complaints: list[str]) -> Facts:
    series = _choose(path, file, dataset)
    leading, plane = _axes(path, series)
    dtype = np.dtype(series.dtype)
    stored = dtype.newbyteorder(file.byteorder)
    planes = math.prod(leading)
    size = path.stat().st_size
    promised = _promised(file, planes)
    if series.dataoffset is not None:
        where = records.layout(stored, offset=series.dataoffset, stride=plane[0] * plane[1] * dtype.itemsize)
        bad = records.missing(size, where, plane, planes)
    else:
        where, bad = _pages(series, stored, plane, size)
    bad = (*bad, *range(planes, promised))
    damage = "; ".join(complaints[:3]) or (f"{planes - len(bad)} of {promised} frames are complete" if bad else "")
    if promised > planes:
        leading = (promised,) if len(leading) == 1 else leading
    spacing, clock = _calibration(file)
    vendor = {"tags": _tags(series.keyframe), "imagej": file.imagej_metadata, "ome": file.ome_metadata}
    return Facts(
        leading,
        plane,
        plain_dtype(path, dtype),
        where,
        bad=bad,
        damage=damage,
        spacing=spacing,
        clock=clock,
        vendor=json_able({key: value for key, value in vendor.items() if value}),
    )


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
    if "S" in names or "C" in names or not names.endswith("YX"):
        raise SourceError(f"{path}: has the axes {axes}, shape {shape} (colours or channels); expected grey images.")
    if len(sizes) > 4:
        raise SourceError(f"{path}: has the axes {axes} with shape {shape}; expected at most (time, defocus, y, x).")
    numbers = [n for _, n in sizes]
    return tuple(numbers[:-2]) or (1,), (numbers[-2], numbers[-1])


def _promised(file: tifffile.TiffFile, planes: int) -> int:
    """Frames that ImageJ says it wrote: a truncated file has fewer pages."""
    images = number((file.imagej_metadata or {}).get("images"))
    return max(planes, int(images)) if images else planes


def _pages(
    series: tifffile.TiffPageSeries, stored: np.dtype[Any], plane: tuple[int, int], size: int
) -> tuple[dict[str, Any], tuple[int, ...]]:
    key = series.keyframe
    plain = key.compression == 1 and key.predictor == 1 and key.fillorder == 1 and not key.is_tiled
    offsets, directories, bad = [], [], []
    for i, page in enumerate(series.pages):
        if page is None:
            raise SourceError(f"page {i} of the series is missing")
        ends = [at + n for at, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if not ends or max(ends) > size or min(page.databytecounts) <= 0:
            bad.append(i)
        plain = plain and ends[:-1] == list(page.dataoffsets[1:])
        offsets.append(page.dataoffsets[0] if page.dataoffsets else -1)
        directories.append(page.offset)
    if plain and stored.itemsize * 8 == key.bitspersample:
        return records.layout(stored, offsets), tuple(bad)
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


def _calibration(file: tifffile.TiffFile) -> tuple[Spacing | None, Clock | None]:
    if file.ome_metadata:
        return _ome(file.ome_metadata)
    imagej = file.imagej_metadata
    if not imagej:
        return None, None
    clock = None
    if (interval := number(imagej.get("finterval"))) is not None:
        clock = Clock("the ImageJ metadata (finterval)", str(imagej.get("tunit") or "s"), interval=interval)
    elif fps := number(imagej.get("fps")):
        clock = Clock("the ImageJ metadata (fps)", "s", interval=1 / fps)
    unit = str(imagej.get("unit") or "").replace("\\u00B5", "µ")
    tags = file.pages.first.tags
    if unit.lower() in PRINT_UNITS or "XResolution" not in tags or "YResolution" not in tags:
        return None, clock  # a print resolution is not the calibration of a microscope
    y, x = (_pixel(tags[name].value) for name in ("YResolution", "XResolution"))
    return Spacing(y, unit, x, unit, "the ImageJ resolution tags"), clock


def _pixel(resolution: tuple[int, int]) -> float:
    pixels, units = resolution
    return units / pixels if pixels else math.inf


def _ome(xml: str) -> tuple[Spacing | None, Clock | None]:
    root = ElementTree.fromstring(xml)
    pixels = next((node for node in root.iter() if node.tag.endswith("}Pixels") or node.tag == "Pixels"), None)
    if pixels is None:
        return None, None
    spacing = clock = None
    y, x = number(pixels.get("PhysicalSizeY")), number(pixels.get("PhysicalSizeX"))
    if y is not None and x is not None:  # µm is the unit that the OME schema assumes
        units = (pixels.get("PhysicalSizeYUnit", "µm"), pixels.get("PhysicalSizeXUnit", "µm"))
        spacing = Spacing(y, units[0], x, units[1], "the OME metadata")
    if (interval := number(pixels.get("TimeIncrement"))) is not None:
        clock = Clock("the OME metadata", pixels.get("TimeIncrementUnit", "s"), interval=interval)
    return spacing, clock


def _tags(page: Any) -> dict[str, Any]:
    skipped = {"StripOffsets", "StripByteCounts", "TileOffsets", "TileByteCounts"}
    return {tag.name: tag.value for tag in page.tags.values() if tag.name not in skipped}


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
