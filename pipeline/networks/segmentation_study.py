"""Architecture × dose × preparation of the training set × resolution: which network finds particles how well.

After Horwath et al., npj Comput. Mater. 6, 108 (2020) and Larsen et al., Ultramicroscopy 253, 113803 (2023), on our own
simulated particles: every network sees the same specimens, for the same number of steps, and is judged on others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt
from torch import nn

from pipeline.networks import training
from pipeline.networks.encoder_decoder import EncoderDecoder
from pipeline.networks.msdnet import MSDNet
from pipeline.networks.particle_data import Example, ParticleSpec, Prepared, prepared, sample
from pipeline.networks.train_particles import answer, loss
from pipeline.networks.unet import UNet
from pipeline.steps.agreement import calibration

Report = Callable[[str], None]
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MS-D 8 × 8": lambda: MSDNet(inputs=1, outputs=1, width=8, dilations=(1, 2, 4, 8, 16, 8, 4, 2)),
    "MS-D 1 × 30": lambda: MSDNet(inputs=1, outputs=1, width=1, dilations=[i % 10 + 1 for i in range(30)]),
    "U-Net 8-16-32": lambda: UNet(inputs=1, outputs=1, features=(8, 16, 32)),
    "encoder-decoder": lambda: EncoderDecoder(inputs=1, outputs=1),
}
DOSES = {"all": (20.0, 1500.0), "low": (20.0, 100.0), "high": (400.0, 1500.0)}
PREPARATIONS = {"both": 0.5, "raw": 1.0, "denoised": 0.0}  # share of raw frames
SAMPLINGS = (0.6, 0.4, 1.0)  # Å/px
TEST_DOSES = (20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)  # e⁻/Å² per frame
REACH = 48.0  # Å, edge of what a step sees
BINS = 10


@dataclass(frozen=True)
class Trial:
    """One training: what is varied, and how."""

    group: str
    network: str
    doses: str = "all"
    preparation: str = "both"
    sampling: float = SAMPLINGS[0]

    @property
    def name(self) -> str:
        """What tells it from others."""
        return f"{self.network}, {self.doses} doses, {self.preparation} frames, {self.sampling} Å/px"


class Row(NamedTuple):
    """One trained network on frames of one dose and kind; see `judged`."""

    trial: Trial
    dose: float
    kind: str
    precision: float
    recall: float
    f1: float
    iou: float
    calibration: float
    boundary: float


def trials() -> list[Trial]:
    """All trainings: architectures × doses, then preparations and samplings of the two that are compared most."""
    out = [Trial("architecture × dose", network, doses) for network in NETWORKS for doses in DOSES]
    for network in ("MS-D 8 × 8", "U-Net 8-16-32"):
        out += [Trial("preparation", network, preparation=p) for p in list(PREPARATIONS)[1:]]
        out += [Trial("resolution", network, sampling=s) for s in SAMPLINGS[1:]]
    return out


def spec_of(trial: Trial, base: ParticleSpec) -> ParticleSpec:
    """The specification of a trial's training; the crop is divisible by 8 and shows the same part of the specimen."""
    crop = int(min(REACH, 0.85 * base.edge * base.fine) / trial.sampling) // 8 * 8
    changes: dict[str, Any] = {"crop": crop, "doses": DOSES[trial.doses], "raw": PREPARATIONS[trial.preparation]}
    return replace(base, sampling=trial.sampling, coarsest=2.0 * base.fine, **changes)


def trained(trial: Trial, examples: Sequence[Example], base: ParticleSpec, report: Report) -> nn.Module:
    """The network of a trial, after its last step: without choosing among checks, which would cost as much."""
    spec = spec_of(trial, base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        network = NETWORKS[trial.network]()
    return training.fit(
        network,
        lambda rng: sample(examples, rng, spec),
        lambda candidate, images, targets: loss(candidate, images, targets, spec),
        lambda candidate: {"score": 0.0},
        plan=replace(spec.plan, check_every=spec.steps),
        folder=None,
        report=report,
    ).network


def frames_to_judge(
    trial: Trial, examples: Sequence[Example], base: ParticleSpec
) -> dict[tuple[float, str], list[Prepared]]:
    """Frames of specimens that were not trained on, the same noise for every network of the same sampling."""
    spec = spec_of(trial, base)
    out: dict[tuple[float, str], list[Prepared]] = {}
    for place, dose in enumerate(TEST_DOSES):
        for kind in ("raw", "denoised"):
            frames = out.setdefault((dose, kind), [])
            for index, example in enumerate(examples):
                rng = np.random.default_rng([spec.seed, 10, index, place])
                frames.append(prepared(example, rng, spec, dose=dose, raw=kind == "raw"))
    return out


@torch.no_grad()
def judged(network: nn.Module, frames: Sequence[Prepared], *, sampling: float) -> dict[str, float]:
    """Precision, recall and F1 of all pixels; mean IoU and boundary error [Å] of frames with particles; calibration.

    The boundary error is the mean distance from each outline, found or true, to the nearest point of the other, where
    both are there; calibration is the expected error of the probabilities, over all pixels.
    """
    right = marked = true = 0
    overlaps, gaps, stated, came = [], [], [], []
    for image, target in frames:
        probability = torch.sigmoid(answer(network, image))[0].numpy()
        found, wanted = probability > 0.5, target[0].numpy() > 0.5
        right, marked, true = right + int((found & wanted).sum()), marked + int(found.sum()), true + int(wanted.sum())
        stated.append(probability.ravel())
        came.append(wanted.ravel())
        if wanted.any():
            overlaps.append((found & wanted).sum() / (found | wanted).sum())
            gaps += [boundary_error(found, wanted) * sampling] if found.any() else []
    precision, recall = right / max(marked, 1), right / max(true, 1)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-9),
        "iou": float(np.mean(overlaps)),
        "calibration": calibration(np.concatenate(stated), np.concatenate(came), bins=BINS).error,
        "boundary": float(np.mean(gaps)) if gaps else float("nan"),
    }


def boundary_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean distance [px] of the outlines (y, x) bool of two masks from each other, in both directions."""
    edges = [mask & ~binary_erosion(mask, border_value=1) for mask in (found, wanted)]
    if not (edges[0].any() and edges[1].any()):
        return 0.0 if edges[0].any() == edges[1].any() else float(max(found.shape))
    far = [distance_transform_edt(~edge) for edge in edges]
    return float(np.concatenate([far[1][edges[0]], far[0][edges[1]]]).mean())


def study(
    chosen: Sequence[Trial], examples: Sequence[Example], tests: Sequence[Example], base: ParticleSpec, report: Report
) -> Iterator[list[Row]]:
    """Train and judge; for each trial in turn one row for each dose and kind of frame."""
    for number, trial in enumerate(chosen, 1):
        report(f"training {number} of {len(chosen)}: {trial.name}")
        network = trained(trial, examples, base, report)
        frames = frames_to_judge(trial, tests, base).items()
        yield [
            Row(trial, dose, kind, **judged(network, some, sampling=trial.sampling)) for (dose, kind), some in frames
        ]


def cost(name: str) -> tuple[int, float]:
    """Parameters and multiplications per pixel of a network."""
    network: Any = NETWORKS[name]()
    return sum(parameter.numel() for parameter in network.parameters()), float(network.macs_per_pixel)
