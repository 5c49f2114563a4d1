"""Ask runs for the frames, columns or particles that fulfil a condition, in memory that is bounded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from pipeline.results.expression import names, parse, unknown_name
from pipeline.results.open import ROWS_PER_BATCH, find_runs, movie_name, open_run
from pipeline.results.predicate import Field, Predicate
from schemas.columns import COLUMNS
from schemas.errors import SchemaError, SettingsError
from schemas.frames import FRAMES
from schemas.particles import PARTICLES
from schemas.variables import Schema

Table = Literal["frames", "columns", "particles"]
Batch = dict[str, np.ndarray]
_SCHEMAS: dict[Table, Schema] = {"frames": FRAMES, "columns": COLUMNS, "particles": PARTICLES}


class _Source:
    """One run as a flat table: names and kinds without reading, values of a range of rows when asked for."""

    def __init__(self, path: Path, table: Table | None = None) -> None:
        self.run = open_run(path)
        self.movie = movie_name(self.run, path)
        self.table = table
        missing = [group for group in ("frames", "columns", table or "frames") if group not in self.run.children]
        if missing:
            raise SchemaError(
                f"{path} has no /{missing[0]} yet: the run has not been collected; run it to its end first"
            )
        self.frames = _flat(self.run["frames"].to_dataset().reset_coords(), "time")
        self.tables: dict[Table, dict[str, xr.Variable]] = {"frames": self.frames}
        for name, schema in _SCHEMAS.items():
            if name != "frames" and name in self.run.children:
                self.tables[name] = _flat(self.run[name].to_dataset(), schema.row)
        count = len(next(iter(self.frames.values())))
        self.frames["frame"] = xr.Variable("time", np.arange(count), COLUMNS["frame"].attributes)
        self._spread: dict[str, np.ndarray] = {}

    @cached_property
    def rows(self) -> int:
        """Rows of the table."""
        return len(self.tables[self.table or "columns"]["frame"])

    def names(self, table: Table) -> list[str]:
        """Names of the table's own variables, the index of the frame first."""
        own = self.tables[table]
        order = {name: place for place, name in enumerate(("frame", *_SCHEMAS[table].names))}
        return sorted(own, key=lambda name: order.get(_stem(name), len(order)))

    def variable(self, name: str, table: Table) -> xr.Variable:
        """A variable of the table, or of /frames where rows within frames are asked for."""
        own = self.tables[table]
        return own[name] if name in own else self.frames[name]

    def fields(self, table: Table) -> dict[str, Field]:
        """What a condition over the table may use."""
        known = dict.fromkeys([*self.frames, *self.tables[table]])
        return {name: _field(self.variable(name, table)) for name in known}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a variable; one of /frames is spread over the rows within each frame."""
        own = self.tables[self.table or "columns"]
        if name in own:
            return _loaded(own[name][start:stop])
        if name not in self._spread:
            self._spread[name] = _loaded(self.frames[name])
        return self._spread[name][own["frame"][start:stop].values]


@dataclass(frozen=True)
class Answer:
    """The rows that fulfil a query: read when walked over, batch by batch."""

    table: Table
    names: tuple[str, ...]
    attributes: Mapping[str, Mapping[str, Any]]
    expression: str | None
    movies: tuple[str, ...]
    _walk: Callable[[], Iterator[Batch]]

    def batches(self) -> Iterator[Batch]:
        """Arrays (row,) by name; a batch never holds more than the rows asked for in ``query``, and may hold none."""
        return self._walk()

    def frames(self) -> Iterator[pd.DataFrame]:
        """The batches as pandas tables, flags as words."""
        for batch in self.batches():
            yield pd.DataFrame(
                {name: self._words(name, array) for name, array in batch.items()}, columns=list(self.names)
            )

    def to_dataframe(self) -> pd.DataFrame:
        """All rows in memory, as one pandas table."""
        tables = list(self.frames())
        filled = [table for table in tables if len(table)]
        return pd.concat(filled, ignore_index=True) if filled else tables[0]

    def _words(self, name: str, array: np.ndarray) -> np.ndarray:
        labels = _labels(self.attributes.get(name, {}))
        if not labels:
            return array.astype(object) if array.dtype.kind == "T" else array
        words = {value: word for word, value in labels.items()}
        return np.array([words.get(int(value), str(value)) for value in array], dtype=object)


def query(
    runs: str | Path | Sequence[str | Path],
    expression: str | None = None,
    *,
    select: Sequence[str] | None = None,
    table: Table | None = None,
    rows: int = ROWS_PER_BATCH,
) -> Answer:
    """Rows of the frames, columns or particles of runs that fulfil ``expression`` (all where it is None).

    A folder stands for the runs in it; with several runs a variable ``movie`` comes first. ``select`` names what is
    returned, by default the table's own variables. ``table`` defaults to the first of frames, columns and particles
    that knows every name used; a query of columns or particles may use what /frames says of their frame. At most
    ``rows`` rows are held at a time.
    Raises ``SettingsError`` for what is wrong with the query, ``SchemaError`` for what is wrong with a run.
    """
    paths = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    found = [run for path in paths for run in (find_runs(path) or [path])]
    if not found:
        raise SettingsError("no run was given; expected one or more FOLDER/<movie>.zarr, or a folder of runs")
    expression = expression if expression and expression.strip() else None
    first = _Source(found[0], table)
    used = (names(parse(expression)) if expression else set()) | set(select or ())
    chosen = table or _infer(first, used - {"movie"})
    several = len(found) > 1
    returned = _returned(first, select, chosen)
    attributes = {name: first.variable(name, chosen).attrs for name in returned}
    movies = tuple(_check(path, expression, returned, chosen) for path in found)

    def walk() -> Iterator[Batch]:
        for path in found:
            source = _Source(path, chosen)
            condition = Predicate(expression, source.fields(chosen)) if expression else None
            for batch in _matching(source, condition, returned, rows):
                movie = {"movie": np.full(len(batch[returned[0]]), source.movie, dtype=object)} if several else {}
                yield {**movie, **batch}

    return Answer(chosen, (*(("movie",) if several else ()), *returned), attributes, expression, movies, walk)


def _matching(source: _Source, condition: Predicate | None, returned: Sequence[str], rows: int) -> Iterator[Batch]:
    """Batches of matching rows; nothing is read of ranges in which no row matches. At least one batch comes."""
    for start in range(0, max(source.rows, 1), rows):
        stop = min(start + rows, source.rows)
        mask = np.ones(stop - start, dtype=bool)
        if condition is not None:
            values = {name: _missing_as_nan(name, source.read(name, start, stop)) for name in condition.names}
            mask = condition(values, stop - start)
        if mask.any():
            yield {name: source.read(name, start, stop)[mask] for name in returned}
        elif start == 0:
            yield {name: source.read(name, 0, 0) for name in returned}


def _infer(source: _Source, used: set[str]) -> Table:
    known = set(source.frames) | {"species_count"}
    if used <= known:
        return "frames"
    particles = set(source.tables.get("particles", ()))
    return "particles" if not used <= known | set(source.tables["columns"]) and used <= known | particles else "columns"


def _returned(source: _Source, select: Sequence[str] | None, table: Table) -> list[str]:
    if not select:
        return source.names(table)
    known = source.fields(table)
    returned: list[str] = []
    for name in select:
        members = [other for other in known if other.startswith("species_count_")] if name == "species_count" else []
        if name not in known and not members:
            raise SettingsError(f"select: {unknown_name(name, known)}")
        returned += [member for member in members or [name] if member not in returned]
    return returned


def _check(path: Path, expression: str | None, returned: Sequence[str], table: Table) -> str:
    """Refuse a run that cannot answer before anything is written; gives its movie's name."""
    source = _Source(path, table)
    fields = source.fields(table)
    if expression:
        Predicate(expression, fields)
    if absent := [name for name in returned if name not in fields]:
        raise SettingsError(f"{path}: {unknown_name(absent[0], fields)}")
    return source.movie


def _flat(dataset: xr.Dataset, dim: str) -> dict[str, xr.Variable]:
    """Variables over one dimension; one with classes becomes a variable per class, ``species_count_Au``."""
    flat: dict[str, xr.Variable] = {}
    for key, array in dataset.variables.items():
        name = str(key)
        if array.dims == (dim,):
            flat[name] = array
        elif len(array.dims) == 2 and array.dims[0] == dim:
            for i, label in enumerate(dataset[str(array.dims[1])].values):
                flat[f"{name}_{re.sub(r'[^0-9A-Za-z_]', '_', str(label))}"] = array[:, i]
    return flat


def _loaded(array: xr.Variable) -> np.ndarray:
    return np.asarray(array.values)


def _labels(attributes: Mapping[str, Any]) -> dict[str, int]:
    """Words of a CF flag variable, with their numbers."""
    words = str(attributes.get("flag_meanings", "")).split()
    return dict(zip(words, (int(v) for v in attributes.get("flag_values", ())), strict=False))


def _field(array: xr.Variable) -> Field:
    kind = array.dtype.kind
    if kind in "UTO":
        return Field("text")
    return Field("truth" if kind == "b" else "number", _labels(array.attrs) or None)


def _stem(name: str) -> str:
    """Name in the schema of a variable that was made of one with classes."""
    return "species_count" if name.startswith("species_count_") else name


def _missing_as_nan(name: str, array: np.ndarray) -> np.ndarray:
    """Integers as float64, with NaN where nothing was computed: -1 columns are not fewer than 10."""
    if array.dtype.kind not in "iu":
        return array
    fills = {variable.name: variable.fill_value for schema in _SCHEMAS.values() for variable in schema.variables}
    numbers = array.astype(np.float64)
    return np.where(numbers == -1, np.nan, numbers) if fills.get(_stem(name)) == -1 else numbers
