"""How well a column network does on simulated movies that it was not trained on; the figures of its model card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from pipeline.networks.adapt import bound
from pipeline.simulate import detector
from pipeline.simulate.movie import MovieSpec, SimulatedMovie, simulate_movie
from pipeline.steps import denoise, neighbours, segment
from pipeline.steps.columns import find_columns, inside
from pipeline.steps.score import Tally, match_columns, merge, score

MARGIN = 1.0  # Å from the border of the view within which columns are not counted
REACH = 0.7  # Å; half the bond of graphene, the closest columns there are
FRAMES = 9  # of a movie, of which the middle one is looked at
DOSES = (50.0, 200.0, 1000.0)
CASES = {
    "Au [110], bright": MovieSpec(),
    "Au [110], dark": MovieSpec(contrast="dark"),
    "Au [100], bright": MovieSpec(zone="100"),
    "Au [100], dark": MovieSpec(zone="100", contrast="dark"),
    "Au [111], bright": MovieSpec(zone="111"),
    "Pt [110], bright": MovieSpec(element="Pt"),
    "Au [110] among off-zone particles": MovieSpec(shape=(320, 320), particles=3, tilts=(0.0, 9.0, 17.0), radius=8.5),
    "MoS2 80 kV, bright": MovieSpec(kind="mos2", energy=80.0, sampling=0.12),
    "MoS2 80 kV, dark": MovieSpec(kind="mos2", energy=80.0, sampling=0.12, contrast="dark"),
    "graphene 80 kV, bright": MovieSpec(kind="graphene", energy=80.0, sampling=0.1),
    "graphene 80 kV, dark": MovieSpec(kind="graphene", energy=80.0, sampling=0.1, contrast="dark"),
    "Au [110], HAADF": MovieSpec(mode="haadf"),
    "WSe2, HAADF": MovieSpec(kind="wse2", mode="haadf", sampling=0.12),
    "graphene, HAADF": MovieSpec(kind="graphene", mode="haadf", energy=60.0, sampling=0.08),
}
EMPTY = {
    "vacuum": MovieSpec(kind="vacuum"),
    "carbon film, 6 Å": MovieSpec(kind="carbon"),
    "carbon film, 20 Å": MovieSpec(kind="carbon", carbon=20.0, carbon_cover=1.0),
}


class Result(NamedTuple):
    """One line of the table: score of the columns, and in how many of the movies the sign was voted right."""

    precision: float
    recall: float
    f1: float
    rms: float
    votes_right: int
    movies: int


def recorded(movie: SimulatedMovie, dose: float, seed: int) -> SimulatedMovie:
    """The same movie taken with another dose [e⁻/Å² per frame]."""
    spec = replace(movie.spec, dose=dose)
    rng = np.random.default_rng([seed, 2, int(dose)])
    counts = detector.record(movie.clean, rng, electrons_per_pixel=dose * movie.sampling**2)
    return replace(movie, counts=counts, spec=spec)


def denoised(movie: SimulatedMovie, denoiser: nn.Module) -> np.ndarray:
    """The middle frame (1, y, x) [electrons] behind the denoiser as it ships, with the true drift in whole pixels."""
    frames = movie.counts.astype(np.float32)
    count = len(frames)
    links = neighbours.FrameLinks(
        np.rint(movie.drift).astype(np.int64), np.ones(count, bool), np.zeros(count, np.int64)
    )
    level = neighbours.measure_level(frames, readout_variance=0.0)
    network = bound(denoiser, frames, links=links, level=level)
    return denoise.denoise(network, frames, [count // 2], links=links, level=level, tile=None, dtype="auto")


def tally_columns(probability: np.ndarray, truth: np.ndarray, *, sampling: float, threshold: float) -> Tally:
    """Found against true columns of one frame; those too thin to be visible are neither demanded nor spurious."""
    shape = probability.shape
    peaks = find_columns(probability, threshold=threshold, min_distance=1.0 / sampling)
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


class Judge(NamedTuple):
    """A column network at its sampling [Å/px] and least probability, behind a denoiser."""

    network: nn.Module
    denoiser: nn.Module
    sampling: float
    threshold: float

    @property
    def options(self) -> dict[str, Any]:
        """What inference is told."""
        return {"model_sampling": self.sampling, "window": None, "halo": None, "batch": 1}

    def case(self, spec: MovieSpec, seeds: Iterable[int], doses: Sequence[float]) -> list[Result]:
        """For each dose the score on the middle frame of one movie per seed, those of mixed contrast left out."""
        tallies: list[list[Tally]] = [[] for _ in doses]
        right, movies = [0] * len(doses), 0
        for seed in seeds:
            movie = simulate_movie(replace(spec, frames=FRAMES, events=4), seed)
            if not movie.polarity:
                continue
            movies += 1
            for index, dose in enumerate(doses):
                image = denoised(recorded(movie, dose, seed), self.denoiser)
                vote = segment.vote_polarity(self.network, image, sampling=movie.sampling, **self.options)
                right[index] += vote == movie.polarity
                probability = self._probability(image, movie, movie.polarity)
                tallies[index].append(
                    tally_columns(
                        probability, movie.columns[FRAMES // 2], sampling=movie.sampling, threshold=self.threshold
                    )
                )
        reached = [score(merge(each)) for each in tallies]
        return [
            Result(r.precision, r.recall, r.f1, r.rms, votes, movies) for r, votes in zip(reached, right, strict=True)
        ]

    def nothing(self, spec: MovieSpec, seeds: Iterable[int], doses: Sequence[float]) -> list[float]:
        """For each dose the columns per frame in movies that hold none, with the sign that the network votes for."""
        found = np.zeros(len(doses))
        seeds = tuple(seeds)
        for seed in seeds:
            movie = simulate_movie(replace(spec, frames=FRAMES), seed)
            for index, dose in enumerate(doses):
                image = denoised(recorded(movie, dose, seed), self.denoiser)
                vote = segment.vote_polarity(self.network, image, sampling=movie.sampling, **self.options)
                probability = self._probability(image, movie, vote)
                peaks = find_columns(probability, threshold=self.threshold, min_distance=1.0 / movie.sampling)
                found[index] += len(peaks.y)
        return [float(value) for value in found / len(seeds)]

    def _probability(self, image: np.ndarray, movie: SimulatedMovie, polarity: int) -> np.ndarray:
        return np.asarray(
            segment.column_probability(self.network, image, sampling=movie.sampling, polarity=polarity, **self.options)[
                0
            ]
        )


def table(judge: Judge, *, seeds: Iterable[int], report: Callable[[str], None]) -> None:
    """Print the tables of the model card, in Markdown."""
    seeds = tuple(seeds)
    report("| specimen | dose [e⁻/Å²] | precision | recall | F1 | RMS error [Å] | sign voted right |")
    report("|---|---|---|---|---|---|---|")
    for name, spec in CASES.items():
        for dose, r in zip(DOSES, judge.case(spec, seeds, DOSES), strict=True):
            figures = f"{r.precision:.3f} | {r.recall:.3f} | {r.f1:.3f} | {r.rms:.3f}"
            report(f"| {name} | {dose:.0f} | {figures} | {r.votes_right} of {r.movies} |")
    report("\n| nothing but | dose [e⁻/Å²] | columns per frame |\n|---|---|---|")
    for kind, spec in EMPTY.items():
        for dose, found in zip(DOSES, judge.nothing(spec, seeds, DOSES), strict=True):
            report(f"| {kind} | {dose:.0f} | {found:.2f} |")


FIGURES = "## Figures"


def write_figures(card: Path, lines: Sequence[str], *, movies: int, threshold: float) -> None:
    """Put the tables into a model card, in the place of those that it had."""
    text = f"""{FIGURES}

{movies} movies of each kind with seeds that nothing was trained on, {FRAMES} frames of 256 × 256 px, the middle
one behind the shipped denoiser as it is (not adapted), true drift in whole pixels. Threshold {threshold}; one-
to-one matching within {REACH} Å; columns of fewer than 3 atoms (particles) or blurred by tilt neither demanded
nor spurious; margin of {MARGIN} Å. Positions are the maxima of the probability, before the fit to the measured
frame and before what that fit finds too faint is dropped.

"""
    old = card.read_text().split(FIGURES)[0].rstrip() if card.exists() else f"# {card.stem}"
    card.write_text(old + "\n\n" + text + "\n".join(lines) + "\n")
