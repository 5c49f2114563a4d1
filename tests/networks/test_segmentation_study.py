from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.networks import segmentation_study as study
from pipeline.networks.particle_data import ParticleSpec, Prepared, simulate

TINY = ParticleSpec(seed=2, scenes=3, steps=3, batch=2, edge=130, fine=0.4, crop=40)
SCRIPT = Path(__file__).parents[2] / "scripts" / "study_segmentation"


class Same(nn.Module):
    receptive_radius = 0

    def forward(self, images):
        return images


def disc(radius, shift=0):
    rows, cols = np.mgrid[:60, :60]
    return np.hypot(rows - 30, cols - 30 - shift) < radius


def test_there_are_at_most_24_trainings_all_different():
    chosen = study.trials()
    assert len(chosen) == len(set(chosen)) == 20
    assert {t.network for t in chosen} == set(study.NETWORKS)
    for name in study.NETWORKS:
        parameters, multiplications = study.cost(name)
        assert 1000 < parameters < 100_000 and 1000 < multiplications < 20_000


@pytest.mark.parametrize("sampling", study.SAMPLINGS)
def test_every_resolution_sees_the_same_part_of_a_specimen(sampling):
    spec = study.spec_of(study.Trial("resolution", "MS-D 8 × 8", sampling=sampling), ParticleSpec())
    assert spec.crop % 8 == 0 and abs(spec.crop * sampling - study.REACH) < 8


def test_boundaries_are_as_far_apart_as_they_are():
    assert study.boundary_error(disc(12), disc(12)) == 0
    assert study.boundary_error(disc(15), disc(12)) == pytest.approx(3.0, abs=0.3)
    empty, full = np.zeros((60, 60), bool), np.ones((60, 60), bool)
    assert study.boundary_error(full, full) == 0 and study.boundary_error(full, disc(9)) == 60
    assert study.boundary_error(empty, empty) == 0


def test_figures_of_known_answers():
    truth, shifted = torch.from_numpy(disc(12)).float()[None], torch.from_numpy(disc(12, 4)).float()[None]
    perfect = study.judged(Same(), [Prepared(40 * (truth - 0.5), truth)], sampling=0.5)
    assert perfect["f1"] == perfect["iou"] == 1 and perfect["boundary"] == 0 and perfect["calibration"] < 1e-6
    both = float((truth * shifted).sum())
    moved = study.judged(Same(), [Prepared(40 * (shifted - 0.5), truth)], sampling=0.5)
    assert moved["precision"] == pytest.approx(both / float(shifted.sum()))
    assert moved["recall"] == pytest.approx(both / float(truth.sum()))
    assert moved["iou"] == pytest.approx(both / float((truth + shifted > 0).sum()))
    assert 0.5 < moved["boundary"] < 2.0 and moved["calibration"] > 0.02
    blind = study.judged(Same(), [Prepared(truth * 0 - 40, truth)], sampling=0.5)
    assert blind["recall"] == blind["iou"] == 0 and np.isnan(blind["boundary"])


def test_a_study_gives_a_row_for_each_dose_and_kind():
    examples = simulate(TINY, range(3))
    chosen = [study.Trial("a", name) for name in study.NETWORKS]
    found = study.study(chosen, examples, examples[:2], TINY, lambda line: None)
    rows = [row for some in found for row in some]
    assert len(rows) == 4 * 2 * len(study.TEST_DOSES)
    assert all(0 <= value <= 1 for row in rows for value in row[3:8])


def test_the_script_writes_a_page_and_a_figure(tmp_path):
    trial = study.Trial("architecture × dose", "MS-D 8 × 8")
    rows = [
        [trial.__dict__, dose, kind, 0.9, 0.8, 0.85, 0.71, 0.02, 1.234]
        for dose in study.TEST_DOSES
        for kind in ("raw", "denoised")
    ]
    (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(SCRIPT), "--page", "--rows", str(tmp_path / "rows"), "--out", str(tmp_path / "page")]
    subprocess.run(command, check=True, cwd=SCRIPT.parents[1])
    text = (tmp_path / "page.md").read_text()
    assert (
        "| MS-D 8 × 8, all doses, both frames, 0.6 Å/px | 50 | 0.900 | 0.800 | 0.850 | 0.710 | 0.020 | 1.23 |" in text
    )
    assert (tmp_path / "page.png").stat().st_size > 10_000
