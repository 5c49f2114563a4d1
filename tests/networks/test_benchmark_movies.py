from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline import benchmark_movies as known


@pytest.fixture(scope="module")
def movie():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(known.SCENES, "MoS2", replace(known.SCENES["MoS2"], events=8))
        return known.taken(known.simulated("MoS2", frames=14, side=168), 1.0)


def test_counts_and_clean_frames_stand_still(movie):
    assert movie.counts.shape == movie.clean.shape == (14, 152, 152)
    assert movie.counts.mean() == pytest.approx(movie.clean.mean(), rel=0.01)
    cam, view = movie.known.cam, movie.known.view
    assert np.ptp(view, axis=0).max() >= 2
    assert np.abs(movie.clean[-1] - movie.clean[0]).mean() < 0.8 * np.abs(cam[-1] - cam[0]).mean()
    assert np.array_equal(movie.clean[3], cam[3][tuple(slice(c, c + 152) for c in movie.corner[3])])


def test_events_lie_where_the_movie_changes(movie):
    change = np.abs(np.diff(movie.clean, axis=0))
    first = {int(event[0]) for event in movie.known.events}
    there = [change[f - 1, y, x].mean() for f, y, x in known._places(movie) if f in first]
    assert len(there) >= 2
    assert np.mean(there) > 1.5 * change.mean()


def test_the_truth_scores_best_and_what_is_wrong_somewhere_shows_there(movie):
    noise = np.random.default_rng(0).normal(0, 0.01, movie.clean.shape)
    best = known.scored(movie.clean + noise, movie)
    assert best.psnr == pytest.approx(20 * np.log10(np.ptp(known.inner(movie.clean)) / 0.01), abs=0.1)
    assert best.f1 > 0.97 and best.position < 0.1 and best.events == pytest.approx(best.psnr, abs=0.5)
    assert best.vacuum == pytest.approx(0.01, rel=0.05) and best.ring < 2
    wrong = movie.clean + noise
    for frame, y, x in known._places(movie):
        wrong[frame, y, x] = 1
    assert known.scored(wrong, movie).events < best.events - 6
    moved = known.scored(np.roll(movie.clean, 2, 1) + noise, movie)
    assert moved.position == pytest.approx(2 * movie.known.truth.sampling, rel=0.15)
    painted = movie.clean + 0.05 * np.cos(0.6 * np.arange(152))
    assert known.scored(painted, movie).vacuum > 0.03 and known.scored(painted, movie).ring > 10


def test_a_file_needs_frames_and_drift_alone(tmp_path):
    rng = np.random.default_rng(0)
    cam, drift = 1 + 0.1 * rng.random((12, 60, 70)), np.cumsum(rng.integers(0, 2, (12, 2)), axis=0)
    np.savez(tmp_path / "m.npz", cam=cam, drift=drift)
    found = known.opened(tmp_path / "m.npz")
    assert found.name == "m" and not len(found.events)
    movie = known.taken(found, 2.0)
    assert movie.clean.shape == (12, 44, 54)
    figures = known.scored(movie.clean + 1e-6, movie)
    assert figures.ssim == pytest.approx(1) and np.isnan([figures.events, figures.f1, figures.vacuum]).all()
    larger = 1 + 0.1 * rng.random((12, 90, 90))
    np.savez(tmp_path / "e.npz", cam=larger, drift=drift, ev=np.array([[6.0, 44.0, 50.0]]))
    movie = known.taken(known.opened(tmp_path / "e.npz"), 2.0)
    # 16 px less than on the canvas, in every frame, since the specimen stands still.
    centres = [(f, y.start + 10, x.start + 10) for f, y, x in known._places(movie)]
    assert centres == [(5, 28, 34), (6, 28, 34)]
