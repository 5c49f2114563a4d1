from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from pipeline.simulate.movie import MovieSpec, simulate_movie
from pipeline.steps import column_windows, columns, score
from pipeline.steps.species import assign_species, count_species
from tests import oracles_columns as oracle

FIT = {"polarity": 1, "width": 2.5, "fit_width": False, "readout_variance": 0.0, "share": 0.2}


def find(image, *, threshold=0.1, min_distance=3.0):
    return columns.find_columns(image, threshold=threshold, min_distance=min_distance)


# --- peaks ----------------------------------------------------------------------------------------------------------


def test_the_vertex_of_a_gaussian_is_exact():
    image = oracle.gaussians((32, 40), [(10.3, 20.8, 0.9)], width=2.0, background=0.0)
    peaks = find(image)
    np.testing.assert_allclose(np.column_stack(peaks[:2]), [[10.3, 20.8]], atol=1e-9)
    assert peaks.probability == image.max()


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.float32])
def test_a_flat_top_counts_once_at_its_centroid(kind):
    image = np.zeros((20, 20))
    image[5:8, 5:10] = 1.0
    image = torch.as_tensor(image, dtype=kind) if isinstance(kind, torch.dtype) else image.astype(kind)
    peaks = find(image)
    assert [tuple(p) for p in np.column_stack(peaks)] == [(6.0, 7.0, 1.0)]


def test_a_shelf_below_a_peak_is_not_a_peak():
    image = np.zeros((20, 20))
    image[5:8, 2:15] = 0.5
    image[6, 14] = 0.9
    peaks = find(image, min_distance=1.0)
    assert (len(peaks.y), peaks.probability[0]) == (1, 0.9)


def test_equal_neighbours_go_to_the_lower_y_then_the_lower_x():
    image = np.zeros((20, 20))
    image[10, [4, 7]] = 1.0
    image[[3, 6], 15] = 1.0
    peaks = find(image, min_distance=3.5)
    assert np.column_stack(peaks[:2]).tolist() == [[3.0, 15.0], [10.0, 4.0]]


def test_nan_and_low_pixels_are_no_peaks_and_edges_are():
    image = np.full((9, 9), 0.05)
    image[4, 4] = np.nan
    image[0, 8] = 0.8
    peaks = find(image)
    assert np.column_stack(peaks).tolist() == [[0.0, 8.0, 0.8]]
    assert len(find(np.full((9, 9), 0.05)).y) == 0


def test_a_stack_is_refused_with_its_shape():
    with pytest.raises(ValueError, match=r"\(2, 8, 8\).*\(y, x\)"):
        find(np.zeros((2, 8, 8)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), distance=st.floats(1.5, 8.0), levels=st.integers(2, 40))
def test_suppression_agrees_with_one_by_one(seed, distance, levels):
    image = np.random.default_rng(seed).integers(0, levels, (24, 24)) / levels
    everything = find(image, min_distance=0.0)
    points = np.column_stack(everything[:2])
    kept = oracle.suppress(points, everything.probability, distance)
    peaks = find(image, min_distance=distance)
    np.testing.assert_array_equal(np.column_stack(peaks[:2]), points[kept])


# --- refinement -----------------------------------------------------------------------------------------------------


def test_overlapping_columns_are_recovered_from_a_clean_frame():
    truth = [(20.2, 20.4, 9.0), (20.9, 27.3, 5.0), (27.5, 22.7, 12.0), (44.1, 40.6, 7.0)]
    image = oracle.gaussians((64, 64), truth, width=2.5, background=20.0)
    y, x, amplitude = np.array(truth).T
    found = columns.refine(image, image, y + 0.4, x - 0.3, **FIT)
    np.testing.assert_allclose(found["y"], y, atol=2e-3)
    np.testing.assert_allclose(found["x"], x, atol=2e-3)
    np.testing.assert_allclose(found["intensity"], 2 * np.pi * 2.5**2 * amplitude, rtol=5e-3)
    np.testing.assert_allclose(found["background"], 20.0, rtol=5e-3)
    assert found["fitted"].all()


def test_the_common_width_is_found_nearly_where_columns_overlap():
    generator = np.random.default_rng(2)
    points = oracle.hexagonal(96, 13.0, radius=38, jitter=0.3, generator=generator)
    image = oracle.gaussians((96, 96), [(*p, 4.0) for p in points], width=2.9, background=6.0)
    found = columns.refine(image, image, *points.T, **FIT | {"width": 2.3, "fit_width": True})
    np.testing.assert_allclose(found["width"], 2.9, rtol=0.15)
    np.testing.assert_allclose(np.column_stack([found["y"], found["x"]]), points, atol=0.05)


@pytest.mark.parametrize("polarity", [1, -1])
def test_the_width_does_not_mind_a_rim(polarity):
    grid = [(y, x, polarity * 3.0) for y in (20.2, 50.7, 80.4) for x in (20.6, 50.1, 80.3)]
    rim = [(y, x, -a / 3) for y, x, a in grid]
    image = oracle.gaussians((101, 101), grid, width=2.5, background=9.0)
    image += oracle.gaussians((101, 101), rim, width=5.0, background=0.0)
    rows, places, _ = np.array(grid).T
    alone = columns.refine(image, image, rows, places, **FIT | {"polarity": polarity, "width": 3.0, "fit_width": True})
    np.testing.assert_allclose(np.column_stack([alone["y"], alone["x"]]), np.array(grid)[:, :2], atol=0.02)
    assert 2.0 < alone["width"][0] < 2.6


def test_one_column_agrees_with_scipy_and_its_errors_with_the_bound():
    column = (30.3, 31.6, 300.0)
    image = oracle.gaussians((61, 61), [column], width=2.5, background=900.0)
    noisy = np.random.default_rng(5).poisson(image).astype(float)
    found = columns.refine(noisy, image, [30.0], [32.0], **FIT)
    alone = columns.refine(noisy, noisy, [30.0], [32.0], **FIT)
    amplitude, background, y, x = oracle.fit_one(noisy, image, (30.0, 32.0), width=2.5, radius=6.25)
    errors = oracle.bound(column, width=2.5, background=900.0, radius=6.25)
    area = 2 * np.pi * 2.5**2
    # One step from the truth differs from the full fit in second order of the noise.
    assert found["intensity"][0] / area == pytest.approx(amplitude, abs=0.05 * errors[0])
    assert found["background"][0] == pytest.approx(background, abs=0.05 * errors[1])
    assert (alone["y"][0], alone["x"][0]) == pytest.approx((y, x), abs=0.05 * errors[2])
    np.testing.assert_allclose([alone["y_err"][0], alone["x_err"][0]], errors[2:], rtol=0.1)
    assert found["intensity_err"][0] / area == pytest.approx(errors[0], rel=0.1)
    assert found["significance"][0] == pytest.approx(300.0 / errors[0], rel=0.1)


def test_a_perfect_prior_draws_the_position_towards_itself():
    image = oracle.gaussians((61, 61), [(30.3, 31.6, 30.0)], width=2.5, background=90.0)
    noisy = np.random.default_rng(5).poisson(image).astype(float)
    found = columns.refine(noisy, image, [30.0], [32.0], **FIT | {"share": 0.0})
    _, _, y, x = oracle.fit_one(noisy, image, (30.0, 32.0), width=2.5, radius=6.25)
    assert np.hypot(found["y"][0] - 30.3, found["x"][0] - 31.6) < 0.5 * np.hypot(y - 30.3, x - 31.6)


@pytest.mark.parametrize("polarity", [1, -1])
def test_dark_columns_have_negative_intensity_and_the_same_positions(polarity):
    image = oracle.gaussians((48, 48), [(20.2, 21.7, 3.0 * polarity)], width=2.5, background=10.0)
    found = columns.refine(image, image, [20.0], [22.0], **FIT | {"polarity": polarity})
    assert np.sign(found["intensity"][0]) == polarity
    assert found["significance"][0] > 1
    np.testing.assert_allclose([found["y"][0], found["x"][0]], [20.2, 21.7], atol=2e-3)


def noisy_frames(*, mean, count, frames, seed):
    """Frames of a jittered crystal with `count` frames averaged to the denoised one: yields truth, frame, mean."""
    generator = np.random.default_rng(seed)
    for _ in range(frames):
        points = oracle.hexagonal(160, 14.0, radius=65, jitter=0.5, generator=generator)
        image = mean * oracle.gaussians((160, 160), [(*p, 0.4) for p in points], width=2.6, background=1.0)
        stack = generator.poisson(image, (count, 160, 160)).astype(np.float32)
        yield points, stack[count // 2], stack.mean(axis=0)


# One frame averaged is the frame itself; its share is 1, whatever the settings say.
@pytest.mark.parametrize(("mean", "count", "share"), [(5.8, 5, 0.2), (29.0, 5, 0.2), (29.0, 1, 0.2), (5.8, 20, 0.05)])
def test_standard_errors_are_honest(mean, count, share):
    off, errors = [], []
    for points, frame, denoised in noisy_frames(mean=mean, count=count, frames=8, seed=1):
        found = columns.refine(frame, denoised, *points.T, **FIT | {"fit_width": True, "share": share})
        off.append([found["y"] - points[:, 0], found["x"] - points[:, 1]])
        errors.append([found["y_err"], found["x_err"]])
    ratio = np.concatenate(off, axis=1) / np.concatenate(errors, axis=1)
    assert 0.6 < np.mean(np.abs(ratio) < 1) < 0.76
    assert 0.85 < np.sqrt(np.mean(ratio**2)) < 1.25


def test_an_independent_poor_prior_is_outweighed_by_the_measured_frame():
    generator = np.random.default_rng(3)
    points = oracle.hexagonal(160, 14.0, radius=65, jitter=0.5, generator=generator)
    shifted = points + generator.normal(0, 0.8, points.shape)
    frame, wrong = (
        oracle.gaussians((160, 160), [(*p, 40.0) for p in where], width=2.6, background=60.0)
        for where in (points, shifted)
    )
    frame = generator.poisson(frame).astype(float)
    found = columns.refine(frame, wrong, *points.T, **FIT | {"share": 0.0, "width": 2.6})
    before = np.sqrt(np.mean((shifted - points) ** 2))
    after = np.sqrt(np.mean((np.column_stack([found["y"], found["x"]]) - points) ** 2))
    assert after < 0.35 * before


def test_translation_and_order_do_not_matter():
    generator = np.random.default_rng(4)
    points = oracle.hexagonal(96, 13.0, radius=30, jitter=0.5, generator=generator)
    image = oracle.gaussians((96, 96), [(*p, 3.0) for p in points], width=2.5, background=6.0)
    frame = generator.poisson(image).astype(np.float32)
    first = columns.refine(frame, image, *points.T, **FIT)
    order = generator.permutation(len(points))
    shuffled = columns.refine(frame, image, *points[order].T, **FIT)
    y, x = points.T
    moved = columns.refine(np.roll(frame, (3, -2), (0, 1)), np.roll(image, (3, -2), (0, 1)), y + 3, x - 2, **FIT)
    for name in first:
        np.testing.assert_allclose(shuffled[name], first[name][order], rtol=1e-9, atol=1e-9)
        expected = first[name] + {"y": 3, "x": -2}.get(name, 0)
        np.testing.assert_allclose(moved[name], expected, rtol=1e-9, atol=1e-9)


def test_two_runs_give_the_same_bits():
    points, frame, denoised = next(noisy_frames(mean=5.8, count=5, frames=1, seed=9))
    first, second = (columns.refine(frame, denoised, *points.T, **FIT) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_portions_do_not_matter(monkeypatch):
    points, frame, denoised = next(noisy_frames(mean=5.8, count=5, frames=1, seed=9))
    whole = columns.refine(frame, denoised, *points.T, **FIT)
    monkeypatch.setattr(column_windows, "PORTION", 7)
    cut = columns.refine(frame, denoised, *points.T, **FIT)
    assert all(np.allclose(whole[name], cut[name], rtol=1e-10, atol=1e-10) for name in whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees():
    points, frame, denoised = next(noisy_frames(mean=5.8, count=5, frames=1, seed=9))
    here = columns.refine(frame, denoised, *points.T, **FIT)
    there = columns.refine(torch.as_tensor(frame).cuda(), torch.as_tensor(denoised).cuda(), *points.T, **FIT)
    assert all(np.allclose(here[name], there[name], rtol=1e-8, atol=1e-8) for name in here)


def test_hopeless_starts_are_kept_and_say_so():
    image = oracle.gaussians((64, 64), [(20.0, 20.0, 8.0)], width=2.5, background=10.0)
    image[40:, 40:] = np.nan
    found = columns.refine(image, image, [20.2, 50.0, 40.0], [20.1, 50.0, 10.0], **FIT)
    assert found["fitted"][:2].tolist() == [1.0, 0.0]
    assert (found["y"][1], found["x"][1], found["significance"][1]) == (50.0, 50.0, 0.0)
    assert found["y_err"][1] > 10 * found["y_err"][0]
    assert abs(found["significance"][2]) < 1e-3
    assert all(np.isfinite(values).all() for values in found.values())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_columns(count):
    image = oracle.gaussians((48, 48), [(16.0, 16.0, 5.0), (30.0, 30.0, 5.0)], width=2.5, background=5.0)
    found = columns.refine(image, image, [16.0, 30.0][:count], [16.0, 30.0][:count], **FIT)
    assert {len(values) for values in found.values()} == {count}
    np.testing.assert_allclose(found["y"], [16.0, 30.0][:count], atol=1e-3)


def test_starts_on_one_spot_do_not_break_the_fit():
    image = oracle.gaussians((48, 48), [(16.0, 16.0, 5.0)], width=2.5, background=5.0)
    found = columns.refine(image, image, [16.0] * 12, [16.0] * 12, **FIT)
    assert all(np.isfinite(values).all() for values in found.values())


GRAPHENE = Path(__file__).parents[3] / "shared/data/labelled/graphene_sim"


@pytest.mark.data
@pytest.mark.skipif(not GRAPHENE.exists(), reason="no folder of labelled data beside the checkout")
@pytest.mark.parametrize(("name", "limit"), [("test_data_1.npz", 0.22), ("test_data_2.npz", 0.11)])
def test_graphene_of_another_simulator(name, limit):
    """One noisy frame (about 400 and 1,600 e⁻/Å²), blurred for want of neighbours; positions by somebody else."""
    with np.load(GRAPHENE / name) as data:
        frame, true, sampling = data["image"].astype(float), data["positions"], float(data["sampling"])
    response = score.difference_of_gaussians(frame, polarity=1, width=0.35 / sampling)
    true = true[columns.inside(*true.T, shape=frame.shape, margin=1 / sampling)]
    spacing = {"min_distance": 0.8 / sampling, "max_distance": 0.5 / sampling, "margin": 1 / sampling}
    threshold, yardstick = score.best_threshold([response], [true], **spacing)
    peaks = columns.find_columns(response, threshold=threshold, min_distance=0.8 / sampling)
    blurred = gaussian_filter(frame, 0.25 / sampling)
    table = columns.refine(frame, blurred, peaks.y, peaks.x, **FIT | {"width": 0.5 / sampling, "fit_width": True})
    keep = columns.inside(table["y"], table["x"], shape=frame.shape, margin=1 / sampling)
    found = np.column_stack([table["y"], table["x"]])[keep]
    tally = score.tally_frame(found * sampling, true * sampling, max_distance=0.5, moved_distance=0.3)
    result = score.score(tally)
    assert result.rms < limit
    assert max(abs(result.bias_y), abs(result.bias_x)) < 0.02
    assert result.f1 > yardstick.f1 - 0.02
    assert yardstick.f1 > 0.9


@pytest.mark.parametrize(
    ("dose", "contrast", "limit"), [(200, "bright", 0.06), (1000, "bright", 0.04), (200, "dark", 0.07)]
)
def test_positions_in_a_simulated_gold_particle(dose, contrast, limit):
    """Root mean square distance from the projected columns in Å, with a mean of five aligned frames as prior."""
    spec = MovieSpec(shape=(192, 192), frames=5, dose=dose, radius=11.0, contrast=contrast, events=0)
    movie = simulate_movie(spec, 31)
    electrons = np.random.default_rng(1).poisson(movie.clean * dose * movie.sampling**2).astype(np.float32)
    whole = np.round(movie.drift - movie.drift[2]).astype(int)
    denoised = np.mean([np.roll(e, -d, (0, 1)) for e, d in zip(electrons, whole, strict=True)], axis=0)
    true = movie.columns[2][movie.columns[2]["visible"]]
    start = [true[axis] + np.random.default_rng(2).normal(0, 0.5, len(true)) for axis in "yx"]
    fit = FIT | {"polarity": movie.polarity, "width": 0.5 / movie.sampling, "fit_width": True}
    table = columns.refine(electrons[2], denoised, *start, **fit)
    off = np.stack([table[axis] - true[axis] for axis in "yx"])
    assert table["fitted"].all()
    assert movie.sampling * np.sqrt(np.mean(off**2) * 2) < limit
    assert np.mean(table["significance"] > 2) > 0.97
    assert 0.35 < np.mean(np.abs(off) < np.stack([table["y_err"], table["x_err"]])) < 0.85


# --- fringes --------------------------------------------------------------------------------------------------------


def _peak(long, short, angle, *, polarity=1, size=41, at=(20.3, 19.6)):
    y, x = np.mgrid[:size, :size] - np.array(at)[:, None, None]
    along, across = y * np.sin(angle) + x * np.cos(angle), y * np.cos(angle) - x * np.sin(angle)
    return 7.0 + polarity * 3.0 * np.exp(-0.5 * ((along / long) ** 2 + (across / short) ** 2))


@pytest.mark.parametrize("polarity", [1, -1])
@pytest.mark.parametrize("angle", [0.0, 0.4, 1.1, 2.9])
def test_roundness_is_the_ratio_of_the_curvatures_in_any_direction(polarity, angle):
    at = tuple(np.array([value]) for value in (20.3, 19.6))
    for long, short in ((2.0, 2.0), (3.0, 2.0), (6.0, 2.0)):
        image = _peak(long, short, angle, polarity=polarity)
        # Smoothing by a Gaussian adds its variance; curvatures of a Gaussian's peak go as one over the variance.
        expected = (short**2 + 4) / (long**2 + 4)
        assert columns.roundness(image, *at, polarity=polarity, width=2.0) == pytest.approx([expected], abs=2e-3)
        assert columns.roundness(image, *at, polarity=-polarity, width=2.0) == 0.0
    assert columns.roundness(np.full((9, 9), 4.0), *at, polarity=polarity, width=2.0) == pytest.approx([0.0])


def test_roundness_at_the_border_and_without_points():
    image = _peak(2.0, 2.0, 0.0, at=(1.0, 40.0))
    near = columns.roundness(image, np.array([1.0, 0.0]), np.array([40.0, 0.0]), polarity=1, width=2.0)
    assert np.all((near >= 0) & (near <= 1))
    many = [np.full(columns.AT_ONCE + 7, value) for value in (1.0, 40.0)]
    assert np.all(columns.roundness(image, *many, polarity=1, width=2.0) == near[0])
    nothing = np.zeros(0)
    assert columns.roundness(image, nothing, nothing, polarity=1, width=2.0).shape == (0,)
    assert columns.fringes(nothing, nothing, nothing, nothing.astype(int), least=0.6).shape == (0,)


def test_fringes_are_stretched_among_stretched_within_a_particle():
    y, x = np.mgrid[10:60:10, 10:60:10].reshape(2, -1).astype(float)
    y, x = np.append(y, y), np.append(x, x + 100)
    particle = np.repeat([0, 1], 25)
    roundness = np.where(particle == 0, 0.9, 0.3)
    roundness[[7, 30]] = 0.4, 0.8  # one stretched column on zone, one round spot on the fringes
    found = columns.fringes(y, x, roundness, particle, least=0.6)
    assert np.flatnonzero(~found).tolist() == [*range(25)]
    # All columns of a frame may be stretched a little, by astigmatism or a small tilt.
    assert not columns.fringes(y, x, np.full(50, 0.65), particle, least=0.6).any()
    assert not columns.fringes(y, x, roundness, np.full(50, -1), least=0.6).any()
    assert not columns.fringes(y, x, roundness, particle, least=0.0).any()
    table = {"y": y, "x": x, "roundness": roundness, "beside": particle, "significance": np.full(50, 5.0)}
    options = {"shape": (70, 170), "margin": 1.0, "min_significance": 1.0, "min_relative": 0.25, "min_distance": 4.0}
    keep = columns.reported(table, min_roundness=0.6, **options)
    assert keep.tolist() == (~found).tolist()


# --- what is reported -----------------------------------------------------------------------------------------------


def test_the_margin_is_measured_from_the_edge_of_the_pixels():
    y = np.array([4.49, 4.5, 10.0, 24.5, 24.51])
    assert columns.inside(y, np.full(5, 10.0), shape=(30, 20), margin=5.0).tolist() == [False, True, True, True, False]
    assert columns.inside(np.full(5, 10.0), y - 10, shape=(30, 20), margin=5.0).tolist() == [False] * 3 + [True, False]


def _round(count):
    return {"roundness": np.ones(count), "beside": np.full(count, -1)}


def test_weak_and_doubled_columns_are_not_reported():
    table = {
        "y": np.array([10.0, 10.0, 10.4, 20.0]),
        "x": np.array([10.0, 20.0, 20.0, 20.0]),
        "significance": np.array([0.9, 3.0, 4.0, 1.1]),
    } | _round(4)
    options = {"min_roundness": 0.6, "shape": (40, 40), "margin": 5.0, "min_significance": 1.0, "min_distance": 6.0}
    keep = columns.reported(table, min_relative=0.0, **options)
    assert keep.tolist() == [False, False, True, True]
    assert columns.reported(table, min_relative=0.25, **options).tolist() == keep.tolist()
    assert columns.reported(table, min_relative=0.35, **options).tolist() == [False, False, True, False]


def test_speckle_goes_where_columns_are_strong_though_it_outnumbers_them():
    rng = np.random.default_rng(0)
    place = np.stack(np.mgrid[10:190:10, 10:190:10], -1).reshape(-1, 2).astype(float)
    significance = np.where(np.arange(len(place)) < 45, rng.uniform(6, 9, len(place)), rng.uniform(1, 1.7, len(place)))
    table = {"y": place[:, 0], "x": place[:, 1], "significance": significance} | _round(len(place))
    options = {"min_roundness": 0.6, "shape": (200, 200), "margin": 5.0, "min_significance": 0.9, "min_distance": 6.0}
    keep = columns.reported(table, min_relative=0.25, **options)
    assert np.flatnonzero(keep).tolist() == list(range(45))
    weak = {**table, "significance": significance / 5}
    assert columns.reported(weak, min_relative=0.25, **options | {"min_significance": -1.0}).tolist() == keep.tolist()


def test_where_nothing_is_strong_something_is_left():
    table = {name: np.array(values) for name, values in (("y", [10.0, 30.0]), ("x", [10.0, 30.0]))}
    table |= {"significance": np.array([-0.5, -3.0])} | _round(2)
    options = {"min_roundness": 0.6, "shape": (40, 40), "margin": 5.0, "min_distance": 6.0, "min_significance": -100.0}
    for relative in (0.0, 0.25, 1.0):
        assert columns.reported(table, min_relative=relative, **options).tolist() == [True, True]


# --- species --------------------------------------------------------------------------------------------------------


def test_species_without_a_model():
    named, nobody = assign_species(3, only="Au"), assign_species(2, only=None)
    assert (named.name.tolist(), named.probability.tolist(), named.classes) == (["Au"] * 3, [1.0] * 3, ("Au",))
    assert nobody.name.tolist() == ["unknown"] * 2
    assert np.isnan(nobody.probability).all()
    assert count_species(named.name, classes=("Si", "Au")).tolist() == [0, 3]
