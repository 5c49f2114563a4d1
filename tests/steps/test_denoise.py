from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.networks.adapt import untrained
from pipeline.steps.denoise import denoise, denoise_with_errors, windows
from pipeline.steps.neighbours import FrameLinks, Level, frame_context, frame_runs, measure_level, neighbour_stack

OFFSETS = (-2, -1, 0, 1, 2)


def links_of(n, drift=None, good=None, run=None):
    return FrameLinks(
        np.zeros((n, 2), dtype=int) if drift is None else np.asarray(drift),
        np.ones(n, dtype=bool) if good is None else np.asarray(good),
        np.zeros(n, dtype=int) if run is None else np.asarray(run),
    )


def numbered(n, size=8):
    """Frame i is i + 1 everywhere."""
    return np.arange(1, n + 1, dtype=np.float32)[:, None, None] * np.ones((size, size), dtype=np.float32)


def slots(stack, valid):
    """The number in each slot, None where nothing is valid."""
    return [float(s[v].unique().item()) if v.any() else None for s, v in zip(stack, valid, strict=True)]


def test_neighbours_stand_in_the_order_of_the_offsets():
    assert slots(*neighbour_stack(numbered(7), 3, offsets=OFFSETS, links=links_of(7), fill=9)) == [2, 3, 4, 5, 6]


def test_slots_are_masked_at_ends_gaps_and_bad_frames():
    frames = numbered(7)
    assert slots(*neighbour_stack(frames, 0, offsets=OFFSETS, links=links_of(7), fill=9)) == [None, None, 1, 2, 3]
    assert slots(*neighbour_stack(frames, 6, offsets=OFFSETS, links=links_of(7), fill=9)) == [5, 6, 7, None, None]
    gap = links_of(7, run=[0, 0, 0, 1, 1, 1, 1])
    assert slots(*neighbour_stack(frames, 2, offsets=OFFSETS, links=gap, fill=9)) == [1, 2, 3, None, None]
    bad = links_of(7, good=[1, 1, 0, 1, 1, 0, 1])
    stack, valid = neighbour_stack(frames, 3, offsets=OFFSETS, links=bad, fill=9)
    assert slots(stack, valid) == [2, None, 4, 5, None]
    assert (stack[1] == 9).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.data())
def test_no_neighbour_slot_holds_the_centre_frame(n, data):
    index = data.draw(st.integers(0, n - 1))
    good = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    stack, valid = neighbour_stack(numbered(n), index, offsets=OFFSETS, links=links_of(n, good=good), fill=0)
    for slot, offset in enumerate(OFFSETS):
        if offset:
            assert not (stack[slot][valid[slot]] == index + 1).any()


def test_neighbours_follow_the_specimen():
    """A dot that drifts by (+2, -1) px per frame lies on one pixel in all slots."""
    frames = np.zeros((5, 16, 16), dtype=np.float32)
    drift = np.arange(5)[:, None] * [2, -1]
    for t in range(5):
        frames[t, 4 + 2 * t, 9 - t] = 1
    stack, valid = neighbour_stack(frames, 2, offsets=OFFSETS, links=links_of(5, drift=drift), fill=0)
    assert (stack[:, 8, 7] == 1).all()
    assert stack.sum() == 5
    # frame 4 moved by (4, -2): its rows beyond 16 - 4 and its columns before 2 come from outside
    assert not valid[4, 12:].any()
    assert not valid[4, :, :2].any()
    assert valid[4, :12, 2:].all()
    assert valid[2].all()


def test_a_neighbour_that_left_the_field_is_not_valid():
    drift = [[0, 0], [0, 99]]
    stack, valid = neighbour_stack(numbered(2), 0, offsets=(-1, 0, 1), links=links_of(2, drift=drift), fill=0)
    assert slots(stack, valid) == [None, 1, None]


def test_pixels_that_are_not_finite_are_masked():
    frames = numbered(3)
    frames[1, 2, 3], frames[2, 0, 0] = np.nan, np.inf
    stack, valid = neighbour_stack(frames, 1, offsets=(-1, 0, 1), links=links_of(3), fill=5)
    assert torch.isfinite(stack).all()
    assert (stack[1, 2, 3], stack[2, 0, 0]) == (5, 5)
    assert (~valid).sum() == 2


@given(st.integers(1, 300), st.one_of(st.none(), st.integers(1, 90)), st.integers(0, 40))
def test_cores_tile_exactly_once_and_windows_begin_even(size, tile, halo):
    cut = windows(size, tile, halo)
    covered = np.concatenate([np.arange(core.start, core.stop) for core, _ in cut])
    assert np.array_equal(covered, np.arange(size))
    for core, window in cut:
        assert window.start % 2 == 0
        assert window.start == 0 or core.start - window.start >= halo
        assert window.stop == size or window.stop - core.stop >= halo


def test_gaps_in_time_begin_a_new_run():
    assert frame_runs(np.array([0, 1, 2, 9, 10.0]), max_gap=3).tolist() == [0, 0, 0, 1, 1]
    assert frame_runs(np.array([0, 1, 2, 4, 5.0]), max_gap=3).tolist() == [0] * 5
    assert frame_runs(np.array([0.0]), max_gap=3).tolist() == [0]
    assert frame_runs(np.zeros(4), max_gap=3).tolist() == [0] * 4


def test_the_level_is_the_mean_and_its_noise():
    frames = numbered(3)
    frames[0, 0, 0] = np.nan
    level = measure_level(frames, readout_variance=0.5)
    assert level.mean == pytest.approx(np.nanmean(frames))
    assert level.variance == pytest.approx(level.mean + 0.5)
    assert measure_level(-frames, readout_variance=0).mean == pytest.approx(1e-3)


def test_the_context_is_the_filtered_mean_of_the_neighbours_alone():
    network = untrained("blindspot", {**NETWORKS["blindspot"], "context": 1}, seed=0)
    kernel = torch.zeros(3, 3)
    kernel[1, 1], kernel[0, 1] = 2, 1  # twice the pixel itself and once the pixel below: out(y) = ... + in(y + 1)
    network.kernel.copy_(kernel)
    frames = torch.rand(6, 8, 9)
    frames[3] = 1e6  # the frame itself has no part
    links, level = links_of(6, good=[1, 0, 1, 1, 1, 1]), Level(0.5, 0.5)
    assert network.around == network.offsets == (-2, -1, 0, 1, 2)
    mean = frames[[2, 4, 5]].mean(0) - 0.5
    expected = 2 * mean
    expected[:-1] += mean[1:]
    context = frame_context(network, frames, 3, links=links, level=level)
    torch.testing.assert_close(context, expected[None], rtol=1e-5, atol=1e-5)
    wider = untrained("blindspot", {**NETWORKS["blindspot"], "context": 1, "around": 7}, seed=0)
    wider.kernel.copy_(torch.zeros(3, 3))
    wider.kernel[1, 1] = 1
    mean = frames[[0, 2, 4, 5]].mean(0) - 0.5
    found = frame_context(wider, frames, 3, links=links, level=level)
    torch.testing.assert_close(found, mean[None], rtol=1e-5, atol=1e-5)
    assert frame_context(untrained("wcvd", NETWORKS["wcvd"], seed=0), frames, 3, links=links, level=level) is None


NETWORKS = {
    "blindspot": {"frames": 5, "channels": 16, "dilations": [2, 4]},
    "wcvd": {"kernels": [3, 5, 7], "layers": 4, "channels": 3},
}


@pytest.fixture(params=["blindspot", "context", "leftover", "wcvd"])
def network(request):
    if request.param in NETWORKS:
        return untrained(request.param, NETWORKS[request.param], seed=3)
    added = {"context": 20, "around": 9, "leftover": request.param == "leftover"}
    network = untrained("blindspot", {**NETWORKS["blindspot"], **added}, seed=3)
    with torch.no_grad():
        if network.leftover_kernel is not None:
            network.leftover_kernel.copy_(torch.rand(41, 41) / 100)
        network.kernel.copy_(torch.rand(41, 41) / 100)
        network.early.weight.normal_()
        network.skip.fill_(0.5)
    return network


@pytest.fixture
def movie():
    rng = np.random.default_rng(0)
    frames = rng.poisson(0.6, (12, 51, 70)).astype(np.float32)
    drift = np.cumsum(rng.integers(-2, 3, (12, 2)), axis=0)
    return frames, links_of(12, drift=drift, good=np.arange(12) != 7), Level(0.6, 0.6)


def run(network, movie, *, indices=None, tile=None, dtype="float32", cut=slice(None)):
    frames, links, level = movie
    links = FrameLinks(*(part[cut] for part in links))
    indices = range(len(frames[cut])) if indices is None else indices
    return denoise(network, frames[cut], indices, links=links, level=level, tile=tile, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 4, 5])
def test_any_cut_gives_the_same_bits(network, movie, dtype, length):
    whole = run(network, movie, dtype=dtype, tile=32)
    halo = max(network.around)
    for start in range(0, 12, length):
        stop = min(start + length, 12)
        first = max(0, start - halo)
        part = run(
            network,
            movie,
            indices=range(start - first, stop - first),
            tile=32,
            dtype=dtype,
            cut=slice(first, stop + halo),
        )
        assert np.array_equal(part, whole[start:stop])


@pytest.mark.parametrize("tile", [16, 30, 33, 512])
def test_tiles_equal_the_whole_frame(network, movie, tile):
    np.testing.assert_allclose(run(network, movie, tile=tile), run(network, movie), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tile", [None, 30])
def test_errors_are_stated_beside_the_same_estimates(movie, tile):
    frames, links, level = movie
    how = {"links": links, "level": level, "tile": tile, "dtype": "float32"}
    for errors in (True, False):
        network = untrained("blindspot", {**NETWORKS["blindspot"], "context": 8, "errors": errors}, seed=3)
        estimate, expected = denoise_with_errors(network, frames, [2, 5], **how)
        np.testing.assert_array_equal(estimate, denoise(network, frames, [2, 5], **how))
        assert (expected > 0).all() if errors else np.isnan(expected).all()
    _, expected = denoise_with_errors(untrained("wcvd", NETWORKS["wcvd"], seed=0), frames, [2], **how)
    assert expected.shape == (1, *frames.shape[1:])
    assert np.isnan(expected).all()


def test_results_do_not_depend_on_the_number_of_threads(network, movie):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(network, movie, indices=[3]))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(*results)


def test_bfloat16_is_close_to_float32(movie):
    network = untrained("blindspot", NETWORKS["blindspot"], seed=3)
    exact, short = run(network, movie), run(network, movie, dtype="bfloat16")
    assert exact.std() > 0.001
    assert np.abs(exact - short).max() < 0.1 * exact.std()


def test_a_bad_frame_is_estimated_from_its_neighbours(network, movie):
    frames, links, level = movie
    broken = frames.copy()
    broken[7] = np.nan
    assert np.array_equal(run(network, (broken, links, level)), run(network, movie))


def test_a_single_frame_can_be_denoised(network, movie):
    frames, links, level = movie
    alone = denoise(
        network, frames[:1], [0], links=FrameLinks(*(p[:1] for p in links)), level=level, tile=None, dtype="float32"
    )
    assert alone.shape == (1, 51, 70)
    assert np.isfinite(alone).all()
