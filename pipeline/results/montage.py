"""Pictures of example frames: raw, denoised, and where columns were found, with a calibrated scale bar.

The pixels are PNG; scale bar and markers are vectors on top, in pixel coordinates (the centre of pixel 0 is at 0.5).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from pipeline.results.examples import Example
from pipeline.results.markup import Markup, data_uri, element, join, number_text
from pipeline.steps.residual import MEANINGLESS

MOST_PIXELS = 640
"""Longer edges are averaged down for the overview."""
DETAIL = 14.0  # Å, edge of the magnified square
COLOURS = ("#ffb000", "#56b4e9", "#dc267f", "#3ddc97", "#ffffff", "#f0e442")
"""Of the markers of one species each; told apart by people who see no red or no green."""
SIGMAS = 4.0
"""Of the noise predicted, from black to white in the picture of what the denoiser took away."""
CIRCLE = (0.4, 0.9)  # Å, least and greatest radius of the marker of a column

Window = tuple[int, int, int, int]


def colours_of(shown: Sequence[Example]) -> dict[str, str]:
    """A colour for each species in some frames; none where there are not two."""
    names = sorted({str(name) for example in shown for name in example.species})
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)} if len(names) > 1 else {}


def example_figure(example: Example, *, magnified: bool, colours: Mapping[str, str]) -> Markup:
    """Raw, denoised and columns side by side, whole and, if wanted, magnified; markers coloured by species."""
    height, width = example.raw.shape
    whole = (0, height, 0, width)
    detail = detail_window(example) if magnified else None
    rows = [_row(example, whole, detail, colours)] + ([_row(example, detail, None, colours)] if detail else [])
    facts = [f"Frame {example.frame}, {number_text(example.time)} s: {len(example.points):,} columns in view"]
    facts += (
        [f"{len(example.ratios):,} particle{'' if len(example.ratios) == 1 else 's'}"] if example.labels.any() else []
    )
    facts += [f"signal-to-noise ratio {number_text(example.snr)}"] if math.isfinite(example.snr) else []
    facts += [f"{number_text(example.dose)} e⁻/Å²"] if math.isfinite(example.dose) else []
    if math.isfinite(example.spread):
        white = "white" if abs(example.correlation) <= MEANINGLESS else "not white"
        facts.append(
            f"difference {example.spread:.2f} of the noise predicted and {white} "
            f"(pixels nearby correlated by {example.correlation:+.3f} at most)"
        )
    return element("figure", *rows, element("figcaption", "; ".join(facts) + "."), class_="example")


def _row(example: Example, window: Window, box: Window | None, colours: Mapping[str, str]) -> Markup:
    frame = f"frame {example.frame}"
    kind = "magnified" if box is None and window != (0, example.raw.shape[0], 0, example.raw.shape[1]) else "whole"
    outline = _outline(window, box)
    marks = (_crosses if kind == "magnified" else _circles)(example, window, colours)
    taken = [] if example.residual is None else [("difference", example.residual, None, None)]
    panels = (
        ("raw", example.raw, (1.0, 99.0), outline),
        ("denoised", example.denoised, (0.5, 99.8), None),
        *taken,
        ("columns", example.denoised, (0.5, 99.8), marks),
    )
    drawn = []
    for name, image, limits, over in panels:
        low, high = -SIGMAS, SIGMAS
        if limits is not None:
            low, high = np.percentile(image[np.isfinite(image)], limits) if np.isfinite(image).any() else (0.0, 1.0)
        picture = _panel(_grey(image, low, high), window, example.sampling, over, f"{name}, {frame}, {kind}")
        drawn.append(element("div", element("span", name, class_="name"), picture))
    if example.labels.any() and kind == "whole":
        picture = _panel(_coloured(example), window, example.sampling, None, f"particles, {frame}, {kind}")
        drawn.append(element("div", element("span", "particles", class_="name"), picture))
    return element("div", *drawn, class_={4: "panels four", 5: "panels five"}.get(len(drawn), "panels"))


def _panel(pixels: np.ndarray, window: Window, sampling: float, over: Markup | None, label: str) -> Markup:
    y0, y1, x0, x1 = window
    height, width = y1 - y0, x1 - x0
    picture = element(
        "image", href=data_uri(_png(pixels[y0:y1, x0:x1]), "image/png"), width=width, height=height,
        preserveAspectRatio="none", class_="pixels",
    )  # fmt: skip
    bar = _scale_bar(width, height, sampling)
    return element("svg", picture, over, bar, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def _grey(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Pixels (y, x) from 0 to 1, the range from low to high."""
    scaled: np.ndarray = np.clip((np.nan_to_num(image, nan=low) - low) / max(high - low, 1e-12), 0, 1)
    return scaled


def _coloured(example: Example) -> np.ndarray:
    """Pixels (y, x, colour): particles from yellow, whose Fourier peaks are equal, to violet; white without a lattice.

    The inference scaled by the ratio, as in Larsen et al., Ultramicroscopy 2023, 113803, figure 2.
    """
    low, high = np.percentile(example.denoised[np.isfinite(example.denoised)], (0.5, 99.8))
    grey = 0.75 * _grey(example.denoised, low, high)[..., None].repeat(3, 2)
    painted = np.ones((max(int(example.labels.max()), len(example.ratios)) + 1, 3))
    known = np.flatnonzero(np.isfinite(example.ratios))
    painted[known + 1] = mpl.colormaps["viridis"](1 / np.maximum(example.ratios[known], 1))[:, :3]
    inside = (example.labels > 0)[..., None]
    tinted: np.ndarray = np.where(inside, 0.4 * grey + 0.6 * painted[np.maximum(example.labels, 0)], grey)
    return tinted


def _png(pixels: np.ndarray) -> bytes:
    factor = math.ceil(max(pixels.shape[:2]) / MOST_PIXELS)
    if factor > 1:
        height, width = (size // factor * factor for size in pixels.shape[:2])
        cut = pixels[:height, :width]
        pixels = cut.reshape(height // factor, factor, width // factor, factor, *pixels.shape[2:]).mean(axis=(1, 3))
    buffer = io.BytesIO()
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def detail_window(example: Example) -> Window | None:
    """A square of ``DETAIL`` Å with as many columns as any; None where the crop is hardly larger."""
    height, width = example.raw.shape
    edge = round(DETAIL / example.sampling)
    if edge < 16 or edge > 0.6 * min(height, width):
        return None
    centre = np.array([height / 2, width / 2])
    if len(example.points):
        tree = cKDTree(example.points)
        best = np.asarray(tree.query_ball_point(example.points, edge / 2, p=np.inf, return_length=True))
        full = np.flatnonzero(best >= 0.9 * best.max())
        centre = example.points[full[np.argmin(np.hypot(*(example.points[full] - centre).T))]]
    y0, x0 = (int(np.clip(c - edge / 2, 0, size - edge)) for c, size in zip(centre, (height, width), strict=True))
    return y0, y0 + edge, x0, x0 + edge


def scale_length(width: float) -> float:
    """The length [Å] of 1, 2 or 5 times a power of ten that is nearest below a third of ``width`` [Å]."""
    power = 10.0 ** math.floor(math.log10(width / 3))
    return max(step * power for step in (1, 2, 5) if step * power <= width / 3)


def _scale_bar(width: int, height: int, sampling: float) -> Markup:
    length = scale_length(width * sampling)
    text = f"{length / 10:g} nm" if length >= 10 else f"{length:g} Å"
    pixels, unit = length / sampling, width / 100
    x, y = 4 * unit, height - 5 * unit
    bar = element("rect", x=f"{x:.2f}", y=f"{y:.2f}", width=f"{pixels:.3f}", height=f"{1.6 * unit:.2f}", class_="bar")
    words = element(
        "text", text, x=f"{x + pixels / 2:.2f}", y=f"{y - 1.8 * unit:.2f}", font_size=f"{6 * unit:.2f}",
        stroke_width=f"{unit:.2f}", class_="bartext",
    )  # fmt: skip
    return join([bar, words])


def _circles(example: Example, window: Window, colours: Mapping[str, str]) -> Markup:
    radius = _radius(example)
    marks = [
        element(
            "circle", cx=f"{x + 0.5 - window[2]:.2f}", cy=f"{y + 0.5 - window[0]:.2f}", r=f"{radius:.2f}",
            stroke=colours.get(str(name)),
        )
        for (y, x), name in zip(example.points, example.species, strict=True)
    ]  # fmt: skip
    return element("g", *marks, class_="marks", stroke_width=f"{radius / 3:.2f}")


def _radius(example: Example) -> float:
    """Radius of markers [px] that leaves the columns visible: two fifths of the usual distance of neighbours."""
    least, most = (edge / example.sampling for edge in CIRCLE)
    if len(example.points) < 2:
        return most
    distance = np.median(np.asarray(cKDTree(example.points).query(example.points, 2)[0])[:, 1])
    return float(np.clip(0.4 * distance, least, most))


def _crosses(example: Example, window: Window, colours: Mapping[str, str]) -> Markup:
    """A cross on each column whose arms are 0.4 Å, and the ellipse of three standard errors."""
    y0, y1, x0, x1 = window
    arm = 0.4 / example.sampling
    marks = []
    for (y, x), (y_err, x_err), name in zip(
        example.points, np.nan_to_num(example.errors), example.species, strict=True
    ):
        cy, cx = y + 0.5 - y0, x + 0.5 - x0
        if -1 < cy < y1 - y0 + 1 and -1 < cx < x1 - x0 + 1:
            lines = f"M{cx - arm:.2f} {cy:.2f}H{cx + arm:.2f}M{cx:.2f} {cy - arm:.2f}V{cy + arm:.2f}"
            ellipse = element("ellipse", cx=f"{cx:.2f}", cy=f"{cy:.2f}", rx=f"{3 * x_err:.2f}", ry=f"{3 * y_err:.2f}")
            marks.append(element("g", element("path", d=lines), ellipse, stroke=colours.get(str(name))))
    return element("g", *marks, class_="marks", stroke_width=f"{0.1 / example.sampling:.2f}")


def _outline(window: Window, box: Window | None) -> Markup | None:
    if box is None:
        return None
    y0, y1, x0, x1 = box
    unit = (window[3] - window[2]) / 100
    return element("rect", x=x0, y=y0, width=x1 - x0, height=y1 - y0, class_="box", stroke_width=f"{0.6 * unit:.2f}")
