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
   (rho >> 1) leaves the measured frame's own fit, w -> 1; a perfect one leaves the start.

All is float64: the normal equations lose half the digits, the problem is tiny, and devices then agree to 1e-9 px.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

Floats = NDArray[np.float64]

STEPS = 6  # Gauss-Newton steps: from DoG starts the positions are then within 1e-3 px of where they converge
NEIGHBOURS = 8  # nearest columns whose tails are subtracted; the ninth is at least two distances away in any packing
REACH = 2.5  # window radius in widths where neighbours leave room: 96 % of the position information
SMALLEST_WINDOW = 1.5  # [px] below it the four parameters are not determined
FLOOR = 0.1  # of the frame's mean: least expected electrons per pixel, so that empty pixels are not infinitely certain
PRIOR_COUNT = 100  # weight, in coordinates, of rho = 1 - share (an efficient start) against the frame's own columns


class _Scene(NamedTuple):
    """What stays fixed in a fit: axes (column, window y, window x) unless said otherwise."""

    measured: torch.Tensor
    denoised: torch.Tensor
    weight: torch.Tensor
    centre: torch.Tensor  # (column, 2) integer pixel in the middle of each window
    offset: torch.Tensor  # (window) pixel offsets from it
    neighbour: torch.Tensor  # (column, neighbour) indices
    exists: torch.Tensor  # (column, neighbour) 1 or 0
    radius: torch.Tensor  # (column) [px]


class _Fit(NamedTuple):
    """Amplitude, background [electrons], position y, x [px from the window's centre], each (column), and one width."""

    amplitude: torch.Tensor
    background: torch.Tensor
    position: torch.Tensor
    width: torch.Tensor


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
    follow this frame's own noise.

    Returns arrays (column), float64, in the order of the starts:
    y, x, y_err, x_err [px]: posterior position and standard error;
    intensity, intensity_err [electrons]: 2 pi width² amplitude of the measured frame alone, negative for dark columns;
    background [electrons per pixel]; width [px], the same for all columns of a frame;
    significance [1]: the signal-to-noise ratio that the denoised amplitude has in one measured frame, > 0 where its
    sign is that of polarity; fitted (1 or 0): 0 where the fit ran out of its window or into nothing; there the start
    is returned with the window's radius as error and significance 0.
    """
    start = np.column_stack([np.asarray(y, np.float64), np.asarray(x, np.float64)])
    if len(start) == 0:
        return {name: np.empty(0) for name in _NAMES}
    scene = _scene(electrons, denoised, start, width, readout_variance)
    guess = torch.as_tensor(start, device=scene.centre.device) - scene.centre
    fit = _fit_denoised(scene, guess, polarity, width, fit_width)
    drift_limit = torch.clamp(scene.radius, min=SMALLEST_WINDOW)
    moved = torch.linalg.vector_norm(fit.position - guess, dim=1)
    fitted = torch.isfinite(moved) & (moved <= drift_limit) & (fit.amplitude * polarity > 0)
    return _posterior(scene, fit, guess, fitted, polarity, share)


_NAMES = (*("y", "x", "y_err", "x_err", "intensity", "intensity_err", "background", "width", "significance", "fitted"),)


def _scene(
    electrons: ArrayLike | torch.Tensor,
    denoised: ArrayLike | torch.Tensor,
    start: Floats,
    width: float,
    readout_variance: float,
) -> _Scene:
    """Cut the windows. Pixels outside the frame, not finite, or past half way to a neighbour weigh nothing."""
    measured, smooth = (torch.as_tensor(frame).to(torch.float64) for frame in (electrons, denoised))
    device, (height, breadth) = measured.device, measured.shape
    place = torch.as_tensor(start, device=device)
    neighbour, exists, nearest = _neighbours(place)
    radius = torch.clamp(torch.clamp(nearest / 2, max=REACH * width), min=SMALLEST_WINDOW)
    half = int(np.ceil(max(REACH * width, SMALLEST_WINDOW))) + 1
    offset = torch.arange(-half, half + 1, device=device, dtype=torch.float64)
    centre = torch.round(place)
    rows, columns = centre[:, :1] + offset, centre[:, 1:] + offset
    within = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < breadth))[:, None, :]
    row, column = rows.clamp(0, height - 1).long()[:, :, None], columns.clamp(0, breadth - 1).long()[:, None, :]
    raw, soft = measured[row, column], smooth[row, column]
    distance = torch.hypot(rows[:, :, None] - place[:, :1, None], columns[:, None, :] - place[:, 1:, None])
    # The rim fades over a pixel: a hard one would tie the position to the pixel grid.
    rim = (radius[:, None, None] + 0.5 - distance).clamp(0, 1)
    usable = within & torch.isfinite(raw) & torch.isfinite(soft)
    floor = FLOOR * torch.nan_to_num(smooth, nan=0.0).mean().clamp(min=1e-3)
    variance = torch.maximum(torch.nan_to_num(soft), floor) + readout_variance
    weight = torch.where(usable, rim / variance, 0.0)
    raw, soft = torch.where(usable, raw, 0.0), torch.where(usable, soft, 0.0)
    return _Scene(raw, soft, weight, centre, offset, neighbour, exists, radius)


def _neighbours(place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nearest columns: indices and existence (column, neighbour), distance of the nearest (column) [px]."""
    # A tree on the host: n x n distances would need gigabytes for a 4096² frame's 40,000 columns.
    count = len(place)
    wanted = min(NEIGHBOURS, count - 1)
    if wanted == 0:
        none = torch.zeros((count, 1), dtype=torch.long, device=place.device)
        return none, none.to(torch.float64), torch.full((count,), torch.inf, dtype=torch.float64, device=place.device)
    points = place.cpu().numpy()
    found = cKDTree(points).query(points, k=wanted + 1)
    distance, index = np.asarray(found[0]), np.asarray(found[1])
    own = index == np.arange(count)[:, None]
    own[~own.any(axis=1), -1] = True  # several columns on one spot may crowd a point out of its own list
    index, distance = index[~own].reshape(count, wanted), distance[~own].reshape(count, wanted)
    return (
        torch.as_tensor(index, device=place.device),
        torch.ones((count, wanted), dtype=torch.float64, device=place.device),
        torch.as_tensor(distance[:, 0].copy(), device=place.device),
    )


def _shape(scene: _Scene, position: torch.Tensor, width: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit Gaussians in the windows (column, y, x), and offsets (column, axis, window) [px] from their positions."""
    away = scene.offset - position[:, :, None]
    line = torch.exp(-0.5 * (away / width) ** 2)
    return line[:, 0, :, None] * line[:, 1, None, :], away


def _tails(scene: _Scene, fit: _Fit) -> torch.Tensor:
    """The neighbours' part of the model in each window (column, y, x) [electrons]."""
    seen = (scene.centre + fit.position)[scene.neighbour] - scene.centre[:, None, :]
    line = torch.exp(-0.5 * ((scene.offset - seen[..., None]) / fit.width) ** 2)
    strength = fit.amplitude[scene.neighbour] * scene.exists
    return torch.einsum("nk,nkp,nkq->npq", strength, line[:, :, 0], line[:, :, 1])


def _jacobian(scene: _Scene, fit: _Fit) -> torch.Tensor:
    """Derivatives (column, parameter, y, x) by amplitude, background, y, x and width."""
    shape, away = _shape(scene, fit.position, fit.width)
    slope = fit.amplitude[:, None, None] * shape / fit.width**2
    dy, dx = away[:, 0, :, None], away[:, 1, None, :]
    wider = slope * (dy**2 + dx**2) / fit.width
    return torch.stack([shape, torch.ones_like(shape), slope * dy, slope * dx, wider], dim=1)


def _normal(jacobian: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H = JᵀWJ (column, parameter, parameter) and g = JᵀWr (column, parameter), H made regular."""
    weighted = jacobian * weight[:, None]
    hessian = torch.einsum("napq,nbpq->nab", weighted, jacobian)
    scale = torch.diagonal(hessian, dim1=1, dim2=2)
    ridge = torch.diag_embed(1e-9 * scale + 1e-12 * (1 + scale.amax(dim=1, keepdim=True)))
    return hessian + ridge, torch.einsum("napq,npq->na", weighted, residual)


def _fit_denoised(scene: _Scene, guess: torch.Tensor, polarity: int, width: float, fit_width: bool) -> _Fit:
    """Joint Gauss-Newton fit of all columns to the denoised frame; a step sees the neighbours of the step before."""
    inner = scene.weight > 0
    low = torch.where(inner, scene.denoised, torch.inf).amin(dim=(1, 2))
    high = torch.where(inner, scene.denoised, -torch.inf).amax(dim=(1, 2))
    spread = torch.nan_to_num(high - low, nan=0.0, posinf=0.0, neginf=0.0)
    edge = torch.nan_to_num(low if polarity > 0 else high, nan=0.0, posinf=0.0, neginf=0.0)
    one = torch.tensor(float(width), dtype=torch.float64, device=guess.device)
    fit = _Fit(polarity * spread, edge, guess, one)
    if fit_width:
        for _ in range(STEPS):
            fit = _step(scene, fit, guess, free_width=True)
        fit = fit._replace(width=fit.width.clamp(width / 2, width * 2))
    for _ in range(STEPS):
        fit = _step(scene, fit, guess, free_width=False)
    return fit


def _step(scene: _Scene, fit: _Fit, guess: torch.Tensor, *, free_width: bool) -> _Fit:
    """One Gauss-Newton step, moves limited to half a width; the common width takes the columns' median step."""
    shape, _ = _shape(scene, fit.position, fit.width)
    model = fit.amplitude[:, None, None] * shape + fit.background[:, None, None] + _tails(scene, fit)
    parameters = 5 if free_width else 4
    hessian, gradient = _normal(_jacobian(scene, fit)[:, :parameters], scene.weight, scene.denoised - model)
    change = torch.linalg.solve(hessian, gradient)
    most = 0.5 * fit.width
    move = change[:, 2:4].clamp(-most, most)
    position = guess + (fit.position + move - guess).clamp(-scene.radius[:, None], scene.radius[:, None])
    width = fit.width
    if free_width:
        width = width + torch.nanmedian(change[:, 4]).clamp(-0.1 * width, 0.1 * width)
    return _Fit(fit.amplitude + change[:, 0], fit.background + change[:, 1], position, width)


def _posterior(
    scene: _Scene, fit: _Fit, guess: torch.Tensor, fitted: torch.Tensor, polarity: int, share: float
) -> dict[str, Floats]:
    hessian, gradient = _normal(_jacobian(scene, fit)[:, :4], scene.weight, scene.measured - scene.denoised)
    covariance = torch.linalg.inv(hessian)
    step = torch.einsum("nab,nb->na", covariance, gradient)
    bound = torch.diagonal(covariance, dim1=1, dim2=2)
    weight, kappa = _combination(step[fitted, 2:4] ** 2 / bound[fitted, 2:4], share)
    position = torch.where(fitted[:, None], fit.position + weight * step[:, 2:4], guess) + scene.centre
    error = torch.where(fitted[:, None], torch.sqrt(kappa * bound[:, 2:4]), scene.radius[:, None])
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
        "width": fit.width.expand(len(guess)),
        "significance": torch.where(fitted, polarity * fit.amplitude / noise, 0.0),
        "fitted": fitted.to(torch.float64),
    }
    return {name: values[name].cpu().numpy() for name in _NAMES}


def _combination(ratio: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight of the measured step and posterior variance in units of the bound, from d²/C (column, axis)."""
    # Clipped at three standard deviations (0.455 is the median of chi²): one column that the model does not describe
    # must not set all errors.
    scale = torch.clamp(ratio.median() / 0.455, min=1.0) if ratio.numel() else torch.ones((), dtype=ratio.dtype)
    total = torch.minimum(ratio, 9 * scale.to(ratio.device)).sum()
    rho = ((PRIOR_COUNT * (1 - share) + total) / (PRIOR_COUNT + ratio.numel())).clamp(min=1e-6)
    # No start that weighs this frame as it deserves gets below `share`; a smaller value is the noise of rho.
    kappa = (rho - 1 + 2 * share).clamp(min=max(share, 1e-2))
    weight = ((kappa - share) / rho).clamp(0, 1)
    return weight, (kappa + weight**2 * rho - 2 * weight * (kappa - share)).clamp(min=1e-4)
