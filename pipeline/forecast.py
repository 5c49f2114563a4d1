"""From what a pilot took to what the whole job will take, and when it will be done.

The model is rough, and this is all of it. All movies are taken to behave, per pixel, like the one that the pilot tried.
Blocks cost time on one worker and spread evenly over all of them. What is done once per movie spreads over as many
workers as there are movies: the detector's share grows with the pixels of its sample, the drift path with the number of
frames, contrast with the size of a frame, and adaptation with its steps, of which a pilot takes a few and the job at
most all: it ends earlier where more do not help, so the forecast is late rather than early. Collect costs what it cost
in the pilot, and the reading of the blocks that the pilot had not. Ingest speeds up with the workers until there is one
for each shard. Waiting in a queue, workers that die, and a file system that is busier with more workers are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from rich.console import Console
from rich.table import Table

from pipeline.blocks import sample_indices
from pipeline.collect import TABLES
from pipeline.networks.risk import CHECK_FRAMES
from pipeline.pilot import BLOCK_STEPS, STEPS, TRAINING_STEPS, Measured
from pipeline.preflight import MoviePlan
from pipeline.results.status import duration


@dataclass(frozen=True)
class Forecast:
    """What is left of a job: per step blocks and seconds, seconds in all, bytes, files, peak memory of a worker."""

    steps: Mapping[str, tuple[int, float]]
    seconds: float
    bytes: float
    files: int
    memory: float


def left_of(plans: Sequence[MoviePlan]) -> list[MoviePlan]:
    """The movies of which something is left to do, the one with the most pixels to process first."""
    left = [movie for movie in plans if not movie.done]
    return sorted(left, key=lambda movie: movie.todo("process") * math.prod(movie.shape[1:]), reverse=True)


def forecast(left: Sequence[MoviePlan], found: Measured, workers: int) -> Forecast:
    """What is left to do takes, on so many workers, by the model at the head of this module."""
    movies = min(len(left), workers)
    steps: dict[str, tuple[int, float]] = {}
    for step in (step for step in STEPS if step in found.steps):
        todo = [movie for movie in left if movie.todo(step)]
        share = workers if step in BLOCK_STEPS else movies
        if step == "ingest":
            share = min(workers, sum(movie.todo(step) for movie in todo) or 1)
        seconds = sum(_seconds(step, movie, found) for movie in todo) / share
        if step == "adapt":  # a training is one task; movies of a group wait for that of their first
            trained = [movie.training_steps * found.training for movie in todo if movie.training_steps]
            seconds += sum(trained) / max(1, min(workers, len(trained)))
        seconds += sum(found.steps[step].start for _ in todo) / movies
        steps[step] = (sum(movie.todo(step) for movie in todo), seconds)
    size, files = zip(*(_room(movie, found) for movie in left), strict=True)
    here = found.plan.costs.task_memory
    return Forecast(
        steps, sum(seconds for _, seconds in steps.values()), sum(size), sum(files),
        found.memory * max(1.0, *(movie.costs.task_memory / here for movie in left)),
    )  # fmt: skip


def _seconds(step: str, movie: MoviePlan, found: Measured) -> float:
    """Seconds of one worker that what is left of a step of a movie takes."""
    took, tried = found.steps[step].seconds, found.plan
    (frames, *_), (tried_frames, *_) = movie.shape, tried.shape
    pixels = math.prod(movie.shape[1:]) / math.prod(tried.shape[1:])
    blocks = math.ceil(frames / movie.size)
    if step in BLOCK_STEPS:
        took *= _pairs_alike(movie, found) if step == "survey" else 1.0
        return took * frames * movie.todo(step) / blocks / min(tried.size, tried_frames) * pixels
    if step == "ingest":
        return took * found.steps[step].blocks * frames / tried_frames * pixels
    options = movie.movie.settings
    if step == "calibrate":
        wanted = options.detector.sample_frames
        read, tried_read = (len(sample_indices(p.shape[0], wanted, math.prod(p.shape[1:]))) for p in (movie, tried))
        return took * read / tried_read * pixels
    if step == "drift":
        return took * frames / tried_frames
    if step == "adapt":
        looked, tried_looked = (min(CHECK_FRAMES, p.shape[0]) for p in (movie, tried))
        rest = max(0.0, took - tried.movie.settings.denoise.steps * found.training)
        return rest * looked / tried_looked
    if step == "collect":
        return took + len(TABLES) * max(0, blocks - found.steps["process"].blocks) * found.part
    return took * pixels


def _pairs_alike(movie: MoviePlan, found: Measured) -> float:
    """Pairs per frame of a movie over those of the blocks that showed the pace: the last frames have few partners."""
    options, tried = movie.movie.settings.drift, found.plan.shape[0]
    if not options.correct:
        return 1.0
    first = found.workers * found.plan.size
    first = first if first < tried else 0

    def pairs(frames: int, begin: int = 0) -> float:
        return sum(max(0, frames - begin - lag) for lag in options.lags) / (frames - begin)

    return max(1.0, pairs(movie.shape[0]) / pairs(tried, first)) if pairs(tried, first) else 1.0


def _room(movie: MoviePlan, found: Measured) -> tuple[float, int]:
    """Bytes and files that are left to write of a movie."""
    frames, disk = movie.shape[0], found.disk
    pixels = math.prod(movie.shape[1:]) / math.prod(found.plan.shape[1:])
    blocks = math.ceil(frames / movie.size)
    part = movie.todo("process") / blocks
    shards = movie.todo("ingest")
    size = disk.results * frames * pixels * part + disk.fixed + (disk.stack * frames * pixels if shards else 0.0)
    return size, math.ceil(disk.block_files * blocks * part) + disk.fixed_files + shards


def others(left: Sequence[MoviePlan], found: Measured) -> list[str]:
    """Movies whose own settings no pilot has tried, by name."""

    def science(movie: MoviePlan) -> str:
        return movie.movie.settings.model_copy(update={"source": None}).model_dump_json(warnings=False)

    same = {science(movie) for movie in left if movie.movie.name == found.plan.movie.name}
    return [movie.movie.name for movie in left if science(movie) not in same]


def notes(left: Sequence[MoviePlan], found: Measured) -> Iterator[str]:
    """What makes the forecast doubtful."""
    if found.training and any(m.todo("adapt") for m in left):
        yield "adaptation is counted with all of denoise.steps; it ends earlier where more do not help"
    if any(m.led and m.todo("adapt") for m in left):
        yield "movies of a group are counted with one training; where that is of no use to them, each has its own"
    if found.kept == "wiener" and found.training:
        yield (
            f"after {TRAINING_STEPS} training steps the Wiener filter was no worse than the network and replaced it; "
            "if all steps change that, process takes longer"
        )
    if names := others(left, found):
        shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
        yield f"{shown}: other settings than {found.plan.movie.name}, taken to cost the same per pixel"


def print_forecast(out: Console, found: Measured, left: Sequence[MoviePlan], ahead: Forecast, workers: int) -> None:
    """A table of the steps, then memory, disk and doubts."""
    tried = found.plan
    title = f"pilot: {tried.shape[0]} frames of {tried.movie.name} on {found.workers} worker(s)"
    table = Table("step", "blocks", "s per block", "to do", f"takes on {workers}", title=title)
    for step, took in found.steps.items():
        todo, seconds = ahead.steps[step]
        table.add_row(step, str(took.blocks), f"{took.seconds:.3g}", str(todo), duration(seconds) if todo else "done")
    out.print(table)
    gpu = "" if found.device is None else f", {found.device / 1e9:.2f} GB of the GPU"
    out.print(
        f"peak memory: {found.memory / 1e9:.2f} GB per worker{gpu}, {found.driver / 1e9:.2f} GB driver; "
        f"to write: {ahead.bytes / 1e9:.3g} GB, {ahead.files} files",
        markup=False,
    )
    for note in notes(left, found):
        out.print(f"note: {note}", markup=False)


def clock(seconds: float, now: datetime) -> str:
    """The time of day in so many seconds: 06:40, with the day if it is another."""
    end = now + timedelta(seconds=seconds)
    return f"{end:%H:%M}" if end.date() == now.date() else f"{end:%a %d %b, %H:%M}"
