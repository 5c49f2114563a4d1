from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.networks import segment_check
from pipeline.simulate.movie import MovieSpec, simulate_movie
from pipeline.steps.score import score

SPEC = MovieSpec(kind="mos2", mode="haadf", shape=(96, 96), frames=7, sampling=0.15, dose=2000.0, drift_step=0.3)


@pytest.fixture(scope="module")
def movie():
    return simulate_movie(SPEC, 3)


def spots(movie, frame, rows):
    grid = np.mgrid[:96, :96]
    out = np.zeros((96, 96))
    for row in rows:
        out = np.maximum(out, np.exp(-((grid[0] - row["y"]) ** 2 + (grid[1] - row["x"]) ** 2) / 8))
    return out


def test_the_truth_scores_one_and_a_lost_column_is_counted(movie):
    truth = movie.columns[3]
    perfect = score(segment_check.tally_columns(spots(movie, 3, truth), movie, 3, threshold=0.5))
    assert perfect.precision == perfect.recall == 1 and perfect.rms < 0.02
    middle = np.argmin(np.hypot(truth["y"] - 48, truth["x"] - 48))
    fewer = segment_check.tally_columns(spots(movie, 3, np.delete(truth, middle)), movie, 3, threshold=0.5)
    assert score(fewer).lost == 1 and score(fewer).spurious == 0


def test_columns_marked_invisible_are_neither_demanded_nor_spurious(movie):
    truth = movie.columns[3].copy()
    truth["visible"][::2] = False
    hidden = segment_check.SimulatedMovie(**{**vars(movie), "columns": [truth] * 7})
    reached = score(segment_check.tally_columns(spots(movie, 3, truth), hidden, 3, threshold=0.5))
    assert reached.precision == reached.recall == 1
    seen = score(segment_check.tally_columns(spots(movie, 3, truth[truth["visible"]]), hidden, 3, threshold=0.5))
    assert seen.precision == seen.recall == 1


def test_the_stand_in_for_a_denoiser_averages_aligned_frames():
    movie = simulate_movie(replace(SPEC, dose=50.0), 3)
    flat = movie.clean[3] * 50.0 * SPEC.sampling**2
    inner = (slice(12, -12), slice(12, -12))
    single = np.std((segment_check.stand_in(movie, frames=1, width=0.05) - flat)[inner])
    several = np.std((segment_check.stand_in(movie, frames=5, width=0.05) - flat)[inner])
    assert several < 0.7 * single


def test_the_table_has_a_line_for_every_case(monkeypatch):
    class Blind(torch.nn.Module):
        receptive_radius = 1

        def forward(self, images):
            return torch.cat([images - 20.0, images * 0 + 1], 1)

    small = {name: MovieSpec(**{**vars(SPEC), "mode": spec.mode}) for name, spec in segment_check.CASES.items()}
    monkeypatch.setattr(segment_check, "CASES", dict(list(small.items())[-2:]))
    monkeypatch.setattr(segment_check, "EMPTY", {"vacuum": MovieSpec(kind="vacuum", shape=(64, 64))})
    lines: list[str] = []
    segment_check.table(Blind(), sampling=0.2, seeds=[1], report=lines.append)
    assert sum(line.startswith("| ") for line in lines) == 1 + 2 * 2 + 3
    assert any("vacuum | 50 | 0.000" in line for line in lines)
