"""The numbers of a run that a report shows, from one walk over its columns in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from pipeline.results.history import runs_of
from pipeline.results.open import row_batches, values
from schemas.conventions import INTERPRETABLE, STATUS, SUPPORTED

PROBABILITY_EDGES = np.linspace(0.0, 1.0, 51)
ERROR_EDGES = np.concatenate([[0.0], np.geomspace(1e-3, 2.0, 120), [np.inf]])
"""Edges [Å] of the histogram of standard errors: fine enough for its quantiles, coarse enough to plot."""
DIAMETER_EDGES = np.geomspace(3.0, 3e4, 161)
"""Edges [Å] of the histogram of diameters of particles."""
RATIO_EDGES = np.geomspace(1.0, 1e3, 61)
"""Edges of the histogram of Fourier ratios."""


@dataclass(frozen=True)
class FrameSeries:
    """What /frames holds, as plain arrays (time,); counts are NaN where nothing was computed.

    What runs of before particles do not hold is NaN throughout.
    """

    time: np.ndarray
    status: np.ndarray
    reason: np.ndarray
    drift: np.ndarray
    drift_error: np.ndarray
    columns: np.ndarray
    electrons: np.ndarray
    dose: np.ndarray
    snr: np.ndarray
    saturated: np.ndarray
    species: dict[str, np.ndarray]
    devices: dict[str, int]
    denoisers: dict[str, int]
    particles: np.ndarray
    vacancies: np.ndarray
    vacancies_error: np.ndarray
    ratio: np.ndarray
    interpretable: np.ndarray

    @property
    def measured(self) -> np.ndarray:
        """Mask of the frames that were processed."""
        return self.status == STATUS["measured"]


@dataclass
class ColumnSummary:
    """Histograms over all columns."""

    rows: int = 0
    probability: np.ndarray = field(default_factory=lambda: np.zeros(len(PROBABILITY_EDGES) - 1, dtype=np.int64))
    error_y: np.ndarray = field(default_factory=lambda: np.zeros(len(ERROR_EDGES) - 1, dtype=np.int64))
    error_x: np.ndarray = field(default_factory=lambda: np.zeros(len(ERROR_EDGES) - 1, dtype=np.int64))
    supported: int | None = None

    def median_error(self) -> float:
        """Median standard error of a coordinate [Å], to the width of a bin; NaN without columns."""
        counts = self.error_y + self.error_x
        if not counts.sum():
            return float("nan")
        middle = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
        return float(np.sqrt(max(ERROR_EDGES[middle], 1e-4) * min(ERROR_EDGES[middle + 1], 1e3)))


@dataclass
class ParticleSummary:
    """Histograms over all particles: equivalent diameter [Å], and Fourier ratio of those that have one."""

    rows: int = 0
    diameter: np.ndarray = field(default_factory=lambda: np.zeros(len(DIAMETER_EDGES) - 1, dtype=np.int64))
    ratio: np.ndarray = field(default_factory=lambda: np.zeros(len(RATIO_EDGES) - 1, dtype=np.int64))
    interpretable: int = 0


@dataclass(frozen=True)
class Statistics:
    """Spread of one series over the measured frames."""

    name: str
    units: str
    least: float
    median: float
    mean: float
    most: float


def frame_series(run: xr.DataTree) -> FrameSeries:
    """All of /frames that a report draws."""
    counts = values(run, "frames/column_count").astype(float)
    classes = [str(label) for label in values(run, "frames/species_class")]
    per_class = values(run, "frames/species_count").astype(float)
    per_class[per_class < 0] = np.nan
    status = values(run, "frames/status")
    measured = status == STATUS["measured"]
    return FrameSeries(
        time=values(run, "frames/time").astype(float),
        status=status,
        reason=values(run, "frames/reason").astype(object),
        drift=np.stack([values(run, "frames/drift_y"), values(run, "frames/drift_x")], axis=1),
        drift_error=np.stack([values(run, "frames/drift_y_err"), values(run, "frames/drift_x_err")], axis=1),
        columns=np.where((counts < 0) | ~measured, np.nan, counts),
        electrons=values(run, "frames/mean_electrons").astype(float),
        dose=values(run, "frames/dose").astype(float),
        snr=values(run, "frames/snr").astype(float),
        saturated=values(run, "frames/saturated_fraction").astype(float),
        species={label: per_class[:, i] for i, label in enumerate(classes)},
        devices=_tally(values(run, "frames/device")[measured]),
        denoisers=_tally(values(run, "frames/denoiser")[measured]),
        particles=_known(run, "particle_count", measured),
        vacancies=_known(run, "vacancy_count", measured),
        vacancies_error=_known(run, "vacancy_count_err", measured),
        ratio=_known(run, "fourier_ratio", measured),
        interpretable=_known(run, "interpretable", measured),
    )


def _known(run: xr.DataTree, name: str, measured: np.ndarray) -> np.ndarray:
    """A variable of /frames with NaN where it is missing."""
    if name not in run["frames"].data_vars:
        return np.full(len(measured), np.nan)
    numbers = values(run, f"frames/{name}").astype(float)
    return np.where(measured & (numbers >= 0), numbers, np.nan)


def column_summary(run: xr.DataTree) -> ColumnSummary:
    """Histograms over /columns, a million rows at a time; empty before the run is collected."""
    summary = ColumnSummary()
    if "columns" not in run.children:
        return summary
    for batch in row_batches(run):
        summary.rows += batch.sizes["column"]
        summary.probability += np.histogram(batch["probability"].values, PROBABILITY_EDGES)[0]
        summary.error_y += np.histogram(batch["y_err"].values, ERROR_EDGES)[0]
        summary.error_x += np.histogram(batch["x_err"].values, ERROR_EDGES)[0]
        if "supported" in batch:  # runs of earlier versions have none
            summary.supported = (summary.supported or 0) + int((batch["supported"].values == SUPPORTED["yes"]).sum())
    return summary


def particle_summary(run: xr.DataTree) -> ParticleSummary:
    """Histograms over /particles, a million rows at a time; empty before the run is collected, and in older runs."""
    summary = ParticleSummary()
    if "particles" not in run.children:
        return summary
    for batch in row_batches(run, row="particle"):
        summary.rows += batch.sizes["particle"]
        summary.diameter += np.histogram(batch["equivalent_diameter"].values, DIAMETER_EDGES)[0]
        summary.ratio += np.histogram(batch["fourier_ratio"].values, RATIO_EDGES)[0]
        summary.interpretable += int((batch["interpretable"].values == INTERPRETABLE["yes"]).sum())
    return summary


def statistics(series: FrameSeries) -> list[Statistics]:
    """The table of per-frame numbers: least, median, mean and most over the measured frames."""
    measured = series.measured
    distance = np.hypot(*series.drift.T)
    step = np.hypot(*np.diff(series.drift, axis=0, prepend=series.drift[:1]).T)
    rows: Iterable[tuple[str, str, np.ndarray]] = (
        ("columns", "per frame", series.columns),
        ("particles", "per frame", series.particles if np.nansum(series.particles) else np.full(1, np.nan)),
        ("missing atoms", "per frame", series.vacancies),
        ("Fourier ratio", "", series.ratio),
        ("dose", "e⁻/Å² per frame", series.dose),
        ("electrons", "per pixel", series.electrons),
        ("signal-to-noise ratio", "", series.snr),
        ("drift since the first frame", "Å", distance),
        ("drift from frame to frame", "Å", step),
        ("standard error of the drift", "Å", np.hypot(*series.drift_error.T)),
        ("saturated pixels", "share", series.saturated),
    )
    return [
        _spread(name, units, numbers[measured] if len(numbers) == len(measured) else numbers)
        for name, units, numbers in rows
    ]


def flagged(series: FrameSeries) -> list[tuple[int, int, str, str]]:
    """Frames that were not measured, consecutive ones of one reason joined: (start, stop, status, reason)."""
    words = {value: word for word, value in STATUS.items()}
    groups: dict[tuple[int, str], list[int]] = {}
    for index in np.flatnonzero(~series.measured):
        groups.setdefault((int(series.status[index]), str(series.reason[index])), []).append(int(index))
    found = [
        (start, stop, words.get(status, str(status)), reason)
        for (status, reason), indices in groups.items()
        for start, stop in runs_of(indices)
    ]
    return sorted(found)


def _tally(labels: np.ndarray) -> dict[str, int]:
    return dict(sorted(Counter(map(str, labels)).items()))


def _spread(name: str, units: str, numbers: np.ndarray) -> Statistics:
    good = numbers[np.isfinite(numbers)]
    if not good.size:
        return Statistics(name, units, *([float("nan")] * 4))
    return Statistics(name, units, *(float(f(good)) for f in (np.min, np.median, np.mean, np.max)))
