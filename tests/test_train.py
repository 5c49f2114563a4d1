from __future__ import annotations

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster import connect
from pipeline import train
from pipeline.cli import app
from pipeline.networks.particle_data import ParticleSpec
from pipeline.networks.weights import load_weights
from schemas.errors import SettingsError
from schemas.profiles import Profile

TINY = """
seed: 3
scenes: 3
denoised: 1
check_scenes: 2
steps: 4
batch: 2
check_every: 2
edge: 120
fine: 0.4
crop: 48
width: 2
dilations: [1, 2]
"""


def quiet(line):
    pass


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(TINY)
    return path


def test_the_same_weights_alone_and_on_a_worker(tmp_path, spec):
    lines: list[str] = []
    alone = train.train(
        "particles", spec, tmp_path / "a" / "p.safetensors", client=None, device="cpu", steps=None, report=lines.append
    )
    assert [line.split(":")[0] for line in lines] == ["simulating 3 specimens", "step 2 of 4", "step 4 of 4"]
    folder = tmp_path / "a" / "p.training"
    assert {file.name for file in folder.iterdir()} >= {"checkpoint.safetensors", "curve.csv", "curve.png", train.LOG}
    assert (tmp_path / "a" / "p.md").read_text().startswith("# p: where particles are")
    assert load_weights(tmp_path / "a" / "p.safetensors").metadata["sampling"] == ParticleSpec().sampling
    heard: list[str] = []
    with connect(Profile(kind="local", workers=1, memory=1.5)) as client:
        there = train.train(
            "particles", spec, tmp_path / "b.safetensors", client=client, device="cpu", steps=None, report=heard.append
        )
    assert there == alone
    assert len(heard) == len(lines) and heard[0] == lines[0]


def test_the_same_command_goes_on(tmp_path, spec, monkeypatch):
    out = tmp_path / "p.safetensors"
    runner = CliRunner()
    arguments = ["train", "particles", str(spec), "-o", str(out)]
    first = runner.invoke(app, arguments)
    assert first.exit_code == 0 and "wrote weights with SHA-256" in first.output
    data = out.read_bytes()
    again = runner.invoke(app, arguments)
    assert "going on from step 4" in again.output and out.read_bytes() == data


def test_lines_of_another_process_are_heard(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LISTEN", 0.02)
    log = tmp_path / "log"
    log.write_text("old\n")
    heard: list[str] = []
    with train._listening(log, heard.append):
        with log.open("a") as file:
            file.write("one\ntw")
        time.sleep(0.1)
        assert heard == ["one"]
        with log.open("a") as file:
            file.write("o\n")
    assert heard == ["one", "two"]


def test_specifications_come_from_files_and_mistakes_are_named(tmp_path, spec):
    made = train.load_spec("particles", spec)
    assert made == ParticleSpec(
        seed=3, scenes=3, denoised=1, check_scenes=2, steps=4, batch=2, check_every=2, edge=120, fine=0.4, crop=48,
        width=2, dilations=(1, 2),
    )  # fmt: skip
    assert train.load_spec("particles", None) == ParticleSpec()
    for text, found in (
        ("stepps: 4", "stepps is no field; did you mean 'steps'?"),
        ("steps: many", "steps is 'many'; expected something like 3000"),
        ("dilations: 3", r"dilations is 3; expected something like \(1, 2"),
        ("- 1", "holds list; expected some of the fields seed"),
        ("steps: [", "cannot be read as YAML"),
        ("steps: -4", "steps of the training is -4; expected a positive number"),
        ("crop: 200", "crop is 200 px of 0.45 Å; expected at most nine tenths"),
    ):
        spec.write_text(text)
        with pytest.raises(SettingsError, match=found):
            train.load_spec("particles", spec)


def test_what_cannot_be_trained_is_refused(tmp_path, spec):
    with pytest.raises(SettingsError, match="'atoms' cannot be trained; expected one of columns, particles, species"):
        train.load_spec("atoms", spec)
    with pytest.raises(SettingsError, match="train species needs a specification"):
        train.load_spec("species", None)
    with pytest.raises(SettingsError, match=r"w\.pt; expected a name that ends in \.safetensors"):
        train.train("particles", spec, tmp_path / "w.pt", client=None, device="cpu", steps=None, report=quiet)
    with pytest.raises(SettingsError, match="no file for the weights of particles; name it with -o"):
        CliRunner().invoke(app, ["train", "particles", str(spec)], catch_exceptions=False)


def test_every_kind_has_a_function_and_a_specification():
    for kind in train.KINDS.values():
        assert callable(train.named(kind.train)) and callable(train.named(kind.spec))
    specs = Path(__file__).parents[1] / "scripts" / "specs"
    for file in specs.glob("*.yaml"):
        if file.stem != "particles":
            assert train.load_spec("species", file).classes
