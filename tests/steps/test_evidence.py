"""The evidence for columns from the counts alone: its distribution without columns, its size with them."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.steps import columns
from pipeline.steps.neighbours import FrameLinks, neighbourhood
from tests import oracles_columns as oracle

FIT = {"width": 2.5, "fit_width": False, "readout_variance": 0.0, "share": 0.3}
SHAPE, SPACING = (240, 240), 14.0


def lattice(amplitude, background):
    """Expected image (y, x) of a crystal, and its columns (column, 2) [px]."""
    points = oracle.hexagonal(SHAPE[0], SPACING, radius=110, jitter=0.3, generator=np.random.default_rng(1))
    return oracle.gaussians(SHAPE, [(*p, amplitude) for p in points], width=2.5, background=background), points


def judged(counts, depth, denoised, points, *, polarity=1, readout=0.0):
    """Evidence (column,) by the mean of `depth` frames."""
    found = columns.refine(counts, denoised, *points.T, polarity=polarity, **FIT)
    found |= {"y": points[:, 0], "x": points[:, 1]}
    return columns.evidence(counts, np.full(SHAPE, depth), denoised, found, polarity=polarity, readout_variance=readout)


@pytest.mark.parametrize(("mean", "depth", "readout"), [(20.0, 1, 0.0), (2.0, 7, 0.0), (0.5, 7, 1.0)])
def test_made_up_columns_find_no_support(mean, depth, readout):
    """A denoised frame that shows a lattice where the counts hold none: half of a squared normal number."""
    made_up, points = lattice(0.5 * mean, mean)
    rng = np.random.default_rng(3)
    counts = rng.poisson(mean * depth, SHAPE) + rng.normal(0, 1, SHAPE) * np.sqrt(readout * depth)
    # Tails of neighbours that are not there are taken off too, so the counts speak against such columns.
    ratio = judged(counts / depth, depth, np.full(SHAPE, mean) + 1e-3 * made_up, points, readout=readout)
    sigma = np.sign(ratio) * np.sqrt(2 * np.abs(ratio))
    assert len(ratio) > 150
    assert abs(sigma.mean()) < 0.25
    assert 0.85 < sigma.std() < 1.15
    assert (judged(counts / depth, depth, made_up, points, readout=readout) > 4.5).mean() < 0.01


@pytest.mark.parametrize("polarity", [1, -1])
@pytest.mark.parametrize("depth", [1, 7])
def test_true_columns_are_supported_as_their_signal_to_noise_ratio_says(polarity, depth):
    image, points = lattice(polarity * 3.0, 12.0)
    counts = np.random.default_rng(4).poisson(image * depth) / depth
    ratio = judged(counts, depth, image, points, polarity=polarity)
    alone = columns.refine(image, image, *points.T, polarity=polarity, **FIT)
    # The expectation of half a squared normal number of mean `significance` and variance 1.
    expected = 0.5 * (depth * alone["significance"] ** 2 + 1)
    assert ratio.mean() == pytest.approx(expected.mean(), rel=0.12)
    assert depth == 1 or (ratio > 4.5).all()
    assert depth == 1 or (judged(counts, depth, image, points, polarity=-polarity) < 0).all()


def test_pixels_that_were_not_seen_count_for_nothing():
    image, points = lattice(3.0, 12.0)
    counts, depth = image.copy(), np.full(SHAPE, 3.0)
    counts[:, 120:], depth[:, 120:] = 1e6, 0.0
    found = columns.refine(image, image, *points.T, polarity=1, **FIT)
    ratio = columns.evidence(counts, depth, image, found, polarity=1, readout_variance=0.0)
    assert (ratio[points[:, 1] > 130] == 0).all()
    assert (ratio[points[:, 1] < 110] > 4.5).all()


def test_no_columns_no_evidence():
    found = columns.refine(np.ones(SHAPE), np.ones(SHAPE), [], [], polarity=1, **FIT)
    assert (
        len(columns.evidence(np.ones(SHAPE), np.ones(SHAPE), np.ones(SHAPE), found, polarity=1, readout_variance=0))
        == 0
    )


def test_a_neighbourhood_is_the_mean_of_aligned_good_frames():
    rng = np.random.default_rng(0)
    frames = rng.poisson(9, (4, 20, 22)).astype(np.float32)
    drift = np.array([[0, 0], [1, -2], [0, 0], [3, 3]])
    links = FrameLinks(drift, np.array([True, True, False, True]), np.zeros(4, np.int64))
    mean, depth = neighbourhood(frames, 1, offsets=(-1, 0, 1, 2), links=links)
    # Frame 2 is bad; frame 0 shows at p what frame 1 shows at p + (1, −2), frame 3 at p + (2, 5).
    y, x = 10, 8
    assert depth[y, x] == 3
    assert mean[y, x] == pytest.approx((frames[0, y - 1, x + 2] + frames[1, y, x] + frames[3, y + 2, x + 5]) / 3)
    assert depth[19, 21] == 1 and mean[19, 21] == frames[1, 19, 21]
