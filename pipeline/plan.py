"""What will be computed, in which pieces, why, and at what cost: decided before any work starts.

A step's fingerprint is a digest of all that its result depends on: an explicit version of the step, the settings it
reads, the content of the movie, the weights it loads, and the fingerprints of the steps before it. A block is done if
the ledger, or its part file, carries the fingerprint of today.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.ledger import Ledger
from pipeline.measure import SPECTRUM_EDGE
from pipeline.models import TRAINED_HERE, hashes, network
from pipeline.networks.weights import denoiser_of
from pipeline.parts import part_path, read_meta
from pipeline.steps.neighbours import frame_runs
from schemas.errors import ResourceError, SettingsError
from schemas.jobfile import flatten
from schemas.settings import Settings

# What each step reads of the settings, and which step it follows. A step's version is raised when its result changes.
STEPS: Mapping[str, tuple[int, str | None, tuple[str, ...]]] = {
    "calibrate": (1, None, ("detector", "source.defocus_plane", *(
        f"drift.{name}" for name in ("correct", "band", "taper", "change", "limit")))),
    "survey": (3, "calibrate", ("drift.lags", "drift.candidates", "drift.max_shift", "drift.defocus_shift")),
    "drift": (3, "survey", ("drift.max_motion", "drift.cauchy")),
    "adapt": (11, "drift", ("denoise",)),
    "vote": (1, "adapt", ("segment.model", "segment.contrast", "source.mode", "lowpass")),
    "process": (6, "vote", (
        "segment", "columns", "particles", "fourier.band", "fourier.significance", "species", "images.save")),
    "collect": (2, "process", ("images.examples", "fourier.threshold")),
}  # fmt: skip
# What the first step reads besides where drift is that of particles, or of what is none.
ANCHOR = ("drift.anchor", "particles")
# What each step reads of the movie's calibration: recalibration redoes nothing that was computed in pixels.
CALIBRATION = {
    "calibrate": ("counts_per_electron",), "survey": ("planes",), "adapt": ("gaps",), "vote": ("sampling",),
    "collect": ("time", "energy", "defocus"),
}  # fmt: skip
WEIGHTS = {"adapt": ("adapt",), "vote": ("vote",), "process": ("particles", "species")}
BLOCK_PIXELS = 2**23
BLOCK_FRAMES = (4, 16)


def from_step(step: str) -> tuple[str, ...]:
    """A step and all that follow it."""
    names = list(STEPS)
    return tuple(names[names.index(step) :])


def block_frames(settings: Settings, shape: tuple[int, int, int]) -> int:
    """Frames per block: as set, or so many that a block has about 8 million pixels (at least 4, at most 16)."""
    if settings.blocks.frames is not None:
        return settings.blocks.frames
    low, high = BLOCK_FRAMES
    return min(high, max(low, BLOCK_PIXELS // (shape[1] * shape[2])))


def blocks(frames: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, end) of consecutive runs of ``size`` frames; the last may be shorter."""
    for start in range(0, frames, size):
        yield start, min(start + size, frames)


def digest(data: Any) -> str:
    """SHA-256 of JSON-able data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def maps(settings: Settings) -> dict[str, str]:
    """Hashes of the detector's reference images, by setting: the path alone does not say what they hold."""
    found = {}
    for name in ("dark", "gain"):
        path: Path | None = getattr(settings.detector, name)
        if path is None:
            continue
        if not path.is_file():
            raise SettingsError(f"detector.{name} is {path}, which is no file; expected an image file")
        found[f"detector.{name}.sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def calibration(
    settings: Settings, *, sampling: float, time: Sequence[float], energy: float | None, counts_per_electron: Any,
    defocus: Sequence[float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a stack says of its axes and its detector, as far as results depend on it.

    ``sampling`` [Å/px], ``time`` [s], ``energy`` [keV], ``defocus`` [Å] of a focal series. Gaps are counted in median
    intervals: a frame interval that is stated anew does not move them.
    """
    stamps = np.asarray(time, dtype=float) - time[0]
    planes = {} if defocus is None else {"planes": len(defocus), "defocus": [float(value) for value in defocus]}
    return {
        **planes,
        "sampling": float(sampling),
        "time": digest(stamps.tolist()),
        "energy": energy,
        "counts_per_electron": settings.source.counts_per_electron or counts_per_electron,
        "gaps": digest(frame_runs(stamps, max_gap=settings.denoise.max_gap).tolist()),
    }


def dependencies(
    settings: Settings, content: str, facts: Mapping[str, Any], *, lead: str = ""
) -> dict[str, dict[str, Any]]:
    """What each step depends on, as flat dictionaries that can be compared and shown.

    ``content`` is the hash of the stack's pixels, ``facts`` its ``calibration``; ``lead`` is the fingerprint of the
    adaptation that the movie takes over from another one of its group.
    """
    flat = flatten(settings.model_dump(mode="json"))
    loaded = hashes(settings)
    references = maps(settings)
    found: dict[str, dict[str, Any]] = {}
    for step, (version, before, sections) in STEPS.items():
        mine = {k: v for k, v in flat.items() if any(k == s or k.startswith(s + ".") for s in sections)}
        mine.pop("denoise.group", None)  # a name; what is taken over is `lead`
        inherited = found[before] if before else {"source.content": content}
        named = WEIGHTS.get(step, ())
        stated = {f"stack.{name}": facts[name] for name in CALIBRATION.get(step, ()) if name in facts}
        if step == "calibrate" and settings.drift.correct and settings.drift.anchor != "frame":
            mine |= {k: v for k, v in flat.items() if k == ANCHOR[0] or k.startswith(f"{ANCHOR[1]}.")}
            stated["stack.sampling"] = facts["sampling"]
            named = (*named, "particles")
        weights = {f"{name}.weights": loaded[name] for name in named if name in loaded}
        stated |= references if step == "calibrate" else {}
        stated |= {"denoise.group.lead": lead} if step == "adapt" and lead else {}
        found[step] = {**inherited, **mine, **stated, **weights, f"{step}.version": version}
    return found


def fingerprints(deps: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Digest of each step's dependencies."""
    return {step: digest(values) for step, values in deps.items()}


def why_stale(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What changed between two dictionaries of dependencies: ``name: old → new``."""
    names = sorted(set(old) | set(new))
    changes = [f"{n}: {_short(old.get(n))} → {_short(new.get(n))}" for n in names if old.get(n) != new.get(n)]
    return "; ".join(changes[:6]) + ("; …" if len(changes) > 6 else "")


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text


@dataclass(frozen=True)
class StepPlan:
    """One line of the plan: how many blocks of a step there are, how many must run, and why."""

    step: str
    blocks: int
    todo: int
    reason: str


def finished(ledger: Ledger, parts: Path, step: str, start: int, stop: int, fingerprint: str) -> bool:
    """Whether a block needs no work: its part exists, and ledger or part say that it answers this fingerprint."""
    path = part_path(parts, step, start, stop, fingerprint)
    if not path.exists():
        return False
    if ledger.is_done(step, start, stop, fingerprint):
        return True
    meta = read_meta(path)
    return meta is not None and meta.get("fingerprint") == fingerprint


def step_blocks(step: str, frames: int, size: int) -> Iterator[tuple[int, int]]:
    """The blocks of a step: one for global answers, runs of frames for the rest."""
    return blocks(frames, size) if step in ("survey", "process") else iter([(0, frames)])


def plan_movie(
    ledger: Ledger, parts: Path, *, frames: int, size: int, deps: Mapping[str, Mapping[str, Any]]
) -> list[StepPlan]:
    """For every step: how many of its blocks will run, and why."""
    keys = fingerprints(deps)
    lines = []
    for step in ("calibrate", "survey", "drift", "adapt", "vote", "process"):
        total = todo = failed = 0
        for start, stop in step_blocks(step, frames, size):
            total += 1
            if not finished(ledger, parts, step, start, stop, keys[step]):
                todo += 1
                state = ledger.state(step, start, stop)
                failed += state is not None and state[:2] == (keys[step], "failed")
        lines.append(StepPlan(step, total, todo, _reason(ledger, step, deps[step], keys[step], total, todo, failed)))
    return lines


def _reason(ledger: Ledger, step: str, deps: Mapping[str, Any], key: str, total: int, todo: int, failed: int) -> str:
    if not todo:
        return "done"
    if failed:
        return f"failed ({failed}); will be tried again"
    last = ledger.last_deps(step)
    if last is not None and last[0] != key:
        return f"stale: {why_stale(last[1], deps)}"
    return "missing" if todo == total else f"missing ({total - todo} of {total} done)"


# ----------------------------------------------------------------------------------------------------------- costs

BASE_MEMORY = 0.7e9  # bytes of a worker that has imported torch, zarr and dask and loaded both networks
SAMPLE_PIXELS = 2**26  # most pixels of a sample of frames: what keeps it in memory whatever the frame size
REGION_BYTES = 64  # per pixel of a frame whose particles are labelled and measured
MOVED_BYTES = 6  # per pixel and neighbour of a frame whose neighbours are moved in parts: value, validity, their sum
SPECTRUM_BYTES = 72  # per pixel of what is Fourier transformed: the box of a particle, or the middle of a frame
FITTING_MEMORY = 0.25e9  # bytes that the fit of the noise takes at most beside its frames


@dataclass(frozen=True)
class Costs:
    """What a run needs: bytes on disk, files, and the peak memory of one task [bytes]."""

    stack_bytes: int
    result_bytes: int
    files: int
    task_memory: float


def predict_memory(
    settings: Settings, shape: tuple[int, int, int], itemsize: int, size: int, halo: int, planes: int = 1
) -> float:
    """Peak memory of the largest task [bytes], from shapes alone.

    A process task holds size + 2·halo frames as counts and as electrons, size denoised frames, probabilities and labels
    to keep, the neighbours of one frame moved onto it, and one after the other the activations of one tile or window of
    a network, what measuring the particles and the spectrum of one frame takes, and the planes of one frame of a focal
    series; a survey task holds size + max lag frames and their spectra; calibration a sample of frames as counts,
    corrected and in electrons; an ingest task a shard as read, as cut and as compressed. Checked against measured peaks
    of 256² to 2048² pixels.
    """
    pixels = shape[1] * shape[2]
    with_halo = min(shape[0], size + 2 * halo)
    images = (2 if settings.images.save else 1) + len({"labels", "uncertainty"} & set(settings.images.save))
    held = pixels * (with_halo * (itemsize + 8) + size * 4 * (1 + images) + 10 * 4)
    tile = min(pixels, (settings.denoise.tile or math.inf) ** 2)
    windows = [settings.segment.window]
    windows += [settings.particles.window] if settings.particles.model is not None else []
    windows += [settings.species.window] if settings.species.model is not None else []
    # Some 50 maps, and those of them that the next convolution reads once more.
    activations = max(tile, *(min(pixels * 1.0, (window or math.inf) ** 2) for window in windows)) * 4 * 96
    series = planes * pixels * (itemsize + 24) + pixels * 64 if planes > 1 else 0
    spectrum = pixels if settings.particles.model is not None else min(pixels, SPECTRUM_EDGE**2)
    regions = pixels * REGION_BYTES if settings.particles.model is not None else 0
    moved = pixels * MOVED_BYTES * (2 * halo + 1) if settings.denoise.motion else 0
    process = held + moved + max(activations, regions, spectrum * SPECTRUM_BYTES, series)
    pairs = min(shape[0], size + max(settings.drift.lags))
    survey = pixels * (pairs * (itemsize + 4 + 8) + 12 * 8) + series
    sample = min(shape[0] * pixels, settings.detector.sample_frames * pixels, max(SAMPLE_PIXELS, 8 * pixels))
    ingest = 3 * min(shape[0] * planes * pixels * itemsize, settings.stacks.shard_megabytes * 2**20)
    calibrate = sample * (itemsize + 8) + min(sample * 30, FITTING_MEMORY)
    return BASE_MEMORY + max(process, survey, calibrate, ingest)


def predict_costs(
    settings: Settings, shape: tuple[int, int, int], itemsize: int, *, size: int, halo: int, shard_frames: int,
    planes: int = 1,
) -> Costs:  # fmt: skip
    """Disk and memory of one movie; column tables are estimated at one column per 120 pixels of 0.2 Å."""
    pixels = shape[0] * shape[1] * shape[2]
    images = len(settings.images.save) * pixels * 4 * 4 // 3
    columns = pixels // 600 * 80
    count = math.ceil(shape[0] / size)
    files = math.ceil(shape[0] / shard_frames) + 2 * count + 60 + len(settings.images.save) * count * 4
    memory = predict_memory(settings, shape, itemsize, size, halo, planes)
    return Costs(pixels * itemsize * planes, images + columns * 2, files, memory)


def require_memory(predicted: float, available: float) -> None:
    """Refuse work that would not fit into a worker; both in bytes."""
    if predicted > available:
        raise ResourceError(
            f"a task is predicted to need {predicted / 1e9:.2f} GB; a worker has {available / 1e9:.2f} GB: ask for "
            "fewer workers, or set blocks.frames, denoise.tile or segment.window lower"
        )


def denoiser_halo(settings: Settings) -> int:
    """Neighbours on either side that the denoiser needs."""
    if settings.denoise.network == "none":
        return 0
    if settings.denoise.network == "wcvd":
        return 1
    named = settings.denoise.weights
    denoiser: Any = network(denoiser_of(settings.denoise.tier) if named in TRAINED_HERE else named, "cpu").module
    return max(abs(k) for k in denoiser.around)
