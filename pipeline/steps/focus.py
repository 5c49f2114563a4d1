"""How the planes of a focal series lie against each other, though contrast turns over between them.

Each spatial frequency appears in a plane with a factor of either sign, the transfer function of its defocus, so plain
cross-correlation of two planes may cancel or invert. The cross spectrum squared knows no sign: where C is the product
of one transform with the conjugate of the other, C²/|C| has twice the phase of C, and its transform peaks at twice the
offset whatever the signs are. On a crystal it peaks at every half of a lattice vector more. Which one is right is told
by the mutual information of the two images so moved (Viola and Wells, 1997), which excludes the halves, by what most
frames agree on, and, for a perfect crystal tells whole lattice vectors apart by nothing, by the offset being small.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.fft import fft2, fftfreq, ifft2
from scipy.ndimage import gaussian_filter, maximum_filter, shift, spline_filter

Floats = NDArray[np.float64]

CANDIDATES = 12  # maxima per plane that are judged and kept
BINS = 24  # of each axis of the joint histogram
BLUR = 1.0  # px, standard deviation of the Gaussian that calms noise before mutual information is taken
EDGE = 256  # px of the middle of the view in which it is taken, at most
GRID = 0.5  # px of the map in which the frames vote
REACH = 3.0  # how far offsets are looked for, in units of their scale


def plane_offsets(
    planes: NDArray[np.floating], *, reference: int, scale: float, band: tuple[float, float], taper: float
) -> Floats:
    """Where the content of each plane may lie against the reference: (plane, candidate, 3) of y, x [px] and score.

    planes (defocus, y, x); what lies at p in the reference lies at p + offset in a plane. scale [px]: standard
    deviation of plausible offsets; band: frequencies [cycles/px] that are compared; taper: part of the field, at each
    side, over which a window falls to zero. The best of the scores, if there is any, is 1; the best comes first. What
    is missing, and all of a plane that is not finite, is NaN. The reference has the offset 0.
    """
    out = np.full((len(planes), CANDIDATES, 3), np.nan)
    out[reference, 0] = 0.0, 0.0, 1.0
    if not np.isfinite(planes[reference]).all():
        return out
    weight = _window(planes.shape[1:], taper)
    base = fft2(_flat(planes[reference], weight)).conj()
    for index, plane in enumerate(planes):
        if index == reference or not np.isfinite(plane).all():
            continue
        found = _peaks(_doubled(fft2(_flat(plane, weight)) * base, band), scale)
        found[:, 2] *= _informations(planes[reference], plane, found[:, :2])
        order = np.argsort(-found[:, 2], kind="stable")
        if len(found) and found[order[0], 2] > 0:
            found[:, 2] /= found[order[0], 2]
            out[index, : len(found)] = found[order]
    return out


def solve_offsets(candidates: Floats, *, scale: float) -> Floats:
    """Offsets (time, plane, 2) [px] of all frames from the candidates (time, plane, candidate, 3) of each.

    The frames vote on the offset of a plane; then each takes the candidate that is best near it, where `scale` [px] is
    the standard deviation of plausible differences: a frame's own evidence may outweigh that of the others. A frame
    without a candidate, and one whose own are all far away, gets the common offset.
    """
    frames, planes = candidates.shape[:2]
    out = np.zeros((frames, planes, 2))
    for plane in range(planes):
        mine = candidates[:, plane]
        common = _vote(mine[..., :2].reshape(-1, 2), mine[..., 2].ravel())
        away = np.hypot(*np.moveaxis(mine[..., :2] - common, -1, 0))
        value = np.where(np.isfinite(away), mine[..., 2] * np.exp(-0.5 * (away / scale) ** 2), -1.0)
        best = value.argmax(1)
        rows = np.arange(frames)
        near = (value[rows, best] > 0) & (np.nan_to_num(away[rows, best], nan=np.inf) <= 3 * scale)
        out[:, plane] = np.where(near[:, None], mine[rows, best, :2], common)
    return out


def moved_back(plane: NDArray[np.floating], offset: NDArray[np.floating]) -> NDArray[np.float32]:
    """A plane (y, x) with its content moved by −offset (y, x) [px], onto the reference; its edge pixels continue it."""
    moved = shift(np.asarray(plane, np.float32), -np.asarray(offset, float), order=3, mode="nearest")
    return np.asarray(moved, np.float32)


def _window(shape: tuple[int, ...], taper: float) -> Floats:
    """A window (y, x) that falls to zero over a part of the field at each side, as a cosine."""
    edges = []
    for size in shape:
        inside = np.minimum(np.arange(size) + 0.5, size - np.arange(size) - 0.5) / max(taper * size, 1e-9)
        edges.append(np.sin(np.pi / 2 * np.minimum(inside, 1)) ** 2)
    return np.asarray(edges[0][:, None] * edges[1])


def _flat(plane: NDArray[np.floating], weight: Floats) -> Floats:
    values = np.asarray(plane, np.float64)
    return np.asarray((values - (values * weight).sum() / weight.sum()) * weight)


def _doubled(cross: NDArray[np.complexfloating], band: tuple[float, float]) -> Floats:
    """Correlation (y, x) that peaks at twice the offset, of a cross spectrum; its largest possible value is 1."""
    ky, kx = (fftfreq(size) for size in cross.shape)
    radius = np.hypot(ky[:, None], kx)
    amplitude = np.abs(cross)
    used = (radius >= band[0]) & (radius <= band[1]) & (amplitude > 0)
    spectrum = np.where(used, cross**2 / np.where(used, amplitude, 1), 0)
    return np.asarray(ifft2(spectrum).real * cross.size / max(float(amplitude[used].sum()), 1e-300))


def _peaks(correlation: Floats, scale: float) -> Floats:
    """The best maxima (peak, 3) of a doubled correlation: offset y, x [px], and height where it is plausible."""
    reach = [int(min(round(2 * REACH * scale), (size - 1) // 2 - 1)) for size in correlation.shape]
    # One pixel more on each side, for the neighbours of a maximum.
    rows, cols = (np.arange(-r - 1, r + 2) for r in reach)
    near = correlation[rows[:, None], cols]
    highest = (near == maximum_filter(near, 3))[1:-1, 1:-1] & (near[1:-1, 1:-1] > 0)
    y, x = (found + 1 for found in np.nonzero(highest))
    height = near[y, x]
    place = []
    for before, after, at in ((near[y - 1, x], near[y + 1, x], rows[y]), (near[y, x - 1], near[y, x + 1], cols[x])):
        bend = np.minimum(before - 2 * near[y, x] + after, -1e-300)
        step = np.clip(0.5 * (before - after) / bend, -0.5, 0.5)
        height = height - 0.25 * (before - after) * step
        place.append((at + step) / 2)
    found = np.stack([*place, height * np.exp(-0.5 * (np.hypot(*place) / scale) ** 2)], axis=1)
    return np.asarray(found[np.argsort(-found[:, 2], kind="stable")[:CANDIDATES]])


def _informations(reference: NDArray[np.floating], plane: NDArray[np.floating], offsets: Floats) -> Floats:
    """Mutual information (offset,) [nat] of the middle of two images, the second moved back by each offset [px].

    All offsets are judged by the same pixels of the reference, so far from the edge that no pixel comes from outside.
    """
    margin = int(np.ceil(np.abs(offsets).max())) + 2 if len(offsets) else 0
    cuts = []
    for size in reference.shape:
        kept = max(min(size - 2 * margin, EDGE), min(size, 16))
        cuts.append(slice((size - kept) // 2, (size - kept) // 2 + kept))
    wide = tuple(slice(max(0, cut.start - margin), cut.stop + margin) for cut in cuts)
    inner = tuple(slice(c.start - w.start, c.stop - w.start) for c, w in zip(cuts, wide, strict=True))
    one, other = (gaussian_filter(np.asarray(image[wide], np.float64), BLUR) for image in (reference, plane))
    base, splines = _ranks(one[inner]) * BINS, spline_filter(other, order=3)
    values = []
    for offset in offsets:
        moved = shift(splines, -offset, order=3, prefilter=False, mode="nearest")[inner]
        joint = np.bincount(base + _ranks(moved), minlength=BINS**2).reshape(BINS, BINS) / base.size
        apart = joint.sum(1)[:, None] * joint.sum(0)
        there = joint > 0
        values.append(float((joint[there] * np.log(joint[there] / apart[there])).sum()))
    return np.asarray(values)


def _ranks(image: Floats) -> NDArray[np.intp]:
    """Bins (pixel,) of grey values, as many pixels in each as the values allow."""
    edges = np.quantile(image, np.linspace(0, 1, BINS + 1)[1:-1])
    return np.searchsorted(edges, image.ravel(), side="right").astype(np.intp)


def _vote(offsets: Floats, weight: Floats) -> Floats:
    """The offset (2,) [px] around which most of the weight of offsets (offset, 2) lies; 0 where there are none."""
    there = np.isfinite(offsets).all(1) & (weight > 0)
    if not there.any():
        return np.zeros(2)
    offsets, weight = offsets[there], weight[there]
    reach = int(np.ceil(np.abs(offsets).max() / GRID)) + 1
    bins = np.rint(offsets / GRID).astype(int) + reach
    votes = np.zeros((2 * reach + 1,) * 2)
    np.add.at(votes, (bins[:, 0], bins[:, 1]), weight)
    smooth = gaussian_filter(votes, 1.0 / GRID, mode="constant")
    centre = (np.array(np.unravel_index(smooth.argmax(), smooth.shape)) - reach) * GRID
    close = np.hypot(*(offsets - centre).T) <= 1.5
    return np.asarray(np.average(offsets[close], axis=0, weights=weight[close]) if close.any() else centre)
