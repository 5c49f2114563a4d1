"""Movies with a known answer on which denoisers are compared, and the figures by which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from pipeline.networks.segment_check import tally_columns
from pipeline.networks.weights import Loaded, load_weights
from pipeline.simulate.movie import MovieSpec, SimulatedMovie, simulate_movie
from pipeline.steps import segment
from pipeline.steps.score import merge, score
from schemas.settings import Columns

Floats = NDArray[np.floating[Any]]
# What is not scored: frames at either end, pixels at every edge.
EDGE_FRAMES, EDGE = 4, 16
# Frames before and after an event, and pixels on either side of it, that count as around it.
EVENT_FRAMES, EVENT = 1, 10
# Edge [px] of the square of vacuum that is looked at, and the standard deviation below which it is one.
VACUUM, FLAT = 48, 0.004
COLUMN_FRAMES = 5
SEED = 11

_PARTICLE = MovieSpec(drift_step=0.12, rotation_step=0.2, adatoms=8, hops=10, carbon_cover=0.5)
_SHEET = MovieSpec(energy=80.0, drift_step=0.12, rotation_step=0.1, hole=9.0, events=10)
# The first three and WSe2 are of materials that the shipped networks never saw.
SCENES: dict[str, MovieSpec] = {
    "Au": replace(_PARTICLE, element="Au"),
    "MoS2": replace(_SHEET, kind="mos2", sampling=0.15),
    "Ag": replace(_PARTICLE, element="Ag", sampling=0.19),
    "WSe2": replace(_SHEET, kind="wse2"),
    "Pt": replace(_PARTICLE, element="Pt"),
    "graphene": replace(_SHEET, kind="graphene", sampling=0.12),
}


class Known(NamedTuple):
    """A movie without noise on the detector's grid, mean about 1, and what is in it.

    cam (t, y, x); view (t, 2) [whole px]: how the view moved over the specimen; events (event, 3): frame and y, x [px]
    on the detector of what moves; truth: columns and the sign of the contrast, where they are known.
    """

    name: str
    cam: Floats
    view: NDArray[np.int64]
    events: Floats
    truth: SimulatedMovie | None


class Taken(NamedTuple):
    """A movie once the true whole-pixel drift is taken out: counts and what they would be without noise, (t, y, x);
    corner (t, 2) [px]: where its first pixel lies on the detector."""

    known: Known
    counts: Floats
    clean: Floats
    corner: NDArray[np.int64]


class Figures(NamedTuple):
    """PSNR [dB], SSIM, with which setting, and multiplications per pixel of a network (0: not counted).

    events: PSNR around what moves; f1, position: of the columns that our network finds, and their RMS error [Å];
    vacuum, ring: contrast over the mean in vacuum and its `ring`; none of these where the movie has none (NaN).
    """

    psnr: float
    ssim: float
    setting: str
    macs: float = 0.0
    events: float = float("nan")
    f1: float = float("nan")
    position: float = float("nan")
    vacuum: float = float("nan")
    ring: float = float("nan")


def opened(path: Path) -> Known:
    """A movie from a file of arrays: `cam`, `drift` and, if it has them, events `ev` (frame, y, x) on the grid of
    frame 0 moved back by its drift and 16 px, as the protocol's movies hold them."""
    with np.load(path) as data:
        view = data["drift"].astype(np.int64)
        events = data["ev"].astype(float) if "ev" in data else np.empty((0, 3))
        if events.shape[1:] != (3,):  # the protocol's MoS2 has them on a lattice that turns
            events = np.empty((0, 3))
        events[:, 1:] -= view[events[:, 0].astype(int)]
        return Known(path.stem, data["cam"], view, events, None)


def simulated(name: str, *, frames: int, side: int) -> Known:
    """One of `SCENES`."""
    movie = simulate_movie(replace(SCENES[name], frames=frames, shape=(side, side)), SEED)
    places = []
    for event in movie.events:
        for frame, column in ((event.frame - 1, event.column), (event.frame, event.to)):
            here = movie.columns[frame][movie.columns[frame]["column"] == column]
            places += [(event.frame, float(one["y"]), float(one["x"])) for one in here]
    events = np.array(places, dtype=float).reshape(-1, 3)
    return Known(name, movie.clean / movie.clean.mean(), -np.rint(movie.drift).astype(np.int64), events, movie)


def taken(known: Known, dose: float, *, still: bool = True) -> Taken:
    """Counts of a movie at a dose [electrons per pixel], cut so that the specimen stands still to the pixel; or all of
    the detector."""
    cam = known.cam
    counts = np.random.default_rng(5).poisson(np.maximum(cam, 0) * dose).astype(np.float32)
    if not still:
        return Taken(known, counts, cam, np.zeros_like(known.view))
    view = known.view - known.view.min(0)
    room = 16 if view.max() <= 16 else int(view.max())
    height, width = (size - room for size in cam.shape[1:])
    corner = room - view
    cut = [(slice(y, y + height), slice(x, x + width)) for y, x in corner]
    counts, clean = (np.stack([movie[t][cut[t]] for t in range(len(cam))]) for movie in (counts, cam))
    return Taken(known, counts, clean, corner)


def inner(movie: Floats) -> Floats:
    """The part that is scored."""
    return movie[EDGE_FRAMES:-EDGE_FRAMES, EDGE:-EDGE, EDGE:-EDGE]


def psnr(estimate: Floats, clean: Floats) -> float:
    """Peak signal-to-noise ratio [dB] of relative intensities (t, y, x)."""
    span = float(np.ptp(inner(clean)))
    return float(10 * np.log10(span**2 / np.mean((inner(estimate) - inner(clean)) ** 2)))


def scored(estimate: Floats, movie: Taken, setting: str = "") -> Figures:
    """The figures of an estimate (t, y, x) of relative intensities."""
    clean = movie.clean
    span, pairs = float(np.ptp(inner(clean))), zip(inner(estimate)[::4], inner(clean)[::4], strict=True)
    options = {"data_range": span, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    similar = [structural_similarity(one.astype(float), two.astype(float), **options) for one, two in pairs]
    found = Figures(psnr(estimate, clean), float(np.mean(similar)), setting, events=around_events(estimate, movie))
    f1, position = columns(estimate, movie)
    vacuum, peak = in_vacuum(estimate, movie)
    return found._replace(f1=f1, position=position, vacuum=vacuum, ring=peak)


def around_events(estimate: Floats, movie: Taken) -> float:
    """PSNR [dB] in squares of 21 px around what moves, in the frames before and after; NaN if nothing does."""
    errors = [np.square(estimate[frame, y, x] - movie.clean[frame, y, x]).ravel() for frame, y, x in _places(movie)]
    if not errors:
        return float("nan")
    return float(10 * np.log10(np.ptp(inner(movie.clean)) ** 2 / np.concatenate(errors).mean()))


def _places(movie: Taken) -> Iterator[tuple[int, slice, slice]]:
    frames, height, width = movie.clean.shape
    for when, *place in movie.known.events:
        for frame in range(int(when) - EVENT_FRAMES, int(when) + EVENT_FRAMES):
            if not EDGE_FRAMES <= frame < frames - EDGE_FRAMES:
                continue
            y, x = np.rint(np.array(place) - movie.corner[frame]).astype(int)
            if EDGE + EVENT <= y < height - EDGE - EVENT and EDGE + EVENT <= x < width - EDGE - EVENT:
                yield frame, slice(y - EVENT, y + EVENT + 1), slice(x - EVENT, x + EVENT + 1)


@cache
def _finder() -> Loaded:
    return load_weights("columns")


def columns(estimate: Floats, movie: Taken) -> tuple[float, float]:
    """F1 of the columns that the shipped network finds in a few frames, and the RMS error of their places [Å], before
    the fit to the counts; NaN where the truth is not known."""
    truth = movie.known.truth
    if truth is None or not truth.polarity:
        return float("nan"), float("nan")
    model, tallies = _finder(), []
    options: dict[str, Any] = {
        "sampling": truth.sampling, "model_sampling": float(model.metadata["sampling"]),
        "polarity": truth.polarity, "window": None, "halo": None, "batch": 1,
    }  # fmt: skip
    for frame in _some(range(EDGE_FRAMES, len(estimate) - EDGE_FRAMES), COLUMN_FRAMES):
        found = segment.column_probability(model.module, estimate[frame : frame + 1].astype(np.float32), **options)[0]
        here = truth.columns[frame].copy()
        here["y"] -= movie.corner[frame][0]
        here["x"] -= movie.corner[frame][1]
        tallies.append(tally_columns(found, here, sampling=truth.sampling, threshold=Columns().threshold))
    made = score(merge(tallies))
    return made.f1, made.rms


def _some(items: Sequence[int], most: int) -> list[int]:
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, most).round().astype(int))]


def in_vacuum(estimate: Floats, movie: Taken) -> tuple[float, float]:
    """Contrast and ring, see `of_noise`, in the square of VACUUM px where the clean movie varies least; NaN where that
    is no vacuum."""
    clean = inner(movie.clean)
    best = (np.inf, 0, 0)
    for y in range(0, clean.shape[1] - VACUUM + 1, 8):
        for x in range(0, clean.shape[2] - VACUUM + 1, 8):
            varies = float(clean[:, y : y + VACUUM, x : x + VACUUM].std((1, 2)).max())
            best = min(best, (varies, y, x))
    varies, y, x = best
    if varies > FLAT:
        return float("nan"), float("nan")
    return of_noise(inner(estimate)[:, y : y + VACUUM, x : x + VACUUM])


def of_noise(estimate: Floats) -> tuple[float, float]:
    """Standard deviation of denoised noise (t, y, x) of mean 1, and the ring of its mean spectrum.

    The ring is the largest over the median amplitude between 0.06 and 0.16 cycles per pixel; infinite if half of these
    are nothing and one is not.
    """
    spectrum = np.abs(np.fft.fft2(estimate - estimate.mean((1, 2), keepdims=True))).mean(0)
    f = np.hypot(*np.meshgrid(*[np.fft.fftfreq(s) for s in spectrum.shape], indexing="ij"))
    ring = spectrum[(f > 0.06) & (f < 0.16)]
    return float(estimate.std()), float(ring.max() / max(np.median(ring), 1e-12))
