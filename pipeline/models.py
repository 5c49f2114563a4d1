"""The networks that settings name: loaded once per process, hashed, and refused where they do not fit a movie."""

from __future__ import annotations

import functools
import hashlib

from pipeline.networks.weights import Loaded, denoiser_of, load_weights, resolve
from pipeline.steps import segment, species
from pipeline.steps.lowpass import ROLL_OFF, information_limit
from pipeline.steps.species import SpeciesModel
from schemas.errors import SettingsError
from schemas.settings import Particles, Segment, Settings

TRAINED_HERE = ("pretrained", "adapt", "scratch")
"""Words of ``denoise.weights`` that name no file."""


@functools.lru_cache(maxsize=8)
def network(path: str, device: str) -> Loaded:
    """A network ready for inference on a device, loaded once per process."""
    loaded = load_weights(path)
    return loaded._replace(module=loaded.module.to(device))


@functools.lru_cache(maxsize=4)
def species_network(path: str, device: str) -> SpeciesModel:
    """A network that tells species apart, and what its weights say of it."""
    loaded = network(path, device)
    return SpeciesModel.of(loaded.module, loaded.metadata)


def weights_hash(name_or_path: str) -> str:
    """SHA-256 of a weights file."""
    return hashlib.sha256(resolve(name_or_path).read_bytes()).hexdigest()


def hashes(settings: Settings) -> dict[str, str]:
    """Hashes of the weights that a run loads, by what they are for: adapt, vote (columns), particles, species."""
    found = {}
    denoise = settings.denoise
    if denoise.network == "blindspot":
        if denoise.weights != "scratch":
            shipped = denoise.weights in TRAINED_HERE
            found["adapt"] = weights_hash(denoiser_of(denoise.tier) if shipped else denoise.weights)
    elif denoise.network == "wcvd" and denoise.weights not in TRAINED_HERE:
        found["adapt"] = weights_hash(denoise.weights)
    found["vote"] = weights_hash(settings.segment.model)
    if settings.particles.model is not None:
        found["particles"] = weights_hash(settings.particles.model)
    if settings.species.model is not None:
        found["species"] = weights_hash(settings.species.model)
    return found


def in_use(settings: Settings, device: str) -> dict[str, str]:
    """First digits of the hashes of the networks that this process computes with, beside the movie's own denoiser."""
    named = {
        "segment": settings.segment.model,
        "particles": settings.particles.model,
        "species": settings.species.model,
    }
    return {use: network(model, device).sha256[:12] for use, model in named.items() if model is not None}


def particle_range(settings: Settings) -> tuple[float, float] | None:
    """Least and greatest sampling [Å/px] at which particles can be looked for; None where no model is named."""
    if settings.particles.model is None:
        return None
    facts = network(settings.particles.model, "cpu").metadata
    try:
        limits = zip(facts["sampling_range"], segment.PARTICLE_SAMPLING_RANGE, strict=True)
        (low, least), (high, most) = ((float(one), float(other)) for one, other in limits)
    except (KeyError, TypeError, ValueError):
        raise SettingsError(
            f"the weights {settings.particles.model!r} state no sampling_range; expected those of a particle network; "
            "set particles.model to one, or to none"
        ) from None
    return max(low, least), min(high, most)


def halo_of(options: Segment | Particles) -> int:
    """Halo of a window of a network on each side [px of the network]; 0 without a network."""
    if options.halo is not None or options.model is None:
        return options.halo or 0
    return int(getattr(network(options.model, "cpu").module, "receptive_radius", 0))


def finds_particles(settings: Settings, sampling: float) -> bool:
    """Whether particles are looked for in a movie of this sampling [Å/px]."""
    limits = particle_range(settings)
    return limits is not None and limits[0] <= sampling <= limits[1]


def classes_of(settings: Settings) -> tuple[str, ...]:
    """Names along ``species_class``."""
    if settings.species.model is not None:
        return species_network(settings.species.model, "cpu").classes
    return species.assign_species(0, only=settings.species.only).classes


def cutoff(settings: Settings, *, energy: float | None) -> float | None:
    """Cut-off of the low-pass after the denoiser [1/Å] in a movie of this beam energy [keV]; None: no filter.

    By the information limit, nothing below that limit is damped.
    """
    options = settings.lowpass
    if options.cutoff != "information":
        return options.cutoff
    if energy is None or settings.source.mode != "hrtem":
        return None
    return information_limit(float(energy), focal_spread=options.focal_spread) / (1 - ROLL_OFF)


def too_dim_for_species(settings: Settings, *, dose: float) -> float | None:
    """The dose [e⁻/Å² per image] that the species model was trained with at least, if `dose` is below it, else None.

    A network shown fewer electrons sees vacancies in noise. dose NaN, of counts that are not calibrated: never too dim.
    """
    if settings.species.model is None:
        return None
    least = species_network(settings.species.model, "cpu").least_dose
    return least if dose < least else None


def require_fit(settings: Settings, *, planes: int, sampling: float) -> None:
    """Refuse settings whose networks were trained for other data: mode, images per time point, sampling [Å/px].

    Raises ``SettingsError`` with what was expected.
    """
    if settings.drift.correct and settings.drift.anchor != "frame" and not finds_particles(settings, sampling):
        limits = particle_range(settings)
        words = (
            "particles.model is none" if limits is None else f"they are found at {limits[0]:g} to {limits[1]:g} Å/px"
        )
        raise SettingsError(
            f"drift.anchor is {settings.drift.anchor}, but particles cannot be found: {words}, and the sampling is "
            f"{sampling:g} Å/px; set drift.anchor to frame, or particles.model to one that fits"
        )
    if settings.species.model is None:
        return
    model = species_network(settings.species.model, "cpu")
    if settings.source.mode != model.mode:
        raise SettingsError(
            f"source.mode is {settings.source.mode}; species.model {settings.species.model} was trained for "
            f"{model.mode} images: correct source.mode, or choose another model or none"
        )
    species.check_planes(model, planes=planes if model.planes > 1 else 1, sampling=sampling)


def require_halo(settings: Settings) -> None:
    """Refuse windows that would show seams: the halo must hold all that a pixel's answer depends on."""
    named = [("segment", settings.segment.model, settings.segment.window, settings.segment.halo)]
    if settings.particles.model is not None:
        named.append(("particles", settings.particles.model, settings.particles.window, settings.particles.halo))
    for section, weights, window, halo in named:
        radius = int(getattr(network(weights, "cpu").module, "receptive_radius", 0))
        if halo is not None and halo < radius:
            raise SettingsError(
                f"{section}.halo is {halo} px; the network of {section}.model looks {radius} px around a pixel: set "
                f"{section}.halo to at least that"
            )
        if window is not None and window <= 2 * (halo or radius):
            raise SettingsError(
                f"{section}.window is {window} px; expected more than two halos of {halo or radius} px: set "
                f"{section}.window to at least {4 * (halo or radius)}, or to none"
            )
