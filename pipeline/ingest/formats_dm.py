"""Reader of Gatan DigitalMicrograph files, DM3 and DM4.

RosettaSciIO parses the tag tree (pixels are skipped, so this is cheap whatever the movie's length); the pixels are read
by offset. Axes in the file run x, y, z, …: reversed they are (…, y, x).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rsciio.digitalmicrograph._api import DigitalMicrographReader

from pipeline.ingest import calibration, records
from pipeline.ingest.facts import Clock, Facts, Spacing, dig, json_able, number, plain_dtype, positive
from pipeline.ingest.formats_plain import records_facts, split_shape
from schemas.errors import SourceError

DTYPES = {
    1: "i2", 2: "f4", 3: "c8", 5: "c8", 6: "u1", 7: "i4", 9: "i1", 10: "u2", 11: "u4", 12: "f8", 13: "c16",
    14: "?", 27: "c8", 28: "c16", 39: "i8", 40: "u8",
}  # fmt: skip
COLOUR = (8, 23)
FILETIME = 1e-7  # [s] Windows counts time in steps of 100 ns


def inspect_dm(path: Path, dataset: str | None) -> Facts:
    """Facts of the (only, or chosen) image of a DM file; thumbnails do not count."""
    images, problem = _parse(path)
    image = _choose(path, images, dataset, problem)
    data = image["ImageData"]
    shape = tuple(int(n) for n in reversed(list(data["Dimensions"].values())))
    code = int(data["DataType"])
    if code in COLOUR or code not in DTYPES:
        raise SourceError(f"{path}: holds pixels of DM type {code} (colour or unknown); expected grey values.")
    dtype = np.dtype(DTYPES[code]).newbyteorder("<" if data["Data"].get("endian") == "little" else ">")
    if "Spectrum" in str(dig(image, "ImageTags", "Meta Data", "Format") or ""):
        raise SourceError(f"{path}: is a spectrum or a spectrum image; expected images.")
    leading, plane = split_shape(path, shape)
    where = records.layout(dtype, offset=data["Data"]["offset"], stride=plane[0] * plane[1] * dtype.itemsize)
    notes = (f"its tags end early ({problem})",) if problem else ()
    spacing, clock = _calibration(data, shape)
    return records_facts(
        path,
        leading,
        plane,
        dtype=plain_dtype(path, dtype),
        where=where,
        spacing=spacing,
        clock=clock,
        vendor=json_able({"ImageTags": image.get("ImageTags"), "ImageData": data, "Name": image.get("Name")}),
        notes=notes,
        **_microscope(image),
    )


def _parse(path: Path) -> tuple[list[dict[str, Any]], str]:
    problem = ""
    with path.open("rb") as file:
        reader = DigitalMicrographReader(file)
        try:
            reader.parse_file()
        except Exception as error:  # the parser raises whatever the damaged bytes lead it to
            problem = f"{type(error).__name__}: {error}"
        try:
            images = [image for image in reader.get_image_dictionaries() or [] if isinstance(image, dict)]
        except (KeyError, TypeError, ValueError):
            images = []
    return images, problem


def _choose(path: Path, images: list[dict[str, Any]], dataset: str | None, problem: str) -> dict[str, Any]:
    complete = [image for image in images if _is_image(image)]
    if not complete:
        if problem:
            raise SourceError(
                f"{path}: is damaged or not a DM file ({problem}); no frame can be recovered, because DM files "
                "describe their frames after the pixels. Copy the file again."
            )
        raise SourceError(f"{path}: holds no image.")
    if dataset is not None:
        if not dataset.isdigit() or int(dataset) >= len(complete):
            raise SourceError(f"{path}: source.dataset is {dataset!r}; expected an index below {len(complete)}.")
        return complete[int(dataset)]
    if len(complete) > 1:
        names = ", ".join(f"{i}: {image.get('Name')!r}" for i, image in enumerate(complete))
        raise SourceError(f"{path}: holds {len(complete)} images ({names}). Set source.dataset to the index of one.")
    return complete[0]


def _is_image(image: dict[str, Any]) -> bool:
    data = image.get("ImageData")
    if not isinstance(data, dict) or not {"Data", "DataType", "Dimensions"} <= set(data):
        return False
    return isinstance(data["Data"], dict) and "offset" in data["Data"] and len(data["Dimensions"]) >= 2


def _calibration(data: dict[str, Any], shape: tuple[int, ...]) -> tuple[Spacing | None, Clock | None]:
    stored = dig(data, "Calibrations", "Dimension") or {}
    axes = [(number(axis.get("Scale")), _text(axis.get("Units"))) for axis in stored.values() if isinstance(axis, dict)]
    if len(axes) < 2:
        return None, None
    (x, x_unit), (y, y_unit) = axes[:2]
    where = "the DM calibration"
    spacing = None if x is None or y is None else Spacing(y, y_unit, x, x_unit, where)
    clock = None
    if len(axes) == len(shape) >= 3 and calibration.is_time(axes[-1][1]):
        clock = Clock(where, axes[-1][1], interval=axes[-1][0])
    return spacing, clock


def _microscope(image: dict[str, Any]) -> dict[str, Any]:
    tags = image.get("ImageTags") if isinstance(image.get("ImageTags"), dict) else {}
    found: dict[str, Any] = {"energy": positive(dig(tags, "Microscope Info", "Voltage"), 1e-3)}
    device = dig(tags, "Acquisition", "Device", "Name") or dig(tags, "DataBar", "Device Name")
    found["detector"] = _text(device) or None
    ticks = positive(dig(tags, "DataBar", "Acquisition Time (OS)"), FILETIME)
    found["origin"] = ticks
    brightness = dig(image, "ImageData", "Calibrations", "Brightness") or {}
    scale = positive(brightness.get("Scale"))
    if scale and _text(brightness.get("Units")).lower() in ("e-", "e⁻", "electrons"):
        found["counts_per_electron"] = 1 / scale
    exposure = positive(dig(tags, "DataBar", "Exposure Time (s)"))
    if exposure:
        found["hint"] = f"each frame was exposed for {exposure:g} s"
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
