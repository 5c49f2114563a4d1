"""Cameras with known blur and noise are recovered from vacuum within the errors that the fit states."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from pipeline.steps.mtf import fit_dark, fit_detector, noise_power, transfer
from pipeline.steps.vacuum import Level, expected_third, find_vacuum, noise_spectra, third_moments
from schemas.errors import SourceError

MTF = (1.0, 0.08, 0.12, 2.5)
ROUNDING = 1 / 12


def blurred(image, mtf):
    k = np.hypot(np.fft.fftfreq(image.shape[0])[:, None], np.fft.rfftfreq(image.shape[1]))
    return np.fft.irfft2(np.fft.rfft2(image) * transfer(k, mtf), s=image.shape)


def scintillator(frames, side, *, signal=100.0, gain=4.0, readout=3.0, offset=0.0, mtf=MTF, seed=0):
    """Whole counts (time, y, x): electrons, then blur, then readout noise; written out apart from the simulator."""
    generator = np.random.default_rng(seed)
    out = np.empty((frames, side, side))
    for frame in out:
        light = blurred(generator.poisson((signal - offset) / gain, (side + 32, side + 32)).astype(float), mtf)
        frame[:] = light[16:-16, 16:-16] * gain + offset + generator.normal(0, readout, (side, side))
    return np.rint(out)


def fitted(frames, **given):
    side = frames.shape[1]
    levels = noise_spectra(frames, [(0, 0, side, side)], tile=64)
    return fit_detector(levels, **{"offset": None, "readout": None, "rounding": ROUNDING, **given})


def skewness(frames):
    region = (0, 0, frames.shape[1], frames.shape[1])
    level = noise_spectra(frames, [region], tile=64)[0]
    return third_moments(frames, [region], tile=64, level=level)


def test_transfer_is_one_at_zero_and_has_the_stated_form():
    assert transfer(0.0, (0.9, 0.01, 0.3, 2.5)) == 1.0
    assert transfer(0.24, MTF) == pytest.approx(0.08 + 0.92 / 2)
    assert transfer([0.1, 0.5], None).tolist() == [1.0, 1.0]
    assert transfer(0.3, (1.0, 0.08, 0.12, -2.5)) == transfer(0.3, MTF)


def test_exact_spectra_give_the_exact_camera():
    k = np.linspace(0.03, 0.7, 80)
    levels = [
        Level(s, k, 4.0 * (s - 20.0) * transfer(k, MTF) ** 2 + 9.0 + ROUNDING, np.full(80, 1e4)) for s in (60.0, 100.0)
    ]
    fit = fit_detector(levels, offset=None, readout=None, rounding=ROUNDING)
    assert fit.mtf == pytest.approx(MTF, rel=1e-3)
    assert fit.counts_per_electron == pytest.approx(4.0, rel=1e-3)
    assert fit.readout == pytest.approx(3.0, rel=1e-3)
    assert fit.offset == pytest.approx(20.0, rel=1e-2)
    assert noise_power(k, fit, 100.0, rounding=ROUNDING) == pytest.approx(levels[1].power, rel=1e-4)


def test_a_scintillator_camera_is_recovered_within_its_errors():
    """Eight frames: every parameter within 4 standard errors, c2, c3 and the gain within 10 % as well."""
    fit = fitted(scintillator(8, 256), readout=3.0)
    pulls = [
        (fit.mtf[1] - 0.08) / fit.mtf_errors[1],
        (fit.mtf[2] - 0.12) / fit.mtf_errors[2],
        (fit.mtf[3] - 2.5) / fit.mtf_errors[3],
        (fit.counts_per_electron - 4.0) / fit.counts_per_electron_error,
    ]
    assert np.abs(pulls).max() < 4
    assert (*fit.mtf[1:], fit.counts_per_electron) == pytest.approx((0.08, 0.12, 2.5, 4.0), rel=0.1)
    assert 0.5 < fit.chi2 < 1.6
    assert np.isnan(fit.readout_error)


def test_readout_noise_is_fitted_where_it_is_not_given():
    fit = fitted(scintillator(8, 256, seed=3))
    assert fit.readout == pytest.approx(3.0, abs=4 * fit.readout_error)
    assert fit.mtf[1] == pytest.approx(0.08, abs=4 * fit.mtf_errors[1])
    assert any("entangled" in note or "c1 cannot" in note for note in fit.notes)
    assert any("reading without beam" in note for note in fit.notes)


def test_third_moments_are_those_of_blurred_electrons_and_none_of_readout_noise():
    third = skewness(scintillator(16, 256))
    k = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64))
    expected = 4.0**2 * 100.0 * expected_third(third, transfer(k, MTF))  # g³ of each of S / g electrons
    # Of noise less its mean over n frames, (1 − 1 / n) (1 − 2 / n) is left, and the power was scaled by n / (n − 1).
    pulls = (third.moment - expected * (15 * 14 / 16**2) * (16 / 15) ** 1.5) / third.error
    assert np.mean(pulls**2) < 2
    assert np.max(third.moment / third.error) > 10
    symmetric = 100 + np.random.default_rng(2).normal(0, 20, (8, 256, 256))
    silent = skewness(gaussian_filter(symmetric, (0, 1, 1)))
    assert np.mean((silent.moment / silent.error) ** 2) < 2
    assert skewness(scintillator(2, 128)) is None


def test_third_moments_part_the_plateau_from_readout_noise():
    frames = scintillator(24, 256, mtf=(1.0, 0.1, 0.12, 2.5), seed=4)
    alone, both = fitted(frames), fitted(frames, third=skewness(frames))
    assert both.mtf_errors[1] < 0.7 * alone.mtf_errors[1]
    assert both.mtf[1] == pytest.approx(0.1, abs=3 * both.mtf_errors[1])
    assert both.readout == pytest.approx(3.0, abs=3 * both.readout_error)


def test_third_moments_of_something_else_are_left_aside():
    frames = scintillator(16, 256)
    third = skewness(frames)
    odd = third._replace(moment=third.moment * np.where(np.arange(len(third.moment)) % 2, 1, -1))
    fit = fitted(frames, third=odd)
    assert any("third moments" in note for note in fit.notes)
    assert fit.mtf == fitted(frames).mtf


def test_a_plateau_that_cannot_be_seen_is_left_out_and_said_so():
    fit = fitted(scintillator(4, 128, mtf=(1.0, 0.01, 0.35, 2.5)))
    assert fit.mtf[1] == 0
    assert any("c1 is not seen" in note for note in fit.notes)
    assert transfer(0.25, fit.mtf) == pytest.approx(transfer(0.25, (1.0, 0.01, 0.35, 2.5)), abs=0.05)


def test_a_counting_camera_is_called_white():
    counts = np.random.default_rng(1).poisson(50.0, (6, 128, 128)).astype(float)
    fit = fitted(counts)
    assert fit.mtf is None
    assert fit.counts_per_electron == pytest.approx(1.0, abs=4 * fit.counts_per_electron_error + 2e-3)
    assert any("white" in note for note in fit.notes)


def test_two_brightnesses_tell_the_offset():
    frames = np.concatenate([scintillator(4, 192, signal=s, offset=30.0, seed=int(s)) for s in (80.0, 200.0)])
    fit = fitted(frames)
    assert len(fit.signal) >= 2
    assert fit.offset == pytest.approx(30.0, abs=4 * fit.offset_error)
    assert fit.offset_error < 10
    assert not any("reading without beam" in note for note in fit.notes)


def test_the_pattern_of_the_camera_is_no_noise():
    """A gain map of 10 % multiplies the spectrum's power many times; over time it stands still and drops out."""
    pattern = 1 + 0.1 * gaussian_filter(np.random.default_rng(5).normal(size=(192, 192)), 1.0) * 3.5
    frames = scintillator(8, 192, seed=7)
    plain, patterned = fitted(frames, readout=3.0), fitted(frames * pattern, readout=3.0)
    assert patterned.mtf[1:] == pytest.approx(plain.mtf[1:], rel=0.12)


def test_spikes_do_not_spoil_the_fit():
    frames = scintillator(4, 192, seed=9)
    generator = np.random.default_rng(9)
    plain = fitted(frames, readout=3.0)
    frames[generator.integers(0, 4, 20), generator.integers(0, 192, 20), generator.integers(0, 192, 20)] += 20_000
    spiked = fitted(frames, readout=3.0)
    assert spiked.counts_per_electron == pytest.approx(plain.counts_per_electron, rel=0.5)


def test_spectra_of_white_noise_have_its_variance_at_any_tile():
    frames = np.random.default_rng(0).normal(0, 5.0, (4, 128, 128)) + 200
    for tile in (32, 64):
        (level,) = noise_spectra(frames, [(0, 0, 128, 128)], tile=tile)
        assert np.average(level.power, weights=level.values) == pytest.approx(25.0, rel=0.03)
        assert level.mean == pytest.approx(200, rel=1e-3)
        spread = np.sqrt(level.values) * (level.power / 25.0 - 1)
        assert 0.4 < np.std(spread) < 1.3


def test_a_single_frame_with_a_gradient():
    frame = np.random.default_rng(0).normal(0, 5.0, (1, 128, 128)) + np.linspace(180, 220, 128)
    (level,) = noise_spectra(frame, [(0, 0, 128, 128)], tile=64)
    assert np.average(level.power, weights=level.values) == pytest.approx(25.0, rel=0.05)


def scene(seed=0, frames=4):
    """Vacuum on the left; on the right a lattice above and slow contrast below, and counting noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:256, :256]
    image = np.full((256, 256), 40.0)
    lattice = 6 * (np.cos(2 * np.pi * y / 12) + np.cos(2 * np.pi * x / 12))
    texture = 12 * gaussian_filter(generator.normal(size=(256, 256)), 5) / 0.056
    image += np.where(x >= 128, np.where(y < 128, lattice, texture), 0)
    return generator.poisson(np.clip(image, 1, None), (frames, 256, 256)).astype(float)


def test_vacuum_is_found_beside_lattice_and_film():
    tiles = find_vacuum(scene(), tile=64, tolerance=0.2)
    clear, beside = tiles.left + 64 <= 128, tiles.left >= 128
    assert tiles.chosen[clear].mean() > 0.9
    assert not tiles.chosen[beside].any()


def test_without_vacuum_a_region_is_asked_for():
    y, x = np.mgrid[:128, :128]
    lattice = 40 + 8 * (np.cos(2 * np.pi * y / 9) + np.cos(2 * np.pi * x / 9))
    frames = np.random.default_rng(0).poisson(lattice, (3, 128, 128)).astype(float)
    with pytest.raises(SourceError, match="--region"):
        find_vacuum(frames, tile=64, tolerance=0.2)
    with pytest.raises(SourceError, match="hold no square of 64 px"):
        find_vacuum(frames[:, :32], tile=64, tolerance=0.2)
    with pytest.raises(SourceError, match="name a larger one"):
        noise_spectra(frames, [(0, 0, 40, 40)], tile=64)


def test_a_spectrum_of_another_form_is_called_so():
    k = np.linspace(0.03, 0.7, 80)
    comb = 100 * (1 + 0.8 * np.sign(np.sin(40 * k)))
    fit = fit_detector([Level(100.0, k, comb, np.full(80, 1e3))], offset=0.0, readout=0.0, rounding=0.0)
    assert any("not of this form" in note for note in fit.notes)


def test_dark_frames_give_offset_and_readout():
    generator = np.random.default_rng(0)
    pattern = generator.normal(20, 2, (64, 64))
    frames = np.rint(pattern + generator.normal(0, 3, (6, 64, 64)))
    dark = fit_dark(frames, rounding=ROUNDING)
    assert dark[:2] == pytest.approx((20, 3), rel=0.02)
    assert not dark.clipped
    assert fit_dark(np.rint(20 + generator.normal(0, 3, (1, 64, 64))), rounding=ROUNDING).readout == pytest.approx(
        3, rel=0.05
    )


def test_dark_frames_that_were_cut_off_at_zero():
    generator = np.random.default_rng(0)
    cut = np.clip(np.rint(2.0 + generator.normal(0, 4, (4, 64, 64))), 0, None)
    dark = fit_dark(cut, rounding=ROUNDING)
    assert dark.clipped
    assert dark[:2] == pytest.approx((2, 4), rel=0.05)
    with pytest.raises(SourceError, match="expected a camera that adds an offset"):
        fit_dark(np.zeros((2, 8, 8)), rounding=ROUNDING)
