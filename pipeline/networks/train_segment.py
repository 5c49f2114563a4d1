"""Train the network that finds atomic columns, on simulated images alone."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.networks.msdnet import MSDNet
from pipeline.networks.segment_data import Example, degrade, examples_of, network_input, random_spec

Report = Callable[[str], None]
MEMORY = 0.99  # of the running mean over steps whose weights are kept
RARE = -3.0  # first logit of a column: few pixels belong to one


@dataclass(frozen=True)
class Training:
    """How to train. sampling [Å/px] is that of the network; edge and crop in pixels; everything follows from seed."""

    seed: int
    scenes: int
    steps: int
    batch: int
    sampling: float
    edge: int
    crop: int
    width: int
    dilations: tuple[int, ...]
    rate: float


# What the shipped weights were trained with.
SHIPPED = Training(
    seed=20,
    scenes=1100,
    steps=2600,
    batch=8,
    sampling=0.2,
    edge=224,
    crop=144,
    width=8,
    dilations=(1, 2, 4, 8, 6, 2),
    rate=3e-3,
)


def simulate(training: Training, report: Report) -> list[Example]:
    """The images to train on."""
    found: list[Example] = []
    for index in range(training.scenes):
        rng = np.random.default_rng([training.seed, 7, index])
        spec = random_spec(rng, edge=training.edge, sampling=training.sampling)
        found += examples_of(spec, rng, sampling=training.sampling, views=3)
        if index % 100 == 99:
            report(f"simulated {index + 1} of {training.scenes} specimens, {len(found)} images")
    return found


def train(
    examples: list[Example],
    training: Training,
    report: Report,
    *,
    start: MSDNet | None = None,
    keep: Callable[[MSDNet, int], None] | None = None,
) -> MSDNet:
    """A network trained for a fixed number of steps; the same input gives the same weights on one machine.

    It begins with the weights of `start`, if there are any.
    What is returned, and given to `keep` after every 200 steps, is the running mean of the weights.
    """
    torch.manual_seed(training.seed)
    network = MSDNet(inputs=1, outputs=2, width=training.width, dilations=training.dilations)
    with torch.no_grad():
        cast(Tensor, network.last.bias).copy_(torch.tensor([RARE, 0.0]))
    if start is not None:
        network.load_state_dict(start.state_dict())
    average = copy.deepcopy(network).requires_grad_(False).eval()
    optimiser = torch.optim.Adam(network.parameters(), lr=training.rate)
    rng = np.random.default_rng([training.seed, 8])
    smooth_loss, started = 0.0, time.monotonic()
    for step in range(training.steps):
        for group in optimiser.param_groups:
            group["lr"] = training.rate * _schedule(step / training.steps)
        parts = [_sample(examples[int(rng.integers(len(examples)))], rng, training) for _ in range(training.batch)]
        images, targets, weights = (torch.stack(items) for items in zip(*parts, strict=True))
        loss = _loss(network(images), targets, weights, network.receptive_radius // 2)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        _follow(average, network, min(MEMORY, step / (step + 10)))
        smooth_loss += (float(loss.detach()) - smooth_loss) / min(step + 1, 100)
        if step % 100 == 99:
            report(f"step {step + 1} of {training.steps}: loss {smooth_loss:.4f}, {time.monotonic() - started:.0f} s")
        if keep is not None and step % 200 == 199:
            keep(average, step + 1)
    return average.requires_grad_(True)


def _follow(average: MSDNet, network: MSDNet, memory: float) -> None:
    with torch.no_grad():
        for mean, weight in zip(average.parameters(), network.parameters(), strict=True):
            mean.lerp_(weight, 1 - memory)


def metadata(training: Training, examples: int) -> dict[str, object]:
    """What the file of weights says about itself."""
    return {
        "sampling": training.sampling,
        "training": asdict(training) | {"images": examples},
        "outputs": ["column probability", "atoms are bright in this image"],
        "licence": "GPL-3.0-or-later",
    }


def _schedule(share: float) -> float:
    """A short warm-up, then a cosine to zero."""
    return min(share / 0.02, 1.0) * 0.5 * (1 + math.cos(math.pi * share))


def _sample(example: Example, rng: np.random.Generator, training: Training) -> tuple[Tensor, Tensor, Tensor]:
    """Input (1, y, x), targets (2, y, x) and weights (2, y, x) of one random crop of one degraded image."""
    degraded = degrade(example.image, rng, mode=example.mode)
    prepared = network_input(degraded, sampling=training.sampling, gain=float(10 ** rng.uniform(-0.25, 0.5)))
    room = training.edge - training.crop + 1
    top, left = (int(v) for v in rng.integers(0, room, 2))
    part = (slice(top, top + training.crop), slice(left, left + training.crop))
    own = example.polarity or int(rng.choice([-1, 1]))
    shown = own if rng.random() < 0.65 or not example.polarity else -own
    right = torch.tensor(float(shown == own))
    target = torch.from_numpy(example.target[part].astype(np.float32))
    known = torch.from_numpy(example.known[part].astype(np.float32))
    crystal = torch.from_numpy(example.crystal[part].astype(np.float32))
    polarity = crystal * right + (1 - crystal) * 0.5
    targets = torch.stack([target, polarity])
    weights = torch.stack([known * right * (1 + target), 0.15 + 0.15 * crystal])
    return _turned(prepared[part][None] * shown, targets, weights, rng)


def _turned(*tensors: Tensor | np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    *images, rng = tensors
    turns, flip = int(rng.integers(4)), bool(rng.integers(2))  # type: ignore[union-attr]
    out = [torch.rot90(image, turns, (1, 2)) for image in images]  # type: ignore[arg-type]
    first, second, third = [image.flip(2) if flip else image for image in out]
    return first, second, third


def _loss(logits: Tensor, targets: Tensor, weights: Tensor, border: int) -> Tensor:
    """Weighted cross entropy where the outermost border of the crop has no say."""
    inner = (..., slice(border, -border), slice(border, -border))
    loss = functional.binary_cross_entropy_with_logits(logits[inner], targets[inner], reduction="none")
    return (
        (loss * weights[inner])
        .sum(dim=(0, 2, 3))
        .div(weights[inner].sum(dim=(0, 2, 3)) + 1)
        .mul(loss.new_tensor([1.0, 0.35]))
        .sum()
    )
