"""What drift is that of: masks by hand, and a particle that moves on a film that moves otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.steps import anchor, drift
from tests.steps.test_drift import PAIRS, SOLVE, WEIGHT, record, walk

SIZE, FRAMES = 192, 14


def discs() -> np.ndarray:
    """Labels (y, x) of a small disc and a large one."""
    y, x = np.mgrid[:160, :160]
    labels = np.zeros((160, 160), np.int32)
    labels[np.hypot(y - 40, x - 40) <= 20] = 1
    labels[np.hypot(y - 110, x - 110) <= 30] = 2
    return labels


def test_a_mask_keeps_what_it_names_and_is_soft_outside_of_it() -> None:
    labels = discs()
    particles, largest, support = (anchor.mask(labels, which) for which in ("particle", "largest", "support"))
    assert (particles[labels > 0] == 1).all() and (largest[labels == 2] == 1).all()
    assert not largest[labels == 1].any() and not support[labels > 0].any()
    np.testing.assert_allclose(particles + support, 1, atol=1e-6)
    for found in (particles, support):
        assert np.abs(np.diff(found, axis=0)).max() < 0.2
    assert particles[40, 40 + 20 + anchor.EDGE + 1] == 0 and support[40, 40 + 20 + anchor.EDGE + 1] == 1
    assert (anchor.mask(labels, "frame") == 1).all()


def test_what_is_not_seen_has_no_mask() -> None:
    nothing = np.zeros((160, 160), np.int32)
    assert not anchor.mask(nothing, "particle").any() and not anchor.mask(nothing, "largest").any()
    assert (anchor.mask(nothing, "support") == 1).all()
    assert not anchor.mask(nothing + 1, "support").any()


def test_the_filter_shows_a_particle_where_counts_do_not() -> None:
    counts, _, _, labels = scene(0, dose=0.5)
    weight = drift.spectral_weight(counts, **WEIGHT)
    shown = anchor.filtered(counts[0], weight[1])
    assert shown.mean() == pytest.approx(counts[0].mean(), rel=1e-5)
    kept = labels[0] > 0
    outside = ~kept & (anchor.mask(labels[0], "support") == 1)
    # The lattice stands out of the film and the noise.
    assert shown[kept].std() > 3 * shown[outside].std()
    assert counts[0][kept].std() < 1.5 * counts[0][outside].std()


def scene(seed: int, *, dose: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Counts of a crystalline disc on a granular film, the paths of film and disc [px], and the disc's labels."""
    rng = np.random.default_rng(seed)
    canvas = SIZE + 64
    y, x = np.mgrid[:canvas, :canvas] - canvas / 2
    lattice = np.cos(2 * np.pi * (0.96 * y + 0.3 * x) / 12) + np.cos(2 * np.pi * (0.96 * x - 0.3 * y) / 11)
    disc = 1 / (1 + np.exp(np.hypot(y, x) - 42))
    k = np.hypot(np.fft.fftfreq(canvas)[:, None], np.fft.fftfreq(canvas))
    film = np.fft.ifft2(np.fft.fft2(rng.normal(size=(canvas, canvas))) * np.exp(-((k / 0.1) ** 2))).real
    paths = walk(rng, FRAMES, 0.5), walk(rng, FRAMES, 0.5) + np.linspace(0, 9, FRAMES)[:, None] * [1, -0.6]
    below, above = (
        record(image, path, SIZE)
        for image, path in zip((1 + 0.05 * film / film.std(), 1 + 0.25 * lattice * disc), paths, strict=True)
    )
    labels = record(1 + disc, paths[1], SIZE) > 1.5
    return rng.poisson(dose * below * above).astype(np.float32), *paths, labels.astype(np.int32)


@pytest.mark.parametrize(("which", "dose"), [("support", 20.0), ("particle", 1.0), ("largest", 6.0)])
def test_drift_is_that_of_what_is_named(which: anchor.Anchor, dose: float) -> None:
    """The disc moves by 9 px on its film; each is followed to a fraction of a pixel, with errors that say so."""
    counts, film, disc, labels = scene(1, dose=dose)
    masks = np.array([anchor.mask(one, which) for one in labels])
    found = drift.estimate(counts, masks, lags=(1, 2, 4, 8), **{**WEIGHT, **PAIRS, **SOLVE})
    wanted, other = (film, disc) if which == "support" else (disc, film)
    off = found.drift - wanted
    assert np.sqrt(np.mean((off - off.mean(0)) ** 2)) < 0.2
    assert np.abs(found.drift - other).max() > 5
    assert 0.3 < np.sqrt(np.mean((off[1:] / found.error[1:]) ** 2)) < 2.5


def test_a_frame_that_does_not_show_it_is_bridged() -> None:
    counts, _, disc, labels = scene(3, dose=20.0)
    masks = np.array([anchor.mask(one, "particle") for one in labels])
    masks[5] = 0
    weight = drift.spectral_weight(counts[masks.any(axis=(1, 2))], masks=masks[masks.any(axis=(1, 2))], **WEIGHT)
    pairs = drift.pair_list(FRAMES, start=0, stop=FRAMES, lags=(1, 2, 4, 8))
    shifts = drift.pair_shifts(counts, pairs, good=masks, weight=weight, **PAIRS)
    np.testing.assert_array_equal(np.isnan(shifts["dy"][:, 0]), (pairs == 5).any(axis=1))
    found = drift.solve_path(FRAMES, pairs, shifts, good=masks.any(axis=(1, 2)), **SOLVE)
    assert np.abs(found.drift - disc).max() < 0.4
