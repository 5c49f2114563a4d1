"""The mean of a frame's neighbours behind a Wiener filter: what a denoiser is told, or its plain alternative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from pipeline.steps.denoise import Level

# The smoothing of the spectrum [frequency steps of the frame].
SMOOTHING = 1.25
# Scatter of the smoothed spectrum above the noise from which on it is signal.
CLEARLY = 6.0


class NeighbourWiener(nn.Module):
    """Estimate a frame as the mean of its neighbours, filtered by `kernel`; blind, since the frame has no part in it.

    The filter is that of `wiener_kernel`, from the movie's own spectrum; on a movie without any structure it is zero
    and the estimate a constant. `frames` is odd, `context` the reach of the kernel [px]; `motion` as
    for a BlindSpot.
    """

    periodic = False
    receptive_radius = 0
    macs_per_pixel = 0.0  # the filter is a product in Fourier space
    kernel: Tensor

    def __init__(self, *, frames: int, context: int, motion: Sequence[float] = ()) -> None:
        super().__init__()
        if frames < 3 or frames % 2 == 0 or context < 1:
            raise ValueError(f"frames is {frames}, context {context}; expected an odd number from 3 on, and at least 1")
        self.config: dict[str, Any] = {"frames": frames, "context": context}
        if any(motion):
            self.config["motion"] = list(motion)
        self.motion = tuple(motion)
        self.context_radius = context
        self.offsets = tuple(range(-(frames // 2), frames // 2 + 1))
        self.register_buffer("kernel", torch.zeros(2 * context + 1, 2 * context + 1))

    def forward(self, frames: Tensor, valid: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """The centre frame (batch, y, x) [electrons], of `context` (batch, y, x) [electrons about the mean] alone."""
        if context is None:
            return torch.full_like(frames[:, 0], float(level[0]))
        return level[0] + context


def wiener_kernel(frames: Tensor, good: NDArray[np.bool_], level: Level, *, neighbours: int, reach: int) -> Tensor:
    """The Wiener filter of the mean of `neighbours` frames, (2 reach + 1,) squared, tapered to its edge.

    The power of the signal is the smoothed mean periodogram of the good frames (m, y, x) [electrons] less the noise.
    """
    rows, columns = frames.shape[-2:]
    power = np.zeros((side_of(frames, reach),) * 2)
    used = np.flatnonzero(good)
    for index in used:
        power += periodogram(frames[index] - level.mean, reach=reach)
    power = smoothed(power / max(len(used), 1), (rows, columns))
    return kernel_of(power - level.variance, len(used), level, neighbours=neighbours, reach=reach)


def side_of(frames: Tensor, reach: int) -> int:
    """Edge [px] of the square in whose Fourier space filters of frames (…, y, x) are made."""
    return int(next_fast_len(max(*frames.shape[-2:], 2 * reach + 2), real=True))


def periodogram(image: Tensor, *, reach: int) -> NDArray[np.float64]:
    """Power per pixel (ky, kx) of an image (y, x), zeros around it; what is not finite counts as zero."""
    side = side_of(image, reach)
    clean = torch.nan_to_num(image, nan=0.0, posinf=0.0, neginf=0.0)
    found = torch.fft.fft2(clean, s=(side, side)).abs() ** 2
    return np.asarray(found.double().cpu().numpy() / image.numel())


def smoothed(power: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.float64]:
    """A mean periodogram of frames of `shape`, smoothed over the resolution that they have."""
    return np.asarray(gaussian_filter(power, [SMOOTHING * power.shape[0] / size for size in shape], mode="wrap"))


def kernel_of(signal: NDArray[np.float64], frames: int, level: Level, *, neighbours: int, reach: int) -> Tensor:
    """The filter for a smoothed power of the signal (ky, kx) [electrons²] that was measured on so many frames.

    Only what is clearly above the scatter of the smoothed spectrum of so many frames counts as signal.
    """
    scatter = (max(frames, 1) * 4 * np.pi * SMOOTHING**2) ** -0.5
    power = np.maximum(signal - CLEARLY * scatter * level.variance, 0)
    gain = power / (power + level.variance / neighbours)
    kernel = np.roll(np.fft.ifft2(gain).real, (reach, reach), (0, 1))[: 2 * reach + 1, : 2 * reach + 1]
    edge = np.clip(2 * np.abs(np.arange(-reach, reach + 1)) / (reach + 1) - 1, 0, 1)
    taper = np.cos(0.5 * np.pi * edge) ** 2
    return torch.from_numpy(kernel * np.outer(taper, taper)).float()
