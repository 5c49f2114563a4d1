"""Parts of a view that move on their own: known displacements, a slow oracle, and nothing out of noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from pipeline import provenance
from pipeline.networks.adapt import fit_filter
from pipeline.networks.adapt_sample import Sample, seen
from pipeline.networks.blindspot import BlindSpot
from pipeline.networks.wiener import NeighbourWiener
from pipeline.steps import motion
from pipeline.steps.denoise import denoise
from pipeline.steps.neighbours import FrameLinks, Level, local_shifts, measure_level, neighbour_stack

SIDE, FRAMES = 272, 9
DOSE = 2.0


def lattice(y, x):
    """A texture of period 9 to 11 px, of mean one."""
    return 1 + 0.35 * np.cos(2 * np.pi * (x + 0.3 * y) / 10) * np.cos(2 * np.pi * (y - 0.2 * x) / 9.5)


def turning(degrees, frames=FRAMES, side=SIDE):
    """Clean frames (t, y, x) of a sheet that turns about its middle from frame to frame, and the angles [rad]."""
    angles = np.deg2rad(degrees * np.array([0, 1, -0.5, 0.7, -1, 0.4, -0.2, 1.1, 0])[:frames])
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    clean = [lattice(np.cos(a) * y - np.sin(a) * x, np.sin(a) * y + np.cos(a) * x) for a in angles]
    return np.array(clean, dtype=np.float32), angles


def links_of(n):
    return FrameLinks(np.zeros((n, 2), dtype=int), np.ones(n, dtype=bool), np.zeros(n, dtype=int))


def sample_of(clean, seed=0):
    counts = np.random.default_rng(seed).poisson(DOSE * clean).astype(np.float32)
    return Sample(torch.from_numpy(counts), links_of(len(counts)), measure_level(counts, readout_variance=0))


def filter_of(sample, *, moving=True, around=5):
    """A Wiener filter of the neighbours that knows how far parts of the sample move."""
    plain = NeighbourWiener(frames=5, context=16, around=around)
    fit_filter(plain, sample._replace(moving=moving))
    return plain


@pytest.fixture(scope="module")
def turned():
    clean, angles = turning(0.6)
    sample = sample_of(clean)
    return clean, angles, sample, filter_of(sample)


def test_moved_pixels_are_those_of_linear_interpolation(monkeypatch):
    """Two neighbours that lie apart, a field of blocks, and bands that it does not depend on."""
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(rng.normal(size=(2, 90, 110)).astype(np.float32))
    field = torch.from_numpy(rng.normal(0, 2, (2, 2, 6, 7)).astype(np.float32))
    field[1] = 0
    region, corners = (20, 25, 40, 50), [(22, 24), (17, 30)]
    found, valid = motion.moved(list(frames), corners, field, region, fill=7.0)
    shift = motion.field_at(field, torch.arange(20, 60), torch.arange(25, 75)).numpy()
    assert valid.all()
    for image, frame, (top, left), (down, right) in zip(found, frames, corners, shift, strict=True):
        y, x = np.arange(40)[:, None] + top + down, np.arange(50) + left + right
        np.testing.assert_allclose(image, map_coordinates(frame.numpy(), [y, x], order=1), atol=1e-4)
    np.testing.assert_allclose(found[1], frames[1, 17:57, 30:80], atol=1e-4)
    monkeypatch.setattr(motion, "_BAND", 1)
    for one, other in zip(motion.moved(list(frames), corners, field, region, fill=7.0), (found, valid), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_moved_pixels_beyond_the_frame_or_beside_missing_ones_are_not_valid():
    frame = torch.ones(40, 40)
    frame[20, 20] = torch.nan
    half = torch.full((1, 2, 3, 3), 0.5)
    found, valid = motion.moved([frame], [(-1, 0)], half, (0, 0, 41, 40), fill=7.0)
    assert (found[~valid] == 7).all()
    assert (found[valid] == 1).all()
    expected = torch.ones(41, 40, dtype=torch.bool)
    expected[0] = expected[40] = expected[:, 39] = False
    expected[20:22, 19:21] = False
    assert torch.equal(valid[0], expected)
    assert not motion.moved([frame], [(100, 200)], half, (0, 0, 8, 8), fill=7.0)[1].any()
    assert not motion.moved([frame], [(-100, -200)], half, (0, 0, 8, 8), fill=7.0)[1].any()


def test_a_turning_sheet_is_followed_to_a_fraction_of_a_pixel(turned):
    _, angles, sample, network = turned
    assert network.motion[0] > 0.2
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    inner = (slice(16, -16), slice(16, -16))
    for index in (3, 4):
        shifts = local_shifts(network, sample.frames, index, links=sample.links, level=sample.level)
        for slot, offset in enumerate(network.around):
            turn = angles[index + offset] - angles[index]
            # A pattern that turns by a moves by a times the distance from the middle, across it.
            expected = np.stack([turn * x, -turn * y])
            found = motion.field_at(shifts[slot], torch.arange(SIDE), torch.arange(SIDE)).numpy()
            error = (found - expected)[(slice(None), *inner)]
            assert np.sqrt(np.mean(error**2)) < max(0.2, 0.25 * np.sqrt(np.mean(expected**2)))
        assert not shifts[network.around.index(0)].any()


def test_neighbours_that_were_moved_are_nearer_to_the_truth(turned):
    clean, _, sample, network = turned
    errors = []
    for moving in (False, True):
        plain = network if moving else filter_of(sample, moving=False)
        made = denoise(
            plain, sample.frames, range(2, 7), links=sample.links, level=sample.level, tile=None, dtype="float32"
        )
        errors.append(np.mean((made / DOSE - clean[2:7])[:, 16:-16, 16:-16] ** 2))
    assert errors[1] < 0.8 * errors[0]


def test_what_stands_still_is_not_moved_and_noise_moves_nothing():
    still = sample_of(np.repeat(turning(0.0)[0][:1], FRAMES, axis=0), seed=1)
    assert max(filter_of(still).motion) < 0.1
    noise = sample_of(np.ones((FRAMES, SIDE, SIDE)), seed=2)
    assert not any(filter_of(noise).motion)


def test_moments_do_not_depend_on_the_rows_they_are_taken_in():
    rng = np.random.default_rng(3)
    guide, images = (torch.from_numpy(rng.normal(size=s).astype(np.float32)) for s in ((100, 75), (3, 100, 75)))
    valid = torch.from_numpy(rng.random((3, 100, 75)) < 0.9)

    def of(rows):
        comparison = motion.Comparison(guide, rows, variance=2.0)
        for image, where in zip(images, valid, strict=True):
            comparison.add(image[rows], where[rows])
        return comparison.moments()

    whole = of(slice(0, 100))
    for one, two in zip(motion.joined([of(slice(0, 64)), of(slice(64, 100))]), whole, strict=True):
        torch.testing.assert_close(one, two)
    # Against sums pixel by pixel.
    gradient = np.gradient(guide.numpy())
    gradient[0][[0, -1]], gradient[1][:, [0, -1]] = 0, 0
    terms = np.stack([-gradient[0], -gradient[1], guide.numpy(), np.ones((100, 75))])
    block = (slice(16, 32), slice(32, 48))
    part = terms[(slice(None), *block)].reshape(4, -1)
    np.testing.assert_allclose(whole.normal[1, 2], (part @ part.T / 2)[np.triu_indices(4)], rtol=1e-4)
    difference = ((images[2] - guide) * valid[2])[block].numpy().ravel()
    np.testing.assert_allclose(whole.right[2, 1, 2], part @ difference / 2, rtol=1e-3, atol=1e-3)
    assert whole.share[2, 1, 2] == pytest.approx(valid[2][block].float().mean())


def test_in_a_view_that_judges_no_way_leads_back_to_the_pixel_itself(turned):
    """The estimate where a view is judged, through displacements, moved neighbours, their filter and the network."""
    sample, network = (
        turned[2],
        BlindSpot(frames=5, channels=16, dilations=[2], context=16, around=7, motion=turned[3].motion),
    )
    with torch.no_grad():
        network.kernel.copy_(turned[3].kernel)
        network.early.weight.normal_(0, 0.1)
        network.skip.fill_(0.5)
    index, level = 4, torch.tensor(sample.level)
    frames = sample.frames.clone().requires_grad_()
    told = seen(network, sample._replace(frames=frames))
    assert len(told.contexts) == 2
    assert (told.judged(0) ^ told.judged(1)).all()
    for view in (0, 1):
        stack, valid, context = told.inputs(sample._replace(frames=frames), view, index, network.offsets, None)
        estimate = network(stack[None], valid[None], level, context[None])[0]
        places = torch.nonzero(told.judged(view))
        for y, x in (places[0], places[-1], places[len(places) // 2], places[len(places) // 3]):
            (g,) = torch.autograd.grad(estimate[y, x], frames, retain_graph=True)
            assert g[index, y, x] == 0
            assert torch.count_nonzero(g[index]) > 1000  # of the other squares much is known
    whole = seen(network, sample._replace(frames=frames), whole=True)
    stack, valid, context = whole.inputs(sample._replace(frames=frames), 0, index, network.offsets, None)
    (g,) = torch.autograd.grad(network(stack[None], valid[None], level, context[None])[0, 70, 70], frames)
    assert g[index, 70, 70] != 0


def test_frames_are_moved_alike_however_a_movie_and_a_frame_are_cut(turned):
    sample, network = turned[2], filter_of(turned[2], around=7)
    how = {"level": sample.level, "dtype": "float32"}
    whole = denoise(network, sample.frames, range(9), links=sample.links, tile=None, **how)
    part = denoise(
        network, sample.frames[1:8], [3], links=FrameLinks(*(p[1:8] for p in sample.links)), tile=None, **how
    )
    np.testing.assert_array_equal(part[0], whole[4])
    small = denoise(network, sample.frames, [4], links=sample.links, tile=48, **how)
    np.testing.assert_allclose(small[0], whole[4], atol=1e-5)


def test_displacements_are_as_exact_where_the_network_computes_in_bfloat16(turned):
    sample, network = turned[2], turned[3]
    made = [
        denoise(network, sample.frames, [4], links=sample.links, level=sample.level, tile=None, dtype=dtype)[0]
        for dtype in ("float32", "bfloat16")
    ]
    np.testing.assert_array_equal(*made)


def test_a_region_is_moved_as_the_frame_is(turned):
    sample, network = turned[2], turned[3]
    frames = sample.frames.clone()
    frames[3, 50:53, 60] = torch.nan
    links = sample.links._replace(drift=np.arange(18).reshape(9, 2) % 5)
    shifts = local_shifts(network, frames, 4, links=links, level=sample.level)
    common = {"offsets": network.around, "links": links, "fill": sample.level.mean, "shifts": shifts}
    stack, valid = neighbour_stack(frames, 4, **common)
    for top, left, height, width in [(0, 0, 40, 50), (33, 21, 64, 70), (100, 90, 44, 54)]:
        here = (slice(None), slice(top, top + height), slice(left, left + width))
        part, where = neighbour_stack(frames, 4, region=(top, left, height, width), **common)
        assert torch.equal(where, valid[here])
        torch.testing.assert_close(part, stack[here], rtol=0, atol=1e-3)
    assert 0 < int((~valid[1]).sum()) < valid[1].numel() // 8
    assert float(gaussian_filter(stack[0].numpy(), 3).std()) > 0


def test_a_frame_alone_is_left_as_it_is():
    sample = sample_of(turning(0.6)[0][:1])
    network = NeighbourWiener(frames=5, context=16, motion=(0.5, 0.1))
    shifts = local_shifts(network, sample.frames, 0, links=sample.links, level=Level(DOSE, DOSE))
    assert not shifts.any()


def test_a_run_says_how_far_parts_of_the_view_move():
    (note,) = provenance.denoiser_notes({"training": {"motion": [0.3, 0.4]}}, None)
    assert "0.50 px" in note and "denoise.motion" in note
    assert provenance.denoiser_notes({"training": {"motion": []}}, None) == []
