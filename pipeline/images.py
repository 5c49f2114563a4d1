"""Pixels of a run: ``/images``, OME-Zarr pyramids whose shards are blocks, and ``/examples`` for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np

from pipeline.layout import LARGE_CHUNK, ome_metadata, pyramid_levels
from pipeline.store import Array, Group, create_array, open_group, put, remove, write_region
from schemas.conventions import ANGSTROM, DIMENSIONLESS, ELECTRON, SECOND
from schemas.variables import Variable

_AXES = ("time", "y", "x")
KEPT = {
    "denoised": Variable("denoised", _AXES, "float32", ELECTRON, "denoised frame"),
    "uncertainty": Variable(
        "uncertainty",
        _AXES,
        "float32",
        ELECTRON,
        "standard deviation that the denoiser expects of the error of denoised, before the low-pass; NaN: not known",
    ),
    "probability": Variable("probability", _AXES, "float32", DIMENSIONLESS, "probability of a column"),
    "labels": Variable("labels", _AXES, "int32", DIMENSIONLESS, "1 + row among the particles of the frame; 0: none"),
}
"""What ``images.save`` may name."""


def remove_images(path: Path) -> None:
    """Remove ``/images`` of a run, if there are any."""
    remove(path / "images")


def create_image(
    path: Path,
    name: str,
    *,
    time: np.ndarray,
    shape: tuple[int, int, int],
    sampling: float,
    origin: tuple[float, float],
    block_frames: int,
) -> None:
    """Create ``/images/<name>``: an OME-Zarr 0.5 pyramid of sibling groups s0, s1, … whose shards are blocks.

    ``name`` is one of ``KEPT``; ``shape`` is (time, y, x); ``sampling`` [Å/px]; ``origin`` (y, x) [Å] of the first
    pixel's centre.
    """
    images = open_group(path, "r+").require_group("images")
    if name in images:
        del images[name]
    parent = images.create_group(name)
    frames, height, width = shape
    interval = float(time[1] - time[0]) if len(time) > 1 else 1.0
    datasets = []
    for level in range(pyramid_levels(height, width)):
        scale, size = sampling * 2**level, (height >> level, width >> level)
        start = tuple(o + (2**level - 1) * sampling / 2 for o in origin)
        group = parent.create_group(f"s{level}")
        edges = tuple(min(s, LARGE_CHUNK) for s in size)
        shard = tuple(e * math.ceil(s / e) for e, s in zip(edges, size, strict=True))
        create_array(group, KEPT[name], (frames, *size), chunks=(1, *edges), shards=(block_frames, *shard))
        put(group, Variable("time", ("time",), "float64", SECOND, "time stamp of the frame since the first"), time)
        for axis, count, first in zip(("y", "x"), size, start, strict=True):
            positions = first + scale * np.arange(count, dtype=float)
            put(group, Variable(axis, (axis,), "float64", ANGSTROM, f"{axis} of the pixel centre"), positions)
        datasets.append((f"s{level}/{name}", (interval, scale, scale), (0.0, *start)))
    parent.attrs["ome"] = ome_metadata(name, _AXES, datasets)


def write_image(path: Path, name: str, start: int, frames: np.ndarray) -> None:
    """Write a block of images (time, y, x) and its coarser levels: means of 2 x 2 pixels, of labels every other."""
    parent = cast(Group, open_group(path, "r+")[f"images/{name}"])
    for level in range(len(list(parent.group_keys()))):
        array = cast(Array, parent[f"s{level}/{name}"])
        write_region(array, path / "images" / name / f"s{level}" / name, start, frames)
        frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
        if frames.dtype.kind == "i":
            frames = frames[:, ::2, ::2]
            continue
        frames = frames.reshape(len(frames), frames.shape[1] // 2, 2, frames.shape[2] // 2, 2).mean((2, 4))


def write_examples(
    path: Path, frames: np.ndarray, images: Mapping[str, np.ndarray], *, sampling: float, origin: tuple[float, float]
) -> None:
    """Write ``/examples``: crops (example, y, x) of some frames for the report; ``origin`` [Å] of the first pixel."""
    root = open_group(path, "r+")
    if "examples" in root:
        del root["examples"]
    group = root.create_group(
        "examples", attributes={"sampling": sampling, "origin_y": origin[0], "origin_x": origin[1]}
    )
    put(group, Variable("frame", ("example",), "int32", DIMENSIONLESS, "index of the frame"), frames.astype("int32"))
    for name, values in images.items():
        kept = KEPT.get(name, KEPT["denoised"])
        meaning = kept.meaning if name in KEPT else f"{name} frame"
        variable = Variable(name, ("example", "y_example", "x_example"), kept.dtype, kept.units, meaning)
        put(group, variable, values.astype(kept.dtype))
