from __future__ import annotations

import numpy as np
import pytest

from pipeline.simulate.detector import apply_mtf, mtf_at
from pipeline.simulate.movie import MovieSpec, simulate_movie

MTF = (1.0, 0.02, 0.2, 2.5)
VACUUM = {"kind": "vacuum", "shape": (256, 256), "frames": 4, "sampling": 0.2, "dose": 2500.0}


def spectrum(counts, expected):
    """Mean noise power per radial frequency, of white Poisson noise 1: (k, power)."""
    power = np.mean([np.abs(np.fft.fft2(frame - expected)) ** 2 for frame in counts], axis=0) / (
        expected * counts[0].size
    )
    k = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256))
    bins = np.digitize(k, np.linspace(0.02, 0.48, 12))
    middle = np.linspace(0.02, 0.48, 12)
    return (middle[1:] + middle[:-1]) / 2, np.array([power[bins == i].mean() for i in range(1, 12)])


def test_counting_leaves_noise_white_and_integrating_blurs_it_with_the_mtf():
    counting = simulate_movie(MovieSpec(**VACUUM, mtf=MTF), 1)
    _, power = spectrum(counting.counts, 100.0)
    assert power == pytest.approx(np.ones(11), rel=0.05)
    integrating = simulate_movie(MovieSpec(**VACUUM, mtf=MTF, noise="integrating"), 1)
    assert integrating.counts.mean() == pytest.approx(100.0, rel=1e-3)
    k, power = spectrum(integrating.counts, 100.0)
    assert power == pytest.approx(mtf_at(k, MTF) ** 2, rel=0.08, abs=0.002)


def test_excess_noise_of_an_integrating_detector_adds_to_the_variance():
    flat = (1.0, 1.0, 0.3, 2.0)  # an MTF of one everywhere
    movie = simulate_movie(MovieSpec(**VACUUM, mtf=flat, noise="integrating", excess=0.5, counts_per_electron=10.0), 2)
    assert movie.counts.mean() == pytest.approx(1000.0, rel=2e-3)
    assert movie.counts.var() == pytest.approx(100 * 1.25 * 10**2, rel=0.02)


def test_mtf_is_the_response_to_a_point():
    """The form given: (c0 − c1) / (1 + (k / 2 c2)^|c3|) + c1 multiplies the Fourier amplitude."""
    point = np.zeros((64, 64))
    point[20, 30] = 1.0
    response = np.abs(np.fft.fft2(apply_mtf(point, (0.9, 0.1, 0.2, -2.5))))
    k = 8 / 64
    assert response[0, 0] == pytest.approx(1.0, abs=1e-5)
    assert response[8, 0] == pytest.approx((0.8 / (1 + (k / 0.4) ** 2.5) + 0.1) / 0.9, abs=1e-5)


def test_gain_and_hot_pixels_stay_with_the_detector():
    movie = simulate_movie(MovieSpec(**VACUUM, gain_spread=0.05, hot_pixels=0.001), 3)
    mean = movie.counts.mean(0)
    hot = mean > 250
    assert 0.0003 < hot.mean() < 0.002
    assert (movie.counts[:, hot] > 200).all()
    assert mean[~hot].std() == pytest.approx(np.hypot(5.0, np.sqrt(100 / 4)), rel=0.05)
    first, last = (movie.counts[i][~hot].astype(float) for i in (0, 3))
    assert np.corrcoef(first, last)[0, 1] == pytest.approx(25 / 125, abs=0.03)
