"""Named axes of stored arrays (HDF5, Zarr): which is time, defocus, y and x, and what they say about calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.ingest import calibration
from pipeline.ingest.facts import Clock, Facts, Spacing, plain_dtype
from schemas.errors import SourceError

TIME_NAMES = ("time", "t", "frame", "frames", "stack", "dim_0")
FOCUS_NAMES = ("defocus", "focus")
MAX_STORED = 10_000_000  # positions of one axis that are read


@dataclass(frozen=True)
class Axis:
    """One axis of a stored array: `step` between neighbours, or the `values` themselves, in `unit`."""

    size: int
    name: str = ""
    unit: str = ""
    step: float | None = None
    values: tuple[float, ...] | None = None

    def spacing(self) -> float | None:
        """The mean distance between neighbours."""
        if self.values is not None and len(self.values) > 1:
            return (self.values[-1] - self.values[0]) / (len(self.values) - 1)
        return self.step


def letters(path: Path | str, axes: Sequence[Axis]) -> str:
    """One letter per stored axis: t(ime), d(efocus), y, x, or 1 for an axis of size one that is dropped.

    Names decide where there are any; otherwise the last two axes are y, x and those before time, defocus.
    """
    names = [axis.name.strip().lower() for axis in axes]
    found = ["?"] * len(axes)
    if names.count("y") == 1 and names.count("x") == 1:
        found[names.index("y")], found[names.index("x")] = "y", "x"
    elif len(axes) >= 2:
        found[-2:] = ["y", "x"]
    for i, axis in enumerate(axes):
        if found[i] == "?" and names[i] in FOCUS_NAMES and "d" not in found:
            found[i] = "d"
        elif found[i] == "?" and (names[i] in TIME_NAMES or calibration.is_time(axis.unit)) and "t" not in found:
            found[i] = "t"
    for i, axis in enumerate(axes):
        if found[i] == "?" and axis.size == 1:
            found[i] = "1"
    rest = [letter for letter in "td" if letter not in found]
    for i in [i for i, letter in enumerate(found) if letter == "?"]:
        if not rest or names[i] in ("c", "channel"):
            shape = tuple(axis.size for axis in axes)
            raise SourceError(f"{path}: has the shape {shape}; expected (y, x), (time, y, x) or (time, defocus, y, x).")
        found[i] = rest.pop(0)
    return "".join(found)


def array_facts(
    path: Path, axes: Sequence[Axis], dtype: np.dtype[Any], *, layout: dict[str, Any], **more: Any
) -> Facts:
    """Facts of a stored array, its calibration taken from its axes where `more` does not hold it."""
    order = letters(path, axes)
    by = {letter: axis for letter, axis in zip(order, axes, strict=True) if letter != "1"}
    leading = tuple(by[letter].size for letter in "td" if letter in by)
    if "t" not in by:
        leading = (1, *leading)
    where = more.pop("where", "the axes of the dataset")
    y, x = by["y"], by["x"]
    if "spacing" not in more and (steps := (y.spacing(), x.spacing())) and None not in steps:
        more["spacing"] = Spacing(float(steps[0] or 0), y.unit, float(steps[1] or 0), x.unit, where)
    if "clock" not in more and "t" in by:
        more["clock"] = _clock(by["t"], where)
    if "d" in by and by["d"].name.strip().lower() in FOCUS_NAMES and calibration.is_length(by["d"].unit):
        values = by["d"].values or tuple(i * (by["d"].step or 0.0) for i in range(by["d"].size))
        more["defocus"] = tuple(calibration.to_angstrom(value, by["d"].unit) for value in values)
    return Facts(leading, (y.size, x.size), plain_dtype(path, dtype), {**layout, "order": order}, **more)


def _clock(axis: Axis, where: str) -> Clock | None:
    if not axis.unit.strip() or (axis.values is None and axis.step is None):
        return None
    if axis.values is not None:
        return Clock(where, axis.unit, stamps=axis.values)
    return Clock(where, axis.unit, interval=axis.step)


def read_array(array: Any, order: str, plane: tuple[int, int], start: int, stop: int) -> np.ndarray:
    """Planes start…stop of an indexable array whose axes are `order`, (stop - start, y, x); reads only those times."""
    per_time = array.shape[order.index("d")] if "d" in order else 1
    first, last = start // per_time, -(-stop // per_time)
    kept = [letter for letter in order if letter != "1"]
    index = tuple(0 if letter == "1" else slice(first, last) if letter == "t" else slice(None) for letter in order)
    values = np.asarray(array[index])
    values = values.transpose([kept.index(letter) for letter in "tdyx" if letter in kept]).reshape(-1, *plane)
    values = values[start - first * per_time : stop - first * per_time]
    if values.dtype.kind == "b":
        values = values.view(np.uint8)
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def chosen(path: Path, options: dict[str, str], dataset: str | None) -> str:
    """The dataset to read: the only one there is, or the one that source.dataset names. `options` is name -> shown."""
    listed = "; ".join(f"{name} {shown}" for name, shown in list(options.items())[:12])
    if dataset is not None:
        key = dataset.strip("/")
        for name, shown in options.items():
            if key in (name, shown) or key in name.split("/"):
                return name
        raise SourceError(f"{path}: has no image dataset {dataset!r} (source.dataset). It has: {listed or 'none'}.")
    if len(options) == 1:
        return next(iter(options))
    if not options:
        raise SourceError(f"{path}: holds no image: expected a dataset of numbers with at least two axes.")
    raise SourceError(f"{path}: holds {len(options)} image datasets. Set source.dataset to one of: {listed}.")
