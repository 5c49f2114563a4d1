"""Bad pixels, correction, noise model and frame flags against known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from pipeline.steps import detector

THRESHOLD = 7.0


def lattice(sigma: float, size: int = 128, spacing: float = 12.37) -> np.ndarray:
    """A still crystal of Gaussian columns [px], integrated over the pixels, mean 1."""
    edges = np.arange(size + 1) - 0.5
    centres = np.arange(-spacing, size + spacing, spacing)
    profile = np.diff(erf((edges[:, None] - centres) / (sigma * np.sqrt(2))), axis=0).sum(axis=1) * sigma
    image = 1 + 5 * np.outer(profile, profile)
    return image / image.mean()


@pytest.mark.parametrize("dose", [0.05, 0.2, 5.0, 50.0])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5])
def test_no_atom_of_a_still_crystal_is_called_bad(dose: float, sigma: float) -> None:
    sample = np.random.default_rng(1).poisson(lattice(sigma) * dose, (32, 128, 128))
    assert detector.find_bad_pixels(sample, threshold=THRESHOLD).sum() == 0


def test_even_columns_of_a_third_of_a_pixel_are_hardly_touched() -> None:
    sample = np.random.default_rng(1).poisson(lattice(0.3) * 50, (32, 128, 128))
    assert detector.find_bad_pixels(sample, threshold=THRESHOLD).sum() <= 2


@pytest.mark.parametrize("dose", [0.05, 5.0])
def test_hot_dead_and_blinking_pixels_are_found(dose: float) -> None:
    rng = np.random.default_rng(2)
    sample = rng.poisson(lattice(2.5) * dose, (64, 128, 128))
    hot, dead, blinking = [(20, 30), (0, 64), (127, 127)], [(50, 50), (51, 50), (90, 100)], [(70, 20)]
    for place in hot:
        sample[:, *place] += rng.poisson(5 + 10 * dose, 64)
    for place in dead:
        sample[:, *place] = 0
    for place in blinking:
        sample[::4, *place] += int(10 + 20 * dose)
    bad = detector.find_bad_pixels(sample, threshold=THRESHOLD)
    wanted = hot + blinking + (dead if dose >= 1 else [])  # 64 frames of 0.05 e/px leave sound pixels empty, too
    assert [place for place in wanted if not bad[place]] == []
    assert bad.sum() <= len(wanted) + 1


def test_a_single_x_ray_is_no_defect_and_a_stuck_value_is() -> None:
    rng = np.random.default_rng(3)
    sample = rng.normal(100, 10, (32, 64, 64))
    sample[7, 10, 10] = 1000
    sample[:, 40, 41] = 103.0
    bad = detector.find_bad_pixels(sample, threshold=THRESHOLD)
    assert bad[40, 41]
    assert bad.sum() == 1


def test_frames_with_nan_are_left_out_of_the_search() -> None:
    sample = np.random.default_rng(3).normal(100, 10, (16, 32, 32))
    sample[4] = np.nan
    sample[:, 8, 9] += 200
    bad = detector.find_bad_pixels(sample, threshold=THRESHOLD)
    assert np.argwhere(bad).tolist() == [[8, 9]]
    assert not detector.find_bad_pixels(sample[4:5], threshold=THRESHOLD).any()


def test_one_frame_shows_only_the_grossest_pixels() -> None:
    sample = np.random.default_rng(5).normal(100, 10, (1, 64, 64))
    sample[0, 30, 31] = 5000
    assert np.argwhere(detector.find_bad_pixels(sample, threshold=THRESHOLD)).tolist() == [[30, 31]]


def test_correct_is_minus_dark_times_gain() -> None:
    counts = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    dark, gain = np.full((3, 4), 2, np.float32), np.linspace(0.5, 2, 12, dtype=np.float32).reshape(3, 4)
    corrected = detector.correct(counts, dark=dark, gain=gain, bad=np.zeros((3, 4), bool))
    assert corrected.dtype == np.float32
    np.testing.assert_allclose(corrected, (counts.astype(float) - 2) * gain, rtol=1e-6)


def test_bad_regions_are_filled_from_their_rim() -> None:
    y, x = np.mgrid[:20, :20]
    frames = np.stack([3.0 * y + 2 * x, 100 - y]).astype(np.float32)
    bad = np.zeros((20, 20), bool)
    bad[8:12, 8:12] = bad[0, 0] = True
    spoiled = frames.copy()
    spoiled[:, bad] = 9999
    repaired = detector.correct(spoiled, dark=None, gain=None, bad=bad)
    np.testing.assert_array_equal(repaired[:, ~bad], frames[:, ~bad])
    assert np.abs(repaired - frames).max() < 8


def test_maps_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gain map has shape \(2, 2\), the frames \(3, 4\)"):
        detector.correct(np.ones((1, 3, 4)), dark=None, gain=np.ones((2, 2), np.float32), bad=np.zeros((3, 4), bool))


@pytest.mark.parametrize("dose", [0.05, 1.0, 20.0])
def test_counting_data_are_electrons(dose: float) -> None:
    sample = np.random.default_rng(0).poisson(lattice(2.5) * dose, (8, 128, 128)).astype(np.float32)
    noise = detector.fit_noise(sample, counts_per_electron=None)
    assert noise == detector.NoiseModel(0.0, 1.0, 0.0, calibrated=True, signal_dependent=True)


@pytest.mark.parametrize("frames", [1, 16])
def test_gain_and_offset_are_recovered(frames: int) -> None:
    electrons = np.random.default_rng(0).poisson(lattice(2.5, 256) * 5, (frames, 256, 256))
    noise = detector.fit_noise((40 * electrons + 100).astype(np.float32), counts_per_electron=None)
    assert noise.counts_per_electron == pytest.approx(40, rel=0.1)
    assert noise.offset == pytest.approx(100, abs=25)
    assert not noise.calibrated


def test_readout_noise_is_recovered_and_a_given_gain_believed() -> None:
    rng = np.random.default_rng(0)
    electrons = rng.poisson(lattice(2.5, 256) * 5, (16, 256, 256)) + rng.normal(0, 2, (16, 256, 256))
    for given_gain in (None, 40.0):
        noise = detector.fit_noise((40 * electrons).astype(np.float32), counts_per_electron=given_gain)
        assert noise.counts_per_electron == pytest.approx(40, rel=0.05)
        assert noise.readout_variance == pytest.approx(4, rel=0.1)
        assert noise.calibrated == (given_gain is not None)


def test_drift_of_the_crystal_is_not_taken_for_noise() -> None:
    image, rng = lattice(2.5, 256), np.random.default_rng(0)
    moved = np.stack([np.roll(image, (t, -t), (0, 1)) for t in range(12)])
    sample = rng.poisson(moved * 10) * 0.01
    noise = detector.fit_noise(sample.astype(np.float32), counts_per_electron=None)
    assert noise.counts_per_electron == pytest.approx(0.01, rel=0.15)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 500.0])
def test_constant_noise_gets_the_constant_model(scale: float) -> None:
    image = lattice(2.5, 256)
    sample = scale * (image + 0.1 * np.random.default_rng(0).normal(size=(8, 256, 256)))
    noise = detector.fit_noise(sample.astype(np.float32), counts_per_electron=None)
    assert not noise.signal_dependent
    assert not noise.calibrated
    electrons = detector.to_electrons(sample, noise)
    variance = detector.noise_variance(electrons, noise)
    assert np.unique(variance).size == 1
    assert electrons.mean() == pytest.approx(variance.mean(), rel=0.05)
    assert (electrons - detector.to_electrons(scale * image, noise)).var() == pytest.approx(variance.mean(), rel=0.05)


def test_fitted_electrons_have_variance_equal_to_mean() -> None:
    image, rng = lattice(2.5, 256), np.random.default_rng(4)
    raw = 0.013 * rng.poisson(image * 9, (16, 256, 256)) + 0.2
    noise = detector.fit_noise(raw.astype(np.float32), counts_per_electron=None)
    electrons = detector.to_electrons(raw, noise)
    bright = image > np.quantile(image, 0.9)
    assert electrons.var(axis=0)[bright].mean() == pytest.approx(electrons.mean(axis=0)[bright].mean(), rel=0.1)


def test_frames_without_noise_or_without_finite_values() -> None:
    flat = detector.fit_noise(np.ones((4, 32, 32), np.float32), counts_per_electron=None)
    assert flat.counts_per_electron > 0
    assert np.isfinite(detector.to_electrons(np.ones((32, 32)), flat)).all()
    with pytest.raises(ValueError, match="none of the 2 sampled frames is finite"):
        detector.fit_noise(np.full((2, 8, 8), np.nan, np.float32), counts_per_electron=None)
    with pytest.raises(ValueError, match="counts_per_electron is -1"):
        detector.fit_noise(np.ones((2, 8, 8), np.float32), counts_per_electron=-1.0)


def test_flags_name_the_reason() -> None:
    counts = np.random.default_rng(0).normal(100, 5, (5, 16, 16))
    counts[1], counts[2], counts[3, 0, 0] = 0, 7, np.inf
    counts[4, :8] = 255
    statistics = detector.frame_statistics(counts, saturation=255)
    dropped, reasons = detector.frame_flags(statistics, max_saturated_fraction=0.05)
    assert dropped.tolist() == [False, True, True, True, True]
    for reason, words in zip(
        reasons, ("", "all pixels are zero", "all pixels hold 7", "not finite", "50.00%"), strict=True
    ):
        assert words in reason
    assert statistics["saturated_fraction"].tolist() == [0, 0, 0, 0, 0.5]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**16))
def test_statistics_agree_with_numpy_and_with_any_cut(cut: int, seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 4000, (7, 9, 5), dtype=np.uint16)
    whole = detector.frame_statistics(counts, saturation=3000)
    parts = [detector.frame_statistics(part, saturation=3000) for part in (counts[:cut], counts[cut:])]
    for name, values in whole.items():
        np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))
    np.testing.assert_allclose(whole["mean"], counts.mean(axis=(1, 2)))
    np.testing.assert_allclose(whole["variance"], counts.var(axis=(1, 2)))
    np.testing.assert_array_equal(whole["saturated_fraction"], (counts >= 3000).mean(axis=(1, 2)))
