"""Train any network on drawn samples: resumable, seeded, best weights by validation, a learning curve to look at.

What a step draws follows from the seed and the step's number alone, so that no generator has to be kept: a training
that was killed goes on from its last checkpoint and ends with the bits of one that was not.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import math
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.steps.denoise import one_thread
from schemas.errors import SettingsError

Network = TypeVar("Network", bound=nn.Module)
Report = Callable[[str], None]
State = dict[str, Tensor]

MEMORY = 0.99  # of the running mean over steps whose weights are kept
WARM_UP = 0.02  # share of the steps over which the rate rises
CLIP = 1.0  # largest norm of the gradient
CHECKPOINT = "checkpoint.safetensors"
_KEY = "colonnade"
_DEVICE: ContextVar[str] = ContextVar("device of trainings", default="cpu")


@contextmanager
def training_on(device: str) -> Iterator[None]:
    """Every `fit` within takes its steps on this device; validation and what it returns stay on the CPU."""
    token = _DEVICE.set(device)
    try:
        yield
    finally:
        _DEVICE.reset(token)


@dataclass(frozen=True)
class Plan:
    """How long and how fast: steps of `batch` items, the highest learning `rate`, validation every `check_every`."""

    seed: int
    steps: int
    batch: int
    rate: float
    check_every: int

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value < 0 or (value == 0 and item.name != "seed"):
                raise SettingsError(f"{item.name} of the training is {value!r}; expected a positive number")


class Fit(NamedTuple, Generic[Network]):
    """The network with its best weights, the learning curve (one row per validation), and the row of the best."""

    network: Network
    curve: list[dict[str, float]]
    best: dict[str, float]


@dataclass
class _Progress:
    """All that a training has to remember: step, moving weights, their running mean, the best mean, Adam's moments."""

    step: int
    network: nn.Module
    average: nn.Module
    best: State
    optimiser: torch.optim.Adam
    curve: list[dict[str, float]]


def fit(
    network: Network,
    sample: Callable[[np.random.Generator], Sequence[Tensor]],
    loss: Callable[..., Tensor],
    score: Callable[[Network], Mapping[str, float]],
    *,
    plan: Plan,
    folder: Path | None,
    report: Report,
    identity: str = "",
) -> Fit[Network]:
    """Train `network` in place; returned with the best running mean of its weights.

    sample(rng) draws one item, a tuple of tensors; `plan.batch` of them are stacked and given to loss(network, *batch).
    score(network) validates the running mean (higher "score" is better), every `check_every` steps and at the end.
    With `folder`, checkpoint.safetensors, curve.csv and curve.png are kept there and a training that was cut short goes
    on; `identity` says what the data are, for a checkpoint of other data is refused. CPU: one thread, the same bits.
    Raises SettingsError for a checkpoint of another training and for a loss that is not finite.
    """
    identity = _identity(network, plan, identity)
    progress = _begun(network.to(_DEVICE.get()), plan)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        _restore(progress, folder / CHECKPOINT, identity, report)
    total, count, started = 0.0, 0, time.monotonic()
    with one_thread():
        while progress.step < plan.steps:
            total += _step(progress, sample, loss, plan)
            count += 1
            if progress.step % plan.check_every == 0 or progress.step == plan.steps:
                row = _check(progress, score, total / count, plan)
                total, count = 0.0, 0
                report(_line(row, plan.steps, time.monotonic() - started))
                if folder is not None:
                    _keep(progress, folder / CHECKPOINT, identity)
                    write_curve(progress.curve, folder)
    network.load_state_dict(progress.best)
    return Fit(network.cpu().eval(), progress.curve, best_of(progress.curve))


def best_of(curve: Sequence[dict[str, float]]) -> dict[str, float]:
    """The first row of a learning curve whose score no other exceeds."""
    return max(curve, key=lambda row: row["score"])


def schedule(share: float) -> float:
    """Learning rate over its highest after a `share` of the steps: a short warm-up, then a cosine to zero."""
    return min(share / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * share))


# ------------------------------------------------------------------------------------------------------------- steps


def _begun(network: nn.Module, plan: Plan) -> _Progress:
    average = copy.deepcopy(network).requires_grad_(False).eval()
    optimiser = torch.optim.Adam(network.parameters(), lr=plan.rate)
    # Adam makes its moments at the first step; a checkpoint wants them there before.
    for parameter in network.parameters():
        optimiser.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return _Progress(0, network, average, _copied(average), optimiser, [])


def _step(
    progress: _Progress, sample: Callable[..., Sequence[Tensor]], loss: Callable[..., Tensor], plan: Plan
) -> float:
    """One step of the optimiser; the loss before it."""
    network, optimiser = progress.network, progress.optimiser
    network.train()
    rng = np.random.default_rng([plan.seed, 8, progress.step])
    # A network may draw too (dropout); what it draws is as repeatable as the sample.
    torch.manual_seed(int(rng.integers(2**31)))
    device = next(network.parameters()).device
    parts = [sample(rng) for _ in range(plan.batch)]
    batch = [torch.stack(list(items)).to(device) for items in zip(*parts, strict=True)]
    for group in optimiser.param_groups:
        group["lr"] = plan.rate * schedule(progress.step / plan.steps)
    optimiser.zero_grad(set_to_none=True)
    value = loss(network, *batch)
    if not bool(torch.isfinite(value)):
        raise SettingsError(
            f"the loss is {float(value.detach())} at step {progress.step} of {plan.steps}; expected a finite number; "
            f"train with a smaller rate than {plan.rate:g}"
        )
    value.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(network.parameters(), CLIP)
    optimiser.step()
    _follow(progress.average, network, min(MEMORY, progress.step / (progress.step + 10)))
    progress.step += 1
    return float(value.detach())


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, memory: float) -> None:
    """Move the running mean of weights and of normalisation statistics; counters are copied."""
    for mean, new in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(new, 1 - memory)
        else:
            mean.copy_(new)


def _check(
    progress: _Progress, score: Callable[[Any], Mapping[str, float]], loss: float, plan: Plan
) -> dict[str, float]:
    """Validate the running mean, keep it if it is the best so far; the new row of the curve."""
    with torch.no_grad():
        found = {name: float(value) for name, value in score(copy.deepcopy(progress.average).cpu()).items()}
    if "score" not in found:
        raise SettingsError(f"the validation gave {sorted(found)}; expected a value called 'score' among them")
    if math.isnan(found["score"]):
        found["score"] = -math.inf
    row = {"step": progress.step, "loss": loss, "rate": plan.rate * schedule((progress.step - 1) / plan.steps)} | found
    if not progress.curve or found["score"] > best_of(progress.curve)["score"]:
        progress.best = _copied(progress.average)
    progress.curve.append(row)
    return row


def _copied(network: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _line(row: Mapping[str, float], steps: int, seconds: float) -> str:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in ("step", "rate"))
    return f"step {row['step']:.0f} of {steps}: {figures}, {seconds:.0f} s"


# ------------------------------------------------------------------------------------------------------- checkpoints


def _identity(network: nn.Module, plan: Plan, identity: str) -> str:
    """Hash of all that decides a training, the first weights included."""
    digest = hashlib.sha256(json.dumps([asdict(plan), identity], sort_keys=True).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _keep(progress: _Progress, path: Path, identity: str) -> None:
    tensors: State = {}
    for part, state in (("network", _copied(progress.network)), ("average", _copied(progress.average))):
        tensors |= {f"{part}.{name}": tensor for name, tensor in state.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in progress.best.items()}
    for index, state in enumerate(progress.optimiser.state.values()):
        tensors |= {f"adam.{index}.{name}": tensor for name, tensor in state.items()}
    facts = {"step": progress.step, "identity": identity, "curve": progress.curve}
    data = save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, metadata={_KEY: json.dumps(facts)})
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def _restore(progress: _Progress, path: Path, identity: str, report: Report) -> None:
    """Go on from a checkpoint, if there is one. Raises SettingsError if it is damaged or of another training."""
    if not path.exists():
        return
    data = path.read_bytes()
    try:
        tensors = load(data)
        (length,) = struct.unpack("<Q", data[:8])
        facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
    except (SafetensorError, KeyError, ValueError, struct.error) as error:
        raise SettingsError(f"{path} is no checkpoint of ours ({error}); remove it to train from the start") from error
    if facts["identity"] != identity:
        raise SettingsError(
            f"{path} belongs to a training with another plan, data or network; expected one of {identity[:12]}, found "
            f"{facts['identity'][:12]}; name another folder, or remove the file to train from the start"
        )

    def part(name: str) -> State:
        return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}

    progress.network.load_state_dict(part("network"))
    progress.average.load_state_dict(part("average"))
    progress.best = part("best")
    with torch.no_grad():
        for index, state in enumerate(progress.optimiser.state.values()):
            for key, tensor in part(f"adam.{index}").items():
                state[key].copy_(tensor)
    progress.step, progress.curve = facts["step"], facts["curve"]
    report(f"going on from step {progress.step}, kept in {path}")


# ------------------------------------------------------------------------------------------------- curves and cards


def write_curve(curve: Sequence[Mapping[str, float]], folder: Path) -> None:
    """The learning curve as curve.csv and curve.png in `folder`: loss above, what the validation found below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with (folder / "curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(curve[0]))
        writer.writeheader()
        writer.writerows(curve)
    steps = [row["step"] for row in curve]
    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(steps, [row["loss"] for row in curve], marker=".", color="black")
    upper.set_ylabel("training loss")
    for name in curve[0]:
        if name not in ("step", "loss", "rate"):
            values = [row[name] if math.isfinite(row[name]) else math.nan for row in curve]
            lower.plot(steps, values, marker=".", linewidth=2.5 if name == "score" else 1.0, label=name)
    best = best_of([dict(row) for row in curve])
    lower.axvline(best["step"], color="grey", linestyle=":", label="kept")
    lower.set(xlabel="step", ylabel="validation")
    lower.legend(fontsize=8)
    figure.savefig(folder / "curve.png", dpi=110, metadata={"Software": None})


def write_card(
    path: Path, *, title: str, facts: Mapping[str, Any], curve: Sequence[Mapping[str, float]], text: str = ""
) -> Path:
    """Write the model card beside the weights `path` (the same name, ending in .md); what was written.

    facts become a table, a mapping among them a table of its own; `text` (Markdown: what it is for, what its limits
    are) follows the title; at most nine rows of the learning curve are shown, the best among them.
    """
    lines = [f"# {title}", "", *([text.strip(), ""] if text.strip() else [])]
    groups: dict[str, Mapping[str, Any]] = {
        "facts": {name: value for name, value in facts.items() if not isinstance(value, Mapping)}
    }
    groups.update({name: value for name, value in facts.items() if isinstance(value, Mapping)})
    for name, group in groups.items():
        if group:
            lines += [f"## {name[0].upper()}{name[1:]}", "", "| | |", "|---|---|"]
            lines += [*(f"| {key} | {_shown(value)} |" for key, value in group.items()), ""]
    if curve:
        lines += ["## Validation", "", "| " + " | ".join(curve[0]) + " |", "|---" * len(curve[0]) + "|"]
        lines += ["| " + " | ".join(_shown(value) for value in row.values()) + " |" for row in _thinned(curve)]
    card = path.with_suffix(".md")
    card.write_text("\n".join(lines).rstrip() + "\n")
    return card


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value)
    return str(value)


def _thinned(curve: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """At most nine rows: the best, and others evenly spread from the first to the last."""
    best = best_of([dict(row) for row in curve])
    spread = {round(k * (len(curve) - 1) / 7) for k in range(8)} | {list(curve).index(best)}
    return [curve[index] for index in sorted(spread)]
