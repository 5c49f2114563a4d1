"""A U-Net: encoder and decoder with skips at every level; here for comparison with the mixed-scale dense network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class UNet(nn.Module):
    """Ronneberger et al., MICCAI 2015, padded, with as many levels as there are `features`.

    Input (batch, inputs, y, x) of any size, output (batch, outputs, y, x) without a final non-linearity. Each level is
    `convolutions` 3 × 3 convolutions with ReLU (and batch normalisation where `normalise`); the way down is by maxima
    of 2 × 2 pixels, the way up by transposed convolutions. What it says of a pixel depends on where that lies among the
    blocks of `alignment` × `alignment` pixels: windows must start at multiples of it.
    """

    def __init__(
        self, *, inputs: int, outputs: int, features: Sequence[int], convolutions: int = 2, normalise: bool = False
    ) -> None:
        super().__init__()
        if not features or min(inputs, outputs, convolutions, *features) < 1:
            raise ValueError(
                f"inputs {inputs}, outputs {outputs}, features {list(features)}, convolutions {convolutions}; "
                "expected at least 1 of each"
            )
        self.config: dict[str, Any] = {
            "inputs": inputs,
            "outputs": outputs,
            "features": list(features),
            "convolutions": convolutions,
            "normalise": normalise,
        }
        into = [inputs, *features]
        self.down = nn.ModuleList(_block(a, b, convolutions, normalise) for a, b in zip(into, features, strict=False))
        pairs = list(pairwise(features))[::-1]
        self.lift = nn.ModuleList(nn.ConvTranspose2d(deep, wide, 2, stride=2) for wide, deep in pairs)
        self.up = nn.ModuleList(_block(2 * wide, wide, convolutions, normalise) for wide, _ in pairs)
        self.last = nn.Conv2d(features[0], outputs, 1)

    @property
    def alignment(self) -> int:
        """Edge [px] of the blocks that become one pixel at the lowest level."""
        return int(2 ** (len(self.config["features"]) - 1))

    @property
    def receptive_radius(self) -> int:
        """How many pixels away, along y or x, an input can still change an output."""
        levels, reach = len(self.config["features"]), self.config["convolutions"]
        return max(reach_of_levels(place, [reach] * levels) for place in range(self.alignment))

    @property
    def macs_per_pixel(self) -> float:
        """Multiplications for one output pixel."""
        levels = len(self.config["features"])
        total = float(self.last.weight.numel())
        for level, block in enumerate(self.down):
            total += _weights(block) / 4**level
        for index, (lift, block) in enumerate(zip(self.lift, self.up, strict=True)):
            level = levels - 2 - index
            total += _weights(lift) / 4 ** (level + 1) + _weights(block) / 4**level
        return total

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images, both as the class describes them; sizes are filled up with zeros below and to the right."""
        height, width = images.shape[-2:]
        features = functional.pad(images, (0, -width % self.alignment, 0, -height % self.alignment))
        kept = []
        for index, block in enumerate(self.down):
            features = block(functional.max_pool2d(features, 2) if index else features)
            kept.append(features)
        for lift, block, wide in zip(self.lift, self.up, kept[-2::-1], strict=True):
            features = block(torch.cat([wide, lift(features)], dim=1))
        return cast(Tensor, self.last(features)[..., :height, :width])


def _block(inputs: int, outputs: int, convolutions: int, normalise: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(convolutions):
        layers.append(nn.Conv2d(outputs if index else inputs, outputs, 3, padding=1))
        layers += [nn.ReLU(), nn.BatchNorm2d(outputs)] if normalise else [nn.ReLU()]
    return nn.Sequential(*layers)


def _weights(module: nn.Module) -> int:
    """Weights of all convolutions in a module."""
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, kinds))


def reach_of_levels(place: int, reaches: Sequence[int], *, up: Sequence[int] | None = None) -> int:
    """How far from output pixel `place` an input can lie, in a network that halves and doubles its pixels.

    reaches: pixels that the convolutions of each level see to either side on the way down, the last level being the
    lowest; `up`: on the way up, where it differs (one value for each level but the lowest).
    """
    low = high = place
    for reach in reaches[:-1] if up is None else up:
        low, high = (low - reach) // 2, (high + reach) // 2
    low, high = low - reaches[-1], high + reaches[-1]
    for reach in reversed(reaches[:-1]):
        low, high = 2 * low - reach, 2 * high + 1 + reach
    return max(place - low, high - place)
