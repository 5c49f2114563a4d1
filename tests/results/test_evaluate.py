"""Scores against truths whose answer is known beforehand."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline import store
from pipeline.results.evaluate import Truth, as_table, evaluate, load_truth
from pipeline.results.open import open_run, to_detector
from schemas.columns import COLUMNS
from schemas.errors import SchemaError, SettingsError
from schemas.frames import FRAMES

SAMPLING = 0.2


@pytest.fixture
def truth(run_path: Path) -> Truth:
    """The truth that the run finds exactly."""
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
    )


def test_the_exact_answer_scores_one(run_path: Path, truth: Truth) -> None:
    found = evaluate(run_path, truth)
    assert (found.precision, found.recall, found.f1) == (1.0, 1.0, 1.0)
    assert (found.frames, found.true, found.detected) == (4, 10, 10)
    assert found.position_rms == pytest.approx(0, abs=1e-12)
    assert found.drift_rms == pytest.approx(0, abs=1e-12)
    assert (found.count_bias, found.count_rms) == (0, 0)


def test_a_column_too_many_in_the_truth_is_lost(run_path: Path, truth: Truth) -> None:
    more = replace(
        truth,
        frame=np.append(truth.frame, 1),
        y=np.append(truth.y, 30.0),
        x=np.append(truth.x, 30.0),
        visible=np.append(truth.visible, True),
    )
    found = evaluate(run_path, more)
    assert (found.lost, found.recall, found.precision) == (1, 10 / 11, 1.0)
    assert found.count_bias == pytest.approx(-1 / 4)


def test_a_column_missing_in_the_truth_is_spurious(run_path: Path, truth: Truth) -> None:
    keep = np.arange(10) != 4
    fewer = replace(truth, **{name: getattr(truth, name)[keep] for name in ("frame", "y", "x", "visible")})
    found = evaluate(run_path, fewer)
    assert (found.spurious, found.precision, found.recall) == (1, 9 / 10, 1.0)


def test_invisible_columns_are_neither_demanded_nor_spurious(run_path: Path, truth: Truth) -> None:
    visible = truth.visible.copy()
    visible[[2, 7]] = False
    found = evaluate(run_path, replace(truth, visible=visible))
    assert (found.true, found.detected, found.precision, found.recall) == (8, 8, 1.0, 1.0)


def test_columns_at_the_edge_are_neither_demanded_nor_spurious(run_path: Path, truth: Truth) -> None:
    """The view is made so small that some columns lie in its outermost 1.2 Å."""
    shape = (int(np.sort(truth.y)[-2] + 0.5 + 5), 60)
    found = evaluate(run_path, replace(truth, shape=shape))
    assert 0 < found.true < 10
    assert (found.precision, found.recall) == (1.0, 1.0)


def test_offsets_are_measured_in_angstrom_and_pixels(run_path: Path, truth: Truth) -> None:
    """All true columns 0.3 Å down and 0.4 Å across of those found, all drift 0.6 px short in y."""
    drift = truth.drift + np.array([0.6, 0.0])
    moved = replace(truth, y=truth.y + 0.3 / SAMPLING, x=truth.x + 0.4 / SAMPLING, drift=drift)
    found = evaluate(run_path, moved, max_distance=0.6)
    assert found.position_rms == pytest.approx(0.5)
    assert (found.bias_y, found.bias_x) == (pytest.approx(-0.3), pytest.approx(-0.4))
    assert found.moved == 10
    assert found.coverage == 0.0
    assert found.drift_rms == pytest.approx(0.6)
    assert found.drift_rms_centred == pytest.approx(0, abs=1e-12)


def test_farther_than_the_greatest_distance_is_lost_and_spurious(run_path: Path, truth: Truth) -> None:
    found = evaluate(run_path, replace(truth, y=truth.y + 20 / SAMPLING, shape=(200, 60)))
    assert (found.precision, found.recall, found.lost, found.spurious) == (0.0, 0.0, 10, 10)
    assert np.isnan(found.position_rms)


def test_drift_error_does_not_enter_positions(make_run: Callable[..., Path], truth: Truth) -> None:
    """Wrong drift moves specimen positions and drift alike: on the detector nothing changes."""
    path = make_run("other")
    run = open_run(path)
    frames = {name: run[f"frames/{name}"].values for name in FRAMES.required}
    columns = {name: run[f"columns/{name}"].values for name in COLUMNS.names}
    frames["drift_y"] = frames["drift_y"] + 1.0
    columns["y"] = columns["y"] - 1.0
    store.write_rows(path, FRAMES, 0, frames)
    store.write_rows(path, COLUMNS, 0, columns)
    found = evaluate(path, truth)
    assert found.position_rms == pytest.approx(0, abs=1e-9)
    assert found.drift_rms == pytest.approx(1.0 / SAMPLING)


def test_the_truth_survives_its_file(run_path: Path, truth: Truth, tmp_path: Path) -> None:
    truth.save(tmp_path / "truth.npz")
    assert evaluate(run_path, tmp_path / "truth.npz") == evaluate(run_path, truth)
    assert load_truth(vars(truth)).shape == (60, 60)


def test_a_foreign_truth_is_refused(run_path: Path, truth: Truth, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        load_truth(tmp_path / "absent.npz")
    with pytest.raises(SchemaError, match="the truth lacks visible, drift"):
        load_truth({"frame": [0], "y": [0], "x": [0], "sampling": 1, "shape": (1, 1)})
    with pytest.raises(SettingsError, match="the run has 6 frames and the truth 5"):
        evaluate(run_path, replace(truth, drift=truth.drift[:5]))


def test_a_simulated_movie_is_a_truth(tmp_path: Path) -> None:
    from pipeline.results.evaluate import truth_of
    from pipeline.simulate.movie import MovieSpec, simulate_movie

    movie = simulate_movie(MovieSpec(kind="graphene", shape=(64, 64), frames=2, dose=500.0), 5)
    truth = truth_of(movie)
    assert np.array_equal(truth.y[truth.frame == 1], movie.columns[1]["y"])
    assert truth.shape == (64, 64)
    assert truth.sampling == movie.sampling


def test_the_table_shows_the_scores(run_path: Path, truth: Truth) -> None:
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(as_table(evaluate(run_path, truth)))
    text = console.export_text()
    assert "4 frames" in text
    assert "1.0000" in text
    assert "0.000 Å" in text
