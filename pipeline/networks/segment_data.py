"""What the column network is shown: clean images as denoisers leave them, prepared, cropped and turned."""

from __future__ import annotations

import numpy as np
import torch
from scipy.fft import irfft2, rfft2
from scipy.ndimage import gaussian_filter
from torch import Tensor

from pipeline.networks.segment_scenes import Example
from pipeline.steps.segment import FLATTEN, FLOOR, KNEE, smooth

SPECTRUM_SMOOTHING = 1.25  # frequency steps of the frame over which a Wiener filter's spectrum is smoothed


def degrade(image: np.ndarray, rng: np.random.Generator, *, mode: str) -> np.ndarray:
    """What a denoiser may make of a clean image (y, x): blurred, with residual noise, uneven illumination.

    Two in five carry what filters fitted to the frame leave of counted electrons (`_filtered`), the others blotches of
    all sizes (`_blotched`) or, one in four in HAADF, the noise of a single scan.
    """
    image = np.maximum(image, 0.0) ** rng.uniform(0.8, 1.25)
    if mode == "haadf" and rng.random() < 0.4:
        image = _scanned(image, rng)
    choice = rng.random()
    if mode == "haadf" and choice > 0.75:
        image = _single(image, rng)
    elif choice < 0.4:
        image = _filtered(image, rng)
    else:
        image = _blotched(image, rng)
    if rng.random() < 0.4:
        rows, cols = (np.linspace(-1, 1, n) for n in image.shape)
        slope, bend = rng.normal(0, 0.08, 2), rng.normal(0, 0.05)
        image = image * (1 + slope[0] * rows[:, None] + slope[1] * cols + bend * rows[:, None] * cols)
    return image.astype(np.float32)


def _filtered(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A noisy image behind a Wiener filter of its own spectrum, mixed with the same smoothed.

    That is how denoisers fitted to a movie fail: what noise they leave has the periods of the crystal, on the film too.
    8 to 400 electrons per pixel of 0.2 Å: seven frames of 30 to 1400 e⁻/Å².
    """
    mean = float(image.mean())
    electrons = 10 ** rng.uniform(0.9, 2.6) / mean
    noisy = rng.poisson(image * electrons) / electrons - mean
    spectrum = rfft2(noisy)
    noise = image.size * mean / electrons
    full = np.abs(np.fft.fft2(noisy)) ** 2
    power = gaussian_filter(full, SPECTRUM_SMOOTHING, mode="wrap")[:, : spectrum.shape[1]]
    signal = np.maximum(power - rng.uniform(1.0, 1.5) * noise, 0)
    gain = signal / (signal + noise * rng.uniform(0.3, 1.5))
    periodic = irfft2(spectrum * gain, s=image.shape)
    local = gaussian_filter(noisy, rng.uniform(0.8, 2.0))
    share = rng.uniform(0.5, 1.0)
    return np.asarray(mean + share * periodic + (1 - share) * local)


def _blotched(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur, and a residual of 0.2 to 12 % of the mean that is correlated over 0 to 3 px, on two scales."""
    image = gaussian_filter(image, rng.uniform(0.0, 1.2)) if rng.random() < 0.6 else image
    level = np.sqrt(np.maximum(image, 0.02))
    strength = 10 ** rng.uniform(-2.7, -0.92)
    noise = np.zeros_like(image)
    for share in (1.0, rng.uniform(0, 1)):
        width = rng.choice([0.0, rng.uniform(0.5, 3.0)], p=[0.2, 0.8])
        field = rng.standard_normal(image.shape) * (1.0 if width else level)
        field = gaussian_filter(field, width, mode="reflect") * level if width else field
        if rng.random() < 0.3:  # denoisers that work at half resolution leave blocks
            field = np.kron(field[::2, ::2], np.ones((2, 2)))[: image.shape[0], : image.shape[1]]
        noise += share * field / max(float(field.std()), 1e-6)
    if rng.random() < 0.5:  # and are surer of themselves in some places than in others
        noise *= np.exp(rng.uniform(0, 1.2) * 15 * gaussian_filter(rng.standard_normal(image.shape), 4.0))
    return np.asarray(image + strength * noise / max(float(noise.std()), 1e-6) * float(level.mean()))


def _single(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One scan, not denoised: counted electrons, rows that differ, a little smoothing."""
    electrons = 10 ** rng.uniform(0.1, 1.8) / float(image.mean())
    noisy = rng.poisson(image * electrons) / electrons
    noisy = noisy * (1 + rng.normal(0, rng.uniform(0, 0.05), (len(noisy), 1)))
    return np.asarray(gaussian_filter(noisy, (rng.uniform(0.5, 1.6), rng.uniform(0.5, 2.0))))


def _scanned(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows displaced and dimmed at random, as scanning does."""
    rows = np.arange(image.shape[0])
    moved = gaussian_filter(rng.normal(0, rng.uniform(0, 0.8), len(rows)), rng.uniform(0, 2))
    cols = np.arange(image.shape[1])
    out = np.stack([np.interp(cols + moved[row], cols, image[row]) for row in rows])
    return out * (1 + rng.normal(0, rng.uniform(0, 0.03), len(rows)))[:, None]


def network_input(image: np.ndarray, *, sampling: float, gain: float) -> Tensor:
    """As `segment.prepare` does at the network's own sampling, with the scale multiplied by `gain`.

    So the network learns frames whose contrast is spread differently from those that were simulated.
    """
    frame = torch.from_numpy(image)
    flat = frame - smooth(frame, FLATTEN / sampling)
    scale = torch.sqrt(flat.square().mean() + (FLOOR * frame.mean()).square()).clamp_min(1e-12)
    return KNEE * torch.asinh(gain * flat / (KNEE * scale))


def training_sample(
    example: Example, rng: np.random.Generator, *, sampling: float, crop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Input (1, y, x), targets (2, y, x) and weights (2, y, x) of one random crop of one degraded image.

    A third of the crystals are shown with their contrast reversed: then only the sign is to be learnt.
    """
    degraded = degrade(example.image, rng, mode=example.mode)
    prepared = network_input(degraded, sampling=sampling, gain=float(10 ** rng.uniform(-0.25, 0.5)))
    top, left = (int(rng.integers(0, size - crop + 1)) for size in prepared.shape)
    part = (slice(top, top + crop), slice(left, left + crop))
    own = example.polarity or int(rng.choice([-1, 1]))
    shown = own if rng.random() < 0.65 or not example.polarity else -own
    right = torch.tensor(float(shown == own))
    target = torch.from_numpy(example.target[part].astype(np.float32))
    known = torch.from_numpy(example.known[part].astype(np.float32))
    crystal = torch.from_numpy(example.crystal[part].astype(np.float32))
    polarity = crystal * right + (1 - crystal) * 0.5
    targets = torch.stack([target, polarity])
    weights = torch.stack([known * right * (1 + target), 0.15 + 0.15 * crystal])
    turns, flip = int(rng.integers(4)), bool(rng.integers(2))
    turned = [torch.rot90(image, turns, (1, 2)) for image in (prepared[part][None] * shown, targets, weights)]
    first, second, third = [image.flip(2) if flip else image for image in turned]
    return first, second, third
