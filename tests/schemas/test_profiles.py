"""Cluster profiles: by name, by address, by file; what is wrong is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import SettingsError
from schemas.profiles import Profile, load_profile


@pytest.mark.parametrize("name", [None, "local", "serial", "cuda"])
def test_names(name: str | None) -> None:
    profile = load_profile(name)
    assert profile == Profile(kind=name or "local")
    assert profile.device == ("cuda" if name == "cuda" else "cpu")


def test_an_address_is_a_profile() -> None:
    assert load_profile("tcp://host:8786") == Profile(kind="address", address="tcp://host:8786")


def test_a_file_is_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("kind: local\nworkers: 3\nmemory: 2.5\n")
    assert load_profile(str(path)) == Profile(kind="local", workers=3, memory=2.5)
    path.write_text("")
    assert load_profile(str(path)) == Profile()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: lokal\nworkers: 0\n", "2 problem"),
        ("kind: address\n", "address is missing; expected tcp://host:port"),
        ("a: [", "is not valid YAML"),
        ("workrs: 2\n", "workrs"),
        ("- a\n", "1 problem"),
        ("memory: -1\n", "found -1"),
    ],
)
def test_wrong_files_are_told(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"site\.yaml") as caught:
        load_profile(str(path))
    assert said in str(caught.value)


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(SettingsError, match=r"'slurmm' is no cluster profile; expected local, serial, cuda"):
        load_profile("slurmm")


def test_workers_without_a_gpu_stand_beside_those_with(tmp_path: Path) -> None:
    gpus, cpu = {"queue": "gpu", "gpus": 1}, {"workers": 3, "memory": 2.0, "batch": {"queue": "cpu"}}
    profile = Profile(kind="slurm", workers=8, memory=16.0, batch=gpus, cpu=cpu)
    first, second = profile.pools
    assert (first.resources, first.device, first.workers, first.batch.queue) == ({"GPU": 1}, "cuda", 8, "gpu")
    assert (second.resources, second.device, second.workers, second.batch.queue) == ({"CPU": 1}, "cpu", 3, "cpu")
    assert second.memory == 2.0 and second.pools == (second,)
    (alone,) = Profile(kind="slurm", batch=gpus).pools
    assert alone.resources == {"CPU": 1, "GPU": 1}
    path = tmp_path / "site.yaml"
    path.write_text("kind: slurm\ncpu: {workers: 2}\n")
    with pytest.raises(SettingsError, match=r"batch\.gpus is 0"):
        load_profile(str(path))
