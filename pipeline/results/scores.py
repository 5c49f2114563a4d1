"""Parts of an evaluation beside finding columns: species, vacancies, particles, probabilities, the bound on errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from pipeline.results.open import provenance, values
from pipeline.results.truth import Truth
from pipeline.steps.agreement import (
    MISSED,
    SPURIOUS,
    Calibration,
    Confusion,
    accuracy,
    calibration,
    confusion,
    match_particles,
    missing_atoms,
)
from pipeline.steps.bound import cramer_rao
from pipeline.steps.columns import inside
from pipeline.steps.score import match_columns
from schemas.conventions import UNKNOWN_SPECIES

BINS = 10
ON_ZONE, TILTED = 1.0, 3.0  # degrees
BOUND_FRAMES = 12  # at most, spread over the movie: the bound of a frame of 100 columns takes 0.2 s


class FrameMatch(NamedTuple):
    """One frame: rows of /columns and indices of the truth that belong together, rows that are spurious, true columns
    that are lost; off (pair, 2): found minus true, and spurious_at (spurious, 2): y, x on the detector, both [Å]."""

    frame: int
    rows: np.ndarray
    true: np.ndarray
    spurious: np.ndarray
    lost: np.ndarray
    off: np.ndarray
    spurious_at: np.ndarray


class SpeciesScore(NamedTuple):
    """confusion of sites (or, without sites, of columns); accuracy: share of them called right, empty ones where
    nothing was found; vacancy_bias, vacancy_rms: found minus true missing atoms per frame, None without such a count;
    vacancy_within_one: share of frames in which they differ by at most one."""

    confusion: Confusion
    accuracy: float
    vacancy_bias: float | None = None
    vacancy_rms: float | None = None
    vacancy_within_one: float | None = None


class InterpretableScore(NamedTuple):
    """Of the particles found that are truly on zone (at most 1° off) and tilted (3° or more): share called
    interpretable, None without such particles, and how many there are."""

    on_zone: float | None
    tilted: float | None
    on_zone_count: int
    tilted_count: int


class ParticleScore(NamedTuple):
    """iou: of the pixels of all particles together; particle_iou: mean of those that were found; detected: share of the
    true ones found (IoU at least 0.5); precision: share of found ones that are true; frames: compared."""

    iou: float
    particle_iou: float
    detected: float
    precision: float
    frames: int


def match_frame(columns: xr.Dataset, truth: Truth, certain: np.ndarray, frame: int, max_distance: float) -> FrameMatch:
    """Match one frame on the detector; what lies on an uncertain true column is left out.

    columns: rows of the whole run with y_detector, x_detector [Å], sorted by frame; certain (column,): true columns
    that must be found.
    """
    start, stop = np.searchsorted(columns["frame"].values, [frame, frame + 1])
    found = np.stack([columns[name].values[start:stop] for name in ("y_detector", "x_detector")], axis=1)
    here = np.flatnonzero(truth.frame == frame)
    true = np.stack([truth.y[here], truth.x[here]], axis=1) * truth.sampling
    demanded, doubtful = here[certain[here]], true[~certain[here]]
    wanted = true[certain[here]]
    spare = match_columns(found, wanted, max_distance=max_distance).spurious
    on_doubtful = match_columns(found[spare], doubtful, max_distance=max_distance).detected
    keep = np.delete(np.arange(len(found)), spare[on_doubtful])
    match = match_columns(found[keep], wanted, max_distance=max_distance)
    rows = keep[match.detected]
    return FrameMatch(
        frame,
        rows + start,
        demanded[match.true],
        keep[match.spurious] + start,
        demanded[match.lost],
        found[rows] - wanted[match.true],
        found[keep[match.spurious]],
    )


def score_calibration(columns: xr.Dataset, matches: Sequence[FrameMatch]) -> Calibration | None:
    """Stated probabilities of columns against whether they are columns; None where nothing was found."""
    rows = np.concatenate([np.concatenate([m.rows, m.spurious]) for m in matches]) if matches else np.empty(0, int)
    if not len(rows):
        return None
    true = np.concatenate([np.repeat([True, False], [len(m.rows), len(m.spurious)]) for m in matches])
    return calibration(columns["probability"].values[rows.astype(int)], true, bins=BINS)


def score_bound(truth: Truth, matches: Sequence[FrameMatch], *, radius: float) -> tuple[float, np.ndarray] | None:
    """RMS of the Cramér-Rao bound of matched columns [Å], y and x together, and the error of each in multiples of its
    own bound (pair,); None where the truth holds no clean image.

    At most 12 frames, spread over those that were matched. radius [Å] as in ``cramer_rao``.
    """
    if truth.clean is None or not truth.electrons:
        return None
    some = [m for m in matches if len(m.rows)]
    some = [some[i] for i in np.unique(np.linspace(0, len(some) - 1, BOUND_FRAMES).astype(int))] if some else []
    bounds, ratios = [], []
    for match in some:
        here = np.flatnonzero(truth.frame == match.frame)
        found = cramer_rao(
            truth.clean[match.frame].astype(float) * truth.electrons,
            truth.y[here],
            truth.x[here],
            readout=truth.readout,
            radius=radius / truth.sampling,
        )
        own = found[np.searchsorted(here, match.true)] * truth.sampling
        seen = np.isfinite(own).all(1)
        bounds.append(own[seen])
        ratios.append(np.sqrt(np.square(match.off[seen]).sum(1) / np.square(own[seen]).sum(1)))
    if not bounds or not sum(map(len, bounds)):
        return None
    return float(np.sqrt(np.square(np.concatenate(bounds)).sum(1).mean())), np.concatenate(ratios)


def score_species(
    run: xr.DataTree, columns: xr.Dataset, truth: Truth, matches: Sequence[FrameMatch], *, max_distance: float,
    margin: float,
) -> SpeciesScore | None:  # fmt: skip
    """Which species columns (or lattice sites) were called; None where the run or the truth names none."""
    named = np.array([str(name) for name in columns["species"].values])
    if truth.species is None or not len(named) or (named == UNKNOWN_SPECIES).all():
        return None
    if not truth.has_sites:
        table = confusion(*_pairs_of_columns(named, truth, matches))
        return SpeciesScore(table, accuracy(table))
    true, found, lacking = [], [], []
    view = float(provenance(run).get("settings", {}).get("columns", {}).get("margin", 1.0))
    for match in matches:
        one, other, missing = _pairs_of_sites(columns, named, truth, match.frame, (max_distance, margin, view))
        true += one
        found += other
        lacking.append(missing)
    table = confusion(true, found)
    empty = [name for name in table.true if name.startswith("0")]
    share = accuracy(table, absent=empty)
    counts = _vacancies(run, [match.frame for match in matches])
    if counts is None:
        return SpeciesScore(table, share)
    off = counts - np.array(lacking)
    off = off[counts >= 0]
    if not len(off):
        return SpeciesScore(table, share)
    within = float(np.mean(np.abs(off) <= 1))
    return SpeciesScore(table, share, float(off.mean()), float(np.sqrt(np.mean(off**2))), within)


def _pairs_of_columns(named: np.ndarray, truth: Truth, matches: Sequence[FrameMatch]) -> tuple[list[str], list[str]]:
    true, found = [], []
    species = np.asarray(truth.species).astype(str)
    for match in matches:
        true += [*species[match.true], *species[match.lost], *[SPURIOUS] * len(match.spurious)]
        found += [*named[match.rows], *[MISSED] * len(match.lost), *named[match.spurious]]
    return true, found


def _pairs_of_sites(
    columns: xr.Dataset, named: np.ndarray, truth: Truth, frame: int, limits: tuple[float, float, float]
) -> tuple[list[str], list[str], int]:
    """True and found names at the sites of a frame, and how many atoms are missing from those that a run counts.

    limits [Å]: greatest distance of a column from its site; margin of sites that are judged; that of those counted.
    """
    max_distance, margin, view = limits
    if truth.site_frame is None or truth.site_y is None or truth.site_x is None or truth.site_species is None:
        return [], [], 0
    start, stop = np.searchsorted(columns["frame"].values, [frame, frame + 1])
    found = np.stack([columns[name].values[start:stop] for name in ("y_detector", "x_detector")], axis=1)
    here = np.flatnonzero(truth.site_frame == frame)
    y, x, species = truth.site_y[here], truth.site_x[here], truth.site_species[here].astype(str)
    well = inside(y, x, shape=truth.shape, margin=margin / truth.sampling)
    places = np.stack([y, x], axis=1) * truth.sampling
    match = match_columns(found, places, max_distance=max_distance)
    partner = np.full(len(here), -1)
    partner[match.true] = match.detected
    names = [MISSED if p < 0 else str(named[start + p]) for p in partner[well]]
    counted = inside(y, x, shape=truth.shape, margin=view / truth.sampling)
    return [str(name) for name in species[well]], names, missing_atoms([str(name) for name in species[counted]])


def _vacancies(run: xr.DataTree, frames: Sequence[int]) -> np.ndarray | None:
    if "vacancy_count" not in run["frames"].to_dataset():
        return None
    counts = values(run, "frames/vacancy_count")[list(frames)].astype(float)
    return counts if (counts >= 0).any() else None


def score_particles(run: xr.DataTree, truth: Truth, frames: Sequence[int]) -> ParticleScore | None:
    """Labels of the run against the true masks; None where either is missing (images.save: labels keeps them)."""
    if truth.masks is None or "images" not in run.children or "labels" not in run["images"].children:
        return None
    labels = run["images/labels/s0"].to_dataset()["labels"]
    both = either = true = found = matched = 0
    ious: list[float] = []
    for frame in frames:
        overlap = match_particles(
            np.nan_to_num(labels[frame].values).astype(np.int64), truth.masks[frame].astype(np.int64), least=0.5
        )
        both, either = both + overlap.both, either + overlap.either
        matched += len(overlap.iou)
        found += len(overlap.iou) + len(overlap.spurious)
        true += len(overlap.iou) + len(overlap.lost)
        ious += overlap.iou.tolist()
    nan = float("nan")
    return ParticleScore(
        both / either if either else nan,
        float(np.mean(ious)) if ious else nan,
        matched / true if true else nan,
        matched / found if found else nan,
        len(frames),
    )


def score_interpretable(run: xr.DataTree, truth: Truth, frames: Sequence[int]) -> InterpretableScore | None:
    """Whether particles called interpretable are on zone; a particle found is the true one under its centroid.

    None where truth or run hold no particles, or the Fourier map was not computed.
    """
    if truth.masks is None or truth.particle_tilt is None or "particles" not in run.children:
        return None
    rows = run["particles"].to_dataset()[["frame", "y", "x", "interpretable"]].load()
    frame, called = rows["frame"].values, rows["interpretable"].values
    place = []
    for axis, name in enumerate(("y", "x")):
        pixel = (rows[name].values + values(run, f"frames/drift_{name}")[frame]) / truth.sampling
        place.append(np.clip(np.rint(np.nan_to_num(pixel)).astype(int), 0, truth.shape[axis] - 1))
    label = truth.masks[frame, place[0], place[1]].astype(int) if len(frame) else np.empty(0, int)
    judged = (label > 0) & (called >= 0) & np.isin(frame, np.asarray(frames))
    if not judged.any():
        return None
    tilt, yes = np.asarray(truth.particle_tilt)[label[judged] - 1], called[judged] == 1
    groups = [yes[tilt <= ON_ZONE], yes[tilt >= TILTED]]
    shares = [float(group.mean()) if len(group) else None for group in groups]
    return InterpretableScore(shares[0], shares[1], len(groups[0]), len(groups[1]))
