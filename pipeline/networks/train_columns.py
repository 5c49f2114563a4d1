"""Train the network that finds atomic columns, on simulated images alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.networks import segment_data, training
from pipeline.networks.msdnet import MSDNet
from pipeline.networks.segment_scenes import Example, random_examples
from pipeline.networks.weights import save_weights
from pipeline.steps.columns import find_columns, inside
from pipeline.steps.score import match_columns
from pipeline.steps.segment import SAMPLING_RANGE
from schemas.errors import SettingsError

Report = Callable[[str], None]
RARE = -3.0  # first logit of a column: few pixels belong to one
SIGN_SHARE = 0.35  # of the loss, for the sign of the contrast beside the columns
TEXT = """
**Input**: one denoised frame, prepared by `pipeline.steps.segment.prepare`, multiplied by −1 where atoms are dark.
**Output**: a logit of the probability that a pixel belongs to an atomic column, and a logit that atoms are bright in
the image as it was shown (used to vote on the sign of the contrast).

**Data**: simulated images only (`pipeline/networks/segment_scenes.py`); no measured data, no third-party weights.
Particles of Au, Pt, Ag, Pd, Cu, Ni on zone [110], [100], [111], 8 to 34 Å thick, with vacancies and adatoms, on
amorphous carbon, some among particles 4 to 22° off their zone; sheets of graphene (with Si, dimers and trimers), hBN,
MoS2, WSe2 with vacancies and holes; lone heavy atoms on a film; bare film and vacuum. HRTEM by multislice at 60 to
300 kV with either sign of Cs and defocus; HAADF by convolution. Then what denoisers leave of noise
(`segment_data.py`). Columns are marked by Gaussians of 0.35 Å. Columns of one atom in particles, blurred by tilt, or
of the wrong sign of contrast are neither right nor wrong; particles more than 5° off their zone hold none. Images in
which more than 15 % of the columns have the other sign were left out.

**Validation** (`score`): F1 on crystals that are not trained on, noise of all strengths included, so 1 is out of
reach. `in_empty`: columns per image of bare film or vacuum. One CPU core trains it in an hour; no GPU is needed.

**Limits**: coarser than 0.4 or finer than 0.03 Å/px is refused. Gold much thicker than 30 Å reverses its contrast in
places; columns there are missed or seen between the true ones. Of Pt at 50 e⁻/Å² one in forty is spurious. Film without
any crystal in the frame is in part taken for columns, and so are fringes of particles off their zone; a run drops most
of them again (`columns.min_significance`, `columns.min_relative`, `columns.min_roundness`). Lone atoms in one noisy
scan are found worse than by a tuned difference of Gaussians (`scripts/accuracy_single_atoms`).
"""
REACH, MARGIN, LEAST_DISTANCE = 0.7, 1.0, 1.0  # Å: of a match; from the border; between two columns


@dataclass(frozen=True)
class ColumnTraining:
    """How the column network is trained; the defaults are those of the shipped weights. All follows from `seed`.

    scenes, check_scenes: random specimens to train on and to validate with; edge, crop: of their images and of what a
    step sees [px]; sampling [Å/px] at which the network works; threshold: least probability of a column in validation,
    where what is faint or no column is not dropped as in a run.
    """

    seed: int = 31
    scenes: int = 800
    check_scenes: int = 32
    steps: int = 6400
    batch: int = 6
    rate: float = 3e-3
    check_every: int = 800
    edge: int = 224
    crop: int = 160
    sampling: float = 0.2
    width: int = 8
    dilations: tuple[int, ...] = (1, 2, 4, 8, 16, 6, 2)
    threshold: float = 0.4

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "seed" and np.min(value) <= 0:
                raise SettingsError(f"{item.name} of the training is {value!r}; expected a positive number")
        if self.crop > self.edge:
            raise SettingsError(f"crop is {self.crop} px and edge {self.edge} px; expected a crop within the image")

    @property
    def plan(self) -> training.Plan:
        """What `training.fit` wants to know."""
        return training.Plan(self.seed, self.steps, self.batch, self.rate, self.check_every)


def train(spec: ColumnTraining, path: Path, *, folder: Path | None, report: Report) -> str:
    """Simulate, train and write the weights `path` and their card; the SHA-256 of the weights.

    `folder` keeps checkpoints and the learning curve; a training that was cut short goes on from there.
    """
    examples = simulate(spec, range(spec.scenes), report)
    checks = validation_set(spec)
    network = untrained(spec)
    fitted = training.fit(
        network,
        lambda rng: segment_data.training_sample(
            examples[int(rng.integers(len(examples)))], rng, sampling=spec.sampling, crop=spec.crop
        ),
        loss,
        lambda candidate: validate(candidate, checks, spec),
        plan=spec.plan,
        folder=folder,
        report=report,
        identity=repr(spec),
    )
    facts = metadata(spec, images=len(examples), best=fitted.best)
    digest = save_weights(fitted.network, path, facts)
    shown = {
        "parameters": sum(p.numel() for p in fitted.network.parameters()),
        "multiplications per pixel": fitted.network.macs_per_pixel,
        "receptive radius": f"{fitted.network.receptive_radius} px",
        "command": facts["command"],
        "training": facts["training"],
    }
    training.write_card(
        path, title=f"{path.stem}: where atomic columns are", facts=shown, curve=fitted.curve, text=TEXT
    )
    return digest


def simulate(spec: ColumnTraining, scenes: range, report: Report) -> list[Example]:
    """Images of the specimens with these numbers; validation has numbers that training does not use."""
    found: list[Example] = []
    for count, index in enumerate(scenes, 1):
        rng = np.random.default_rng([spec.seed, 7, index])
        found += random_examples(rng, edge=spec.edge, sampling=spec.sampling)
        if count % 100 == 0:
            report(f"simulated {count} of {len(scenes)} specimens, {len(found)} images")
    return found


def untrained(spec: ColumnTraining) -> MSDNet:
    """The network before its first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        network = MSDNet(inputs=1, outputs=2, width=spec.width, dilations=spec.dilations)
    with torch.no_grad():
        cast(Tensor, network.last.bias).copy_(torch.tensor([RARE, 0.0]))
    # Convolutions of few channels run nearly twice as fast when the channels of a pixel lie side by side.
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def metadata(spec: ColumnTraining, *, images: int, best: Mapping[str, float]) -> dict[str, Any]:
    """What the file of weights says about itself."""
    return {
        "sampling": spec.sampling,
        "sampling_range": list(SAMPLING_RANGE),
        "training": asdict(spec) | {"dilations": list(spec.dilations), "images": images},
        "validation": dict(best),
        "command": "scripts/train_columns",
        "outputs": ["column probability", "atoms are bright in this image"],
        "licence": "GPL-3.0-or-later",
    }


def loss(network: MSDNet, images: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross entropy of columns and sign, where the outermost border of the crop has no say."""
    border = network.receptive_radius // 2
    inner = (..., slice(border, -border), slice(border, -border))
    logits = network(images.contiguous(memory_format=torch.channels_last))
    entropy = functional.binary_cross_entropy_with_logits(logits[inner], targets[inner], reduction="none")
    total = (entropy * weights[inner]).sum(dim=(0, 2, 3)) / (weights[inner].sum(dim=(0, 2, 3)) + 1)
    return (total * total.new_tensor([1.0, SIGN_SHARE])).sum()


def validation_set(spec: ColumnTraining) -> list[tuple[Tensor, Example]]:
    """Prepared images (1, y, x), atoms bright, and their truth: specimens that are not trained on, always the same."""
    examples = simulate(spec, range(10**6, 10**6 + spec.check_scenes), lambda line: None)
    out = []
    for index, example in enumerate(examples):
        rng = np.random.default_rng([spec.seed, 9, index])
        degraded = segment_data.degrade(example.image, rng, mode=example.mode)
        prepared = segment_data.network_input(degraded, sampling=spec.sampling, gain=1.0)
        out.append((prepared[None] * float(example.polarity or rng.choice([-1, 1])), example))
    return out


def validate(network: MSDNet, checks: list[tuple[Tensor, Example]], spec: ColumnTraining) -> dict[str, float]:
    """F1 of the columns over all images of crystals ("score"), precision, recall, share of signs that were told right.

    in_empty: columns per image that holds none; these have no part in the score, since in a run what is found on bare
    film is dropped by its weakness.
    """
    matched = detected = true = empty = signs = crystals = blank = 0
    for prepared, example in checks:
        logits = torch.stack([network(sign * prepared[None])[0] for sign in (1.0, -1.0)])
        found, wanted, paired = count_columns(torch.sigmoid(logits[0, 0]).numpy(), example, spec)
        if example.polarity:
            matched, detected, true = matched + paired, detected + found, true + wanted
            crystals, signs = crystals + 1, signs + int(logits[0, 1].mean() > logits[1, 1].mean())
        else:
            blank, empty = blank + 1, empty + found
    return {
        "score": 2 * matched / max(detected + true, 1),
        "precision": matched / max(detected, 1),
        "recall": matched / max(true, 1),
        "in_empty": empty / max(blank, 1),
        "signs": signs / max(crystals, 1),
    }


def count_columns(probability: np.ndarray, example: Example, spec: ColumnTraining) -> tuple[int, int, int]:
    """Found, true and matched columns of one image, without those of which nothing is known."""
    sampling, shape = spec.sampling, (probability.shape[0], probability.shape[1])
    peaks = find_columns(probability, threshold=spec.threshold, min_distance=LEAST_DISTANCE / sampling)
    points, truth = np.column_stack([peaks.y, peaks.x]), example.points
    match = match_columns(points * sampling, truth * sampling, max_distance=REACH)
    asked = inside(truth[:, 0], truth[:, 1], shape=shape, margin=MARGIN / sampling)
    paired = int(asked[match.true].sum())
    extra = points[match.spurious]
    rows, columns = (np.clip(np.rint(axis).astype(int), 0, n - 1) for axis, n in zip(extra.T, shape, strict=True))
    spurious = inside(extra[:, 0], extra[:, 1], shape=shape, margin=MARGIN / sampling) & example.known[rows, columns]
    return paired + int(spurious.sum()), int(asked.sum()), paired
