from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.networks import train_segment
from pipeline.networks.msdnet import MSDNet
from pipeline.networks.segment_data import Example, degrade, examples_of, labelled, nearest, random_spec
from pipeline.networks.weights import load_weights, save_weights
from pipeline.simulate.movie import MovieSpec, simulate_movie
from pipeline.simulate.scene import COLUMN_DTYPE
from schemas.errors import SettingsError


def random_network(**changes):
    torch.manual_seed(1)
    network = MSDNet(**{"inputs": 1, "outputs": 2, "width": 3, "dilations": (1, 2, 4), **changes})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.3)
    return network.eval()


def test_shipped_configuration_keeps_its_budget():
    shipped = train_segment.SHIPPED
    network = MSDNet(inputs=1, outputs=2, width=shipped.width, dilations=shipped.dilations)
    assert network.macs_per_pixel <= 10_000
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


def test_targets_mark_columns_and_leave_thin_ones_unknown():
    truth = np.zeros(2, COLUMN_DTYPE)
    truth["y"], truth["x"], truth["visible"] = (10.0, 40.0), (12.0, 44.0), (True, False)
    image = np.zeros((60, 60), np.float32)
    image[10, 12] = 1.0
    example = labelled(image, truth, 1, sampling=0.2, spec=MovieSpec(sampling=0.2))
    assert example.target[10, 12] == 1 and example.target[40, 44] == 0
    assert example.known[10, 12] and not example.known[40, 44] and example.known[25, 25]
    assert example.crystal[40, 44] and not example.crystal[25, 28]


def test_nearest_equals_brute_force():
    rng = np.random.default_rng(0)
    y, x = rng.uniform(0, 50, 6), rng.uniform(0, 40, 6)
    grid = np.stack(np.mgrid[:50, :40], -1).reshape(-1, 1, 2)
    slow = np.linalg.norm(grid - np.column_stack([y, x]), axis=2).min(1).reshape(50, 40)
    fast = nearest((50, 40), y, x)
    assert np.allclose(fast[slow < 19], slow[slow < 19])
    assert (fast[slow >= 19] >= 19).all()


def test_random_specimens_yield_labelled_images_with_one_sign():
    found = []
    for index in range(12):
        rng = np.random.default_rng([1, index])
        found += examples_of(random_spec(rng, edge=96, sampling=0.2), rng, sampling=0.2, views=2)
    assert {example.polarity for example in found} >= {-1, 1}
    for example in found:
        assert example.image.shape == example.target.shape == (96, 96)
        if example.polarity and example.target.max() > 0.9:
            at, away = example.target > 0.9, (example.target < 0.05) & example.crystal
            assert example.polarity * (example.image[at].mean() - example.image[away].mean()) > 0


def test_degraded_images_keep_their_mean_and_shape():
    image = np.ones((64, 64), np.float32)
    rng = np.random.default_rng(3)
    made = [degrade(image, rng, mode="hrtem") for _ in range(20)]
    assert all(m.shape == image.shape and abs(m.mean() - 1) < 0.1 for m in made)
    assert 0.001 < np.median([m.std() for m in made]) < 0.2


def test_training_learns_and_is_repeatable():
    movie = simulate_movie(MovieSpec(kind="mos2", mode="haadf", shape=(96, 96), frames=1, sampling=0.2), 1)
    example = labelled(movie.clean[0], movie.columns[0], 1, sampling=0.2, spec=movie.spec)
    assert isinstance(example, Example)
    training = train_segment.Training(
        seed=3, scenes=0, steps=60, batch=2, sampling=0.2, edge=96, crop=64, width=4, dilations=(1, 2, 2), rate=2e-2
    )
    lines: list[str] = []
    networks = [train_segment.train([example], training, lines.append) for _ in range(2)]
    for one, two in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(one, two)
    with torch.no_grad():
        flat = torch.from_numpy((movie.clean[0] - 1) / movie.clean[0].std())[None, None]
        probability = torch.sigmoid(networks[0](flat))[0, 0, 10:-10, 10:-10].numpy()
    target = example.target[10:-10, 10:-10]
    assert probability[target > 0.9].mean() > probability[target < 0.05].mean() + 0.2
