from __future__ import annotations

import numpy as np
import pytest

from pipeline.networks.species_images import transfer
from pipeline.steps.lowpass import ROLL_OFF, information_limit, lowpass

SAMPLING = 0.2


def wave(frequency, size=96, phase=0.3):
    """A plane wave of `frequency` [1/Å] along x, mean 3."""
    x = np.arange(size) * SAMPLING
    return (3 + np.cos(2 * np.pi * frequency * x + phase) * np.ones((size, 1))).astype(np.float32)[None]


def inner(frames):
    return frames[:, 24:-24, 24:-24]


def test_waves_well_below_the_cutoff_pass_and_well_above_vanish():
    # whole periods in the reflected frame would be needed for exactness at the edges; the middle is not affected
    low, high = wave(0.5), wave(2.0)
    np.testing.assert_allclose(inner(lowpass(low, cutoff=1.0, sampling=SAMPLING)), inner(low), atol=0.02)
    np.testing.assert_allclose(inner(lowpass(high, cutoff=1.0, sampling=SAMPLING)), 3, atol=0.02)


def test_half_passes_at_the_cutoff():
    frames = wave(1.0, size=400)
    amplitude = np.std(lowpass(frames, cutoff=1.0, sampling=SAMPLING)[:, 100:-100, 100:-100]) / np.std(frames)
    assert amplitude == pytest.approx(0.5, abs=0.05)


def test_white_noise_keeps_the_share_of_its_spectrum():
    noise = np.random.default_rng(0).normal(size=(2, 256, 256)).astype(np.float32)
    cutoff = 1.0
    share = np.pi * (cutoff * SAMPLING) ** 2  # area of the pass-band disc in the unit cell of frequencies
    passed = lowpass(noise, cutoff=cutoff, sampling=SAMPLING).var()
    assert passed == pytest.approx(share, rel=0.06)
    assert ROLL_OFF < 0.5


@pytest.mark.parametrize("cutoff", [None, 0.5 / SAMPLING * 2**0.5, 100.0])
def test_no_filter_beyond_the_corner_of_the_spectrum(cutoff):
    frames = np.random.default_rng(0).random((2, 20, 30), dtype=np.float32)
    assert np.array_equal(lowpass(frames, cutoff=cutoff, sampling=SAMPLING), frames)


@pytest.mark.parametrize("shape", [(3, 40, 56), (1, 7, 5), (2, 31, 2)])
def test_means_are_kept_and_frames_do_not_meet(shape):
    frames = np.random.default_rng(1).random(shape, dtype=np.float32) + 5
    result = lowpass(frames, cutoff=0.6, sampling=SAMPLING)
    assert result.shape == shape
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.mean((1, 2)), frames.mean((1, 2)), rtol=1e-6)
    for i in range(len(frames)):
        assert np.array_equal(lowpass(frames[i : i + 1], cutoff=0.6, sampling=SAMPLING)[0], result[i])


def test_a_ramp_does_not_wrap_around():
    ramp = np.broadcast_to(np.linspace(0, 1, 64, dtype=np.float32), (1, 64, 64))
    result = lowpass(ramp, cutoff=0.3, sampling=SAMPLING)
    assert np.abs(result - ramp).max() < 0.05


@pytest.mark.parametrize(("energy", "spread"), [(300.0, 20.0), (300.0, 40.0), (80.0, 20.0), (60.0, 7.0)])
def test_the_information_limit_is_where_the_envelope_of_the_simulator_is_e_to_the_minus_two(energy, spread):
    gpts, sampling = 2048, 0.05
    lens = np.abs(transfer(gpts, sampling=sampling, energy=energy, defocus=0.0, spherical=0.0, spread=(spread, 0.0))[0])
    seen = np.fft.fftfreq(gpts, sampling)[: gpts // 2][lens[: gpts // 2] >= np.exp(-2)].max()
    assert information_limit(energy, focal_spread=spread) == pytest.approx(seen, abs=1.1 / (gpts * sampling))


def test_the_limit_of_a_common_microscope():
    """300 keV, 20 Å: 0.66 Å."""
    assert 1 / information_limit(300.0, focal_spread=20.0) == pytest.approx(0.661, abs=0.002)
