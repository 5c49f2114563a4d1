"""How far classes, probabilities and outlines agree with the truth: confusion, calibration, overlap of particles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

MISSED, SPURIOUS = "(nothing)", "(nothing there)"
"""Class of what was not found, and true class of what is found where nothing is."""


class Confusion(NamedTuple):
    """How often what is of one class was called another: counts (true, found), with the names of both axes."""

    true: tuple[str, ...]
    found: tuple[str, ...]
    counts: NDArray[np.int64]


def confusion(true: Sequence[str], found: Sequence[str]) -> Confusion:
    """Counts of pairs of names; the two special names come last, all others sorted."""

    def ordered(names: Sequence[str], special: str) -> tuple[str, ...]:
        kinds = sorted({str(name) for name in names} - {special})
        return (*kinds, special) if special in set(names) else tuple(kinds)

    rows, columns = ordered(true, SPURIOUS), ordered(found, MISSED)
    counts = np.zeros((len(rows), len(columns)), np.int64)
    np.add.at(counts, ([rows.index(str(n)) for n in true], [columns.index(str(n)) for n in found]), 1)
    return Confusion(rows, columns, counts)


def accuracy(table: Confusion, *, absent: Sequence[str] = ()) -> float:
    """Share of what is there that was found and called right; NaN of nothing.

    absent: true classes of empty places (0S); those are right where nothing was found. What was found where nothing is
    does not enter: it is counted as spurious.
    """
    right = total = 0
    for row, name in enumerate(table.true):
        if name == SPURIOUS:
            continue
        total += int(table.counts[row].sum())
        wanted = {name, MISSED} if name in absent else {name}
        right += int(sum(table.counts[row, column] for column, other in enumerate(table.found) if other in wanted))
    return right / total if total else float("nan")


class Calibration(NamedTuple):
    """Stated probabilities against what came true, in bins (bin,): mean probability, share that came true and its
    standard error, number; NaN where a bin is empty. error: expected calibration error, Σ number · |share − mean| / Σ
    number."""

    probability: Floats
    share: Floats
    share_error: Floats
    number: NDArray[np.int64]
    error: float


def calibration(probability: NDArray[np.floating], true: NDArray[np.bool_], *, bins: int) -> Calibration:
    """Reliability of probabilities (case,) of events that came true or not (case,), in bins of equal width.

    NaN probabilities are left out. Naeini et al., AAAI 2015.
    """
    known = np.isfinite(probability)
    stated, came = np.asarray(probability, np.float64)[known], np.asarray(true, bool)[known]
    place = np.clip((stated * bins).astype(np.intp), 0, bins - 1)
    number = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(place, stated, bins) / number
        share = np.bincount(place, came, bins) / number
        spread = np.sqrt(share * (1 - share) / number)
    off = float(np.nansum(number * np.abs(share - mean)) / len(stated)) if len(stated) else float("nan")
    return Calibration(mean, share, spread, number.astype(np.int64), off)


class Overlap(NamedTuple):
    """Particles of one frame: partners found[i] and true[i] (labels) and their intersection over union (pair,); labels
    without partner; pixels in both, and in either, whatever the particle."""

    found: Indices
    true: Indices
    iou: Floats
    spurious: Indices
    lost: Indices
    both: int
    either: int


def match_particles(found: NDArray[np.integer], true: NDArray[np.integer], *, least: float) -> Overlap:
    """Pair particles of two label images (y, x), 0 outside, so that the total intersection over union is greatest.

    Pairs that overlap by less than `least` [IoU] are none.
    """
    first, second = (np.asarray(labels).ravel().astype(np.int64) for labels in (found, true))
    names = [np.unique(labels[labels > 0]) for labels in (first, second)]
    places = [np.searchsorted(kinds, labels) for kinds, labels in zip(names, (first, second), strict=True)]
    inside = (first > 0) & (second > 0)
    both = np.zeros((len(names[0]), len(names[1])))
    np.add.at(both, (places[0][inside], places[1][inside]), 1)
    area = [
        np.bincount(p[labels > 0], minlength=len(n))
        for p, labels, n in zip(places, (first, second), names, strict=True)
    ]
    iou = both / np.maximum(area[0][:, None] + area[1][None] - both, 1)
    rows, columns = linear_sum_assignment(-iou)
    good = iou[rows, columns] >= max(least, 1e-12)
    rows, columns = rows[good], columns[good]
    return Overlap(
        names[0][rows],
        names[1][columns],
        iou[rows, columns],
        np.setdiff1d(names[0], names[0][rows]),
        np.setdiff1d(names[1], names[1][columns]),
        int(inside.sum()),
        int(((first > 0) | (second > 0)).sum()),
    )


def missing_atoms(species: Sequence[str]) -> int:
    """Atoms that are missing from sites: a "1S" misses one, a "0S" two if S comes in pairs, a "0C" one.

    An element comes in pairs where "1X" or "2X" is among the names.
    """
    names = [str(name) for name in species]
    paired = {name[1:] for name in names if name[:1] in ("1", "2")}
    empty = [name[1:] for name in names if name[:1] == "0"]
    return sum(name[:1] == "1" for name in names) + sum(2 if element in paired else 1 for element in empty)


class Roc(NamedTuple):
    """How well a number that is small for wanted cases tells them from others: rates (threshold,) at which others and
    wanted are called wanted if they are at most the threshold (threshold,), rising; area under that curve and its
    standard error (Hanley and McNeil, Radiology 143 (1982) 29); best: threshold at which the rates differ
    most, between two numbers that occur."""

    false: Floats
    true: Floats
    threshold: Floats
    area: float
    error: float
    best: float


def roc(wanted: NDArray[np.floating], others: NDArray[np.floating]) -> Roc:
    """Receiver-operating curve of numbers of wanted cases and of others (case,); NaN counts as infinitely large."""
    one, other = (np.sort(np.nan_to_num(np.asarray(v, np.float64), nan=np.inf)) for v in (wanted, others))
    threshold = np.unique(np.concatenate([one, other]))
    true = np.searchsorted(one, threshold, side="right") / max(len(one), 1)
    false = np.searchsorted(other, threshold, side="right") / max(len(other), 1)
    below, tied = (np.searchsorted(other, one, side=side) for side in ("left", "right"))
    area = float(1 - (below + tied).mean() / 2 / len(other)) if len(one) and len(other) else float("nan")
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (len(one) - 1) * (first - area**2) + (len(other) - 1) * (second - area**2)
    error = float(np.sqrt(max(variance, 0) / max(len(one) * len(other), 1)))
    return Roc(false, true, threshold, area, error, _parting(threshold, true - false))


def _parting(threshold: Floats, gain: Floats) -> float:
    """Geometric middle between the last threshold of the greatest gain and the next number, where there is one."""
    if not len(threshold) or not np.isfinite(threshold[0]):
        return float("nan")
    last = int(np.flatnonzero((gain >= gain.max() - 1e-12) & np.isfinite(threshold))[-1])
    after = threshold[min(last + 1, len(threshold) - 1)]
    return float(np.sqrt(threshold[last] * after)) if np.isfinite(after) else float(threshold[last])
