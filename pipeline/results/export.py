"""Write the answer to a query as text, CSV, Parquet or netCDF, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import h5netcdf
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.results.query import Answer
from schemas.errors import SettingsError

FORMATS = ("table", "csv", "parquet", "netcdf")
_CHUNK = 65536


def write(answer: Answer, path: str | Path, format: str) -> int:
    """Write all rows of an answer to a file, which appears only when it is complete; gives the number of rows.

    ``format`` is csv, parquet, or netcdf (CF attributes; flags stay numbers). Raises ``SettingsError`` for another.
    """
    writers: dict[str, Callable[[Answer, Path], int]] = {
        "csv": _write_csv_file, "parquet": _write_parquet, "netcdf": _write_netcdf,
    }  # fmt: skip
    if format not in writers:
        raise SettingsError(f"format {format!r} cannot be written to a file; expected one of {', '.join(writers)}")
    path = Path(path)
    if not path.parent.is_dir():
        raise SettingsError(f"the folder of {path} does not exist; create it, or write elsewhere")
    with _whole(path) as partial:
        return writers[format](answer, partial)


def write_csv(answer: Answer, stream: TextIO) -> int:
    """Write all rows as CSV with a header of names; missing numbers are empty. Gives the number of rows."""
    rows = 0
    for i, table in enumerate(answer.frames()):
        if i == 0 or len(table):
            table.to_csv(stream, index=False, header=i == 0, lineterminator="\n")
        rows += len(table)
    return rows


def as_text(answer: Answer, limit: int | None = 20) -> str:
    """The first ``limit`` rows as a table with units, and how many rows there are in all."""
    shown: list[pd.DataFrame] = []
    rows = held = 0
    for table in answer.frames():
        rows += len(table)
        wanted = len(table) if limit is None else max(0, limit - held)
        shown.append(table.iloc[:wanted])
        held += len(shown[-1])
    filled = [part for part in shown if len(part)] or shown[:1]
    text = pd.concat(filled).rename(columns={name: _titled(answer, name) for name in answer.names})
    kind = answer.table.removesuffix("s")
    of = f" of {rows:,}" if held < rows else ""
    total = f"{held:,}{of} {kind}{'' if rows == 1 else 's'}"
    body = text.to_string(index=False, float_format=lambda value: f"{value:.5g}", na_rep="–") + "\n" if rows else ""
    return f"{body}{total}" + (f" in {len(answer.movies)} movies" if len(answer.movies) > 1 else "")


def _titled(answer: Answer, name: str) -> str:
    units = answer.attributes.get(name, {}).get("units", "1")
    short = {"angstrom": "Å", "electron angstrom-2": "e/Å²", "electron": "e"}.get(units, units)
    return name if units == "1" else f"{name} [{short}]"


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_csv_file(answer: Answer, path: Path) -> int:
    with path.open("w", encoding="utf-8", newline="") as stream:
        return write_csv(answer, stream)


def _write_parquet(answer: Answer, path: Path) -> int:
    """Units and meanings go into the fields' metadata; one row group per batch."""
    rows, writer = 0, None
    try:
        for frame in answer.frames():
            table = pa.Table.from_pandas(_typed(frame), preserve_index=False)
            if writer is None:
                fields = [_with_meaning(answer, field) for field in table.schema]
                writer = pq.ParquetWriter(path, pa.schema(fields), compression="zstd")
            if len(frame):
                writer.write_table(table.cast(writer.schema))
            rows += len(frame)
    finally:
        if writer is not None:
            writer.close()
    return rows


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Text as strings even where a batch is empty, so that every batch has one type."""
    return frame.astype({name: "string" for name in frame.columns if frame[name].dtype.kind == "O"})


def _with_meaning(answer: Answer, field: Any) -> Any:
    kept = {k: v for k, v in answer.attributes.get(field.name, {}).items() if k in ("units", "long_name")}
    return pa.field(field.name, field.type, metadata={k: str(v) for k, v in kept.items()})


def _write_netcdf(answer: Answer, path: Path) -> int:
    """netCDF-4 along one unlimited dimension that grows batch by batch."""
    one_movie = len(answer.movies) == 1
    dim = answer.table.removesuffix("s") if answer.table != "frames" else ("time" if one_movie else "row")
    rows = 0
    with h5netcdf.File(path, "w") as file:
        file.dimensions = {dim: None}
        file.attrs["Conventions"] = "CF-1.11"
        file.attrs["title"] = f"{answer.table} of {', '.join(answer.movies)}"[:1000]
        file.attrs["history"] = f"colonnade query {answer.expression or '(all rows)'}"
        for batch in answer.batches():
            count = len(next(iter(batch.values())))
            for name in answer.names if not file.variables else ():
                _netcdf_variable(file, dim, name, batch[name], answer)
            file.resize_dimension(dim, rows + count)
            for name in answer.names if count else ():
                file.variables[name][rows : rows + count] = _storable(batch[name])
            rows += count
    return rows


def _netcdf_variable(file: h5netcdf.File, dim: str, name: str, array: np.ndarray, answer: Answer) -> None:
    text = array.dtype.kind in "UTO"
    attributes = dict(answer.attributes.get(name, {}))
    attributes.pop("sample_dimension", None)  # it announces a table of columns, which is not in this file
    if array.dtype.kind == "i" and "flag_values" not in attributes:
        attributes["valid_min"] = array.dtype.type(0)  # -1 is missing; a _FillValue would turn integers into floats
    dtype = h5py.string_dtype() if text else array.dtype
    packing = {} if text else {"compression": "gzip", "compression_opts": 3, "shuffle": True}
    variable = file.create_variable(
        name, (dim,), dtype=dtype, chunks=(_CHUNK,), fillvalue=np.nan if array.dtype.kind == "f" else None, **packing
    )
    for key, value in attributes.items():
        variable.attrs[key] = np.asarray(value, dtype=array.dtype) if key == "flag_values" else value


def _storable(array: np.ndarray) -> np.ndarray:
    return array.astype(object) if array.dtype.kind in "UT" else array
