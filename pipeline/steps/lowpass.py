"""A low-pass filter that keeps the mean and does not ring at the edges."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

# The transmission falls from one to zero between (1 - ROLL_OFF) and (1 + ROLL_OFF) times the cut-off.
ROLL_OFF = 0.15


# Envelope at the information limit.
JUST_SEEN = np.exp(-2.0)
# Electrons: wavelength [Å] = ROOT / sqrt(V + BEND V²), V the accelerating voltage.
ROOT, BEND = 12.26426, 0.978476e-6


def information_limit(energy: float, *, focal_spread: float) -> float:
    """Highest spatial frequency [1/Å] that a microscope of `energy` [keV] transfers: where its envelope is e⁻².

    Partial temporal coherence damps the linear transfer by exp(−(π λ Δ k² / 2)²), Δ the `focal_spread` [Å] (as in
    abTEM; Kirkland, Advanced Computing in Electron Microscopy, 2010). What a denoised frame shows beyond is noise.
    """
    volts = 1e3 * energy
    wavelength = ROOT / (volts + BEND * volts**2) ** 0.5
    return float((2 * (-np.log(JUST_SEEN)) ** 0.5 / (np.pi * wavelength * focal_spread)) ** 0.5)


def transmission(frequency: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Half a cosine from 1 to 0, and 1/2 at the cut-off; `frequency` and `cutoff` in one unit."""
    x = ((frequency / cutoff - 1) / ROLL_OFF).clamp(-1, 1)
    return 0.5 * (1 - torch.sin(0.5 * torch.pi * x))


def lowpass(frames: NDArray[np.float32], *, cutoff: float | None, sampling: float) -> NDArray[np.float32]:
    """Remove spatial frequencies above `cutoff` [1/Å] from frames (n, y, x) of `sampling` [Å per pixel].

    Edges are reflected; the mean of each frame is kept. With no cut-off, or one beyond the corner of the Fourier plane
    (Nyquist times the square root of two), the frames are returned unchanged. Frames are filtered one by one.
    """
    nyquist = 0.5 / sampling
    if cutoff is None or cutoff >= nyquist * 2**0.5:
        return frames
    height, width = frames.shape[-2:]
    # A filter edge of width 2 * ROLL_OFF * cutoff dies out within about one over that width in space.
    reach = round(1 / (2 * ROLL_OFF * cutoff * sampling))
    top, left = (min(reach, size - 1) for size in (height, width))
    fy = torch.fft.fftfreq(height + 2 * top, sampling)[:, None]
    fx = torch.fft.rfftfreq(width + 2 * left, sampling)[None, :]
    window = transmission(torch.hypot(fy, fx), cutoff)
    out = np.empty_like(frames, dtype=np.float32)
    for i, frame in enumerate(frames):
        image = torch.from_numpy(np.ascontiguousarray(frame, dtype=np.float32))
        mean = image.mean()
        padded = torch.nn.functional.pad((image - mean)[None, None], (left, left, top, top), mode="reflect")[0, 0]
        smooth = torch.fft.irfft2(torch.fft.rfft2(padded) * window, s=padded.shape)
        smooth = smooth[top : top + height, left : left + width]
        out[i] = (smooth - smooth.mean() + mean).numpy()
    return out
