"""Networks on a movie's frames: denoise, low-pass, segment; the same few lines for blocks, votes and examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from pipeline.models import cutoff, finds_particles, network
from pipeline.movie import Clock, Movie, device_text, saturation_of
from pipeline.networks.weights import Loaded
from pipeline.steps import denoise, detector, neighbours, particles, segment
from pipeline.steps.gpu import Graphs
from pipeline.steps.lowpass import lowpass

VOTING_FRAMES = 6
DAMAGED = "the file is damaged here"
SEGMENT_BATCH = 1  # windows at a time: fixed, since another batch may change the last bits


@dataclass(frozen=True)
class Denoised:
    """A run of frames from ``first`` on, as (time, y, x) float32; frames that are not good hold NaN.

    electrons and denoised [electrons]. surroundings (time, y, x) [electrons]: the frames and, on either side, those
    that the ``denoiser`` looked at, ``before`` of them in front; links: of all these; offsets: those it
    looks at itself.
    """

    first: int
    counts: np.ndarray
    electrons: np.ndarray
    denoised: np.ndarray
    denoiser: str
    surroundings: np.ndarray
    before: int
    links: neighbours.FrameLinks
    offsets: tuple[int, ...]
    uncertainty: np.ndarray | None
    """Standard deviation of the error of ``denoised`` that the denoiser expects [electrons], where it is kept."""

    def neighbourhood(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean (y, x) [electrons] of the frames behind a denoised frame, and how many of them each pixel has."""
        return neighbours.neighbourhood(self.surroundings, row + self.before, offsets=self.offsets, links=self.links)


@dataclass(frozen=True)
class Images(Denoised):
    """Denoised frames, segmented; probability (time, y, x) [1], None where the sampling resolves no columns."""

    probability: np.ndarray | None
    good: np.ndarray
    reasons: np.ndarray
    polarity: int
    device: str


def denoiser_of(movie: Movie) -> tuple[Loaded | None, str]:
    """The movie's denoiser (None: no denoising) and the text that names it."""
    _, facts = movie.task.answer("adapt")
    if facts["weights"] is None:
        return None, "none"
    path = movie.task.part("adapt", 0, movie.task.frames).with_suffix(".safetensors")
    chosen = str(path) if facts["weights"] == "own" else str(facts["weights"])
    return network(chosen, movie.task.device), f"{facts['network']} {facts['sha256'][:12]}"


def offsets_of(loaded: Loaded | None) -> tuple[int, ...]:
    """Frames that a denoiser looks at, counted from the one that it estimates; that one alone without a denoiser."""
    return tuple(cast(Any, loaded.module).offsets) if loaded is not None else (0,)


def number_format(movie: Movie) -> str:
    """Number format that the denoiser computes in."""
    wanted = movie.settings.denoise.dtype
    if wanted != "auto":
        return wanted
    return "bfloat16" if denoise.has_bfloat16(movie.task.device) else "float32"


def denoised(movie: Movie, frames: range, clock: Clock) -> Denoised:
    """Denoise a run of frames."""
    loaded, name = denoiser_of(movie)
    offsets = offsets_of(loaded)
    halo = max(map(abs, cast(Any, loaded.module).around)) if loaded is not None else 0
    low, high = max(0, frames.start - halo), min(movie.task.frames, frames.stop + halo)
    with clock("read"):
        counts = movie.counts(low, high)
    with clock("detector"):
        electrons = movie.electrons(counts)
    links = movie.links(low, high)
    own = slice(frames.start - low, frames.stop - low)
    out = np.full((len(frames), *electrons.shape[1:]), np.nan, dtype=np.float32)
    wanted = [i for i in range(own.start, own.stop) if links.good[i]]
    place = [i - own.start for i in wanted]
    expected = np.full_like(out, np.nan) if "uncertainty" in movie.settings.images.save else None
    if loaded is None:
        out[place] = electrons[wanted]
    elif wanted and movie.level is not None:
        how: dict[str, Any] = {
            "links": links, "level": movie.level, "tile": movie.settings.denoise.tile,
            "dtype": movie.settings.denoise.dtype, "device": movie.task.device,
        }  # fmt: skip
        module: Any = loaded.module
        with clock("denoise"):
            if expected is not None:
                out[place], expected[place] = denoise.denoise_with_errors(module, electrons, wanted, **how)
            else:
                captured = movie.settings.denoise.graphs and movie.task.device.startswith("cuda")
                used: Any = Graphs(module) if captured else module
                out[place] = denoise.denoise(used, electrons, wanted, **how)
    limit = cutoff(movie.settings, energy=movie.stack.attributes.get("energy"))
    if place and limit is not None:
        with clock("lowpass"):
            out[place] = lowpass(out[place], cutoff=limit, sampling=movie.stack.sampling)
    return Denoised(
        frames.start, counts[own], electrons[own], out, name, electrons, own.start, links, offsets, expected
    )


def segments(movie: Movie) -> bool:
    """Whether columns can be looked for at the movie's sampling."""
    return segment.usable(movie.stack.sampling)


def vote(movie: Movie, clock: Clock) -> tuple[list[float], int]:
    """Evidence per voting frame that atoms are bright, and the sign of the contrast that the run will use."""
    stated = {"bright": 1, "dark": -1}.get(movie.settings.segment.contrast)
    if stated is None and movie.settings.source.mode == "haadf":
        stated = 1
    if stated is not None or not segments(movie) or movie.good is None:
        return [], stated or 1
    good = np.flatnonzero(movie.good)
    chosen = good[np.unique(np.linspace(0, len(good) - 1, VOTING_FRAMES).round().astype(int))] if len(good) else []
    evidence = []
    loaded = network(movie.settings.segment.model, movie.task.device)
    for index in chosen:
        image = denoised(movie, range(int(index), int(index) + 1), clock).denoised
        with clock("segment"):
            evidence += segment.polarity_evidence(loaded.module, image, **_options(movie, loaded)).tolist()
    return evidence, 1 if sum(evidence) >= 0 else -1


def _options(movie: Movie, loaded: Loaded) -> dict[str, Any]:
    return {
        "sampling": movie.stack.sampling,
        "model_sampling": float(loaded.metadata["sampling"]),
        "window": movie.settings.segment.window,
        "halo": movie.settings.segment.halo,
        "batch": SEGMENT_BATCH,
        "device": movie.task.device,
    }


def infer(movie: Movie, frames: range, clock: Clock) -> Images:
    """Denoise and segment a run of frames."""
    seen = denoised(movie, frames, clock)
    _, ballot = movie.task.answer("vote")
    good = movie.good[frames.start : frames.stop] if movie.good is not None else np.zeros(len(frames), dtype=bool)
    probability = None
    if ballot["usable"]:
        loaded = network(movie.settings.segment.model, movie.task.device)
        probability = np.full(seen.denoised.shape, np.nan, dtype=np.float32)
        with clock("segment"):
            probability[good] = segment.column_probability(
                loaded.module, seen.denoised[good], polarity=ballot["polarity"], **_options(movie, loaded)
            )
    return Images(
        **vars(seen), probability=probability, good=good, reasons=_reasons(movie, seen.counts, frames, good),
        polarity=ballot["polarity"],
        device=device_text(movie.task.device, number_format(movie), movie.task.halvings),
    )  # fmt: skip


def particles_in(movie: Movie, smooth: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Labels (y, x) of the particles in a denoised frame (y, x), and the probability (y, x) that they are made of; None
    where none are sought."""
    if not finds_particles(movie.settings, movie.stack.sampling):
        return None
    options, pixel = movie.settings.particles, movie.stack.sampling**2
    loaded = network(str(options.model), movie.task.device)
    found = segment.particle_probability(
        loaded.module, smooth[None], sampling=movie.stack.sampling, model_sampling=float(loaded.metadata["sampling"]),
        window=options.window, halo=options.halo, batch=SEGMENT_BATCH, device=movie.task.device,
    )  # fmt: skip
    labels = particles.label(
        found[0], threshold=options.threshold, min_area=options.min_area / pixel, max_hole=options.max_hole / pixel,
        neck=options.neck,
    )  # fmt: skip
    return labels, found[0]


def _reasons(movie: Movie, counts: np.ndarray, frames: range, good: np.ndarray) -> np.ndarray:
    """Why frames were dropped; empty for good ones."""
    statistics = detector.frame_statistics(counts, saturation=saturation_of(movie.stack, movie.settings))
    _, reasons = detector.frame_flags(statistics, max_saturated_fraction=movie.settings.detector.max_saturated_fraction)
    damaged = ~movie.stack.frame_ok[frames.start : frames.stop]
    return np.asarray(
        ["the file is damaged here" if d else r for d, r in zip(damaged, reasons, strict=True)], dtype=str
    )
