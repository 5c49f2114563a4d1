"""Offsets between defoci: found whatever the sign of the contrast, and agreed on over a movie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import fft2, fftfreq, ifft2
from scipy.ndimage import gaussian_filter

from pipeline.steps import focus

OPTIONS = {"reference": 0, "scale": 12.0, "band": (0.01, 0.35), "taper": 0.15}


def moved(image: np.ndarray, offset: tuple[float, float]) -> np.ndarray:
    """The periodic image with its content moved by `offset` (y, x) [px], exactly."""
    ky, kx = (fftfreq(size) for size in image.shape)
    return ifft2(fft2(image) * np.exp(-2j * np.pi * (ky[:, None] * offset[0] + kx * offset[1]))).real


def through(image: np.ndarray, defocus: float) -> np.ndarray:
    """The image as a weak phase object appears: each frequency with a factor of either sign."""
    ky, kx = (fftfreq(size) for size in image.shape)
    square = ky[:, None] ** 2 + kx**2
    return ifft2(fft2(image) * np.sin(np.pi * defocus * square + 0.4)).real


def specimen(seed: int, shape=(160, 176)) -> np.ndarray:
    return gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5, mode="wrap")


def sheet(seed: int, shape=(160, 176), *, missing: float = 0.15) -> np.ndarray:
    """A hexagonal lattice with a constant of 14 px, with some sites missing."""
    rng = np.random.default_rng(seed)
    i, j = (v.ravel() for v in np.mgrid[-20:40, -20:40])
    at = np.stack([j * 14 * np.sqrt(3) / 2, (i + j / 2) * 14], 1)
    at = at[(at >= 0).all(1) & (at < np.array(shape) - 1).all(1) & (rng.random(len(at)) > missing)]
    image = np.zeros(shape)
    np.add.at(image, tuple(at.round().astype(int).T), 1.0)
    return gaussian_filter(image, 2.0, mode="wrap")


@pytest.mark.parametrize("make", [specimen, sheet])
@pytest.mark.parametrize("offset", [(0.0, 0.0), (3.3, -4.6), (-5.2, 1.7)])
def test_offsets_are_found_though_contrast_turns_over(make, offset) -> None:
    plain = make(3)
    planes = np.stack(
        [through(plain, 10.0), through(moved(plain, offset), 120.0), -through(moved(plain, offset), 10.0)]
    )
    noise = np.random.default_rng(0).normal(size=planes.shape) * 0.3 * planes.std((1, 2))[:, None, None]
    found = focus.plane_offsets(planes + noise, **OPTIONS)
    assert found[0, 0].tolist() == [0, 0, 1]
    for plane in (1, 2):
        assert found[plane, 0, :2] == pytest.approx(offset, abs=0.2)
        assert found[plane, 0, 2] == 1


def test_plain_correlation_would_not_do() -> None:
    """Where contrast is inverted, correlation misleads."""
    plain = sheet(3)
    one, other = through(plain, 10.0), -through(moved(plain, (3.3, -4.6)), 10.0)
    correlation = ifft2(fft2(other) * fft2(one).conj()).real
    peak = np.array(np.unravel_index(correlation.argmax(), correlation.shape))
    wrapped = (peak + np.array(plain.shape) // 2) % plain.shape - np.array(plain.shape) // 2
    assert np.hypot(*(wrapped - [3.3, -4.6])) > 3


def test_whatever_the_sign_of_the_shift_the_content_comes_back() -> None:
    plain = specimen(1)
    offset = np.array([2.4, -3.7])
    back = focus.moved_back(moved(plain, tuple(offset)), offset)
    inside = (slice(12, -12),) * 2
    assert np.abs(back - plain)[inside].max() < 0.02 * plain.std()


def test_planes_that_are_not_finite_have_no_offset() -> None:
    planes = np.stack([specimen(1), specimen(1), specimen(1)])
    planes[1, 5, 5] = np.nan
    found = focus.plane_offsets(planes, **OPTIONS)
    assert np.isnan(found[1]).all() and found[2, 0, :2] == pytest.approx((0, 0), abs=0.02)
    planes[0, 5, 5] = np.nan
    assert np.isnan(focus.plane_offsets(planes, **OPTIONS)[2]).all()
    empty = focus.plane_offsets(np.zeros((2, 64, 64)), **OPTIONS)
    assert np.isnan(empty[1]).all()


def candidates(*rows: list[tuple[float, float, float]]) -> np.ndarray:
    """Candidates (time, 1, candidate, 3) of one plane."""
    out = np.full((len(rows), 1, focus.CANDIDATES, 3), np.nan)
    for t, row in enumerate(rows):
        out[t, 0, : len(row)] = np.reshape(row, (-1, 3))
    return out


def test_frames_agree_on_the_lattice_vector() -> None:
    """A frame whose best candidate is a lattice vector off follows the others, and keeps its own small deviation."""
    good, off = (2.0, -1.0), (16.0, -1.0)
    rows = [[(good[0] + 0.2 * t, good[1], 1.0), (off[0] + 0.2 * t, off[1], 0.9)] for t in range(5)]
    rows.append([(*off, 1.0), (2.6, -1.4, 0.9)])
    solved = focus.solve_offsets(candidates(*rows), scale=6.0)[:, 0]
    assert np.allclose(solved[:5, 0], 2.0 + 0.2 * np.arange(5))
    assert solved[5] == pytest.approx((2.6, -1.4))


def test_a_frame_without_candidates_gets_the_common_offset() -> None:
    solved = focus.solve_offsets(candidates([(2.0, 3.0, 1.0)], [(2.2, 3.0, 1.0)], [], [(20.0, 20.0, 1.0)]), scale=3.0)[
        :, 0
    ]
    assert solved[2] == pytest.approx((2.1, 3.0))
    assert solved[3] == pytest.approx((2.1, 3.0))
    assert not focus.solve_offsets(candidates([], []), scale=3.0)[:, 0].any()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_frames_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = rng.uniform(-10, 10, (6, 2, focus.CANDIDATES, 3))
    found[..., 2] = rng.random(found.shape[:-1])
    order = rng.permutation(6)
    assert np.allclose(focus.solve_offsets(found, scale=3.0)[order], focus.solve_offsets(found[order], scale=3.0))
