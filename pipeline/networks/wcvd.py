"""WCVD, the weight-centric video denoiser of Lee, Li, Yang, Zakharov and Qu (arXiv 2512.04045), as described."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

RELEASED: dict[str, Any] = {"kernels": [3, 5, 7], "layers": 4, "channels": 3}


class CentreBlindConv(nn.Module):
    """A bias-free convolution over all frames with periodic edges, the weight of its centre voxel held at zero."""

    mask: Tensor

    def __init__(self, frames: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.padding = kernel // 2
        bound = (frames * kernel**2) ** -0.5
        self.weight = nn.Parameter(torch.empty(outputs, frames, kernel, kernel).uniform_(0, 2 * bound**2))
        mask = torch.ones(1, frames, kernel, kernel)
        mask[0, frames // 2, kernel // 2, kernel // 2] = 0
        self.register_buffer("mask", mask, persistent=False)
        with torch.no_grad():
            self.weight.mul_(mask)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frame, y, x) to (batch, output, y, x)."""
        p = self.padding
        return functional.conv2d(functional.pad(x, (p, p, p, p), mode="circular"), self.weight * self.mask)


class WCVD(nn.Module):
    """Three centre-blind sub-networks of kernels 3, 5 and 7 over three frames, mixed by a softmax.

    Each: convolution, then `layers` times (1 x 1 convolution, leaky ReLU 0.1), 1 x 1 convolution to one channel, ReLU;
    no bias and no normalisation anywhere, so f(a x) = a f(x) for a > 0. The released configuration
    (RELEASED): 867 parameters and 864 multiply-accumulates per pixel.
    Weights start positive, so that no final ReLU is born dead. Slots without data are filled with the movie's mean.
    """

    periodic = True
    context_radius = 0
    motion: tuple[float, ...] = ()
    macs_per_pixel: float

    def __init__(self, *, kernels: Sequence[int], layers: int, channels: int) -> None:
        super().__init__()
        if any(k < 3 or k % 2 == 0 for k in kernels):
            raise ValueError(f"kernels are {tuple(kernels)}; expected odd numbers from 3 on")
        self.config = {"kernels": list(kernels), "layers": layers, "channels": channels}
        self.offsets = self.around = (-1, 0, 1)
        self.receptive_radius = max(kernels) // 2
        self.branches = nn.ModuleList(self._branch(kernel, layers, channels) for kernel in kernels)
        self.mixing = nn.Parameter(torch.zeros(len(kernels)))
        self.macs_per_pixel = sum(p.numel() for p in self.branches.parameters())

    @staticmethod
    def _branch(kernel: int, layers: int, channels: int) -> nn.Sequential:
        parts: list[nn.Module] = [CentreBlindConv(3, channels, kernel)]
        for _ in range(layers):
            parts += [nn.Conv2d(channels, channels, 1, bias=False), nn.LeakyReLU(0.1)]
        parts += [nn.Conv2d(channels, 1, 1, bias=False), nn.ReLU()]
        with torch.no_grad():
            for part in parts:
                if isinstance(part, nn.Conv2d):
                    part.weight.uniform_(0, 2 / channels)
        return nn.Sequential(*parts)

    def forward(self, frames: Tensor, valid: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """Estimate the centre frame, (batch, y, x) [electrons].

        frames (batch, 3, y, x) [electrons], holding the mean where they have no data; valid (batch, 3, y, x) bool, not
        used; level (2,): mean and noise variance of the movie [electrons], of which only the mean is used; no context.
        """
        mean = level[0]
        x = frames / mean
        weights = torch.softmax(self.mixing, 0)
        y = torch.stack([w * branch(x) for w, branch in zip(weights, self.branches, strict=True)]).sum(0)
        return y[:, 0].float() * mean
