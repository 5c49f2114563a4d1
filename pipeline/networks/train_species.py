"""Train a network that tells species apart, on simulated sheets alone; one command for any of their materials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.networks.msdnet import MSDNet
from pipeline.networks.species_data import IGNORED, Example, Scene, example, scene
from pipeline.networks.species_spec import SpeciesSpec
from pipeline.networks.training import Fit, Plan, Report, fit, write_card
from pipeline.networks.weights import save_weights
from pipeline.steps.species import SpeciesModel, site_probabilities

EMPTY = 0.25  # weight of pixels without a site in the loss: they are many
MARGIN = 1.0  # Å; sites nearer to the edge of an image are not judged
CHECKS = 24  # images of the validation
CALIBRATION = 48  # images that the temperature is fitted to
TEMPERATURES = np.exp(np.linspace(np.log(0.4), np.log(2.5), 61))


class Verdict(NamedTuple):
    """Class probabilities (site, class) of known sites with their classes (site,), one image after the other."""

    probabilities: np.ndarray
    truth: np.ndarray


def train(
    spec: SpeciesSpec, path: Path, *, folder: Path | None, report: Report, command: str = "colonnade train species"
) -> str:
    """Train a species network, write its weights to `path` and its card beside them; the SHA-256 of the weights.

    Checkpoints and the learning curve go to `folder`, from which a training that was cut short goes on.
    """
    network, made = fitted(spec, folder=folder, report=report)
    temperature = calibrated(spec, network)
    facts = metadata(spec) | {"temperature": temperature, "validation": made.best, "command": command}
    digest = save_weights(network, path, facts)
    shown = {name: facts[name] for name in ("classes", "missing", "mode", "planes", "sampling", "sampling_range")}
    shown |= {
        "parameters": sum(p.numel() for p in network.parameters()),
        "multiplications per pixel": network.macs_per_pixel,
    }
    shown |= {"temperature": temperature, "command": command, "training": _flat(asdict(spec))}
    write_card(path, title=f"{path.stem}: {spec.title}", facts=shown, curve=made.curve, text=card_text(spec))
    return digest


def fitted(spec: SpeciesSpec, *, folder: Path | None, report: Report) -> tuple[MSDNet, Fit[MSDNet]]:
    """The trained network of a specification, and the course of its training."""
    pool = pool_of(spec, spec.scenes, stream=7, report=report)
    checks = judged(spec, CHECKS, stream=9)
    torch.manual_seed(spec.seed)
    network = MSDNet(inputs=spec.planes, outputs=1 + len(spec.classes), width=spec.width, dilations=spec.dilations)
    made = fit(
        network,
        lambda rng: _item(spec, pool, rng),
        loss,
        lambda one: score(spec, one, checks),
        plan=Plan(spec.seed, spec.steps, spec.batch, spec.rate, spec.check_every),
        folder=folder,
        report=report,
        identity=repr(spec),
    )
    return made.network, made


def metadata(spec: SpeciesSpec) -> dict[str, Any]:
    """What the weights say about themselves, all that `SpeciesModel.of` needs included."""
    return {
        "kind": "species",
        "classes": list(spec.classes),
        "missing": list(spec.missing),
        "hosts": list(spec.hosts),
        "mode": spec.mode,
        "planes": spec.planes,
        "sampling": spec.sampling,
        "sampling_range": list(spec.sampling_range),
        "distance": spec.distance,
        "training": asdict(spec),
        "licence": "GPL-3.0-or-later",
    }


def pool_of(spec: SpeciesSpec, count: int, *, stream: int, report: Report) -> list[Scene]:
    """Specimens to draw images of; those of different streams have nothing in common."""
    pool = []
    for index in range(count):
        pool.append(scene(spec, np.random.default_rng([spec.seed, stream, index])))
        if index % 100 == 99:
            report(f"simulated {index + 1} of {count} specimens")
    return pool


def judged(spec: SpeciesSpec, count: int, *, stream: int, dose: float | None = None) -> list[Example]:
    """Images to judge a network by, of specimens of their own."""
    rngs = [np.random.default_rng([spec.seed, stream, index]) for index in range(count)]
    return [example(spec, scene(spec, rng), rng, dose=dose) for rng in rngs]


def loss(network: torch.nn.Module, image: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the classes; pixels without a site count less, doubtful ones not at all."""
    logits = network(image)
    weight = logits.new_ones(logits.shape[1])
    weight[0] = EMPTY
    return functional.cross_entropy(logits, labels.long(), weight=weight, ignore_index=IGNORED)


def score(spec: SpeciesSpec, network: torch.nn.Module, checks: Sequence[Example]) -> dict[str, float]:
    """Validation of a network: the mean recall of the classes (the score), accuracy, log-likelihood per site."""
    probabilities, truth = verdict(spec, network, checks)
    right = probabilities.argmax(1) == truth
    recall = [float(right[truth == c].mean()) for c in range(len(spec.classes)) if (truth == c).any()]
    likelihood = np.log(np.maximum(probabilities[np.arange(len(truth)), truth], 1e-12)).mean()
    return {"score": float(np.mean(recall)), "accuracy": float(right.mean()), "log_likelihood": float(likelihood)}


def verdict(
    spec: SpeciesSpec, network: torch.nn.Module, checks: Sequence[Example], *, temperature: float = 1.0
) -> Verdict:
    """What a network says of the known sites of images."""
    model = SpeciesModel.of(network, metadata(spec) | {"temperature": temperature})
    probabilities, truth = [], []
    for one in checks:
        with torch.no_grad():
            maps = torch.softmax(network(one.image[None])[0], 0)
        edge = MARGIN / spec.sampling
        inside = ((one.sites >= edge) & (one.sites <= np.array(maps.shape[1:]) - 1 - edge)).all(1)
        y, x = one.sites[inside].T
        probabilities.append(site_probabilities(model, maps, y, x))
        truth.append(one.classes[inside])
    return Verdict(np.concatenate(probabilities), np.concatenate(truth))


def calibrated(spec: SpeciesSpec, network: torch.nn.Module) -> float:
    """The temperature at which class probabilities of images never trained on are likeliest.

    The element of a place is taken as known: in a run the sites around tell it.
    """
    found = verdict(spec, network, judged(spec, CALIBRATION, stream=10))
    hosts = np.array(spec.hosts)
    logs = np.log(np.maximum(found.probabilities, 1e-12))
    logs = np.where(hosts == hosts[found.truth][:, None], logs, -1e3)
    rows = np.arange(len(found.truth))

    def likelihood(temperature: float) -> float:
        scaled = logs / temperature
        scaled = scaled - scaled.max(1, keepdims=True)
        return float((scaled[rows, found.truth] - np.log(np.exp(scaled).sum(1))).mean())

    return round(float(max(TEMPERATURES, key=likelihood)), 3)


def card_text(spec: SpeciesSpec) -> str:
    """What the card says of any species network."""
    images = f"series of {spec.planes} defoci" if spec.mode == "hrtem" else "HAADF images"
    return (
        f"Tells {', '.join(spec.classes)} apart in {images} of {spec.host}, frames of {spec.sampling_range[0]} to "
        f"{spec.sampling_range[1]} Å/px, prepared by `pipeline.steps.species.prepare`; output: logits of no site and "
        "of each class.\n\nTrained on simulated images alone (`pipeline/networks/species_data.py`); no measured data "
        "and no weights of others. What was simulated is listed under Training; ranges are uniform, doses log-uniform."
    )


def _item(spec: SpeciesSpec, pool: list[Scene], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A random crop of a new image of one of the specimens, turned and mirrored at random."""
    one = example(spec, pool[int(rng.integers(len(pool)))], rng)
    side = int(spec.edge / spec.sampling) - 4
    top, left = (int(rng.integers(n - side + 1)) for n in one.image.shape[1:])
    part = (slice(top, top + side), slice(left, left + side))
    image, labels = one.image[:, *part], torch.from_numpy(one.labels[part])
    turns, flip = int(rng.integers(4)), bool(rng.integers(2))
    image, labels = torch.rot90(image, turns, (1, 2)), torch.rot90(labels, turns, (0, 1))
    return (image.flip(2), labels.flip(1)) if flip else (image, labels)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """A specification as rows of a table."""
    rows: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("phase", "scan"):
            used = name == ("phase" if values["mode"] == "hrtem" else "scan")
            rows |= cast(dict[str, Any], value) if used else {}
        elif isinstance(value, dict):
            rows |= {f"{name} {key}": item for key, item in value.items()}
        else:
            rows[name] = value
    return rows
