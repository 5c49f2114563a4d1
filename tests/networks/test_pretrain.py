from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.networks import shipped
from pipeline.networks.adapt import untrained
from pipeline.networks.phantoms import CleanMovie, phantom
from pipeline.networks.pretrain import PretrainSettings, card_figures, learn_errors, pretrain
from pipeline.networks.pretrain_movies import draw, known, movie_bank, random_spec

FEW = {"simulated": 0, "phantoms": 4, "seed": 5}
SMALL = {"frames": 3, "channels": 16, "dilations": [2]}


def settings(**changes):
    few = {"steps": 60, "crop": 32, "batch": 4, "learning_rate": 3e-3, **FEW}
    return PretrainSettings(**{**few, **changes})


def test_phantoms_are_reproducible_movies_of_mean_one():
    for seed in range(12):
        first, second = (phantom(np.random.default_rng(seed), frames=3, side=64) for _ in range(2))
        assert np.array_equal(first.frames, second.frames)
        assert first.frames.shape == (3, 64, 64)
        assert first.frames.min() > 0
        assert first.frames.mean() == pytest.approx(1, abs=0.25)
        assert first.drift[0].tolist() == [0, 0]


def test_phantoms_move_as_their_drift_says():
    """The columns of frame 0, moved by the drift, are those of the last frame."""
    found = 0
    for seed in range(30):
        made = phantom(np.random.default_rng(seed), frames=6, side=96)
        dy, dx = np.round(made.drift[-1]).astype(int)
        if max(abs(dy), abs(dx)) < 3 or max(abs(dy), abs(dx)) > 20:
            continue
        a, b = made.frames[0], made.frames[-1]
        inner = (slice(24, -24), slice(24, -24))
        still = np.corrcoef(a[inner].ravel(), b[inner].ravel())[0, 1]
        moved = np.corrcoef(np.roll(a, (dy, dx), (0, 1))[inner].ravel(), b[inner].ravel())[0, 1]
        found += moved > still
    assert found >= 3


def test_benchmark_materials_are_never_drawn():
    specs = [random_spec(np.random.default_rng(seed)) for seed in range(300)]
    assert {s.kind for s in specs} == {"nanoparticle", "graphene", "hbn", "carbon", "vacuum"}
    assert not {"Au", "Ag"} & {s.element for s in specs}


def test_drawn_counts_have_the_clean_frame_as_their_mean():
    flat = known(CleanMovie(np.ones((8, 40, 40), dtype=np.float32), np.zeros((8, 2))))
    rng = np.random.default_rng(0)
    for _ in range(20):
        part = draw([flat], rng, frames=3, crop=32, batch=2)
        mean, variance = (float(v) for v in part.level)
        torch.testing.assert_close(part.target, torch.full_like(part.target, mean))
        seen = part.stack[part.valid]
        assert float(seen.mean()) == pytest.approx(mean, abs=6 * (variance / len(seen)) ** 0.5 + 0.1 * mean)
        assert (part.stack[~part.valid] == part.level[0]).all()
        assert float(part.context.std()) < 0.05 * variance**0.5


def test_drawn_context_is_the_filtered_mean_of_the_neighbours():
    """It resembles the lattice far better than the neighbours themselves, and turns with the crop."""
    y, x = np.mgrid[:96, :96]
    clean = (1 + 0.3 * np.cos(0.7 * x + 0.2 * y) + 0.2 * np.cos(0.9 * y)).astype(np.float32)
    bank, rng = [known(CleanMovie(np.repeat(clean[None], 8, 0), np.zeros((8, 2))))], np.random.default_rng(1)
    alike = []
    for _ in range(200):
        part = draw(bank, rng, frames=3, crop=48, batch=2)
        neighbours, both = part.stack[:, [0, 2]].mean(1), part.valid.all()
        if both and 0.1 < float(part.level[0]) < 1 and part.context.any():  # faint lattices are given no filter
            pairs = [np.corrcoef(one.ravel(), part.target.ravel())[0, 1] for one in (part.context, neighbours)]
            alike.append(pairs)
    assert len(alike) > 30
    filtered, plain = np.median(alike, axis=0)
    assert filtered > 0.85 > 0.6 > plain


def test_a_network_learns_how_far_off_it_is_and_estimates_as_before():
    """Of what it never saw: errors are those stated, at every dose, within a factor of three after so few steps."""
    lines: list[str] = []
    few = settings(steps=400, phantoms=8)
    told = pretrain({**SMALL, "errors": True}, few, report=lines.append)
    before = {name: tensor.clone() for name, tensor in told.state_dict().items()}
    learn_errors(told, movie_bank(**FEW, report=lines.append), settings(steps=5), report=lines.append)
    changed = {name for name, tensor in told.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"error.weight", "error.bias"}
    told.load_state_dict(before)
    others, rng = movie_bank(simulated=0, phantoms=6, seed=9, report=lines.append), np.random.default_rng(2)
    ratios = []
    with torch.no_grad():
        for _ in range(150):
            part = draw(others, rng, frames=3, crop=64, batch=2)
            estimate, error = told.with_errors(part.stack, part.valid, part.level, part.context).unbind(1)
            ratios.append((float(part.level[0]), float(((estimate - part.target) / error).square().mean())))
    for low, high in ((0.03, 0.3), (0.3, 3.0), (3.0, 30.0)):
        assert 0.1 < np.mean([ratio for dose, ratio in ratios if low < dose < high]) < 2.5


def test_pretraining_is_reproducible_and_learns():
    lines: list[str] = []
    first, second = (pretrain(SMALL, settings(), report=lines.append) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    start = pretrain(SMALL, settings(steps=0), report=lines.append)
    rng = np.random.default_rng(1)
    bank = movie_bank(**FEW, report=lines.append)
    errors = []
    parts = [draw(bank, rng, frames=3, crop=64, batch=4) for _ in range(30)]
    with torch.no_grad():
        for network in (start, first):
            errors.append(
                np.mean(
                    [
                        float((network(p.stack, p.valid, p.level) / p.level[0] - p.target / p.level[0]).var())
                        for p in parts
                    ]
                )
            )
    assert errors[1] < 0.8 * errors[0]


def test_steps_of_ones_own_are_all_that_is_trained():
    assert shipped.denoise_settings("large", None) == shipped.DENOISE["large"]
    for tier, usual in shipped.DENOISE.items():
        assert shipped.denoise_settings(tier, 7) == usual._replace(steps=7, again=0)


def test_a_second_round_begins_where_the_first_ended():
    few = settings(phantoms=1)
    first, both = (pretrain(SMALL, few._replace(again=again), report=lambda _: None) for again in (0, 20))

    def apart(one, other):
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return sum(float((a - b).detach().square().sum()) for a, b in pairs)

    assert 0 < apart(first, both) < 0.2 * apart(untrained("blindspot", SMALL, seed=few.seed), both)


@pytest.mark.slow
def test_the_card_states_quality_by_dose_and_what_becomes_of_pure_noise():
    figures = card_figures(pretrain(SMALL, settings(steps=150), report=lambda _: None), seed=3)
    assert figures["psnr_5"] > figures["psnr_0.05"]
    assert 0 <= figures["noise_std_5"] < 0.3
    assert figures["noise_ring_0.2"] >= 1
