"""Train the network that finds particles, on simulated frames alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.networks import training
from pipeline.networks.blindspot import BlindSpot
from pipeline.networks.msdnet import MSDNet
from pipeline.networks.particle_data import (
    Example,
    ParticleSpec,
    Prepared,
    denoised_examples,
    prepared,
    sample,
    simulate,
)
from pipeline.networks.training import Fit, Network, Report
from pipeline.networks.weights import load_weights, save_weights
from pipeline.steps import windows
from pipeline.steps.segment import PARTICLE_SAMPLING_RANGE

RARE = -1.5  # first logit of a particle: some fifth of the pixels belong to one
CHECK_DOSES = (30.0, 100.0, 400.0)  # e⁻/Å² per frame, at each of which every image of the validation is seen
OUTLINE = 1.5  # Å either side of an outline whose pixels weigh more
CARD = """
Mixed-scale dense network (`msdnet`) that says for every pixel whether it belongs to a particle.

**Input**: one frame, raw or denoised, of {low} to {high} Å/px, prepared by `pipeline.steps.segment.prepare_particles`:
resampled to the network's {sampling} Å/px, contrast against the frame's mean, compressed. The sign of the contrast does
not matter. **Output**: a logit of the probability of a particle.

**Data**: simulated images alone (`pipeline/networks/particle_data.py`): particles of Au, Pt, Pd, Ag, Cu, Ni of 6 to
24 Å radius and 8 to 34 Å thickness, up to five in view, on zone [110], [100], [111] and up to {tilt:.0f}° off it, on
amorphous carbon; bare film, sheets of graphene, hBN, MoS2, WSe2 and empty views as what is no particle. HRTEM at 80 to
300 kV within 200 Å of focus, and some HAADF. Doses of {least:.0f} to {most:.0f} e⁻/Å² per frame, as single raw frames,
as denoisers leave them, and behind the shipped denoiser. An outline holds all within 0.42 lattice constants of an atom.
"""


class Check(NamedTuple):
    """A prepared frame of the validation and its dose [e⁻/Å²]."""

    frame: Prepared
    dose: float


def train(
    spec: ParticleSpec, path: Path, *, folder: Path | None, report: Report, command: str = "colonnade train particles"
) -> str:
    """Simulate, train and write the weights `path` and their card; the SHA-256 of the weights.

    `folder` keeps checkpoints and the learning curve; a training that was cut short goes on from there.
    """
    report(f"simulating {spec.scenes} specimens")
    examples = simulate(spec, range(spec.scenes))
    frames = denoised_examples(examples, denoiser(), spec, range(spec.denoised))
    found = fitted(untrained(spec), examples, spec, frames=frames, folder=folder, report=report)
    network = found.network
    facts = metadata(spec, images=len(examples), best=found.best) | {"command": command}
    digest = save_weights(network, path, facts)
    shown = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "multiplications per pixel": network.macs_per_pixel,
        "receptive radius": f"{network.receptive_radius} px",
        "command": command,
        "training": facts["training"],
    }
    low, high = PARTICLE_SAMPLING_RANGE
    text = CARD.format(
        low=low, high=high, sampling=spec.sampling, tilt=spec.tilt, least=spec.doses[0], most=spec.doses[1]
    )
    training.write_card(path, title=f"{path.stem}: where particles are", facts=shown, curve=found.curve, text=text)
    return digest


def denoiser() -> BlindSpot:
    """The denoiser that ships."""
    return cast(BlindSpot, load_weights("denoise").module)


def untrained(spec: ParticleSpec) -> MSDNet:
    """The network before its first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        network = MSDNet(inputs=1, outputs=1, width=spec.width, dilations=spec.dilations)
    with torch.no_grad():
        cast(Tensor, network.last.bias).fill_(RARE)
    return network


def fitted(
    network: Network,
    examples: Sequence[Example],
    spec: ParticleSpec,
    *,
    frames: Sequence[Example],
    folder: Path | None,
    report: Report,
) -> Fit[Network]:
    """Any network of one input and one output, trained as the specification says; `frames` have been denoised."""
    checks = validation_set(spec)
    return training.fit(
        network,
        lambda rng: sample(examples, rng, spec, frames=frames),
        lambda candidate, images, targets: loss(candidate, images, targets, spec),
        lambda candidate: validate(candidate, checks),
        plan=spec.plan,
        folder=folder,
        report=report,
        identity=repr(spec),
    )


def metadata(spec: ParticleSpec, *, images: int, best: Mapping[str, float]) -> dict[str, Any]:
    """What the file of weights says about itself."""
    return {
        "sampling": spec.sampling,
        "sampling_range": list(PARTICLE_SAMPLING_RANGE),
        "training": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(spec).items()} | {"images": images},
        "validation": dict(best),
        "outputs": ["particle probability"],
        "licence": "GPL-3.0-or-later",
    }


def loss(network: nn.Module, images: Tensor, targets: Tensor, spec: ParticleSpec) -> Tensor:
    """Cross entropy, weighted near outlines; pixels near the crop's border, half blind, have no say."""
    border = spec.crop // 12
    inner = (..., slice(border, -border), slice(border, -border))
    reach = max(1, round(OUTLINE / spec.sampling))
    edge = functional.max_pool2d(targets, 2 * reach + 1, 1, reach) + functional.max_pool2d(
        -targets, 2 * reach + 1, 1, reach
    )
    weights = 1 + (spec.outlines - 1) * edge
    entropy = functional.binary_cross_entropy_with_logits(network(images), targets, reduction="none")
    return (entropy * weights)[inner].sum() / weights[inner].sum()


def validation_set(spec: ParticleSpec) -> list[Check]:
    """Frames of specimens that are not trained on: raw, as if denoised, denoised, in turn; each at all CHECK_DOSES."""
    examples = simulate(spec, range(10**6, 10**6 + spec.check_scenes))
    network = denoiser()
    out = []
    for index, example in enumerate(examples):
        for number, dose in enumerate(CHECK_DOSES):
            rng = np.random.default_rng([spec.seed, 9, index, number])
            kind, shown = (index + number) % 3, example
            if kind == 2:
                at_dose = replace(spec, doses=(dose, dose))
                shown = denoised_examples([example], network, at_dose, [10**6 + index * 10 + number])[0]
            out.append(Check(prepared(shown, rng, spec, dose=dose, raw=kind == 0), dose))
    return out


def answer(network: nn.Module, image: Tensor) -> Tensor:
    """Logits (1, y, x) of one prepared frame (1, y, x), whose borders are continued as in a run."""
    radius = int(cast(Any, network).receptive_radius)
    return windows.blend(network, image, window=None, halo=radius, receptive_radius=radius, batch=1)


@torch.no_grad()
def validate(network: nn.Module, checks: Sequence[Check]) -> dict[str, float]:
    """Mean IoU of frames that hold particles, less the share of pixels that is wrongly marked in those that do not.

    Also the IoU at each dose, and the share of wrongly marked pixels itself.
    """
    overlap: dict[float, list[float]] = {}
    wrong = []
    for (image, target), dose in checks:
        marked, true = answer(network, image) > 0, target > 0.5
        if true.any():
            overlap.setdefault(dose, []).append(float((marked & true).sum() / (marked | true).sum()))
        else:
            wrong.append(float(marked.float().mean()))
    mean = float(np.mean([value for values in overlap.values() for value in values] or [0.0]))
    false = float(np.mean(wrong or [0.0]))
    return {"score": mean - false, "false": false} | {
        f"iou_{dose:.0f}": float(np.mean(values)) for dose, values in sorted(overlap.items())
    }
