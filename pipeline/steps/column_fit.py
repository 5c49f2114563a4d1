"""Sub-pixel positions, intensities and their standard errors of the columns of one frame.

**Why two frames.** At 200 e-/Å2 and 0.17 Å/px a pixel holds six electrons, and the Cramér-Rao bound of one column's
position in one measured frame, variance = b / (A² pi/2) for an isotropic Gaussian of amplitude A on background b, is
worse than 0.1 Å. The denoised frame knows more, because it has seen the neighbouring frames and the other columns, but
it is not data: its error is unknown and part of it is this frame's own noise. So the position is a posterior.

1. *Start*: all columns of the denoised frame are fitted jointly (isotropic Gaussians of one width, a constant
   background each, in a round window that ends half way to the nearest neighbour; neighbours' tails are subtracted).
   Gauss-Newton with the pixel variances of the measured frame and a fixed number of steps.
2. *Step*: one Fisher-scoring step from there on the measured frame, d = H⁻¹ Jᵀ W (electrons - denoised) with H = JᵀWJ.
   The model's misfit is in both frames and cancels, so d compares data with prior and nothing else; being one linear
   step it cannot diverge, and at this noise it is as good as the full fit (Le Cam's one-step estimator).
3. *Weight*: with C = H⁻¹ the bound of one frame, tau² the variance of the start and c = share C their covariance,
   E d² = C - 2 c + tau². `share` says how far the start follows this frame's own noise: 1/K for a mean of K frames.
   The frame's own columns measure rho = mean d²/C, hence kappa = tau²/C = rho - 1 + 2 share. The best combination is
   start + w d, w = (kappa - share)/rho, of variance C (kappa - (kappa - share)²/rho). An unhelpful denoised frame
   (rho >> 1) leaves the measured frame's own fit, w -> 1; a perfect one leaves the start. What all columns of the
   frame have in common in d (neighbouring frames were aligned by whole pixels) is known much better than each d, so
   it is split off first and weighed by itself, after James and Stein: shift (1 - 4 (1 - share)/rho_shift)+.

The errors are those of a column's image. Where the image's peak does not lie on the column (thickness, tilt,
aberrations) they do not tell: on simulated Au [110] at 300 kV 0.012 Å per axis (bright atoms), 0.02 Å (dark).

All is float64: the normal equations lose half the digits, the problem is tiny, and devices then agree to 1e-9 px.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from pipeline.steps.column_windows import Scene, common_width, cut_windows, neighbours

Floats = NDArray[np.float64]

STEPS = 8  # Gauss-Newton steps: from DoG starts all positions are then within 2e-3 px of where they converge
PRIOR_COUNT = 100  # weight, in coordinates, of rho = 1 - share (an efficient start) against the frame's own columns


class _Fit(NamedTuple):
    """Amplitude, background (column) [electrons], position (column, 2) [px] of a whole frame, and the width [px]."""

    amplitude: torch.Tensor
    background: torch.Tensor
    position: torch.Tensor
    width: float


def refine(
    electrons: ArrayLike | torch.Tensor,
    denoised: ArrayLike | torch.Tensor,
    y: ArrayLike,
    x: ArrayLike,
    *,
    polarity: int,
    width: float,
    fit_width: bool,
    readout_variance: float,
    share: float,
) -> dict[str, Floats]:
    """Positions, intensities and standard errors of the columns of one frame (the method is the module's docstring).

    electrons (y, x), denoised (y, x) [electrons]: the measured frame, variance = mean + readout_variance [electrons²],
    and its denoised estimate on the same pixels; NumPy or torch, on any one device. y, x (column) [px]: the starts.
    polarity: +1 where columns are brighter than their surroundings, -1 where darker. width [px]: standard deviation of
    a column's image, the same for all; a starting value when fit_width. share [1]: how far the denoised positions
    follow this frame's own noise; 1 is taken where both frames are the same (no denoising).

    Returns arrays (column), float64, in the order of the starts:
    y, x, y_err, x_err [px]: posterior position and standard error;
    intensity, intensity_err [electrons]: 2 pi width² amplitude of the measured frame alone, negative for dark columns;
    background [electrons per pixel]; width [px], the same for all columns of a frame;
    amplitude [electrons per pixel] of the denoised frame;
    significance [1]: the signal-to-noise ratio that it has in one measured frame, > 0 where its sign is that of
    polarity; fitted (1 or 0): 0 where the fit ran out of its window or into nothing; there the start
    is returned with the window's radius as error and significance 0.
    """
    start = np.column_stack([np.asarray(y, np.float64), np.asarray(x, np.float64)])
    if len(start) == 0:
        return {name: np.empty(0) for name in _NAMES}
    measured, smooth = (torch.as_tensor(frame).to(torch.float64) for frame in (electrons, denoised))
    if torch.equal(measured, smooth):
        share = 1.0  # nothing was denoised: the start follows the frame's noise wholly
    place = torch.as_tensor(start, device=measured.device)
    near = neighbours(place)
    if fit_width:
        width = common_width(smooth, place, near, polarity=polarity, width=width)
    scenes = cut_windows(measured, smooth, place, near, width=width, readout_variance=readout_variance)
    radius = torch.cat([scene.radius for scene in scenes])
    fit = _fit_denoised(scenes, place, polarity, width)
    moved = torch.linalg.vector_norm(fit.position - place, dim=1)
    fitted = torch.isfinite(moved) & (moved <= radius) & (fit.amplitude * polarity > 0)
    return _posterior(scenes, fit, torch.where(fitted, torch.nan, radius), place, polarity, share)


_NAMES = (
    *("y", "x", "y_err", "x_err", "intensity", "intensity_err", "background", "width", "amplitude", "significance"),
    "fitted",
)


def evidence(
    mean: ArrayLike | torch.Tensor,
    depth: ArrayLike | torch.Tensor,
    denoised: ArrayLike | torch.Tensor,
    columns: Mapping[str, Floats],
    *,
    polarity: int,
    readout_variance: float,
) -> Floats:
    """Log-likelihood ratio [nat] of each column (column,) against none, by the counts alone.

    mean (y, x) [electrons]: the average of `depth` (y, x) measured frames, all on the grid of one; denoised (y, x):
    what their variance is taken from. columns: the result of `refine`. At the place and width of a column, which are
    not asked again, the amplitude and background that explain the counts best are compared with a background alone;
    neighbours are taken as the denoised frame has them. Where the counts show the opposite of polarity the ratio is
    negative. At a place without a column its size is half of a squared standard normal number (Wilks): 4.5 is three
    sigma.
    """
    place = torch.as_tensor(np.column_stack([columns["y"], columns["x"]]))
    if not len(place):
        return np.zeros(0)
    measured, smooth, frames = (torch.as_tensor(image).to(torch.float64) for image in (mean, denoised, depth))
    place, near = place.to(measured.device), neighbours(place.to(measured.device))
    amplitude = torch.as_tensor(columns["amplitude"], device=measured.device)
    fit = _Fit(amplitude, torch.zeros_like(amplitude), place, float(columns["width"][0]))
    out = []
    for scene in cut_windows(measured, smooth, place, near, width=fit.width, readout_variance=readout_variance):
        at = (scene.centre[:, :, None] + scene.offset).long()
        rows, cols = (at[:, axis].clamp(0, size - 1) for axis, size in enumerate(measured.shape))
        weight = scene.weight * frames[rows[:, :, None], cols[:, None, :]]
        away = scene.offset - (place[scene.rows] - scene.centre)[:, :, None]
        line = torch.exp(-0.5 * (away / fit.width) ** 2)
        peak, data = line[:, 0, :, None] * line[:, 1, None, :], scene.measured - _tails(scene, fit)
        one, first, second, level, height = (
            (weight * part).sum(dim=(1, 2)) for part in (torch.ones_like(peak), peak, peak**2, data, peak * data)
        )
        spread = one * second - first**2
        ratio = polarity * (one * height - first * level) / torch.sqrt((one * spread).clamp_min(1e-300))
        out.append(torch.where(spread > 1e-12 * one * second, 0.5 * ratio * ratio.abs(), 0.0))
    return torch.cat(out).cpu().numpy()


def _tails(scene: Scene, fit: _Fit) -> torch.Tensor:
    """The neighbours' part of the model in each window (column, y, x) [electrons]."""
    away = scene.offset - (fit.position[scene.neighbour] - scene.centre[:, None, :])[..., None]
    line = torch.exp(-0.5 * (away / fit.width) ** 2)
    strength = fit.amplitude[scene.neighbour] * scene.exists
    return torch.bmm((strength[..., None] * line[:, :, 0]).transpose(1, 2), line[:, :, 1])


def _normal(scene: Scene, fit: _Fit, weighted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H = JᵀWJ (column, parameter, parameter), made regular, and Jᵀ weighted (column, parameter).

    J is the derivative of the model by amplitude, background, y and x; weighted (column, y, x) = W times the data.
    All of J, and all its products, are one function of y times one of x: so the sums over a window are two thin matrix
    products with the lines 1, g, ag, g², ag², a²g², where g is the Gaussian and a the distance along that axis.
    """
    away = scene.offset - (fit.position[scene.rows] - scene.centre)[:, :, None]
    one = torch.exp(-0.5 * (away / fit.width) ** 2)
    square = one**2
    lines = torch.stack([torch.ones_like(one), one, away * one, square, away * square, away**2 * square], dim=2)
    down, across = lines[:, 0], lines[:, 1].transpose(1, 2)
    sums = torch.bmm(torch.bmm(down, scene.weight), across)
    data = torch.bmm(torch.bmm(down[:, :3], weighted), across[:, :, :3])
    slope = fit.amplitude[scene.rows] / fit.width**2
    upper = [[sums[:, 3, 3], sums[:, 1, 1], slope * sums[:, 4, 3], slope * sums[:, 3, 4]]]
    upper += [[upper[0][1], sums[:, 0, 0], slope * sums[:, 2, 1], slope * sums[:, 1, 2]]]
    upper += [[upper[0][2], upper[1][2], slope**2 * sums[:, 5, 3], slope**2 * sums[:, 4, 4]]]
    upper += [[upper[0][3], upper[1][3], upper[2][3], slope**2 * sums[:, 3, 5]]]
    hessian = torch.stack([torch.stack(row, dim=1) for row in upper], dim=1)
    scale = torch.diagonal(hessian, dim1=1, dim2=2)
    ridge = torch.diag_embed(1e-9 * scale + 1e-12 * (1 + scale.amax(dim=1, keepdim=True)))
    gradient = torch.stack([data[:, 1, 1], data[:, 0, 0], slope * data[:, 2, 1], slope * data[:, 1, 2]], dim=1)
    return hessian + ridge, gradient


def _fit_denoised(scenes: list[Scene], place: torch.Tensor, polarity: int, width: float) -> _Fit:
    """Joint Gauss-Newton fit of all columns to the denoised frame; a step sees the neighbours of the step before."""
    low, high = (torch.cat(extremes) for extremes in zip(*map(_extremes, scenes), strict=True))
    fit = _Fit(polarity * (high - low), low if polarity > 0 else high, place, width)
    for _ in range(STEPS):
        changes = [_change(scene, fit, place) for scene in scenes]
        amplitude, background, position = (torch.cat(part) for part in zip(*changes, strict=True))
        fit = _Fit(amplitude, background, position, width)
    return fit


def _extremes(scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest usable pixel of each window, 0 where there is none."""
    usable = scene.weight > 0
    low = torch.where(usable, scene.denoised, torch.inf).amin(dim=(1, 2))
    high = torch.where(usable, scene.denoised, -torch.inf).amax(dim=(1, 2))
    return torch.nan_to_num(low, posinf=0.0), torch.nan_to_num(high, neginf=0.0)


def _change(scene: Scene, fit: _Fit, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Amplitude, background, position after one step; a column moves at most half a width, and stays in its window."""
    amplitude, background, position = (values[scene.rows] for values in fit[:3])
    hessian, gradient = _normal(scene, fit, scene.weight * (scene.denoised - _tails(scene, fit)))
    # The model without tails is amplitude times the first column of J plus background times the second.
    gradient = gradient - amplitude[:, None] * hessian[:, :, 0] - background[:, None] * hessian[:, :, 1]
    change = torch.linalg.solve(hessian, gradient)
    most, start, limit = 0.5 * fit.width, place[scene.rows], scene.radius[:, None]
    position = start + (position + change[:, 2:4].clamp(-most, most) - start).clamp(-limit, limit)
    return amplitude + change[:, 0], background + change[:, 1], position


def _posterior(
    scenes: list[Scene], fit: _Fit, fallback: torch.Tensor, place: torch.Tensor, polarity: int, share: float
) -> dict[str, Floats]:
    """The results; fallback (column) [px]: the error of a column that keeps its start, NaN where the fit is good."""
    portions = [_normal(scene, fit, scene.weight * (scene.measured - scene.denoised)) for scene in scenes]
    hessian, gradient = (torch.cat(part) for part in zip(*portions, strict=True))
    fitted = torch.isnan(fallback)
    covariance = torch.linalg.inv(hessian)
    step = torch.einsum("nab,nb->na", covariance, gradient)
    bound = torch.diagonal(covariance, dim1=1, dim2=2)
    move, variance = _combination(step[:, 2:4], bound[:, 2:4], fitted, share)
    position = torch.where(fitted[:, None], fit.position + move, place)
    error = torch.where(fitted[:, None], torch.sqrt(variance), fallback[:, None])
    area = 2 * torch.pi * fit.width**2
    noise = torch.sqrt(bound[:, 0])
    values = {
        "y": position[:, 0],
        "x": position[:, 1],
        "y_err": error[:, 0],
        "x_err": error[:, 1],
        "intensity": area * (fit.amplitude + step[:, 0]),
        "intensity_err": area * noise,
        "background": fit.background + step[:, 1],
        "width": torch.full_like(bound[:, 0], fit.width),
        "amplitude": fit.amplitude,
        "significance": torch.where(fitted, polarity * fit.amplitude / noise, 0.0),
        "fitted": fitted.to(torch.float64),
    }
    return {name: values[name].cpu().numpy() for name in _NAMES}


def _combination(
    step: torch.Tensor, bound: torch.Tensor, fitted: torch.Tensor, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far to follow the measured frame (column, axis) [px], and the posterior variance (column, axis) [px²]."""
    use = fitted[:, None].to(step.dtype)
    count = use.sum().clamp(min=1.0)
    ratio = (step**2 / bound)[fitted]
    # Clipped at three standard deviations (0.455 is the median of chi²): a few columns that the model does not describe
    # must set neither the frame's shift nor all errors.
    scale = torch.clamp(ratio.median() / 0.455, min=1.0) if len(ratio) else torch.ones_like(count)
    limit = 3 * torch.sqrt(scale * bound)
    clipped = torch.maximum(torch.minimum(step, limit), -limit)
    sureness = use / bound
    shift = (clipped * sureness).sum(dim=0) / sureness.sum(dim=0).clamp(min=1e-12)
    shift_variance = 1 / sureness.sum(dim=0).clamp(min=1e-12)
    rho_shift = (shift**2 / shift_variance).mean().clamp(min=1e-6)
    # Four: two numbers are too few to shrink by their own size alone, so a shift has to be twice its noise to count.
    trust = (1 - 4 * (1 - share) / rho_shift).clamp(min=0.0)
    shift = shift * trust
    total = ((clipped - shift) ** 2 * sureness).sum()
    rho = ((PRIOR_COUNT * (1 - share) + total) / (PRIOR_COUNT + 2 * (count - 1))).clamp(min=1e-6)
    # No start that weighs this frame as it deserves gets below `share`; a smaller value is the noise of rho.
    kappa = (rho - 1 + 2 * share).clamp(min=max(share, 1e-2))
    weight = ((kappa - share) / rho).clamp(0, 1)
    own = (kappa + weight**2 * rho - 2 * weight * (kappa - share)).clamp(min=1e-4)
    return shift + weight * (step - shift), own * bound + trust * (1 - share) * shift_variance
