"""Readers of HDF5 files: by dataset path, HyperSpy, Berkeley EMD; and the door to Velox EMD."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pipeline.ingest.axes import MAX_STORED, Axis, array_facts, chosen, read_array
from pipeline.ingest.facts import Facts, json_able, number, positive
from schemas.errors import SourceError

MAX_GROUPS = 2_000  # groups of which attributes are kept


def inspect_hdf5(path: Path, dataset: str | None) -> Facts:
    """Facts of the only, or the chosen, image dataset of an HDF5 file in whichever dialect it is written."""
    from pipeline.ingest import formats_velox

    with opened(path) as file:
        if formats_velox.is_velox(file):
            return formats_velox.inspect_velox(path, file, dataset)
        found = _images(file) | _named(file, dataset)
        name = chosen(path, {name: str(tuple(item.shape)) for name, item in found.items()}, dataset)
        stored = own_dataset(path, file, name)
        axes, where = _axes(stored)
        known = {"energy": _energy(file)}
        bad = unwritten(stored, axes)
        facts = array_facts(
            path,
            axes,
            stored.dtype,
            layout={"kind": "hdf5", "dataset": name},
            where=where,
            vendor=json_able(_attributes(file)),
            bad=bad,
            damage="these frames were never written" if bad else "",
            **{key: value for key, value in known.items() if value is not None},
        )
        return _element_size(stored, facts)


def read_hdf5(path: Path, layout: dict[str, Any], plane: tuple[int, int], start: int, stop: int) -> np.ndarray:
    """Planes start…stop of an HDF5 dataset, (stop - start, y, x)."""
    with opened(path) as file:
        return read_array(own_dataset(path, file, layout["dataset"]), layout["order"], plane, start, stop)


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file for reading; a SourceError where it is damaged."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        if not path.exists():
            raise SourceError(f"{path}: no such file.") from error
        what = "is not an HDF5 file" if "signature" in str(error) else "is truncated or corrupt"
        raise SourceError(
            f"{path}: {what} ({error}). HDF5 cannot open a part of a file, so no frame can be recovered. "
            "Copy the file again."
        ) from error
    with file:
        yield file


def own_dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset whose data lie in this file or in its folder; links that lead elsewhere are refused."""
    try:
        found = file[name]
    except (KeyError, OSError) as error:
        raise SourceError(f"{path}: has no dataset {name!r} (source.dataset), or its link leads nowhere.") from error
    if not isinstance(found, h5py.Dataset):
        raise SourceError(f"{path}: {name!r} is a group; expected a dataset (source.dataset).")
    reached = [found.file.filename]
    if found.is_virtual:
        reached += [
            str(path.parent / source.file_name) for source in found.virtual_sources() if source.file_name != "."
        ]
    reached += [str(path.parent / name) for name, _, _ in found.external or ()]
    for other in reached:
        if not Path(other).resolve().is_relative_to(path.resolve().parent):
            raise SourceError(f"{path}: {name!r} leads to {other}, out of its folder. Put the files into one folder.")
    return found


def unwritten(stored: h5py.Dataset, axes: list[Axis]) -> tuple[int, ...]:
    """Frames along the first axis that no chunk was ever written for: an interrupted recording."""
    if stored.chunks is None or stored.ndim < 3:
        return ()
    along, step = stored.shape[0], stored.chunks[0]
    expected = np.prod([-(-n // c) for n, c in zip(stored.shape, stored.chunks, strict=True)])
    if stored.is_virtual or stored.id.get_num_chunks() >= expected:
        return ()
    per_time = int(expected // -(-along // step))
    counts = np.zeros(-(-along // step), int)
    stored.id.chunk_iter(
        lambda chunk: counts.__setitem__(chunk.chunk_offset[0] // step, counts[chunk.chunk_offset[0] // step] + 1)
    )
    missing = np.repeat(counts < per_time, step)[:along]
    planes = axes[1].size if len(axes) == 4 else 1
    return tuple(np.flatnonzero(np.repeat(missing, planes)).tolist())


def _images(file: h5py.File) -> dict[str, h5py.Dataset]:
    found: dict[str, h5py.Dataset] = {}

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "uifbc":
            return
        if item.ndim >= 2 and min(item.shape) > 0 and sum(n > 1 for n in item.shape) >= 2:
            found[name] = item

    file.visititems(visit)
    return found


def _named(file: h5py.File, dataset: str | None) -> dict[str, h5py.Dataset]:
    """The dataset at a path that the user gave, also where a link hides it from the listing."""
    name = (dataset or "").strip("/")
    item = file.get(name) if name else None
    return {name: item} if isinstance(item, h5py.Dataset) else {}


def _axes(stored: h5py.Dataset) -> tuple[list[Axis], str]:
    group = stored.parent
    berkeley = [group.get(f"dim{i + 1}") for i in range(stored.ndim)]
    if all(isinstance(item, h5py.Dataset) for item in berkeley):
        return [_dimension(item, n) for item, n in zip(berkeley, stored.shape, strict=True)], "the EMD dimensions"
    hyperspy = [group.get(f"axis-{i}") for i in range(stored.ndim)]
    if all(isinstance(item, h5py.Group) for item in hyperspy):
        return [_hyperspy(item, n) for item, n in zip(hyperspy, stored.shape, strict=True)], "the HyperSpy axes"
    return [Axis(n) for n in stored.shape], "the dataset"


def _dimension(item: h5py.Dataset, size: int) -> Axis:
    name, unit = text(item.attrs.get("name", "")), text(item.attrs.get("units", ""))
    values = None
    if item.ndim == 1 and 2 <= item.size <= MAX_STORED and item.dtype.kind in "uif":
        values = tuple(item[:].astype(float).tolist())
    if values is not None and len(values) != size:  # the short form: the first two positions
        return Axis(size, name, unit, step=values[1] - values[0])
    return Axis(size, name, unit, values=values)


def _hyperspy(item: h5py.Group, size: int) -> Axis:
    unit = text(item.attrs.get("units", ""))
    unit = "" if unit in ("_None_", "<undefined>") else unit
    return Axis(size, text(item.attrs.get("name", "")), unit, step=number(item.attrs.get("scale")))


def _element_size(stored: h5py.Dataset, facts: Facts) -> Facts:
    """The pixel size in µm that ImageJ's HDF5 plugins and ilastik write beside a dataset."""
    size = stored.attrs.get("element_size_um")
    if facts.spacing is not None or size is None or len(size) < 2:
        return facts
    from dataclasses import replace

    from pipeline.ingest.facts import Spacing

    return replace(
        facts, spacing=Spacing(float(size[-2]), "µm", float(size[-1]), "µm", "the attribute element_size_um")
    )


def _energy(file: h5py.File) -> float | None:
    microscope = file.get("microscope")
    return positive(microscope.attrs.get("high tension"), 1e-3) if isinstance(microscope, h5py.Group) else None


def _attributes(file: h5py.File) -> dict[str, Any]:
    tree: dict[str, Any] = {"/": dict(file.attrs)} if len(file.attrs) else {}

    def visit(name: str, item: Any) -> bool | None:
        if len(item.attrs):
            tree[name] = {key: _attribute(item.attrs, key) for key in item.attrs}
        return True if len(tree) >= MAX_GROUPS else None

    file.visititems(visit)
    return tree


def _attribute(attributes: h5py.AttributeManager, key: str) -> Any:
    try:
        return attributes[key]
    except (OSError, TypeError, ValueError):  # a type that h5py does not know
        return "<unreadable>"


def text(value: Any) -> str:
    """Text out of what HDF5 writers make of a string: str, bytes, arrays of one."""
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size else ""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return str(value) if isinstance(value, str) else ""
