"""How well a particle network does on simulated movies that it was not trained on; the figures of its model card."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import nn

from pipeline.networks.segment_check import denoised, recorded
from pipeline.simulate.movie import MovieSpec, SimulatedMovie, simulate_movie
from pipeline.steps import particles, segment

Report = Callable[[str], None]
FRAMES = 7
HIT = 0.5  # IoU of a particle with one that was found, from which on it counts as detected
LEAST_AREA = 50.0  # Å²; smaller pieces of particles are not demanded, and found ones left out
THRESHOLD, MAX_HOLE, NECK = 0.5, 50.0, 0.75  # as the settings have them; the hole in Å²
WIDE = MovieSpec(shape=(320, 320), sampling=0.25, frames=FRAMES)
CASES = {
    "Au [110]": MovieSpec(frames=FRAMES),
    "Au [110], dark": MovieSpec(frames=FRAMES, contrast="dark"),
    "Au [100]": MovieSpec(frames=FRAMES, zone="100"),
    "Au, 8° off": MovieSpec(frames=FRAMES, tilt=8.0),
    "Au, 20° off": MovieSpec(frames=FRAMES, tilt=20.0),
    "Pt [111]": MovieSpec(frames=FRAMES, element="Pt", zone="111"),
    "three Pd, 0–15° off": replace(WIDE, element="Pd", particles=3, tilts=(0.0, 6.0, 15.0)),
    "four Au, 0–20° off": replace(WIDE, particles=4, tilts=(0.0, 4.0, 10.0, 20.0)),
}
EMPTY = {
    "vacuum": MovieSpec(kind="vacuum", frames=FRAMES),
    "film": MovieSpec(kind="carbon", frames=FRAMES, carbon=10.0, carbon_cover=1.0),
    "edge of a film": MovieSpec(kind="carbon", frames=FRAMES, carbon=10.0, carbon_cover=0.5),
    "MoS2": MovieSpec(kind="mos2", energy=80.0, frames=FRAMES),
    "graphene": MovieSpec(kind="graphene", energy=80.0, frames=FRAMES),
    "graphene with Si, HAADF": MovieSpec(
        kind="graphene", mode="haadf", energy=60.0, sampling=0.08, groups=("trimer",), frames=FRAMES
    ),
}


class Result(NamedTuple):
    """Of several frames: mean IoU of all particles' pixels, particles that were to be found, found, and made up."""

    iou: float
    demanded: int
    detected: int
    spurious: int
    frames: int


class Verdict(NamedTuple):
    """One frame: IoU of marked and true pixels (NaN without particles), particles demanded, detected and made up."""

    iou: float
    demanded: int
    detected: int
    spurious: int


def judge(probability: np.ndarray, truth: np.ndarray, *, sampling: float) -> Verdict:
    """Probability (y, x) of a particle against the true labels (y, x), 0 for none."""
    labels = particles.label(
        probability,
        threshold=THRESHOLD,
        min_area=LEAST_AREA / sampling**2,
        max_hole=MAX_HOLE / sampling**2,
        neck=NECK,
    )
    marked, true = labels > 0, truth > 0
    iou = float((marked & true).sum() / (marked | true).sum()) if true.any() else float("nan")
    found, wanted = int(labels.max()), int(truth.max())
    both = np.zeros((wanted + 1, found + 1))
    np.add.at(both, (truth.ravel(), labels.ravel()), 1)
    asked = both.sum(1) * sampling**2 >= LEAST_AREA
    union = both.sum(1)[:, None] + both.sum(0)[None] - both
    hit = (both / np.maximum(union, 1) >= HIT)[1:, 1:]
    # More than half of a union can be shared with one partner only, so that rows and columns hold one hit at most.
    touched = both[1:, 1:].sum(0) > 0.1 * both[:, 1:].sum(0)
    return Verdict(iou, int(asked[1:].sum()), int((hit.any(1) & asked[1:]).sum()), int((~touched).sum()))


def frames_of(movie: SimulatedMovie, denoiser: nn.Module) -> dict[str, np.ndarray]:
    """The middle frame (1, y, x) of a movie, as it was recorded and behind the denoiser."""
    return {"raw": movie.counts[len(movie.counts) // 2][None].astype(np.float32), "denoised": denoised(movie, denoiser)}


def check(
    network: nn.Module,
    denoiser: nn.Module,
    spec: MovieSpec,
    seeds: Iterable[int],
    *,
    sampling: float,
    doses: list[float],
) -> dict[tuple[float, str], Result]:
    """Results for each dose and kind of frame; each specimen is simulated once and recorded at every dose."""
    verdicts: dict[tuple[float, str], list[Verdict]] = {}
    for seed in seeds:
        clean = simulate_movie(spec, seed)
        truth = clean.masks[len(clean.masks) // 2]
        for dose in doses:
            movie = recorded(clean, dose, seed)
            for kind, frames in frames_of(movie, denoiser).items():
                probability = segment.particle_probability(
                    network, frames, sampling=spec.sampling, model_sampling=sampling, window=None, halo=None, batch=1
                )[0]
                verdicts.setdefault((dose, kind), []).append(judge(probability, truth, sampling=spec.sampling))
    return {key: summed(found) for key, found in verdicts.items()}


def summed(verdicts: list[Verdict]) -> Result:
    """Frames taken together."""
    counts = np.sum([v[1:] for v in verdicts], axis=0)
    with_particles = [v.iou for v in verdicts if not np.isnan(v.iou)]
    mean = float(np.mean(with_particles)) if with_particles else float("nan")
    return Result(mean, int(counts[0]), int(counts[1]), int(counts[2]), len(verdicts))


def table(network: nn.Module, denoiser: nn.Module, *, sampling: float, seeds: Iterable[int], report: Report) -> None:
    """Print the tables of the model card, in Markdown."""
    seeds, doses = tuple(seeds), [30.0, 100.0, 200.0, 1000.0]
    report("| specimen | dose [e⁻/Å²] | raw: IoU | found | made up | denoised: IoU | found | made up |")
    report("|---|---|---|---|---|---|---|---|")
    for name, spec in CASES.items():
        found = check(network, denoiser, spec, seeds, sampling=sampling, doses=doses)
        for dose in doses:
            cells = [
                f"{r.iou:.3f} | {r.detected} of {r.demanded} | {r.spurious}"
                for r in (found[dose, "raw"], found[dose, "denoised"])
            ]
            report(f"| {name} | {dose:.0f} | " + " | ".join(cells) + " |")
    report("\n| nothing but | dose [e⁻/Å²] | particles per frame, raw | denoised |\n|---|---|---|---|")
    for name, spec in EMPTY.items():
        found = check(network, denoiser, spec, seeds, sampling=sampling, doses=doses)
        for dose in doses:
            shares = [found[dose, kind].spurious / found[dose, kind].frames for kind in ("raw", "denoised")]
            report(f"| {name} | {dose:.0f} | {shares[0]:.2f} | {shares[1]:.2f} |")
