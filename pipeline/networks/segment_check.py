"""How well a column network does on simulated movies that it was not trained on; the figures of its model card."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter
from torch import nn

from pipeline.simulate.movie import MovieSpec, SimulatedMovie, simulate_movie
from pipeline.steps import segment
from pipeline.steps.columns import find_columns, inside
from pipeline.steps.score import Tally, match_columns, merge, score

MARGIN = 1.0  # Å from the border of the view within which columns are not counted
REACH = 0.7  # Å; half the bond of graphene, the closest columns there are
CASES = {
    "Au [110], bright": MovieSpec(),
    "Au [110], dark": MovieSpec(contrast="dark"),
    "Au [100], bright": MovieSpec(zone="100"),
    "Au [100], dark": MovieSpec(zone="100", contrast="dark"),
    "Au [111], bright": MovieSpec(zone="111"),
    "Pt [110], bright": MovieSpec(element="Pt"),
    "MoS2 80 kV, bright": MovieSpec(kind="mos2", energy=80.0, sampling=0.12),
    "MoS2 80 kV, dark": MovieSpec(kind="mos2", energy=80.0, sampling=0.12, contrast="dark"),
    "graphene 80 kV, bright": MovieSpec(kind="graphene", energy=80.0, sampling=0.1),
    "graphene 80 kV, dark": MovieSpec(kind="graphene", energy=80.0, sampling=0.1, contrast="dark"),
    "Au [110], HAADF": MovieSpec(mode="haadf"),
    "WSe2, HAADF": MovieSpec(kind="wse2", mode="haadf", sampling=0.12),
    "graphene, HAADF": MovieSpec(kind="graphene", mode="haadf", energy=60.0, sampling=0.08),
}
EMPTY = {kind: MovieSpec(kind=kind) for kind in ("vacuum", "carbon")}


class Result(NamedTuple):
    """One line of the table: share of movies whose sign was voted right, and the score of the columns."""

    precision: float
    recall: float
    rms: float
    votes_right: int
    movies: int


def stand_in(movie: SimulatedMovie, *, frames: int, width: float) -> np.ndarray:
    """A plain denoiser: the mean of the middle frame and its shifted neighbours, then a Gaussian of `width` [Å].

    It takes the true drift and smears what the specimen does; a real denoiser should not be worse.
    """
    middle = len(movie.counts) // 2
    total = np.zeros(movie.counts.shape[1:])
    for index in range(middle - frames // 2, middle + frames // 2 + 1):
        shift = np.rint(movie.drift[middle] - movie.drift[index]).astype(int)
        total += np.roll(movie.counts[index], tuple(shift), (0, 1))
    return np.asarray(gaussian_filter(total / frames, width / movie.sampling), dtype=np.float32)


def tally_columns(probability: np.ndarray, movie: SimulatedMovie, frame: int, *, threshold: float) -> Tally:
    """Found against true columns of one frame; those too thin to be visible are neither demanded nor spurious."""
    sampling, shape = movie.sampling, movie.spec.shape
    peaks = find_columns(probability, threshold=threshold, min_distance=1.0 / sampling)
    truth = movie.columns[frame]
    true = np.column_stack([truth["y"], truth["x"]])
    found = np.column_stack([peaks.y, peaks.x])
    match = match_columns(found * sampling, true * sampling, max_distance=REACH)
    asked = truth["visible"] & inside(truth["y"], truth["x"], shape=shape, margin=MARGIN / sampling)
    counted = asked[match.true]
    off = ((found[match.detected] - true[match.true]) * sampling)[counted]
    spurious = found[match.spurious]
    extra = int(inside(spurious[:, 0], spurious[:, 1], shape=shape, margin=MARGIN / sampling).sum())
    matched = int(counted.sum())
    sums = float(off[:, 0].sum()), float(off[:, 1].sum()), float(np.square(off).sum())
    return Tally(matched + extra, int(asked.sum()), matched, 0, *sums, 0, 1)


def check_case(network: nn.Module, spec: MovieSpec, seeds: Iterable[int], *, sampling: float) -> Result:
    """Score of the network, which works at `sampling`, on the middle frame of one movie for each seed."""
    options: dict[str, Any] = {"model_sampling": sampling, "window": None, "halo": None, "batch": 1}
    tallies, right, movies = [], 0, 0
    for seed in seeds:
        movie = simulate_movie(replace(spec, frames=7, events=4), seed)
        if not movie.polarity:
            continue
        image = stand_in(movie, frames=5, width=0.35)[None]
        movies += 1
        right += segment.vote_polarity(network, image, sampling=movie.sampling, **options) == movie.polarity
        probability = segment.column_probability(
            network, image, sampling=movie.sampling, polarity=movie.polarity, **options
        )[0]
        tallies.append(tally_columns(probability, movie, 3, threshold=0.5))
    reached = score(merge(tallies))
    return Result(reached.precision, reached.recall, reached.rms, right, movies)


def columns_in_noise(network: nn.Module, spec: MovieSpec, seeds: Iterable[int], *, sampling: float) -> float:
    """Columns per frame and sign that the network sees in movies without any."""
    options: dict[str, Any] = {"model_sampling": sampling, "window": None, "halo": None, "batch": 1}
    found = []
    for seed in seeds:
        movie = simulate_movie(replace(spec, frames=7), seed)
        for frames, width in ((1, 0.35), (5, 0.2), (5, 0.35), (5, 0.6)):
            image = stand_in(movie, frames=frames, width=width)[None]
            for polarity in (1, -1):
                probability = segment.column_probability(
                    network, image, sampling=movie.sampling, polarity=polarity, **options
                )[0]
                found.append(len(find_columns(probability, threshold=0.5, min_distance=1.0 / movie.sampling).y))
    return float(np.mean(found))


def table(network: nn.Module, *, sampling: float, seeds: Iterable[int], report: Callable[[str], None]) -> None:
    """Print the tables of the model card, in Markdown."""
    seeds = tuple(seeds)
    report("| specimen | dose [e-/Å²] | precision | recall | RMS error [Å] | sign voted right |")
    report("|---|---|---|---|---|---|")
    for name, spec in CASES.items():
        for dose in (200.0, 1000.0):
            r = check_case(network, replace(spec, dose=dose), seeds, sampling=sampling)
            report(
                f"| {name} | {dose:.0f} | {r.precision:.3f} | {r.recall:.3f} | {r.rms:.3f} | "
                f"{r.votes_right} of {r.movies} |"
            )
    report("\n| nothing but | dose [e-/Å²] | columns per frame |\n|---|---|---|")
    for kind, spec in EMPTY.items():
        for dose in (50.0, 200.0, 1000.0):
            found = columns_in_noise(network, replace(spec, dose=dose), seeds, sampling=sampling)
            report(f"| {kind} | {dose:.0f} | {found:.3f} |")
