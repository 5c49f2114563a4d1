"""Reader of TIA series (SER) with the metadata of the EMI file beside them.

Source of the layout: C. Boothroyd, "Interpretation of the FEI TIA series data format"; RosettaSciIO reads the same but
loads the whole series, so the offsets are read here. TIA stores the bottom row first.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np

from pipeline.ingest import calibration, records
from pipeline.ingest.facts import Clock, Facts, Spacing, json_able, number, plain_dtype, positive
from pipeline.ingest.formats_plain import records_facts
from schemas.errors import SourceError

MAGIC, IMAGES, SPECTRA = 0x0197, 0x4122, 0x4120
SHORT_OFFSETS = 0x0210  # up to this version offsets have 4 bytes, later 8
BEYOND = 1 << 62  # no file has such an offset
HEADER = struct.Struct("<HHHIIII")
ELEMENT = struct.Struct("<ddiddiHII")  # calibration of x and of y, data type, size of x and of y
DTYPES = {1: "u1", 2: "<u2", 3: "<u4", 4: "i1", 5: "<i2", 6: "<i4", 7: "<f4", 8: "<f8", 9: "<c8", 10: "<c16"}


def inspect_ser(path: Path, dataset: str | None) -> Facts:
    """Facts of a SER file: its images are the elements that are valid."""
    del dataset
    with path.open("rb") as file:
        try:
            offsets, tags, dimensions = _series(path, file)
            elements = _elements(file, offsets, path.stat().st_size)
        except (struct.error, ValueError) as error:
            raise SourceError(f"{path}: is not a SER file, or ends within its header ({error}).") from error
        seconds = _whole_seconds(file, tags)
    if not elements:
        raise SourceError(
            f"{path}: holds no image: its {len(offsets)} elements lie beyond its end or were never written."
        )
    first = next(iter(elements.values()))
    for i, element in elements.items():
        if element[6:] != first[6:]:
            raise SourceError(
                f"{path}: frame {i} is {_shown(element)}, the first {_shown(first)}; expected equal frames."
            )
    if first[6] not in DTYPES:
        raise SourceError(f"{path}: holds pixels of TIA type {first[6]}; expected one of {sorted(DTYPES)}.")
    dtype, plane = np.dtype(DTYPES[first[6]]), (int(first[8]), int(first[7]))
    where = records.layout(dtype, [at + ELEMENT.size if at > 0 else -1 for at in offsets]) | {"upside_down": True}
    metadata = _emi(path)
    unit = "1/m" if _is_diffraction(metadata) else "m"
    clock = None
    if len(dimensions) == 1 and calibration.is_time(dimensions[0]["units"]):
        clock = Clock("the SER header", dimensions[0]["units"], interval=dimensions[0]["delta"])
    return records_facts(
        path,
        (len(offsets),),
        plane,
        dtype=plain_dtype(path, dtype),
        where=where,
        spacing=Spacing(first[4], unit, first[1], unit, "the SER calibration"),
        clock=clock,
        energy=_energy(metadata),
        detector=_detector(metadata),
        hint=_hint(metadata, seconds, len(offsets)),
        vendor=json_able({"dimensions": dimensions, "first_and_last_time_tag": seconds, "emi": metadata}),
    )


def _series(path: Path, file: BinaryIO) -> tuple[list[int], tuple[int, ...], list[dict[str, Any]]]:
    order, series, version, kind, _, total, valid = HEADER.unpack(file.read(HEADER.size))
    if (order, series) != (0x4949, MAGIC):
        raise ValueError("its first bytes are not those of a SER file")
    if kind != IMAGES:
        what = "spectra" if kind == SPECTRA else f"elements of type {kind:#x}"
        raise SourceError(f"{path}: holds {what}; expected images.")
    number_format = "I" if version <= SHORT_OFFSETS else "Q"
    at, count = struct.unpack(f"<{number_format}I", file.read(struct.calcsize(f"<{number_format}I")))
    dimensions = []
    for _ in range(min(count, 16)):
        size, offset, delta, _, length = struct.unpack("<IddII", file.read(28))
        description = file.read(length).decode("utf-8", errors="replace")
        (length,) = struct.unpack("<I", file.read(4))
        units = file.read(length).decode("utf-8", errors="replace")
        dimensions.append({"size": size, "offset": offset, "delta": delta, "description": description, "units": units})
    file.seek(at)
    width = 4 if number_format == "I" else 8
    valid = min(valid, total)
    kind = f"<u{width}"
    offsets = _numbers(file.read(width * valid), kind)
    file.seek(at + width * total)
    tags = _numbers(file.read(width * valid), kind)
    ends = (tags[0], tags[-1]) if len(tags) > 1 else ()
    return [*offsets, *[-1] * (valid - len(offsets))], ends, dimensions


def _numbers(raw: bytes, kind: str) -> list[int]:
    width = np.dtype(kind).itemsize
    values = np.frombuffer(raw[: len(raw) // width * width], kind)
    return [int(value) if value < BEYOND else -1 for value in values]


def _elements(file: BinaryIO, offsets: list[int], size: int) -> dict[int, tuple[Any, ...]]:
    found = {}
    for i, at in enumerate(offsets):
        if 0 < at <= size - ELEMENT.size:
            file.seek(at)
            found[i] = ELEMENT.unpack(file.read(ELEMENT.size))
    return found


def _whole_seconds(file: BinaryIO, tags: tuple[int, ...]) -> tuple[int, ...]:
    """The times of some elements; tags count whole seconds, too coarse to time a movie: a hint at most."""
    found = []
    for at in tags:
        file.seek(max(at, 0))
        raw = file.read(8)
        if at > 0 and len(raw) == 8:
            found.append(struct.unpack("<HHI", raw)[2])
    return tuple(found)


def _shown(element: tuple[Any, ...]) -> str:
    return f"{element[8]} × {element[7]} px {DTYPES.get(element[6], element[6])}"


def _emi(path: Path) -> dict[str, Any]:
    """The metadata of a SER file, from the part of the EMI file beside it that bears its number."""
    stem, _, index = path.stem.rpartition("_")
    emi = next((item for ending in (".emi", ".EMI") if (item := path.with_name(stem + ending)).is_file()), None)
    if emi is None or not index.isdigit() or emi.stat().st_size == 0:
        return {}
    with emi.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = 0
        for _ in range(int(index)):
            begin = content.find(b"<ObjectInfo>", end)
            end = content.find(b"</ObjectInfo>", begin)
            if begin < 0 or end < 0:
                return {}
            end += len(b"</ObjectInfo>")
        xml = content[begin:end]
    try:
        return _tree(ElementTree.fromstring(xml.decode("utf-8", errors="replace")))
    except ElementTree.ParseError:
        return {}


def _tree(node: ElementTree.Element) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for child in node:
        if child.tag == "ExperimentalDescription":
            tree[child.tag] = {
                f"{data.findtext('Label')}_{data.findtext('Unit') or ''}".rstrip("_"): (
                    data.findtext("Value") or ""
                ).strip()
                for data in child.iter("Data")
            }
        elif child.tag != "TrueImageHeaderInfo":
            tree[child.tag] = _tree(child) if len(child) else (child.text or "").strip()
    return tree


def _description(metadata: dict[str, Any]) -> dict[str, Any]:
    found = metadata.get("ExperimentalDescription")
    return found if isinstance(found, dict) else {}


def _is_diffraction(metadata: dict[str, Any]) -> bool:
    """A camera image in diffraction mode; a STEM image is real space although the lenses are in diffraction mode."""
    mode = str(_description(metadata).get("Mode", ""))
    camera = "CameraNamePath" in (metadata.get("AcquireInfo") or {})
    return camera if "STEM" in mode else "Diffraction" in mode


def _energy(metadata: dict[str, Any]) -> float | None:
    return positive(_description(metadata).get("High tension_kV"))


def _detector(metadata: dict[str, Any]) -> str | None:
    acquired = metadata.get("AcquireInfo")
    return str(acquired["CameraNamePath"]) if isinstance(acquired, dict) and acquired.get("CameraNamePath") else None


def _hint(metadata: dict[str, Any], seconds: tuple[int, ...], frames: int) -> str:
    acquired = metadata.get("AcquireInfo")
    frame = number(acquired.get("FrameTime")) if isinstance(acquired, dict) else None
    hints = [f"one scan took {frame:g} s"] if frame else []
    if len(seconds) == 2 and frames > 1:
        hints.append(f"its time tags count whole seconds, {seconds[1] - seconds[0]} s from the first frame to the last")
    return "; ".join(hints)
