"""Score a run against the known answer of a simulated movie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from rich.table import Table

from pipeline.results.open import open_run, rows_of_frames, to_detector, values
from pipeline.steps.columns import inside
from pipeline.steps.score import Tally, match_columns, merge, score, tally_frame
from schemas.conventions import STATUS
from schemas.errors import SchemaError, SettingsError


@dataclass(frozen=True)
class Truth:
    """The known answer of a movie: what was where on the detector.

    frame, y, x, visible (column,): every column of every frame, positions [px]; a column that is not visible is neither
    demanded nor spurious. drift (time, 2) [px]: how the specimen moved since frame 0. sampling [Å/px]; shape (y, x).
    """

    frame: np.ndarray
    y: np.ndarray
    x: np.ndarray
    visible: np.ndarray
    drift: np.ndarray
    sampling: float
    shape: tuple[int, int]

    def save(self, path: str | Path) -> None:
        """Write the truth as one npz file."""
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in vars(self).items()}
        with Path(path).open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)


@dataclass(frozen=True)
class Evaluation:
    """How near a run comes to the truth. Lengths in Å but for the drift, which is in pixels; ratios from 0 to 1.

    ``position_rms``: root of the mean squared distance of matched columns; ``coverage``: share of their coordinates
    within one standard error (0.68 where the errors are right); ``moved``: matched but more than half the greatest
    distance off. ``drift_rms``: of the drift since frame 0; ``drift_rms_centred``: free of the constant that an error
    in frame 0 adds to all. ``count_bias`` and ``count_rms``: found minus true columns per frame.
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


def truth_of(movie: Any) -> Truth:
    """The truth of a simulated movie (with ``columns``, ``drift``, ``sampling`` and ``counts``)."""
    flat = np.concatenate(list(movie.columns))
    frame = np.repeat(np.arange(len(movie.columns)), [len(columns) for columns in movie.columns])
    shape = (int(movie.counts.shape[-2]), int(movie.counts.shape[-1]))
    drift, sampling = np.asarray(movie.drift, dtype=float), float(movie.sampling)
    return Truth(frame, flat["y"], flat["x"], flat["visible"], drift, sampling, shape)


def load_truth(source: str | Path | Mapping[str, Any]) -> Truth:
    """A truth from the file that ``Truth.save`` wrote, or from a mapping of its fields."""
    if isinstance(source, Mapping):
        given = dict(source)
    else:
        if not Path(source).exists():
            raise SettingsError(f"{source} does not exist; expected the truth that `colonnade simulate` writes (npz)")
        with np.load(source, allow_pickle=False) as file:
            given = dict(file)
    missing = [name for name in Truth.__dataclass_fields__ if name not in given]
    if missing:
        raise SchemaError(f"the truth lacks {', '.join(missing)}; expected {', '.join(Truth.__dataclass_fields__)}")
    arrays = {name: np.asarray(given[name]) for name in ("frame", "y", "x", "visible", "drift")}
    height, width = (int(size) for size in np.asarray(given["shape"]))
    return Truth(**arrays, sampling=float(given["sampling"]), shape=(height, width))


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
    columns = to_detector(run, rows_of_frames(run, measured)[["frame", "y", "x", "y_err", "x_err"]].load())
    tallies = [_frame(columns, known, certain, int(frame), max_distance) for frame in measured]
    result, total = score(merge(tallies)), merge(tallies)
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
    )


def as_table(found: Evaluation) -> Table:
    """The evaluation as a table for the terminal."""
    table = Table(title=f"Against the known answer, {found.frames:,} frames", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("meaning", style="dim")
    for name, value, meaning in (
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
    ):
        table.add_row(name, value, meaning)
    return table


def _as_truth(truth: Any) -> Truth:
    if isinstance(truth, Truth):
        return truth
    return load_truth(truth) if isinstance(truth, str | Path | Mapping) else truth_of(truth)


def _frame(columns: xr.Dataset, truth: Truth, certain: np.ndarray, frame: int, max_distance: float) -> Tally:
    """Score of one frame [Å] on the detector; what lies on an uncertain true column is left out."""
    rows = slice(*np.searchsorted(columns["frame"].values, [frame, frame + 1]))
    found = np.stack([columns["y_detector"].values[rows], columns["x_detector"].values[rows]], axis=1)
    errors = np.stack([columns["y_err"].values[rows], columns["x_err"].values[rows]], axis=1)
    here = truth.frame == frame
    true = np.stack([truth.y, truth.x], axis=1) * truth.sampling
    demanded, doubtful = true[here & certain], true[here & ~certain]
    unmatched = match_columns(found, demanded, max_distance=max_distance).spurious
    on_doubtful = match_columns(found[unmatched], doubtful, max_distance=max_distance).detected
    keep = np.ones(len(found), dtype=bool)
    keep[unmatched[on_doubtful]] = False
    return tally_frame(
        found[keep], demanded, max_distance=max_distance, moved_distance=max_distance / 2, errors=errors[keep]
    )


def _mean(numbers: np.ndarray) -> float:
    return float(np.mean(numbers)) if numbers.size else float("nan")
