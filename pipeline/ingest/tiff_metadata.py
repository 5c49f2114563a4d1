"""What TIFF dialects say about pixel size and time: OME, ImageJ, DigitalMicrograph, TVIPS, FEI, Olympus SIS.

The resolution tags of the TIFF standard alone are those of a printer and never a calibration.
"""

from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

import tifffile

from pipeline.ingest.calibration import is_time
from pipeline.ingest.facts import Clock, Spacing, dig, number

PRINT_UNITS = ("inch", "inches", "cm", "pixel", "pixels", "px", "")
GATAN_UNITS, GATAN_SCALES = (65003, 65004, 65005), (65009, 65010, 65011)  # of x, y, z


def calibration(file: tifffile.TiffFile) -> tuple[Spacing | None, Clock | None]:
    """Pixel size and times of the first dialect that a file speaks."""
    if file.ome_metadata:
        return _ome(file.ome_metadata)
    if file.imagej_metadata:
        return _imagej(file)
    tags = file.pages.first.tags
    if GATAN_SCALES[0] in tags and GATAN_SCALES[1] in tags:
        return _gatan(tags)
    return _metres(file), None


def vendor(file: tifffile.TiffFile) -> dict[str, Any]:
    """Everything that was written beside the pixels, by dialect."""
    skipped = {"StripOffsets", "StripByteCounts", "TileOffsets", "TileByteCounts"}
    tags = {tag.name: tag.value for tag in file.pages.first.tags.values() if tag.name not in skipped}
    tree = {
        "tags": tags,
        "imagej": file.imagej_metadata,
        "ome": file.ome_metadata,
        "fei": file.fei_metadata,
        "sis": file.sis_metadata,
        "tvips": file.tvips_metadata,
    }
    return {key: value for key, value in tree.items() if value}


def energy(file: tifffile.TiffFile) -> float | None:
    """Electron energy [keV] where FEI or TVIPS wrote it in volts or kilovolts."""
    volts = number(dig(file.fei_metadata, "Beam", "HV") or dig(file.tvips_metadata, "TemHighTension"))
    if volts is None or volts <= 0:
        return None
    return volts / 1000 if volts > 5000 else volts


def _imagej(file: tifffile.TiffFile) -> tuple[Spacing | None, Clock | None]:
    imagej = file.imagej_metadata or {}
    clock = None
    if (interval := number(imagej.get("finterval"))) is not None:
        clock = Clock("the ImageJ metadata (finterval)", str(imagej.get("tunit") or "s"), interval=interval)
    elif fps := number(imagej.get("fps")):
        clock = Clock("the ImageJ metadata (fps)", "s", interval=1 / fps)
    unit = str(imagej.get("unit") or "").replace("\\u00B5", "µ")
    tags = file.pages.first.tags
    if unit.strip().lower() in PRINT_UNITS or "XResolution" not in tags or "YResolution" not in tags:
        return None, clock
    y, x = (_pixel(tags[name].value) for name in ("YResolution", "XResolution"))
    return Spacing(y, unit, x, unit, "the ImageJ resolution tags"), clock


def _pixel(resolution: tuple[int, int]) -> float:
    pixels, units = resolution
    return units / pixels if pixels else math.inf


def _ome(xml: str) -> tuple[Spacing | None, Clock | None]:
    root = ElementTree.fromstring(xml)
    pixels = next((node for node in root.iter() if node.tag.rpartition("}")[2] == "Pixels"), None)
    if pixels is None:
        return None, None
    spacing = None
    y, x = number(pixels.get("PhysicalSizeY")), number(pixels.get("PhysicalSizeX"))
    if y is not None and x is not None:  # µm and s are the units that the OME schema assumes
        units = (pixels.get("PhysicalSizeYUnit", "µm"), pixels.get("PhysicalSizeXUnit", "µm"))
        spacing = Spacing(y, units[0], x, units[1], "the OME metadata")
    planes = [node for node in pixels if node.tag.rpartition("}")[2] == "Plane"]
    stamps = {int(node.get("TheT", "0")): number(node.get("DeltaT")) for node in planes}
    frames = int(pixels.get("SizeT", "1"))
    if frames > 1 and len(planes) == frames == len(stamps) and None not in stamps.values():
        known = tuple(float(stamps[i] or 0.0) for i in sorted(stamps))
        return spacing, Clock("the OME planes (DeltaT)", planes[0].get("DeltaTUnit", "s"), stamps=known)
    if (interval := number(pixels.get("TimeIncrement"))) is not None:
        return spacing, Clock("the OME metadata", pixels.get("TimeIncrementUnit", "s"), interval=interval)
    return spacing, None


def _gatan(tags: tifffile.TiffTags) -> tuple[Spacing | None, Clock | None]:
    where = "the tags of DigitalMicrograph"
    units = [str(tags[code].value) if code in tags else "" for code in GATAN_UNITS]
    x, y, z = (number(tags[code].value) if code in tags else None for code in GATAN_SCALES)
    spacing = None if x is None or y is None else Spacing(y, units[1], x, units[0], where)
    clock = Clock(where, units[2], interval=z) if z is not None and is_time(units[2]) else None
    return spacing, clock


def _metres(file: tifffile.TiffFile) -> Spacing | None:
    """Dialects that write the pixel size in metres or nanometres."""
    candidates = (
        (dig(file.fei_metadata, "Scan", "PixelHeight"), dig(file.fei_metadata, "Scan", "PixelWidth"), "m", "FEI"),
        (dig(file.sis_metadata, "pixelsizey"), dig(file.sis_metadata, "pixelsizex"), "m", "Olympus SIS"),
        (dig(file.tvips_metadata, "PixelSizeY"), dig(file.tvips_metadata, "PixelSizeX"), "nm", "TVIPS"),
    )
    for height, width, unit, name in candidates:
        y, x = number(height), number(width)
        if y is not None and x is not None:
            return Spacing(y, unit, x, unit, f"the {name} metadata")
    return None
