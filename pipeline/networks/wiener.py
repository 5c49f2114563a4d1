"""The mean of a frame's neighbours behind a Wiener filter: what a denoiser is told, or its plain alternative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from scipy.ndimage import gaussian_filter
from scipy.special import gammainccinv
from torch import Tensor, nn

from pipeline.networks.blindspot import offsets_around, offsets_of
from pipeline.networks.threads import side_by_side
from pipeline.steps.neighbours import DenoisingNetwork, FrameLinks, Level, local_shifts, mean_of_neighbours

# The smoothing of the spectrum [frequency steps of the frame].
SMOOTHING = 0.7
# Chance that a frequency of mere noise counts as signal: a movie has some 50,000, a job hundreds of movies.
FALSE = 1e-8
# How far the filter of what a network left over reaches [px], in essence, and the standard errors by which a frequency
# of it must differ from nothing.
LEFT_REACH, LEFT_SURE = 12.0, 2.0


class NeighbourWiener(nn.Module):
    """Estimate a frame as the mean of its neighbours, filtered by `kernel`; blind, since the frame has no part in it.

    The filter is that of `wiener_kernel`, from the movie's own spectrum; on a movie without any structure it is zero
    and the estimate a constant. `frames`, `around`, `motion`: as for a BlindSpot; `context`: the reach of the kernel
    [px].
    """

    periodic = False
    receptive_radius = 0
    macs_per_pixel = 0.0  # the filter is a product in Fourier space
    kernel: Tensor

    def __init__(self, *, frames: int, context: int, around: int = 0, motion: Sequence[float] = ()) -> None:
        super().__init__()
        if frames < 3 or frames % 2 == 0 or context < 1:
            raise ValueError(f"frames is {frames}, context {context}; expected an odd number from 3 on, and at least 1")
        self.config: dict[str, Any] = {"frames": frames, "context": context}
        self.offsets = offsets_of(frames)
        self.around = offsets_around(frames, around)
        if around:
            self.config["around"] = around
        if any(motion):
            self.config["motion"] = list(motion)
        self.motion = tuple(motion)
        self.context_radius = context
        self.register_buffer("kernel", torch.zeros(2 * context + 1, 2 * context + 1))

    @property
    def kernels(self) -> Tensor:
        """Its filter, (1, y, x)."""
        return self.kernel[None]

    def forward(self, frames: Tensor, valid: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """The centre frame (batch, y, x) [electrons], of `context` (batch, 1, y, x) [electrons about the mean]."""
        if context is None:
            return torch.full_like(frames[:, 0], float(level[0]))
        return level[0] + context[:, 0]


def wiener_kernel(network: DenoisingNetwork, frames: Tensor, *, links: FrameLinks, level: Level) -> Tensor:
    """The Wiener filter of the mean of the neighbours of each of some frames (m, y, x) [electrons], see `kernel_of`.

    As far as its `kernel` and `motion` say, `network` follows the parts that move.
    """
    power, many = common_power(network, frames, links=links, level=level)
    reach = network.context_radius
    return kernel_of(power * level.mean**2, least_of(many), level, around=network.around, reach=reach)


def common_power(
    network: DenoisingNetwork, frames: Tensor, *, links: FrameLinks, level: Level
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Power per pixel (ky, kx) that frames (m, y, x) [electrons] have in common with the mean of their neighbours, both
    relative to the mean of the movie, smoothed over the resolution that they have; and how many each had, (used,).

    Noise is independent from frame to frame, hence there is none of it in this, but for its scatter. Only pixels that
    are finite and that neighbours have count.
    """
    reach = network.context_radius
    side = int(next_fast_len(max(*frames.shape[-2:], 2 * reach + 2), real=True))

    def of_one(index: int) -> tuple[NDArray[np.float64], float] | None:
        shifts = local_shifts(network, frames, index, links=links, level=level)
        mean, count = mean_of_neighbours(network, frames, index, links=links, level=level, shifts=shifts)
        use = (count > 0) & torch.isfinite(frames[index])
        if not bool(use.any()):
            return None
        pair = (frames[index] / level.mean - 1, mean / level.mean)
        one, other = (torch.fft.fft2(torch.where(use, part, 0), s=(side, side)) for part in pair)
        return (one * other.conj()).real.double().cpu().numpy() / int(use.sum()), float(count.max())

    power, many = np.zeros((side, side)), []
    for found in side_by_side(of_one, np.flatnonzero(links.good).tolist()):
        if found is not None:
            power += found[0]
            many.append(found[1])
    width = [SMOOTHING * side / int(size) for size in frames.shape[-2:]]
    return np.asarray(gaussian_filter(power / max(len(many), 1), width, mode="wrap")), np.array(many)


def scatter_of(many: NDArray[np.float64]) -> float:
    """Standard deviation of `common_power` of mere noise of variance one. Every pair of frames counts twice, with the
    same noise."""
    return float(np.sqrt(np.sum(1 / many) / (4 * np.pi)) / (SMOOTHING * len(many))) if len(many) else 0.0


def least_of(many: NDArray[np.float64]) -> float:
    """What `common_power` of mere noise of variance one exceeds with the chance `FALSE`.

    Frames that are all compared with each other have but one sum in common, whose square this is in essence: a gamma
    distribution of as many degrees of freedom as there are such groups, times the frequencies that are averaged.
    """
    if not len(many):
        return 0.0
    shape = 4 * np.pi * SMOOTHING**2 * max(len(many) / (float(np.mean(many)) + 1), 1.0)
    return scatter_of(many) * float(gammainccinv(shape, FALSE) - shape) / shape**0.5


def leftover_filter(residuals: Tensor, contexts: Tensor) -> Tensor:
    """The even filter (2 r + 1, 2 r + 1) of the context of frames that best makes what a network left over of them.

    residuals (m, y, x) [electrons]: frames less their blind estimates, NaN where they do not count; contexts (m, y, x)
    [electrons about the mean], whose noise is not that of the frames. A Wiener filter: what both have in common over
    the power of the context, each smoothed over frequencies by a window of `LEFT_REACH` pixels; zero where mere noise
    would be as large.
    """
    height, width = residuals.shape[-2:]
    common = torch.zeros(height, width // 2 + 1, dtype=torch.complex128, device=residuals.device)
    power, noise, many = torch.zeros_like(common.real), 0.0, 0.0
    for residual, context in zip(residuals, contexts, strict=True):
        use = torch.isfinite(residual)
        rest = torch.where(use, residual, 0)
        spectrum = torch.fft.rfft2(context)
        common += torch.fft.rfft2(rest) * spectrum.conj()
        power += spectrum.abs().square() * use.float().mean()
        noise, many = noise + float(rest.double().square().sum()), many + float(use.sum())
    places = (torch.fft.fftfreq(size, 1 / size, dtype=torch.float64).to(power.device) for size in (height, width))
    far = torch.meshgrid(*places, indexing="ij")
    window = torch.exp(-(far[0] ** 2 + far[1] ** 2) / (2 * LEFT_REACH**2))
    # A window over places smooths over frequencies.
    common, power = (torch.fft.rfft2(window * torch.fft.irfft2(part, s=(height, width))) for part in (common, power))
    power = power.real.clamp_min(max(1e-9 * float(power.abs().max()), torch.finfo(torch.float64).tiny))
    chance = noise / max(many, 1) * power * float(window.square().sum()) / 2
    shrunk = (1 - LEFT_SURE**2 * chance / common.real.square().clamp_min(1e-300)).clamp_min(0)
    found = torch.fft.irfft2(common.real / power * shrunk, s=(height, width))
    reach = min(int(4 * LEFT_REACH), (min(height, width) - 1) // 2)
    return found.roll((reach, reach), (0, 1))[: 2 * reach + 1, : 2 * reach + 1].float()


def kernel_of(signal: NDArray[np.float64], least: float, level: Level, *, around: Sequence[int], reach: int) -> Tensor:
    """The filter (2 reach + 1,) squared, tapered to its edge, for a smoothed power (ky, kx) [electrons²].

    Where it does not exceed `least`, in units of the noise, it is no signal.
    """
    power = np.where(signal > least * level.variance, signal, 0)
    gain = power / (power + level.variance / max(len(around) - 1, 1))
    kernel = np.roll(np.fft.ifft2(gain).real, (reach, reach), (0, 1))[: 2 * reach + 1, : 2 * reach + 1]
    edge = np.clip(2 * np.abs(np.arange(-reach, reach + 1)) / (reach + 1) - 1, 0, 1)
    taper = np.cos(0.5 * np.pi * edge) ** 2
    return torch.from_numpy(kernel * np.outer(taper, taper)).float()
