"""The Cramér-Rao bound against written-out Fisher matrices and against fits of many noisy frames."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.steps.score import cramer_rao
from tests import oracles_columns as oracle


def test_a_lone_gaussian_has_the_bound_of_its_fisher_matrix():
    image = oracle.gaussians((41, 41), [(20.3, 19.6, 4.0)], width=2.6, background=6.0)
    found = cramer_rao(image, np.array([20.3]), np.array([19.6]), readout=0.0, radius=8.0)
    expected = oracle.bound((20.3, 19.6, 4.0), width=2.6, background=6.0, radius=8.0)[2:]
    assert found[0] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("amplitude", [4.0, -4.0])
def test_dark_columns_and_readout_noise(amplitude):
    image = oracle.gaussians((41, 41), [(20.3, 19.6, amplitude)], width=2.6, background=6.0)
    found = cramer_rao(image, np.array([20.3]), np.array([19.6]), readout=2.0, radius=8.0)
    expected = oracle.bound((20.3, 19.6, amplitude), width=2.6, background=6.0, radius=8.0, readout_variance=4.0)[2:]
    assert found[0] == pytest.approx(expected, rel=0.01)


def joint_fisher(points, *, width, background):
    """Standard errors of y, x of all columns when every position and amplitude is unknown, derivatives written out."""
    size = 61
    rows, places = np.mgrid[:size, :size]
    image, slopes = np.full((size, size), background), []
    for y, x, amplitude in points:
        bell = np.exp(-((rows - y) ** 2 + (places - x) ** 2) / (2 * width**2))
        image += amplitude * bell
        slopes += [amplitude * bell * (rows - y) / width**2, amplitude * bell * (places - x) / width**2, bell]
    flat = np.array(slopes).reshape(len(slopes), -1)
    errors = np.sqrt(np.diag(np.linalg.inv((flat / image.ravel()) @ flat.T)))
    return image, errors.reshape(-1, 3)[:, :2]


def test_neighbours_whose_images_overlap_cost_precision_along_the_line_between_them():
    points = [(30.0, 26.0, 4.0), (30.0, 33.0, 3.0)]
    image, errors = joint_fisher(points, width=2.6, background=6.0)
    found = cramer_rao(image, np.array([30.0, 30.0]), np.array([26.0, 33.0]), readout=0.0, radius=8.0)
    assert found == pytest.approx(errors, rel=0.05)
    assert (found[:, 1] > 1.1 * found[:, 0]).all()


def test_more_electrons_help_as_the_root():
    image = oracle.gaussians((41, 41), [(20.3, 19.6, 4.0)], width=2.6, background=6.0)
    at = np.array([20.3]), np.array([19.6])
    once, four = (cramer_rao(n * image, *at, readout=0.0, radius=8.0) for n in (1, 4))
    assert once == pytest.approx(2 * four)


def test_fits_of_noisy_frames_reach_the_bound_and_do_not_pass_it():
    """Least squares with the true weights is efficient at this dose: 200 frames give the bound within 12 % (2.4 σ)."""
    truth = (12.3, 11.6)
    image = oracle.gaussians((25, 25), [(*truth, 60.0)], width=2.4, background=40.0)
    bound = cramer_rao(image, np.array([truth[0]]), np.array([truth[1]]), readout=0.0, radius=8.0)[0]
    generator = np.random.default_rng(3)
    fits = [
        oracle.fit_one(generator.poisson(image).astype(float), image, truth, width=2.4, radius=8.0)[2:]
        for _ in range(200)
    ]
    assert np.std(fits, axis=0) == pytest.approx(bound, rel=0.12)


def test_nothing_to_see_is_not_known_at_all():
    flat = np.full((30, 30), 5.0)
    assert np.isinf(cramer_rao(flat, np.array([15.0]), np.array([15.0]), readout=0.0, radius=6.0)).all()
    image = oracle.gaussians((30, 30), [(15.0, 15.0, 4.0)], width=2.4, background=6.0)
    assert np.isinf(cramer_rao(image, np.array([-40.0]), np.array([15.0]), readout=0.0, radius=6.0)).all()
    assert cramer_rao(image, np.empty(0), np.empty(0), readout=0.0, radius=6.0).shape == (0, 2)


def test_half_a_column_at_the_edge_is_known_less_well():
    image = oracle.gaussians((60, 60), [(0.0, 30.0, 4.0), (30.0, 30.0, 4.0)], width=2.4, background=6.0)
    edge, middle = cramer_rao(image, np.array([0.0, 30.0]), np.array([30.0, 30.0]), readout=0.0, radius=7.0)
    assert (edge > 1.25 * middle).all()
