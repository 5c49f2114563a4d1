"""What each task does: get arrays, run steps, put a part file. The only place where steps meet settings and disk."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import inference, store
from pipeline.movie import Clock, Movie, Task, open_movie, record, saturation_of
from pipeline.parts import read_part, write_part
from pipeline.plan import SAMPLE_PIXELS, step_blocks
from pipeline.prepare import prepare_denoiser
from pipeline.steps import columns, denoise, detector, drift, noise, species
from schemas.conventions import STATUS

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
        level = denoise.measure_level(electrons, readout_variance=model.readout_variance)
    with clock("drift"):
        weight = _frequency_weight(electrons, task)
    y, x = np.nonzero(bad)
    arrays = {"bad_y": y.astype(np.int32), "bad_x": x.astype(np.int32), "weight": weight}
    meta = {"noise": model._asdict(), "level": [float(v) for v in level], "sample_frames": len(counts)}
    meta |= {"bad_pixels": len(y), "fingerprint": dict(task.keys)["calibrate"]}
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


def _frequency_weight(electrons: np.ndarray, task: Task) -> np.ndarray:
    if not task.settings.drift.correct or not len(electrons):
        return np.zeros((0, 0), dtype=np.float32)
    options = task.settings.drift
    return drift.spectral_weight(
        electrons,
        band=options.band,
        taper=options.taper,
        change=options.change,
        limit=options.limit,
        device=task.device,
    )


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
    weight = task.answer("calibrate")[0]["weight"]
    if options.correct and weight.size:
        with clock("detector"):
            electrons = movie.electrons(counts)
        pairs = drift.pair_list(task.frames, start=task.start, stop=task.stop, lags=options.lags)
        with clock("drift"):
            shifts = drift.pair_shifts(
                electrons, pairs - task.start, good=good, weight=weight, candidates=options.candidates,
                max_shift=options.max_shift, taper=options.taper, limit=options.limit, device=task.device,
            )  # fmt: skip
        arrays |= {"pairs": pairs, **{f"shift_{name}": values for name, values in shifts.items()}}
    with clock("write"):
        write_part(task.part("survey"), arrays, {"fingerprint": dict(task.keys)["survey"]})
    return record(clock, dropped=int((~good[own]).sum()))


def solve_drift(task: Task) -> Mapping[str, Any]:
    """One path of the specimen from the pairs of all blocks, and the list of good frames."""
    clock, settings = Clock(), task.settings
    size = task.settings.blocks.frames or 0
    parts = [read_part(task.part("survey", *block))[0] for block in step_blocks("survey", task.frames, size)]
    good = np.concatenate([part["good"] for part in parts])
    path, error = np.zeros((task.frames, 2)), np.zeros((task.frames, 2))
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
    meta = {"fingerprint": dict(task.keys)["drift"], "good": int(good.sum()), "frames": task.frames}
    write_part(task.part("drift"), {"drift": path, "error": error, "good": good}, meta)
    return record(clock, good=int(good.sum()))


def adapt(task: Task) -> Mapping[str, Any]:
    """The denoiser's weights for this movie, written beside the part that names them."""
    clock, movie = Clock(), open_movie(task)
    weights = task.part("adapt").with_suffix(".safetensors")
    with clock("adapt"):
        facts = prepare_denoiser(movie, weights, clock)
    write_part(task.part("adapt"), {}, {**facts, "fingerprint": dict(task.keys)["adapt"]})
    return record(clock, **{key: facts[key] for key in ("network", "weights", "sha256") if key in facts})


def vote(task: Task) -> Mapping[str, Any]:
    """Whether atoms are bright or dark in this movie, by the network on a few denoised frames."""
    clock, movie = Clock(), open_movie(task)
    evidence, polarity = inference.vote(movie, clock)
    meta = {"polarity": polarity, "evidence": evidence, "usable": inference.segments(movie)}
    write_part(task.part("vote"), {}, {**meta, "fingerprint": dict(task.keys)["vote"]})
    return record(clock, **meta)


def process(task: Task) -> Mapping[str, Any]:
    """All pixels of the task's frames, once: denoise, low-pass, segment, find and refine columns, name species.

    Memory that runs out, on host or device, costs smaller tiles and windows, and ``/frames/device`` says so.
    """
    clock = Clock()
    for attempt in range(SMALLER_TILES + 1):
        try:
            return _process(_with_tiles(task, attempt), clock)
        except (MemoryError, torch.OutOfMemoryError):
            if attempt == SMALLER_TILES:
                raise
    raise AssertionError


def _with_tiles(task: Task, halvings: int) -> Task:
    """The task with its tiles and windows halved so many times; everything else, its key too, stays."""
    if not halvings:
        return task
    options, side = task.settings, 2**halvings
    tile = max(64, (options.denoise.tile or 1024) // side)
    window = max(4 * (options.segment.halo or 32), (options.segment.window or 1024) // side)
    changed = {
        "denoise": options.denoise.model_copy(update={"tile": tile}),
        "segment": options.segment.model_copy(update={"window": window}),
    }
    return dataclasses.replace(task, settings=options.model_copy(update=changed), halvings=halvings)


def _process(task: Task, clock: Clock) -> Mapping[str, Any]:
    movie = open_movie(task)
    settings = task.settings
    images = inference.infer(movie, range(task.start, task.stop), clock)
    tables = [_columns_of_frame(movie, images, row, clock) for row in range(task.stop - task.start)]
    rows = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    frames = _frame_rows(movie, images, [len(table["y"]) for table in tables])
    frames["species_count"] = np.stack(
        [species.count_species(t["species"], classes=classes_of(task)) for t in tables]
    ).astype(np.int32)
    frames["species_count"][~images.good] = 0
    with clock("write"):
        for name in settings.images.save:
            stored = images.denoised if name == "denoised" else images.probability
            if stored is not None:
                store.write_image(Path(task.run), name, task.start, stored)
        # A driver that died before it noted the block learns the number of rows from the part.
        meta = {"fingerprint": dict(task.keys)["process"], "rows": len(rows["y"]), "device": images.device}
        write_part(task.part("process"), _prefixed(frames, rows), meta)
    return record(clock, rows=len(rows["y"]), device=images.device)


def classes_of(task: Task) -> tuple[str, ...]:
    """Names along ``species_class``."""
    return species.assign_species(0, only=task.settings.species.only).classes


def _prefixed(frames: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**{f"frames.{k}": v for k, v in frames.items()}, **{f"columns.{k}": v for k, v in rows.items()}}


def _columns_of_frame(movie: Movie, images: inference.Images, row: int, clock: Clock) -> dict[str, np.ndarray]:
    """The rows of ``/columns`` of one frame, positions in Å in the specimen frame."""
    options, sampling = movie.settings.columns, movie.stack.sampling
    index = images.first + row
    if not images.good[row] or images.probability is None or movie.model is None or movie.drift_px is None:
        return _table({}, np.zeros(0), index, movie)
    with clock("columns"):
        peaks = columns.find_columns(
            images.probability[row], threshold=options.threshold, min_distance=options.min_distance / sampling
        )
        found = columns.refine(
            images.electrons[row], images.denoised[row], peaks.y, peaks.x, polarity=images.polarity,
            width=options.width / sampling, fit_width=options.fit_width,
            readout_variance=movie.model.readout_variance, share=options.share,
        )  # fmt: skip
        keep = columns.reported(
            found, shape=images.electrons.shape[1:], margin=options.margin / sampling,
            min_significance=options.min_significance, min_distance=options.min_distance / sampling,
        )  # fmt: skip
        return _table({k: v[keep] for k, v in found.items()}, peaks.probability[keep], index, movie)


def _table(found: Mapping[str, np.ndarray], probability: np.ndarray, index: int, movie: Movie) -> dict[str, np.ndarray]:
    sampling, count = movie.stack.sampling, len(probability)
    origin = movie.stack.origin
    path = np.zeros(2) if movie.drift_px is None else movie.drift_px[index]
    named = species.assign_species(count, only=movie.settings.species.only)
    empty, displacement = np.zeros(0), movie.settings.columns.displacement
    table = {
        "frame": np.full(count, index, dtype=np.int32),
        "y": origin[0] + (found.get("y", empty) - path[0]) * sampling,
        "x": origin[1] + (found.get("x", empty) - path[1]) * sampling,
        "y_err": np.hypot(found.get("y_err", empty) * sampling, displacement),
        "x_err": np.hypot(found.get("x_err", empty) * sampling, displacement),
        **{name: found.get(name, empty) for name in ("intensity", "intensity_err", "background", "significance")},
        "probability": probability,
        "species": named.name,
        "species_probability": named.probability,
    }
    # Rows run down the frame, then across: an order that no cut and no device can change.
    order = np.lexsort((table["x"], table["y"]))
    return {name: np.asarray(values)[order] for name, values in table.items()}


def _frame_rows(movie: Movie, images: inference.Images, counts: list[int]) -> dict[str, np.ndarray]:
    """The rows of ``/frames`` of a block, drift in Å."""
    rows = slice(images.first, images.first + len(counts))
    stack, model = movie.stack, movie.model
    if movie.drift_px is None or movie.drift_err is None or model is None:
        raise RuntimeError("the movie was opened before its drift was solved")
    good = images.good
    # A frame whose estimate is not finite would be an empty frame that looks measured.
    failed = good & ~np.isfinite(images.denoised).all((1, 2))
    path, error = movie.drift_px[rows] * stack.sampling, movie.drift_err[rows] * stack.sampling
    mean = images.electrons.mean((1, 2), dtype=np.float64)
    snr = images.denoised.std((1, 2), dtype=np.float64) / np.sqrt(np.maximum(mean + model.readout_variance, 1e-12))
    dose = mean / stack.sampling**2 if model.calibrated else np.full(len(mean), np.nan)
    statistics = detector.frame_statistics(
        images.counts, saturation=saturation_of(stack, movie.settings)
    )["saturated_fraction"]  # fmt: skip
    return {
        "status": np.where(good, np.where(failed, STATUS["failed"], STATUS["measured"]), STATUS["dropped"]).astype(
            "i1"
        ),
        "reason": np.where(failed, "the denoised frame is not finite", images.reasons),
        "drift_y": path[:, 0],
        "drift_x": path[:, 1],
        "drift_y_err": error[:, 0],
        "drift_x_err": error[:, 1],
        "column_count": np.asarray(counts, dtype=np.int32),
        "mean_electrons": np.where(good, mean, np.nan),
        "dose": np.where(good, dose, np.nan),
        "snr": np.where(good, snr, np.nan),
        "saturated_fraction": statistics,
        "denoiser": np.full(len(good), images.denoiser),
        "device": np.full(len(good), images.device),
    }
