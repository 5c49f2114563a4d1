"""A blind-spot network over neighbouring frames at half resolution, blind to its own 2 x 2 pixels by construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

# Contrast that, at high dose, becomes an input of one; at low dose the noise does (see `scale_of`).
_CONTRAST = 0.2


def scale_of(level: Tensor) -> Tensor:
    """Electrons that make one unit at the input: the noise at low dose, a fifth of the mean at high dose, (batch,)."""
    mean, variance = level.float().unbind(-1)
    return torch.sqrt(variance + (_CONTRAST * mean) ** 2)


class MaskedConv(nn.Conv2d):
    """A 3 x 3 convolution that cannot see the centre of its kernel in the channels [start, stop)."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, *, start: int, stop: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        mask = torch.ones(1, inputs, 3, 3)
        mask[:, start:stop, 1, 1] = 0
        self.register_buffer("mask", mask, persistent=False)
        with torch.no_grad():
            self.weight.mul_(mask)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the centre weights held at zero."""
        return functional.conv2d(input, self.weight * self.mask, self.bias, padding=1)


class BlindSpot(nn.Module):
    """Estimate a frame from its neighbours in time and space without looking at the pixel that is estimated.

    Four pixels become four channels of one half-resolution pixel q. The first convolution sees every frame but, in the
    centre frame, not q itself; what it sees there lies an odd number of steps away along y or x. All later
    convolutions have even dilation, so no path leads back to q: the 2 x 2 pixels of q are blind.
    `frames` is odd (neighbours -r … r); `channels` must be a multiple of 16, because torch's bfloat16 gradients of
    dilated convolutions are otherwise NaN on CPUs.
    """

    periodic = False

    def __init__(self, *, frames: int, channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        if frames < 1 or frames % 2 == 0:
            raise ValueError(f"frames is {frames}; expected an odd number")
        if channels < 16 or channels % 16:
            raise ValueError(f"channels is {channels}; expected a multiple of 16")
        if any(d < 2 or d % 2 for d in dilations):
            raise ValueError(f"dilations are {tuple(dilations)}; expected even numbers, or the network is not blind")
        self.config = {"frames": frames, "channels": channels, "dilations": list(dilations)}
        radius = frames // 2
        self.offsets = tuple(range(-radius, radius + 1))
        # In full-resolution pixels: half-resolution steps, times two, and one for the phase within the 2 x 2 block.
        self.receptive_radius = 2 * (1 + sum(dilations)) + 1
        self.first = MaskedConv(4 * frames, channels, start=4 * radius, stop=4 * radius + 4)
        self.missing = nn.Conv2d(frames, channels, 1, bias=False)
        self.body = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=d, dilation=d) for d in dilations)
        self.mix = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.last = nn.Conv2d(channels, 4, 1)
        gains = nn.Linear(16, 2 * channels * (1 + len(dilations)))
        self.dose = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), gains)
        with torch.no_grad():
            self.missing.weight.zero_()
            self.last.weight.mul_(0.3)
            gains.weight.mul_(0.1)
            gains.bias.zero_()

    @property
    def macs_per_pixel(self) -> float:
        """Multiply-accumulate operations of inference per pixel of a frame."""
        convolutions = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        return sum(m.weight.numel() for m in convolutions) / 4

    def forward(self, frames: Tensor, valid: Tensor, level: Tensor) -> Tensor:
        """Estimate the centre frame, (batch, y, x) [electrons].

        frames (batch, slot, y, x) [electrons], slots in the order of `offsets`; valid (batch, slot, y, x), 1 where a
        slot holds data and 0 where it does not; level (batch, 2): mean and noise variance of the movie [electrons].
        """
        height, width = frames.shape[-2:]
        scale = scale_of(level)[:, None, None]
        mean = level[:, 0].float()[:, None, None]
        valid = valid.to(frames.dtype)
        x = (frames - mean[:, None]) / scale[:, None] * valid
        # An odd edge is repeated inside its own 2 x 2 block, which is blind as a whole; reflecting it would leak.
        odd = (0, width % 2, 0, height % 2)
        if any(odd):
            x, valid = functional.pad(x, odd, mode="replicate"), functional.pad(valid, odd, mode="replicate")
        y = self._half(functional.pixel_unshuffle(x, 2), 1 - functional.avg_pool2d(valid, 2), level)
        y = functional.pixel_shuffle(y, 2)[:, 0, :height, :width]
        return mean + scale * y

    def _half(self, x: Tensor, missing: Tensor, level: Tensor) -> Tensor:
        """The network proper: (batch, 4 slots, y/2, x/2) to (batch, 4, y/2, x/2), both in units of `scale_of`."""
        with torch.autocast(x.device.type, enabled=False):
            mean, variance = level.float().unbind(-1)
            signal = torch.log10(mean.clamp_min(1e-6) ** 2 / variance.clamp_min(1e-9)).clamp(-2, 3)
            gains = self.dose(torch.stack([signal, signal**2 / 3], -1))[..., None, None].chunk(
                2 * len(self.body) + 2, 1
            )
        x, missing = (a.contiguous(memory_format=torch.channels_last) for a in (x, missing))
        h = self.first(x) + self.missing(missing)
        h = torch.addcmul(h + gains[1].to(h.dtype), h, gains[0].to(h.dtype))
        for i, convolution in enumerate(self.body, start=1):
            g = convolution(functional.leaky_relu(h, 0.1))
            h = h + torch.addcmul(g + gains[2 * i + 1].to(g.dtype), g, gains[2 * i].to(g.dtype))
        for convolution in self.mix:
            h = functional.leaky_relu(convolution(functional.leaky_relu(h, 0.1)), 0.1)
        # The last sum in float32: a result of eight significant bits would band smooth regions at high dose.
        with torch.autocast(x.device.type, enabled=False):
            return cast(Tensor, self.last(h.float()))
