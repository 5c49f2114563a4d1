"""Where the network sees atomic columns: a probability for every pixel of every frame."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipeline.steps import windows
from schemas.errors import SettingsError

# What the network was trained with: retrain it when one of these changes.
SAMPLING_RANGE = (0.03, 0.40)  # Å/px of the detector; coarser frames do not resolve columns
FLATTEN = 5.0  # Å, standard deviation of the Gaussian whose local mean is removed
FLOOR = 0.04  # of the mean intensity; a frame that varies less than this is flat, and stays small
KNEE = 3.0  # contrast, in units of the frame's, beyond which the input grows only logarithmically

PARTICLE_SAMPLING_RANGE = (0.03, 1.2)  # Å/px of the detector; frames are resampled to what the network works at
PARTICLE_UNIT = 0.1  # of the mean intensity: a contrast that is 1 in what the network of particles is shown


def usable(sampling: float) -> bool:
    """Whether frames of this sampling [Å/px] can be segmented."""
    return SAMPLING_RANGE[0] <= sampling <= SAMPLING_RANGE[1]


def column_probability(
    network: nn.Module,
    frames: NDArray[np.floating],
    *,
    sampling: float,
    model_sampling: float,
    polarity: int,
    window: int | None,
    halo: int | None,
    batch: int,
    device: str | torch.device = "cpu",
) -> NDArray[np.float32]:
    """Probability (time, y, x) that a pixel belongs to an atomic column, on the detector's grid.

    frames (time, y, x) in any unit proportional to intensity, denoised; sampling and model_sampling in Å/px;
    polarity +1 where atoms are bright, −1 where they are dark. window and halo in pixels of the network
    (`halo` None: its receptive radius). Frames are independent of each other.
    Raises SettingsError for a sampling outside SAMPLING_RANGE and for windows that do not fit.
    """
    check_sampling(sampling)
    out = np.empty(frames.shape, np.float32)
    for index, frame in enumerate(frames):
        prepared = prepare(_tensor(frame, device), sampling=sampling, model_sampling=model_sampling)
        logits = _logits(network, prepared * float(polarity), window, halo, batch)[:1]
        out[index] = _back(torch.sigmoid(logits), frame.shape).cpu().numpy()
    return out


def polarity_evidence(
    network: nn.Module,
    frames: NDArray[np.floating],
    *,
    sampling: float,
    model_sampling: float,
    window: int | None,
    halo: int | None,
    batch: int,
    device: str | torch.device = "cpu",
) -> NDArray[np.float64]:
    """For each frame (time, y, x) how strongly its atoms look bright rather than dark: (time,), > 0 means bright.

    Mean over pixels of the difference of the polarity logits with either sign; without columns it is about zero.
    """
    check_sampling(sampling)
    out = np.empty(len(frames))
    for index, frame in enumerate(frames):
        prepared = prepare(_tensor(frame, device), sampling=sampling, model_sampling=model_sampling)
        bright, dark = (_logits(network, sign * prepared, window, halo, batch)[1] for sign in (1.0, -1.0))
        out[index] = float((bright - dark).double().mean())
    return out


def vote_polarity(
    network: nn.Module,
    frames: NDArray[np.floating],
    *,
    sampling: float,
    model_sampling: float,
    window: int | None,
    halo: int | None,
    batch: int,
    device: str | torch.device = "cpu",
) -> int:
    """+1 where atoms are bright in these sample frames (time, y, x), −1 where they are dark; +1 where nothing tells."""
    evidence = polarity_evidence(
        network,
        frames,
        sampling=sampling,
        model_sampling=model_sampling,
        window=window,
        halo=halo,
        batch=batch,
        device=device,
    )
    return 1 if float(np.sum(evidence)) >= 0 else -1


def particle_probability(
    network: nn.Module,
    frames: NDArray[np.floating],
    *,
    sampling: float,
    model_sampling: float,
    window: int | None,
    halo: int | None,
    batch: int,
    device: str | torch.device = "cpu",
) -> NDArray[np.float32]:
    """Probability (time, y, x) that a pixel belongs to a particle, on the detector's grid.

    frames (time, y, x) in any unit proportional to intensity, raw or denoised; sampling and model_sampling in Å/px.
    The sign of the contrast does not matter. window and halo in pixels of the network (`halo` None: its receptive
    radius). Frames are independent of each other.
    Raises SettingsError for a sampling outside PARTICLE_SAMPLING_RANGE and for windows that do not fit.
    """
    low, high = PARTICLE_SAMPLING_RANGE
    if not low <= sampling <= high:
        raise SettingsError(
            f"the sampling is {sampling} Å/px; expected {low} to {high} Å/px to find particles; correct "
            "source.sampling if it is wrong, bin finer frames with source.binning, or set particles.model to none"
        )
    out = np.empty(frames.shape, np.float32)
    for index, frame in enumerate(frames):
        prepared = prepare_particles(_tensor(frame, device), sampling=sampling, model_sampling=model_sampling)
        logits = _logits(network, prepared, window, halo, batch)[:1]
        out[index] = _back(torch.sigmoid(logits), frame.shape).cpu().numpy()
    return out


def prepare_particles(frame: Tensor, *, sampling: float, model_sampling: float) -> Tensor:
    """Frame (y, x) as the network of particles wants it: at its sampling, contrast against the mean, compressed.

    Contrast is measured in PARTICLE_UNIT of the mean intensity and not in the frame's own spread: so noise alone looks
    as weak as it is. Beyond KNEE units it grows only logarithmically.
    """
    size = [max(1, round(n * sampling / model_sampling)) for n in frame.shape]
    level = frame.mean().clamp_min(1e-12)
    resampled = functional.interpolate(frame[None, None] / level, size=size, mode="bicubic", antialias=True)[0, 0]
    return KNEE * torch.asinh((resampled - 1.0) / (KNEE * PARTICLE_UNIT))


def check_sampling(sampling: float) -> None:
    """Raise SettingsError unless frames of this sampling [Å/px] can be segmented."""
    if not usable(sampling):
        raise SettingsError(
            f"the sampling is {sampling} Å/px; expected {SAMPLING_RANGE[0]} to {SAMPLING_RANGE[1]} Å/px to find atomic "
            "columns; correct source.sampling if it is wrong, bin finer frames with source.binning"
        )


def prepare(frame: Tensor, *, sampling: float, model_sampling: float) -> Tensor:
    """Frame (y, x) as the network wants it: at its sampling, flat, scaled by the whole frame, bright peaks compressed.

    The scale is the frame's own contrast, but no less than a share FLOOR of its mean intensity: noise alone,
    denoised and nearly flat, is not blown up to look like atoms. Odd in the contrast: a negative gives the negative.
    """
    size = [max(1, round(n * sampling / model_sampling)) for n in frame.shape]
    level = frame.mean()
    resampled = functional.interpolate(frame[None, None], size=size, mode="bicubic", antialias=True)[0, 0]
    flat = resampled - smooth(resampled, FLATTEN / model_sampling)
    scale = torch.sqrt(flat.square().mean() + (FLOOR * level).square()).clamp_min(1e-12)
    return KNEE * torch.asinh(flat / (KNEE * scale))


def smooth(image: Tensor, sigma: float) -> Tensor:
    """Image (y, x) smoothed by a Gaussian of `sigma` [px], continued by reflection."""
    radius = int(np.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis, shape in ((0, (1, 1, -1, 1)), (1, (1, 1, 1, -1))):
        size = image.shape[axis]
        index = windows.reflected(-radius, size + radius, size, device=image.device)
        image = functional.conv2d(image.index_select(axis, index)[None, None], kernel.view(shape))[0, 0]
    return image


def _tensor(frame: NDArray[np.floating], device: str | torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frame, dtype=np.float32)).to(device)


def _logits(network: nn.Module, prepared: Tensor, window: int | None, halo: int | None, batch: int) -> Tensor:
    radius = int(network.receptive_radius)  # type: ignore[arg-type]
    with torch.no_grad():
        return windows.blend(
            network,
            prepared[None],
            window=window,
            halo=radius if halo is None else halo,
            receptive_radius=radius,
            batch=batch,
            alignment=int(getattr(network, "alignment", 1)),
        )


def _back(probability: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Probability (1, y, x) of the network's grid on a detector's grid of `shape`; same field of view, so no shift."""
    return functional.interpolate(probability[None], size=list(shape), mode="bicubic", antialias=True)[0, 0].clamp_(
        0.0, 1.0
    )
