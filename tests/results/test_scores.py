"""Species, vacancies, particles, probabilities and the bound, against truths made from the run itself."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from pipeline import store
from pipeline.cli import app
from pipeline.images import create_image, write_image
from pipeline.results.evaluate import as_table, evaluate
from pipeline.results.open import open_run, to_detector
from pipeline.results.scorecard import tables
from pipeline.results.truth import Truth, load_truth
from pipeline.steps.agreement import MISSED, SPURIOUS
from schemas.frames import FRAMES
from tests import oracles_columns as oracle

SAMPLING = 0.2
WIDTH = 2.0


@pytest.fixture
def truth(run_path: Path) -> Truth:
    """The truth that the run finds exactly: gold columns in frames 0, 3 and 4; frame 1 is empty, 2 and 5 unmeasured."""
    run = open_run(run_path)
    columns = to_detector(run, run["columns"].to_dataset())
    return Truth(
        frame=columns["frame"].values,
        y=columns["y_detector"].values / SAMPLING,
        x=columns["x_detector"].values / SAMPLING,
        visible=np.ones(columns.sizes["column"], dtype=bool),
        drift=np.stack([run["frames/drift_y"].values, run["frames/drift_x"].values], axis=1) / SAMPLING,
        sampling=SAMPLING,
        shape=(60, 60),
        species=np.array(["Au"] * columns.sizes["column"]),
    )


def with_sites(truth: Truth, names: list[str]) -> Truth:
    """Sites at the columns, of these names, and an empty one far from all columns of frame 0."""
    return replace(
        truth,
        site_frame=np.append(truth.frame, 0),
        site_y=np.append(truth.y, 50.0),
        site_x=np.append(truth.x, 8.0),
        site_species=np.array([*names, "0Au"]),
    )


def images(truth: Truth) -> np.ndarray:
    """Clean frames, 1 between columns and 2 on them."""
    out = np.ones((len(truth.drift), *truth.shape), np.float32)
    for frame in range(len(out)):
        here = truth.frame == frame
        points = [(y, x, 1.0) for y, x in zip(truth.y[here], truth.x[here], strict=True)]
        out[frame] = oracle.gaussians(truth.shape, points, width=WIDTH, background=1.0)
    return out


def test_species_of_columns_are_compared_pair_by_pair(run_path: Path, truth: Truth) -> None:
    species = truth.species.copy()
    species[3] = "Pt"
    keep = np.arange(10) != 6
    fewer = replace(
        truth, **{n: getattr(truth, n)[keep] for n in ("frame", "y", "x", "visible")}, species=species[keep]
    )
    found = evaluate(run_path, fewer).species
    assert found is not None
    assert found.confusion.true == ("Au", "Pt", SPURIOUS)
    assert found.confusion.counts.tolist() == [[8], [1], [1]]
    assert found.accuracy == 8 / 9


def test_a_run_that_names_no_species_is_not_judged(make_run: Callable[..., Path], truth: Truth) -> None:
    from tests.results.conftest import tables as made
    from tests.results.conftest import write_run

    frames, columns = made()
    columns["species"] = np.array(["unknown"] * 10, dtype=object)
    path = write_run(make_run("other").parent / "unnamed.zarr", (frames, columns))
    assert evaluate(path, truth).species is None


def test_empty_sites_where_nothing_is_found_are_right(run_path: Path, truth: Truth) -> None:
    found = evaluate(run_path, with_sites(truth, ["Au"] * 9 + ["2Au"])).species
    assert found is not None
    assert found.accuracy == 10 / 11
    assert found.confusion.found == ("Au", MISSED)
    assert found.vacancy_bias is None


def test_vacancies_are_counted_where_the_run_counts_them(run_path: Path, truth: Truth) -> None:
    run = open_run(run_path)
    frames = {name: run[f"frames/{name}"].values for name in FRAMES.names if name in run["frames"]}
    frames["vacancy_count"] = np.array([3, 0, -1, 2, 0, -1], "int32")
    store.write_rows(run_path, FRAMES, 0, frames)
    found = evaluate(run_path, with_sites(truth, ["Au"] * 8 + ["1Au"] * 2)).species
    assert found is not None
    # True: frame 0 lacks the one at the empty site, 3 none, 4 two; the element is paired, so the empty site lacks two.
    assert found.vacancy_bias == pytest.approx(np.mean([3 - 1, 0, 2 - 0, 0 - 2]))
    assert found.vacancy_within_one == 1 / 4


def test_probabilities_are_judged_by_what_is_a_column(run_path: Path, truth: Truth) -> None:
    keep = np.arange(10) >= 5
    fewer = replace(truth, **{n: getattr(truth, n)[keep] for n in ("frame", "y", "x", "visible")}, species=None)
    found = evaluate(run_path, fewer)
    assert found.calibration is not None
    assert found.calibration.number.sum() == 10
    stated = np.linspace(0.5, 0.99, 10).astype("float32")
    assert found.calibration.number[9] == (stated >= 0.9).sum()
    assert found.calibration.share[9] == 1.0
    assert found.calibration.share[5] == 0.0


def test_errors_in_multiples_of_the_bound(run_path: Path, truth: Truth) -> None:
    """Columns far from others, all half a pixel off: their bound is that of a lone Gaussian."""
    points = np.stack([truth.frame * 1000.0, truth.y, truth.x], axis=1)
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    keep = apart.min(1) > 13
    assert keep.sum() >= 2
    lone = replace(truth, **{n: getattr(truth, n)[keep] for n in ("frame", "y", "x", "visible", "species")})
    lone = replace(lone, y=lone.y + 0.5)
    known = replace(lone, clean=images(lone), electrons=20.0)
    found = evaluate(run_path, known)
    alone = oracle.bound((30.0, 30.0, 20.0), width=WIDTH, background=20.0, radius=6.5)[2:]
    assert found.bound_rms == pytest.approx(np.hypot(*alone) * SAMPLING, rel=0.05)
    assert found.bound_multiple == pytest.approx(0.1 / found.bound_rms)
    assert len(found.bound_ratios) == keep.sum()
    assert evaluate(run_path, replace(known, electrons=80.0)).bound_rms == pytest.approx(found.bound_rms / 2)
    assert evaluate(run_path, lone).bound_rms is None


def test_particles_by_their_labels(run_path: Path, truth: Truth) -> None:
    masks = np.zeros((6, 60, 60), np.uint16)
    masks[:, 10:30, 10:30] = 1
    masks[:, 40:50, 40:50] = 2
    labels = np.zeros((6, 60, 60), np.int32)
    labels[:, 10:30, 10:28] = 2
    create_image(
        run_path, "labels", time=np.arange(6.0), shape=(6, 60, 60), sampling=SAMPLING, origin=(0, 0), block_frames=6
    )
    write_image(run_path, "labels", 0, labels)
    found = evaluate(run_path, replace(truth, masks=masks)).particles
    assert found is not None
    assert (found.iou, found.particle_iou) == (pytest.approx(360 / 500), pytest.approx(0.9))
    assert (found.detected, found.precision, found.frames) == (0.5, 1.0, 4)
    assert evaluate(run_path, truth).particles is None


def test_particles_called_interpretable_by_their_true_tilt(run_path: Path, truth: Truth) -> None:
    """Rows 0, 1, 2, … of /particles are called no, yes, no, …; two per frame in which anything was found."""
    run = open_run(run_path)
    rows = run["particles"].to_dataset()
    frame, drift = rows["frame"].values, run["frames/drift_y"].values
    masks = np.zeros((6, 60, 60), np.uint16)
    masks[:] = np.where(np.arange(60)[:, None] < 30, 1, 2)
    y = (rows["y"].values + drift[frame]) / SAMPLING
    assert (y < 29).all()
    known = replace(truth, masks=masks, particle_tilt=np.array([0.4, 7.0]))
    found = evaluate(run_path, known).interpretable
    assert found is not None
    measured = np.isin(frame, [0, 1, 3, 4])
    assert (found.on_zone, found.on_zone_count) == (0.5, measured.sum())
    assert (found.tilted, found.tilted_count) == (None, 0)
    turned = evaluate(run_path, replace(known, particle_tilt=np.array([7.0, 0.4]))).interpretable
    assert (turned.tilted, turned.tilted_count) == (0.5, measured.sum())
    assert evaluate(run_path, truth).interpretable is None


def test_the_whole_truth_survives_its_file(truth: Truth, tmp_path: Path) -> None:
    known = replace(with_sites(truth, ["Au"] * 10), clean=images(truth), electrons=5.0, readout=0.7)
    known.save(tmp_path / "truth.npz")
    again = load_truth(tmp_path / "truth.npz")
    assert again.masks is None
    assert (again.electrons, again.readout, again.shape) == (5.0, 0.7, (60, 60))
    assert np.array_equal(again.clean, known.clean)
    assert again.site_species.tolist() == known.site_species.tolist()


def test_tables_show_species_and_reliability(run_path: Path, truth: Truth) -> None:
    found = evaluate(run_path, with_sites(replace(truth, clean=images(truth), electrons=9.0), ["Au"] * 10))
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(as_table(found), *tables(found))
    text = console.export_text()
    for words in ("Cramér-Rao", "called right, of 11 places", MISSED, "came true", "1.000 ± 0.000"):
        assert words in text


def test_the_verb_prints_tables_and_writes_a_picture(run_path: Path, truth: Truth, tmp_path: Path) -> None:
    truth.save(tmp_path / "movie.truth.npz")
    result = CliRunner().invoke(app, ["evaluate", str(run_path), str(tmp_path / "movie.truth.npz")])
    assert result.exit_code == 0, result.output
    assert "F1" in result.output
    assert (run_path.parent / "movie.evaluation.png").stat().st_size > 10_000
