"""What a run says of itself: where it came from, with which versions, settings and models, and what to be wary of."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import store
from pipeline.models import cutoff, finds_particles, particle_range, too_dim_for_species
from pipeline.movie import Task
from pipeline.parts import read_meta
from pipeline.steps.drift_solve import DOUBTFUL, LOST
from pipeline.steps.lowpass import ROLL_OFF
from schemas.settings import Settings


def describe_run(
    task: Task, stack: store.Stack, *, movie: str, output: Path, weights: Mapping[str, str]
) -> dict[str, Any]:
    """The run's own attributes; ``weights`` holds the hashes of the networks that the settings name."""
    keys = dict(task.keys)
    steps = ("calibrate", "drift", "adapt", "vote")
    found = {step: read_meta(task.part(step, 0, task.frames)) or {} for step in steps}
    source, size = stack.attributes.get("source", {}), task.settings.blocks.frames or 1
    inside = stack.path.is_relative_to(output)
    return {
        "movie": movie,
        "versions": versions(),
        "settings": task.settings.model_dump(mode="json"),
        "sources": source.get("files", []),
        "content_hash": stack.attributes["content_hash"],
        "sampling": stack.sampling,
        "energy": stack.attributes.get("energy"),
        "stack": str(stack.path.relative_to(output)) if inside else str(stack.path),
        "models": {"denoise": found["adapt"], **_models(task.settings, weights)},
        "prepare": {
            "noise": found["calibrate"].get("noise"),
            "bad_pixels": found["calibrate"].get("bad_pixels"),
            "good_frames": found["drift"].get("good"),
            "drift_agreement": found["drift"].get("agreement"),
            "polarity": found["vote"].get("polarity"),
        },
        "plan": {"fingerprints": keys, "block_frames": size, "blocks": math.ceil(task.frames / size)},
        "notes": [*source.get("notes", []), *_notes(found, stack, task.settings)],
    }


def _models(settings: Settings, weights: Mapping[str, str]) -> dict[str, dict[str, str]]:
    named = {
        "segment": settings.segment.model,
        "particles": settings.particles.model,
        "species": settings.species.model,
    }
    return {
        use: {"name": name, "sha256": weights["vote" if use == "segment" else use]}
        for use, name in named.items()
        if name is not None
    }


def _notes(found: Mapping[str, Mapping[str, Any]], stack: store.Stack, settings: Settings) -> list[str]:
    """What a reader of the results should know before trusting them."""
    notes = []
    noise = found["calibrate"].get("noise")
    if noise is not None and not noise["calibrated"]:
        notes.append("counts are not calibrated: electrons are effective ones fitted to the noise; dose is left out")
    if found["vote"].get("usable") is False:
        notes.append(f"no columns were looked for: {stack.sampling:g} Å/px is outside of what the network resolves")
    if settings.drift.correct and settings.drift.anchor != "frame":
        what = {
            "support": "what lies outside of particles",
            "particle": "the particles",
            "largest": "the largest particle",
        }
        seen = found["calibrate"].get("anchored")
        notes.append(
            f"drift is that of {what[settings.drift.anchor]} (drift.anchor)"
            if seen
            else f"no sample frame shows {what[settings.drift.anchor]} (drift.anchor): drift is that of the whole view"
        )
    agreement = found["drift"].get("agreement")
    if agreement is not None and agreement < DOUBTFUL:
        told = f"only {agreement:.0%} of the pairs of frames agree with one path"
        notes.append(
            f"drift was not found: {told}; the specimen was taken to be still"
            if agreement <= LOST
            else f"drift is doubtful: {told}; its errors were widened"
        )
    limits = particle_range(settings)
    if limits is not None and not finds_particles(settings, stack.sampling):
        notes.append(
            f"no particles were looked for: {stack.sampling:g} Å/px is outside of what the network was trained for, "
            f"{limits[0]:g} to {limits[1]:g} Å/px"
        )
    if noise is not None and noise["calibrated"]:
        dose = found["calibrate"]["level"][0] / stack.sampling**2
        least = too_dim_for_species(settings, dose=dose)
        if least is not None:
            notes.append(
                f"no species were named: {dose:.3g} e⁻/Å² per image; {settings.species.model} was trained with "
                f"{least:g} e⁻/Å² and more"
            )
    if stack.defocus is not None:
        plane = settings.source.defocus_plane
        notes.append(
            f"focal series: columns and particles were looked for in plane {plane} ({stack.defocus[plane]:g} Å, "
            "source.defocus_plane)"
            + ("; the species model was given all planes, aligned" if settings.species.model is not None else "")
        )
    energy = stack.attributes.get("energy")
    limit = (cutoff(settings, energy=energy) or np.inf) * (1 - ROLL_OFF)
    if settings.lowpass.cutoff == "information" and limit < 0.5 / stack.sampling:
        notes.append(
            f"denoised frames are damped beyond {limit:.3g} 1/Å, the information limit at {energy:g} keV with a focal "
            f"spread of {settings.lowpass.focal_spread:g} Å (lowpass.cutoff, lowpass.focal_spread)"
        )
    return [*notes, *denoiser_notes(found["adapt"], settings.denoise.group)]


def denoiser_notes(adapt: Mapping[str, Any], group: str | None) -> list[str]:
    """What became of the denoiser, from the answer of the step that prepared it."""
    notes = []
    adapted = adapt.get("training") or {}
    if adapt.get("lead"):
        whose = adapt["lead"]["movie"]
        notes.append(
            f"the denoiser was adapted to {whose}, the first of the group {group!r} (denoise.group)"
            if adapt.get("shared")
            else f"the network of {whose}, the first of the group, was of no use; this movie has a denoiser of its own"
        )
    if adapt.get("blind") == "frame":
        notes.append(
            "the denoiser was shown nothing of the frame that it estimates but its neighbours, where it has any "
            "(denoise.blind): what lasts one frame is not seen"
        )
    if adapt.get("correlated"):
        notes.append(
            f"the noise of pixels nearby is correlated ({adapt['noise_correlation']:+.2f}): evidence and standard "
            "errors take it to be independent and are too sure"
        )
    if any(adapted.get("motion") or ()):
        typical = sum(spread**2 for spread in adapted["motion"]) ** 0.5
        notes.append(
            f"parts of the view move by some {typical:.2f} px of their own between neighbouring frames; the denoiser's "
            "neighbours were moved by as much (denoise.motion)"
        )
    if adapted.get("kept") == "initial" and adapted.get("steps"):
        notes.append("adapting the denoiser to this movie did not help; the pretrained weights were used")
    if adapted.get("kept") == "wiener":
        notes.append(
            "no network beat a Wiener filter on this movie by the risk measured on it; it was denoised by the filter"
        )
    return notes


def versions() -> dict[str, str]:
    """Versions of what computed a run."""
    names = ("colonnade", "dask", "distributed", "numpy", "torch", "xarray", "zarr")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
