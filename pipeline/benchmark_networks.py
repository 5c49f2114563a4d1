"""How fast the segmentation networks are, against a plain implementation of the same and against a U-Net."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.networks.encoder_decoder import EncoderDecoder
from pipeline.networks.msdnet import MSDNet
from pipeline.networks.unet import UNet
from pipeline.networks.weights import SHIPPED, load_weights

UNET = "U-Net 16-32-64"


@dataclass(frozen=True)
class Speed:
    """Seconds for one image: as we compute it, and by concatenation (NaN for networks without); the largest
    difference between both over the largest output; parameters, and multiplications for a pixel.
    """

    name: str
    device: str
    parameters: int
    macs_per_pixel: float
    seconds: float
    concatenating: float
    difference: float


def concatenating(network: MSDNet, images: Tensor) -> Tensor:
    """A mixed-scale dense network as anyone would write it."""
    maps = images
    for layer in network.layers:
        maps = torch.cat([maps, functional.relu(layer(maps))], dim=1)
    return network.last(maps)  # type: ignore[no-any-return]


def candidates() -> dict[str, Callable[[], nn.Module]]:
    """The networks to compare: the published MS-D net, all that ship, a U-Net and an encoder–decoder."""

    def published() -> nn.Module:
        return MSDNet(inputs=1, outputs=1, width=1, dilations=[i % 10 + 1 for i in range(100)])

    found: dict[str, Callable[[], nn.Module]] = {"MS-D published, 1 × 100": published}
    for path in sorted(SHIPPED.glob("*.safetensors")):
        loaded = load_weights(path)
        if isinstance(loaded.module, MSDNet):
            config = loaded.metadata["config"]
            text = f"{config['width']} × {len(config['dilations'])}"
            found[f"MS-D shipped {path.stem}, {text}"] = partial(_same, loaded.module)
    found[UNET] = lambda: UNet(inputs=1, outputs=1, features=(16, 32, 64))
    found["encoder-decoder"] = lambda: EncoderDecoder(inputs=1, outputs=1)
    return found


def _same(network: nn.Module) -> nn.Module:
    return network


def measure(edge: int, *, threads: int, device: str, repeats: int) -> Iterator[Speed]:
    """Every candidate on one image of `edge` × `edge` px; the shortest of several runs, since others only add to it."""
    with _threads(threads), torch.no_grad():
        for name, make in candidates().items():
            torch.manual_seed(0)
            network: Any = _lively(make()).to(device).eval()
            image = torch.randn(1, network.config["inputs"], edge, edge).to(device)
            plain, difference = float("nan"), float("nan")
            if isinstance(network, MSDNet):
                expected = concatenating(network, image)
                difference = float((network(image) - expected).abs().max() / expected.abs().max())
                del expected
                plain = _shortest(partial(concatenating, network, image), device, repeats)
            seconds = _shortest(partial(network, image), device, repeats)
            parameters = sum(p.numel() for p in network.parameters())
            yield Speed(name, device, parameters, network.macs_per_pixel, seconds, plain, difference)


def _lively(network: nn.Module) -> nn.Module:
    """An untrained network whose last layer is all zero, made to say something."""
    last: Any = network.last
    if not bool(last.weight.any()):
        nn.init.normal_(last.weight, 0.0, last.in_channels**-0.5)
    return network


def _shortest(function: Callable[[], Tensor], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
