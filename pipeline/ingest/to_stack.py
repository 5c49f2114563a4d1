"""From described files to a stack: one task reads the frames of one shard, cuts and bins them, and writes the shard."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client

from pipeline import plan, store
from pipeline.graph import stream
from pipeline.ingest.describe import Description
from pipeline.ingest.reading import read_frames, read_frames_flagged
from pipeline.layout import StackLayout, stack_layout
from pipeline.parts import part_path, read_part, replace_atomically, write_part
from schemas.errors import SourceError
from schemas.settings import Settings, Source, Stacks

DESCRIPTION = "description.json"
PIECE_BYTES = 2**26  # of raw frames that a task holds at a time


@dataclass(frozen=True)
class Cut:
    """The part of a movie that is used: frames [first, end), region [y0, y1, x0, x1] [px], n x n binning."""

    frames: tuple[int, int]
    region: tuple[int, int, int, int]
    binning: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(time, y, x) after cutting and binning."""
        y0, y1, x0, x1 = self.region
        return (self.frames[1] - self.frames[0], (y1 - y0) // self.binning, (x1 - x0) // self.binning)

    def apply(self, frames: np.ndarray) -> np.ndarray:
        """Cut and bin frames (…, y, x); binned counts are sums, wide enough not to overflow."""
        y0, y1, x0, x1 = self.region
        out = frames[..., y0:y1, x0:x1]
        n = self.binning
        if n == 1:
            return np.ascontiguousarray(out)
        height, width = (y1 - y0) // n, (x1 - x0) // n
        out = out[..., : height * n, : width * n].reshape(*out.shape[:-2], height, n, width, n)
        return np.asarray(out.sum(axis=(-3, -1), dtype=binned_dtype(frames.dtype, n)))


def binned_dtype(dtype: Any, binning: int) -> np.dtype[Any]:
    """Type that holds the sum of binning x binning readings."""
    dtype = np.dtype(dtype)
    if binning == 1:
        return dtype
    if dtype.kind == "f":
        return np.dtype("float32") if dtype.itemsize <= 4 else dtype
    wide = {1: "4", 2: "4", 4: "8", 8: "8"}[dtype.itemsize]
    return np.dtype(("u" if dtype.kind in "ub" else "i") + wide)


def plan_cut(description: Description, source: Source) -> Cut:
    """The cut that the settings ask for; ``SourceError`` if it does not lie inside the movie."""
    count, height, width = description.shape[0], *description.shape[-2:]
    first, end = source.frames or (0, count)
    if first >= count:
        raise SourceError(
            f"source.frames is [{first}, {end}], but {description.name} has {count} frames; expected first < {count}"
        )
    y0, y1, x0, x1 = source.region or (0, height, 0, width)
    if y1 > height or x1 > width or min(y1 - y0, x1 - x0) < source.binning:
        raise SourceError(
            f"source.region is {[y0, y1, x0, x1]} with binning {source.binning}, but the frames of {description.name} "
            f"are {height} x {width}; expected a region inside, no smaller than one binned pixel"
        )
    return Cut((first, min(end, count)), (y0, y1, x0, x1), source.binning)


@dataclass(frozen=True)
class ShardTask:
    """One shard of a stack: where the description lies, what to cut, and frames [start, stop) of the stack."""

    folder: str
    stack: str
    cut: Cut
    start: int
    stop: int
    quarantine: bool

    @property
    def part(self) -> Path:
        """File whose presence says that the shard is written."""
        return part_path(Path(self.folder), "shard", self.start, self.stop, "")


@functools.lru_cache(maxsize=4)
def _load_description(path: str) -> Description:
    return Description.from_dict(json.loads(Path(path).read_text()))


def ingest_shard(task: ShardTask) -> int:
    """Read, cut and write one shard, then a part file with its frames' digests and which of them are good."""
    description = _load_description(f"{task.folder}/{DESCRIPTION}")
    shape = (task.stop - task.start, *description.shape[1:-2], *task.cut.shape[1:])
    frames = np.empty(shape, dtype=binned_dtype(description.dtype, task.cut.binning))
    good = np.zeros(shape[0], dtype=bool)
    # A small region or strong binning puts very many frames of the detector into one shard: read them in pieces.
    size = max(1, PIECE_BYTES // (math.prod(description.shape[1:]) * np.dtype(description.dtype).itemsize))
    for start in range(0, shape[0], size):
        rows = slice(start, min(start + size, shape[0]))
        begin, end = (task.cut.frames[0] + task.start + row for row in (rows.start, rows.stop))
        if task.quarantine:
            raw, good[rows] = read_frames_flagged(description, begin, end)
        else:
            raw, good[rows] = read_frames(description, begin, end), description.good_frames[begin:end]
        frames[rows] = task.cut.apply(raw)
    store.write_frames(Path(task.stack), task.start, frames)
    digests = b"".join(hashlib.blake2b(np.ascontiguousarray(f).data, digest_size=16).digest() for f in frames)
    write_part(task.part, {"digests": np.frombuffer(digests, dtype=np.uint8), "good": good}, {})
    return task.stop - task.start


def source_key(description: Description, cut: Cut) -> str:
    """What a stack is made of, as far as it is known without reading pixels: files, sizes, calibration, cut."""
    files = [[f["path"], f["size"], f["mtime_ns"]] for f in description.files]
    facts = [files, description.sampling, list(description.time[:2]), description.defocus, description.dataset]
    facts += [description.energy, description.counts_per_electron, list(description.good_frames[:0])]
    return hashlib.sha256(json.dumps([facts, cut.frames, cut.region, cut.binning], default=str).encode()).hexdigest()


def is_current(path: Path, key: str) -> bool:
    """Whether a complete stack made of exactly this already lies under ``path``."""
    if store.kind_of(path) != "stack":
        return False
    state = store.attributes_of(path)
    return state["state"] == "complete" and state.get("source_key") == key


def attributes(description: Description, cut: Cut, key: str) -> dict[str, Any]:
    """What the stack says of its origin; paths as they were given, the vendor's metadata as read."""
    times = np.asarray(description.time[cut.frames[0] : cut.frames[1]])
    return {
        "movie": description.name,
        "sampling": description.sampling * cut.binning,
        "frame_interval": float(times[1] - times[0]) if len(times) > 1 else None,
        "energy": description.energy,
        "counts_per_electron": description.counts_per_electron,
        "detector": description.detector,
        "dose": description.dose,
        "source_key": key,
        "source": {
            "reader": description.reader,
            "dataset": description.dataset,
            "shape": list(description.shape),
            "files": [{k: f[k] for k in ("path", "size", "mtime_ns", "frames")} for f in description.files],
            "vendor": description.vendor,
            "notes": list(description.notes),
            "cut": {"frames": cut.frames, "region": cut.region, "binning": cut.binning},
        },
    }


def calibration_of(settings: Settings, stack: store.Stack) -> dict[str, Any]:
    """What the results of a stack depend on besides its pixels."""
    return plan.calibration(
        settings, sampling=stack.sampling, time=stack.time.tolist(), energy=stack.attributes.get("energy"),
        counts_per_electron=stack.attributes.get("counts_per_electron"),
        defocus=None if stack.defocus is None else stack.defocus.tolist(),
    )  # fmt: skip


def open_ingested(path: Path, source: Source) -> store.Stack:
    """A stack that is the source itself. What was settled when it was ingested is not overridden in silence."""
    stack = store.open_stack(path)
    is_now = {"sampling": stack.sampling, "energy": stack.attributes.get("energy"), "binning": 1}
    is_now |= {"frame_interval": stack.attributes.get("frame_interval")}
    asked = {name: getattr(source, name) for name in (*is_now, "frames", "region", "defocus")}
    wrong = {name: value for name, value in asked.items() if value not in (None, is_now.get(name))}
    if wrong:
        told = ", ".join(f"source.{name} = {value}" for name, value in wrong.items())
        raise SourceError(
            f"{path} is a stack already, so {told} would have no effect (the stack has "
            f"{', '.join(f'{name} {is_now.get(name)}' for name in wrong)}); run the original files with these settings"
        )
    return stack


def write_stack(
    description: Description,
    path: Path,
    *,
    source: Source,
    stacks: Stacks,
    client: Client | None,
    stop: threading.Event,
    progress: Callable[[int], None] = lambda frames: None,
) -> int:
    """Write ``path`` from a described movie, shard by shard in parallel; returns the number of damaged frames.

    Nothing is read if a complete stack of the same files, calibration and cut is already there. Memory is bounded by
    the shards in flight, whatever the movie's length.
    """
    cut = plan_cut(description, source)
    key = source_key(description, cut)
    if is_current(path, key):
        damaged = int((~store.open_stack(path).frame_ok).sum())
        if damaged and source.on_error == "stop":
            raise SourceError(
                f"{path} was ingested with {damaged} damaged frame(s) of {description.paths[0]}, and source.on_error "
                "is stop; set source.on_error to quarantine to use the good ones, or mend the file"
            )
        return damaged
    shape = (cut.shape[0], *description.shape[1:-2], *cut.shape[1:])
    dtype = binned_dtype(description.dtype, cut.binning)
    layout = stack_layout(shape, dtype, shard_megabytes=stacks.shard_megabytes)
    sampling = description.sampling * cut.binning
    time = np.asarray(description.time[cut.frames[0] : cut.frames[1]], dtype=float)
    # The centre of the first binned pixel, on the detector's own axes.
    origin = [(edge + (cut.binning - 1) / 2) * description.sampling for edge in (cut.region[0], cut.region[2])]
    folder = path.with_suffix(".ingest")
    if not _resumes(folder, path, key, layout):
        shutil.rmtree(folder, ignore_errors=True)
        store.create_stack(
            path, shape=shape, dtype=dtype, time=time - time[0], sampling=sampling, layout=layout,
            attributes={**attributes(description, cut, key), "shard_frames": layout.shard_frames},
            origin=(origin[0], origin[1]), defocus=description.defocus,
        )  # fmt: skip
        replace_atomically(folder / DESCRIPTION, json.dumps(description.to_dict(), default=str).encode())
    quarantine = source.on_error == "quarantine"
    tasks = [
        ShardTask(str(folder), str(path), cut, start, min(start + layout.shard_frames, shape[0]), quarantine)
        for start in range(0, shape[0], layout.shard_frames)
    ]
    missing = [task for task in tasks if not task.part.exists()]
    progress(shape[0] - sum(task.stop - task.start for task in missing))
    for _, frames in stream(client, ingest_shard, missing, label="ingest", stop=stop):
        progress(frames)
    content, good = _conclude(tasks, shape, dtype)
    if not good.any():
        raise SourceError(f"{description.paths[0]}: no frame could be read; copy the file again")
    store.finish_stack(path, frame_ok=good, attributes={"content_hash": content})
    shutil.rmtree(folder)
    return int((~good).sum())


def _resumes(folder: Path, path: Path, key: str, layout: StackLayout) -> bool:
    """Whether an ingest of the same files, calibration and cut, into the same shards, was interrupted here."""
    if store.kind_of(path) != "stack" or not (folder / DESCRIPTION).exists():
        return False
    state = store.attributes_of(path)
    same = state.get("source_key") == key and state.get("shard_frames") == layout.shard_frames
    return bool(state["state"] == "running" and same)


def _conclude(tasks: Sequence[ShardTask], shape: Sequence[int], dtype: Any) -> tuple[str, np.ndarray]:
    """Hash of all pixels, whatever the shards were, and which frames are good."""
    digest = hashlib.sha256(str((tuple(shape), str(dtype))).encode())
    good = []
    for task in tasks:
        arrays, _ = read_part(task.part)
        digest.update(arrays["digests"].tobytes())
        good.append(arrays["good"])
    readable = np.concatenate(good)
    if not readable.all():
        digest.update(np.packbits(readable).tobytes())
    return digest.hexdigest(), readable
