"""The plain alternative to a trained denoiser: the mean of a frame's neighbours behind a Wiener filter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class NeighbourWiener(nn.Module):
    """Estimate a frame as the mean of its neighbours, filtered by `kernel`; blind, since the frame has no part in it.

    The filter is that of `pipeline.networks.adapt.wiener_kernel`, from the movie's own spectrum; on a movie without any
    structure it is zero and the estimate a constant. `frames` is odd, `context` the reach of the kernel [px].
    """

    periodic = False
    receptive_radius = 0
    macs_per_pixel = 0.0  # the filter is a product in Fourier space
    kernel: Tensor

    def __init__(self, *, frames: int, context: int) -> None:
        super().__init__()
        if frames < 3 or frames % 2 == 0 or context < 1:
            raise ValueError(f"frames is {frames}, context {context}; expected an odd number from 3 on, and at least 1")
        self.config: dict[str, Any] = {"frames": frames, "context": context}
        self.context_radius = context
        self.offsets = tuple(range(-(frames // 2), frames // 2 + 1))
        self.register_buffer("kernel", torch.zeros(2 * context + 1, 2 * context + 1))

    def forward(self, frames: Tensor, valid: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """The centre frame (batch, y, x) [electrons], of `context` (batch, y, x) [electrons about the mean] alone."""
        if context is None:
            return torch.full_like(frames[:, 0], float(level[0]))
        return level[0] + context
