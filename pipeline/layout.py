"""How stores are cut and described, in numbers and plain JSON: nothing here touches the disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SMALL_CHUNK = 2**16  # pixels: chunks of several frames where frames are smaller than this
LARGE_CHUNK = 1024  # pixels along y and x


@dataclass(frozen=True)
class StackLayout:
    """How a stack is cut on disk: frames per chunk and per shard, and the chunk's edges."""

    chunk: tuple[int, ...]
    shard: tuple[int, ...]

    @property
    def shard_frames(self) -> int:
        """Frames that one shard, hence one writing task, owns."""
        return self.shard[0]


def stack_layout(shape: Sequence[int], dtype: Any, *, shard_megabytes: float) -> StackLayout:
    """Chunks of one frame (several where frames are small), shards of about ``shard_megabytes`` uncompressed."""
    frames, *middle, height, width = shape
    per_frame = math.prod(shape[1:])
    edge_y, edge_x = min(height, LARGE_CHUNK), min(width, LARGE_CHUNK)
    chunk_frames = max(1, min(frames, SMALL_CHUNK // per_frame))
    wanted = int(shard_megabytes * 2**20 / (per_frame * np.dtype(dtype).itemsize * chunk_frames))
    shard_frames = chunk_frames * max(1, min(wanted, math.ceil(frames / chunk_frames)))
    chunk = (chunk_frames, *(1 for _ in middle), edge_y, edge_x)
    shard = (shard_frames, *middle, edge_y * math.ceil(height / edge_y), edge_x * math.ceil(width / edge_x))
    return StackLayout(chunk, shard)


def ome_metadata(
    name: str, dims: Sequence[str], datasets: Sequence[tuple[str, Sequence[float], Sequence[float]]]
) -> dict[str, Any]:
    """OME-Zarr 0.5 multiscales; ``datasets`` holds (path, scale, translation) from fine to coarse."""
    kinds: dict[str, dict[str, Any]] = {
        "time": {"type": "time", "unit": "second"},
        "y": {"type": "space", "unit": "angstrom"},
        "x": {"type": "space", "unit": "angstrom"},
        "defocus": {"type": "channel"},
    }
    return {
        "version": "0.5",
        "multiscales": [
            {
                "name": name,
                "axes": [{"name": dim, **kinds[dim]} for dim in dims],
                "datasets": [
                    {
                        "path": path,
                        "coordinateTransformations": [
                            {"type": "scale", "scale": list(scale)},
                            {"type": "translation", "translation": list(translation)},
                        ],
                    }
                    for path, scale, translation in datasets
                ],
            }
        ],
    }


def pyramid_levels(height: int, width: int) -> int:
    """Levels of an image pyramid whose coarsest level fits into about 256 pixels."""
    halvings = max(0, math.ceil(math.log2(max(height, width) / 256)))
    return 1 + min(halvings, int(math.log2(min(height, width))))


def plain_json(value: Any) -> Any:
    """Plain JSON: NumPy scalars unpacked, what is not a number in JSON written as text."""

    def plain(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {str(k): plain(v) for k, v in item.items()}
        if isinstance(item, list | tuple):
            return [plain(v) for v in item]
        if isinstance(item, np.generic):
            return plain(item.item())
        if isinstance(item, float) and not math.isfinite(item):
            return str(item)
        return item if isinstance(item, str | int | float | bool | None) else str(item)

    return plain(value)
