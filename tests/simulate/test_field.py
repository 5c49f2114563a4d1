from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import fourier_shift, gaussian_filter

from pipeline.simulate import imaging, projected
from pipeline.simulate.camera import Camera
from pipeline.simulate.movie import MovieSpec, simulate_movie
from pipeline.simulate.scene import build_scene

FIELD = {"kind": "field", "shape": (160, 160), "sampling": 1.5, "particles": 16, "radius": 15.0, "carbon": 30.0}
FIELD |= {"carbon_cover": 1.0, "frames": 2, "dose": 50.0, "shapes": ("faceted", "sphere", "decahedron")}


def test_particles_are_where_the_masks_say():
    spec = MovieSpec(**FIELD, mode="haadf", events=0, size_spread=0.4)
    movie = simulate_movie(spec, 3)
    assert len(movie.particles) == 16 and not len(movie.columns[0])
    bright = movie.clean[0] > 2 * np.quantile(movie.clean[0], 0.05)
    mask = movie.masks[0] > 0
    assert (bright & mask).sum() / (bright | mask).sum() > 0.85
    radii = movie.particles["radius"]
    assert 8 < radii.min() < 14 and 17 < radii.max() < 34
    focused = simulate_movie(MovieSpec(**FIELD, defocus=0.0, events=0), 3)
    image, mask = focused.clean[0], focused.masks[0] > 0
    assert image[mask].mean() < 0.97 * image[~mask].mean()


def test_particles_may_be_kept_apart_or_overlap():
    apart = simulate_movie(MovieSpec(**{**FIELD, "particles": 30}, gap=6.0, size_spread=0.0, mode="haadf"), 1).particles
    distance = np.hypot(apart["y"][:, None] - apart["y"], apart["x"][:, None] - apart["x"])
    assert distance[~np.eye(len(apart), dtype=bool)].min() >= 2 * 15 + 6
    close = build_scene(MovieSpec(**{**FIELD, "particles": 30}, gap=-10.0, size_spread=0.0), 1).crystal.particles
    distance = np.hypot(close["y"][:, None] - close["y"], close["x"][:, None] - close["x"])
    assert 20 <= distance[~np.eye(len(close), dtype=bool)].min() < 30


def test_a_field_drifts_as_its_truth_says():
    spec = MovieSpec(**FIELD, drift_step=1.5, drift_limit=8.0, carbon_walk=0.0, events=0)
    movie = simulate_movie(spec, 2)
    assert np.abs(movie.drift[1]).max() > 0.5
    back = np.fft.ifft2(fourier_shift(np.fft.fft2(movie.clean[1]), -movie.drift[1])).real
    inner = (slice(8, -8), slice(8, -8))
    assert np.corrcoef(back[inner].ravel(), movie.clean[0][inner].ravel())[0, 1] > 0.95
    assert np.corrcoef(movie.clean[1][inner].ravel(), movie.clean[0][inner].ravel())[0, 1] < 0.9


def test_the_film_changes_as_its_walk_says_and_keeps_its_grain():
    spec = MovieSpec(**{**FIELD, "frames": 40}, carbon_walk=0.2, drift_step=1e-9, drift_jitter=0.0, events=0)
    camera = Camera(build_scene(replace(spec, particles=1, radius=6.0), 1))
    first, near, far = (camera.image(frame, 1500.0) for frame in (0, 2, 20))
    assert np.corrcoef(first.ravel(), near.ravel())[0, 1] == pytest.approx(np.cos(0.4), abs=0.05)
    assert abs(np.corrcoef(first.ravel(), far.ravel())[0, 1]) < 0.1
    assert far.std() == pytest.approx(first.std(), rel=0.05)


def test_particles_appear_and_vanish_as_a_whole():
    spec = MovieSpec(**{**FIELD, "frames": 8}, events=4, mode="haadf", drift_step=1e-9, drift_jitter=0.0)
    movie = simulate_movie(spec, 5)
    assert movie.events
    for event in movie.events:
        before, after = ((movie.masks[event.frame - k] == event.column + 1).any() for k in (1, 0))
        assert (before, after) == ((False, True) if event.kind == "appear" else (True, False))


@pytest.mark.parametrize("defocus", [300.0, 1500.0])
def test_the_projected_object_images_like_multislice_where_it_is_used(defocus, monkeypatch):
    """One gold particle of 28 Å off its zones, losses left out: the same image beyond 1 Å, within some percent."""
    monkeypatch.setattr(projected, "LOSS", 0.0)
    spec = MovieSpec(
        kind="field", shape=(96, 96), frames=1, sampling=0.5, particles=1, radius=14.0, size_spread=0.0, carbon=0.0,
        shapes=("sphere",), events=0,
    )  # fmt: skip
    scene = build_scene(spec, 1)
    scene.there[:] = True
    place = scene.crystal.positions - [*scene.crystal.positions[:, :2].mean(0), scene.crystal.positions[:, 2].min()]
    scene = replace(scene, crystal=replace(scene.crystal, positions=place))
    camera = Camera(scene)
    atoms = place + np.array([camera.middle, camera.middle, 0.0])
    wave = imaging.exit_wave(atoms, scene.crystal.numbers, gpts=2 * camera.gpts, sampling=0.25, energy=300.0)
    exact = camera.on_detector(projected.onto_detector(imaging.hrtem(wave, lens=spec.lens, defocus=defocus)))
    quick = camera.image(0, defocus)
    smooth = [gaussian_filter(image, 2.0)[8:-8, 8:-8] for image in (exact, quick)]
    assert np.corrcoef(*(image.ravel() for image in smooth))[0, 1] > 0.99
    assert smooth[1].std() == pytest.approx(smooth[0].std(), rel=0.06)
