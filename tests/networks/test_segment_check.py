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


HOW = {"sampling": SPEC.sampling, "threshold": 0.5}


def spots(rows):
    grid = np.mgrid[:96, :96]
    out = np.zeros((96, 96))
    for row in rows:
        out = np.maximum(out, np.exp(-((grid[0] - row["y"]) ** 2 + (grid[1] - row["x"]) ** 2) / 8))
    return out


def test_the_truth_scores_one_and_a_lost_column_is_counted(movie):
    truth = movie.columns[3]
    perfect = score(segment_check.tally_columns(spots(truth), truth, **HOW))
    assert perfect.precision == perfect.recall == 1 and perfect.rms < 0.02
    middle = np.argmin(np.hypot(truth["y"] - 48, truth["x"] - 48))
    fewer = segment_check.tally_columns(spots(np.delete(truth, middle)), truth, **HOW)
    assert score(fewer).lost == 1 and score(fewer).spurious == 0


def test_columns_marked_invisible_are_neither_demanded_nor_spurious(movie):
    truth = movie.columns[3].copy()
    truth["visible"][::2] = False
    reached = score(segment_check.tally_columns(spots(truth), truth, **HOW))
    assert reached.precision == reached.recall == 1
    seen = score(segment_check.tally_columns(spots(truth[truth["visible"]]), truth, **HOW))
    assert seen.precision == seen.recall == 1


class Smoothing(torch.nn.Module):
    """A plain stand-in for the denoiser: the mean of three neighbours, blurred."""

    offsets = around = (-1, 0, 1)
    receptive_radius, periodic, context_radius, motion = 4, False, 0, ()

    def forward(self, stack, valid, level, context=None):
        return torch.nn.functional.avg_pool2d(stack.mean(1), 3, stride=1, padding=1)


class Blind(torch.nn.Module):
    receptive_radius = 1

    def forward(self, images):
        return torch.cat([images - 20.0, images * 0 + 1], 1)


def test_another_dose_changes_the_noise_and_nothing_else(movie):
    weak, strong = (segment_check.recorded(movie, dose, 3) for dose in (20.0, 2000.0))
    pixel = SPEC.sampling**2
    assert weak.dose == 20.0 and weak.columns is movie.columns
    assert weak.counts.mean() == pytest.approx(20.0 * pixel, rel=0.03)
    excess = [(m.counts / (m.dose * pixel) - movie.clean).std() for m in (weak, strong)]
    assert excess[0] == pytest.approx(10 * excess[1], rel=0.1)


def test_the_middle_frame_is_denoised_with_its_neighbours_in_place(movie):
    flat = movie.clean[3] * movie.dose * SPEC.sampling**2
    inner = (slice(12, -12), slice(12, -12))
    made = segment_check.denoised(replace(movie), Smoothing())[0]
    assert np.corrcoef(made[inner].ravel(), flat[inner].ravel())[0, 1] > 0.9


def test_the_table_has_a_line_for_every_case(monkeypatch):
    small = {name: replace(SPEC, mode=spec.mode) for name, spec in segment_check.CASES.items()}
    monkeypatch.setattr(segment_check, "CASES", dict(list(small.items())[-2:]))
    monkeypatch.setattr(segment_check, "EMPTY", {"vacuum": MovieSpec(kind="vacuum", shape=(64, 64))})
    lines: list[str] = []
    judge = segment_check.Judge(Blind(), Smoothing(), 0.2, 0.4)
    segment_check.table(judge, seeds=[1], report=lines.append)
    assert sum(line.startswith("| ") for line in lines) == 1 + 2 * 3 + 3
    assert any("vacuum | 50 | 0.00" in line for line in lines)
