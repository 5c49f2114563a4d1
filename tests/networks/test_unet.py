from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.networks.encoder_decoder import EncoderDecoder
from pipeline.networks.unet import UNet
from pipeline.networks.weights import load_weights, save_weights

NETWORKS = {
    "unet": lambda: UNet(inputs=1, outputs=2, features=(3, 4, 5)),
    "deep unet": lambda: UNet(inputs=2, outputs=1, features=(2, 3, 3, 3), convolutions=1),
    "normalised unet": lambda: UNet(inputs=1, outputs=1, features=(3, 4), normalise=True),
    "flat unet": lambda: UNet(inputs=1, outputs=1, features=(3,)),
    "encoder-decoder": lambda: EncoderDecoder(inputs=1, outputs=1, features=(2, 3, 4), kernels=(6, 5, 3)),
    "even kernels": lambda: EncoderDecoder(inputs=1, outputs=1, features=(2, 2), kernels=(4, 2)),
}


def made(name, *, positive=False):
    torch.manual_seed(2)
    network = NETWORKS[name]()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.weight.normal_(0, 0.3)
                if positive:
                    module.weight.abs_().add_(0.1)
                    module.bias.fill_(0.5)
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_any_size_goes_in_and_comes_out(name):
    network = made(name)
    with torch.no_grad():
        for shape in ((16, 16), (17, 30), (5, 41)):
            images = torch.randn(2, network.config["inputs"], *shape)
            assert network(images).shape == (2, network.config["outputs"], *shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_receptive_radius_is_the_furthest_that_an_input_reaches(name):
    """With positive weights every connection shows; the radius is reached for some place among the blocks."""
    network = made(name, positive=True)
    radius, block = network.receptive_radius, network.alignment
    edge = -(-(2 * radius + 4 * block) // block) * block
    furthest = 0
    with torch.no_grad():
        plain = network(torch.zeros(1, network.config["inputs"], edge, edge))
        for place in range(edge // 2 // block * block, edge // 2 // block * block + block):
            image = torch.zeros(1, network.config["inputs"], edge, edge)
            image[..., place, place] = 50.0
            rows = torch.nonzero((network(image) - plain)[0, 0].abs().amax(1) > 1e-6).ravel() - place
            furthest = max(furthest, int(rows.abs().max()))
    assert furthest == radius


@pytest.mark.parametrize("name", ["unet", "deep unet", "encoder-decoder", "even kernels"])
def test_multiplications_are_counted_as_torch_counts_them(name):
    network = made(name)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.zeros(1, network.config["inputs"], 64, 64))
    assert network.macs_per_pixel == pytest.approx(counter.get_total_flops() / 2 / 64**2)


@pytest.mark.parametrize("name", NETWORKS)
def test_moving_by_a_whole_block_moves_the_answer(name):
    network = made(name)
    block, radius = network.alignment, network.receptive_radius
    edge = (2 * radius // block + 6) * block
    image = torch.randn(1, network.config["inputs"], edge, edge)
    with torch.no_grad():
        whole, moved = network(image), network(image[..., block:, block:])
    inner = slice(radius, edge - block - radius)
    assert torch.allclose(moved[..., inner, inner], whole[..., block:, block:][..., inner, inner], atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_travel_through_a_file(name, tmp_path):
    network = made(name)
    save_weights(network, tmp_path / "n.safetensors", {})
    image = torch.randn(1, network.config["inputs"], 24, 24)
    with torch.no_grad():
        assert torch.equal(load_weights(tmp_path / "n.safetensors").module(image), network(image))


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"features \[\], convolutions 2; expected at least 1"):
        UNet(inputs=1, outputs=1, features=())
    with pytest.raises(ValueError, match=r"kernels \[3\]; expected at least 1 of each, and a kernel for each"):
        EncoderDecoder(inputs=1, outputs=1, features=(2, 2), kernels=(3,))
