from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.networks.msdnet import MSDNet
from pipeline.networks.train_columns import ColumnTraining
from pipeline.networks.weights import load_weights, save_weights
from schemas.errors import SettingsError


def random_network(**changes):
    torch.manual_seed(1)
    network = MSDNet(**{"inputs": 1, "outputs": 2, "width": 3, "dilations": (1, 2, 4), **changes})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.3)
    return network.eval()


def test_shipped_configuration_keeps_its_budget():
    shipped = ColumnTraining()
    network = MSDNet(inputs=1, outputs=2, width=shipped.width, dilations=shipped.dilations)
    assert network.macs_per_pixel <= 13_000
    assert network.receptive_radius <= 56
    assert network.maps == 1 + shipped.width * len(shipped.dilations)


def test_buffered_inference_equals_the_concatenating_definition():
    network = random_network()
    images = torch.randn(2, 1, 20, 24)
    defined = network(images)
    assert defined.requires_grad
    with torch.no_grad():
        assert torch.allclose(network(images), defined.detach(), atol=1e-5)


def test_a_layer_sees_all_earlier_maps_as_a_slow_loop_says():
    network = random_network(width=1, dilations=(1, 2))
    image = torch.randn(1, 1, 9, 9)
    maps = [image[0, 0].numpy().astype(np.float64)]
    for layer, dilation in zip(network.layers, (1, 2), strict=True):
        weight, out = layer.weight.detach().numpy(), np.full((9, 9), layer.bias.item())
        for y, x, m, i, j in np.ndindex(9, 9, len(maps), 3, 3):
            py, px = y + (i - 1) * dilation, x + (j - 1) * dilation
            if 0 <= py < 9 and 0 <= px < 9:
                out[y, x] += weight[0, m, i, j] * maps[m][py, px]
        maps.append(np.maximum(out, 0))
    last = network.last.weight.detach().numpy()[:, :, 0, 0] @ np.stack(maps).reshape(3, -1)
    expected = last.reshape(2, 9, 9) + network.last.bias.detach().numpy()[:, None, None]
    with torch.no_grad():
        assert np.allclose(network(image)[0].numpy(), expected, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_receptive_radius_is_exactly_how_far_an_input_reaches(dilations):
    network = random_network(dilations=tuple(dilations))
    with torch.no_grad():
        for layer in network.layers:
            layer.weight.abs_()
            layer.bias.fill_(1.0)
        network.last.weight.abs_()
        radius = network.receptive_radius
        image = torch.zeros(1, 1, 4 * radius + 5, 4 * radius + 5)
        middle = 2 * radius + 2
        plain = network(image)
        image[..., middle, middle] = 1.0
        changed = (network(image) - plain)[0, 0].abs() > 0
    rows = torch.nonzero(changed.any(1)).ravel() - middle
    assert (int(rows.min()), int(rows.max())) == (-radius, radius)


def test_weights_travel_through_a_file(tmp_path):
    network = random_network()
    save_weights(network, tmp_path / "n.safetensors", {"sampling": 0.2})
    loaded = load_weights(tmp_path / "n.safetensors")
    assert loaded.metadata["sampling"] == 0.2
    with torch.no_grad():
        image = torch.randn(1, 1, 16, 16)
        assert torch.equal(loaded.module(image), network(image))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="width 0"):
        MSDNet(inputs=1, outputs=2, width=0, dilations=(1,))
    with pytest.raises(SettingsError, match="no_such_weights"):
        load_weights("no_such_weights")
