"""What is measured in one frame: the rows of its columns and particles, its species and its lattice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import inference
from pipeline.models import classes_of, species_network, too_dim_for_species
from pipeline.movie import Clock, Movie, saturation_of
from pipeline.steps import columns, detector, focus, fourier, particles, species
from pipeline.steps.residual import residual, whiteness
from schemas.conventions import STATUS

Rows = dict[str, np.ndarray]
SPECTRUM_EDGE = 1024  # px of the middle of a frame without particles whose spectrum is read
BAND_SEEN = 1.5  # times the lowest frequency of lattice peaks must be resolved
ROUND_WIDTH = 0.35  # Å over which the denoised frame is smoothed to tell fringes; more fills the rings of thick columns
BRIM = 1.5  # Å beyond a particle's outline where its fringes are still seen
SPECIES_BATCH = 1  # windows at a time: fixed, since another batch may change the last bits
_MEASURES = (
    "area", "equivalent_diameter", "perimeter", "orientation", "major_axis", "minor_axis", "contact", "probability",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Rows of ``/columns`` and ``/particles`` of one frame, its own numbers, and its labels (y, x)."""

    columns: Rows
    particles: Rows
    facts: dict[str, Any]
    labels: np.ndarray | None


@dataclass(frozen=True)
class _Named:
    """Species of columns (column,), how many of each class, missing atoms and the standard error of their number."""

    name: np.ndarray
    probability: np.ndarray
    count: np.ndarray
    vacancies: int = -1
    error: float = float("nan")


def measure_frame(movie: Movie, images: inference.Images, row: int, clock: Clock) -> Measured:
    """All that is measured in one frame of a block; nothing in a frame that is not good."""
    index = images.first + row
    good = bool(images.good[row]) and movie.model is not None and movie.drift_px is not None
    labels, regions = particles_of(movie, images, row, clock) if good else (None, None)
    found = _columns(movie, images, row, labels, clock) if good else {}
    y, x = found.get("y", np.zeros(0)), found.get("x", np.zeros(0))
    named = _species(movie, index, y, x, clock) if good else _unnamed(movie, 0)
    inside = np.full(len(y), -1, np.int32) if labels is None else particles.particle_of(labels, y, x)
    with clock("fourier"):
        lattice = _lattice(movie, images.electrons[row], labels) if good else {"frame": np.nan}
    facts = {
        "species_count": named.count,
        "vacancy_count": named.vacancies,
        "vacancy_count_err": named.error,
        "fourier_ratio": _ratio_of_frame(lattice, regions),
        **_residual(movie, images, row, clock),
    }
    ratio = np.append(lattice.get("ratio", np.zeros(0)), np.nan)[inside]  # the last for columns in no particle
    table = _column_rows(movie, index, found, named, (inside, ratio))
    return Measured(table, _particle_rows(movie, index, regions or {}, lattice), facts, labels)


def _residual(movie: Movie, images: inference.Images, row: int, clock: Clock) -> dict[str, float]:
    """How strong and how white that is what the denoiser took away; NaN where nothing was denoised."""
    if movie.model is None or not images.good[row]:
        return {"residual_spread": np.nan, "residual_correlation": np.nan}
    with clock("residual"):
        taken = residual(images.electrons[row], images.denoised[row], readout_variance=movie.model.readout_variance)
        found = whiteness(taken)
    return {"residual_spread": found.spread, "residual_correlation": found.correlation}


# ----------------------------------------------------------------------------------------------------------- columns


def _columns(movie: Movie, images: inference.Images, row: int, labels: np.ndarray | None, clock: Clock) -> Rows:
    """Columns in pixels of their own frame: down the frame, then across, an order that no cut and no device changes."""
    options, sampling, phase = movie.settings.columns, movie.stack.sampling, movie.settings.source.mode == "hrtem"
    if images.probability is None or movie.model is None:
        return {}
    with clock("columns"):
        peaks = columns.find_columns(
            images.probability[row], threshold=options.threshold, min_distance=options.min_distance / sampling
        )
        found = columns.refine(
            images.electrons[row], images.denoised[row], peaks.y, peaks.x, polarity=images.polarity,
            width=options.width / sampling, fit_width=options.fit_width,
            readout_variance=movie.model.readout_variance, share=options.share,
        )  # fmt: skip
        table: Rows = {name: np.asarray(values) for name, values in found.items()} | {"probability": peaks.probability}
        table["evidence"] = columns.evidence(
            *images.neighbourhood(row), images.denoised[row], found, polarity=images.polarity,
            readout_variance=movie.model.readout_variance,
        )  # fmt: skip
        table["roundness"] = columns.roundness(
            images.denoised[row], table["y"], table["x"], polarity=images.polarity, width=ROUND_WIDTH / sampling
        )
        table["beside"] = (
            np.full(len(peaks.y), -1)
            if labels is None
            else particles.particle_of(labels, table["y"], table["x"], reach=BRIM / sampling)
        )
        keep = columns.reported(
            table, shape=images.electrons.shape[1:], margin=options.margin / sampling,
            min_significance=options.min_significance, min_relative=options.min_relative if phase else 0.0,
            min_roundness=options.min_roundness, min_distance=options.min_distance / sampling,
        )  # fmt: skip
    chosen = np.flatnonzero(keep)
    chosen = chosen[np.lexsort((table["x"][chosen], table["y"][chosen]))]
    return {name: values[chosen] for name, values in table.items()}


def _column_rows(
    movie: Movie, index: int, found: Mapping[str, np.ndarray], named: _Named, inside: tuple[np.ndarray, np.ndarray]
) -> Rows:
    """Rows of ``/columns``, positions in Å in the specimen frame; inside: which particle, and its Fourier ratio."""
    sampling, empty = movie.stack.sampling, np.zeros(0)
    displacement = movie.settings.columns.displacement
    names = ("intensity", "intensity_err", "background", "significance", "evidence", "roundness", "probability")
    return {
        "frame": np.full(len(named.name), index, dtype=np.int32),
        **_in_specimen(movie, index, found),
        "y_err": np.hypot(found.get("y_err", empty) * sampling, displacement),
        "x_err": np.hypot(found.get("x_err", empty) * sampling, displacement),
        **{name: found.get(name, empty) for name in names},
        "supported": (found.get("evidence", empty) >= movie.settings.columns.min_evidence).astype(np.int8),
        "species": named.name,
        "species_probability": named.probability,
        "particle": inside[0],
        "particle_ratio": inside[1],
    }


def _in_specimen(movie: Movie, index: int, found: Mapping[str, np.ndarray]) -> Rows:
    """y and x [px] of a frame as positions [Å] in the specimen frame: on the detector, without the drift."""
    path = np.zeros(2) if movie.drift_px is None else movie.drift_px[index]
    origin, empty = movie.stack.origin, np.zeros(0)
    return {
        axis: origin[i] + (found.get(axis, empty) - path[i]) * movie.stack.sampling for i, axis in enumerate(("y", "x"))
    }


# --------------------------------------------------------------------------------------------------------- particles


def particles_of(
    movie: Movie, images: inference.Images, row: int, clock: Clock
) -> tuple[np.ndarray | None, Rows | None]:
    """Labels (y, x) of the particles of a frame and their measures; None where particles are not looked for."""
    with clock("particles"):
        found = inference.particles_in(movie, images.denoised[row])
        if found is None:
            return None, None
        labels, probability = found
        return labels, particles.measure(labels, probability, sampling=movie.stack.sampling)


def _particle_rows(movie: Movie, index: int, regions: Mapping[str, np.ndarray], lattice: Mapping[str, Any]) -> Rows:
    """Rows of ``/particles``; whether they can be interpreted is decided when tables are written."""
    empty = np.zeros(0)
    count = len(regions.get("y", empty))
    spacings = np.asarray(lattice.get("spacings", np.zeros((0, 2)))).reshape(count, 2)
    return {
        "frame": np.full(count, index, dtype=np.int32),
        **_in_specimen(movie, index, regions),
        **{name: regions.get(name, empty) for name in _MEASURES},
        "fourier_ratio": np.asarray(lattice.get("ratio", empty)).reshape(count),
        "lattice_spacing_1": spacings[:, 0],
        "lattice_spacing_2": spacings[:, 1],
        "zone": np.asarray(lattice.get("zone", np.zeros(0, "<U1")), dtype=str).reshape(count),
    }


def _lattice(movie: Movie, electrons: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    """What the Fourier transforms of the particles say; of the whole frame, as ``frame``, where there is none."""
    options = movie.settings.fourier
    facts: dict[str, Any] = {
        "sampling": movie.stack.sampling, "band": options.band, "significance": options.significance,
        "threshold": options.threshold,
    }  # fmt: skip
    # Where hardly any of the band lies below the highest frequency of the frame, no lattice is resolved.
    if not np.isfinite(electrons).all() or 2 * movie.stack.sampling * BAND_SEEN * options.band[0] >= 1:
        return {"frame": np.nan} if labels is None else {"frame": np.nan, **_no_lattice(int(labels.max()))}
    if labels is not None and labels.any():
        return dict(fourier.fourier_map(electrons, labels, **facts))
    middle = tuple(slice(max(0, (n - SPECTRUM_EDGE) // 2), (n + SPECTRUM_EDGE) // 2) for n in electrons.shape)
    return {"frame": fourier.frame_ratio(electrons[middle], **facts)["ratio"]}


def _no_lattice(count: int) -> dict[str, Any]:
    nothing = np.full(count, np.nan)
    return {"ratio": nothing, "spacings": np.stack([nothing, nothing], 1), "zone": np.full(count, "", dtype="<U1")}


def _ratio_of_frame(lattice: Mapping[str, Any], regions: Mapping[str, np.ndarray] | None) -> float:
    """That of the largest particle that has one, of the whole frame where there is no particle."""
    if "frame" in lattice or regions is None:
        return float(lattice.get("frame", np.nan))
    seen = np.flatnonzero(np.isfinite(lattice["ratio"]))
    return float(lattice["ratio"][seen[np.argmax(regions["area"][seen])]]) if len(seen) else float("nan")


# ----------------------------------------------------------------------------------------------------------- species


def _unnamed(movie: Movie, count: int) -> _Named:
    """Species where no model is asked, or has nothing to go by."""
    only = movie.settings.species.only if movie.settings.species.model is None else None
    given = species.assign_species(count, only=only)
    classes = classes_of(movie.settings)
    return _Named(given.name, given.probability, species.count_species(given.name, classes=classes))


def _species(movie: Movie, index: int, y: np.ndarray, x: np.ndarray, clock: Clock) -> _Named:
    """Species of columns at y, x [px], and the atoms that are missing in the frame."""
    options = movie.settings.species
    if options.model is None or too_dim_for_species(movie.settings, dose=movie.dose) is not None:
        return _unnamed(movie, len(y))
    model = species_network(options.model, movie.task.device)
    with clock("read"):
        planes = aligned_planes(movie, index) if model.planes > 1 else _plane(movie, index)
    if not np.isfinite(planes).all():
        return _unnamed(movie, len(y))
    with clock("species"):
        found = species.classify(
            model, planes, columns=(y, x), sampling=movie.stack.sampling, threshold=options.threshold,
            margin=options.margin, windowing=(options.window, SPECIES_BATCH), device=movie.task.device,
        )  # fmt: skip
        count = species.count_species(found.columns.name, classes=model.classes)
        best = found.sites.probabilities.argmax(1) if len(found.sites.y) else np.zeros(0, int)
        for place, name in enumerate(model.classes):
            # Empty sites are no columns: those that the network found itself are counted.
            count[place] = count[place] if model.occupied(name) else np.count_nonzero(best == place)
        lacking, error = species.vacancies(found.sites.probabilities, missing=model.missing)
    if not any(model.missing):
        return _Named(found.columns.name, found.columns.probability, count)
    return _Named(found.columns.name, found.columns.probability, count, round(lacking), error)


def _plane(movie: Movie, index: int) -> np.ndarray:
    """The plane (1, y, x) that is processed, in electrons."""
    return movie.electrons(movie.counts(index, index + 1))


def aligned_planes(movie: Movie, index: int) -> np.ndarray:
    """All planes (defocus, y, x) of a frame in electrons, on the grid of the one that is processed."""
    planes = movie.planes(index)
    if movie.offsets is None:
        raise RuntimeError("the movie was opened before the offsets of its planes were solved")
    for place, offset in enumerate(movie.offsets[index]):
        if place != movie.settings.source.defocus_plane and np.isfinite(planes[place]).all():
            planes[place] = focus.moved_back(planes[place], offset)
    return planes


# ------------------------------------------------------------------------------------------------------------ frames


def frame_rows(movie: Movie, images: inference.Images, measured: list[Measured]) -> Rows:
    """The rows of ``/frames`` of a block, drift and offsets in Å."""
    rows = slice(images.first, images.first + len(measured))
    stack, model = movie.stack, movie.model
    if movie.drift_px is None or movie.drift_err is None or model is None:
        raise RuntimeError("the movie was opened before its drift was solved")
    good = images.good
    # A frame whose estimate is not finite would be an empty frame that looks measured.
    failed = good & ~np.isfinite(images.denoised).all((1, 2))
    path, error = movie.drift_px[rows] * stack.sampling, movie.drift_err[rows] * stack.sampling
    mean = images.electrons.mean((1, 2), dtype=np.float64)
    snr = images.denoised.std((1, 2), dtype=np.float64) / np.sqrt(np.maximum(mean + model.readout_variance, 1e-12))
    dose = mean / stack.sampling**2 if model.calibrated else np.full(len(mean), np.nan)
    statistics = detector.frame_statistics(images.counts, saturation=saturation_of(stack, movie.settings))
    status = np.where(good, np.where(failed, STATUS["failed"], STATUS["measured"]), STATUS["dropped"])
    return {
        "status": status.astype("i1"),
        "reason": np.where(failed, "the denoised frame is not finite", images.reasons),
        "drift_y": path[:, 0],
        "drift_x": path[:, 1],
        "drift_y_err": error[:, 0],
        "drift_x_err": error[:, 1],
        "column_count": np.array([len(one.columns["y"]) for one in measured], dtype=np.int32),
        "particle_count": np.array([len(one.particles["y"]) for one in measured], dtype=np.int32),
        **{name: np.array([one.facts[name] for one in measured]) for name in measured[0].facts},
        **_offset_rows(movie, rows),
        "mean_electrons": np.where(good, mean, np.nan),
        "dose": np.where(good, dose, np.nan),
        "snr": np.where(good, snr, np.nan),
        "saturated_fraction": statistics["saturated_fraction"],
        "denoiser": np.full(len(good), images.denoiser),
        "device": np.full(len(good), images.device),
    }


def _offset_rows(movie: Movie, rows: slice) -> Rows:
    """How planes lie against the one that is processed [Å]; nothing outside of focal series."""
    if movie.offsets is None:
        return {}
    offsets = movie.offsets[rows] * movie.stack.sampling
    return {"defocus_shift_y": offsets[..., 0], "defocus_shift_x": offsets[..., 1]}
