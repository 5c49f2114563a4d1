"""Which species columns are, by a trained network, and how many atoms are missing; else what the job states.

A species network gives every pixel of its own grid a probability of each class and of "no site". A site (a lattice
position, empty ones included) is a maximum of the probability of any class; its class probabilities are the mean of the
pixels around it, so that empty sites are found where there is nothing to find. Where a crystal has two elements, next
neighbours are of different ones: all sites nearby help to tell which element the place of a site belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn import functional

from pipeline.steps import windows
from pipeline.steps.columns import find_columns, inside
from pipeline.steps.mixture import Mixture, mixture
from pipeline.steps.segment import smooth
from schemas.errors import SettingsError

__all__ = [
    "Classified",
    "Mixture",
    "Sites",
    "Species",
    "SpeciesModel",
    "assign_species",
    "check_planes",
    "class_maps",
    "classify",
    "count_species",
    "mixture",
    "prepare",
    "vacancies",
]

UNKNOWN = "unknown"
# What the networks were trained with: retrain them when one of these changes.
FLATTEN = 5.0  # Å, standard deviation of the Gaussian whose local mean is removed
GAIN = {"hrtem": 5.0, "haadf": 1.0}  # of the relative contrast (hrtem), of the contrast in units of the frame's (haadf)
KNEE = 3.0  # input beyond which it grows only logarithmically
EVIDENCE = 3.0  # log ratio that one site may say at most about which element its place belongs to
POOLING = 0.99  # weight of the evidence of all three neighbours; below 1
ROUNDS = 200  # in which evidence travels from neighbour to neighbour
REACH = 0.22  # Å, standard deviation of the weights with which pixels around a site are averaged

Floats = NDArray[np.float64]


class Species(NamedTuple):
    """name (column) str, probability (column) [1], NaN where no statement is made; classes: names in a fixed order.

    probabilities (column, class) of all classes, rows sum to 1; None where no model told the classes apart.
    """

    name: NDArray[np.str_]
    probability: Floats
    classes: tuple[str, ...]
    probabilities: Floats | None = None


class Sites(NamedTuple):
    """Lattice sites that the network itself found in one image or focal series, empty ones included.

    y, x (site) [px of the planes, pixel centres on integers], probabilities (site, class), rows sum to 1.
    """

    y: Floats
    x: Floats
    probabilities: Floats


class Classified(NamedTuple):
    """columns: the species of the columns that were asked for; sites: all sites that the network found itself."""

    columns: Species
    sites: Sites


@dataclass(frozen=True)
class SpeciesModel:
    """A species network and what its weights say about it; made by `of`.

    classes: names; missing: atoms that a site of each class lacks (vacancy counting); hosts: for each class the number
    of the crystal's element whose place it is, of one or two elements; mode: hrtem or haadf; planes: how
    many images it takes at once; sampling [Å/px] of its own grid, sampling_range [Å/px] of frames it may be shown;
    distance [Å]: least distance of two sites; temperature: divides the logarithms of the class probabilities;
    least_dose [e⁻/Å² per image]: that it was trained with, 0 in HAADF, whose readings are no electrons.
    """

    network: nn.Module
    classes: tuple[str, ...]
    missing: tuple[int, ...]
    hosts: tuple[int, ...]
    mode: str
    planes: int
    sampling: float
    sampling_range: tuple[float, float]
    distance: float
    temperature: float = 1.0
    least_dose: float = 0.0

    @classmethod
    def of(cls, network: nn.Module, metadata: Mapping[str, Any]) -> SpeciesModel:
        """Model of a network from the metadata of its weights. Raises SettingsError for weights of another kind."""
        try:
            low, high = (float(value) for value in metadata["sampling_range"])
            return cls(
                network,
                tuple(str(name) for name in metadata["classes"]),
                tuple(int(count) for count in metadata["missing"]),
                tuple(int(host) for host in metadata["hosts"]),
                str(metadata["mode"]),
                int(metadata["planes"]),
                float(metadata["sampling"]),
                (low, high),
                float(metadata["distance"]),
                float(metadata.get("temperature", 1.0)),
                _least_dose(metadata),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SettingsError(
                f"these weights tell no species apart (no valid {error} in their metadata); expected those of a "
                "species network such as mos2-hrtem, graphene-haadf, tmd-haadf; set species.model to one"
            ) from error

    def occupied(self, name: str) -> bool:
        """Whether a site of class `name` holds an atom, so that it is a column."""
        return not name.startswith("0")


def _least_dose(metadata: Mapping[str, Any]) -> float:
    """That of the training; 0 where it is not stated."""
    doses = metadata.get("training", {}).get("dose", (0.0,))
    return float(doses[0]) if metadata["mode"] == "hrtem" else 0.0


def assign_species(count: int, *, only: str | None) -> Species:
    """Species of count columns when no model tells them apart.

    only: the one species that the job says the movie holds; every column gets it with probability 1. None or "unknown":
    every column is "unknown", with probability NaN, since nothing was measured.
    """
    name = only or UNKNOWN
    probability = np.nan if name == UNKNOWN else 1.0
    width = f"<U{max(len(name), 1)}"
    return Species(np.full(count, name, dtype=width), np.full(count, probability), (name,))


def count_species(name: NDArray[np.str_], *, classes: tuple[str, ...]) -> NDArray[np.int64]:
    """How many columns of each class: (species_class), in the order of classes; other names are not counted."""
    return np.array([np.count_nonzero(name == one) for one in classes], dtype=np.int64)


def check_planes(model: SpeciesModel, *, planes: int, sampling: float) -> None:
    """Raise SettingsError unless the model was trained for this sampling [Å/px] and this many images at a time."""
    low, high = model.sampling_range
    if not low <= sampling <= high:
        raise SettingsError(
            f"the sampling is {sampling} Å/px; the species model was trained for {low} to {high} Å/px; bin "
            "finer frames with source.binning, correct source.sampling if it is wrong, or train another model"
        )
    if planes != model.planes:
        raise SettingsError(
            f"the movie has {planes} image(s) per time point; the species model expects {model.planes}; choose a model "
            "for such a series with species.model, or none"
        )


def classify(
    model: SpeciesModel,
    planes: NDArray[np.floating[Any]],
    *,
    columns: tuple[Floats, Floats],
    sampling: float,
    threshold: float,
    margin: float,
    windowing: tuple[int | None, int],
    device: str | torch.device = "cpu",
) -> Classified:
    """Species of columns (y, x) [px, of this image], and all sites that the network finds itself.

    planes (defocus, y, x) in electrons or any unit proportional to them, not denoised, in the order of the focal
    series, aligned with each other; one plane in HAADF. sampling [Å/px]. threshold: least probability of a site, as the
    mean over its pixels; margin [Å]: sites nearer to the edge are left out. windowing: window edge [px of the network;
    None: the whole image at once] and windows per batch. A column's name is its most probable class that holds an atom,
    for a column is something that was seen; empty sites appear among `sites` only, which `vacancies` counts.
    Raises SettingsError for planes the model was not trained for (`check_planes`).
    """
    maps = class_maps(model, planes, sampling=sampling, windowing=windowing, device=device)
    scale = (maps.shape[1] / planes.shape[1], maps.shape[2] / planes.shape[2])
    y, x = (np.asarray(v, float) for v in columns)
    sites, shift = find_sites(model, maps, threshold=threshold)
    places = np.column_stack([(y + 0.5) * scale[0] - 0.5, (x + 0.5) * scale[1] - 0.5])
    asked = site_probabilities(model, maps, *places.T)
    if len(sites.y):
        apart, nearest = cKDTree(np.column_stack([sites.y, sites.x])).query(places)
        close = apart < 0.7 * model.distance / model.sampling
        asked = _settled(model, asked, np.where(close, shift[nearest], 0.0))
    probabilities = _settled(model, sites.probabilities, shift)
    size = (maps.shape[1], maps.shape[2])
    kept = inside(sites.y, sites.x, shape=size, margin=margin / model.sampling)
    kept &= ~_hollow(model, sites.y, sites.x, probabilities)
    back = Sites((sites.y[kept] + 0.5) / scale[0] - 0.5, (sites.x[kept] + 0.5) / scale[1] - 0.5, probabilities[kept])
    seen = np.array([model.occupied(name) for name in model.classes])
    best = np.where(seen, asked, -1.0).argmax(1) if len(y) else np.zeros(0, int)
    width = max(len(name) for name in model.classes)
    named = np.array(model.classes, dtype=f"<U{width}")[best]
    species = Species(named, asked[np.arange(len(y)), best], model.classes, asked)
    return Classified(species, back)


def find_sites(model: SpeciesModel, maps: Tensor, *, threshold: float) -> tuple[Sites, Floats]:
    """Sites in class maps (1 + class, y, x) [px of the maps], and what their neighbours say of each (site,).

    The latter is a log ratio, to be added to the site's own: > 0 where its place belongs to the first element.
    """
    site = _blurred(1 - maps[:1], REACH / model.sampling)[0]
    peaks = find_columns(site, threshold=threshold, min_distance=model.distance / model.sampling)
    probabilities = site_probabilities(model, maps, peaks.y, peaks.x)
    return Sites(peaks.y, peaks.x, probabilities), _from_neighbours(model, peaks.y, peaks.x, probabilities)


def _from_neighbours(model: SpeciesModel, y: Floats, x: Floats, probabilities: Floats) -> Floats:
    """Log ratio (site,) of first to second element at sites [px of the maps], as all sites around say, not they."""
    if max(model.hosts) == 0 or not len(y):
        return np.zeros(len(y))
    first = np.array(model.hosts) == 0
    odds = [np.maximum(probabilities[:, of].sum(1), 1e-9) for of in (first, ~first)]
    own = np.clip(np.log(odds[0] / odds[1]), -EVIDENCE, EVIDENCE)
    ends = _neighbours(model, y, x)
    # Sites with more than three neighbours, which are errors, must not make evidence grow from round to round.
    weight = np.sqrt(POOLING / np.maximum(np.bincount(ends[:, 0], minlength=len(y)), 3))
    near = coo_array((weight[ends[:, 0]] * weight[ends[:, 1]], (ends[:, 0], ends[:, 1])), shape=(len(y),) * 2).tocsr()
    total = own
    for _ in range(ROUNDS):
        total = own - near @ total
    return np.asarray(total - own)


def _neighbours(model: SpeciesModel, y: Floats, x: Floats) -> NDArray[np.intp]:
    """Pairs (pair, 2), both ways round, of sites next to each other in a crystal of two elements.

    Sites of one element are 1.7 next distances apart: those closer than 1.3 are of different ones.
    """
    reach = 1.3 * model.distance / 0.7 / model.sampling
    pairs = cKDTree(np.column_stack([y, x])).query_pairs(reach, output_type="ndarray")
    return np.concatenate([pairs, pairs[:, ::-1]])


def _hollow(model: SpeciesModel, y: Floats, x: Floats, probabilities: Floats) -> NDArray[np.bool_]:
    """Which sites said to be empty are the middle of a ring: atoms of their own element are next to them.

    Near the edge of the view, where half of the ring is out of sight, the two look alike to the network.
    """
    found = np.zeros(len(y), bool)
    if max(model.hosts) == 0 or not len(y):
        return found
    named = probabilities.argmax(1)
    full = np.array([model.occupied(name) for name in model.classes])[named]
    element = np.array(model.hosts)[named]
    one, other = _neighbours(model, y, x).T
    found[one[~full[one] & full[other] & (element[one] == element[other])]] = True
    return found


def _settled(model: SpeciesModel, probabilities: Floats, shift: Floats) -> Floats:
    """Class probabilities (site, class) where other evidence adds a log ratio (site,) of first to second element."""
    factor = np.where(np.array(model.hosts) == 0, 0.5, -0.5) * np.clip(shift, -40, 40)[:, None]
    weighed = np.maximum(probabilities, 1e-12) * np.exp(factor)
    return np.asarray(weighed / weighed.sum(1, keepdims=True))


def class_maps(
    model: SpeciesModel,
    planes: NDArray[np.floating[Any]],
    *,
    sampling: float,
    windowing: tuple[int | None, int],
    device: str | torch.device = "cpu",
) -> Tensor:
    """Probability of "no site" and of each class, (1 + class, y, x), on the network's grid; see `classify`."""
    check_planes(model, planes=len(planes), sampling=sampling)
    prepared = prepare(planes, sampling=sampling, model_sampling=model.sampling, mode=model.mode, device=device)
    radius = int(model.network.receptive_radius)  # type: ignore[arg-type]
    window, batch = windowing
    if window is not None:
        window = max(window, 4 * radius)
    with torch.no_grad():
        logits = windows.blend(
            model.network, prepared, window=window, halo=radius, receptive_radius=radius, batch=batch
        )
    return torch.softmax(logits, 0).cpu()


def prepare(
    planes: NDArray[np.floating[Any]],
    *,
    sampling: float,
    model_sampling: float,
    mode: str,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Planes (plane, y, x) as a network wants them: at its own sampling, flat, scaled, strong peaks compressed.

    hrtem: contrast relative to the local mean, on a fixed scale, for that is what tells one atom from two. haadf: what
    exceeds the local mean, in units of the image's own contrast, for offset and gain of such images mean nothing.
    """
    size = [max(1, round(n * sampling / model_sampling)) for n in planes.shape[1:]]
    out = []
    for plane in planes:
        frame = torch.from_numpy(np.ascontiguousarray(plane, dtype=np.float32)).to(device)
        resampled = functional.interpolate(frame[None, None], size=size, mode="bicubic", antialias=True)[0, 0]
        local = _local_mean(resampled, FLATTEN / model_sampling)
        flat = resampled - local
        if mode == "hrtem":
            flat = flat / torch.maximum(local, 0.2 * resampled.mean()).clamp_min(1e-12)
        else:
            flat = flat / flat.square().mean().sqrt().clamp_min(1e-12)
        out.append(KNEE * torch.asinh(GAIN[mode] * flat / KNEE))
    return torch.stack(out)


def _local_mean(image: Tensor, sigma: float) -> Tensor:
    """Image (y, x) smoothed by a wide Gaussian of sigma [px], computed on a grid five times coarser."""
    size = [max(1, -(-n // 5)) for n in image.shape]
    coarse = smooth(functional.interpolate(image[None, None], size=size, mode="area")[0, 0], sigma / 5)
    fine = functional.interpolate(coarse[None, None], size=list(image.shape), mode="bilinear", align_corners=False)
    return fine[0, 0]


def vacancies(probabilities: Floats, *, missing: tuple[int, ...]) -> tuple[float, float]:
    """Missing atoms, and the standard error of their number, of sites with class probabilities (site, class).

    The expected number, and the square root of the summed variances of independent sites. missing (class): atoms that a
    site of each class lacks. No sites: no vacancies, of that (0, 0).
    """
    lacking = np.asarray(missing, float)
    mean = probabilities @ lacking
    variance = probabilities @ lacking**2 - mean**2
    return float(mean.sum()), float(np.sqrt(np.maximum(variance, 0).sum()))


def _blurred(maps: Tensor, sigma: float) -> Tensor:
    """Maps (map, y, x), each smoothed by a Gaussian of sigma [px]."""
    return torch.stack([smooth(one, sigma) for one in maps])


def site_probabilities(model: SpeciesModel, maps: Tensor, y: Floats, x: Floats) -> Floats:
    """Class probabilities (site, class) at y, x [px of the maps]: Gaussian means of maps, without "no site"."""
    if not len(y):
        return np.zeros((0, len(model.classes)))
    sigma = REACH / model.sampling
    half = int(np.ceil(2.5 * sigma))
    height, width = maps.shape[1:]
    offsets = np.arange(-half, half + 1)
    centre = [np.rint(v).astype(int)[:, None] + offsets for v in (y, x)]
    weight = [
        np.exp(-0.5 * ((place - v[:, None]) / sigma) ** 2) * ((place >= 0) & (place < size))
        for place, v, size in zip(centre, (y, x), (height, width), strict=True)
    ]
    rows, cols = (np.clip(place, 0, size - 1) for place, size in zip(centre, (height, width), strict=True))
    patches = maps[1:].double().numpy()[:, rows[:, :, None], cols[:, None, :]]
    total = np.einsum("cnij,ni,nj->nc", patches, weight[0], weight[1])
    sharp = np.maximum(total, 1e-12) ** (1 / model.temperature)
    return np.asarray(sharp / sharp.sum(1, keepdims=True))
