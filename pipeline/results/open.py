"""Open a run, and get from its ragged columns to one frame and back, reading only the rows that are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import xarray as xr

from pipeline import store
from schemas.errors import SchemaError

ROWS_PER_BATCH = 1_000_000
"""Rows of /columns that are held in memory at a time by what walks over all of them."""


def open_run(path: str | Path) -> xr.DataTree:
    """Open a run lazily; a run still in progress opens too, and its state is ``provenance(run)["state"]``.

    Raises ``SchemaError`` where there is no run at ``path``, or one of a newer version.
    """
    path = Path(path)
    wanted = "expected a run, that is FOLDER/<movie>.zarr written by `colonnade run`"
    if not path.exists():
        raise SchemaError(f"{path} does not exist; {wanted}")
    kind = store.kind_of(path)
    if kind is None:
        raise SchemaError(f"{path} is not a store that colonnade wrote; {wanted}")
    if kind != "run":
        raise SchemaError(f"{path} is a {kind}; {wanted}, and not one in FOLDER/stacks")
    store.attributes_of(path)  # refuses a newer version
    return store.open_tree(path)


def find_runs(path: str | Path) -> list[Path]:
    """The run at ``path``, or all runs directly in the folder ``path``, by name; empty where there is none."""
    path = Path(path)
    if store.kind_of(path) == "run":
        return [path]
    return sorted(inside for inside in path.glob("*.zarr") if store.kind_of(inside) == "run")


def provenance(run: xr.DataTree) -> dict[str, Any]:
    """What the root of a run says of its making: state, movie, versions, settings, sources, models, plan, notes."""
    return dict(run.attrs.get("colonnade", {}))


def movie_name(run: xr.DataTree, path: str | Path) -> str:
    """Name of the movie, from the run or else from its path."""
    return str(provenance(run).get("movie") or Path(path).stem)


def frame_index(column_count: np.ndarray) -> np.ndarray:
    """Row offsets of frames: frame f owns rows ``offsets[f]`` to ``offsets[f + 1]`` of /columns.

    column_count: (time) rows of each frame; negative (not computed) counts as none. Returns (time + 1) int64.
    """
    return np.concatenate([[0], np.cumsum(np.maximum(np.asarray(column_count, dtype=np.int64), 0))])


def values(run: xr.DataTree, path: str) -> np.ndarray:
    """All of one variable, such as ``frames/snr``, read into memory."""
    return np.asarray(cast(xr.DataArray, run[path]).values)


def _offsets(run: xr.DataTree, row: str = "column") -> np.ndarray:
    return frame_index(values(run, f"frames/{row}_count"))


def _table(run: xr.DataTree, group: str) -> xr.Dataset:
    if group not in run.children:
        raise SchemaError(f"the run has no group /{group}; it holds {sorted(run.children)}")
    return run[group].to_dataset()


def columns_of_frame(run: xr.DataTree, frame: int) -> xr.Dataset:
    """The columns found in one frame, read from disk when used; negative frames count from the end.

    Raises ``IndexError`` outside the movie.
    """
    return _of_frame(run, frame, "column")


def particles_of_frame(run: xr.DataTree, frame: int) -> xr.Dataset:
    """The particles found in one frame, as ``columns_of_frame`` gives the columns; row n has the label n + 1."""
    return _of_frame(run, frame, "particle")


def _of_frame(run: xr.DataTree, frame: int, row: str) -> xr.Dataset:
    offsets = _offsets(run, row)
    total = len(offsets) - 1
    if not -total <= frame < total:
        raise IndexError(f"frame {frame} is outside the movie; expected {-total} to {total - 1}")
    frame %= total
    return _table(run, f"{row}s").isel({row: slice(int(offsets[frame]), int(offsets[frame + 1]))})


def rows_of_frames(run: xr.DataTree, frames: Sequence[int] | np.ndarray) -> xr.Dataset:
    """The columns found in several frames, in the order of ``frames``; consecutive frames are read as one piece.

    ``frames`` holds indices, or is a mask over the whole movie. Raises ``IndexError`` outside the movie.
    """
    offsets = _offsets(run)
    total = len(offsets) - 1
    chosen = np.asarray(frames)
    if chosen.dtype == bool:
        if chosen.shape != (total,):
            raise IndexError(f"a mask over frames has shape {chosen.shape}; expected ({total},)")
        chosen = np.flatnonzero(chosen)
    chosen = chosen.astype(np.int64)
    if chosen.size and (chosen.min() < -total or chosen.max() >= total):
        raise IndexError(f"frames {chosen.min()} to {chosen.max()} reach outside the movie of {total} frames")
    chosen %= max(total, 1)
    table = _table(run, "columns")
    starts = np.flatnonzero(np.diff(chosen, prepend=-2) != 1)
    ends = np.append(starts[1:], chosen.size)
    pieces = (
        [
            table.isel(column=slice(int(offsets[chosen[a]]), int(offsets[chosen[b - 1] + 1])))
            for a, b in zip(starts, ends, strict=True)
        ]
        if chosen.size
        else []
    )
    if not pieces:
        return table.isel(column=slice(0, 0))
    return pieces[0] if len(pieces) == 1 else xr.concat([piece.load() for piece in pieces], dim="column")


def row_batches(run: xr.DataTree, rows: int = ROWS_PER_BATCH, *, row: str = "column") -> Iterator[xr.Dataset]:
    """Walk over /columns (or /particles), ``rows`` at a time, so that memory does not grow with the movie."""
    table = _table(run, f"{row}s")
    for start in range(0, table.sizes[row], rows):
        yield table.isel({row: slice(start, start + rows)})


def frames_of_columns(run: xr.DataTree, columns: xr.Dataset, names: Sequence[str] | None = None) -> xr.Dataset:
    """What /frames says of the frame of each column: its variables (all, or ``names``) with one row per column."""
    frames = _table(run, "frames")
    frames = frames.reset_index("time").reset_coords("time") if "time" in frames.indexes else frames
    chosen = frames if names is None else frames[list(names)]
    return chosen.isel(time=xr.DataArray(columns["frame"].values, dims="column"))


def to_detector(run: xr.DataTree, columns: xr.Dataset) -> xr.Dataset:
    """Add ``y_detector`` and ``x_detector`` [Å]: where the columns lay on the detector in their own frame.

    Stored positions are those of the specimen frame, with drift removed: x_detector = x + drift_x of the frame.
    """
    frame = columns["frame"].values
    added = {}
    for axis, long_name in (("y", "position down the detector"), ("x", "position across the detector")):
        drift = values(run, f"frames/drift_{axis}")[frame]
        attributes = {"long_name": long_name, "units": "angstrom"}
        added[f"{axis}_detector"] = ("column", columns[axis].values + drift, attributes)
    return columns.assign(added)
