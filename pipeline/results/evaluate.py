"""Score a run against the known answer of a simulated movie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from rich.table import Table

from pipeline.results.open import open_run, rows_of_frames, to_detector, values
from pipeline.results.scores import (
    FrameMatch,
    InterpretableScore,
    ParticleScore,
    SpeciesScore,
    match_frame,
    score_bound,
    score_calibration,
    score_interpretable,
    score_particles,
    score_species,
)
from pipeline.results.truth import Truth, load_truth, truth_of
from pipeline.steps.agreement import SPURIOUS, Calibration
from pipeline.steps.columns import inside
from pipeline.steps.score import Tally, merge, score
from schemas.conventions import STATUS
from schemas.errors import SettingsError

__all__ = ["Evaluation", "Truth", "as_table", "evaluate", "load_truth", "truth_of"]

NAMES = ["frame", "y", "x", "y_err", "x_err", "probability", "species"]
BOUND_RADIUS = 1.3  # Å within which a column's image tells of its position


@dataclass(frozen=True)
class Evaluation:
    """How near a run comes to the truth. Lengths in Å but for the drift, which is in pixels; ratios from 0 to 1.

    ``position_rms``: root of the mean squared distance of matched columns; ``coverage``: share of their coordinates
    within one standard error (0.68 where the errors are right); ``moved``: matched but more than half the greatest
    distance off. ``drift_rms``: of the drift since frame 0; ``drift_rms_centred``: free of the constant that an error
    in frame 0 adds to all. ``count_bias`` and ``count_rms``: found minus true columns per frame. ``bound_rms``: RMS of
    the Cramér-Rao bound of the matched columns, which an estimate from several frames may beat. None where truth or run
    lack what is needed: ``bound_rms``, ``bound_ratios`` (error of each matched column over its own bound), ``species``,
    ``particles``, ``interpretable``, ``calibration`` (of columns' probabilities).
    """

    frames: int
    true: int
    detected: int
    precision: float
    recall: float
    f1: float
    position_rms: float
    bias_y: float
    bias_x: float
    coverage: float
    lost: int
    spurious: int
    moved: int
    count_bias: float
    count_rms: float
    drift_rms: float
    drift_rms_centred: float
    drift_worst: float
    bound_rms: float | None = None
    species: SpeciesScore | None = field(default=None, compare=False)
    particles: ParticleScore | None = None
    interpretable: InterpretableScore | None = None
    calibration: Calibration | None = field(default=None, compare=False)
    matches: tuple[FrameMatch, ...] = field(default=(), compare=False, repr=False)
    bound_ratios: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def bound_multiple(self) -> float | None:
        """Position RMS in multiples of the Cramér-Rao bound of one frame; None without a clean image in the truth."""
        return None if not self.bound_rms else self.position_rms / self.bound_rms


def evaluate(
    run: xr.DataTree | str | Path,
    truth: Truth | str | Path | Mapping[str, Any] | Any,
    *,
    max_distance: float = 0.5,
    margin: float = 1.2,
) -> Evaluation:
    """Score the measured frames of a run.

    ``truth``: a ``Truth``, its file or fields, or a simulated movie. ``max_distance`` [Å]: a column found farther off
    than this is another one. ``margin`` [Å]: true columns nearer to the edge are neither demanded nor spurious, since
    those within 1 Å of it are not reported. Raises ``SettingsError`` where movie and truth differ in length.
    """
    run = run if isinstance(run, xr.DataTree) else open_run(run)
    known = _as_truth(truth)
    status = values(run, "frames/status")
    if len(status) != len(known.drift):
        raise SettingsError(
            f"the run has {len(status)} frames and the truth {len(known.drift)}; expected the same movie"
        )
    measured = np.flatnonzero(status == STATUS["measured"])
    edge = margin / known.sampling
    certain = known.visible.astype(bool) & inside(known.y, known.x, shape=known.shape, margin=edge)
    columns = to_detector(run, rows_of_frames(run, measured)[NAMES].load())
    matches = tuple(match_frame(columns, known, certain, int(frame), max_distance) for frame in measured)
    tallies = [_tally(columns, match, max_distance) for match in matches]
    result, total = score(merge(tallies)), merge(tallies)
    bound = score_bound(known, matches, radius=BOUND_RADIUS)
    difference = np.array([tally.detected - tally.true for tally in tallies], dtype=float)
    drift = np.stack([values(run, "frames/drift_y"), values(run, "frames/drift_x")], axis=1) / known.sampling
    off = (drift - known.drift)[measured]
    return Evaluation(
        frames=len(measured),
        true=total.true,
        detected=total.detected,
        precision=result.precision,
        recall=result.recall,
        f1=result.f1,
        position_rms=result.rms,
        bias_y=result.bias_y,
        bias_x=result.bias_x,
        coverage=result.coverage,
        lost=result.lost,
        spurious=result.spurious,
        moved=result.moved,
        count_bias=_mean(difference),
        count_rms=_mean(difference**2) ** 0.5,
        drift_rms=_mean(np.square(off).sum(axis=1)) ** 0.5,
        drift_rms_centred=_mean(np.square(off - off.mean(axis=0)).sum(axis=1)) ** 0.5 if len(off) else float("nan"),
        drift_worst=float(np.hypot(*off.T).max()) if len(off) else float("nan"),
        bound_rms=None if bound is None else bound[0],
        species=score_species(run, columns, known, matches, max_distance=max_distance, margin=margin),
        particles=score_particles(run, known, [int(frame) for frame in measured]),
        interpretable=score_interpretable(run, known, [int(frame) for frame in measured]),
        calibration=score_calibration(columns, matches),
        matches=matches,
        bound_ratios=None if bound is None else bound[1],
    )


def as_table(found: Evaluation) -> Table:
    """The evaluation as a table for the terminal."""
    table = Table(title=f"Against the known answer, {found.frames:,} frames", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("meaning", style="dim")
    rows = [
        ("precision", f"{found.precision:.4f}", f"{found.spurious:,} spurious of {found.detected:,} found"),
        ("recall", f"{found.recall:.4f}", f"{found.lost:,} lost of {found.true:,} true"),
        ("F1", f"{found.f1:.4f}", ""),
        ("position RMS", f"{found.position_rms:.3f} Å", f"bias {found.bias_y:+.3f}, {found.bias_x:+.3f} Å (y, x)"),
        ("coverage", f"{found.coverage:.2f}", "within one standard error; 0.68 where errors are right"),
        ("count error", f"{found.count_bias:+.2f}", f"columns per frame; RMS {found.count_rms:.2f}"),
        (
            "drift RMS",
            f"{found.drift_rms:.3f} px",
            f"centred {found.drift_rms_centred:.3f}, worst {found.drift_worst:.3f} px",
        ),
        *_more(found),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _more(found: Evaluation) -> list[tuple[str, str, str]]:
    """Rows of what only some truths and runs can tell."""
    rows = []
    if found.bound_rms is not None and found.bound_multiple is not None:
        bound = f"Cramér-Rao bound of one frame {found.bound_rms:.4f} Å RMS"
        rows.append(("position RMS", f"{found.bound_multiple:.2f} ×", bound))
    if found.calibration is not None:
        rows.append(("calibration", f"{found.calibration.error:.3f}", "expected error of columns' probabilities"))
    if found.species is not None:
        table = found.species.confusion
        sites = sum(int(row.sum()) for name, row in zip(table.true, table.counts, strict=True) if name != SPURIOUS)
        rows.append(("species", f"{found.species.accuracy:.4f}", f"called right, of {sites:,} places"))
        if found.species.vacancy_bias is not None:
            meaning = f"missing atoms per frame; RMS {found.species.vacancy_rms:.2f}"
            meaning += f", within 1 in {found.species.vacancy_within_one:.0%} of frames"
            rows.append(("vacancy error", f"{found.species.vacancy_bias:+.2f}", meaning))
    if found.particles is not None:
        one = found.particles
        meaning = f"of pixels; {one.particle_iou:.3f} of a particle, {one.detected:.1%} of particles found"
        rows.append(("particles IoU", f"{one.iou:.3f}", meaning))
    judged = found.interpretable
    if judged is not None:
        for share, count, what in (
            (judged.on_zone, judged.on_zone_count, "on zone (at most 1° off)"),
            (judged.tilted, judged.tilted_count, "tilted (3° or more)"),
        ):
            if share is not None:
                rows.append(("interpretable", f"{share:.1%}", f"of {count:,} particles that are {what}"))
    return rows


def _as_truth(truth: Any) -> Truth:
    if isinstance(truth, Truth):
        return truth
    return load_truth(truth) if isinstance(truth, str | Path | Mapping) else truth_of(truth)


def _tally(columns: xr.Dataset, match: FrameMatch, max_distance: float) -> Tally:
    """A matched frame as sums."""
    distance = np.hypot(*match.off.T)
    errors = np.stack([columns[name].values[match.rows] for name in ("y_err", "x_err")], axis=1)
    count = len(match.rows)
    return Tally(
        detected=count + len(match.spurious),
        true=count + len(match.lost),
        matched=count,
        moved=int(np.count_nonzero(distance > max_distance / 2)),
        sum_y=float(match.off[:, 0].sum()),
        sum_x=float(match.off[:, 1].sum()),
        sum_square=float(np.square(match.off).sum()),
        within_error=int(np.count_nonzero(np.abs(match.off) <= errors)),
        frames=1,
    )


def _mean(numbers: np.ndarray) -> float:
    return float(np.mean(numbers)) if numbers.size else float("nan")
