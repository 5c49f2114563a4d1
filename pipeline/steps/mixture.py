"""Species from column intensities alone: a mixture of normal distributions, fitted without any network."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.errors import SettingsError

Floats = NDArray[np.float64]

STEPS = 500
TOLERANCE = 1e-9  # of the mean log-likelihood per column, at which the fit has converged
LEAST_WIDTH = 0.02  # of the spread of all intensities: a class narrower than this has collapsed on few columns


class Mixture(NamedTuple):
    """Classes in the order of their mean intensity, and what each column is.

    mean, sigma [unit of the intensities], share (class); probabilities (column, class), rows sum to 1, NaN where the
    intensity is not finite; bic: Bayes' information criterion, smaller is better.
    """

    mean: Floats
    sigma: Floats
    share: Floats
    probabilities: Floats
    bic: float


def mixture(
    intensities: Floats, *, classes: int | None, most: int, common_width: bool = False, least: int = 8
) -> Mixture:
    """Normal distributions that explain column intensities (column,), by expectation and maximisation.

    classes: how many; None: the number up to `most` with the smallest BIC. common_width: all classes scatter alike, as
    where noise dominates. Each number is begun from several splits of the sorted intensities; no random numbers.
    Raises SettingsError for fewer than `least` finite intensities per class.
    """
    values = np.asarray(intensities, float)
    finite = np.isfinite(values)
    used = values[finite]
    asked = 1 if classes is None else classes
    if asked < 1 or len(used) < least * asked:
        raise SettingsError(
            f"{len(used)} column intensities for {asked} class(es); expected at least {least} for each of at least one"
        )
    numbers = (asked,) if classes is not None else range(1, max(1, min(most, len(used) // least)) + 1)
    found = [_best(used, number, common_width) for number in numbers]
    mean, sigma, share, _, bic = min(found, key=lambda item: item[4])
    probabilities = np.full((len(values), len(mean)), np.nan)
    probabilities[finite] = _responsibilities(used, mean, sigma, share)[0]
    return Mixture(mean, sigma, share, probabilities, bic)


def _best(values: Floats, number: int, common_width: bool) -> tuple[Floats, Floats, Floats, float, float]:
    """The likeliest fit of this many classes: mean, sigma, share, log-likelihood, BIC."""
    fits = [_fitted(values, start, common_width) for start in _starts(values, number)]
    best = max(fits, key=lambda fit: fit[3])
    free = 2 * number - 1 + (1 if common_width else number)
    return (*best, free * float(np.log(len(values))) - 2 * best[3])


def _starts(values: Floats, number: int) -> list[Floats]:
    """First means: by equal counts, by equal steps of intensity, and with one class for the largest few per cent."""
    low, high = np.quantile(values, [0.01, 0.99])
    shares = (np.arange(number) + 0.5) / number
    starts = [np.quantile(values, shares), low + (high - low) * shares]
    for tail in (0.01, 0.05, 0.15):
        inner = (np.arange(max(number - 1, 1)) + 0.5) / max(number - 1, 1) * (1 - tail)
        starts.append(np.quantile(values, np.append(inner, 1 - tail / 2)[:number]))
        starts.append(np.quantile(values, np.append(tail / 2, tail + inner)[:number]))
    return starts


def _fitted(values: Floats, start: Floats, common_width: bool) -> tuple[Floats, Floats, Floats, float]:
    spread = float(values.std()) or 1.0
    least = LEAST_WIDTH * spread
    mean, number = start.copy(), len(start)
    sigma = np.full(number, max(spread / number, least))
    share = np.full(number, 1 / number)
    before = -np.inf
    for _ in range(STEPS):
        belongs, likelihood = _responsibilities(values, mean, sigma, share)
        if likelihood - before < TOLERANCE * len(values):
            break
        before = likelihood
        weight = belongs.sum(0) + 1e-9
        mean = (belongs * values[:, None]).sum(0) / weight
        square = (belongs * (values[:, None] - mean) ** 2).sum(0)
        sigma = np.sqrt(np.full(number, square.sum() / weight.sum()) if common_width else square / weight)
        sigma = np.maximum(sigma, least)
        share = weight / weight.sum()
    order = np.argsort(mean, kind="stable")
    return mean[order], sigma[order], share[order], likelihood


def _responsibilities(values: Floats, mean: Floats, sigma: Floats, share: Floats) -> tuple[Floats, float]:
    """Probabilities (column, class), and the log-likelihood of all columns."""
    logs = np.log(share) - np.log(sigma * np.sqrt(2 * np.pi)) - 0.5 * ((values[:, None] - mean) / sigma) ** 2
    top = logs.max(1, keepdims=True)
    total = top + np.log(np.exp(logs - top).sum(1, keepdims=True))
    return np.exp(logs - total), float(total.sum())
