"""A small encoder and decoder without skips, as one of the networks that Horwath et al. compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional

from pipeline.networks.unet import reach_of_levels


class EncoderDecoder(nn.Module):
    """After Horwath et al., npj Comput. Mater. 6, 108 (2020): few layers, large kernels first, no skips.

    Input (batch, inputs, y, x) of any size, output (batch, outputs, y, x) without a final non-linearity. For each of
    `features` a convolution with the edge of its `kernels`, ReLU, batch normalisation, and maxima of 2 × 2 pixels; then
    the same in reverse, pixels being doubled before each convolution. Kernels of even edge see one pixel more after
    than before. What it says of a pixel depends on where that lies among the blocks of `alignment` pixels.
    """

    def __init__(
        self, *, inputs: int, outputs: int, features: Sequence[int] = (2, 8, 16), kernels: Sequence[int] = (20, 10, 3)
    ) -> None:
        super().__init__()
        if not features or len(features) != len(kernels) or min(inputs, outputs, *features, *kernels) < 1:
            raise ValueError(
                f"inputs {inputs}, outputs {outputs}, features {list(features)}, kernels {list(kernels)}; expected at "
                "least 1 of each, and a kernel for each number of features"
            )
        self.config: dict[str, Any] = {
            "inputs": inputs,
            "outputs": outputs,
            "features": list(features),
            "kernels": list(kernels),
        }
        down = zip([inputs, *features], features, kernels, strict=False)
        up = list(zip(features[1:], features, kernels[1:], strict=False))[::-1]
        self.encoder = nn.ModuleList(_layer(a, b, k) for a, b, k in down)
        self.decoder = nn.ModuleList(
            [*(_layer(deep, wide, k) for deep, wide, k in up), _layer(features[0], features[0], kernels[0])]
        )
        self.last = nn.Conv2d(features[0], outputs, 1)

    @property
    def alignment(self) -> int:
        """Edge [px] of the blocks that become one pixel at the lowest level."""
        return int(2 ** len(self.config["features"]))

    @property
    def receptive_radius(self) -> int:
        """How many pixels away, along y or x, an input can still change an output."""
        reaches = [kernel // 2 for kernel in self.config["kernels"]]
        return max(reach_of_levels(place, [*reaches, 0]) for place in range(self.alignment))

    @property
    def macs_per_pixel(self) -> float:
        """Multiplications for one output pixel."""
        levels = len(self.config["features"])
        total = float(self.last.weight.numel())
        for level, (down, up) in enumerate(zip(self.encoder, reversed(self.decoder), strict=True)):
            both = sum(part.weight.numel() for m in (down, up) for part in m.modules() if isinstance(part, nn.Conv2d))
            total += both / 4**level if level < levels else 0.0
        return total

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images, both as the class describes them; sizes are filled up with zeros below and to the right."""
        height, width = images.shape[-2:]
        features = functional.pad(images, (0, -width % self.alignment, 0, -height % self.alignment))
        for layer in self.encoder:
            features = functional.max_pool2d(layer(features), 2)
        for layer in self.decoder:
            features = layer(functional.interpolate(features, scale_factor=2, mode="nearest"))
        return cast(Tensor, self.last(features)[..., :height, :width])


def _layer(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    before = (kernel - 1) // 2
    pad = nn.ZeroPad2d((before, kernel - 1 - before, before, kernel - 1 - before))
    return nn.Sequential(pad, nn.Conv2d(inputs, outputs, kernel), nn.ReLU(), nn.BatchNorm2d(outputs))
