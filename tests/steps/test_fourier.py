"""Fourier peaks of particles against plane waves whose vectors and amplitudes are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.steps.fourier import find_pairs, fourier_map, frame_ratio

SAMPLING = 0.2
SETTINGS = {"sampling": SAMPLING, "band": (0.2, 0.9), "significance": 12.0, "threshold": 2.0}
SIDE = 200
Y, X = np.mgrid[:SIDE, :SIDE] * SAMPLING


def waves(*parts, dose=30.0, seed=0):
    """Counts of 1 + Σ amplitude · cos(2π g·r), g of a length [1/Å] and a direction [deg] from x towards y."""
    image = np.ones((SIDE, SIDE))
    for amplitude, length, degrees in parts:
        angle = np.deg2rad(degrees)
        image += amplitude * np.cos(2 * np.pi * length * (np.sin(angle) * Y + np.cos(angle) * X))
    return np.random.default_rng(seed).poisson(dose * image).astype(float)


def lattice(one, other, **options):
    """The waves of two pairs (amplitude, length, degrees) and, weaker, of the shorter of their sum and difference."""
    vectors = [length * np.exp(1j * np.deg2rad(degrees)) for _, length, degrees in (one, other)]
    third = min(vectors[0] - vectors[1], vectors[0] + vectors[1], key=abs)
    return waves(one, other, (0.1, abs(third), np.rad2deg(np.angle(third))), **options)


def disc(y=20.0, x=20.0, radius=12.0, label=1):
    return np.where((Y - y) ** 2 + (X - x) ** 2 < radius**2, label, 0)


@pytest.mark.parametrize(
    ("lengths", "angle", "zone"),
    [
        ((0.49, 0.49), 90.0, "100"),
        ((0.425, 0.425), 70.53, "110"),
        ((0.425, 0.4907), 54.74, "110"),
        ((0.69, 0.69), 60.0, "111"),
        ((0.40, 0.40), 80.0, ""),
    ],
)
def test_spacings_angle_and_zone(lengths, angle, zone):
    frame = lattice((0.2, lengths[0], 17.0), (0.2, lengths[1], 17.0 + angle))
    found = fourier_map(frame, disc(), **SETTINGS)
    assert found["spacings"][0] == pytest.approx(sorted(1 / np.array(lengths))[::-1], rel=0.01)
    assert found["angle"][0] == pytest.approx(angle, abs=1.5)
    assert found["zone"][0] == zone
    assert found["peaks"][0] == 3


@pytest.mark.parametrize("ratio", [1.0, 4.0, 9.0])
def test_the_ratio_is_that_of_powers(ratio):
    frame = lattice((0.4, 0.425, 10.0), (0.4 / np.sqrt(ratio), 0.425, 80.0), dose=100.0)
    found = fourier_map(frame, disc(), **SETTINGS)
    assert found["ratio"][0] == pytest.approx(ratio, rel=0.15)
    assert found["interpretable"][0] == (ratio <= 2)


def test_without_a_second_pair_there_is_no_ratio():
    found = fourier_map(waves((0.3, 0.425, 10.0)), disc(), **SETTINGS)
    assert np.isnan(found["ratio"][0])
    assert not found["interpretable"][0]
    assert found["spacings"][0, 0] == pytest.approx(1 / 0.425, rel=0.01)
    assert np.isnan(found["spacings"][0, 1])


def test_equal_pairs_that_span_no_lattice_have_no_ratio():
    """Two waves alone: a crystal on zone sends their sum or their difference too."""
    found = fourier_map(waves((0.3, 0.425, 10.0), (0.3, 0.425, 80.0)), disc(), **SETTINGS)
    assert np.isnan(found["ratio"][0])
    assert found["peaks"][0] == 2


def test_half_the_sum_spans_a_lattice_too():
    """220, 2-20 and, between them, 200."""
    frame = waves((0.3, 0.69, 10.0), (0.3, 0.69, 100.0), (0.15, 0.69 / 2**0.5, 55.0))
    found = fourier_map(frame, disc(), **SETTINGS)
    assert found["zone"][0] == "100"
    assert found["ratio"][0] == pytest.approx(1.0, abs=0.2)


def test_pairs_in_nearly_one_direction_are_no_lattice():
    found = fourier_map(waves((0.3, 0.425, 10.0), (0.3, 0.6, 25.0)), disc(), **SETTINGS)
    assert np.isnan(found["ratio"][0])


def test_particles_in_the_order_of_their_labels_and_a_label_that_is_absent():
    inside = disc(20, 20, 9, 3) + disc(20, 38, 7, 1)
    frame = np.where(inside == 3, lattice((0.3, 0.49, 0.0), (0.3, 0.49, 90.0)), waves())
    found = fourier_map(frame, inside, **SETTINGS)
    assert found["zone"].tolist() == ["", "", "100"]
    assert found["interpretable"].tolist() == [False, False, True]
    assert np.isnan(found["ratio"][:2]).all()


def test_no_particles_give_no_rows():
    found = fourier_map(waves(), np.zeros((SIDE, SIDE), int), **SETTINGS)
    assert {name: values.shape for name, values in found.items()} == {
        "ratio": (0,), "spacings": (0, 2), "angle": (0,), "peaks": (0,), "zone": (0,), "interpretable": (0,),
    }  # fmt: skip


def test_a_whole_frame():
    found = frame_ratio(lattice((0.11, 0.47, 5.0), (0.11, 0.47, 65.0)), **SETTINGS)
    assert found["interpretable"]
    assert found["zone"] == "111"
    assert found["ratio"] == pytest.approx(1.0, abs=0.2)


def test_noise_alone_has_no_peaks():
    """At a significance of 12 fewer than 3 of 100 particles of this size show a peak in noise."""
    peaks = [fourier_map(waves(seed=seed), disc(), **SETTINGS)["peaks"][0] for seed in range(40)]
    assert sum(peaks) <= 3


def test_a_bright_background_is_no_peak():
    """The amorphous film's slow texture raises the background of its ring, not the count of peaks."""
    generator = np.random.default_rng(1)
    texture = np.fft.irfft2(
        np.fft.rfft2(generator.normal(size=(SIDE, SIDE)))
        * np.exp(-((np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)) / 0.08 - 1) ** 2) / 0.1)
    )
    frame = generator.poisson(30 * np.clip(1 + 2 * texture, 0, None)).astype(float)
    assert fourier_map(frame, disc(), **SETTINGS)["peaks"][0] <= 1


@settings(max_examples=15, deadline=None)
@given(degrees=st.floats(0, 180), quarter=st.integers(0, 3))
def test_turning_the_frame_changes_nothing_but_rounding(degrees, quarter):
    frame, labels = lattice((0.3, 0.425, degrees), (0.2, 0.425, degrees + 70.53)), disc(18, 22, 10)
    one = fourier_map(frame, labels, **SETTINGS)
    other = fourier_map(np.rot90(frame, quarter), np.rot90(labels, quarter), **SETTINGS)
    assert other["ratio"][0] == pytest.approx(one["ratio"][0], rel=1e-3)
    assert other["angle"][0] == pytest.approx(one["angle"][0], abs=0.05)


def test_white_noise_has_power_of_its_variance():
    frame = np.random.default_rng(2).normal(0, 3.0, (SIDE, SIDE))
    pairs = find_pairs(frame, np.ones((SIDE, SIDE)), sampling=SAMPLING, band=(0.2, 0.9))
    assert np.median(pairs.power / (pairs.significance - 1)) == pytest.approx(9.0, rel=0.15)
