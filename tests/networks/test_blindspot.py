from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.networks.blindspot import TIERS, BlindSpot
from pipeline.networks.wcvd import WCVD
from pipeline.networks.weights import denoiser_of, load_weights, save_weights
from pipeline.steps.neighbours import FrameLinks, Level, frame_context, neighbour_stack

LEVEL = torch.tensor([0.7, 0.9])


def make(seed=0, **config):
    torch.manual_seed(seed)
    network = BlindSpot(**(config or TIERS["large"]))
    with torch.no_grad():  # no weight may be zero by initialisation, or a leak could hide behind it
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def gradient(network, shape, point):
    dtype = next(network.parameters()).dtype
    frames = torch.rand(1, len(network.offsets), *shape, dtype=dtype, requires_grad=True)
    estimate = network(frames, torch.ones_like(frames, dtype=torch.bool), LEVEL)
    assert estimate.shape == (1, *shape)
    (g,) = torch.autograd.grad(estimate[0, point[0], point[1]], frames)
    return g[0]


@pytest.mark.parametrize("shape", [(16, 20), (13, 15)])
def test_no_pixel_sees_itself_or_its_block(shape):
    network = make()
    h, w = shape
    for y, x in [(0, 0), (0, w - 1), (h - 1, 0), (h - 1, w - 1), (6, 6), (6, 7), (7, 6), (7, 7), (h - 2, w - 2)]:
        centre = gradient(network, shape, (y, x))[3]
        block = centre[y // 2 * 2 : y // 2 * 2 + 2, x // 2 * 2 : x // 2 * 2 + 2]
        assert torch.count_nonzero(block) == 0
        assert torch.count_nonzero(centre) > 50


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(TIERS)), st.integers(6, 17), st.integers(6, 17), st.data())
def test_every_tier_is_blind_everywhere(tier, height, width, data):
    network = make(**TIERS[tier])
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    assert gradient(network, (height, width), (y, x))[len(network.offsets) // 2, y, x] == 0


def test_without_its_own_frame_a_network_sees_the_others_alone(tmp_path):
    network = make(**TIERS["small"], own_frame=False)
    seen = gradient(network, (16, 16), (7, 8))
    assert torch.count_nonzero(seen[2]) == 0
    assert all(seen[slot, 7, 8] != 0 for slot in (0, 1, 3, 4))
    frames = torch.rand(1, 5, 16, 16)
    valid = torch.ones_like(frames, dtype=torch.bool)
    other, hidden = frames.clone(), valid.clone()
    other[:, 2], hidden[:, 2] = 7.0, False
    assert torch.equal(network(frames, valid, LEVEL), network(other, hidden, LEVEL))
    assert valid.all()  # what it was given is left alone
    alone = torch.zeros_like(valid)
    alone[:, 2] = True  # a frame without neighbours is not hidden
    assert not torch.equal(network(frames, alone, LEVEL), network(other, alone, LEVEL))
    both = network(torch.cat([frames, frames]), torch.cat([valid, alone]), LEVEL)
    assert torch.allclose(both[0], network(frames, valid, LEVEL)[0], atol=1e-6)
    assert torch.allclose(both[1], network(frames, alone, LEVEL)[0], atol=1e-6)
    save_weights(network, tmp_path / "hidden.safetensors", {})
    assert torch.equal(
        load_weights(tmp_path / "hidden.safetensors").module(other, valid, LEVEL), network(frames, valid, LEVEL)
    )


def test_neighbours_are_seen_at_the_pixel_itself():
    g = gradient(make(), (16, 16), (7, 8))
    assert all(g[slot, 7, 8] != 0 for slot in (0, 1, 2, 4, 5, 6))


def test_the_receptive_radius_is_not_exceeded():
    network = make()
    for point in [(40, 40), (41, 40), (40, 41)]:
        seen = torch.nonzero(gradient(network, (80, 80), point).abs().sum(0))
        assert (seen - torch.tensor(point)).abs().max() <= network.receptive_radius


@pytest.mark.parametrize(("tier", "most"), [("small", 2 * 864), ("medium", 5_100), ("large", 20_000)])
def test_cost_of_the_tiers_that_ship(tier, most):
    """The small one costs less than twice WCVD as published."""
    shipped = load_weights(denoiser_of(tier))
    assert shipped.metadata["config"] == TIERS[tier]
    assert shipped.module.macs_per_pixel <= most


def test_the_network_knows_which_slots_are_missing():
    network = make()
    frames = torch.rand(1, 7, 12, 12)
    frames[:, 5:] = LEVEL[0]
    valid = torch.ones_like(frames, dtype=torch.bool)
    full = network(frames, valid, LEVEL)
    valid[:, 5:, 4:6, 4:6] = False
    part = network(frames, valid, LEVEL)
    assert not torch.equal(part[0, 4:6, 4:6], full[0, 4:6, 4:6])
    valid[:, 5:] = False
    assert not torch.equal(network(frames, valid, LEVEL)[0, 0, 0], full[0, 0, 0])


def test_the_stated_error_is_as_blind_as_the_estimate_which_it_leaves_alone():
    network = make(**TIERS["small"])
    with torch.no_grad():
        network.error.weight.normal_()
    frames = torch.rand(1, 5, 13, 16, requires_grad=True)
    valid = torch.ones(frames.shape, dtype=torch.bool)
    estimate, error = network.with_errors(frames, valid, LEVEL)[0]
    assert torch.equal(estimate, network(frames, valid, LEVEL)[0])
    assert (error > 0).all()
    for y, x in [(0, 0), (12, 15), (6, 9)]:
        (g,) = torch.autograd.grad(error[y, x], frames, retain_graph=True)
        assert g[0, 2, y, x] == 0
        assert torch.count_nonzero(g[0, 2]) > 20
    silent = make(**{**TIERS["small"], "errors": False})
    assert silent.with_errors(frames, valid, LEVEL)[:, 1].isnan().all()


@pytest.mark.parametrize("leftover", [False, True])
def test_filtered_neighbours_leave_the_network_blind(leftover):
    """The estimate of a frame through `frame_context` and the network: no way back to the pixel itself."""
    network = make(**{**TIERS["large"], "context": 5, "leftover": leftover})
    with torch.no_grad():
        network.kernel.normal_()
        if leftover:
            network.leftover_kernel.normal_()
    links = FrameLinks(np.arange(18).reshape(9, 2) // 4, np.arange(9) != 2, np.zeros(9, dtype=int))
    level = Level(0.7, 0.9)
    frames = torch.rand(9, 15, 18, requires_grad=True)
    context = frame_context(network, frames, 4, links=links, level=level)
    stack, valid = neighbour_stack(frames, 4, offsets=network.offsets, links=links, fill=level.mean)
    estimate = network(stack[None], valid[None], LEVEL, context[None])[0]
    assert not torch.equal(estimate, network(stack[None], valid[None], LEVEL)[0])
    for y, x in [(0, 0), (14, 17), (7, 8), (6, 9)]:
        (g,) = torch.autograd.grad(estimate[y, x], frames, retain_graph=True)
        assert g[4, y, x] == 0
        assert torch.count_nonzero(g[3]) > torch.count_nonzero(g[4]) > 50
        assert torch.count_nonzero(g[2]) == 0


@pytest.mark.parametrize(
    "config", [{"frames": 4}, {"channels": 24}, {"dilations": [2, 3]}, {"around": 5}, {"around": 14}]
)
def test_configurations_that_break_the_blind_spot_are_refused(config):
    with pytest.raises(ValueError, match="expected"):
        BlindSpot(**{**TIERS["large"], **config})


def wcvd():
    torch.manual_seed(0)
    return WCVD(kernels=(3, 5, 7), layers=4, channels=3)


def test_wcvd_has_the_published_size():
    network = wcvd()
    assert sum(p.numel() for p in network.parameters()) == 867
    assert network.macs_per_pixel == 864
    assert sum(int((1 - m.mask).sum()) * 3 for m in network.modules() if hasattr(m, "mask")) == 9  # frozen zeros


def test_wcvd_is_blind_homogeneous_and_periodic():
    network = wcvd().double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.rand_like(parameter))
    for point in [(0, 0), (11, 15), (5, 6)]:
        g = gradient(network, (12, 16), point)
        assert g[1, point[0], point[1]] == 0
        assert g[0, point[0], point[1]] != 0
        assert torch.count_nonzero(g) == 146
    frames = torch.rand(1, 3, 12, 16, dtype=torch.float64)
    ones = torch.ones_like(frames, dtype=torch.bool)
    estimate = network(frames, ones, LEVEL)
    torch.testing.assert_close(network(3 * frames, ones, 3 * LEVEL), 3 * estimate)
    torch.testing.assert_close(network(3 * frames, ones, LEVEL), 3 * estimate)
    torch.testing.assert_close(network(frames.roll(5, -1), ones, LEVEL), estimate.roll(5, -1))
