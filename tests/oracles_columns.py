"""Slow, obvious answers for columns: pictures of Gaussians, a scipy fit, the Cramér-Rao bound, greedy suppression."""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import least_squares


def gaussians(shape, columns, *, width, background):
    """Sum of isotropic Gaussians: columns holds rows (y, x, amplitude)."""
    rows, places = np.mgrid[: shape[0], : shape[1]]
    image = np.full(shape, float(background))
    for y, x, amplitude in columns:
        image += amplitude * np.exp(-((rows - y) ** 2 + (places - x) ** 2) / (2 * width**2))
    return image


def hexagonal(size, spacing, *, radius, jitter, generator):
    """Rows (y, x) of a close-packed patch around the middle of a square frame."""
    steps = np.arange(-size, size)
    first, second = np.meshgrid(steps, steps, indexing="ij")
    y = size / 2 + first * spacing * np.sqrt(3) / 2
    x = size / 2 + (second + 0.5 * (first % 2)) * spacing
    inside = np.hypot(y - size / 2, x - size / 2) <= radius
    return np.column_stack([y[inside], x[inside]]) + generator.normal(0, jitter, (int(inside.sum()), 2))


def fit_one(image, variance, start, *, width, radius):
    """Amplitude, background, y, x of one Gaussian of known width in a round window (rim of one pixel), by scipy."""
    rows, places = np.mgrid[: image.shape[0], : image.shape[1]]
    rim = np.clip(radius + 0.5 - np.hypot(rows - start[0], places - start[1]), 0, 1)
    scale = np.sqrt(rim / variance)

    def residual(p):
        model = p[0] * np.exp(-((rows - p[2]) ** 2 + (places - p[3]) ** 2) / (2 * width**2)) + p[1]
        return ((model - image) * scale).ravel()

    guess = [image.max() - np.median(image), np.median(image), *start]
    return least_squares(residual, guess, xtol=1e-14, ftol=1e-14, gtol=1e-14).x


def bound(column, *, width, background, radius, readout_variance=0.0):
    """Standard errors (amplitude, background, y, x) from the Fisher information, derivatives by differences."""
    y, x, amplitude = column
    size = int(2 * radius + 7)
    origin = np.array([round(y) - size // 2, round(x) - size // 2])

    def model(p):
        return gaussians((size, size), [(p[2] - origin[0], p[3] - origin[1], p[0])], width=width, background=p[1])

    truth = np.array([amplitude, background, y, x])
    step = 1e-4
    slopes = [(model(truth + step * e) - model(truth - step * e)) / (2 * step) for e in np.eye(4)]
    rows, places = np.mgrid[:size, :size] + origin[:, None, None]
    window = np.hypot(rows - y, places - x) <= radius
    variance = model(truth) + readout_variance
    fisher = [[np.sum((a * b / variance)[window]) for b in slopes] for a in slopes]
    return np.sqrt(np.diag(np.linalg.inv(fisher)))


def suppress(points, heights, distance):
    """Greedy suppression one by one: indices kept, ties to the lower y, then the lower x."""
    kept = []
    for index in sorted(range(len(points)), key=lambda i: (-heights[i], points[i][0], points[i][1])):
        if all(np.hypot(*(points[index] - points[other])) >= distance for other in kept):
            kept.append(index)
    return sorted(kept, key=lambda i: (points[i][0], points[i][1]))


def best_matching(detected, true, max_distance):
    """(pairs, total distance) of the best one-to-one matching, by trying all."""
    detected, true = (detected, true) if len(detected) <= len(true) else (true, detected)
    best = (0, 0.0)
    for partners in itertools.permutations(range(len(true)), len(detected)):
        distances = [np.hypot(*(a - true[j])) for a, j in zip(detected, partners, strict=True)]
        near = [d for d in distances if d <= max_distance]
        if (-len(near), sum(near)) < (-best[0], best[1]):
            best = (len(near), sum(near))
    return best
