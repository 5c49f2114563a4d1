"""Particles as a whole: from the probability of every pixel to labelled particles and their measures."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import regionprops
from skimage.morphology import local_maxima, reconstruction
from skimage.segmentation import watershed

FREE, BORDER, TOUCHING = 0, 1, 2
"""Contact of a particle; one that is cut by the border and touches another has their sum."""

PART_PIXELS = 2**18  # px; a larger region is parted on a coarser grid, which bounds time and memory
_EIGHT = np.ones((3, 3), dtype=bool)
_LENGTHS = ("equivalent_diameter", "perimeter", "major_axis", "minor_axis")


def label(
    probability: NDArray[np.floating], *, threshold: float, min_area: float, max_hole: float, neck: float
) -> NDArray[np.int32]:
    """Particles (y, x) from 1 on, 0 elsewhere, of the probability (y, x) that a pixel belongs to one.

    Pixels of at least threshold that touch, also at corners, are one particle; enclosed holes of up to max_hole [px]
    are filled, and what has less than min_area [px] is left out. Particles that touch are parted by a watershed of the
    distance from the outline where they are joined along less than neck of the narrower one's width; a part is never
    smaller than min_area. Numbers run down the frame, then across, by the centroid.
    """
    mask = _filled(probability >= threshold, max_hole)
    joined, count = ndimage.label(mask, structure=_EIGHT)
    out = np.zeros(probability.shape, dtype=np.int32)
    last = 0
    for index, box in enumerate(ndimage.find_objects(joined, max_label=count), start=1):
        inside = joined[box] == index
        if inside.sum() < min_area:
            continue
        parts = _coarsely_parted(inside, min_area, neck)
        out[box][inside] = parts[inside] + last
        last += int(parts.max())
    return _in_order(out, last)


def _filled(mask: NDArray[np.bool_], max_hole: float) -> NDArray[np.bool_]:
    """The mask without its holes of up to max_hole [px]; what the border opens is no hole."""
    holes, count = ndimage.label(~mask)
    if not count or max_hole <= 0:
        return mask
    small = np.bincount(holes.ravel(), minlength=count + 1) <= max_hole
    small[0] = False
    for edge in (holes[0], holes[-1], holes[:, 0], holes[:, -1]):
        small[edge] = False
    filled: NDArray[np.bool_] = mask | small[holes]
    return filled


def _coarsely_parted(inside: NDArray[np.bool_], min_area: float, neck: float) -> NDArray[np.int32]:
    """`_parted` on every n-th pixel of a large mask; its other pixels belong to the part that is nearest."""
    step = math.ceil(math.sqrt(inside.size / PART_PIXELS))
    if step == 1:
        return _parted(inside, min_area, neck)
    joined, count = ndimage.label(inside[::step, ::step], structure=_EIGHT)
    if not count:
        return inside.astype(np.int32)
    # Thinner than the grid, a bridge may be lost; what it joined is parted there.
    parts, last = np.zeros(joined.shape, np.int32), 0
    for index, box in enumerate(ndimage.find_objects(joined, max_label=count), start=1):
        region = joined[box] == index
        if region.sum() * step**2 < min_area and (last or index < count):
            continue
        found = _parted(region, min_area / step**2, neck)
        parts[box][region] = found[region] + last
        last += int(found.max())
    nearest = ndimage.distance_transform_edt(parts == 0, return_distances=False, return_indices=True)
    filled = parts[tuple(nearest)].repeat(step, 0).repeat(step, 1)
    numbered: NDArray[np.int32] = filled[: inside.shape[0], : inside.shape[1]]
    return numbered


def _parted(inside: NDArray[np.bool_], min_area: float, neck: float) -> NDArray[np.int32]:
    """Parts (y, x) from 1 on of one connected mask.

    The distance from the outline is half the width. A part has a maximum of its own that stands out: on the way to a
    higher one the width falls below neck of its own. On a logarithmic scale that is one height for all sizes.
    """
    padded = np.pad(inside, 1)
    distance = ndimage.distance_transform_edt(padded)
    depth = -math.log(min(max(neck, 1e-6), 1.0))
    height = np.log(np.where(padded, distance, math.exp(-2 * depth - 1)))
    raised = reconstruction(height - depth, height, method="dilation")  # type: ignore[no-untyped-call]
    peaks = local_maxima(raised)  # type: ignore[no-untyped-call]
    markers, count = ndimage.label(peaks & padded, structure=_EIGHT)
    parts = watershed(-distance, markers, connectivity=2, mask=padded)  # type: ignore[no-untyped-call]
    areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    while True:
        present = np.flatnonzero(areas) + 1
        smallest = present[np.argmin(areas[present - 1])]
        if len(present) == 1 or areas[smallest - 1] >= min_area:
            break
        _share(parts, smallest, -distance)
        areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    order = np.zeros(count + 1, dtype=np.int32)
    order[present] = np.arange(1, len(present) + 1)
    numbered: NDArray[np.int32] = order[parts[1:-1, 1:-1]]
    return numbered


def _share(parts: NDArray[np.int32], part: int, relief: NDArray[np.floating]) -> None:
    """Give the pixels of a part to those around it, in place, as a flood of the relief from their rims would.

    The others keep what they have. That is what a watershed without the part's marker gives, up to ties.
    """
    box = tuple(
        slice(max(cut.start - 1, 0), cut.stop + 1) for cut in ndimage.find_objects(parts, max_label=part)[part - 1]
    )
    near = parts[box]
    given = near == part
    rivals = np.where(given, 0, near)
    flooded = watershed(relief[box], rivals, connectivity=2, mask=near > 0)  # type: ignore[no-untyped-call]
    near[given] = flooded[given]


def _in_order(labels: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """The labels numbered anew by their centroids: down the frame, then across."""
    if not count:
        return labels
    centres = np.empty((count, 2))
    for index, box in enumerate(ndimage.find_objects(labels, max_label=count)):
        region = labels[box] == index + 1
        for axis in (0, 1):
            profile = region.sum(1 - axis)
            centres[index, axis] = box[axis].start + profile @ np.arange(len(profile)) / profile.sum()
    order = np.zeros(count + 1, dtype=np.int32)
    order[np.lexsort((centres[:, 1], centres[:, 0])) + 1] = np.arange(1, count + 1)
    ordered: NDArray[np.int32] = order[labels]
    return ordered


def measure(
    labels: NDArray[np.int32], probability: NDArray[np.floating], *, sampling: float
) -> dict[str, NDArray[np.generic]]:
    """What is measured of each particle, as arrays (particle,) in the order of their labels.

    labels and probability (y, x); sampling [Å/px]. y and x are the centroid in pixels; area [Å²],
    equivalent_diameter, perimeter, major_axis and minor_axis [Å] (full axes of the ellipse of equal second moments);
    orientation [rad] of the major axis, from x towards y, that is clockwise as seen, in (−π/2, π/2]; contact is FREE,
    BORDER, TOUCHING or the sum of the last two; probability the mean over its pixels.
    """
    found = regionprops(labels, intensity_image=probability)  # type: ignore[no-untyped-call]
    rows = {
        "y": [p.centroid[0] for p in found],
        "x": [p.centroid[1] for p in found],
        "area": [p.area * sampling**2 for p in found],
        "equivalent_diameter": [p.equivalent_diameter_area for p in found],
        "perimeter": [p.perimeter_crofton for p in found],
        "orientation": [_from_x(p.orientation) for p in found],
        "major_axis": [p.axis_major_length for p in found],
        "minor_axis": [p.axis_minor_length for p in found],
        "probability": [p.intensity_mean for p in found],
    }
    table: dict[str, NDArray[np.generic]] = {
        name: np.asarray(values, dtype=np.float64) * (sampling if name in _LENGTHS else 1.0)
        for name, values in rows.items()
    }
    table["contact"] = contact(labels, len(found))
    return table


def _from_x(orientation: float) -> float:
    """Angle from x towards y in (−π/2, π/2] of an axis at `orientation` from y towards x, as scikit-image has it."""
    angle = math.pi / 2 - orientation
    return angle - math.pi if angle > math.pi / 2 else angle


def contact(labels: NDArray[np.int32], count: int) -> NDArray[np.int8]:
    """What each of the count particles (particle,) touches: BORDER of the view, another (TOUCHING), both, or nothing.

    Particles touch where their pixels are neighbours, also at corners.
    """
    touching, border = np.zeros((2, count + 1), dtype=bool)
    height, width = labels.shape
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        one = labels[: height - dy, max(0, -dx) : width - max(0, dx)]
        other = labels[dy:, max(0, dx) : width + min(0, dx)]
        pair = (one != other) & (one > 0) & (other > 0)
        touching[one[pair]] = touching[other[pair]] = True
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        border[edge] = True
    found: NDArray[np.int8] = (border * BORDER + touching * TOUCHING).astype(np.int8)[1:]
    return found


def particle_of(
    labels: NDArray[np.int32], y: NDArray[np.floating], x: NDArray[np.floating], *, reach: float = 0.0
) -> NDArray[np.int32]:
    """For points (point,) [px]: the row (from 0) of the particle that they lie in or within reach [px] of, −1 in none.

    Of several within reach it is that of the nearest pixel.
    """
    height, width = labels.shape
    rows, cols = (np.rint(v).astype(np.int64)[:, None] for v in (y, x))
    span = np.arange(-int(reach), int(reach) + 1)
    steps = np.stack(np.meshgrid(span, span, indexing="ij"), axis=-1).reshape(-1, 2)
    distance = np.hypot(*steps.T)
    steps = steps[np.argsort(distance, kind="stable")][: np.count_nonzero(distance <= reach)]
    rows, cols = rows + steps[:, 0], cols + steps[:, 1]
    inside = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    seen = np.where(inside, labels[np.clip(rows, 0, height - 1), np.clip(cols, 0, width - 1)], 0)
    nearest = np.argmax(seen > 0, axis=1)
    return np.asarray(seen[np.arange(len(seen)), nearest] - 1, dtype=np.int32)
