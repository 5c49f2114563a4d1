"""Drift: signs, sub-pixel bias, accuracy and honesty of the errors on rigid specimens, lattice slips, gaps, scaling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.steps import detector, drift

LAGS = (1, 2, 4, 8)
WEIGHT = {"band": (0.01, 0.35), "taper": 0.15, "change": 0.0, "limit": 1.25}
PAIRS = {"candidates": 6, "max_shift": 0.25, "taper": 0.15, "limit": 1.25}
SOLVE = {"max_motion": 4.0, "cauchy": 2.5}


def walk(rng: np.random.Generator, frames: int, step: float) -> np.ndarray:
    """A smooth random walk (frames, 2) [px] that starts at zero."""
    path, velocity = np.zeros((frames, 2)), rng.normal(0, step / 2, 2)
    for t in range(1, frames):
        velocity = 0.9 * velocity + rng.normal(0, 0.3 * step, 2)
        path[t] = path[t - 1] + velocity
    return path


def specimen(rng: np.random.Generator, size: int, kind: str) -> np.ndarray:
    """A canvas wider than the field: a crystal that fills it, or a particle on a film, beside vacuum."""
    y, x = np.mgrid[:size, :size] - size / 2
    u, v = np.cos(0.3) * y + np.sin(0.3) * x, -np.sin(0.3) * y + np.cos(0.3) * x
    crystal = np.cos(2 * np.pi * u / 14) + np.cos(2 * np.pi * v / 12)
    if kind == "crystal":
        return 1 + 0.2 * crystal
    k = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    film = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) * np.exp(-((k / 0.12) ** 2))).real
    return 1 + 0.25 * crystal / (1 + np.exp((np.hypot(y, x) - 50) / 2)) + 0.05 * film / film.std() * (y > -20)


def record(image: np.ndarray, path: np.ndarray, size: int) -> np.ndarray:
    """The clean frames (time, y, x) of a specimen that moves along a path, exact by the shift theorem."""
    border = (len(image) - size) // 2
    ky, kx = np.fft.fftfreq(len(image))[:, None], np.fft.fftfreq(len(image))
    spectrum = np.fft.fft2(image)
    frames = [np.fft.ifft2(spectrum * np.exp(-2j * np.pi * (ky * dy + kx * dx))).real for dy, dx in path]
    return np.array(frames)[:, border : border + size, border : border + size].clip(0.02)


def movie(seed: int, *, kind: str, frames: int = 24, size: int = 160, dose: float = 5.8, step: float = 0.5):
    rng = np.random.default_rng(seed)
    path = walk(rng, frames, step)
    clean = record(specimen(rng, size + 96, kind), path, size)
    return (rng.poisson(clean * dose).astype(np.float32) if dose else clean.astype(np.float32)), path


def measure(frames: np.ndarray, *, good: np.ndarray | None = None, lags: tuple[int, ...] = LAGS):
    good = np.ones(len(frames), bool) if good is None else good
    weight = drift.spectral_weight(frames[good], **WEIGHT)
    pairs = drift.pair_list(len(frames), start=0, stop=len(frames), lags=lags)
    shifts = drift.pair_shifts(frames, pairs, good=good, weight=weight, **PAIRS)
    return pairs, shifts, drift.solve_path(len(frames), pairs, shifts, good=good, **SOLVE)


def test_a_specimen_that_moves_down_and_right_has_positive_drift() -> None:
    image = specimen(np.random.default_rng(0), 256, "particle")[48:208, 48:208].astype(np.float32)
    frames = np.stack([image, np.roll(image, (3, 5), (0, 1)), np.roll(image, (-2, 4), (0, 1))])
    _, shifts, path = measure(frames)
    np.testing.assert_allclose(path.drift, [[0, 0], [3, 5], [-2, 4]], atol=0.02)
    np.testing.assert_allclose([shifts["dy"][0, 0], shifts["dx"][0, 0]], [3, 5], atol=0.02)
    aligned = np.roll(frames[1], tuple(-drift.whole_pixels(path.drift)[1]), (0, 1))
    np.testing.assert_array_equal(aligned, frames[0])


@pytest.mark.parametrize("kind", ["particle", "crystal"])
def test_sub_pixel_shifts_are_unbiased(kind: str) -> None:
    path = np.array([[0, 0]] + [[d, -0.7 * d] for d in (0.1, 0.25, 0.4, 0.5, 0.6, 0.9, 1.3, 2.5, 3.75)])
    frames = record(specimen(np.random.default_rng(1), 256, kind), path, 160).astype(np.float32)
    pairs = np.array([[0, j] for j in range(1, len(path))])
    weight = drift.spectral_weight(frames, **WEIGHT)
    shifts = drift.pair_shifts(frames, pairs, good=np.ones(len(path), bool), weight=weight, **PAIRS)
    # In a perfect crystal without noise any lattice vector may come first; some candidate has to be right.
    away = np.hypot(shifts["dy"] - path[1:, :1], shifts["dx"] - path[1:, 1:])
    assert np.nanmin(away, axis=1).max() < 0.02
    if kind == "particle":
        assert away[:, 0].max() < 0.02


@pytest.mark.parametrize(
    ("kind", "dose", "bound"), [("particle", 5.8, 0.1), ("crystal", 5.8, 0.08), ("particle", 1.0, 0.25)]
)
def test_accuracy_and_errors_over_seeds(kind: str, dose: float, bound: float) -> None:
    squares, inside = [], []
    for seed in range(8):  # all errors of a movie share that of its first frame
        frames, truth = movie(seed, kind=kind, dose=dose)
        _, _, path = measure(frames)
        deviation = path.drift - truth
        squares.append((deviation**2).mean())
        inside.append((np.abs(deviation[1:]) < path.error[1:]).mean())
        assert np.abs(deviation).max() < 0.9, f"seed {seed} slipped"
    assert np.sqrt(np.mean(squares)) < bound
    assert 0.5 < np.mean(inside) < 0.9


@pytest.mark.parametrize("seed", range(6))
def test_a_perfect_crystal_does_not_slip(seed: int) -> None:
    frames, truth = movie(seed, kind="crystal", dose=2.0, step=1.2)
    _, _, path = measure(frames)
    assert np.abs(path.drift - truth).max() < 1.0


@pytest.mark.parametrize("seed", [0, 4])
def test_a_perfect_crystal_whose_highest_maximum_noise_chooses_does_not_slip(seed: int) -> None:
    frames, truth = movie(seed, kind="crystal", dose=0.3, step=0.8)
    _, _, path = measure(frames)
    assert np.abs(path.drift - truth).max() < 1.0


@pytest.mark.parametrize("kind", ["particle", "crystal"])
def test_errors_of_pairs_are_calibrated(kind: str) -> None:
    inside = []
    for seed in range(6):
        frames, truth = movie(seed, kind=kind, dose=5.8, frames=16)
        pairs, shifts, _ = measure(frames)
        step = truth[pairs[:, 1]] - truth[pairs[:, 0]]
        for axis, name in enumerate(("dy", "dx")):
            away = np.abs(shifts[name] - step[:, [axis]])
            right = np.nanmin(away, axis=1) < 1
            best = np.take_along_axis(away, np.nanargmin(away, axis=1)[:, None], 1)[:, 0]
            inside.append((best < shifts[f"{name}_err"])[right])
    assert 0.6 < np.concatenate(inside).mean() < 0.76


def test_one_bright_object_that_jumps_does_not_carry_the_crystal_with_it() -> None:
    rng = np.random.default_rng(3)
    truth = walk(rng, 20, 0.5)
    image = specimen(rng, 256, "crystal")
    y, x = np.mgrid[:256, :256]
    frames = []
    for t in range(20):
        at = (128, 128) if (t // 4) % 2 else (134, 119)
        blob = 3 * np.exp(-((y - at[0]) ** 2 + (x - at[1]) ** 2) / (2 * 4.0**2))
        frames.append(record(image + blob, truth[t : t + 1], 160)[0])
    _, _, path = measure(rng.poisson(np.array(frames) * 5).astype(np.float32))
    assert np.abs(path.drift - truth).max() < 0.4


def test_pairs_do_not_depend_on_the_cut() -> None:
    frames, _ = movie(5, kind="particle", frames=14, size=96)
    good = np.ones(14, bool)
    good[4] = False
    weight = drift.spectral_weight(frames[good], **WEIGHT)
    pairs = drift.pair_list(14, start=0, stop=14, lags=LAGS)
    whole = drift.pair_shifts(frames, pairs, good=good, weight=weight, **PAIRS)
    parts, listed = [], []
    for start, stop in ((0, 3), (3, 10), (10, 14)):
        own = drift.pair_list(14, start=start, stop=stop, lags=LAGS)
        end = min(14, stop + max(LAGS))
        parts.append(drift.pair_shifts(frames[start:end], own - start, good=good[start:end], weight=weight, **PAIRS))
        listed.append(own)
    np.testing.assert_array_equal(np.concatenate(listed), pairs)
    for name, values in whole.items():
        np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]), err_msg=name)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 30))
def test_lists_of_blocks_tile_the_list_of_the_movie(n: int, lags: list[int], block: int) -> None:
    whole = drift.pair_list(n, start=0, stop=n, lags=lags)
    parts = [drift.pair_list(n, start=s, stop=s + block, lags=lags) for s in range(0, n, block)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    slow = {(i, j) for i in range(n) for j in range(n) if j - i in lags}
    assert {tuple(pair) for pair in whole.tolist()} == slow


def exact_shifts(truth: np.ndarray, pairs: np.ndarray, rng: np.random.Generator, error: float) -> dict[str, np.ndarray]:
    """What `pair_shifts` would return for independent errors: the right candidate first, lattice vectors after it."""
    vectors = np.array([[0, 0], [12, 3], [-12, -3], [-3, 12], [3, -12]])
    step = truth[pairs[:, 1]] - truth[pairs[:, 0]] + rng.normal(0, error, (len(pairs), 2))
    shift = step[:, None] + vectors
    loglik = np.tile([0.0, -4, -4, -5, -5], (len(pairs), 1))
    same = np.full(len(pairs), error)
    return {
        "dy": shift[:, :, 0],
        "dx": shift[:, :, 1],
        "loglik": loglik,
        "height": loglik,
        "dy_err": same,
        "dx_err": same,
    }


def test_the_solution_of_sharp_pairs_is_about_the_least_squares_one() -> None:
    rng = np.random.default_rng(0)
    truth, n = walk(rng, 30, 0.5), 30
    pairs = drift.pair_list(n, start=0, stop=n, lags=LAGS)
    shifts = exact_shifts(truth, pairs, rng, 0.05)
    path = drift.solve_path(n, pairs, shifts, good=np.ones(n, bool), max_motion=4.0, cauchy=1e6)
    design = np.zeros((len(pairs), n))
    design[np.arange(len(pairs)), pairs[:, 1]] += 1
    design[np.arange(len(pairs)), pairs[:, 0]] -= 1
    lag = pairs[:, 1] - pairs[:, 0]
    scatter = np.array([path.residual[lag == value].std() for value in lag])  # weights only to the accuracy of 1e-2 px
    oracle = np.linalg.lstsq(
        design[:, 1:] / scatter[:, None], np.stack([shifts["dy"], shifts["dx"]], 2)[:, 0] / scatter[:, None]
    )[0]
    # A velocity that scatters by 0.15 px draws the path by no more than its error.
    np.testing.assert_allclose(path.drift[1:], oracle, atol=0.03)
    assert (path.drift[0] == 0).all()
    assert (path.error[0] == 0).all()


def test_errors_of_independent_pairs_are_calibrated() -> None:
    inside = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        truth = walk(rng, 60, 0.5)
        pairs = drift.pair_list(60, start=0, stop=60, lags=LAGS)
        path = drift.solve_path(60, pairs, exact_shifts(truth, pairs, rng, 0.1), good=np.ones(60, bool), **SOLVE)
        inside.append((np.abs(path.drift - truth)[1:] < path.error[1:]).mean())
    assert np.mean(inside) == pytest.approx(0.68, abs=0.1)


def test_a_lattice_vector_preferred_by_a_minority_of_pairs_is_seen_through() -> None:
    rng = np.random.default_rng(1)
    truth = walk(rng, 80, 0.8)
    pairs = drift.pair_list(80, start=0, stop=80, lags=LAGS)
    shifts = exact_shifts(truth, pairs, rng, 0.05)
    for row in np.flatnonzero(rng.random(len(pairs)) < 0.25):
        order = np.array([2, 0, 1, 3, 4])
        shifts["dy"][row], shifts["dx"][row] = shifts["dy"][row][order], shifts["dx"][row][order]
    path = drift.solve_path(80, pairs, shifts, good=np.ones(80, bool), **SOLVE)
    assert np.abs(path.drift - truth).max() < 0.5


def test_bad_frames_are_interpolated_with_larger_errors() -> None:
    rng = np.random.default_rng(2)
    truth = np.linspace(0, 1, 40)[:, None] * [8.0, -4.0]
    good = np.ones(40, bool)
    good[[0, 1, 12]] = False
    good[20:31] = False  # longer than the longest lag: nothing measured bridges it
    pairs = drift.pair_list(40, start=0, stop=40, lags=LAGS)
    shifts = exact_shifts(truth, pairs, rng, 0.02)
    path = drift.solve_path(40, pairs, shifts, good=good, **SOLVE)
    assert np.isfinite(path.drift).all()
    assert np.isfinite(path.error).all()
    expected = truth - truth[2]
    assert np.abs(path.drift - expected)[2:20].max() < 0.3
    assert (path.error[12] > 1.5 * path.error[11]).all()  # a steady motion tells where it was
    assert (path.error[25] > path.error[19]).all()
    assert (path.error[35] > path.error[19]).all()
    after = path.drift[31:] - path.drift[31]
    assert np.abs(after - (truth[31:] - truth[31])).max() < 0.1
    assert (path.chosen[~(good[pairs[:, 0]] & good[pairs[:, 1]])] == -1).all()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_shortest_movies(n: int) -> None:
    frames, truth = movie(0, kind="particle", frames=n, size=96, dose=50)
    _, _, path = measure(frames)
    assert path.drift.shape == path.error.shape == (n, 2)
    assert np.abs(path.drift - truth).max() < 0.2


def test_no_good_frame_gives_no_motion_and_no_certainty() -> None:
    pairs = drift.pair_list(5, start=0, stop=5, lags=(1,))
    nan = {name: np.full((4, 6), np.nan) for name in ("dy", "dx", "height", "loglik")}
    nan |= {name: np.full(4, np.nan) for name in ("dy_err", "dx_err")}
    path = drift.solve_path(5, pairs, nan, good=np.zeros(5, bool), **SOLVE)
    assert (path.drift == 0).all()
    assert (path.error[1:] > 1).all()


def test_featureless_frames_do_not_break_it() -> None:
    frames = np.random.default_rng(0).poisson(1.0, (6, 64, 64)).astype(np.float32)
    _, _, path = measure(frames)
    assert np.isfinite(path.drift).all()
    assert np.isfinite(path.error).all()


def test_disagreeing_lists_are_refused() -> None:
    pairs = drift.pair_list(5, start=0, stop=5, lags=(1,))
    shifts = exact_shifts(np.zeros((5, 2)), pairs[:3], np.random.default_rng(0), 0.1)
    with pytest.raises(ValueError, match="4 pairs but shifts for 3"):
        drift.solve_path(5, pairs, shifts, good=np.ones(5, bool), **SOLVE)
    with pytest.raises(ValueError, match="no frames"):
        drift.spectral_weight(np.zeros((0, 8, 8), np.float32), **WEIGHT)


def test_time_grows_linearly_with_the_movie() -> None:
    rng = np.random.default_rng(0)
    n = 20000
    truth = np.cumsum(rng.normal(0, 0.3, (n, 2)), axis=0)
    pairs = drift.pair_list(n, start=0, stop=n, lags=LAGS)
    path = drift.solve_path(n, pairs, exact_shifts(truth, pairs, rng, 0.05), good=np.ones(n, bool), **SOLVE)
    assert np.abs(np.diff(path.drift - truth, axis=0)).max() < 1  # a dense 20000² matrix would not fit


def test_whole_pixels_round_halves_up() -> None:
    np.testing.assert_array_equal(
        drift.whole_pixels(np.array([[0.5, -0.5], [1.5, -1.49], [2.4, -2.6]])), [[1, 0], [2, -1], [2, -3]]
    )


def test_whole_paths_do_not_hang_on_the_first_frame() -> None:
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.integers(-1, 3, (40, 2)), axis=0)
    for error in (0.0, 0.3, 0.49, 0.5, -0.77):
        found = drift.whole_path(steps + error + rng.normal(0, 0.1, (40, 2)))
        np.testing.assert_array_equal(found - found[0], steps - steps[0])
    smooth = np.linspace(0, 7, 40)[:, None] * [1.0, -0.6]
    off = drift.whole_path(smooth) - smooth
    assert np.abs(off - off.mean(axis=0)).max() < 0.6
    assert (drift.whole_path(np.zeros((5, 2))) == 0).all()
    assert drift.whole_path(np.zeros((0, 2))).shape == (0, 2)


# Sums of these are exact.
SIXTY_FOURTHS = st.integers(-6 * 64, 6 * 64).map(lambda k: k / 64)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(SIXTY_FOURTHS, SIXTY_FOURTHS), min_size=1, max_size=5))
def test_the_common_field_is_what_every_frame_sees(steps: list[tuple[float, float]]) -> None:
    path, shape = np.array([(0.0, 0.0), *steps]), (9, 11)
    rows, columns = drift.common_field(path, shape)
    for slice_, size, axis in ((rows, shape[0], 0), (columns, shape[1], 1)):
        seen = [p for p in range(size) if all(0 <= p + d <= size - 1 for d in path[:, axis])]
        assert list(range(size))[slice_] == seen


DATA = Path(__file__).parents[3] / "shared" / "data" / "movies"


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"the folder of real movies {DATA} is not there")
def test_graphene_with_a_flipping_trimer_never_errs_by_a_lattice_vector() -> None:
    truth = json.loads((DATA / "Si3_trimer_graphene.json").read_text())["frames"]
    keep = [i for i, frame in enumerate(truth) if frame["index"] != 22]  # a glitched scan
    silicon = [[[a["y"], a["x"]] for a in frame["atoms"] if a["species"] == "Si"] for frame in truth]
    centroid = np.array([np.mean(atoms, axis=0) for atoms in silicon])[keep]
    frames = tifffile.imread(DATA / "Si3_trimer_graphene.tif")[keep]
    noise = detector.fit_noise(frames, counts_per_electron=None)
    _, _, path = measure(detector.to_electrons(frames, noise))
    deviation = (centroid - centroid.mean(0)) - (path.drift - path.drift.mean(0))
    assert np.sqrt((deviation**2).mean()) < 0.8
    assert np.abs(deviation).max() < 4  # the shortest lattice vector is 31 px, the bond 18 px


def test_frames_that_have_nothing_in_common_have_no_drift() -> None:
    """Noise has as many maxima as anything; that pairs agree on one path is what tells a drift."""
    options = {**WEIGHT, **PAIRS, **SOLVE, "lags": LAGS}
    for seed, frames in ((0, 8), (1, 20), (2, 30)):
        counts = np.random.default_rng(seed).poisson(0.5, (frames, 128, 128)).astype(np.float32)
        found = drift.estimate(counts, np.ones(frames, bool), **options)
        assert found.agreement <= 0.3
        assert not found.drift.any()
        assert found.error.min() > SOLVE["max_motion"]


def test_pairs_of_a_specimen_agree_and_where_few_do_errors_are_widened() -> None:
    rng = np.random.default_rng(4)
    path = walk(rng, 20, 0.6)
    options = {**WEIGHT, **PAIRS, **SOLVE, "lags": LAGS}
    clean = record(specimen(rng, 256, "particle"), path, 160)
    stated = {}
    for dose in (2.0, 0.02):
        found = drift.estimate(rng.poisson(dose * clean).astype(np.float32), np.ones(20, bool), **options)
        stated[dose] = found.error[1:].mean()
        if dose == 2.0:
            assert found.agreement > 0.95
        else:
            assert found.agreement < 0.7
            off = found.drift - path
            assert np.sqrt(np.mean(off[1:] ** 2)) < 2 * stated[dose]
    assert drift.estimate(clean[:2].astype(np.float32), np.ones(2, bool), **options).agreement != 1  # nobody to ask
