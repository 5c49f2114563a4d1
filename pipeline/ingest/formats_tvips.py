"""Reader of TVIPS recordings, one file or split into parts _000, _001, …

Only part 000 carries the main header. The layout is that which RosettaSciIO documents; it maps whole files, so ranges
are read here by offset.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.ingest import records
from pipeline.ingest.facts import MAX_SIDE, Clock, Facts, Spacing, json_able, plain_dtype, positive
from schemas.errors import SourceError

MAIN = np.dtype(
    [
        (name, "<u4")
        for name in ("size", "version", "dimx", "dimy", "bitsperpixel", "offsetx", "offsety", "binx", "biny")
    ]
    + [(name, "<u4") for name in ("pixelsize", "ht", "magtotal", "frameheaderbytes")]
)
STAMPED = np.dtype([("num", "<u4"), ("timestamp", "<u4"), ("ms", "<u4")])
FRAME = np.dtype([*STAMPED.descr, ("LUTidx", "<u4"), ("fcurrent", "<f4"), ("mag", "<u4"), ("mode", "<u4")])
PART = re.compile(r"^(?P<stem>.*)_(?P<part>\d{3})$")
DIFFRACTION = 2


def part_number(path: Path) -> tuple[str, int] | None:
    """The common stem and the number of a part of a split recording, or None for a file of another name."""
    found = PART.match(path.stem)
    return (found["stem"], int(found["part"])) if found else None


def all_parts(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """The whole recording where its part 000 is named; later parts alone stay what they are, and are refused later."""
    first = part_number(paths[0])
    if first is None or first[1] != 0:
        return paths
    beside = [path for path in paths[0].parent.iterdir() if path.suffix.lower() == paths[0].suffix.lower()]
    parts = {part[1]: path for path in beside if (part := part_number(path)) is not None and part[0] == first[0]}
    return tuple(parts[number] for number in sorted(parts))


def check_parts(paths: tuple[Path, ...]) -> None:
    """The parts of a recording must be there from 000 on, without a gap."""
    numbers = [part_number(path) for path in paths]
    for expected, (path, number) in enumerate(zip(paths, numbers, strict=True)):
        if number is None and len(paths) == 1:
            return
        if number is None or number[1] != expected:
            stem = number[0] if number else path.stem
            raise SourceError(
                f"{path}: is a later part of a recording whose part {stem}_{expected:03d}{path.suffix} is not given. "
                "TVIPS writes the frame size into part 000 only: name part 000 and keep all parts in its folder."
            )


def inspect_tvips(path: Path, dataset: str | None) -> Facts:
    """Facts of one part of a recording; the main header is that of part 000 in the same folder."""
    del dataset
    header = _header(path)
    main, offset = header["main"], header["offset"]
    dtype = np.dtype(f"<u{int(main['bitsperpixel']) // 8}")
    plane = (int(main["dimy"]), int(main["dimx"]))
    before = 12 if int(main["version"]) == 1 else int(main["frameheaderbytes"])
    stride = before + plane[0] * plane[1] * dtype.itemsize
    size = path.stat().st_size
    frames = -(-max(size - offset, 0) // stride)
    where = records.layout(dtype, offset=offset + before, stride=stride)
    bad = records.missing(size, where, plane, frames)
    stamps, frame = _stamps(path, offset, stride, frames - len(bad), before)
    reciprocal = frame is not None and "mode" in (frame.dtype.names or ()) and int(frame["mode"]) == DIFFRACTION
    unit = "1/nm" if reciprocal else "nm"
    pixel = float(main["pixelsize"])
    return Facts(
        (frames,),
        plane,
        plain_dtype(path, dtype),
        where,
        bad=bad,
        damage=records.damage(size, where, plane, frames) if bad else "",
        spacing=Spacing(pixel, unit, pixel, unit, "the TVIPS header"),
        clock=Clock("the TVIPS frame headers", "s", stamps=stamps) if stamps else None,
        energy=positive(main["ht"]),
        detector="TVIPS",
        vendor=json_able({"header": {name: main[name] for name in main.dtype.names or ()}}),
    )


def _header(path: Path) -> dict[str, Any]:
    number = part_number(path)
    first = path
    if number is not None and number[1] > 0:
        first = path.with_name(f"{number[0]}_000{path.suffix}")
        if not first.is_file():
            raise SourceError(
                f"{path}: is part {number[1]} of a recording; its part 000 ({first.name}) is not beside it."
            )
    raw = np.fromfile(first, MAIN, 1)
    if len(raw) == 0:
        raise SourceError(f"{first}: ends within its header; no frame can be recovered.")
    main = raw[0]
    usable = int(main["version"]) in (1, 2) and int(main["bitsperpixel"]) in (8, 16, 32)
    if not usable or not 0 < int(main["dimx"]) <= MAX_SIDE or not 0 < int(main["dimy"]) <= MAX_SIDE:
        shown = {name: int(main[name]) for name in ("version", "dimx", "dimy", "bitsperpixel")}
        raise SourceError(f"{first}: is not a TVIPS recording of version 1 or 2 (its header says {shown}).")
    return {"main": main, "offset": int(main["size"]) if first == path else 0}


def _stamps(path: Path, offset: int, stride: int, frames: int, before: int) -> tuple[tuple[float, ...], Any]:
    if frames < 1 or before < STAMPED.itemsize:
        return (), None
    kind = FRAME if before >= FRAME.itemsize else STAMPED
    padded = np.dtype([*kind.descr, ("rest", f"V{stride - kind.itemsize}")])
    heads = np.memmap(path, mode="r", dtype=padded, offset=offset, shape=(frames,))
    stamps = heads["timestamp"].astype(np.float64) + heads["ms"] / 1000
    first = heads[0].copy()
    return tuple(stamps.tolist()), first
