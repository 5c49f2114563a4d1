"""Can a particle be read at all? Fourier peaks within each particle, and how unequal they are.

A crystal seen along a zone axis sends at least two non-collinear pairs ±g of nearly equal brightness into the image's
spectrum. Tilted, the columns smear, some pairs fade before others, and the ratio of the brightest to the dimmest pair
grows until a pair is gone; then bright spots in the image are not columns (after Larsen et al., Ultramicroscopy 2023,
113803, whose map is the segmentation coloured by this ratio).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.fft import fft2, fftshift, next_fast_len
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter1d, maximum_filter

Floats = NDArray[np.float64]

EDGE = 3.0  # Å over which the window rises from the rim of a particle inwards
RING = 0.02  # 1/Å; width of the rings in which the background is a median
MOST_PEAKS = 32
SIDELOBE = 0.015  # of the brightest pair; what is dimmer may be the window's, not a lattice's
CLOSED = 0.035  # 1/Å within which a peak lies at the sum or the difference of two others
APART = np.deg2rad(30.0)  # two pairs nearer in direction than this do not span a lattice
MOST_LENGTHS = 1.8  # nor do two whose lengths differ by more than this factor
ZONES = (  # face-centred cubic: zone, ratio of the lengths of two reflections, angle between their lines [deg]
    ("100", 1.0, 90.0),  # 200 and 020
    ("100", 2**0.5, 45.0),  # 200 and 220
    ("110", 1.0, 70.53),  # two of 111
    ("110", 2 / 3**0.5, 54.74),  # 111 and 200
    ("110", (8 / 3) ** 0.5, 35.26),  # 111 and 220
    ("110", (8 / 3) ** 0.5, 90.0),
    ("110", 2**0.5, 90.0),  # 200 and 220
    ("110", (11 / 8) ** 0.5, 64.76),  # 220 and 113
    ("110", 1.0, 50.48),  # two of 113
    ("111", 1.0, 60.0),  # two of 220
    ("111", 3**0.5, 90.0),  # 220 and 422
)
ZONE_LENGTH, ZONE_ANGLE = 0.04, 4.0  # how far from these a zone is still named: part of the ratio, degrees


class Pairs(NamedTuple):
    """Symmetric pairs of peaks, brightest first: ky, kx [1/Å] of one of the two, power above background (electrons² per
    pixel of the window), and power over background [1]; each (pair,)."""

    ky: Floats
    kx: Floats
    power: Floats
    significance: Floats


def fourier_map(
    frame: NDArray[np.floating],
    labels: NDArray[np.integer],
    *,
    sampling: float,
    band: tuple[float, float],
    significance: float,
    threshold: float,
) -> dict[str, NDArray[Any]]:
    """What the spectrum within each particle says: arrays (particle,), in the order of the labels 1, 2, ….

    frame (y, x): electrons, not denoised; labels (y, x): 0 outside, 1…n particles; sampling [Å/px]; band: lowest and
    highest spatial frequency of lattice peaks [1/Å]; significance: least power of a peak over the background of its
    ring [1]; threshold: greatest ratio of a particle that can be interpreted.

    ratio: brightest over dimmest of the two pairs that span the lattice [1], NaN without two, or where neither their
    sum nor their difference is a peak; spacings (particle, 2):
    theirs [Å], wider first, NaN where not seen; angle between their lines [deg], 0…90; peaks: pairs above the
    significance; zone: "100", "110" or "111" where lengths and angle are those of a face-centred cubic crystal, else
    "", and interpretable: ratio at most the threshold.
    """
    found = [
        read_spectrum(crop, window, sampling=sampling, band=band, significance=significance, threshold=threshold)
        for crop, window in _particles(frame, labels, sampling)
    ]
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "ratio": ((-1,), "f8"),
        "spacings": ((-1, 2), "f8"),
        "angle": ((-1,), "f8"),
        "peaks": ((-1,), "i8"),
        "zone": ((-1,), "<U3"),
        "interpretable": ((-1,), "?"),
    }
    return {name: np.array([one[name] for one in found], kind).reshape(n) for name, (n, kind) in shapes.items()}


def frame_ratio(
    frame: NDArray[np.floating], *, sampling: float, band: tuple[float, float], significance: float, threshold: float
) -> dict[str, Any]:
    """As ``fourier_map`` for a whole frame (sheets, or movies without particles): single values, spacings (2,)."""
    window = np.outer(*(np.hanning(size + 2)[1:-1] for size in frame.shape))
    return read_spectrum(
        np.asarray(frame, np.float64),
        window,
        sampling=sampling,
        band=band,
        significance=significance,
        threshold=threshold,
    )


def read_spectrum(
    crop: Floats,
    window: Floats,
    *,
    sampling: float,
    band: tuple[float, float],
    significance: float,
    threshold: float,
) -> dict[str, Any]:
    """Ratio, spacings (2,), angle, peaks, zone and interpretable of a crop (y, x) under a window (y, x) [0…1]."""
    pairs = find_pairs(crop, window, sampling=sampling, band=band)
    bright = (pairs.significance >= significance) & (pairs.power >= SIDELOBE * pairs.power.max(initial=0))
    seen = Pairs(*(values[bright] for values in pairs))
    out: dict[str, Any] = {
        "ratio": np.nan,
        "spacings": np.full(2, np.nan),
        "angle": np.nan,
        "peaks": len(seen.power),
        "zone": "",
        "interpretable": False,
    }
    if len(seen.power):
        out["spacings"][0] = 1 / np.hypot(seen.ky[0], seen.kx[0])
    basis = _basis(seen, pairs, significance / 2)
    if basis is None:
        return out
    first, second = basis
    length = np.hypot(seen.ky, seen.kx)[[first, second]]
    out["spacings"] = np.sort(1 / length)[::-1]
    out["angle"] = float(np.rad2deg(_between(seen, first, second)))
    out["ratio"] = float(seen.power.max() / seen.power[[first, second]].min())
    out["zone"] = _zone(float(length.max() / length.min()), out["angle"])
    out["interpretable"] = bool(out["ratio"] <= threshold)
    return out


def find_pairs(crop: Floats, window: Floats, *, sampling: float, band: tuple[float, float]) -> Pairs:
    """The strongest maxima of the power spectrum in a band [1/Å], at most 32 of them, however weak.

    crop (y, x) [electrons], window (y, x) [0…1]. Power is |F|² / Σ window², so that white noise of variance v has mean
    v; the background is the mean that the median of a ring stands for if the ring holds exponential noise.
    """
    total = float(window.sum())
    if not total > 0:
        return Pairs(*(np.empty(0) for _ in Pairs._fields))
    values = (crop - float((crop * window).sum()) / total) * window
    longest = max(crop.shape)
    size = next_fast_len(2 * longest if longest <= 512 else longest)
    spectrum = fftshift(np.square(np.abs(fft2(values, s=(size, size)))) / float(np.square(window).sum()))
    k = (np.arange(size) - size // 2) / (size * sampling)
    reach = int(np.searchsorted(k, band[1] + 2 * RING)) - size // 2
    middle = slice(max(size // 2 - reach, 0), size // 2 + reach + 1)
    spectrum, k = spectrum[middle, middle], k[middle]
    radius = np.hypot(k[:, None], k[None])
    over = spectrum / _background(spectrum, radius)
    # Maxima nearer than the width of a peak, about one over the diameter of the window, are one.
    width = max(round(0.6 / (np.sqrt(total) * sampling) * size * sampling), 1)
    top = (over == maximum_filter(over, 2 * width + 1, mode="constant")) & (radius >= band[0]) & (radius <= band[1])
    top &= (k[:, None] > 0) | ((k[:, None] == 0) & (k[None] > 0))
    rows, places = np.nonzero(top)
    order = np.argsort(-over[rows, places], kind="stable")[:MOST_PEAKS]
    rows, places = rows[order], places[order]
    power = spectrum[rows, places] * (1 - 1 / np.maximum(over[rows, places], 1 + 1e-9))
    order = np.argsort(-power, kind="stable")
    rows, places, power = rows[order], places[order], power[order]
    off = _vertices(spectrum, rows, places)
    step = float(k[1] - k[0])
    return Pairs(k[rows] + off[0] * step, k[places] + off[1] * step, power, over[rows, places])


def _particles(
    frame: NDArray[np.floating], labels: NDArray[np.integer], sampling: float
) -> Iterator[tuple[Floats, Floats]]:
    """Crop and window of every particle; of a label that does not occur, nothing under a window of zeros."""
    for label, place in enumerate(find_objects(np.asarray(labels)), start=1):
        if place is None:
            yield np.zeros((1, 1)), np.zeros((1, 1))
            continue
        depth = distance_transform_edt(np.pad(labels[place] == label, 1))[1:-1, 1:-1] * sampling
        edge = min(EDGE, float(depth.max()))
        yield np.asarray(frame[place], np.float64), np.sin(np.pi / 2 * np.minimum(depth / edge, 1)) ** 2


def _background(spectrum: Floats, radius: Floats) -> Floats:
    """Mean power (ky, kx) at the same radius, robust against peaks."""
    ring = (radius / RING).astype(np.intp)
    order = np.lexsort((spectrum.ravel(), ring.ravel()))
    sizes = np.bincount(ring.ravel())
    ends = np.cumsum(sizes)
    medians = spectrum.ravel()[order][np.maximum(ends - (sizes + 1) // 2, 0)]
    smooth = np.exp(gaussian_filter1d(np.log(np.maximum(medians, 1e-30)), 1.0, mode="nearest")) / np.log(2)
    at = np.clip(radius / RING - 0.5, 0, len(smooth) - 1)
    return np.asarray(np.interp(at, np.arange(len(smooth)), smooth))


def _vertices(spectrum: Floats, rows: NDArray[np.intp], places: NDArray[np.intp]) -> Floats:
    """Offsets (2, peak) [bins] of the vertices of parabolas through the logarithm of three bins."""
    logs = np.pad(np.log(np.maximum(spectrum, 1e-30)), 1, mode="edge")
    out = []
    for down, across in ((1, 0), (0, 1)):
        left, here, right = (logs[rows + 1 + n * down, places + 1 + n * across] for n in (-1, 0, 1))
        bend = left - 2 * here + right
        out.append(np.where(bend < 0, np.clip(0.5 * (left - right) / np.where(bend < 0, bend, 1), -0.5, 0.5), 0))
    return np.array(out)


def _between(pairs: Pairs, first: int, second: int) -> float:
    """Angle [rad], 0…π/2, between the lines of two pairs."""
    one, other = (np.arctan2(pairs.ky[i], pairs.kx[i]) for i in (first, second))
    turn = float(abs(one - other)) % np.pi
    return min(turn, np.pi - turn)


def _basis(seen: Pairs, pairs: Pairs, least: float) -> tuple[int, int] | None:
    """The two non-collinear pairs of like length whose dimmer one is brightest; None without two.

    Two pairs span a lattice only if their sum or their difference, or half of it (200 of 220 and 2-20), is a peak as
    well, of at least so much significance: less than theirs, since its place is known. Tilted, pairs that are equal by
    chance have none.
    """
    length = np.hypot(seen.ky, seen.kx)
    places = np.stack([pairs.ky, pairs.kx], axis=1)[pairs.significance >= least]
    for second in range(1, len(length)):
        for first in range(second):
            like = max(length[first], length[second]) <= MOST_LENGTHS * min(length[first], length[second])
            if like and _between(seen, first, second) >= APART and _closed(seen, first, second, places):
                return first, second
    return None


def _closed(pairs: Pairs, first: int, second: int, places: Floats) -> bool:
    one, other = (np.array([pairs.ky[i], pairs.kx[i]]) for i in (first, second))
    for wanted in (one + other, one - other, (one + other) / 2, (one - other) / 2):
        off = min(float(np.linalg.norm(places - sign * wanted, axis=1).min(initial=np.inf)) for sign in (1, -1))
        if off <= CLOSED:
            return True
    return False


def _zone(lengths: float, angle: float) -> str:
    """The zone whose two reflections have lengths of this ratio and this angle [deg] between their lines, or ""."""
    for zone, ratio, between in ZONES:
        if abs(lengths / ratio - 1) <= ZONE_LENGTH and abs(angle - between) <= ZONE_ANGLE:
            return zone
    return ""
