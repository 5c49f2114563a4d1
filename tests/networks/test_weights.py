from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from pipeline.networks.blindspot import BlindSpot
from pipeline.networks.weights import ARCHITECTURES, SHIPPED, architecture_of, build, load_weights, save_weights
from schemas.errors import SettingsError

SMALL = {"frames": 3, "channels": 16, "dilations": [2]}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return BlindSpot(**SMALL)


def test_saved_weights_come_back_with_their_facts(network, tmp_path):
    path = tmp_path / "w.safetensors"
    digest = save_weights(network, path, {"seed": 7})
    loaded = load_weights(path)
    assert loaded.sha256 == digest
    assert loaded.metadata["architecture"] == "blindspot"
    assert loaded.metadata["config"] == SMALL
    assert loaded.metadata["seed"] == 7
    assert not loaded.module.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.module.state_dict()[name])


def test_the_same_weights_have_the_same_hash(network, tmp_path):
    assert save_weights(network, tmp_path / "a", {"b": 1, "a": 2}) == save_weights(
        network, tmp_path / "b", {"a": 2, "b": 1}
    )


def test_a_missing_file_lists_what_is_shipped(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere.*expected shipped weights"):
        load_weights(tmp_path / "nowhere.safetensors")
    with pytest.raises(SettingsError, match="no_such_name"):
        load_weights("no_such_name")


def test_a_name_cannot_leave_the_folder_of_weights():
    with pytest.raises(SettingsError):
        load_weights("../weights/../../../etc/passwd")


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\x80\x04pickle" * 9])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, data):
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    with pytest.raises(SettingsError, match="not weights of ours"):
        load_weights(path)


def test_foreign_safetensors_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(SettingsError, match="not weights of ours"):
        load_weights(path)


def test_missing_and_misshapen_tensors_are_named(network, tmp_path):
    path = tmp_path / "w.safetensors"
    state = dict(network.state_dict())
    del state["last.bias"]
    save_file(state, path, {"colonnade": json.dumps({"architecture": "blindspot", "config": SMALL})})
    with pytest.raises(SettingsError, match=r"last\.bias"):
        load_weights(path)


def test_unknown_architectures_and_configurations_are_refused():
    with pytest.raises(SettingsError, match=r"'transformer'.*blindspot"):
        build("transformer", {})
    with pytest.raises(SettingsError, match="wings"):
        build("blindspot", {**SMALL, "wings": 2})
    with pytest.raises(SettingsError, match="multiple of 16"):
        build("blindspot", {**SMALL, "channels": 24})


def test_every_registered_network_names_itself(network):
    assert architecture_of(network) == "blindspot"
    with pytest.raises(SettingsError, match="Linear"):
        architecture_of(torch.nn.Linear(1, 1))
    assert "msdnet" in ARCHITECTURES


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.safetensors")), ids=lambda p: p.stem)
def test_shipped_weights_load_by_name_are_small_and_have_a_card(path):
    loaded = load_weights(path.stem)
    assert path.stat().st_size < 1_000_000
    assert loaded.metadata["config"] == loaded.module.config
    assert path.with_suffix(".md").read_text().startswith("# ")
