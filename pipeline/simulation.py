"""The verb `simulate`: a movie with a known answer written straight into a stack, on the same workers as a run.

One task computes and writes the frames of one shard with their clean images and masks, and a part file with their
columns and sites. What a frame looks like depends on the specification, the seed and its index alone, so that neither
the number of workers nor the cut into shards changes a bit.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from distributed import Client

from pipeline import graph, store, truth
from pipeline.job import Progress, Silent
from pipeline.layout import StackLayout, stack_layout
from pipeline.parts import part_path, read_meta, read_part, write_part
from pipeline.simulate.camera import polarity_of
from pipeline.simulate.movie import Answer, MovieSpec
from pipeline.simulate.truth import events_of

VERSION = 1  # of what the simulator draws; another one makes finished parts stale
BLOCK_BYTES = 2**26  # of counts, clean images and masks that a task holds at a time
MOST_FRAMES = 32  # of a shard, so that several workers have something to do and little is lost when one dies
FRAME_BYTES_PER_PIXEL = 6  # clean image and mask, besides the counts


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Frames [start, stop) of a movie: what to simulate, at which defoci (none: to be found), and where it goes."""

    spec: MovieSpec
    seed: int
    stack: str
    parts: str
    key: str
    planes: tuple[float, ...] = ()
    start: int = 0
    stop: int = 0

    @property
    def part(self) -> Path:
        """File whose presence says that the frames are written."""
        return part_path(Path(self.parts), "frames", self.start, self.stop, self.key)


class Written(NamedTuple):
    """What was written: frames, those of them that were computed now, columns in all frames."""

    frames: int
    computed: int
    columns: int


def simulate_stack(
    spec: MovieSpec, path: Path, *, seed: int, client: Client | None = None, block: int | None = None,
    progress: Progress | None = None, stop: threading.Event | None = None,
) -> Written:  # fmt: skip
    """Write a stack and its truth; a complete one of the same specification and seed is left as it is.

    ``block``: frames of a shard, hence of a task; default: what fits into BLOCK_BYTES. An interrupted simulation goes
    on where it was when the same is asked for again. ``client`` None computes everything here.
    """
    stop, progress = stop or threading.Event(), progress or Silent()
    key = fingerprint(spec, seed)
    if is_current(path, key):
        return Written(spec.frames, 0, int(truth.read_truth(path, names=())["rows"]["column"]))
    parts = path.with_suffix(".simulation")
    whole = Simulation(spec, seed, str(path), str(parts), key)
    progress.begin(path.stem, "simulate", spec.frames)
    planes = graph.call(client, find_planes, whole, label="simulate-planes", stop=stop)
    layout = layout_of(spec, block)
    if not _resumes(path, key, layout):
        shutil.rmtree(parts, ignore_errors=True)
        _create(whole, planes, layout)
    whole = dataclasses.replace(whole, planes=planes, stop=layout.shard_frames)
    missing = [task for task in blocks(whole) if read_meta(task.part) is None]
    todo = sum(task.stop - task.start for task in missing)
    progress.advance(path.stem, "simulate", spec.frames - todo)
    for task, _ in graph.stream(client, write_block, missing, label="simulate", stop=stop):
        progress.advance(path.stem, "simulate", task.stop - task.start)
    columns = graph.call(client, conclude, whole, label="simulate-truth", stop=stop)
    shutil.rmtree(parts)
    return Written(spec.frames, todo, columns)


def blocks(whole: Simulation) -> Iterator[Simulation]:
    """The tasks of a movie of which ``whole`` names the first block."""
    frames, size = whole.spec.frames, whole.stop
    for start in range(0, frames, size):
        yield dataclasses.replace(whole, start=start, stop=min(start + size, frames))


def fingerprint(spec: MovieSpec, seed: int) -> str:
    """Of all that a movie's pixels depend on."""
    return hashlib.sha256(json.dumps([VERSION, seed, dataclasses.asdict(spec)]).encode()).hexdigest()


def is_current(path: Path, key: str) -> bool:
    """Whether a complete stack of exactly this simulation already lies under ``path``."""
    if store.kind_of(path) != "stack":
        return False
    state = store.attributes_of(path)
    return state["state"] == "complete" and state.get("source_key") == key


def layout_of(spec: MovieSpec, block: int | None) -> StackLayout:
    """How the stack is cut: shards of ``block`` frames, or of as many as a task may hold."""
    shape = _shape(spec, spec.defoci or ())
    each = math.prod(shape[1:]) * (2 + FRAME_BYTES_PER_PIXEL)
    size = block if block is not None else max(1, min(BLOCK_BYTES // each, MOST_FRAMES))
    layout = stack_layout(shape, np.uint16, shard_megabytes=1.0)
    size = max(1, min(size, spec.frames))
    # One frame to a chunk: shards of any number of frames are whole chunks.
    return StackLayout((1, *layout.chunk[1:]), (size, *layout.shard[1:]))


def _shape(spec: MovieSpec, planes: tuple[float, ...]) -> tuple[int, ...]:
    return (spec.frames, *(() if spec.defoci is None else (len(planes),)), *spec.shape)


def _resumes(path: Path, key: str, layout: StackLayout) -> bool:
    if store.kind_of(path) != "stack" or not truth.exists(path):
        return False
    state = store.attributes_of(path)
    same = state.get("source_key") == key and state.get("shard_frames") == layout.shard_frames
    return bool(state["state"] == "running" and same)


def _create(whole: Simulation, planes: tuple[float, ...], layout: StackLayout) -> None:
    """The stack and its truth, all but pixels and tables."""
    spec, path = whole.spec, Path(whole.stack)
    shape = _shape(spec, planes)
    fields = dataclasses.asdict(spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    store.create_stack(
        path, shape=shape, dtype=np.uint16, time=np.arange(spec.frames) * spec.frame_interval, sampling=spec.sampling,
        layout=layout, defocus=planes if spec.defoci is not None else None,
        attributes={
            "movie": path.stem, "sampling": spec.sampling, "energy": spec.energy, "dose": spec.dose,
            "frame_interval": spec.frame_interval if spec.frames > 1 else None,
            "counts_per_electron": spec.counts_per_electron, "detector": "simulated",
            "source_key": whole.key, "shard_frames": layout.shard_frames,
            "source": {"reader": "simulate", "files": [], "vendor": {"specification": fields, "seed": whole.seed}},
        },
    )  # fmt: skip
    facts = {
        "sampling": spec.sampling, "shape": list(spec.shape), "electrons": spec.dose * spec.sampling**2,
        "readout": spec.readout / spec.counts_per_electron, "defocus": list(planes), "seed": whole.seed,
        "specification": fields,
    }  # fmt: skip
    truth.create_truth(path, shape=shape, layout=layout, attributes=facts)


# ------------------------------------------------------------------------------------------------------------- tasks


@functools.lru_cache(maxsize=1)
def _answer(spec: MovieSpec, seed: int, planes: tuple[float, ...]) -> Answer:
    """The scene and its camera, kept from one block of a movie to the next; what they keep changes no result."""
    return Answer(spec, seed, planes or None)


def find_planes(whole: Simulation) -> tuple[float, ...]:
    """The defoci at which every frame is imaged."""
    return _answer(whole.spec, whole.seed, ()).planes


def write_block(task: Simulation) -> int:
    """Compute and write one shard of frames, then a part file with their columns, sites and digests."""
    answer = _answer(task.spec, task.seed, task.planes)
    frames = [answer.frame(index) for index in range(task.start, task.stop)]
    path, counts = Path(task.stack), np.stack([frame.counts for frame in frames])
    store.write_frames(path, task.start, counts)
    clean, masks = (np.stack([getattr(frame, name) for frame in frames]) for name in ("clean", "mask"))
    truth.write_frames(path, task.start, clean=clean, masks=masks)
    digests = b"".join(hashlib.blake2b(np.ascontiguousarray(one).data, digest_size=16).digest() for one in counts)
    tables = {
        f"{table}.{name}": np.concatenate([getattr(frame, f"{table}s")[name] for frame in frames])
        for table in ("column", "site")
        for name in getattr(frames[0], f"{table}s").dtype.names
    }
    for table in ("column", "site"):
        lengths = [len(getattr(frame, f"{table}s")) for frame in frames]
        tables[f"{table}.frame"] = np.repeat(np.arange(task.start, task.stop), lengths)
    tables["plane_shifts"] = np.stack([frame.plane_shifts for frame in frames])
    tables["digests"] = np.frombuffer(digests, dtype=np.uint8)
    meta: dict[str, Any] = {"rows": {table: len(tables[f"{table}.frame"]) for table in ("column", "site")}}
    if task.start == 0:
        plane = clean[0] if task.spec.defoci is None else clean[0, 0]
        meta["polarity"], meta["contrast_share"] = polarity_of(plane, frames[0].columns, task.spec)
    write_part(task.part, tables, meta)
    return task.stop - task.start


NAMES = {  # of the arrays of a table, and what the simulator calls them
    "column": {
        f"column_{name}": name for name in ("frame", "y", "x", "atoms", "visible", "species", "particle", "site")
    }
    | {"column_id": "column"},
    "site": {f"site_{name}": name for name in ("frame", "y", "x", "species")} | {"site_id": "site"},
}


def conclude(whole: Simulation) -> int:
    """Gather the part files into the truth's tables, add what is known of the whole movie, declare the stack complete.

    Returns the number of columns in all frames.
    """
    spec, path = whole.spec, Path(whole.stack)
    answer = _answer(spec, whole.seed, whole.planes)
    metas = [read_meta(task.part) or {} for task in blocks(whole)]
    rows = {table: sum(meta["rows"][table] for meta in metas) for table in NAMES}
    for table in NAMES:
        truth.write_table(path, table, rows[table], _pieces(whole, table))
    events, particles = events_of(answer.scene, answer.camera.origin), answer.scene.crystal.particles
    truth.write_table(path, "event", len(events), [{f"event_{n}": events[n] for n in events.dtype.names or ()}])
    known = ("y", "x", "radius", "element", "shape", "zone", "tilt")
    truth.write_table(path, "particle", len(particles), [{f"particle_{name}": particles[name] for name in known}])
    truth.write_whole(path, _whole(answer, whole))
    first = {name: metas[0][name] for name in ("polarity", "contrast_share")}
    truth.update_attributes(path, {**first, "rows": rows})
    digest = hashlib.sha256(str((_shape(spec, whole.planes), "uint16")).encode())
    for task in blocks(whole):
        digest.update(read_part(task.part)[0]["digests"].tobytes())
    store.finish_stack(path, frame_ok=np.ones(spec.frames, bool), attributes={"content_hash": digest.hexdigest()})
    return rows["column"]


def _pieces(whole: Simulation, table: str) -> Iterator[Mapping[str, np.ndarray]]:
    for task in blocks(whole):
        arrays, _ = read_part(task.part)
        yield {name: arrays[f"{table}.{source}"] for name, source in NAMES[table].items()}


def _whole(answer: Answer, whole: Simulation) -> dict[str, np.ndarray]:
    """Arrays that the movie has one of."""
    spec, recording = answer.scene.spec, answer.recording
    found = {"drift": answer.scene.drift / spec.sampling, "angle": answer.scene.angle}
    found |= {name: one for name in ("gain", "hot") if (one := getattr(recording, name)) is not None}
    if spec.defoci is not None:
        found["plane_shifts"] = np.concatenate([read_part(task.part)[0]["plane_shifts"] for task in blocks(whole)])
    return found
