"""The fast ways to a mixed-scale dense network's maps against the definition, which concatenates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pipeline.networks import msd_maps
from pipeline.networks.msd_maps import Layers, blocked, feature_maps, logits, rolling, stepwise
from pipeline.networks.msdnet import MSDNet


def layers_of(width, dilations, *, inputs=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weights, biases, maps = [], [], inputs
    for _ in dilations:
        weights.append(torch.randn(width, maps, 3, 3, generator=generator, dtype=dtype) * (0.6 / maps**0.5))
        biases.append(torch.randn(width, generator=generator, dtype=dtype) * 0.1)
        maps += width
    return Layers(weights, biases, list(dilations))


def concatenated(images, layers):
    """The definition."""
    maps = images
    for weight, bias, dilation in zip(*layers, strict=True):
        made = functional.conv2d(maps, weight, bias, padding=dilation, dilation=dilation)
        maps = torch.cat([maps, functional.relu(made)], 1)
    return maps


def images_of(shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


CASES = [
    (1, [i % 10 + 1 for i in range(100)], (1, 1, 40, 37)),
    (1, [1, 2, 3], (2, 1, 9, 130)),
    (3, [4, 1, 9, 2, 2, 5, 1, 1, 3, 7, 2, 1], (2, 2, 25, 31)),
    (4, [1, 2, 4, 8], (1, 1, 200, 90)),
    (8, [1, 2, 4, 8, 6, 2], (2, 1, 33, 47)),
    (2, [12], (1, 3, 5, 6)),
]


@pytest.mark.parametrize(("width", "dilations", "shape"), CASES)
def test_every_way_gives_what_the_definition_gives(width, dilations, shape):
    layers, images = layers_of(width, dilations, inputs=shape[1]), images_of(shape)
    with torch.no_grad():
        expected = concatenated(images, layers)
        near = 2e-6 * float(expected.abs().max()) * len(dilations)
        assert float((stepwise(images, layers) - expected).abs().max()) < near
        assert float((feature_maps(images, layers) - expected).abs().max()) < near
        for image, right in zip(images, expected, strict=True):
            held = blocked(image, layers)
            assert float((msd_maps._inner(held.rows, held) - right).abs().max()) < near
        weight, bias = images_of((2, expected.shape[1], 1, 1), 5), images_of((2,), 6)
        found = logits(images, layers, weight, bias)
        assert torch.allclose(found, functional.conv2d(expected, weight, bias), atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 3),
    dilations=st.lists(st.integers(1, 6), min_size=1, max_size=13),
    height=st.integers(1, 14),
    across=st.integers(1, 14),
    tile=st.sampled_from([7, 64, 8192]),
    block=st.sampled_from([1, 3, 10]),
)
def test_blocks_and_tiles_of_any_size_change_nothing(width, dilations, height, across, tile, block):
    layers, images = (
        layers_of(width, dilations, dtype=torch.float64),
        images_of((1, 1, height, across), dtype=torch.float64),
    )
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(msd_maps, "TILE", tile)
        patch.setattr(msd_maps, "BLOCK", block)
        held = blocked(images[0], layers)
        found = msd_maps._inner(held.rows, held)
        assert torch.allclose(found, concatenated(images, layers)[0], atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 5),
    dilations=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    height=st.integers(1, 60),
    across=st.integers(1, 40),
    rows=st.sampled_from([1, 9, 64]),
    columns=st.sampled_from([1, 7, 512]),
)
def test_strips_that_roll_down_an_image_change_nothing(width, dilations, height, across, rows, columns):
    layers = layers_of(width, dilations, inputs=2, dtype=torch.float64)
    images = images_of((2, 2, height, across), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(msd_maps, "ROWS", rows)
        patch.setattr(msd_maps, "COLUMNS", columns)
        expected = concatenated(images, layers)
        weight = images_of((3, expected.shape[1], 1, 1), 5, torch.float64)
        bias = images_of((3,), 6, torch.float64)
        found = rolling(images, layers, weight, bias)
    assert torch.allclose(found, functional.conv2d(expected, weight, bias), atol=1e-10)


def test_large_images_are_computed_in_strips(monkeypatch):
    """A whole buffer of a 4096 × 4096 frame would take 4 GB."""
    layers, taken = layers_of(8, [1, 2, 4, 8]), []
    images, maps = images_of((1, 1, 300, 280)), 1 + 4 * 8
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **options: taken.append(size) or empty(size, **options))
    with torch.no_grad():
        logits(images, layers, images_of((1, maps, 1, 1)), images_of((1,)))
    assert taken == [(1, maps, 23 + 64 + 8, 280 + 16)]


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("through_input", [True, False])
def test_gradients_are_those_of_the_definition(width, through_input):
    layers = layers_of(width, [1, 3, 2, 5], inputs=2, dtype=torch.float64)
    images = images_of((2, 2, 13, 11), dtype=torch.float64).requires_grad_(through_input)
    parameters = [*layers.weights, *layers.biases]
    for parameter in parameters:
        parameter.requires_grad_()
    wanted = [images, *parameters] if through_input else parameters
    pattern = images_of((2, 2 + 4 * width, 13, 11), 9, torch.float64)
    found, expected = (
        torch.autograd.grad((function(images, layers).square() * pattern).sum(), wanted)
        for function in (feature_maps, concatenated)
    )
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, atol=1e-9, rtol=1e-9)


def test_an_image_gives_the_same_bits_alone_and_in_a_batch():
    layers, images = layers_of(1, [1, 2, 3, 4] * 6), images_of((3, 1, 30, 20))
    with torch.no_grad():
        together = feature_maps(images, layers)
        for index in range(3):
            assert torch.equal(together[index], feature_maps(images[index : index + 1], layers)[0])


def test_a_deep_network_keeps_each_map_once_for_its_gradient():
    """Concatenation keeps the input of every layer: about depth²/2 maps instead of depth."""
    network = MSDNet(inputs=1, outputs=1, width=1, dilations=[i % 10 + 1 for i in range(60)])
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.numel() if tensor.shape[-2:] == (24, 24) else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        network(torch.randn(1, 1, 24, 24)).sum().backward()
    assert kept <= 2 * 61 * 24 * 24 + 24 * 24
