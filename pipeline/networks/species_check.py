"""How right a species network is on images whose answer is known: confusion of classes, vacancy counts, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.networks.species_data import recorded, scene
from pipeline.networks.species_spec import SpeciesSpec
from pipeline.simulate.movie import MovieSpec, simulate_movie
from pipeline.steps.columns import inside
from pipeline.steps.score import match_columns
from pipeline.steps.species import SpeciesModel, classify, vacancies

DISTANCE = 0.7  # Å; a found site farther from a true one is another
MARGIN = 1.0  # Å; sites nearer to the edge of an image are not judged
SLACK = 0.5  # Å; a site at the margin may be found on its other side
THRESHOLD = 0.5
NONE = (np.zeros(0), np.zeros(0))


class Image(NamedTuple):
    """Planes (plane, y, x), their sampling [Å/px], and the truth: sites (site, 2) [px], names (site,)."""

    planes: np.ndarray
    sampling: float
    sites: np.ndarray
    names: np.ndarray


class Judgement(NamedTuple):
    """confusion (true class and "none", found class and "lost"); vacancies (image, 3): true, found, standard error.

    probabilities (site, class) and truth (site,) of all sites that were found and are some.
    """

    classes: tuple[str, ...]
    confusion: np.ndarray
    vacancies: np.ndarray
    probabilities: np.ndarray
    truth: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of the true sites that were found and named right."""
        return float(np.trace(self.confusion[:-1, :-1]) / max(self.confusion[:-1].sum(), 1))

    @property
    def recall(self) -> np.ndarray:
        """Share of the true sites of each class that were found and named right; NaN without any."""
        total = self.confusion[:-1].sum(1)
        return np.where(total > 0, np.diag(self.confusion)[:-1] / np.maximum(total, 1), np.nan)

    @property
    def precision(self) -> np.ndarray:
        """Share of the found sites of each class that are of it; NaN without any."""
        total = self.confusion[:, :-1].sum(0)
        return np.where(total > 0, np.diag(self.confusion)[:-1] / np.maximum(total, 1), np.nan)

    @property
    def balanced(self) -> float:
        """Mean recall of the classes that occur."""
        return float(np.nanmean(self.recall))

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall of each class; NaN for a class that neither occurs nor was found."""
        hits = np.diag(self.confusion)[:-1]
        total = self.confusion[:-1].sum(1) + self.confusion[:, :-1].sum(0)
        return np.where(total > 0, 2 * hits / np.maximum(total, 1), np.nan)

    def counted(self, tolerance: float) -> float:
        """Share of the images whose vacancy count, rounded, is within a tolerance of the truth."""
        true, found, _ = self.vacancies.T
        return float((np.abs(np.rint(found) - true) <= tolerance).mean())

    def covered(self, sigmas: float) -> float:
        """Share of the images whose true vacancy count lies within this many standard errors (half an atom more)."""
        true, found, error = self.vacancies.T
        return float((np.abs(found - true) <= sigmas * error + 0.5).mean())


def judge(model: SpeciesModel, images: Sequence[Image], *, threshold: float = THRESHOLD) -> Judgement:
    """What a species network finds in images, beside the truth."""
    size = len(model.classes)
    confusion = np.zeros((size + 1, size + 1), int)
    counts, probabilities, truth = [], [], []
    for image in images:
        found = classify(
            model,
            image.planes,
            columns=NONE,
            sampling=image.sampling,
            threshold=threshold,
            margin=MARGIN - SLACK,
            windowing=(None, 1),
        ).sites
        shape = (image.planes.shape[1], image.planes.shape[2])
        kept = inside(image.sites[:, 0], image.sites[:, 1], shape=shape, margin=MARGIN / image.sampling)
        within = inside(found.y, found.x, shape=shape, margin=MARGIN / image.sampling)
        match = match_columns(np.column_stack([found.y, found.x]), image.sites, max_distance=DISTANCE / image.sampling)
        classes = np.array([model.classes.index(name) for name in image.names], int)
        name = found.probabilities.argmax(1) if len(found.y) else np.zeros(0, int)
        judged = kept[match.true]
        np.add.at(confusion, (classes[match.true[judged]], name[match.detected[judged]]), 1)
        lost = match.lost[kept[match.lost]]
        np.add.at(confusion, (classes[lost], np.full(len(lost), size)), 1)
        spurious = match.spurious[within[match.spurious]]
        np.add.at(confusion, (np.full(len(spurious), size), name[spurious]), 1)
        count, error = vacancies(found.probabilities[within], missing=model.missing)
        # Of the sites at the margin those are true that were found inside it.
        counted = np.concatenate([match.true[within[match.detected]], lost])
        counts.append((float(np.array(model.missing)[classes[counted]].sum()), count, error))
        probabilities.append(found.probabilities[match.detected[judged]])
        truth.append(classes[match.true[judged]])
    joined = np.concatenate(probabilities), np.concatenate(truth)
    return Judgement(model.classes, confusion, np.array(counts), *joined)


def drawn(spec: SpeciesSpec, seeds: Sequence[int], *, dose: float) -> list[Image]:
    """Images as a network of this specification was trained on, of specimens that it was not."""
    images = []
    for seed in seeds:
        rng = np.random.default_rng([spec.seed, 77, seed])
        one = scene(spec, rng)
        planes = recorded(spec, one, rng, dose=dose)
        places = one.specimen.sites / one.sampling + one.size / 2
        names = np.array(spec.classes)[one.specimen.classes]
        within = inside(places[:, 0], places[:, 1], shape=(one.size, one.size), margin=0.0)
        images.append(Image(planes, one.sampling, places[within], names[within]))
    return images


def simulated(movie: MovieSpec, seeds: Sequence[int]) -> list[Image]:
    """First frames of movies of the simulator, one for each seed."""
    images = []
    for seed in seeds:
        made = simulate_movie(movie, seed)
        counts = made.counts[0]
        sites = made.sites[0]
        places = np.column_stack([sites["y"], sites["x"]])
        images.append(Image(counts if counts.ndim == 3 else counts[None], movie.sampling, places, sites["species"]))
    return images


def table(judged: Judgement) -> str:
    """Confusion, recall and precision of a judgement as lines of text."""
    names = [*judged.classes, "none"]
    lines = ["true \\ found  " + " ".join(f"{name:>7}" for name in [*judged.classes, "lost"]) + "   recall"]
    for row, name in enumerate(names):
        recall = f"{judged.recall[row]:9.4f}" if row < len(judged.classes) else ""
        lines.append(f"{name:>12}  " + " ".join(f"{value:7d}" for value in judged.confusion[row]) + recall)
    lines.append("   precision  " + " ".join(f"{value:7.4f}" for value in judged.precision))
    return "\n".join(lines)
