"""Velox EMD: HDF5 whose images are (y, x, time) with one JSON record of metadata per frame."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py

from pipeline.ingest.axes import Axis, array_facts, chosen
from pipeline.ingest.facts import Clock, Facts, Spacing, dig, json_able, number, positive
from pipeline.ingest.formats_hdf5 import own_dataset
from schemas.errors import SourceError

IMAGES = "Data/Image"
MAX_STAMPED = 100_000  # frames whose metadata are searched for time stamps
STAMP = re.compile(rb'TimeStamp"\s*:\s*\{[^}]*"value"\s*:\s*"(\d+)"')
MICROSECOND = 1e-6


def is_velox(file: h5py.File) -> bool:
    """Whether an HDF5 file has the layout of Velox."""
    return isinstance(file.get(IMAGES), h5py.Group)


def inspect_velox(path: Path, file: h5py.File, dataset: str | None) -> Facts:
    """Facts of the only, or the chosen, image of a Velox file; several detectors need source.dataset."""
    images, records = {}, {}
    for uid, group in file[IMAGES].items():
        stored = group.get("Data") if isinstance(group, h5py.Group) else None
        if isinstance(stored, h5py.Dataset) and stored.ndim == 3 and stored.dtype.kind in "uif":
            name = f"{IMAGES}/{uid}/Data"
            records[name] = _record(group, 0)
            images[name] = str(dig(records[name], "BinaryResult", "Detector") or uid)
    name = chosen(path, images, dataset)
    stored, record = own_dataset(path, file, name), records[name]
    frames = stored.shape[2]
    if frames < 1:
        raise SourceError(f"{path}: holds no frame.")
    clock, note = _clock(stored.parent, record, frames)
    axes = [Axis(stored.shape[0], "y"), Axis(stored.shape[1], "x"), Axis(frames, "time")]
    return array_facts(
        path,
        axes,
        stored.dtype,
        layout={"kind": "hdf5", "dataset": name},
        spacing=_spacing(record),
        clock=clock,
        energy=positive(dig(record, "Optics", "AccelerationVoltage"), 1e-3),
        detector=images[name],
        vendor=json_able(record),
        notes=(note,) if note else (),
        origin=_stamp(stored.parent, 0),
    )


def _metadata(group: h5py.Group, frame: int) -> bytes:
    stored = group.get("Metadata")
    if not isinstance(stored, h5py.Dataset) or stored.ndim != 2 or frame >= stored.shape[1]:
        return b""
    return bytes(stored[:, frame]).split(b"\0", 1)[0]


def _record(group: h5py.Group, frame: int) -> dict[str, Any]:
    try:
        record = json.loads(_metadata(group, frame) or b"{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _stamp(group: h5py.Group, frame: int) -> float | None:
    found = STAMP.search(_metadata(group, frame))
    return int(found[1]) * MICROSECOND if found else None


def _spacing(record: dict[str, Any]) -> Spacing | None:
    result = dig(record, "BinaryResult") or {}
    y, x = number(dig(result, "PixelSize", "height")), number(dig(result, "PixelSize", "width"))
    if y is None or x is None:
        return None
    units = (str(result.get("PixelUnitY") or ""), str(result.get("PixelUnitX") or ""))
    return Spacing(y, units[0], x, units[1], "the Velox metadata")


def _clock(group: h5py.Group, record: dict[str, Any], frames: int) -> tuple[Clock | None, str]:
    """Time stamps of the camera where it wrote them, else the scan's frame time, else the camera's exposure time."""
    if 1 < frames <= MAX_STAMPED and _stamp(group, 0) is not None:
        stamps = [_stamp(group, frame) for frame in range(frames)]
        known = [stamp for stamp in stamps if stamp is not None]
        if len(known) == frames and all(b > a for a, b in pairwise(known)):
            return Clock("the Velox time stamps", "s", stamps=tuple(known)), ""
    if (interval := positive(dig(record, "Scan", "FrameTime"))) is not None:
        return Clock("the Velox metadata (Scan.FrameTime)", "s", interval=interval), ""
    index = dig(record, "BinaryResult", "DetectorIndex")
    exposure = positive(dig(record, "Detectors", f"Detector-{index}", "ExposureTime"))
    if exposure is None:
        return None, ""
    note = f"frame times: no time stamps in the file, the exposure time of {exposure:g} s is taken as the interval"
    return Clock("the Velox metadata (ExposureTime)", "s", interval=exposure), note if frames > 1 else ""
