"""The most plausible path: a dense oracle, accuracy and honesty on motions of many kinds, hops, gaps."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.steps import drift, drift_smooth
from pipeline.steps.drift_smooth import Links, smooth_path

LAGS, SCALE = (1, 2, 4, 8), 4.0
Array = np.ndarray


def measured(rng: np.random.Generator, truth: Array, *, pair: float, frame: float, good: Array | None = None) -> Links:
    """Pairs of a path (n, 2) with errors of their own and of their frames [px]."""
    n = len(truth)
    good = np.ones(n, bool) if good is None else good
    pairs = drift.pair_list(n, start=0, stop=n, lags=LAGS)
    pairs = pairs[good[pairs].all(axis=1)]
    seen = truth + rng.normal(0, frame, truth.shape)
    shift = seen[pairs[:, 1]] - seen[pairs[:, 0]] + rng.normal(0, pair, (len(pairs), 2))
    return Links(pairs[:, 0], pairs[:, 1], shift, np.full(shift.shape, pair**2), np.full((n, 2), frame**2))


def wander(rng: np.random.Generator, frames: int, *, phi: float, kick: float, mean: float = 0.0) -> Array:
    """A path (frames, 2) [px], zero at first, whose velocity keeps the part phi of itself."""
    velocity = np.zeros((frames - 1, 2))
    velocity[0] = rng.normal(0, kick / np.sqrt(1 - phi**2), 2)
    for t in range(1, frames - 1):
        velocity[t] = phi * velocity[t - 1] + rng.normal(0, kick, 2)
    return np.vstack([np.zeros((1, 2)), np.cumsum(velocity + mean, axis=0)])


def dense(links: Links, *, start: int) -> tuple[Array, Array]:
    """What `smooth_path` does in its first round, by matrices (n, n) and the multivariate normal."""
    n, p = len(links.frame), len(links.first)
    design = np.zeros((p, n))
    design[np.arange(p), links.second] += 1
    design[np.arange(p), links.first] -= 1
    time = np.arange(n) - start
    means, variances, evidence = [], [], []
    for phi in drift_smooth._PERSISTENCE:
        for size in SCALE * np.geomspace(drift_smooth._SMALLEST, 1, drift_smooth._SIZES):
            steps = np.arange(n - 1)
            velocity = size**2 * phi ** np.abs(steps[:, None] - steps)
            total = np.tril(np.ones((n, n - 1)), -1)
            total = total - total[start]
            prior = total @ velocity @ total.T + SCALE**2 * np.outer(time, time)
            mean, variance, log = np.zeros((n, 2)), np.zeros((n, 2)), 0.0
            for a in (0, 1):
                spread = design @ (prior + np.diag(links.frame[:, a])) @ design.T + np.diag(links.variance[:, a])
                gain = prior @ design.T @ np.linalg.inv(spread)
                mean[:, a] = gain @ links.shift[:, a]
                variance[:, a] = np.diag(prior - gain @ design @ prior)
                log -= np.linalg.slogdet(spread)[1] / 2
                log -= links.shift[:, a] @ np.linalg.solve(spread, links.shift[:, a]) / 2
            means.append(mean)
            variances.append(variance)
            evidence.append(log)
    weight = np.exp(np.array(evidence) - max(evidence))
    weight /= weight.sum()
    mean = np.tensordot(weight, np.array(means), axes=1)
    spread = np.tensordot(weight, np.array(variances) + (np.array(means) - mean) ** 2, axes=1)
    return mean, np.sqrt(spread)


@pytest.mark.parametrize("start", [0, 2])
def test_path_and_errors_are_those_of_the_dense_gaussian(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_smooth, "_ROUNDS", 1)
    monkeypatch.setattr(drift_smooth, "_NEGLIGIBLE", 0.0)
    rng = np.random.default_rng(start)
    good = np.ones(12, bool)
    good[[*range(start), 7]] = False
    links = measured(rng, wander(rng, 12, phi=0.8, kick=0.2), pair=0.1, frame=0.2, good=good)
    path, error = smooth_path(links, start=start, max_motion=SCALE)
    expected, spread = dense(links, start=start)
    np.testing.assert_allclose(path, expected, atol=2e-3)
    np.testing.assert_allclose(error, spread, rtol=0.01, atol=1e-6)
    assert (path[start] == 0).all()
    assert (error[start] == 0).all()


@pytest.mark.parametrize(
    ("phi", "kick", "mean", "frame", "gain"),
    [
        (0.0, 0.4, 0.3, 0.3, 0.9),  # a random walk
        (0.9, 0.2, 0.0, 0.25, 0.75),  # a smooth one
        (0.9, 0.01, 1.5, 0.1, 0.6),  # steady
        (0.5, 1.0, 0.0, 0.02, 1.05),  # nothing to gain
    ],
)
def test_the_path_is_nearer_to_the_truth_than_its_frames_are_and_errors_are_honest(
    phi: float, kick: float, mean: float, frame: float, gain: float
) -> None:
    squares, pulls = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = wander(rng, 28, phi=phi, kick=kick, mean=mean)
        path, error = smooth_path(measured(rng, truth, pair=frame / 3, frame=frame), start=0, max_motion=SCALE)
        off = path - truth
        squares.append(((off - off.mean(axis=0)) ** 2).mean())
        pulls.append(np.abs(off / np.where(error > 0, error, np.nan))[1:])
    assert np.sqrt(np.mean(squares)) < gain * np.hypot(frame, frame / 6)
    assert np.mean(np.array(pulls) < 0.9945) == pytest.approx(0.68, abs=0.09)
    assert np.mean(np.array(pulls) < 1.96) == pytest.approx(0.95, abs=0.04)


def test_a_specimen_that_stands_still_is_found_so_without_being_believed_to_be() -> None:
    squares, pulls = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        path, error = smooth_path(measured(rng, np.zeros((28, 2)), pair=0.07, frame=0.2), start=0, max_motion=SCALE)
        squares.append(((path - path.mean(axis=0)) ** 2).mean())
        pulls.append(np.abs(path[1:] / error[1:]))
    assert np.sqrt(np.mean(squares)) < 0.5 * 0.2
    assert 0.6 < np.mean(np.array(pulls) < 0.9945) < 0.9


def test_a_hop_is_not_smeared_over_its_neighbours() -> None:
    beside, rest = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        truth = wander(rng, 40, phi=0.0, kick=0.1)
        truth[20:] += [3.0, -2.0]
        path, _ = smooth_path(measured(rng, truth, pair=0.1, frame=0.3), start=0, max_motion=SCALE)
        off = path - truth
        off -= off.mean(axis=0)
        step = (off[20] - off[19]) * np.sign([3.0, -2.0])
        beside.append(step)
        rest.append((off**2).mean())
    assert np.sqrt(np.mean(rest)) < 0.75 * 0.3
    assert abs(np.mean(beside)) < 0.3 / 2


def test_vibration_of_every_frame_is_not_taken_for_noise() -> None:
    squares = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        truth = wander(rng, 40, phi=0.9, kick=0.02) + rng.normal(0, 0.5, (40, 2))
        path, _ = smooth_path(measured(rng, truth - truth[0], pair=0.05, frame=0.1), start=0, max_motion=SCALE)
        off = path - truth
        squares.append(((off - off.mean(axis=0)) ** 2).mean())
    assert np.sqrt(np.mean(squares)) < 1.1 * 0.1


def test_what_no_pair_bridges_is_as_uncertain_as_the_motion_makes_it() -> None:
    rng = np.random.default_rng(1)
    truth = wander(rng, 60, phi=0.0, kick=0.5, mean=1.0)
    good = np.ones(60, bool)
    good[25:36] = False
    path, error = smooth_path(measured(rng, truth, pair=0.02, frame=0.02, good=good), start=0, max_motion=SCALE)
    assert (np.abs(path - truth) < 4 * error + 1e-9).all()
    assert error[40].min() > 5 * error[20].max()
    expected = 0.5 * np.sqrt(12)
    assert expected / 2 < error[40].mean() < 2 * expected
