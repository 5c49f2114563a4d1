"""What a reader finds in one file, before anything is interpreted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from schemas.errors import SourceError

MAX_SIDE = 1 << 20  # [px] no detector has more; a header that says so is damaged
MAX_ITEMS = 64  # longer lists of the vendor's metadata are summarised
MAX_TEXT = 4_000  # characters of one text value
MAX_LEAVES = 20_000  # values of one metadata tree


@dataclass(frozen=True)
class Spacing:
    """Size of one pixel as written in the file, and where it was written."""

    y: float
    y_unit: str
    x: float
    x_unit: str
    where: str


@dataclass(frozen=True)
class Clock:
    """Frame times as written in the file: one interval, or one stamp per frame."""

    where: str
    unit: str = "s"
    interval: float | None = None
    stamps: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Facts:
    """One file: its images (planes), how to reach them, and what it says about itself.

    `leading` is the shape before (y, x): (time,) or (time, defocus); planes are counted in that order.
    `layout` is all that reading needs besides the path; `bad` lists planes that the file promises and does not hold,
    `damage` says why.
    """

    leading: tuple[int, ...]
    plane: tuple[int, int]
    dtype: str
    layout: dict[str, Any]
    bad: tuple[int, ...] = ()
    damage: str = ""
    spacing: Spacing | None = None
    clock: Clock | None = None
    energy: float | None = None  # [keV]
    dose: float | None = None  # [e-/Å² per frame]
    counts_per_electron: float | None = None
    detector: str | None = None
    defocus: tuple[float, ...] | None = None  # [Å], where the file has such an axis
    vendor: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    origin: float | None = None  # absolute time of the first frame [s], comparable between the files of one folder
    hint: str = ""  # what the file knows about time without knowing the frame times

    @property
    def planes(self) -> int:
        """Number of images in the file."""
        return math.prod(self.leading)


def plain_dtype(path: Path, dtype: np.dtype[Any]) -> str:
    """The native-order name of a dtype; a SourceError for what is not a grey-value image."""
    if dtype.kind == "b":
        return "uint8"
    if dtype.kind not in "uif":
        what = "complex numbers (a Fourier transform?)" if dtype.kind == "c" else f"pixels of type {dtype}"
        raise SourceError(f"{path}: holds {what}; expected integer or floating-point grey values.")
    return dtype.newbyteorder("=").name


def json_able(value: Any) -> Any:
    """A copy of a metadata tree that JSON can hold, of bounded size; long arrays become a summary."""
    budget = [MAX_LEAVES]
    return _json_able(value, budget)


def _json_able(value: Any, budget: list[int]) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_able(item, budget) for key, item in value.items() if budget[0] > 0}
    if isinstance(value, np.ndarray):
        if value.size > MAX_ITEMS:
            return f"<array {value.dtype}, shape {value.shape}>"
        return _json_able(value.tolist(), budget)
    if isinstance(value, (list, tuple)):
        if len(value) > MAX_ITEMS:
            return f"<{len(value)} values, the first {_json_able(value[0], budget)!r}>"
        return [_json_able(item, budget) for item in value]
    budget[0] -= 1
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.rstrip(b"\0").decode("utf-8", errors="replace")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… <{len(text)} characters>"


def number(value: Any) -> float | None:
    """A finite float made of what a file holds (text, bytes, arrays of one), or None."""
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size == 1 else None
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def positive(value: Any, factor: float = 1.0) -> float | None:
    """A positive float times a factor, or None where the file holds nothing usable."""
    result = number(value)
    return result * factor if result is not None and result > 0 else None


def dig(tree: Any, *keys: str) -> Any:
    """The value under nested keys, or None where one is absent."""
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree
