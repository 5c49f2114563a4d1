"""Noise that a detector spreads over pixels: it is noticed, and the denoiser works from other frames alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from pipeline.results.open import open_run
from pipeline.steps.noise import noise_correlation
from schemas.errors import SettingsError
from tests import e2e_tools as tools

DOSE, SHAPE, FRAMES = 2.0, (96, 104), 14
SETTINGS = {
    "denoise.weights": "adapt", "denoise.tier": "small", "denoise.steps": 240, "images.save": ["denoised"],
    "source.counts_per_electron": 1.0,
}  # fmt: skip


def spread(frames, sigma=0.6):
    return np.stack([gaussian_filter(frame.astype(np.float32), sigma, mode="wrap") for frame in frames])


def moving(dose, frames=FRAMES):
    return tools.lattice(SHAPE, frames=frames, dose=dose, drift=(0.0, 0.0), seed=4)[0]


@pytest.mark.parametrize(
    ("sigma", "least", "most", "shrunk"), [(0.0, -0.02, 0.02, 1.0), (0.4, 0.05, 0.1, 1.39), (0.6, 0.3, 0.46, 4.08)]
)
def test_correlation_of_noise_is_measured(sigma, least, most, shrunk):
    """Of neighbours, spread by a Gaussian: 0, 0.089, 0.446; the lowest frequencies have no part in the estimate."""
    noise = np.random.default_rng(0).poisson(1.0, (6, 256, 256))
    found = noise_correlation(pairwise(spread(noise, sigma) if sigma else noise.astype(np.float32)))
    assert least < found.largest < most
    assert found.shrunk == pytest.approx(shrunk, rel=0.12)


@pytest.mark.parametrize("dose", [0.1, 2.0, 30.0])
def test_a_crystal_that_moves_is_not_taken_for_correlated_noise(dose):
    assert abs(noise_correlation(pairwise(moving(dose).astype(np.float32))).largest) < 0.05


def test_without_enough_of_two_frames_nothing_is_known():
    assert np.isnan(noise_correlation([]).largest)
    small = np.random.default_rng(0).poisson(1.0, (3, 60, 90)).astype(np.float32)
    assert np.isnan(noise_correlation(pairwise(small)).largest)
    still = np.ones((128, 128), np.float32)
    assert np.isnan(noise_correlation([(still, still), (still, np.full_like(still, np.nan))]).largest)


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    return tools.write_movie(tmp_path_factory.mktemp("spread") / "spread.tif", spread(moving(DOSE)))


def denoised(movie, folder, **settings):
    (outcome,) = tools.run_job(movie, folder, **{**SETTINGS, **settings})
    assert outcome.status == "complete", outcome.reason
    run = open_run(outcome.path)
    error = run["images/denoised/s0/denoised"].values - spread(moving(1e4)) * DOSE / 1e4
    return run.attrs["colonnade"], float(np.sqrt(np.mean(error[:, 8:-8, 8:-8] ** 2)))


def test_a_movie_of_such_noise_is_denoised_from_its_neighbours_and_says_so(movie, tmp_path):
    told, error = denoised(movie, tmp_path / "auto")
    assert told["models"]["denoise"]["blind"] == "frame"
    assert 0.3 < told["models"]["denoise"]["noise_correlation"] < 0.5
    assert any("what lasts one frame is not seen" in note for note in told["notes"])
    plain, worse = denoised(movie, tmp_path / "pixels", **{"denoise.blind": "pixels"})
    assert plain["models"]["denoise"]["blind"] == "pixels"
    assert not any("what lasts one frame is not seen" in note for note in plain["notes"])
    for notes in (told["notes"], plain["notes"]):
        assert any("noise of pixels nearby is correlated (+0.3" in note for note in notes)
    assert error < 0.6 * worse


def test_what_is_not_trained_does_not_learn_the_noise_and_keeps_its_frame(movie, tmp_path):
    told, _ = denoised(movie, tmp_path, **{"denoise.weights": "pretrained"})
    assert told["models"]["denoise"]["blind"] == "pixels"
    assert told["models"]["denoise"]["correlated"]


def test_wcvd_cannot_be_hidden_its_frame(movie, tmp_path):
    with pytest.raises(SettingsError, match="blind is frame, which network wcvd cannot be"):
        tools.job(movie, tmp_path, **{"denoise.network": "wcvd", "denoise.blind": "frame"})
