from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from pipeline.networks import train_columns
from pipeline.networks.segment_data import degrade, network_input, training_sample
from pipeline.networks.segment_scenes import Example, examples_of, labelled, nearest, singles
from pipeline.networks.train_columns import ColumnTraining
from pipeline.networks.weights import load_weights
from pipeline.simulate.movie import MovieSpec
from pipeline.simulate.scene import COLUMN_DTYPE
from pipeline.steps.segment import prepare
from schemas.errors import SettingsError

TINY = ColumnTraining(
    seed=3, scenes=6, check_scenes=3, steps=40, batch=2, rate=2e-2, check_every=20, edge=96, crop=64, width=4,
    dilations=(1, 2, 2),
)  # fmt: skip
SPOTS = MovieSpec(sampling=0.2)


def silent(line):
    pass


@pytest.fixture(scope="module")
def examples():
    return train_columns.simulate(TINY, range(14), silent)


def three_columns():
    truth = np.zeros(3, COLUMN_DTYPE)
    truth["y"], truth["x"] = (10.0, 40.0, 20.0), (12.0, 44.0, 50.0)
    truth["visible"] = (True, False, True)
    return truth


def test_targets_mark_columns_and_leave_thin_ones_unknown_and_tilted_ones_absent():
    image = np.zeros((60, 60), np.float32)
    image[10, 12] = image[20, 50] = 1.0
    tilted = np.array([False, False, True])
    example = labelled(image, three_columns(), 1, sampling=0.2, spec=SPOTS, tilted=tilted)
    assert example.target[10, 12] == 1 and example.target[40, 44] == 0 and example.target[20, 50] == 0
    assert example.known[10, 12] and not example.known[40, 44] and example.known[20, 50] and example.known[25, 25]
    assert example.crystal[40, 44] and not example.crystal[25, 28]
    assert example.points.tolist() == [[10.0, 12.0]]


def test_columns_of_the_wrong_sign_are_unknown():
    image = np.ones((60, 60), np.float32)
    image[10, 12] = image[20, 50] = 0.0
    example = labelled(image, three_columns(), 1, sampling=0.2, spec=SPOTS, tilted=np.zeros(3, bool))
    assert not len(example.points) and not example.known[10, 12]


def test_nearest_equals_brute_force():
    rng = np.random.default_rng(0)
    y, x = rng.uniform(0, 50, 6), rng.uniform(0, 40, 6)
    grid = np.stack(np.mgrid[:50, :40], -1).reshape(-1, 1, 2)
    slow = np.linalg.norm(grid - np.column_stack([y, x]), axis=2).min(1).reshape(50, 40)
    fast = nearest((50, 40), y, x)
    assert np.allclose(fast[slow < 19], slow[slow < 19])
    assert (fast[slow >= 19] >= 19).all()


def test_random_specimens_yield_labelled_images_with_one_sign(examples):
    assert {example.polarity for example in examples} >= {-1, 1}
    for example in examples:
        assert example.image.shape == example.target.shape == (96, 96)
        if example.polarity and example.target.max() > 0.9:
            at, away = example.target > 0.9, (example.target < 0.05) & example.crystal
            assert example.polarity * (example.image[at].mean() - example.image[away].mean()) > 0


def test_particles_far_off_their_zone_hold_no_columns():
    spec = MovieSpec(mode="haadf", shape=(200, 200), sampling=0.2, frames=1, particles=2, radius=5.0, events=0)
    on, off = (
        examples_of(replace(spec, tilts=(0.0, tilt)), np.random.default_rng(7), sampling=0.2)[0] for tilt in (0.5, 25.0)
    )
    assert 0 < len(off.points) < 0.8 * len(on.points)
    gone = (on.target > 0.9) & (off.target < 0.05)
    assert off.known[gone].mean() > 0.9


def test_single_atoms_are_where_the_target_says():
    for seed in range(4):
        example = singles(np.random.default_rng(seed), edge=96, sampling=0.2)
        rows, columns = np.rint(example.points).astype(int).T
        assert (example.target[rows, columns] > 0.8).all() and example.polarity == 1
        assert example.image[rows, columns].mean() > example.image[example.target < 0.01].mean()


@pytest.mark.parametrize("mode", ["hrtem", "haadf"])
def test_degraded_images_keep_their_mean_and_shape(mode):
    image = np.ones((64, 64), np.float32)
    rng = np.random.default_rng(3)
    made = [degrade(image, rng, mode=mode) for _ in range(30)]
    assert all(m.shape == image.shape and abs(m.mean() - 1) < 0.2 for m in made)
    assert 0.001 < np.median([m.std() for m in made]) < 0.2


def test_the_training_input_is_what_inference_prepares():
    image = np.random.default_rng(0).gamma(4.0, 0.25, (60, 72)).astype(np.float32)
    ours = network_input(image, sampling=0.2, gain=1.0)
    assert torch.allclose(ours, prepare(torch.from_numpy(image), sampling=0.2, model_sampling=0.2), atol=1e-5)


def test_where_the_sign_is_wrong_only_the_sign_is_learnt():
    image = np.full((60, 60), 0.5, np.float32)
    image[10, 12] = 1.0
    example = labelled(image, three_columns()[:1], 1, sampling=0.2, spec=SPOTS, tilted=np.zeros(1, bool))
    seen = set()
    for seed in range(12):
        _, targets, weights = training_sample(example, np.random.default_rng(seed), sampling=0.2, crop=60)
        on_crystal = targets[1][targets[1] != 0.5].unique().tolist()
        seen.add(on_crystal[0])
        assert bool(weights[0].any()) == (on_crystal == [1.0])
    assert seen == {0.0, 1.0}


def test_the_truth_scores_one_and_what_is_unknown_is_not_counted(examples):
    # Columns at least 1.2 Å apart, so that no two are one to the detector.
    apart = [e for e in examples if len(e.points) > 1 and pdist(e.points).min() * TINY.sampling > 1.2]
    example = max(apart, key=lambda e: len(e.points))
    spec = replace(TINY, threshold=0.5)
    found, wanted, paired = train_columns.count_columns(example.target.astype(float), example, spec)
    assert found == wanted == paired > 5
    blank = Example(**{**example._asdict(), "points": np.zeros((0, 2))})
    assert train_columns.count_columns(example.target.astype(float), blank, spec)[::2] == (found, 0)
    unknown = Example(**{**blank._asdict(), "known": np.zeros_like(example.known)})
    assert train_columns.count_columns(example.target.astype(float), unknown, spec) == (0, 0, 0)


def test_training_learns_is_repeatable_and_goes_on_where_it_was(tmp_path, examples, monkeypatch):
    spots = max((e for e in examples if e.mode == "haadf" and e.polarity), key=lambda e: len(e.points))
    monkeypatch.setattr(train_columns, "simulate", lambda spec, scenes, report: [spots])
    first = train_columns.train(TINY, tmp_path / "one.safetensors", folder=tmp_path / "kept", report=silent)
    lines: list[str] = []
    again = train_columns.train(TINY, tmp_path / "two.safetensors", folder=tmp_path / "kept", report=lines.append)
    assert first == again and any("going on from step 40" in line for line in lines)
    loaded = load_weights(tmp_path / "one.safetensors")
    assert loaded.metadata["validation"]["score"] > 0.3 and loaded.metadata["training"]["images"] == 1
    assert "| score" in (tmp_path / "one.md").read_text()
    with pytest.raises(SettingsError, match="another plan"):
        train_columns.train(replace(TINY, seed=4), tmp_path / "x.safetensors", folder=tmp_path / "kept", report=silent)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(SettingsError, match="crop is 300 px"):
        ColumnTraining(crop=300)
    with pytest.raises(SettingsError, match="steps of the training is 0"):
        ColumnTraining(steps=0)


def test_a_lone_spurious_column_is_counted():
    example = SimpleNamespace(points=np.zeros((0, 2)), known=np.ones((60, 60), bool))
    probability = np.zeros((60, 60))
    probability[30, 30] = 0.9
    assert train_columns.count_columns(probability, example, ColumnTraining()) == (1, 0, 0)
