"""Frequencies of a movie: the windowed spectrum of a frame, and how much each frequency can tell about drift."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

Float = NDArray[np.float32]

# What covers more of the field than the rest of this is never limited.
_COMMON = 0.9
# Electrons have Poisson noise, of which the detector's transfer leaves at least so much in power.
_LEAST_NOISE = 0.05


def spectral_weight(
    sample: Float,
    *,
    band: tuple[float, float],
    taper: float,
    change: float,
    limit: float,
    masks: Float | None = None,
    device: str = "cpu",
) -> Float:
    """Learn from a sample of the movie how to weigh its spatial frequencies.

    sample: (time, y, x) frames spread over the movie [electrons], finite.
    band: (low, high) [cycles/px]: half-points of the smooth limits; low keeps uneven illumination out.
    taper: part of the field on each side over which the window falls to zero.
    change: part of the signal that differs between frames for other reasons than drift; it counts as noise, which turns
    the weights from a matched filter (0) towards phase correlation.
    limit: see `pair_shifts`; masks (time, y, x): what counts of each frame, from 0 to 1, where that is not all of it.
    Returns (3, y, x // 2 + 1) float32 in rfft2 layout: the weights of the cross-power, normalised so that a frame
    correlates with itself to about 1; the Wiener filter S/(S + N) that shows what of a frame, unmasked, is not noise;
    and N.
    """
    if len(sample) == 0:
        raise ValueError("spectral_weight got no frames; it needs at least one good frame of the movie")
    shape = (sample.shape[1], sample.shape[2])
    window = window_of(shape, taper, device)
    ky, kx = frequencies(shape, device)
    radius = torch.sqrt(ky[:, None] ** 2 + kx[None, :] ** 2)
    limits = torch.exp(-np.log(2) * (radius / band[1]) ** 8) * (1 - torch.exp(-np.log(2) * (radius / band[0]) ** 2))
    power = _mean_power((tensor(frame, device) for frame in sample), window)
    noise = _noise_power(power, radius, max(float(np.mean(sample)), 0.0) * float((window**2).sum()))
    signal = (power - noise * (1 + len(sample) ** -0.5)).clamp(min=0)
    wiener = (limits * signal / (signal + noise)).to(torch.float32)
    images = (limited(tensor(frame, device), wiener, limit)[0] for frame in sample)
    if masks is not None:
        kept = [tensor(mask, device) for mask in masks]
        images = (masked(image, mask) for image, mask in zip(images, kept, strict=True))
    power = _mean_power(images, window)
    if masks is not None:
        poisson = np.mean(
            [float((tensor(f, device) * (window * m) ** 2).sum()) for f, m in zip(sample, kept, strict=True)]
        )
        noise = _noise_power(power, radius, max(float(poisson), 0.0))
    signal = (power - noise * (1 + len(sample) ** -0.5)).clamp(min=0)
    other = noise + change * signal
    weight = signal / (other * (other + 2 * signal)) * limits
    if not float(weight.max()) > 0:
        weight = limits / other
    weight = torch.where(weight > 1e-5 * weight.max(), weight, 0.0)
    weight = weight / (multiplicity(shape, device) * weight * power).sum()
    return np.asarray(torch.stack([weight.to(torch.float32), wiener, noise.to(torch.float32)]).cpu().numpy())


def _mean_power(frames: Iterable[torch.Tensor], window: torch.Tensor) -> torch.Tensor:
    power = torch.zeros(window.shape[0], window.shape[1] // 2 + 1, dtype=torch.float64, device=window.device)
    count = 0
    for frame in frames:
        power += spectrum(frame, window).abs().double() ** 2
        count += 1
    return _smooth(power / count)


def limited(frame: torch.Tensor, wiener: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the frame less what of its filtered image is out of bounds (see `pair_shifts`), and where none was."""
    image = torch.fft.irfft2(torch.fft.rfft2(frame - frame.mean()) * wiener, s=frame.shape)
    few = image[::4, ::4].abs().ravel()
    bound = limit * float(torch.kthvalue(few, max(1, int(_COMMON * len(few)))).values)
    excess: torch.Tensor = image - image.clamp(-bound, bound)
    return frame - excess, excess == 0


def masked(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The image (y, x) where the mask is 1, and its mean there where the mask is 0."""
    level = (image.double() * mask).sum() / mask.double().sum().clamp_min(1e-12)
    return level.float() + (image - level.float()) * mask


def _noise_power(power: torch.Tensor, radius: torch.Tensor, poisson: float) -> torch.Tensor:
    """Return the noise power at each frequency: the median of its ring, but neither above Poisson nor below the floor.

    Lattice peaks do not move the median; of what fills a ring (amorphous film) all that exceeds Poisson is signal.
    """
    ring = (radius * 2 * max(power.shape)).round().long().clamp(max=max(power.shape)).ravel()
    order = torch.argsort(ring, stable=True)
    counts = torch.bincount(ring)
    groups = torch.split(power.ravel()[order], counts.tolist())
    median: torch.Tensor = torch.stack([group.median() if len(group) else power.median() for group in groups])
    floor = float(median[-max(1, len(median) // 8) :].mean())
    floor = max(floor, _LEAST_NOISE * poisson, 1e-12 * float(power.max()), 1e-30)
    return median.clamp(min=floor, max=max(poisson, floor))[ring].reshape(power.shape)


def _smooth(power: torch.Tensor) -> torch.Tensor:
    """Binomial 3 × 3 mean in rfft2 layout: periodic in y; column −1 is column 1 with y reversed."""
    flipped = torch.roll(torch.flip(power, [0]), 1, 0)
    wide = torch.cat([flipped[:, 1:2], power, flipped[:, -2:-1] if power.shape[1] > 1 else power], dim=1)
    wide = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
    return (torch.roll(wide, 1, 0) + 2 * wide + torch.roll(wide, -1, 0)) / 4


def tensor(array: Float, device: str) -> torch.Tensor:
    """Return a float32 copy on the device."""
    # A copy of its own: transforms may differ in the last bit with the alignment of a view.
    return torch.tensor(np.asarray(array, dtype=np.float32), device=device)


def window_of(shape: tuple[int, int], taper: float, device: str) -> torch.Tensor:
    """Flat window whose edges fall to zero as cos²."""
    sides = []
    for n in shape:
        place = torch.arange(n, dtype=torch.float64) + 0.5
        distance = torch.minimum(place, n - place)
        sides.append(torch.sin(0.5 * np.pi * (distance / max(taper * n, 1.0)).clamp(max=1)) ** 2)
    window: torch.Tensor = torch.outer(sides[0], sides[1]).to(device=device, dtype=torch.float32)
    return window


def spectrum(frame: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Return the rfft2 (y, x // 2 + 1) of the frame less its mean, times the window."""
    mean = (frame.double() * window).sum() / window.double().sum()
    transform: torch.Tensor = torch.fft.rfft2((frame - mean.float()) * window)
    return transform


def frequencies(shape: tuple[int, int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ky (y,) and kx (x // 2 + 1,) [cycles/px] of an rfft2."""
    ky = torch.fft.fftfreq(shape[0], dtype=torch.float64, device=device)
    return ky, torch.fft.rfftfreq(shape[1], dtype=torch.float64, device=device)


def multiplicity(shape: tuple[int, int], device: str) -> torch.Tensor:
    """How often each entry of an rfft2 counts in the full plane: (1, x // 2 + 1)."""
    counts = torch.full((1, shape[1] // 2 + 1), 2.0, dtype=torch.float64, device=device)
    counts[0, 0] = 1
    if shape[1] % 2 == 0:
        counts[0, -1] = 1
    return counts
