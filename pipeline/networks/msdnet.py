"""A mixed-scale dense network: every layer sees all earlier ones through a dilated 3 × 3 convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.networks.msd_maps import Layers, feature_maps, logits


class MSDNet(nn.Module):
    """Pelt & Sethian, PNAS 115, 254 (2018), with several channels per layer and one dilation for each layer.

    Input (batch, inputs, y, x), output (batch, outputs, y, x) without a final non-linearity; borders see zeros, so
    outputs closer to a border than `receptive_radius` differ from those of a larger image.
    All feature maps live in one buffer that is allocated once per call; nothing is concatenated (see `msd_maps`).
    """

    def __init__(self, *, inputs: int, outputs: int, width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        if min(inputs, outputs, width, *dilations) < 1:
            raise ValueError(
                f"inputs {inputs}, outputs {outputs}, width {width}, dilations {list(dilations)}; expected at least 1"
            )
        self.config: dict[str, Any] = {
            "inputs": inputs,
            "outputs": outputs,
            "width": width,
            "dilations": list(dilations),
        }
        self.layers = nn.ModuleList(
            nn.Conv2d(inputs + width * i, width, 3, padding=dilation, dilation=dilation)
            for i, dilation in enumerate(dilations)
        )
        self.last = nn.Conv2d(inputs + width * len(dilations), outputs, 1)
        self._initialise(self.last.in_channels)

    def _initialise(self, channels: int) -> None:
        # As in the authors' code: each weight counts for all maps of the network, since all feed what comes later.
        deviation = (2.0 / (9 * channels)) ** 0.5 * 2.0
        for layer in self.layers:
            nn.init.normal_(layer.weight, 0.0, deviation)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    @property
    def receptive_radius(self) -> int:
        """How many pixels away, along y or x, an input can still change an output."""
        return int(sum(self.config["dilations"]))

    @property
    def macs_per_pixel(self) -> int:
        """Multiplications for one output pixel."""
        return sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Conv2d))

    @property
    def maps(self) -> int:
        """Channels of the buffer: the input and every feature map."""
        return int(self.last.in_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images, both as the class describes them."""
        layers = Layers(
            [cast(Tensor, layer.weight) for layer in self.layers],
            [cast(Tensor, layer.bias) for layer in self.layers],
            self.config["dilations"],
        )
        if torch.is_grad_enabled():
            return self.last(feature_maps(images, layers))  # type: ignore[no-any-return]
        return logits(images, layers, self.last.weight, cast(Tensor, self.last.bias))
