"""How fast networks are: those that segment beside plain ones and a U-Net, denoisers beside the machine's limits."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.networks.adapt import untrained
from pipeline.networks.blindspot import AROUND, TIERS
from pipeline.networks.encoder_decoder import EncoderDecoder
from pipeline.networks.msdnet import MSDNet
from pipeline.networks.unet import UNet
from pipeline.networks.wcvd import RELEASED
from pipeline.networks.weights import SHIPPED, denoiser_of, load_weights
from pipeline.steps.denoise import DType, denoise, has_bfloat16, reduced_precision
from pipeline.steps.gpu import Graphs
from pipeline.steps.neighbours import FrameLinks, measure_level
from schemas.settings import Denoise

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


@dataclass(frozen=True)
class DenoiserSpeed:
    """Seconds for one frame, neighbours and all, and multiplications of the network for a pixel."""

    name: str
    dtype: str
    macs_per_pixel: float
    seconds: float


def measure_denoisers(edge: int, *, device: str, repeats: int) -> Iterator[DenoiserSpeed]:
    """Every tier and WCVD on the middle one of as many frames as the context takes, of `edge` × `edge` px, one thread,
    tiles as by default.

    The last tier once more with parts of the view followed (`denoise.motion`).
    """
    options = Denoise()
    frames = np.random.default_rng(0).poisson(1.0, (AROUND, edge, edge)).astype(np.float32)
    links = FrameLinks(np.zeros((AROUND, 2), np.int64), np.ones(AROUND, bool), np.zeros(AROUND, np.int64))
    level = measure_level(frames, readout_variance=0.0)
    kept = torch.from_numpy(frames).to(device)
    found: dict[str, Any] = {tier: load_weights(denoiser_of(tier)).module for tier in TIERS}
    found["large, parts followed"] = _following(found["large"])
    found["WCVD"] = untrained("wcvd", RELEASED, seed=0)
    for name, network in found.items():
        dtypes: tuple[DType, ...] = ("float32", "bfloat16") if has_bfloat16(device) else ("float32",)
        for dtype in dtypes:
            run = partial(
                denoise, network.to(device).eval(), kept, [AROUND // 2], links=links, level=level, tile=options.tile,
                dtype=dtype, device=device,
            )  # fmt: skip
            run()
            yield DenoiserSpeed(name, dtype, network.macs_per_pixel, _shortest(run, device, repeats))


def measure_throughput(edge: int, *, device: str, frames: int, repeats: int) -> Iterator[DenoiserSpeed]:
    """Every tier, seconds per frame of `edge` × `edge` px: the network alone on a batch of `frames`, on a GPU also
    compiled into a CUDA graph, and from frames in host memory to denoised ones there, parts followed."""
    options = Denoise()
    dtype: DType = "bfloat16" if has_bfloat16(device) else "float32"
    counts = np.random.default_rng(0).poisson(1.0, (frames, edge, edge)).astype(np.float32)
    links = FrameLinks(np.zeros((frames, 2), np.int64), np.ones(frames, bool), np.zeros(frames, np.int64))
    level = measure_level(counts, readout_variance=0.0)
    levels = torch.tensor(level, dtype=torch.float32, device=device)
    for tier in TIERS:
        network: Any = load_weights(denoiser_of(tier)).module.to(device).eval()
        around = torch.from_numpy(counts).to(device)[:, None].repeat(1, len(network.offsets), 1, 1)
        parts = around, torch.ones_like(around, dtype=torch.bool), levels, torch.zeros_like(around[:, :1])
        forms = {"in a batch": network}
        if device == "cuda":
            forms["in a batch, compiled"] = torch.compile(network, mode="reduce-overhead")
        with torch.inference_mode(), reduced_precision(device, dtype):
            for words, form in forms.items():
                for _ in range(3):  # compilation and the capture of its graph
                    form(*parts)
                seconds = _shortest(partial(form, *parts), device, repeats) / frames
                yield DenoiserSpeed(f"{tier}, {words} of {frames}", dtype, network.macs_per_pixel, seconds)
        following = _following(network)
        ways = {"": following} | ({", captured": Graphs(following)} if device == "cuda" else {})
        for words, way in ways.items():
            run = partial(
                denoise, way, counts, range(frames), links=links, level=level, tile=options.tile, dtype=dtype,
                device=device,
            )  # fmt: skip
            seconds = _shortest(run, device, repeats) / frames
            yield DenoiserSpeed(f"{tier}, from and to host memory{words}", dtype, network.macs_per_pixel, seconds)


def _following(network: nn.Module) -> Any:
    """The network, told that parts of its movie move on their own."""
    found: Any = copy.deepcopy(network)
    found.motion = (0.3, 0.15)
    return found


def _lively(network: nn.Module) -> nn.Module:
    """An untrained network whose last layer is all zero, made to say something."""
    last: Any = network.last
    if not bool(last.weight.any()):
        nn.init.normal_(last.weight, 0.0, last.in_channels**-0.5)
    return network


def _shortest(function: Callable[[], object], device: str, repeats: int) -> float:
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
