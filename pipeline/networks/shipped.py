"""Train the weights that ship with the project again: what they were trained with, and the way to the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.networks import pretrain, train_columns
from pipeline.networks.blindspot import TIERS
from pipeline.networks.weights import SHIPPED, denoiser_of, save_weights
from schemas.errors import SettingsError

Report = Callable[[str], None]

_SMALL = pretrain.PretrainSettings(
    steps=10_000, simulated=200, phantoms=800, crop=96, batch=8, learning_rate=3e-3, seed=1
)
DENOISE = {"small": _SMALL, "medium": _SMALL, "large": _SMALL._replace(steps=16_000, again=14_000)}
"""What each tier of the denoiser is trained with: a large network gains by more of it."""
COLUMNS = train_columns.ColumnTraining()


def train(what: str, output: Path | None, *, steps: int | None, report: Report) -> str:
    """Train ``columns``, ``denoise``, ``denoise-medium`` or ``denoise-small`` and write ``output`` (default: the
    shipped file); its SHA-256."""
    path = output or SHIPPED / f"{what}.safetensors"
    if what == "columns":
        chosen = dataclasses.replace(COLUMNS, steps=steps or COLUMNS.steps)
        return train_columns.train(chosen, path, folder=None, report=report)
    tiers = {denoiser_of(tier): tier for tier in TIERS}
    if what not in tiers:
        raise SettingsError(f"{what!r} cannot be trained; expected columns or one of {', '.join(tiers)}")
    return train_denoise(path, denoise_settings(tiers[what], steps), tier=tiers[what], report=report)


def denoise_settings(tier: str, steps: int | None) -> pretrain.PretrainSettings:
    """What a tier of the denoiser is trained with; with `steps` of one's own, in a single round of so many."""
    return DENOISE[tier] if steps is None else DENOISE[tier]._replace(steps=steps, again=0)


def train_denoise(path: Path, settings: pretrain.PretrainSettings, *, tier: str, report: Report) -> str:
    """Pretrain the denoiser of a tier; snapshots of the running average are written to ``path`` on the way."""
    facts: dict[str, Any] = {"training": settings._asdict(), "command": f"scripts/train_denoise --tier {tier}"}

    def snapshot(average: Any) -> None:
        save_weights(average, path, facts | {"finished": False})

    network = pretrain.pretrain(TIERS[tier], settings, report=report, snapshot=snapshot)
    facts["figures"] = pretrain.card_figures(network, seed=1234)
    return save_weights(network, path, facts)
