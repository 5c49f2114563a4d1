"""Weights as safetensors files that say what they are: architecture, configuration and card facts in their metadata."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from schemas.errors import SettingsError

SHIPPED = Path(__file__).parent / "weights"
# Imported on demand, so that a run pays only for the network it uses.
ARCHITECTURES = {
    "blindspot": "pipeline.networks.blindspot:BlindSpot",
    "wcvd": "pipeline.networks.wcvd:WCVD",
    "wiener": "pipeline.networks.wiener:NeighbourWiener",
    "msdnet": "pipeline.networks.msdnet:MSDNet",
    "unet": "pipeline.networks.unet:UNet",
    "encoder_decoder": "pipeline.networks.encoder_decoder:EncoderDecoder",
}
_KEY = "colonnade"


class Loaded(NamedTuple):
    """A network ready for inference, what its file says about it, and the hash of that file."""

    module: torch.nn.Module
    metadata: dict[str, Any]
    sha256: str


def build(architecture: str, config: dict[str, Any]) -> torch.nn.Module:
    """Make an untrained network of a registered architecture. Raises SettingsError if either is unknown."""
    if architecture not in ARCHITECTURES:
        raise SettingsError(
            f"unknown network architecture {architecture!r}; expected one of {', '.join(sorted(ARCHITECTURES))}; "
            "use weights written by this version"
        )
    module_name, class_name = ARCHITECTURES[architecture].split(":")
    try:
        network = getattr(import_module(module_name), class_name)(**config)
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"configuration {config!r} does not fit the architecture {architecture!r} ({error}); "
            "expected the keyword arguments of its class; use weights written by this version"
        ) from error
    return cast(torch.nn.Module, network)


def architecture_of(network: torch.nn.Module) -> str:
    """Name under which the class of `network` is registered. Raises SettingsError if it is not."""
    path = f"{type(network).__module__}:{type(network).__name__}"
    for name, registered in ARCHITECTURES.items():
        if registered == path:
            return name
    raise SettingsError(f"{path} is no registered architecture; expected one of {', '.join(ARCHITECTURES.values())}")


def save_weights(network: torch.nn.Module, path: str | Path, metadata: dict[str, Any]) -> str:
    """Write the weights of `network` with its architecture, configuration and `metadata`; returns the file's SHA-256.

    The same weights and metadata give the same bytes, so that the hash identifies the model.
    """
    facts = {**metadata, "architecture": architecture_of(network), "config": network.config}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    data = save(state, metadata={_KEY: json.dumps(facts, sort_keys=True)})
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)
    return hashlib.sha256(data).hexdigest()


def denoiser_of(tier: str) -> str:
    """Name of the shipped denoiser of a tier (small, medium or large)."""
    return "denoise" if tier == "large" else f"denoise-{tier}"


def resolve(name_or_path: str | Path) -> Path:
    """File of shipped weights (by name) or of the user's (by path). Raises SettingsError if there is none."""
    if isinstance(name_or_path, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name_or_path):
        shipped = SHIPPED / f"{name_or_path}.safetensors"
        if shipped.is_file():
            return shipped
    path = Path(name_or_path)
    if path.is_file():
        return path
    names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.safetensors"))) or "none"
    raise SettingsError(
        f"no weights {str(name_or_path)!r}; expected shipped weights ({names}) or the path of a safetensors file"
    )


def load_weights(name_or_path: str | Path) -> Loaded:
    """Read weights by shipped name or by path; the network is in evaluation mode, on the CPU, in float32.

    Raises SettingsError for a missing or unreadable file, an unknown architecture and tensors that do not fit it.
    """
    path = resolve(name_or_path)
    data = path.read_bytes()
    state, metadata = _parse(data, path)
    network = build(str(metadata["architecture"]), metadata["config"])
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))[:6]
        raise SettingsError(
            f"{path}: the tensors {wrong} are missing, unknown or of another shape; expected those of "
            f"{metadata['architecture']} with {metadata['config']}; replace the file (damaged?)"
        )
    network.load_state_dict(state)
    return Loaded(network.float().eval(), metadata, hashlib.sha256(data).hexdigest())


def _parse(data: bytes, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and our metadata of one safetensors file."""
    remedy = "expected a safetensors file written by `save_weights` (no pickle); retrain, or use the shipped weights"
    try:
        state = load(data)
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        metadata = json.loads(header[_KEY])
    except (SafetensorError, KeyError, ValueError, struct.error) as error:
        raise SettingsError(f"{path}: not weights of ours ({type(error).__name__}: {error}); {remedy}") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("config"), dict) or "architecture" not in metadata:
        raise SettingsError(f"{path}: the metadata {str(metadata)[:200]} lack architecture or config; {remedy}")
    return state, metadata
