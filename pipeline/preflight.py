"""Before anything is computed: what is wrong with a job, what it will cost, and why each block will run."""

from __future__ import annotations

import importlib.metadata
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client
from rich.console import Console
from rich.table import Table

from pipeline import models, plan, store
from pipeline.ingest.describe import Description, describe
from pipeline.ingest.to_stack import (
    Cut,
    binned_dtype,
    calibration_of,
    is_current,
    open_ingested,
    plan_cut,
    source_key,
    write_stack,
)
from pipeline.job import PlannedMovie, Progress, movies_of, overrides_of
from pipeline.layout import stack_layout
from pipeline.ledger import Lease, Ledger
from pipeline.models import TRAINED_HERE
from pipeline.networks.adapt import CHECKS, SYMMETRIES
from pipeline.networks.risk import CHECK_FRAMES
from pipeline.networks.weights import denoiser_of, load_weights
from pipeline.steps import denoise, neighbours, segment
from schemas.errors import ColonnadeError, ResourceError, SettingsError, SourceError
from schemas.settings import Job, Settings

# Frames that an adaptation estimates to judge itself: in the looks of the first part, after the last, before it, of
# what is kept and by the filter.
LOOKS = (CHECKS + 4) * CHECK_FRAMES
TRIAL_EDGE = 256
TRIAL_MOTION = (0.2, 0.2)  # as if parts of the frame had been seen to move: how far makes no difference


def problems_of(job: Job) -> tuple[list[str], list[str]]:
    """All problems of a job that can be known without computing, and facts worth showing."""
    problems: list[str] = []
    facts = [f"colonnade {importlib.metadata.version('colonnade')}"]
    try:
        movies, ignored = movies_of(job)
    except ColonnadeError as error:
        return [str(error)], facts
    facts += [f"ignored: {path}: {reason}" for path, reason in ignored]
    for movie in movies:
        try:
            models.hashes(movie.settings)
            plan.maps(movie.settings)
            models.require_halo(movie.settings)
            if movie.files.reader == "stack":
                stack = open_ingested(movie.files.paths[0], movie.settings.source)
                models.require_fit(movie.settings, planes=stack.planes, sampling=stack.sampling)
                facts.append(f"{movie.name}: stack {stack.shape}, {stack.sampling:g} Å/px")
                continue
            description = describe(movie.files, overrides_of(movie.settings))
            cut = plan_cut(description, movie.settings.source)
            planes = len(description.defocus) if description.defocus else 1
            models.require_fit(movie.settings, planes=planes, sampling=description.sampling * cut.binning)
            facts.append(_fact(description))
        except ColonnadeError as error:
            problems.append(f"{movie.name}: {error}")
    nearest = next(folder for folder in (job.output, *job.output.parents) if folder.exists())
    if not _writable(nearest):
        problems.append(f"output {job.output} cannot be written; choose another folder")
    return problems, facts


def _fact(description: Description) -> str:
    shape = " x ".join(str(n) for n in description.shape)
    energy = f", {description.energy:g} keV" if description.energy else ""
    return f"{description.name}: {shape} {description.dtype}, {description.sampling:g} Å/px{energy}"


def _writable(folder: Path) -> bool:
    import os

    return os.access(folder, os.W_OK)


# -------------------------------------------------------------------------------------------------------------- plan


def print_plan(job: Job, out: Console, *, workers: int, memory: float | None) -> None:
    """Print the plan of a job; ``ResourceError`` where memory or disk cannot hold it."""
    movies, ignored = movies_of(job)
    for path, reason in ignored:
        out.print(f"ignored: {path}: {reason}", markup=False)
    rates: dict[str, float] = {}
    bytes_needed, worst = 0.0, 0.0
    for movie in movies:
        needed, peak = _print_movie(plan_of(job, movie), out, workers, rates)
        bytes_needed += needed
        worst = max(worst, peak)
    nearest = next(folder for folder in (job.output, *job.output.parents) if folder.exists())
    free = shutil.disk_usage(nearest).free
    out.print(f"disk: {bytes_needed / 1e9:.2f} GB to write, {free / 1e9:.1f} GB free below {nearest}", markup=False)
    if bytes_needed > free:
        raise ResourceError(f"{bytes_needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free below {nearest}")
    if memory is not None:
        plan.require_memory(worst, memory * 1e9)


@dataclass(frozen=True)
class MoviePlan:
    """What is to be done for a movie of ``shape`` (time, y, x): its blocks of ``size`` frames, why, and the costs."""

    movie: PlannedMovie
    shape: tuple[int, int, int]
    itemsize: int
    planes: int
    size: int
    halo: int
    ingest: str
    lines: tuple[plan.StepPlan, ...]
    collected: bool
    led: bool = False

    @property
    def training_steps(self) -> int:
        """Most steps of the adaptation; none where a network is used as it is, or taken over from another movie."""
        options = self.movie.settings.denoise
        trained = TRAINED_HERE if options.network == "wcvd" else ("adapt", "scratch")
        trains = options.network != "none" and options.weights in trained
        return options.steps if trains and not self.led else 0

    @property
    def shard_frames(self) -> int:
        """Frames of a shard of the stack."""
        megabytes = self.movie.settings.stacks.shard_megabytes
        return stack_layout(self.shape, f"u{self.itemsize}", shard_megabytes=megabytes).shard_frames

    @property
    def shards(self) -> int:
        """Shards of the stack."""
        return -(-self.shape[0] // self.shard_frames)

    @property
    def costs(self) -> plan.Costs:
        """Disk and memory, from shapes alone."""
        return plan.predict_costs(
            self.movie.settings, self.shape, self.itemsize, size=self.size, halo=self.halo,
            shard_frames=self.shard_frames, planes=self.planes,
        )  # fmt: skip

    def todo(self, step: str) -> int:
        """Blocks of a step that must run: of ingest its shards, of collect one."""
        if step == "ingest":
            return 0 if self.ingest == "done" else self.shards
        if step == "collect":
            return int(not self.collected or any(line.todo for line in self.lines))
        return next(line.todo for line in self.lines if line.step == step)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do; a stack that was not kept is not missed then."""
        return not self.todo("collect")


def plan_of(job: Job, movie: PlannedMovie) -> MoviePlan:
    """The plan of one movie, from its files and what an earlier run left; reads no pixels."""
    settings = movie.settings
    shape, itemsize, content, facts, why = _stack_facts(job, movie)
    planes = int(facts.get("planes", 1))
    size, halo = plan.block_frames(settings, shape), plan.denoiser_halo(settings)
    ledger = Ledger(job.output / "ledger" / movie.name)
    lead = _lead_of(job, movie)
    deps = plan.dependencies(settings, content, facts, lead=lead)
    lines = plan.plan_movie(ledger, job.output / "parts" / movie.name, frames=shape[0], size=size, deps=deps)
    collected = ledger.is_done("collect", 0, shape[0], plan.fingerprints(deps)["collect"])
    return MoviePlan(movie, shape, itemsize, planes, size, halo, why, tuple(lines), collected, led=bool(lead))


def _lead_of(job: Job, movie: PlannedMovie) -> str:
    """Fingerprint of the adaptation that a movie takes over: of the first of its group that was not quarantined."""
    for earlier in movie.group:
        if earlier.name == movie.name:
            break
        if Ledger(job.output / "ledger" / earlier.name).quarantined:
            continue
        _, _, content, facts, _ = _stack_facts(job, earlier)
        return plan.fingerprints(plan.dependencies(earlier.settings, content, facts))["adapt"]
    return ""


def _print_movie(found: MoviePlan, out: Console, workers: int, rates: dict[str, float]) -> tuple[float, float]:
    settings, shape, costs = found.movie.settings, found.shape, found.costs
    seconds = predict_seconds(settings, shape, found.lines, workers, rates, steps=found.training_steps)
    title = f"{found.movie.name}: {shape[0]} frames of {shape[1]} x {shape[2]}"
    table = Table("step", "blocks", "to do", "why", title=title)
    table.add_row("ingest", str(found.shards), "0" if found.ingest == "done" else "all", found.ingest)
    for line in found.lines:
        table.add_row(line.step, str(line.blocks), str(line.todo), line.reason)
    out.print(table)
    window = settings.segment.window or "whole frame"
    out.print(
        f"blocks of {found.size} frames (+{found.halo} on each side), windows of {window}, "
        f"predicted: {costs.task_memory / 1e9:.2f} GB per task, {seconds / 60:.1f} min on {workers} worker(s), "
        f"{(costs.stack_bytes + costs.result_bytes) / 1e9:.3f} GB, {costs.files} files",
        markup=False,
    )
    to_write = costs.result_bytes + (0 if found.ingest == "done" else costs.stack_bytes)
    return to_write, costs.task_memory


def _stack_facts(job: Job, movie: PlannedMovie) -> tuple[tuple[int, int, int], int, str, dict[str, Any], str]:
    """Shape and item size of the stack that is or will be, content hash if known, calibration, why it is ingested."""
    if movie.files.reader == "stack":
        stack = open_ingested(movie.files.paths[0], movie.settings.source)
        facts = calibration_of(movie.settings, stack)
        return stack.shape, stack.counts.dtype.itemsize, stack.attributes["content_hash"], facts, "done"
    description = describe(movie.files, overrides_of(movie.settings))
    cut: Cut = plan_cut(description, movie.settings.source)
    target = job.output / "stacks" / f"{movie.name}.zarr"
    current = is_current(target, source_key(description, cut))
    content = store.attributes_of(target)["content_hash"] if current else "not ingested yet"
    reason = "done" if current else ("stale: source files or calibration changed" if target.exists() else "missing")
    facts = plan.calibration(
        movie.settings, sampling=description.sampling * cut.binning, energy=description.energy,
        time=list(description.time[cut.frames[0] : cut.frames[1]]), counts_per_electron=description.counts_per_electron,
        defocus=description.defocus,
    )  # fmt: skip
    return cut.shape, binned_dtype(description.dtype, cut.binning).itemsize, content, facts, reason


def predict_seconds(
    settings: Settings,
    shape: tuple[int, int, int],
    lines: Sequence[plan.StepPlan],
    workers: int,
    rates: dict[str, float],
    *,
    steps: int,
) -> float:
    """Time that the steps to do will take, from a trial of one small frame here; adaptation takes `steps` steps."""
    if "process" not in rates:
        rates.update(trial(settings))
    pixels = shape[0] * shape[1] * shape[2]
    share = {line.step: line.todo / line.blocks for line in lines}
    adapting = 0.0
    if steps:
        options = settings.denoise
        sample = min(shape[1], options.sample_side) * min(shape[2], options.sample_side) * rates["denoise"]
        adapting = steps * rates["training"] + sample * (SYMMETRIES * options.sample_frames + LOOKS)
    work = rates["survey"] * share["survey"] + rates["process"] * share["process"]
    return pixels * work / workers + adapting * share["adapt"]


def trial(settings: Settings) -> dict[str, float]:
    """Seconds per pixel of survey and process, and per training step, measured on one frame of noise."""
    import torch

    edge = TRIAL_EDGE
    network: Any = load_weights(denoiser_of(settings.denoise.tier)).module
    count = len(network.around)
    frames = np.random.default_rng(0).poisson(5.0, (count, edge, edge)).astype(np.float32)
    links = neighbours.FrameLinks(np.zeros((count, 2), np.int64), np.ones(count, bool), np.zeros(count, np.int64))
    columns = load_weights(settings.segment.model)
    torch.set_num_threads(1)
    times: list[list[float]] = []
    for _ in range(2):
        clock = [time.perf_counter()]
        for motion in ((), TRIAL_MOTION if settings.denoise.motion else ()):
            network.motion = motion
            smooth = denoise.denoise(
                network, frames, [count // 2], links=links, level=neighbours.Level(5.0, 5.0), tile=None,
                dtype=settings.denoise.dtype,
            )  # fmt: skip
            clock.append(time.perf_counter())
        segment.column_probability(
            columns.module, smooth, sampling=0.2, model_sampling=0.2, polarity=1, window=None,
            halo=settings.segment.halo, batch=1,
        )  # fmt: skip
        times.append(np.diff([*clock, time.perf_counter()]).tolist())
    still, alone, segmented = (min(column) for column in zip(*times, strict=True))
    process = (alone + segmented) * 1.3 / edge**2  # columns, reading and writing come on top
    # Crops are cut from frames whose parts were followed once.
    training = still * 3 * settings.denoise.batch * (settings.denoise.crop / edge) ** 2
    return {"process": process, "survey": process * 0.8, "training": training, "denoise": still / edge**2}


# ------------------------------------------------------------------------------------------------------------ ingest


def ingest_all(
    job: Job, target: Path, *, client: Client | None, progress: Progress, stop: threading.Event
) -> tuple[list[str], int]:
    """Ingest the movies of a job into ``target`` (a .zarr for one movie, else a folder); lines to print, damaged."""
    movies, ignored = movies_of(job)
    lines = [f"ignored: {path}: {reason}" for path, reason in ignored]
    if len(movies) > 1 and target.suffix == ".zarr":
        names = ", ".join(movie.name for movie in movies)
        raise SettingsError(
            f"{target} is one stack, but the sources hold {len(movies)} movies ({names}); name a folder"
        )
    if target.is_file():
        raise SettingsError(
            f"{target} is a file; expected the stack to write, STACK.zarr, or a folder, as last argument"
        )
    guard = target.parent / f".{target.name}.lease"
    with Lease(guard):
        damaged = _ingest_each(movies, target, lines, client=client, progress=progress, stop=stop)
    shutil.rmtree(guard, ignore_errors=True)
    return lines, damaged


def _ingest_each(
    movies: list[PlannedMovie], target: Path, lines: list[str], *, client: Client | None, progress: Progress,
    stop: threading.Event,
) -> int:  # fmt: skip
    damaged = 0
    for movie in movies:
        if movie.files.reader == "stack":
            raise SourceError(f"{movie.files.paths[0]} is a stack already; run it as it is")
        path = target if target.suffix == ".zarr" else target / f"{movie.name}.zarr"
        path.parent.mkdir(parents=True, exist_ok=True)
        description = describe(movie.files, overrides_of(movie.settings))
        name = movie.name
        progress.begin(name, "ingest", plan_cut(description, movie.settings.source).shape[0])
        bad = write_stack(
            description, path, source=movie.settings.source, stacks=movie.settings.stacks, client=client, stop=stop,
            progress=lambda frames, name=name: progress.advance(name, "ingest", frames),  # type: ignore[misc]
        )  # fmt: skip
        damaged += bad
        flagged = f", {bad} damaged frames flagged" if bad else ""
        lines.append(f"{_fact(description)}{flagged} -> {path}")
        lines += [f"  {note}" for note in description.notes]
    return damaged
