"""Where a frame shows nothing but the beam, and the power spectrum of the noise there."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import gamma

from schemas.errors import SourceError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Region = tuple[int, int, int, int]

LOW_BAND, MIDDLE_BAND = (0.012, 0.08), (0.12, 0.25)  # cycles/px; specimens have most of their contrast in the first
MOST_SQUARES, MOST_SPECTRA = 1024, 16_384  # that are looked at
FINEST = 0.35  # cycles/px; a lattice is looked for up to here, since blurred noise falls steeply beyond
LOWEST = 2.5  # bins of a tile from k = 0 that slow gradients reach through the window
LOWEST_ALONE = 6.0  # of a single frame, in which halos of the specimen cannot be told from noise
MOST_LEVELS = 4
MOST_UNLIKE = 0.4  # part of the usual brightness by which vacuum may differ within the frame
SPIKE = 8.0  # standard deviations at which X-rays and hot pixels are cut off
BANDS, TAPER, MOST_CUBES = 8, 12, 4096  # of third moments: rings, edge of their window [px], squares that are looked at
LEVEL_SPREAD = 0.2  # means that differ by more than this part are told apart as levels
# Tiles under a Hann window that overlap by half, in both directions: variance of their mean power against that of
# independent tiles (1 + 4/36 + 4/1296), and bins of one ring that are as good as one (the window's bandwidth, squared).
OVERLAP, BANDWIDTH = 1.114, (35 / 18) ** 2


class Tiles(NamedTuple):
    """Squares that were looked at: top, left (tile,) [px]; slope (tile,): power at low over power at middle
    frequencies, against that of the flattest tenth [1]; peak (tile,): brightest bin of the spectrum over what noise
    would reach [1]; chosen (tile,)."""

    top: NDArray[np.intp]
    left: NDArray[np.intp]
    slope: Floats
    peak: Floats
    chosen: Bools


class Level(NamedTuple):
    """Noise at one brightness: mean reading [counts], k (ring) [cycles/px], power (ring) [counts² per pixel], and how
    many independent values, of two degrees of freedom each, every ring is the mean of."""

    mean: float
    k: Floats
    power: Floats
    values: Floats


class Third(NamedTuple):
    """Third moments of the noise: mean over pixels of a low-passed square times the same square in two rings of
    frequencies, per skewness of one pixel's worth of electrons if the filters, low (ky, kx ≥ 0) and bands (band, ky,
    kx ≥ 0), passed all: moment, error (pair,) [counts³], for all pairs of bands, the first not above the second."""

    moment: Floats
    error: Floats
    low: Floats
    bands: Floats


def find_vacuum(frames: NDArray[np.floating], *, tile: int, tolerance: float) -> Tiles:
    """Squares of frames (time, y, x) [counts] that are flat and without lattice: the beam alone, as far as one can see.

    tile: their edge [px]; tolerance: how far the slope of a square's spectrum may be from that of the flattest tenth.
    A square with a peak that noise reaches in fewer than 1 of 100 squares is no vacuum. A film that covers all of the
    frame evenly passes: by its spectrum alone it cannot be told from a camera that blurs. Raises SourceError where no
    square is left.
    """
    height, width = frames.shape[1:]
    if min(height, width) < tile:
        raise SourceError(f"frames of {height} × {width} px hold no square of {tile} px; expected larger frames")
    places = _squares((0, 0, height, width), tile, (height, width))
    if len(places) > MOST_SQUARES:
        places = [place for place in places if place[0] % tile == 0 and place[1] % tile == 0]
    some = frames[np.unique(np.linspace(0, len(frames) - 1, max(1, MOST_SPECTRA // len(places))).astype(int))]
    k = _frequencies(tile)
    low, middle = ((k >= max(low, LOWEST / tile)) & (k < high) for low, high in (LOW_BAND, MIDDLE_BAND))
    slope, peak, mean = [], [], []
    for top, left in places:
        square = some[:, top : top + tile, left : left + tile].astype(np.float64)
        power = np.mean([_periodogram(one - one.mean()) for one in square], axis=0)
        slope.append(power[low].mean() / max(float(power[middle].mean()), 1e-300))
        peak.append(_peak(power, k, len(some)))
        mean.append(square.mean())
    relative = np.array(slope) / max(float(np.quantile(slope, 0.1)), 1e-300)
    scatter = 4 * np.sqrt(BANDWIDTH / len(some) * (1 / low.sum() + 1 / middle.sum()))
    chosen = (np.abs(relative - 1) <= max(tolerance, scatter)) & (np.array(peak) <= 1)
    if chosen.any():  # what is much darker or brighter than most of the rest, if even, is a thick specimen
        usual = float(np.median(np.array(mean)[chosen]))
        chosen &= np.abs(np.array(mean) - usual) <= MOST_UNLIKE * abs(usual)
    else:
        raise SourceError(
            f"none of {len(places)} squares of {tile} px is vacuum: each has lattice peaks or uneven brightness. "
            "Name a region that shows only the beam, for example --region 0,0,256,256 (top, left, height, width in px)"
        )
    tops, lefts = np.array(places).T
    return Tiles(tops, lefts, relative, np.array(peak), chosen)


def _peak(power: Floats, k: Floats, frames: int) -> float:
    """Brightest bin over what noise reaches in 1 of 100 squares, each against the lower quartile of its ring.

    A lattice of large spacing has few bins in its ring that are not of a peak; hence wide rings and not the median.
    """
    tile = len(power)
    usable = (k >= LOWEST / tile) & (k <= FINEST)
    ring = (k * tile / 3).astype(np.intp)[usable]
    values = power[usable]
    order = np.lexsort((values, ring))
    sizes = np.bincount(ring)
    quartile = values[order][np.minimum(np.cumsum(sizes) - sizes + sizes // 4, len(values) - 1)]
    reached = gamma.isf(0.01 / usable.sum(), frames) / gamma.ppf(0.25, frames)
    # What so few bins leave uncertain of their quartile.
    margin = 1 + 4 * np.sqrt(BANDWIDTH / (np.maximum(sizes, 1) * frames))
    return float((values / np.maximum((quartile * margin)[ring], 1e-300)).max()) / float(reached)


def noise_spectra(frames: NDArray[np.floating], regions: list[Region], *, tile: int) -> list[Level]:
    """Power spectra of the noise in regions (top, left, height, width) [px] of frames (time, y, x) [counts].

    Of several frames the mean over time, scaled to each frame's brightness, is taken off, and with it the pattern of
    the camera and what stands still; of a single one a plane per square. Spikes are cut off. Squares of `tile` px that
    overlap by half are sorted into up to 4 levels of brightness if they differ enough: these tell gain from offset and
    readout.
    """
    places = sorted({place for region in regions for place in _squares(region, tile, frames.shape[1:])})
    if not places:
        raise SourceError(
            f"the region(s) {regions} hold no square of {tile} px of a frame of {frames.shape[1:]} px; "
            "name a larger one (top, left, height, width in px)"
        )
    means = np.array([[frame[t : t + tile, x : x + tile].mean() for t, x in places] for frame in frames])
    edges = _levels(means)
    total = np.zeros((len(edges) - 1, tile, tile // 2 + 1))
    number, brightness = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    for (top, left), course in zip(places, means.T, strict=True):
        level = np.clip(np.searchsorted(edges, course, side="right") - 1, 0, len(edges) - 2)
        for one in np.unique(level):
            some = frames[level == one, top : top + tile, left : left + tile].astype(np.float64)
            total[one] += sum(_periodogram(_clipped(residual)) for residual in _residuals(some))
            number[one] += len(some)
            brightness[one] += course[level == one].sum()
    overlaps = OVERLAP if len(places) > 1 else 1.0
    lowest = (LOWEST if len(frames) > 1 else LOWEST_ALONE) / tile
    return [_rings(t / n, n / overlaps, b / n, lowest) for t, n, b in zip(total, number, brightness, strict=True) if n]


def third_moments(frames: NDArray[np.floating], regions: list[Region], *, tile: int, level: Level) -> Third | None:
    """Third moments of the noise in regions of frames (time, y, x) [counts]; None of fewer than three frames.

    Electrons arrive at random and make a skew noise, readout noise is symmetric: where by chance more electrons
    arrived, the fine noise of the electrons is stronger and that of the readout is not. level: a spectrum from
    `noise_spectra`, which says where noise is blurred least. Squares of `tile` px do not overlap.
    """
    places: list[tuple[int, int]] = []
    for place in sorted({place for region in regions for place in _squares(region, tile, frames.shape[1:])}):
        if all(max(abs(place[0] - other[0]), abs(place[1] - other[1])) >= tile for other in places):
            places.append(place)
    places = places[:: -(-len(places) * len(frames) // MOST_CUBES)]
    if len(frames) < 3 or not places:
        return None
    k, usable = _frequencies(tile), _off_axes(tile, LOWEST / tile)
    counted = np.maximum(level.power - level.power.min(), 0) ** 0.5 / level.power
    low = np.where(usable, np.interp(k, level.k, counted), 0.0)
    edges = np.linspace(LOWEST / tile, np.hypot(0.5, 0.5), BANDS + 1)
    bands = np.stack([usable & (k >= a) & (k < b) for a, b in pairwise(edges)]).astype(np.float64)
    rise = np.sin(np.pi / 2 * np.minimum((np.arange(tile) + 0.5) / TAPER, 1)) ** 2
    window = np.outer(rise * rise[::-1], rise * rise[::-1])
    found = []
    for top, left in places:
        for residual in _residuals(frames[:, top : top + tile, left : left + tile].astype(np.float64)):
            found.append(_cubes(np.fft.rfft2(_clipped(residual) * window), low, bands) / (window**3).sum())
    moments = np.array(found)
    return Third(moments.mean(0), moments.std(0) / len(moments) ** 0.5, low, bands)


def expected_third(third: Third, transfer: Floats) -> Floats:
    """Third moments (pair,) of electrons that a camera of this transfer (ky, kx ≥ 0) blurs, up to one factor."""
    return _cubes(transfer, third.low, third.bands)


def _cubes(spectrum: Floats | NDArray[np.complex128], low: Floats, bands: Floats) -> Floats:
    """Sums over pixels of what `low` passes times what two of the bands pass, for all pairs of bands."""
    fine = np.fft.irfft2(spectrum * bands).reshape(len(bands), -1)
    products = (fine * np.fft.irfft2(spectrum * low).ravel()) @ fine.T
    return np.asarray(products[np.triu_indices(len(bands))])


def _residuals(squares: Floats) -> Floats:
    """Squares (time, y, x) of like brightness without what stands still, so scaled that the noise keeps its power."""
    count, tile = squares.shape[:2]
    if count > 1:
        average = squares.mean(0)
        scale = squares.mean((1, 2)) / average.mean() if average.mean() else np.ones(count)
        return np.asarray((squares - scale[:, None, None] * average) * np.sqrt(count / (count - 1)))
    ramp = np.linspace(-1, 1, tile)
    slopes = (squares.mean(2) @ ramp / (ramp @ ramp), squares.mean(1) @ ramp / (ramp @ ramp))
    plane = slopes[0][:, None, None] * ramp[:, None] + slopes[1][:, None, None] * ramp
    return np.asarray(squares - squares.mean((1, 2), keepdims=True) - plane)


def _clipped(residual: Floats) -> Floats:
    reach = SPIKE * (1.4826 * float(np.median(np.abs(residual))) or float(residual.std()))
    return np.clip(residual, -reach, reach)


def _frequencies(tile: int) -> Floats:
    return np.asarray(np.hypot(np.fft.fftfreq(tile)[:, None], np.fft.rfftfreq(tile)))


def _off_axes(tile: int, lowest: float) -> Bools:
    """Frequencies from `lowest` [cycles/px] on, without rows and columns, which are read out together."""
    ky, kx = np.abs(np.fft.fftfreq(tile))[:, None], np.fft.rfftfreq(tile)
    return np.asarray((_frequencies(tile) >= lowest) & (ky > 1.5 / tile) & (kx > 1.5 / tile) & (kx < 0.5))


def _periodogram(square: Floats) -> Floats:
    """|F|² (ky, kx ≥ 0) of a square under a Hann window, such that white noise of variance v has mean v."""
    line = np.hanning(len(square) + 1)[:-1]
    window = np.outer(line, line)
    return np.asarray(np.square(np.abs(np.fft.rfft2(square * window))) / np.square(window).sum())


def _squares(region: Region, tile: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    top, left, height, width = region
    low, right = min(top + height, shape[0]) - tile, min(left + width, shape[1]) - tile
    step = max(tile // 2, 1)
    return [(t, x) for t in range(max(top, 0), low + 1, step) for x in range(max(left, 0), right + 1, step)]


def _levels(means: Floats) -> Floats:
    """Edges of brightness between levels."""
    low, high = np.quantile(means, [0.05, 0.95])
    if high - low <= LEVEL_SPREAD * abs(float(np.median(means))):
        return np.array([-np.inf, np.inf])
    return np.array([-np.inf, *np.linspace(low, high, MOST_LEVELS + 1)[1:-1], np.inf])


def _rings(power: Floats, squares: float, mean: float, lowest: float) -> Level:
    """Mean over rings, without the axes (rows and columns that were read out together) and single bright bins."""
    tile = len(power)
    k = _frequencies(tile)
    ring = np.rint(k * tile).astype(np.intp)
    usable = _off_axes(tile, lowest)
    for _ in range(2):
        number = np.bincount(ring[usable], minlength=ring.max() + 1)
        level = np.bincount(ring[usable], power[usable], ring.max() + 1) / np.maximum(number, 1)
        usable &= power <= level[ring] * (1 + 7 * np.sqrt(1 / max(squares, 1)) + 7 / max(squares, 1))
    number = np.bincount(ring[usable], minlength=ring.max() + 1)
    some = number >= 4
    sums = [np.bincount(ring[usable], v[usable], ring.max() + 1)[some] / number[some] for v in (k, power)]
    return Level(float(mean), sums[0], sums[1], (number[some] * squares / BANDWIDTH).astype(np.float64))
