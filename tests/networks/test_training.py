from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn

from pipeline.networks.training import CHECKPOINT, Plan, best_of, fit, schedule, write_card
from schemas.errors import SettingsError

PLAN = Plan(seed=4, steps=40, batch=3, rate=0.05, check_every=7)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 1, 1)
    )


def sample(rng):
    """An image, and its blurred self to be learnt."""
    image = torch.from_numpy(rng.standard_normal((1, 12, 12)).astype(np.float32))
    return image, nn.functional.avg_pool2d(image, 3, 1, 1)


HELD = sample(np.random.default_rng(99))


def loss(network, image, target):
    return (network(image) - target).square().mean()


@torch.no_grad()
def score(network):
    error = float((network(HELD[0][None]) - HELD[1][None]).square().mean())
    return {"score": -error, "error": error}


def trained(folder=None, plan=PLAN, **changes):
    functions = {"sample": sample, "loss": loss, "score": score} | changes
    return fit(network(), **functions, plan=plan, folder=folder, report=lambda line: None)


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


class Killed(BaseException):
    """What a signal does to a process, without one."""


@pytest.mark.parametrize("after", [3, 7, 20, 39])
def test_a_killed_training_goes_on_and_ends_bit_equal(tmp_path, after):
    undisturbed = trained()
    calls = iter(range(10_000))

    def dying(rng):
        if next(calls) == 3 * after:
            raise Killed
        return sample(rng)

    with pytest.raises(Killed):
        trained(tmp_path, sample=dying)
    drawn = []
    resumed = trained(tmp_path, sample=lambda rng: drawn.append(1) or sample(rng))
    assert len(drawn) == 3 * (40 - after // 7 * 7)
    assert resumed.curve == undisturbed.curve
    assert resumed.best == undisturbed.best
    assert same(resumed.network, undisturbed.network)


def test_sigkill_leaves_a_checkpoint_to_go_on_from(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_training as t, os, signal\n"
        "def dying(network):\n"
        "    found = t.score(network)\n"
        "    if dying.calls == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    dying.calls += 1\n"
        "    return found\n"
        "dying.calls = 0\n"
        "from pathlib import Path\n"
        "t.trained(Path(sys.argv[2]), score=dying)\n"
    )
    here = str(Path(__file__).parent)
    died = subprocess.run([sys.executable, "-c", code, here, str(tmp_path)], check=False, cwd=Path.cwd())
    assert died.returncode == -signal.SIGKILL
    assert (tmp_path / CHECKPOINT).exists()
    assert same(trained(tmp_path).network, trained().network)


def test_a_finished_training_is_not_repeated(tmp_path):
    first = trained(tmp_path)

    def never(*_):
        raise AssertionError("drew or validated again")

    again = trained(tmp_path, sample=never, score=never)
    assert same(first.network, again.network) and first.curve == again.curve


def test_the_best_by_validation_is_kept_and_not_the_last():
    kept = []

    def worse_later(network):
        kept.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return {"score": [0.1, 0.9, 0.9, 0.3, float("nan"), 0.2][len(kept) - 1]}

    found = trained(score=worse_later)
    assert found.best["step"] == 14 and len(found.curve) == 6
    assert all(torch.equal(kept[1][name], tensor) for name, tensor in found.network.state_dict().items())
    assert not all(torch.equal(kept[5][name], tensor) for name, tensor in found.network.state_dict().items())


def test_training_learns():
    found = trained(plan=Plan(seed=4, steps=150, batch=4, rate=0.05, check_every=30))
    assert found.best["error"] < 0.5 * score(network().eval())["error"]
    assert found.best["score"] == pytest.approx(score(found.network)["score"], abs=1e-7)


def test_the_running_mean_is_validated_and_not_the_moving_weights():
    """With a rate that never falls the mean of many steps lies between them: here it is an average by hand."""
    seen, means = [], []

    def watched(network, image, target):
        seen.append(network[4].bias.detach().clone())
        return loss(network, image, target)

    def watch(network):
        means.append(network[4].bias.clone())
        return {"score": 0.0}

    trained(plan=Plan(seed=4, steps=5, batch=1, rate=0.05, check_every=1), loss=watched, score=watch)
    mean = seen[0]
    for step, bias in enumerate(seen[1:]):
        memory = step / (step + 10)
        mean = mean * memory + bias * (1 - memory)
        assert torch.allclose(means[step], mean, atol=1e-6)


def test_the_learning_curve_can_be_looked_at(tmp_path):
    found = trained(tmp_path)
    rows = list(csv.DictReader((tmp_path / "curve.csv").read_text().splitlines()))
    assert [float(row["step"]) for row in rows] == [7, 14, 21, 28, 35, 40]
    assert float(rows[-1]["error"]) == found.curve[-1]["error"]
    picture = matplotlib.image.imread(tmp_path / "curve.png")
    assert picture.shape[0] > 300 and picture.std() > 0.05


def test_the_rate_rises_and_falls():
    rates = [schedule(share) for share in np.linspace(0, 1, 101)]
    assert rates[0] == 0 and max(rates) > 0.99 and rates[-1] == pytest.approx(0, abs=1e-12)
    assert np.all(np.diff(rates[2:]) < 0)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(SettingsError, match="another plan, data or network; expected one of"):
        trained(tmp_path, plan=Plan(seed=5, steps=40, batch=3, rate=0.05, check_every=7))
    (tmp_path / CHECKPOINT).write_bytes(b"half a file")
    with pytest.raises(SettingsError, match="no checkpoint of ours"):
        trained(tmp_path)


def test_plans_losses_and_scores_that_cannot_be_are_refused():
    with pytest.raises(SettingsError, match="steps of the training is 0; expected a positive number"):
        Plan(seed=0, steps=0, batch=1, rate=1.0, check_every=1)
    with pytest.raises(SettingsError, match="the loss is nan at step 0 of 40"):
        trained(loss=lambda network, image, target: loss(network, image, target) * float("nan"))
    with pytest.raises(SettingsError, match=r"the validation gave \['accuracy'\]"):
        trained(score=lambda network: {"accuracy": 1.0})


def test_a_model_card_shows_facts_and_the_best_row(tmp_path):
    curve = [{"step": float(k), "loss": 1.0, "score": -abs(k - 31.0)} for k in range(60)]
    card = write_card(
        tmp_path / "net.safetensors",
        title="net: what it does",
        facts={"parameters": 12, "plan": {"rate": 0.003, "dilations": (1, 2)}},
        curve=curve,
        text="For tests.",
    )
    lines = card.read_text().splitlines()
    assert card == tmp_path / "net.md" and lines[0] == "# net: what it does"
    assert "| parameters | 12 |" in lines and "| dilations | 1, 2 |" in lines and "For tests." in lines
    assert sum(line.startswith("| 31 |") for line in lines) == 1 and best_of(curve)["step"] == 31
