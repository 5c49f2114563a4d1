"""The truth group of a simulated stack: created by one process, written shard by shard with the frames, read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from pipeline import store
from pipeline.layout import StackLayout, plain_json
from schemas.conventions import DIMENSIONLESS, PIXEL
from schemas.errors import SchemaError
from schemas.truth import TRUTH_FRAMES, TRUTH_TABLES
from schemas.variables import Variable

GROUP = "truth"
ROWS = 2**16  # rows of a chunk of a table
SHIFTS = Variable("plane_shifts", ("time", "defocus", "axis"), "float64", PIXEL, "shift of each plane since the first")
MAPS = {
    "gain": Variable("gain", ("y", "x"), "float32", DIMENSIONLESS, "counts of a pixel relative to others"),
    "hot": Variable("hot", ("y", "x"), "float32", "electron", "electrons that a pixel adds of its own per frame"),
}


def create_truth(path: Path, *, shape: Sequence[int], layout: StackLayout, attributes: Mapping[str, Any]) -> None:
    """Create the truth of a stack that is being written: the arrays over (time, y, x), and what is known at once."""
    group = store.open_group(path, "r+").create_group(GROUP, overwrite=True)
    group.attrs.update(plain_json(attributes))
    series = len(shape) == 4
    clean, masks = TRUTH_FRAMES["clean"], TRUTH_FRAMES["masks"]
    clean = replace(clean, dims=("time", "defocus", "y", "x")) if series else clean
    store.create_array(group, clean, tuple(shape), chunks=layout.chunk, shards=layout.shard)
    flat = (shape[0], *shape[-2:])
    chunk, shard = ((cut[0], *cut[-2:]) for cut in (layout.chunk, layout.shard))
    store.create_array(group, masks, flat, chunks=chunk, shards=shard)


def write_frames(path: Path, start: int, *, clean: np.ndarray, masks: np.ndarray) -> None:
    """Write whole shards of clean images and masks from frame ``start`` on."""
    group = _truth(path, "r+")
    for name, values in (("clean", clean), ("masks", masks)):
        store.write_region(cast(Any, group[name]), path / GROUP / name, start, values)


def write_whole(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays that are known once for the movie: drift, angle, shifts of planes, maps of the detector."""
    group = _truth(path, "r+")
    known = {**{variable.name: variable for variable in TRUTH_FRAMES.variables}, **MAPS, "plane_shifts": SHIFTS}
    for name, values in arrays.items():
        store.put(group, known[name], values.astype(known[name].dtype))


def write_table(path: Path, table: str, rows: int, pieces: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Write one of ``TRUTH_TABLES`` from pieces in their order; no more than a chunk and a piece is held at a time."""
    group = _truth(path, "r+")
    variables = TRUTH_TABLES[table]
    chunk = max(1, min(rows, ROWS))
    for variable in variables:
        store.create_array(group, variable, (rows,), chunks=(chunk,))
    held: dict[str, np.ndarray] = {}
    start = 0
    for piece in pieces:
        for variable in variables:
            text = variable.dtype == "string"
            values = np.asarray(piece[variable.name]).astype(object if text else variable.dtype)
            held[variable.name] = np.concatenate([held[variable.name], values]) if variable.name in held else values
        while start < rows and (len(held[variables[0].name]) >= chunk or start + len(held[variables[0].name]) == rows):
            for variable in variables:
                values, held[variable.name] = np.split(held[variable.name], [chunk])
                array = cast(Any, group[variable.name])
                store.write_region(array, path / GROUP / variable.name, start, values)
            start += len(values)
    if start != rows:
        raise ValueError(f"table {table} of {path} got {start} rows; expected {rows}")


def read_truth(path: Path, *, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Arrays and attributes of a stack's truth by name; ``names`` limits which arrays are read.

    Raises SchemaError where the stack has no truth, as only simulated ones have.
    """
    store.attributes_of(path)
    if not exists(path):
        raise SchemaError(f"{path} holds no truth; expected a stack that `colonnade simulate` wrote")
    group = _truth(path, "r")
    found: dict[str, Any] = {}
    for name, array in group.arrays():
        if names is None or name in names:
            values = np.asarray(array[...])
            found[name] = np.array(values.tolist(), dtype=str) if values.dtype.kind in "TO" else values
    return {**dict(group.attrs), **found}


def exists(path: Path) -> bool:
    """Whether a stack has a truth group, perhaps an unfinished one."""
    return (path / GROUP / "zarr.json").is_file()


def update_attributes(path: Path, attributes: Mapping[str, Any]) -> None:
    """Add attributes to the truth."""
    _truth(path, "r+").attrs.update(plain_json(attributes))


def _truth(path: Path, mode: str) -> Any:
    return store.open_group(path, mode)[GROUP]
