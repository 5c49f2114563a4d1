"""The denoiser of a movie: pretrained as it is, adapted to the movie, trained on it alone, or a file of the user's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.models import TRAINED_HERE
from pipeline.movie import Clock, Movie
from pipeline.networks import adapt
from pipeline.networks.adapt_sample import Sample, plan_sample, training_sample
from pipeline.networks.blindness import blind_of, blinded
from pipeline.networks.blindspot import TIERS
from pipeline.networks.wcvd import RELEASED
from pipeline.networks.weights import architecture_of, denoiser_of, load_weights, resolve, save_weights
from pipeline.parts import read_meta
from pipeline.steps import drift, neighbours
from schemas.errors import SettingsError
from schemas.settings import Denoise


def prepare_denoiser(movie: Movie, target: Path, clock: Clock) -> dict[str, Any]:
    """Write the movie's weights to ``target`` if they are its own; what they are, for the record.

    ``weights`` in the result is "own" (the file ``target``), a name or path (used as it is), or None (no denoising).
    Networks that are told the filtered neighbours need a filter of this movie's, hence a file of its own. One that is
    taken over from another movie of the group is told those of this movie, and must beat this movie's Wiener filter.
    """
    options = movie.settings.denoise
    if options.network == "none" or movie.good is None or not movie.good.any():
        return {"network": "none", "weights": None, "sha256": ""}
    if options.weights not in TRAINED_HERE:
        loaded = load_weights(options.weights)
        name, told = str(loaded.metadata["architecture"]), {"blind": blind_of(loaded.module)}
        if options.blind == "frame" and name == "wcvd":
            raise SettingsError(f"denoise.blind is frame, which {options.weights} (wcvd) cannot be; use a blindspot")
        unhidden = options.blind == "frame" and name == "blindspot" and told["blind"] == "pixels"
        if not unhidden and (not getattr(loaded.module, "context_radius", 0) or "movie" in loaded.metadata):
            return {"network": name, "weights": str(resolve(options.weights)), "sha256": loaded.sha256, **told}
    sample = _sample(movie, clock)
    lead = _network_of_lead(movie)
    network, steps = _start(options) if lead is None else (load_weights(str(lead)).module, 0)
    calibrated = movie.model is not None and movie.model.calibrated
    fitted = partial(blinded, sample=sample, wanted=options.blind, calibrated=calibrated)
    chosen = fitted(network, steps=steps)
    if lead is not None and options.blind == "auto" and chosen.correlated and chosen.blind == "pixels":
        # A network that was not taught to see nothing of the frame would keep this movie's noise.
        lead, (network, steps) = None, _start(options)
        chosen = fitted(network, steps=steps)
    adapted = adapt.adapt(
        chosen.network.to(movie.task.device), sample, steps=steps, crop=options.crop, batch=options.batch,
        learning_rate=options.learning_rate, seed=options.seed, dtype=options.dtype,
    )  # fmt: skip
    facts = {"movie": movie.stack.attributes.get("content_hash", ""), "training": adapted.record, "seed": options.seed}
    # Seconds and the like would make the file, hence its hash, depend on the day.
    sha256 = save_weights(adapted.network.cpu(), target, {**facts, "training": _repeatable(adapted.record)})
    name = architecture_of(adapted.network)
    known = chosen.correlation if np.isfinite(chosen.correlation) else None
    noise = {"noise_correlation": known, "correlated": chosen.correlated, "blind": chosen.blind}
    taken = {"shared": True} if lead is not None and adapted.record["kept"] != "wiener" else {}
    return {"network": name, "weights": "own", "sha256": sha256, "training": adapted.record, **noise, **taken}


def _network_of_lead(movie: Movie) -> Path | None:
    """Weights that were adapted to the first movie of the group; None where there are none that would be of use."""
    if movie.task.lead is None:
        return None
    part = Path(movie.task.lead.part)
    found = read_meta(part) or {}
    useful = found.get("weights") == "own" and found.get("training", {}).get("kept") == "adapted"
    return part.with_suffix(".safetensors") if useful else None


def _repeatable(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("seconds", "step_seconds")}


def _start(options: Denoise) -> tuple[torch.nn.Module, int]:
    """The network as it is before its training on the movie, and the steps of that."""
    if options.network == "wcvd" and options.weights in TRAINED_HERE:
        return adapt.untrained("wcvd", RELEASED, seed=options.seed), options.steps
    if options.weights == "scratch":
        return adapt.untrained("blindspot", {**TIERS[options.tier], "errors": False}, seed=options.seed), options.steps
    pretrained = options.weights if options.weights not in TRAINED_HERE else denoiser_of(options.tier)
    return load_weights(pretrained).module, options.steps if options.weights == "adapt" else 0


def _sample(movie: Movie, clock: Clock) -> Sample:
    """A bounded sample of the movie, chosen by a fixed rule, in electrons."""
    if movie.good is None or movie.drift_px is None or movie.level is None:
        raise RuntimeError("the movie was opened before its drift was solved")
    options = movie.settings.denoise
    runs = neighbours.frame_runs(movie.stack.time, max_gap=options.max_gap)
    plan = plan_sample(
        movie.stack.shape, good=movie.good, run=runs, max_frames=options.sample_frames, max_side=options.sample_side
    )
    frames = np.empty((len(plan.frames), plan.height, plan.width), dtype=np.float32)
    for row, (index, top, left) in enumerate(zip(plan.frames, plan.top, plan.left, strict=True)):
        with clock("read"):
            counts = movie.counts(int(index), int(index) + 1)
        frames[row] = movie.electrons(counts)[0, top : top + plan.height, left : left + plan.width]
    sample = training_sample(
        frames, plan=plan, whole_px_drift=drift.whole_path(movie.drift_px), good=movie.good, level=movie.level
    )
    return sample._replace(moving=options.motion)
