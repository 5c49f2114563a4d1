"""Reader of Zarr sources (v2 and v3): plain arrays, groups of arrays, OME-Zarr images, datasets written by xarray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.ingest.axes import MAX_STORED, Axis, array_facts, chosen, read_array
from pipeline.ingest.facts import Facts, json_able, number
from schemas.errors import SourceError


def open_source(path: Path) -> Any:
    """A Zarr array or group of somebody else, for reading only."""
    import zarr

    is_array = (path / ".zarray").is_file() or '"node_type": "array"' in _text(path / "zarr.json")
    if is_array:
        return zarr.open_array(str(path), mode="r")
    return zarr.open_group(str(path), mode="r", use_consolidated=False)


def inspect_zarr(path: Path, dataset: str | None) -> Facts:
    """Facts of a Zarr array, or of the only or chosen image of a group (of OME images the full resolution)."""
    node = open_source(path)
    name, axes, where = _image(path, node, dataset)
    array = node[name] if name else node
    vendor = json_able({"attributes": dict(node.attrs), **({name: dict(array.attrs)} if name else {})})
    return array_facts(path, axes, array.dtype, layout={"kind": "zarr", "array": name}, where=where, vendor=vendor)


def read_zarr(path: Path, layout: dict[str, Any], plane: tuple[int, int], start: int, stop: int) -> np.ndarray:
    """Planes start…stop of a Zarr array, (stop - start, y, x)."""
    node = open_source(path)
    return read_array(node[layout["array"]] if layout["array"] else node, layout["order"], plane, start, stop)


def _image(path: Path, node: Any, dataset: str | None) -> tuple[str, list[Axis], str]:
    if hasattr(node, "shape"):
        names = _dimension_names(node)
        return "", [Axis(n, name) for n, name in zip(node.shape, names, strict=True)], "the Zarr array"
    attributes = dict(node.attrs)
    scales = (attributes.get("ome") or attributes).get("multiscales")
    if scales and dataset is None:
        return _ome(path, node, scales)
    arrays = {name: item for name, item in node.members(max_depth=4) if hasattr(item, "shape") and item.ndim >= 2}
    name = chosen(path, {name: str(arrays[name].shape) for name in sorted(arrays)}, dataset)
    return name, _coordinates(node, name, arrays[name]), "the coordinates beside the array"


def _ome(path: Path, node: Any, scales: Any) -> tuple[str, list[Axis], str]:
    if len(scales) > 1:
        raise SourceError(f"{path}: holds {len(scales)} OME images. Set source.dataset to the path of one array.")
    image = scales[0]
    level = image["datasets"][0]
    name = str(level["path"])
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise SourceError(f"{path}: its OME metadata lead out of the store ({name!r}).")
    scale = next(
        (item["scale"] for item in level.get("coordinateTransformations", []) if item.get("type") == "scale"), None
    )
    array, described = node[name], image.get("axes") or []
    axes = []
    for i, size in enumerate(array.shape):
        info = described[i] if i < len(described) and isinstance(described[i], dict) else {}
        unit = str(info.get("unit") or "")
        step = number(scale[i]) if scale is not None and unit else None
        axes.append(Axis(size, _ome_name(str(info.get("name") or "")), unit, step=step))
    return name, axes, "the OME metadata"


def _ome_name(name: str) -> str:
    return {"t": "time", "z": "z"}.get(name.lower(), name)


def _coordinates(node: Any, name: str, array: Any) -> list[Axis]:
    """Axes named after 1-D arrays beside an array, as xarray writes them."""
    folder = name.rpartition("/")[0]
    axes = []
    for size, dimension in zip(array.shape, _dimension_names(array), strict=True):
        beside = f"{folder}/{dimension}" if folder else dimension
        values, unit = None, ""
        if dimension and beside in node and node[beside].ndim == 1 and node[beside].shape[0] == size <= MAX_STORED:
            unit = str(node[beside].attrs.get("units") or "")
            values = tuple(np.asarray(node[beside][:], np.float64).tolist()) if unit else None
        axes.append(Axis(size, dimension, unit, values=values))
    return axes


def _dimension_names(array: Any) -> list[str]:
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS") or []
    return [str(names[i] or "") if i < len(names) else "" for i in range(array.ndim)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
