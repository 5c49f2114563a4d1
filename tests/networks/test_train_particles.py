from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.networks import particle_check, particle_data, train_particles
from pipeline.networks.particle_data import Example, ParticleSpec, prepared, random_movie, sample, simulate
from pipeline.steps import segment
from schemas.errors import SettingsError

SMALL = ParticleSpec(
    seed=5, scenes=4, denoised=2, check_scenes=2, steps=60, batch=4, check_every=30, edge=120, fine=0.4, crop=60,
    rate=0.02, width=4, dilations=(1, 2, 4),
)  # fmt: skip


@pytest.fixture(scope="module")
def examples():
    return simulate(SMALL, range(6))


class Bright(nn.Module):
    """Says that what is brighter than the mean by more than a unit is a particle."""

    receptive_radius = 0

    def forward(self, images):
        return images - 1.0


def disc(centre, radius, shape=(80, 90)):
    rows, cols = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(rows - centre[0], cols - centre[1]) < radius


def test_specimens_of_all_kinds_are_drawn():
    movies = [random_movie(np.random.default_rng(seed), SMALL) for seed in range(150)]
    assert {m.kind for m in movies} >= {"nanoparticle", "carbon", "vacuum", "mos2", "graphene"}
    tilts = [t for m in movies for t in m.tilts or ()]
    assert 0.0 in tilts and 15 < max(tilts) <= 20
    assert {m.element for m in movies if m.kind == "nanoparticle"} >= {"Au", "Pt", "Pd"}
    assert {m.mode for m in movies} == {"hrtem", "haadf"}


def test_the_same_number_gives_the_same_images(examples):
    again = simulate(SMALL, [3])
    assert any(np.array_equal(again[0].image, example.image) for example in examples)
    assert all(e.image.shape == e.mask.shape and abs(e.image.mean() - 1) < 0.35 for e in examples)
    assert any(e.mask.any() for e in examples)


def test_raw_frames_have_the_noise_of_their_dose_and_denoised_ones_less():
    rng = np.random.default_rng(0)
    flat = np.ones((200, 200), np.float32)
    frames = [particle_data.frame_of(flat, rng, sampling=0.5, dose=100.0, raw=True) for _ in range(12)]
    assert np.median([f.std() for f in frames]) == pytest.approx(0.2, rel=0.05)  # 25 electrons in each pixel
    assert all(abs(f.mean() - 1) < 0.01 for f in frames)
    smooth = [particle_data.frame_of(flat, rng, sampling=0.5, dose=100.0, raw=False) for _ in range(12)]
    assert max(f.std() for f in smooth) < 0.15


@pytest.mark.parametrize("raw", [True, False])
def test_targets_lie_where_particles_are_whatever_the_detector(raw):
    """A bright disc is where the target says, on the network's grid, also when frames are binned at random."""
    mask = disc((40, 30), 18)
    example = Example((1 + 3.0 * mask).astype(np.float32), mask, 0.6)
    for seed in range(12):
        made = prepared(example, np.random.default_rng(seed), SMALL, dose=1e5, raw=raw)
        assert made.image.shape == made.target.shape and abs(made.image.shape[1] - 80 * 0.6 / SMALL.sampling) < 4
        true = made.target[0].numpy() > 0.5
        bright = made.image[0].numpy() > 0.5 * np.median(made.image[0].numpy()[true])
        assert (bright & true).sum() / (bright | true).sum() > 0.85


def test_a_sample_is_a_crop_with_its_target(examples):
    for seed in range(5):
        image, target = sample(examples, np.random.default_rng(seed), SMALL)
        assert image.shape == target.shape == (1, 60, 60)
        assert image.dtype == target.dtype == torch.float32 and target.min() >= 0 and target.max() <= 1


def test_training_learns_and_is_repeatable():
    mask = disc((40, 30), 18, (120, 120))
    examples = [Example((1 - 0.3 * np.roll(mask, k, 1)).astype(np.float32), np.roll(mask, k, 1), 0.4) for k in (0, 30)]
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_particles, "simulate", lambda spec, numbers: examples)
        found = [
            train_particles.fitted(
                train_particles.untrained(SMALL), examples, SMALL, frames=(), folder=None, report=lines.append
            )
            for _ in range(2)
        ]
    for one, two in zip(found[0].network.parameters(), found[1].network.parameters(), strict=True):
        assert torch.equal(one, two)
    frame = prepared(examples[0], np.random.default_rng(0), SMALL, dose=400.0, raw=True)
    before = train_particles.validate(train_particles.untrained(SMALL), [train_particles.Check(frame, 400.0)])
    assert before["iou_400"] < 0.35 < 0.6 < found[0].best["iou_400"]


def test_validation_scores_overlap_and_wrong_marks():
    mask = torch.from_numpy(disc((40, 30), 18).astype(np.float32))[None]
    half = mask.clone()
    half[:, 40:] = 0
    checks = [
        train_particles.Check(particle_data.Prepared(2.0 * mask, mask), 30.0),
        train_particles.Check(particle_data.Prepared(2.0 * half, mask), 100.0),
        train_particles.Check(particle_data.Prepared(2.0 * mask, torch.zeros_like(mask)), 100.0),
    ]
    found = train_particles.validate(Bright(), checks)
    assert found["iou_30"] == 1.0 and found["iou_100"] == pytest.approx(0.49, abs=0.03)
    assert found["false"] == pytest.approx(float(mask.mean()))
    assert found["score"] == pytest.approx((1.0 + found["iou_100"]) / 2 - found["false"])


def test_frames_are_judged_particle_by_particle():
    truth = np.zeros((80, 90), np.uint16)
    truth[disc((25, 25), 12)], truth[disc((60, 70), 10)], truth[disc((5, 80), 2)] = 1, 2, 3
    perfect = particle_check.judge((truth > 0).astype(float), truth, sampling=1.0)
    assert perfect == (1.0 - 13 / (truth > 0).sum(), 2, 2, 0) or perfect.iou > 0.97
    assert (perfect.demanded, perfect.detected, perfect.spurious) == (2, 2, 0)
    one = disc((25, 25), 12) | disc((25, 70), 9)
    assert particle_check.judge(one.astype(float), truth, sampling=1.0)[1:] == (2, 1, 1)
    shrunk = disc((25, 25), 7) | disc((60, 70), 10)
    assert particle_check.judge(shrunk.astype(float), truth, sampling=1.0)[1:] == (2, 1, 0)
    nothing = particle_check.judge(np.zeros((80, 90)), np.zeros((80, 90), np.uint16), sampling=1.0)
    assert np.isnan(nothing.iou) and nothing[1:] == (0, 0, 0)


def test_results_of_frames_are_summed():
    verdict = particle_check.Verdict
    total = particle_check.summed([verdict(0.8, 2, 1, 0), verdict(1.0, 1, 1, 2), verdict(float("nan"), 0, 0, 1)])
    assert total == (pytest.approx(0.9), 3, 2, 3, 3)


def test_prepared_frames_keep_units_of_contrast_and_ignore_intensity():
    frame = torch.ones(50, 60)
    frame[20:30] = 1.1
    made = segment.prepare_particles(7.0 * frame, sampling=0.6, model_sampling=0.6)
    assert torch.allclose(made, segment.prepare_particles(frame, sampling=0.6, model_sampling=0.6), atol=1e-4)
    assert float(made[25, 30] - made[5, 30]) == pytest.approx(1.0, abs=0.05)
    assert segment.prepare_particles(frame, sampling=0.3, model_sampling=0.6).shape == (25, 30)


@pytest.mark.parametrize("sampling", [0.3, 0.6, 1.1])
def test_particles_are_marked_on_the_detectors_grid(sampling):
    mask = disc((40, 30), 18)
    frames = np.stack([1 + 3.0 * mask, 1 + 3.0 * np.roll(mask, 20, 1)]).astype(np.float32)
    options = {"sampling": sampling, "model_sampling": 0.6, "halo": None, "batch": 1}
    whole = segment.particle_probability(Bright(), frames, window=None, **options)
    for found, true in zip(whole > 0.5, (mask, np.roll(mask, 20, 1)), strict=True):
        assert (found & true).sum() / (found | true).sum() > 0.85
    assert np.abs(segment.particle_probability(Bright(), frames, window=8, **options) - whole).max() < 1e-5


def test_samplings_and_specifications_that_cannot_be_are_refused():
    with pytest.raises(SettingsError, match=r"sampling is 3\.0 Å/px; expected 0\.03 to 1\.2 Å/px to find particles"):
        segment.particle_probability(
            Bright(), np.ones((1, 8, 8)), sampling=3.0, model_sampling=0.6, window=None, halo=None, batch=1
        )
    with pytest.raises(SettingsError, match="width of the training is 0; expected a positive number"):
        replace(SMALL, width=0)
