"""What each task does: get arrays, run steps, put a part file. The only place where steps meet settings and disk."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import inference, measure, models
from pipeline.images import write_image
from pipeline.movie import Clock, Movie, Task, open_movie, record, saturation_of
from pipeline.parts import read_meta, read_part, write_part
from pipeline.plan import SAMPLE_PIXELS, step_blocks
from pipeline.prepare import prepare_denoiser
from pipeline.steps import anchor, detector, drift, focus, neighbours, noise
from schemas.errors import ResourceError

Compute = Callable[[Task], Mapping[str, Any]]

SMALLER_TILES = 2  # how often tiles and windows are halved before memory is declared too small
NO_NOISE = noise.NoiseModel(0.0, 1.0, 0.0, calibrated=False, signal_dependent=True)


def sample_indices(frames: int, wanted: int, pixels: int) -> np.ndarray:
    """Frames spread evenly over the movie, in pairs of consecutive ones (noise is seen in their differences)."""
    count = max(2, min(wanted, frames, max(8, SAMPLE_PIXELS // pixels)))
    starts = np.linspace(0, max(frames - 2, 0), max(1, count // 2)).round().astype(int)
    return np.unique(np.clip(np.concatenate([starts, starts + 1]), 0, frames - 1))


def _good(movie: Movie, counts: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, list[str], dict[str, Any]]:
    """Which frames can be used, why others not, and the frames' statistics."""
    settings = movie.settings
    statistics = detector.frame_statistics(counts, saturation=saturation_of(movie.stack, settings))
    dropped, reasons = detector.frame_flags(statistics, max_saturated_fraction=settings.detector.max_saturated_fraction)
    damaged = ~movie.stack.frame_ok[indices]
    reasons = ["the file is damaged here" if d else r for d, r in zip(damaged, reasons, strict=True)]
    return ~(dropped | damaged), reasons, statistics


def adopted(task: Task, step: str) -> Mapping[str, Any] | None:
    """The record of a block whose part is there, though nobody was told: its worker or its driver died; else None."""
    path = task.part(step)
    if not path.exists() or (meta := read_meta(path) or {}).get("fingerprint") != dict(task.keys)[step]:
        return None
    rows = {table: int(meta.get(table, 0)) for table in ("rows", "particles")}
    made: dict[str, Any] = {fact: meta[fact] for fact in ("device", "models") if fact in meta}
    return {"seconds": {}, "adopted": True, **rows, **made}


def _once(step: str) -> Callable[[Compute], Compute]:
    """Makes a task that finds its block finished say so, and compute nothing."""

    def decorate(compute: Compute) -> Compute:
        @functools.wraps(compute)
        def wrapper(task: Task) -> Mapping[str, Any]:
            found = adopted(task, step)
            return compute(task) if found is None else found

        return wrapper

    return decorate


@_once("calibrate")
def calibrate(task: Task) -> Mapping[str, Any]:
    """Bad pixels, noise model, brightness and the weights of frequencies, from a fixed sample of the movie."""
    clock, movie, settings = Clock(), open_movie(task), task.settings
    counts = _sample(movie, clock)
    with clock("detector"):
        bad = np.zeros(movie.stack.shape[1:], dtype=bool)
        if settings.detector.bad_pixels and len(counts):
            bad = detector.find_bad_pixels(counts, threshold=settings.detector.bad_pixel_threshold)
        corrected = detector.correct(counts, dark=movie.dark, gain=movie.gain, bad=bad)
        model = noise.fit_noise(corrected, counts_per_electron=_counts_per_electron(movie)) if len(counts) else NO_NOISE
        electrons = noise.to_electrons(corrected, model)
        level = neighbours.measure_level(electrons, readout_variance=model.readout_variance)
    with clock("drift"):
        weight, anchored = _frequency_weight(electrons, movie)
    y, x = np.nonzero(bad)
    arrays = {"bad_y": y.astype(np.int32), "bad_x": x.astype(np.int32), "weight": weight}
    meta = {"noise": model._asdict(), "level": [float(v) for v in level], "sample_frames": len(counts)}
    meta |= {"bad_pixels": len(y), "anchored": anchored, "fingerprint": dict(task.keys)["calibrate"]}
    write_part(task.part("calibrate"), arrays, meta)
    return record(clock, bad_pixels=len(y))


def _sample(movie: Movie, clock: Clock) -> np.ndarray:
    """The good frames (time, y, x) of a fixed sample of the movie; none only if the movie has no good frame."""
    frames, height, width = movie.stack.shape
    indices = sample_indices(frames, movie.settings.detector.sample_frames, height * width)
    # If all of the sample is bad, the first good frames that there are must do.
    rest = (np.arange(start, min(start + len(indices), frames)) for start in range(0, frames, len(indices)))
    for chosen in itertools.chain([indices], rest):
        with clock("read"):
            counts = movie.stack.read_frames(list(chosen), plane=movie.settings.source.defocus_plane)
        with clock("detector"):
            good, _, _ = _good(movie, counts, chosen)
        if good.any():
            return counts[good]
    return counts[:0]


def _counts_per_electron(movie: Movie) -> float | None:
    given = movie.settings.source.counts_per_electron or movie.stack.attributes.get("counts_per_electron")
    return float(given) if given else None


def _frequency_weight(electrons: np.ndarray, movie: Movie) -> tuple[np.ndarray, bool]:
    """The weights of frequencies, and whether they are those of what `drift.anchor` names: it must be seen."""
    options = movie.settings.drift
    if not options.correct or not len(electrons):
        return np.zeros((0, 0), dtype=np.float32), False
    weigh = functools.partial(
        drift.spectral_weight, band=options.band, taper=options.taper, change=options.change, limit=options.limit,
        device=movie.task.device,
    )  # fmt: skip
    weight = weigh(electrons)
    if options.anchor == "frame":
        return weight, False
    masks = _masks(movie, electrons, weight[1], np.ones(len(electrons), dtype=bool))
    seen = masks.any(axis=(1, 2))
    return (weigh(electrons[seen], masks=masks[seen]), True) if seen.any() else (weight, False)


def _masks(movie: Movie, electrons: np.ndarray, wiener: np.ndarray, good: np.ndarray) -> np.ndarray:
    """What of each good frame (time, y, x) counts for drift of what `drift.anchor` names; zero if that is none."""
    masks = np.zeros(electrons.shape, dtype=np.float32)
    for index in np.flatnonzero(good):
        found = inference.particles_in(movie, anchor.filtered(electrons[index], wiener))
        if found is not None:
            masks[index] = anchor.mask(found[0], movie.settings.drift.anchor)
    return masks


@_once("survey")
def survey(task: Task) -> Mapping[str, Any]:
    """Statistics and flags of the task's frames, and the shifts of the pairs that begin in them."""
    clock, movie, options = Clock(), open_movie(task), task.settings.drift
    reach = max(options.lags) if options.correct else 0
    end = min(task.stop + reach, task.frames)
    with clock("read"):
        counts = movie.counts(task.start, end)
    with clock("detector"):
        good, reasons, statistics = _good(movie, counts, np.arange(task.start, end))
    own = slice(0, task.stop - task.start)
    arrays = {name: values[own] for name, values in statistics.items()}
    arrays |= {"good": good[own], "reason": np.asarray(reasons[own], dtype=str)}
    answer, facts = task.answer("calibrate")
    weight = answer["weight"]
    if options.correct and weight.size:
        with clock("detector"):
            electrons = movie.electrons(counts)
        pairs = drift.pair_list(task.frames, start=task.start, stop=task.stop, lags=options.lags)
        with clock("drift"):
            counted = _masks(movie, electrons, weight[1], good) if facts.get("anchored") else good
            shifts = drift.pair_shifts(
                electrons, pairs - task.start, good=counted, weight=weight, candidates=options.candidates,
                max_shift=options.max_shift, taper=options.taper, limit=options.limit, device=task.device,
            )  # fmt: skip
        arrays |= {"pairs": pairs, **{f"shift_{name}": values for name, values in shifts.items()}}
    if movie.stack.planes > 1:
        arrays["offsets"] = _plane_offsets(movie, task.start, good[own], clock)
    with clock("write"):
        write_part(task.part("survey"), arrays, {"fingerprint": dict(task.keys)["survey"]})
    return record(clock, dropped=int((~good[own]).sum()))


def _plane_offsets(movie: Movie, start: int, good: np.ndarray, clock: Clock) -> np.ndarray:
    """Where planes may lie against the one that is processed, (time, plane, candidate, 3); NaN in bad frames."""
    options = movie.settings.drift
    found = np.full((len(good), movie.stack.planes, focus.CANDIDATES, 3), np.nan)
    for row in np.flatnonzero(good):
        with clock("read"):
            planes = movie.planes(start + int(row))
        with clock("focus"):
            found[row] = focus.plane_offsets(
                planes, reference=movie.settings.source.defocus_plane, scale=options.defocus_shift, band=options.band,
                taper=options.taper,
            )  # fmt: skip
    return found


@_once("drift")
def solve_drift(task: Task) -> Mapping[str, Any]:
    """One path of the specimen from the pairs of all blocks, offsets of planes, and the list of good frames."""
    clock, settings = Clock(), task.settings
    size = task.settings.blocks.frames or 0
    parts = [read_part(task.part("survey", *block))[0] for block in step_blocks("survey", task.frames, size)]
    good = np.concatenate([part["good"] for part in parts])
    path, error, agreement = np.zeros((task.frames, 2)), np.zeros((task.frames, 2)), None
    if settings.drift.correct and "pairs" in parts[0]:
        prefix = "shift_"
        pairs = np.concatenate([part["pairs"] for part in parts])
        shifts = {
            name.removeprefix(prefix): np.concatenate([part[name] for part in parts])
            for name in parts[0]
            if name.startswith(prefix)
        }
        with clock("drift"):
            solved = drift.solve_path(
                task.frames, pairs, shifts, good=good, max_motion=settings.drift.max_motion,
                cauchy=settings.drift.cauchy,
            )  # fmt: skip
        path, error = solved.drift, solved.error
        agreement = solved.agreement if np.isfinite(solved.agreement) else None
    meta = {"fingerprint": dict(task.keys)["drift"], "good": int(good.sum()), "frames": task.frames}
    meta["agreement"] = agreement
    arrays = {"drift": path, "error": error, "good": good}
    if "offsets" in parts[0]:
        with clock("focus"):
            arrays["offsets"] = focus.solve_offsets(
                np.concatenate([part["offsets"] for part in parts]), scale=settings.drift.defocus_shift
            )
    write_part(task.part("drift"), arrays, meta)
    return record(clock, good=int(good.sum()))


@_once("adapt")
def adapt(task: Task) -> Mapping[str, Any]:
    """The denoiser's weights for this movie, written beside the part that names them."""
    clock, movie = Clock(), open_movie(task)
    weights = task.part("adapt").with_suffix(".safetensors")
    with clock("adapt"):
        facts = prepare_denoiser(movie, weights, clock)
    facts |= {} if task.lead is None else {"lead": {"movie": task.lead.movie, "fingerprint": task.lead.fingerprint}}
    write_part(task.part("adapt"), {}, {**facts, "fingerprint": dict(task.keys)["adapt"]})
    return record(clock, **{key: facts[key] for key in ("network", "weights", "sha256") if key in facts})


@_once("vote")
def vote(task: Task) -> Mapping[str, Any]:
    """Whether atoms are bright or dark in this movie, by the network on a few denoised frames."""
    clock, movie = Clock(), open_movie(task)
    evidence, polarity = inference.vote(movie, clock)
    meta = {"polarity": polarity, "evidence": evidence, "usable": inference.segments(movie)}
    write_part(task.part("vote"), {}, {**meta, "fingerprint": dict(task.keys)["vote"]})
    return record(clock, **meta)


@_once("process")
def process(task: Task) -> Mapping[str, Any]:
    """All pixels of the task's frames, once: denoise, low-pass, segment, find and refine columns, name species.

    Memory that runs out, on host or device, costs smaller tiles and windows, and ``/frames/device`` says so.
    """
    clock, attempt = Clock(), task
    while True:
        try:
            return _process(attempt, clock)
        except (MemoryError, RuntimeError) as error:
            words = ("can't allocate memory", "out of memory")  # as torch says it of a host, and of a GPU's driver
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(w in str(error) for w in words):
                raise
            if (less := smaller(attempt)) is None:
                raise ResourceError(
                    f"memory ran out with the smallest tiles ({error}); give workers more, or set blocks.frames lower"
                ) from error
            attempt = less


def smaller(task: Task) -> Task | None:
    """The task with its tiles and windows halved once more, all else as it was; None if they are small already."""
    if task.halvings == SMALLER_TILES:
        return None
    options, side = task.settings, 2
    tile = max(64, (options.denoise.tile or 1024) // side)
    window = max(4 * models.halo_of(options.segment), (options.segment.window or 1024) // side)
    particles = max(4 * models.halo_of(options.particles), (options.particles.window or 1024) // side)
    changed = {
        "denoise": options.denoise.model_copy(update={"tile": tile}),
        "segment": options.segment.model_copy(update={"window": window}),
        "particles": options.particles.model_copy(update={"window": particles}),
        "species": options.species.model_copy(update={"window": (options.species.window or 1024) // side}),
    }
    return dataclasses.replace(task, settings=options.model_copy(update=changed), halvings=task.halvings + 1)


def tables_of(task: Task, clock: Clock) -> tuple[dict[str, measure.Rows], inference.Images, list[measure.Measured]]:
    """All tables of the task's frames, and the images and frames that they were made of; nothing is written."""
    movie = open_movie(task)
    images = inference.infer(movie, range(task.start, task.stop), clock)
    measured = [measure.measure_frame(movie, images, row, clock) for row in range(task.stop - task.start)]
    tables = {
        "frames": measure.frame_rows(movie, images, measured),
        "columns": _joined([one.columns for one in measured]),
        "particles": _joined([one.particles for one in measured]),
    }
    return tables, images, measured


def _process(task: Task, clock: Clock) -> Mapping[str, Any]:
    tables, images, measured = tables_of(task, clock)
    rows = {"rows": len(tables["columns"]["y"]), "particles": len(tables["particles"]["y"])}
    loaded = models.in_use(task.settings, task.device)
    with clock("write"):
        _keep_images(task, images, measured)
        # A driver that died before it noted the block learns the numbers of rows from the part.
        made = {"device": images.device, "models": {"denoise": images.denoiser, **loaded}}
        meta = {"fingerprint": dict(task.keys)["process"], **rows, **made}
        arrays = {f"{table}.{name}": values for table, found in tables.items() for name, values in found.items()}
        write_part(task.part("process"), arrays, meta)
    return record(clock, **rows, **made)


def _joined(tables: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows of frames one after the other."""
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _keep_images(task: Task, images: inference.Images, measured: Sequence[measure.Measured]) -> None:
    """Write those images of the block that are to be kept; where there are none, they stay what is not computed."""
    for name in task.settings.images.save:
        stored = vars(images).get(name)
        if name == "labels":
            empty = np.zeros(images.denoised.shape[1:], np.int32)
            stored = np.stack([empty if one.labels is None else one.labels for one in measured])
        if stored is not None:
            write_image(Path(task.run), name, task.start, stored)
