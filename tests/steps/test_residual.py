"""What a denoiser took away, judged: white noise, noise that was kept, signal that was lost, correlated noise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from pipeline.steps.residual import REACH, residual, whiteness

SHAPE = (160, 180)
RNG = np.random.default_rng


def clean(mean=6.0):
    y, x = np.indices(SHAPE)
    return mean * (1 + 0.4 * np.cos(2 * np.pi * y / 11) * np.cos(2 * np.pi * x / 13))


@pytest.mark.parametrize("readout", [0.0, 4.0])
@pytest.mark.parametrize("mean", [0.3, 6.0, 80.0])
def test_a_perfect_denoiser_leaves_white_noise_as_strong_as_predicted(mean, readout):
    truth = clean(mean)
    counts = RNG(1).poisson(truth) + RNG(2).normal(0, 1, SHAPE) * np.sqrt(readout)
    found = whiteness(residual(counts, truth, readout_variance=readout))
    assert found.spread == pytest.approx(1, abs=0.02)
    assert found.white and abs(found.correlation) < found.limit == pytest.approx(4 / np.sqrt(truth.size))


def test_noise_that_was_kept_shows_as_too_small_a_residual():
    truth = clean()
    counts = RNG(1).poisson(truth)
    found = whiteness(residual(counts, truth + 0.5 * (counts - truth), readout_variance=0.0))
    assert found.spread < 0.6


def test_signal_that_was_lost_is_seen():
    counts = RNG(1).poisson(clean(40.0))
    found = whiteness(residual(counts, np.full(SHAPE, 40.0), readout_variance=0.0))
    assert found.spread > 1.5 and found.correlation > 0.3 and not found.white


def test_correlated_noise_is_seen():
    counts = 100 + 10 * gaussian_filter(RNG(1).standard_normal(SHAPE), 0.6) * 2.2
    found = whiteness(residual(counts, np.full(SHAPE, 100.0), readout_variance=0.0))
    assert found.correlation > 0.2 and not found.white


@pytest.mark.parametrize("lag", [(0, 1), (1, 0), (2, -3), (3, 3), (1, -1)])
def test_a_correlation_at_any_lag_is_found_with_its_sign(lag):
    noise = RNG(3).standard_normal(SHAPE)
    found = whiteness(noise - 0.5 * np.roll(noise, lag, (0, 1)))
    assert max(map(abs, lag)) <= REACH
    assert found.correlation == pytest.approx(-0.5 / 1.25, abs=0.03)


@pytest.mark.parametrize("values", [np.zeros(SHAPE), np.full(SHAPE, np.nan), np.ones((3, 3))])
def test_nothing_is_said_of_no_residual(values):
    found = whiteness(values)
    assert np.isnan(found).all() and not found.white
