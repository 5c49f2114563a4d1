"""A movie that no network explains better than a Wiener filter is denoised by the filter, and says so."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.results.open import open_run
from tests import e2e_tools as tools

SETTINGS = {
    "denoise.weights": "adapt",
    "denoise.steps": 20,
    "blocks.frames": 6,
    "images.save": ["denoised", "uncertainty"],
}


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    path = tmp_path_factory.mktemp("noise") / "noise.tif"
    return tools.write_movie(path, np.random.default_rng(3).poisson(3, (12, 96, 104)).astype(np.uint16))


def test_noise_is_left_to_the_filter_and_shows_nothing(noise, tmp_path):
    (outcome,) = tools.run_job(noise, tmp_path, **SETTINGS)
    assert outcome.status == "complete", outcome.reason
    run = open_run(outcome.path)
    assert all(name.startswith("wiener ") for name in run["frames/denoiser"].values)
    assert any("no network beat a Wiener filter" in note for note in run.attrs["colonnade"]["notes"])
    assert any(note.startswith("drift ") and "agree" in note for note in run.attrs["colonnade"]["notes"])
    assert (run["frames/drift_y_err"].values[1:] > 1.5 * tools.SAMPLING).all()
    assert run["images/denoised/s0/denoised"].values.std() < 0.03
    assert np.isnan(run["images/uncertainty/s0/uncertainty"].values).all()  # nothing is known of it
    assert run["frames/column_count"].values.sum() == 0


def test_no_cut_changes_a_bit(noise, tmp_path):
    one, other = (
        tools.run_job(noise, tmp_path / f"{block}", **{**SETTINGS, "blocks.frames": block})[0] for block in (4, 12)
    )
    assert tools.differences(one.path, other.path) == []
