"""Particles: ellipses whose answer is known, particles that touch, and what every image must fulfil."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.steps import particles

SETTINGS = {"threshold": 0.5, "min_area": 30, "max_hole": 30, "neck": 0.75}


def ellipse(shape, centre, axes, angle) -> np.ndarray:
    """Probability (y, x): 1 inside an ellipse of half axes `axes` [px] whose first lies at `angle` from x towards y."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    y, x = y - centre[0], x - centre[1]
    along, across = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    return ((along / axes[0]) ** 2 + (across / axes[1]) ** 2 <= 1).astype(np.float32)


def circumference(a: float, b: float) -> float:
    """Ramanujan's second formula for an ellipse of half axes a and b."""
    h = ((a - b) / (a + b)) ** 2
    return np.pi * (a + b) * (1 + 3 * h / (10 + np.sqrt(4 - 3 * h)))


@pytest.mark.parametrize("angle", [-1.2, -0.3, 0.0, 0.7, np.pi / 2])
def test_an_ellipse_is_measured(angle: float) -> None:
    sampling, (a, b) = 0.7, (40.0, 18.0)
    image = 0.9 * ellipse((160, 200), (80.3, 99.6), (a, b), angle)
    labels = particles.label(image, **SETTINGS)
    found = particles.measure(labels, image, sampling=sampling)
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(found, 1)
    assert (found["y"][0], found["x"][0]) == pytest.approx((80.3, 99.6), abs=0.1)
    assert found["area"][0] == pytest.approx(np.pi * a * b * sampling**2, rel=0.01)
    assert found["equivalent_diameter"][0] == pytest.approx(2 * np.sqrt(a * b) * sampling, rel=0.01)
    assert found["major_axis"][0] == pytest.approx(2 * a * sampling, rel=0.01)
    assert found["minor_axis"][0] == pytest.approx(2 * b * sampling, rel=0.01)
    assert found["perimeter"][0] == pytest.approx(circumference(a, b) * sampling, rel=0.03)
    assert found["probability"][0] == pytest.approx(0.9)
    assert found["contact"][0] == particles.FREE
    turned = (found["orientation"][0] - angle + np.pi / 2) % np.pi - np.pi / 2
    assert turned == pytest.approx(0, abs=0.02)
    assert -np.pi / 2 < found["orientation"][0] <= np.pi / 2


def discs(*centres_and_radii, shape=(120, 160)) -> np.ndarray:
    return np.max([ellipse(shape, (y, x), (r, r), 0.0) for y, x, r in centres_and_radii], axis=0)


def test_particles_that_touch_are_parted_and_say_so() -> None:
    image = discs((60, 40, 22), (60, 76, 16), (20, 130, 12))
    labels = particles.label(image, **SETTINGS)
    assert labels.max() == 3
    at = [labels[60, 30], labels[60, 82], labels[20, 130]]
    assert sorted(at) == [1, 2, 3]
    contact = particles.contact(labels, 3)
    assert [contact[i - 1] for i in at] == [particles.TOUCHING, particles.TOUCHING, particles.FREE]
    # The seam lies between the two centres, so each has about the area of its disc.
    areas = particles.measure(labels, image, sampling=1.0)["area"]
    assert areas[at[0] - 1] == pytest.approx(np.pi * 22**2, rel=0.05)
    assert areas[at[1] - 1] == pytest.approx(np.pi * 16**2, rel=0.05)


def test_how_narrow_a_neck_parts_is_a_setting() -> None:
    image = discs((60, 50, 20), (60, 82, 20))  # joined along 24 px of 40: a neck of 0.6
    assert particles.label(image, **{**SETTINGS, "neck": 0.7}).max() == 2
    assert particles.label(image, **{**SETTINGS, "neck": 0.5}).max() == 1


def test_rough_outlines_and_long_shapes_stay_whole() -> None:
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(size=(160, 200)), 2.5)
    image = ellipse((160, 200), (80, 100), (70, 25), 0.4)
    rough = ndimage.gaussian_filter(image, 3) + 0.25 * noise / noise.std() * 0.3
    assert particles.label(rough, **SETTINGS).max() == 1


def test_border_contact() -> None:
    image = discs((0, 30, 12), (60, 60, 12), (110, 150, 20), (100, 120, 14))
    labels = particles.label(image, **SETTINGS)
    contact = particles.contact(labels, labels.max())
    at = [labels[3, 30], labels[60, 60], labels[110, 155], labels[100, 115]]
    assert [contact[i - 1] for i in at] == [
        particles.BORDER, particles.FREE, particles.BORDER + particles.TOUCHING, particles.TOUCHING,
    ]  # fmt: skip


def test_holes_and_specks() -> None:
    image = discs((60, 60, 30))
    image[58:62, 58:62] = 0  # 16 px: filled
    image[70:80, 55:65] = 0  # 100 px: a hole that stays
    image[5:10, 5:10] = 1  # 25 px: too small
    labels = particles.label(image, **SETTINGS)
    assert labels.max() == 1 and labels[60, 60] == 1 and labels[75, 60] == 0 and labels[7, 7] == 0
    assert particles.label(image, **{**SETTINGS, "min_area": 25})[7, 7] == 1
    image[0:3, 0:160] = 1
    image[0:3, 50:53] = 0  # open to the border: no hole
    assert particles.label(image, **{**SETTINGS, "min_area": 25})[1, 51] == 0


def test_nothing_is_found_in_nothing() -> None:
    for image in (np.zeros((30, 40)), np.full((30, 40), np.nan)):
        labels = particles.label(image, **SETTINGS)
        assert not labels.any()
        found = particles.measure(labels, image, sampling=1.0)
        assert {len(values) for values in found.values()} == {0}


def test_points_know_their_particle() -> None:
    labels = particles.label(discs((60, 40, 20), (30, 120, 15)), **SETTINGS)
    y, x = np.array([60.2, 30.4, 5.0, -3.0, 500.0]), np.array([40.0, 119.6, 5.0, 10.0, 10.0])
    assert particles.particle_of(labels, y, x).tolist() == [1, 0, -1, -1, -1]
    # Discs of 20 and 15 px: 3.5 px beyond the first, half a pixel beyond the second, far from both.
    y, x = np.array([60.0, 14.5, 100.0]), np.array([63.5, 120.0, 100.0])
    assert particles.particle_of(labels, y, x).tolist() == [-1, -1, -1]
    assert particles.particle_of(labels, y, x, reach=4.0).tolist() == [1, 0, -1]
    assert particles.particle_of(labels, y[:0], x[:0], reach=4.0).tolist() == []


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(1, 120))
def test_labels_are_what_they_promise(seed: int, neck: float, min_area: int) -> None:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(50, 60)), 3)
    image = noise / noise.std() / 4 + 0.5
    labels = particles.label(image, threshold=0.5, min_area=min_area, max_hole=0, neck=neck)
    count = labels.max()
    assert sorted(np.unique(labels)) == list(range(labels.min(), count + 1))
    mask = image >= 0.5
    pieces, pieces_count = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(pieces.ravel(), minlength=pieces_count + 1)
    # Parting changes no pixel, and leaves out only what was too small as a whole.
    assert np.array_equal(labels > 0, mask & (sizes[pieces] >= min_area))
    assert all((labels == i).sum() >= min_area for i in range(1, count + 1))
    centres = [ndimage.center_of_mass(labels == i) for i in range(1, count + 1)]
    assert centres == sorted(centres)
    turned = particles.label(image[::-1, ::-1], threshold=0.5, min_area=min_area, max_hole=0, neck=1e-6)
    assert turned.max() == particles.label(image, threshold=0.5, min_area=min_area, max_hole=0, neck=1e-6).max()


def test_large_regions_are_parted_on_a_coarser_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parting on every third pixel finds the same particles, but for pixels at their seams."""
    image = discs((60, 40, 22), (60, 76, 16), (20, 130, 12))
    fine = particles.label(image, **SETTINGS)
    monkeypatch.setattr(particles, "PART_PIXELS", 500)
    coarse = particles.label(image, **SETTINGS)
    assert np.array_equal(coarse > 0, fine > 0)
    assert coarse.max() == 3
    assert (coarse != fine).sum() <= 60
