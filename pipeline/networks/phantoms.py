"""Cheap movies of made-up lattices, for training beside multislice simulations, so that no one crystal is learnt.

Any two lattice vectors, one to three columns per cell, thickness that varies, islands, vacancies, columns that come and
go, a granular film that rearranges itself, uneven light. Nothing here is physics; the variety is the point.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.simulate.motion import drift_path, turning

Image = NDArray[np.float64]


class CleanMovie(NamedTuple):
    """Noise-free frames (t, y, x), relative intensity about 1, and the drift since frame 0, (t, 2) [px]."""

    frames: NDArray[np.float32]
    drift: NDArray[np.float64]


class _Sites(NamedTuple):
    """Columns: position (n, 2) [px] about the middle, strength (t, n)."""

    position: Image
    strength: Image


def phantom(rng: np.random.Generator, *, frames: int, side: int) -> CleanMovie:
    """Draw one movie of `frames` square frames of `side` pixels."""
    spacing = float(np.exp(rng.uniform(np.log(6), np.log(26))))
    step = float(np.exp(rng.uniform(np.log(0.05), np.log(1.5))))
    drift = drift_path(rng, frames, step=step, jitter=float(rng.uniform(0, 0.4)), limit=12.0)
    angle = turning(rng, frames, np.deg2rad(rng.choice([0.0, 0.2, 0.6])))
    sites = _lattice(rng, frames, spacing, reach=0.75 * side)
    lens = _lens(rng, spacing, side)
    film = _film(rng, frames, spacing, side)
    light = 1 + rng.uniform(0, 0.1) * _smooth(rng, side, side / 2)
    vibration = rng.uniform(0, 0.05) * spacing
    images = []
    for t in range(frames):
        c, s = np.cos(angle[t]), np.sin(angle[t])
        moved = sites.position @ np.array([[c, s], [-s, c]]) + drift[t] + side / 2
        moved = moved + rng.normal(0, vibration, moved.shape)
        images.append(np.fft.irfft2(np.fft.rfft2(_splat(moved, sites.strength[t], side)) * lens, s=(side, side)))
    crystal = np.stack(images)
    crystal *= rng.uniform(0.05, 0.4) / max(float(crystal.std()), 1e-9)
    clean = (1 + crystal - crystal.mean() + film) * light
    return CleanMovie(np.maximum(clean, 0.02).astype(np.float32), drift)


def _lattice(rng: np.random.Generator, frames: int, spacing: float, *, reach: float) -> _Sites:
    """A lattice of any kind out to `reach` [px] from the middle, with islands, defects and columns that come and go."""
    kind = rng.choice(["hexagonal", "square", "oblique"], p=[0.4, 0.2, 0.4])
    ratio, corner = {"hexagonal": (1.0, 60.0), "square": (1.0, 90.0)}.get(
        str(kind), (float(rng.uniform(0.7, 1.5)), float(rng.uniform(60, 120)))
    )
    first = rng.uniform(0, 2 * np.pi)
    second = first + np.deg2rad(corner)
    vectors = spacing * np.array([[np.sin(first), np.cos(first)], [ratio * np.sin(second), ratio * np.cos(second)]])
    count = int(np.ceil(2 * reach / (spacing * min(ratio, 1.0))))
    grid = np.stack(np.meshgrid(*[np.arange(-count, count + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    atoms = int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
    parts = [(grid + rng.random(2)) @ vectors for _ in range(atoms)]
    heights = [rng.uniform(0.3, 1) * (1 if rng.random() < 0.9 else -1) for _ in range(atoms)]
    position = np.concatenate(parts)
    height = np.repeat(heights, [len(p) for p in parts])
    near = np.abs(position).max(1) < reach
    position, height = position[near], height[near]
    height = height * _islands(rng, position, reach) * (1 + rng.uniform(0, 0.25) * rng.normal(size=len(height)))
    height[rng.random(len(height)) < rng.uniform(0, 0.06)] *= rng.choice([0.0, 0.5])
    strength = np.repeat(height[None], frames, 0)
    for site in np.flatnonzero(rng.random(len(height)) < rng.uniform(0, 0.08)):
        event = int(rng.integers(1, frames)) if frames > 1 else 0
        strength[event:, site] = 0.0 if rng.random() < 0.5 else height[rng.integers(len(height))]
    return _Sites(position, strength)


def _islands(rng: np.random.Generator, position: Image, reach: float) -> Image:
    """Thickness at each site: uneven everywhere, and in most movies zero outside islands."""
    side = 64
    index = np.clip(((position / reach + 1) / 2 * side).astype(int), 0, side - 1)
    thickness = 1 + 0.3 * _smooth(rng, side, side / 4)[index[:, 0], index[:, 1]]
    if rng.random() < 0.65:
        island = _smooth(rng, side, side / rng.uniform(2, 6)) > rng.uniform(-1, 0.7)
        thickness = thickness * island[index[:, 0], index[:, 1]]
    return np.maximum(thickness, 0)


def _lens(rng: np.random.Generator, spacing: float, side: int) -> Image:
    """Transfer function of one column: a peak of random width, in half of the movies in a ring of the other sign."""
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    width = max(0.8, spacing * rng.uniform(0.1, 0.28))
    lens = np.exp(-2 * (np.pi * width * f) ** 2)
    if rng.random() < 0.5:
        lens = lens - rng.uniform(0.2, 1.0) * np.exp(-2 * (np.pi * width * rng.uniform(1.3, 2.2) * f) ** 2)
    return lens


def _film(rng: np.random.Generator, frames: int, spacing: float, side: int) -> Image:
    """Granular background (t, y, x) that rearranges itself between frames, in half of the movies not everywhere."""
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    centre = rng.uniform(0.4, 1.3) / spacing
    band = np.exp(-0.5 * ((f - centre) / (0.5 * centre)) ** 2)
    memory = rng.choice([0.3, 0.8, 0.95, 1.0])
    state = np.zeros((side, side))
    out = []
    for t in range(frames):
        fresh = rng.normal(size=(side, side))
        state = fresh if t == 0 else memory * state + np.sqrt(1 - memory**2) * fresh
        out.append(np.fft.irfft2(np.fft.rfft2(state) * band, s=(side, side)))
    film = np.stack(out)
    film *= rng.choice([0.0, 1.0], p=[0.25, 0.75]) * rng.uniform(0.01, 0.15) / max(float(film.std()), 1e-9)
    if rng.random() < 0.5:
        film = film * np.clip(0.5 + 8 * _smooth(rng, side, side / 2), 0, 1)
    return film


def _smooth(rng: np.random.Generator, side: int, scale: float) -> Image:
    """Smooth periodic noise (y, x) of unit variance and features of about `scale` pixels."""
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    image = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(side, side))) * np.exp(-((scale * f) ** 2)), s=(side, side))
    return (image - image.mean()) / max(float(image.std()), 1e-9)


def _splat(position: Image, strength: Image, side: int) -> Image:
    """Points (n, 2) [px] as an image: each shared between its four pixels; points outside are left out."""
    inside = ((position >= 0) & (position < side - 1)).all(1)
    position, strength = position[inside], strength[inside]
    corner = np.floor(position).astype(int)
    (fy, fx) = (position - corner).T
    image = np.zeros((side, side))
    for dy, dx, weight in ((0, 0, (1 - fy) * (1 - fx)), (0, 1, (1 - fy) * fx), (1, 0, fy * (1 - fx)), (1, 1, fy * fx)):
        np.add.at(image, (corner[:, 0] + dy, corner[:, 1] + dx), weight * strength)
    return image
