"""The only file that opens Zarr: stacks and runs are created, written and read here.

One process creates stores and all metadata; tasks write the shards they own and nothing else. Every array carries
checksums, every store is opened without consolidated metadata (it goes stale), and codecs are named by strings, so
that zarr 3.1 and newer read and write the same bytes.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import xarray as xr
import zarr

from pipeline.layout import StackLayout, ome_metadata, plain_json
from schemas.conventions import ANGSTROM, DIMENSIONLESS, SCHEMA_VERSION
from schemas.errors import SchemaError, SettingsError, SourceError
from schemas.stack import STACK
from schemas.variables import Schema, Variable

Array = zarr.Array[Any]
Group = zarr.Group

# Bit-shuffled Blosc halves counting data at some 400 MB/s; the trailing CRC is what detects a flipped bit.
COMPRESSORS: tuple[dict[str, Any], ...] = (
    {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 3, "shuffle": "bitshuffle", "blocksize": 0}},
    {"name": "crc32c"},
)
ROWS_PER_CHUNK = 2**16
ROWS_PER_SHARD = 2**20
FRAMES_PER_SHARD = 2**16
REMEDY = "the stack is damaged: remove it and ingest its source again"


def _typed_compressors(dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    blosc = {**COMPRESSORS[0]["configuration"], "typesize": dtype.itemsize}
    return [{"name": "blosc", "configuration": blosc}, COMPRESSORS[1]]


def create_array(
    group: Group,
    variable: Variable,
    shape: tuple[int, ...],
    *,
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None = None,
) -> Array:
    """Create the array of a variable, of fill values, in place of an older one."""
    if variable.name in group:
        del group[variable.name]
    string = variable.dtype == "string"
    dtype = np.dtype(variable.dtype) if not string else None
    return group.create_array(
        variable.name,
        shape=shape,
        dtype=cast(Any, str if dtype is None else dtype),
        chunks=tuple(max(1, c) for c in chunks),
        shards=shards,
        compressors=cast(Any, [{"name": "zstd", "configuration": {"level": 3, "checksum": True}}])
        if dtype is None
        else cast(Any, _typed_compressors(dtype)),
        fill_value=variable.fill_value,
        dimension_names=variable.dims,
        attributes=variable.attributes,
    )


def put(group: Group, variable: Variable, values: np.ndarray) -> None:
    """Create the array of a variable and write all of it."""
    array = create_array(group, variable, values.shape, chunks=values.shape)
    if values.size:
        array[...] = values


def open_group(path: Path, mode: str) -> Group:
    """The root of a store of ours."""
    return zarr.open_group(str(path), mode=cast(Any, mode), use_consolidated=False)


def write_region(array: Array, path: Path, start: int, values: np.ndarray) -> None:
    """Write rows [start, start + n) along axis 0; whole shards only.

    An old shard is removed first: zarr 3.1 would read it back even to overwrite all of it, and fail for ever on a
    damaged one.
    """
    step = (array.shards or array.chunks)[0]
    stop = start + len(values)
    if start % step or (stop % step and stop != array.shape[0]) or stop > array.shape[0]:
        raise ValueError(
            f"rows [{start}, {stop}) of {path} do not cover whole shards of {step} rows in an array of "
            f"{array.shape[0]}; a task writes all of a shard or nothing of it"
        )
    for shard in range(start // step, math.ceil(stop / step)):
        for file in sorted((path / "c" / str(shard)).rglob("*")) if array.ndim > 1 else [path / "c" / str(shard)]:
            if file.is_file():
                file.unlink()
    # An all-zero shard is stored too: a missing one then always means that something was lost.
    array.with_config({"write_empty_chunks": True})[start:stop] = values


# ---------------------------------------------------------------------------------------------------------- stacks


def create_stack(
    path: Path,
    *,
    shape: Sequence[int],
    dtype: Any,
    time: np.ndarray,
    sampling: float,
    layout: StackLayout,
    attributes: Mapping[str, Any],
    origin: tuple[float, float] = (0.0, 0.0),
    defocus: Sequence[float] | None = None,
) -> None:
    """Create all of a stack but its pixels: counts(time, [defocus,] y, x) in the detector's own dtype.

    ``sampling`` [Å/px]; ``origin`` is the position (y, x) [Å] of the first pixel's centre on the detector;
    ``time`` (time,) [s]; ``defocus`` [Å]. The state stays "running" until ``finish_stack``.
    """
    require_replaceable(path, "stack")
    # Built beside its place and renamed, so that whatever lies under ``path`` is a whole store that says what it is.
    target, path = path, path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    dims = ("time", "y", "x") if defocus is None else ("time", "defocus", "y", "x")
    group = zarr.create_group(str(path), zarr_format=3)
    counts = replace(STACK["counts"], dims=dims, dtype=str(np.dtype(dtype)), fill=0)
    create_array(group, counts, tuple(shape), chunks=layout.chunk, shards=layout.shard)
    put(group, STACK["time"], time)
    for axis, size, start in (("y", shape[-2], origin[0]), ("x", shape[-1], origin[1])):
        put(group, STACK[axis], start + sampling * np.arange(size, dtype=float))
    if defocus is not None:
        put(
            group,
            Variable("defocus", ("defocus",), "float64", ANGSTROM, "defocus, positive: underfocus"),
            np.asarray(defocus, dtype=float),
        )
    put(group, STACK["frame_ok"], np.full(shape[0], -1, dtype="int8"))
    interval = float(time[1] - time[0]) if len(time) > 1 else 1.0
    middle = () if defocus is None else (1.0,)
    ome = ome_metadata(
        target.stem, dims, [("counts", (interval, *middle, sampling, sampling), (0.0, *(0.0 for _ in middle), *origin))]
    )
    state = {"kind": "stack", "schema_version": SCHEMA_VERSION, "state": "running", **attributes}
    group.attrs.update({"ome": ome, "colonnade": plain_json(state)})
    remove(target)
    path.rename(target)


def require_replaceable(path: Path, kind: str) -> None:
    """Refuse to write where something lies that is not a stack (or run) of ours, such as the user's own data."""
    if path.exists() and (found := kind_of(path)) != kind:
        raise SettingsError(
            f"{path} exists and is {f'a {found}' if found else 'no store of ours'}; a {kind} would be written there: "
            "choose another folder or name, or move it away"
        )


def remove(path: Path) -> None:
    """Remove a store at once, as far as any reader can tell: a store half removed would read as zeros."""
    if path.exists():
        trash = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        path.rename(trash)
        shutil.rmtree(trash)


def write_frames(path: Path, start: int, frames: np.ndarray) -> None:
    """Write whole shards of counts from frame ``start`` on; anything else is refused."""
    write_region(cast(Array, open_group(path, "r+")["counts"]), path / "counts", start, frames)


def finish_stack(path: Path, *, frame_ok: np.ndarray, attributes: Mapping[str, Any]) -> None:
    """Declare a stack complete: which frames are good (time,), and what only reading all could tell."""
    group = open_group(path, "r+")
    put(group, STACK["frame_ok"], frame_ok.astype("int8"))
    state = cast(dict[str, Any], group.attrs["colonnade"])
    group.attrs["colonnade"] = plain_json({**state, **attributes, "state": "complete"})


@dataclass(frozen=True)
class Stack:
    """A finished stack, opened for reading."""

    path: Path
    counts: Array
    attributes: dict[str, Any]
    time: np.ndarray
    frame_ok: np.ndarray
    origin: tuple[float, float]
    defocus: np.ndarray | None

    @property
    def sampling(self) -> float:
        """Å per pixel."""
        return float(self.attributes["sampling"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(time, y, x) of one plane."""
        return (self.counts.shape[0], self.counts.shape[-2], self.counts.shape[-1])

    @property
    def planes(self) -> int:
        """Images per time point: 1, unless this is a focal series."""
        return 1 if self.defocus is None else len(self.defocus)

    def read(self, start: int, stop: int, *, plane: int | slice = 0) -> np.ndarray:
        """Frames [start, stop) as (time, y, x) in the detector's dtype; (time, defocus, y, x) of a slice of planes."""
        size = (self.counts.shards or self.counts.chunks)[0]
        for shard in range(start // size, math.ceil(stop / size)):
            file = self.path / "counts" / "/".join(["c", str(shard), *("0" for _ in self.counts.shape[1:])])
            # Zarr would read what is missing (purged, lost in a power cut) as zeros.
            if not file.is_file() or not file.stat().st_size:
                raise SourceError(f"{file} is missing or empty, though {self.path} is complete; {REMEDY}")
        try:
            if self.defocus is not None:
                return np.asarray(self.counts[start:stop, plane])
            frames = np.asarray(self.counts[start:stop])
            return frames[:, None][:, plane] if isinstance(plane, slice) else frames
        except (ValueError, RuntimeError, OSError) as error:
            raise SourceError(
                f"{self.path}: frames {start} to {stop - 1} cannot be read ({type(error).__name__}: {error}); {REMEDY}"
            ) from None

    def read_frames(self, indices: Sequence[int], *, plane: int = 0) -> np.ndarray:
        """Frames of any indices as (time, y, x)."""
        return np.concatenate([self.read(int(i), int(i) + 1, plane=plane) for i in indices])


def kind_of(path: Path) -> str | None:
    """ "stack" or "run" for a store of ours, None for anything else."""
    try:
        state = json.loads((path / "zarr.json").read_text())["attributes"]["colonnade"]
        return str(state["kind"])
    except (OSError, KeyError, ValueError, TypeError):
        return None


def attributes_of(path: Path) -> dict[str, Any]:
    """What a store of ours says of itself; ``SchemaError`` for anything else and for a newer layout."""
    found = kind_of(path)
    if found is None:
        raise SchemaError(
            f"{path} is not a stack or run of Colonnade; expected a folder that ingest or run has written"
        )
    state = cast(dict[str, Any], open_group(path, "r").attrs["colonnade"])
    if int(state.get("schema_version", 0)) > SCHEMA_VERSION:
        raise SchemaError(
            f"{path} has schema_version {state['schema_version']}; this version reads up to {SCHEMA_VERSION}: "
            "upgrade colonnade to open it"
        )
    return state


def open_stack(path: Path) -> Stack:
    """Open a finished stack; ``SchemaError`` says what else it is."""
    state = attributes_of(path)
    if state["kind"] != "stack" or state["state"] != "complete":
        raise SchemaError(
            f"{path} is a {state['kind']} in state {state['state']!r}; expected a complete stack: ingest it again"
        )
    group = open_group(path, "r")

    def values(name: str) -> np.ndarray:
        return np.asarray(cast(Array, group[name])[...])

    return Stack(
        path=path,
        counts=cast(Array, group["counts"]),
        attributes=state,
        time=values("time"),
        frame_ok=values("frame_ok") == 1,
        origin=(float(values("y")[0]), float(values("x")[0])),
        defocus=values("defocus") if "defocus" in group else None,
    )


def read_through(path: Path) -> Iterator[tuple[str, str | None]]:
    """Read every stored value of a store, shard by shard: name of each array, and what is wrong with it, or None.

    Each chunk carries a checksum (CRC-32C), which reading compares. A shard that is missing or empty reads as fill
    values without complaint; of what we write only images may lack some, of frames that are not good.
    """
    for name, found in sorted(open_group(path, "r").members(max_depth=None), key=lambda member: member[0]):
        if not isinstance(found, zarr.Array):
            continue
        trouble, step = None, max(1, (found.shards or found.chunks or (1,))[0])
        try:
            for start in range(0, found.shape[0] if found.shape else 1, step):
                _ = found[start : start + step] if found.shape else found[()]
        except Exception as error:  # each codec has errors of its own
            trouble = f"{type(error).__name__}: {error}"
        files = [file for file in (path / name).rglob("*") if file.is_file() and file.name != "zarr.json"]
        wanted = math.prod(math.ceil(n / m) for n, m in zip(found.shape, found.shards or found.chunks, strict=True))
        if trouble is None and found.size and (len(files) < wanted or not all(file.stat().st_size for file in files)):
            kept = sum(file.stat().st_size > 0 for file in files)
            if not name.startswith(("images/", "examples/")) and kept < wanted:
                trouble = f"{wanted - kept} of {wanted} shards are missing or empty"
        yield name, trouble


def open_tree(path: Path) -> xr.DataTree:
    """A run as an xarray DataTree, lazily."""
    return xr.open_datatree(path, engine="zarr", consolidated=False)


def create_run(path: Path, attributes: Mapping[str, Any]) -> None:
    """Create a run, or put an existing one back to state "running" with new attributes; arrays stay."""
    state = plain_json({"kind": "run", "schema_version": SCHEMA_VERSION, "state": "running", **attributes})
    if path.exists() and any(entry.suffix != ".partial" for entry in path.iterdir()):
        require_replaceable(path, "run")
        attributes_of(path)
        open_group(path, "r+").attrs["colonnade"] = state
    else:
        zarr.create_group(str(path), zarr_format=3, attributes={"colonnade": state})


def update_run(path: Path, attributes: Mapping[str, Any]) -> None:
    """Change some of the run's own attributes, such as its state."""
    group = open_group(path, "r+")
    group.attrs["colonnade"] = plain_json({**cast(dict[str, Any], group.attrs["colonnade"]), **attributes})


def create_table(
    path: Path, schema: Schema, rows: int, *, sizes: Mapping[str, int], coordinates: Mapping[str, Sequence[Any]]
) -> None:
    """Create the arrays of a group with ``rows`` rows of fill values, replacing older ones.

    ``sizes`` gives the lengths of further dimensions, ``coordinates`` values that are known from the start.
    """
    group = open_group(path, "r+").require_group(schema.group.strip("/"))
    known = {name: np.asarray(values) for name, values in coordinates.items()}
    for variable in schema.variables:
        if variable.optional and not set(variable.dims) <= {schema.row, *sizes}:
            if variable.name in group:
                del group[variable.name]
            continue
        if variable.name in known:
            put(group, variable, known.pop(variable.name))
            continue
        rest = tuple(sizes[dim] for dim in variable.dims[1:])
        chunk = min(max(rows, 1), ROWS_PER_CHUNK)
        shard = chunk * min(math.ceil(max(rows, 1) / chunk), shard_rows(schema) // ROWS_PER_CHUNK)
        create_array(group, variable, (rows, *rest), chunks=(chunk, *rest), shards=(shard, *rest))
    for name, data in known.items():
        kind = "string" if data.dtype.kind in "UO" else str(data.dtype)
        put(group, Variable(name, (name,), kind, DIMENSIONLESS, name.replace("_", " ")), data)


def shard_rows(schema: Schema) -> int:
    """Rows of a table that one task writes."""
    return FRAMES_PER_SHARD if schema.row == "time" else ROWS_PER_SHARD


def write_rows(path: Path, schema: Schema, start: int, values: Mapping[str, np.ndarray]) -> None:
    """Write whole shards of a table's variables, all but those known from the start, from row ``start`` on."""
    group = cast(zarr.Group, open_group(path, "r+")[schema.group.strip("/")])
    wanted = {v.name for v in schema.variables if v.dims != (v.name,) and (not v.optional or v.name in group)}
    lengths = {name: len(data) for name, data in values.items()}
    if set(values) - {schema.row} != wanted or len(set(lengths.values())) > 1:
        raise ValueError(
            f"rows from {start} on of {schema.group} hold {lengths}; expected rows of one length for {sorted(wanted)}"
        )
    for variable in (v for v in schema.variables if v.name in values):
        array = cast(Array, group[variable.name])
        folder = path / schema.group.strip("/") / variable.name
        data = values[variable.name]
        write_region(array, folder, start, data if variable.dtype == "string" else data.astype(variable.dtype))
