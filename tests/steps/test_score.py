from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.steps import score
from tests import oracles_columns as oracle


def test_lost_spurious_and_moved_are_told_apart():
    true = np.array([[0.0, 0.0], [0.0, 10.0], [10.0, 0.0]])
    detected = np.array([[0.3, 0.4], [0.0, 12.0], [30.0, 30.0], [30.0, 31.0]])
    tally = score.tally_frame(detected, true, max_distance=3.0, moved_distance=1.0)
    result = score.score(tally)
    assert (result.lost, result.spurious, result.moved) == (1, 2, 1)
    assert (result.precision, result.recall, result.f1) == (2 / 4, 2 / 3, 4 / 7)
    assert result.rms == pytest.approx(np.sqrt((0.25 + 4.0) / 2))
    assert (result.bias_y, result.bias_x) == pytest.approx((0.15, 1.2))


def test_each_column_is_matched_once():
    match = score.match_columns(np.array([[0.0, 0.0], [0.0, 0.5]]), np.array([[0.0, 0.4]]), max_distance=3.0)
    assert (match.detected.tolist(), match.true.tolist(), match.spurious.tolist()) == ([1], [0], [0])


def test_more_pairs_come_before_shorter_ones():
    # The nearest pair (0.1) would leave both others alone; two pairs of 1.0 and 0.9 are wanted.
    detected, true = np.array([[0.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 0.9], [0.0, 2.0]])
    match = score.match_columns(detected, true[::-1], max_distance=1.05)
    assert match.true.tolist() == [1, 0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_matching_agrees_with_trying_all(seed, sizes):
    generator = np.random.default_rng(seed)
    detected, true = (generator.uniform(0, 3, (n, 2)) for n in sizes)
    match = score.match_columns(detected, true, max_distance=1.0)
    pairs, total = oracle.best_matching(detected, true, 1.0)
    assert len(match.detected) == pairs
    assert match.distance.sum() == pytest.approx(total)
    assert sorted([*match.detected, *match.spurious]) == list(range(sizes[0]))
    assert sorted([*match.true, *match.lost]) == list(range(sizes[1]))


def test_a_score_does_not_depend_on_how_frames_are_grouped():
    generator = np.random.default_rng(1)
    frames = [(generator.uniform(0, 9, (n, 2)), generator.uniform(0, 9, (n, 2))) for n in (3, 5, 0, 7)]
    tallies = [score.tally_frame(a, b, max_distance=2.0, moved_distance=1.0) for a, b in frames]
    grouped = score.merge([score.merge(tallies[:1]), score.merge(tallies[1:])])
    assert grouped == pytest.approx(score.merge(tallies))
    assert grouped.frames == 4


def test_coverage_counts_coordinates_within_one_error():
    true = np.zeros((1, 2))
    tally = score.tally_frame([[0.5, 1.5]], true, max_distance=3.0, moved_distance=3.0, errors=np.array([[1.0, 1.0]]))
    assert score.score(tally).coverage == 0.5


def test_nothing_to_find_gives_nan_and_not_a_number_that_looks_good():
    result = score.score(score.tally_frame(np.empty((0, 2)), np.empty((0, 2)), max_distance=1.0, moved_distance=1.0))
    assert np.isnan([result.precision, result.recall, result.f1, result.rms]).all()
    assert result.per_frame == 0


@pytest.mark.parametrize("polarity", [1, -1])
def test_the_yardstick_finds_bright_and_dark_columns(polarity):
    generator = np.random.default_rng(7)
    points = oracle.hexagonal(128, 14.0, radius=48, jitter=0.3, generator=generator)
    image = oracle.gaussians((128, 128), [(*p, 2.0 * polarity) for p in points], width=2.5, background=6.0)
    response = score.difference_of_gaussians(
        generator.poisson(image, (9, 128, 128)).mean(0), polarity=polarity, width=2.5
    )
    threshold, reached = score.best_threshold([response], [points], min_distance=8.0, max_distance=4.0, margin=6.0)
    assert reached.f1 > 0.99
    assert threshold > 0


def test_the_yardstick_on_nothing():
    threshold, reached = score.best_threshold(
        [np.full((16, 16), -1.0)], [np.empty((0, 2))], min_distance=3.0, max_distance=2.0, margin=1.0
    )
    assert np.isnan(threshold)
    assert reached.spurious == 0
