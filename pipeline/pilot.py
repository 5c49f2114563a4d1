"""A pilot: the first frames of a movie go through the whole story on the real workers, and what that took is noted."""

from __future__ import annotations

import math
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from distributed import Client

from pipeline import plan, store
from pipeline.collect import TABLES
from pipeline.job import Engine, PlannedMovie, Progress
from pipeline.layout import stack_layout
from pipeline.parts import read_meta, read_part
from pipeline.preflight import MoviePlan
from pipeline.story import run_movie
from schemas.errors import SourceError

WAVES = 3  # blocks for each worker: the first warms up
TRAINING_STEPS = 30
BLOCK_STEPS = ("survey", "process")
STEPS = ("ingest", *plan.STEPS)


@dataclass(frozen=True)
class StepTime:
    """What a step took: its blocks, seconds of one on one worker, and seconds until the workers had warmed up."""

    blocks: int
    seconds: float
    start: float = 0.0


@dataclass(frozen=True)
class Disk:
    """What was written: bytes per frame of the stack and of the results, and of what does not grow; files likewise."""

    stack: float = 0.0
    results: float = 0.0
    fixed: float = 0.0
    block_files: float = 0.0
    fixed_files: int = 0


@dataclass(frozen=True)
class Measured:
    """What a pilot found. memory: largest peak of a worker; driver: peak of this process; device: of a GPU [bytes].

    training: seconds of one training step; part: seconds to read what a block left for collect; plan: of its frames.
    """

    plan: MoviePlan
    workers: int
    steps: Mapping[str, StepTime]
    training: float
    kept: str
    part: float
    disk: Disk
    memory: float
    driver: float
    device: float | None


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A temporary folder on the file system of the output, which the workers see too; removed in any case."""
    near = next(folder for folder in output.absolute().parents if folder.exists())
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-pilot-", dir=near, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@dataclass
class Watch:
    """When each step went on, as the driver saw it; what it is told is passed on."""

    progress: Progress
    ends: dict[str, list[float]] = field(default_factory=dict)

    def begin(self, movie: str, step: str, frames: int) -> None:
        """A step begins."""
        self.ends[step] = []
        self.progress.begin(movie, step, frames)

    def advance(self, movie: str, step: str, frames: int) -> None:
        """A block, a shard or a whole step was finished."""
        if frames:
            self.ends[step].append(time.monotonic())
        self.progress.advance(movie, step, frames)


def measure(
    wanted: MoviePlan, folder: Path, *, client: Client | None, device: str, progress: Progress, stop: threading.Event
) -> Measured:
    """Run the story on the first frames of a movie, below ``folder``, and look at what it took."""
    workers = len(client.nthreads()) if client is not None else 1
    tried = _few(wanted, folder, frames=WAVES * workers * wanted.size)
    if client is not None:
        client.run(peaks, device)  # what a worker imports, once in its life, is no part of any step
    watch, begin = Watch(progress), time.monotonic()
    outcome = run_movie(Engine(folder, client, device, stop, watch), tried.movie)
    if outcome.status != "complete":
        raise SourceError(f"the pilot cannot process {wanted.movie.name}: {outcome.reason}")
    watch.ends["collect"].append(time.monotonic())
    parts = folder / "parts" / tried.movie.name
    adapted = next((read_meta(path) or {} for path in parts.glob("adapt-*.npz")), {}).get("training", {})
    here = peaks(device)
    peak = [here] if client is None else list(client.run(peaks, device).values())
    return Measured(
        tried, workers, step_times(begin, watch.ends, workers), training=float(adapted.get("step_seconds", 0.0)),
        kept=str(adapted.get("kept", "")), part=_reading(parts), disk=_disk(folder, tried),
        memory=max(memory for memory, _ in peak), driver=here[0],
        device=max(used for _, used in peak) if device.startswith("cuda") else None,
    )  # fmt: skip


def _few(wanted: MoviePlan, folder: Path, *, frames: int) -> MoviePlan:
    """The plan of a movie's first frames, trained in few steps: what scales is scaled afterwards."""
    movie, settings = wanted.movie, wanted.movie.settings
    count = min(frames, wanted.shape[0])
    denoise = {"steps": min(TRAINING_STEPS, settings.denoise.steps)}
    if settings.denoise.network == "blindspot" and settings.denoise.weights == "scratch":
        denoise["weights"] = "adapt"  # type: ignore[assignment]  # few steps from scratch would lose to a filter
    source = settings.source
    if movie.files.reader == "stack":
        path = _cut_stack(movie.files.paths[0], folder / "sources" / f"{movie.name}.zarr", count, wanted)
        movie = replace(movie, files=replace(movie.files, paths=(path,)))
    else:
        first = (source.frames or (0, 0))[0]
        source = source.model_copy(update={"frames": (first, first + count)})
    few = settings.model_copy(
        update={
            "source": source,
            "stacks": settings.stacks.model_copy(update={"keep": True}),
            "blocks": settings.blocks.model_copy(update={"frames": wanted.size}),
            "denoise": settings.denoise.model_copy(update=denoise),
        }
    )
    return replace(wanted, movie=PlannedMovie(movie.name, movie.files, few), shape=(count, *wanted.shape[1:]))


def _cut_stack(path: Path, target: Path, frames: int, wanted: MoviePlan) -> Path:
    """The first frames of a stack, as a stack: one cannot be told to use a part of itself."""
    stack = store.open_stack(path)
    shape = (frames, *stack.counts.shape[1:])
    dtype = stack.counts.dtype
    layout = stack_layout(shape, dtype, shard_megabytes=wanted.movie.settings.stacks.shard_megabytes)
    target.parent.mkdir(parents=True)
    store.create_stack(
        target, shape=shape, dtype=dtype, time=stack.time[:frames], sampling=stack.sampling, layout=layout,
        attributes=stack.attributes, origin=stack.origin,
        defocus=None if stack.defocus is None else stack.defocus.tolist(),
    )  # fmt: skip
    for start, end in plan.blocks(frames, layout.shard_frames):
        counts = stack.read(start, end, plane=slice(None))
        store.write_frames(target, start, counts.reshape(end - start, *shape[1:]))
    store.finish_stack(target, frame_ok=stack.frame_ok[:frames], attributes={})
    return target


def step_times(begin: float, ends: Mapping[str, Sequence[float]], workers: int) -> dict[str, StepTime]:
    """From when the pilot began and when parts of its steps ended [s]; a step begins where the one before it ended."""
    found = {}
    for step in (step for step in STEPS if ends.get(step)):
        last, count = ends[step][-1], len(ends[step])
        if step in BLOCK_STEPS:
            found[step] = _pace(begin, ends[step], workers)
        elif step == "ingest":  # its shards were written side by side
            found[step] = StepTime(count, (last - begin) * min(workers, count) / count)
        else:
            found[step] = StepTime(1, last - begin)
        begin = last
    return found


def _pace(begin: float, ends: Sequence[float], workers: int) -> StepTime:
    """Waves of blocks, one for each worker: all but the first show the pace, and that how long warming up took."""
    later = math.ceil((len(ends) - workers) / workers)
    if later < 1:
        return StepTime(len(ends), ends[-1] - begin)
    first = sorted(ends)[workers - 1]
    seconds = (ends[-1] - first) / later
    return StepTime(len(ends), seconds, max(0.0, first - begin - seconds))


def _reading(parts: Path) -> float:
    """Seconds to read one block's part, from this very file system."""
    files, begin = list(parts.glob("process-*.npz")), time.perf_counter()
    for file in files:
        read_part(file)
    return (time.perf_counter() - begin) / max(1, len(files))


def _disk(folder: Path, tried: MoviePlan) -> Disk:
    """Which bytes and files grow with the frames, which with the blocks, and which not at all."""
    frames, count = tried.shape[0], math.ceil(tried.shape[0] / tried.size)
    stack = results = fixed = 0
    growing = still = 0
    for file in (path for path in folder.rglob("*") if path.is_file()):
        place, size = file.relative_to(folder).parts, file.stat().st_size
        metadata = file.name == "zarr.json"
        per_block = place[0] == "parts" and file.name.startswith(BLOCK_STEPS)
        per_block |= ("images" in place[:2] and not metadata) or place[0] == "ledger"
        per_frame = per_block or (place[1:2] and place[1] in TABLES and not metadata)
        if place[0] in ("sources", "cluster"):
            continue
        if place[0] == "stacks" and not metadata:
            stack += size
            continue
        results, fixed = (results + size, fixed) if per_frame else (results, fixed + size)
        growing, still = (growing + 1, still) if per_block else (growing, still + 1)
    return Disk(stack / frames, results / frames, fixed, growing / count, still)


def peaks(device: str) -> tuple[float, float]:
    """Peak memory of the process that calls it, and what tensors took at most of its GPU [bytes]."""
    used = float(torch.cuda.max_memory_allocated()) if device.startswith("cuda") else 0.0
    try:
        text = Path("/proc/self/status").read_text()
        return float(text.partition("VmHWM:")[2].split()[0]) * 1024, used
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak) * (1 if sys.platform == "darwin" else 1024), used
