"""The diagrams of a report: drawn once for paper and light screens, once for dark ones, as pictures inside the page."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from pipeline.results.markup import Markup, data_uri, element
from pipeline.results.summary import (
    DIAMETER_EDGES,
    ERROR_EDGES,
    PROBABILITY_EDGES,
    RATIO_EDGES,
    ColumnSummary,
    FrameSeries,
    ParticleSummary,
)

MOST_POINTS = 1500
"""Longer series are drawn as the mean and the range of so many bins, which keeps a page small."""

# Okabe and Ito's colours, told apart by colour-blind readers; the light blue and yellow are for dark ground.
_LIGHT = {
    "ink": "#1f2328",
    "soft": "#6b7280",
    "grid": "#e5e7eb",
    "first": "#0072b2",
    "second": "#d55e00",
    "flag": "#d55e00",
}
_DARK = {
    "ink": "#e6e6e3",
    "soft": "#9aa0a6",
    "grid": "#34383d",
    "first": "#56b4e9",
    "second": "#f0a830",
    "flag": "#f0a830",
}


def render(draw: Callable[[Figure], None], size: tuple[float, float], alt: str) -> Markup:
    """A picture that follows the reader's light or dark setting; ``size`` is (width, height) in inches."""
    light = _svg(draw, size)
    dark = light
    for name, colour in _LIGHT.items():  # drawing and laying out twice would take twice the time
        dark = dark.replace(colour, _DARK[name])
    light_uri, dark_uri = (data_uri(text.encode(), "image/svg+xml") for text in (light, dark))
    source = element("source", srcset=dark_uri, media="screen and (prefers-color-scheme: dark)")
    return element("picture", source, element("img", src=light_uri, alt=alt, class_="figure"))


def _svg(draw: Callable[[Figure], None], size: tuple[float, float]) -> str:
    theme = _LIGHT
    style: dict[Any, Any] = {
        "font.size": 9.5, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": theme["soft"], "axes.labelcolor": theme["ink"], "text.color": theme["ink"],
        "xtick.color": theme["soft"], "ytick.color": theme["soft"], "xtick.labelcolor": theme["ink"],
        "ytick.labelcolor": theme["ink"], "axes.grid": True, "grid.color": theme["grid"], "grid.linewidth": 0.7,
        "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.3, "svg.fonttype": "path",
        "svg.hashsalt": "colonnade", "text.parse_math": False, "axes.titlesize": 9.5, "axes.titlelocation": "left",
        "axes.facecolor": "none", "figure.facecolor": "none", "axes.formatter.useoffset": False,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue().decode()


def drift_figure(series: FrameSeries) -> Markup:
    """Drift down and across against time with its standard error, and the path on the detector."""

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(2, 2, width_ratios=(2.1, 1))
        down = figure.add_subplot(grid[0, 0])
        across = figure.add_subplot(grid[1, 0], sharex=down)
        for axes, axis, name in ((down, 0, "y (down)"), (across, 1, "x (across)")):
            _line(axes, series.time, series.drift[:, axis], _LIGHT["first"], error=series.drift_error[:, axis])
            axes.set_ylabel(f"drift {name} / Å")
            _flags(axes, series)
        down.tick_params(labelbottom=False)
        across.set_xlabel("time / s")
        _path(figure, figure.add_subplot(grid[:, 1]), series)

    far = float(np.nanmax(np.hypot(*series.drift.T))) if np.isfinite(series.drift).any() else float("nan")
    return render(draw, (9.6, 4.2), f"Drift of the specimen against time and as a path; at most {far:.3g} Å")


def series_figure(series: FrameSeries) -> Markup:
    """Columns, signal-to-noise ratio and dose against time, frames that were not measured marked."""
    doses = np.isfinite(series.dose).any()
    present = {name: count for name, count in series.species.items() if np.nansum(count) > 0}

    def draw(figure: Figure) -> None:
        panels = figure.subplots(3, 1, sharex=True)
        _line(panels[0], series.time, series.columns, _LIGHT["first"])
        if len(present) > 1:
            for i, (name, count) in enumerate(sorted(present.items())):
                _line(panels[0], series.time, count, mpl.colormaps["viridis"](0.3 + 0.6 * i / len(present)), label=name)
            panels[0].legend(ncols=4, fontsize=8)
        panels[0].set_ylabel("columns per frame")
        _line(panels[1], series.time, series.snr, _LIGHT["first"])
        panels[1].set_ylabel("signal-to-noise ratio")
        for axes, least in ((panels[0], 1.0), (panels[1], 1e-6)):
            axes.set_ylim(0, 1.08 * max(axes.get_ylim()[1], least))
        _line(panels[2], series.time, series.dose if doses else series.electrons, _LIGHT["first"])
        panels[2].set_ylabel("dose per frame / e⁻ Å⁻²" if doses else "electrons per pixel")
        panels[2].set_xlabel("time / s")
        for axes in panels:
            _flags(axes, series)

    what = "dose" if doses else "electrons per pixel"
    return render(draw, (9.6, 5.6), f"Columns per frame, signal-to-noise ratio and {what} against time")


def histogram_figure(summary: ColumnSummary) -> Markup:
    """How sure the network was of the columns, and how precisely they were located."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.stairs(summary.probability, PROBABILITY_EDGES, fill=True, color=_LIGHT["first"], alpha=0.85)
        left.set_xlabel("probability of a column")
        left.set_ylabel("columns")
        left.set_xlim(0, 1)
        shown = ERROR_EDGES[1:-1]
        for counts, colour, name, fill in (
            (summary.error_y, _LIGHT["first"], "y (down)", True),
            (summary.error_x, _LIGHT["second"], "x (across)", False),
        ):
            right.stairs(
                counts[1:-1], shown, fill=fill, color=colour, alpha=0.6 if fill else 1, label=name, linewidth=1.4
            )
        right.set_xscale("log")
        filled = np.flatnonzero((summary.error_y + summary.error_x)[1:-1])
        if filled.size:
            low, high = shown[filled[0]], shown[filled[-1] + 1]
            widen = max(1.15, np.sqrt(6 * low / high))  # at least a factor of six, so that some ticks have labels
            right.set_xlim(low / widen, high * widen)
        for axes in (left, right):
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        right.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        right.set_xlabel("standard error of a position / Å")
        right.set_ylabel("columns")
        right.legend()

    middle = summary.median_error()
    alt = f"Histograms over {summary.rows} columns: probability; standard error of position, median {middle:.3g} Å"
    return render(draw, (9.6, 2.9), alt)


def lattice_figure(series: FrameSeries, threshold: float | None) -> Markup | None:
    """Particles, missing atoms and Fourier ratio against time, as far as there are any; ``threshold`` is drawn."""
    drawn = [
        (name, numbers)
        for name, numbers in (
            ("particles", series.particles), ("missing atoms", series.vacancies), ("Fourier ratio", series.ratio),
        )
        if np.nansum(numbers) > 0
    ]  # fmt: skip
    if not drawn:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, numbers) in zip(panels, drawn, strict=True):
            error = series.vacancies_error if name == "missing atoms" else None
            _line(axes, series.time, numbers, _LIGHT["first"], error=error)
            if name == "Fourier ratio":
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                if threshold is not None:
                    axes.axhline(threshold, color=_LIGHT["second"], linestyle="--", linewidth=1)
            axes.set_ylabel(name)
            _flags(axes, series)
        panels[-1].set_xlabel("time / s")

    names = ", ".join(name for name, _ in drawn)
    return render(draw, (9.6, 0.8 + 1.6 * len(drawn)), f"Against time: {names}")


def particle_figure(summary: ParticleSummary, threshold: float | None) -> Markup:
    """How large particles are, and how unequal the peaks of their lattices."""

    def draw(figure: Figure) -> None:
        for axes, counts, edges, words in zip(
            figure.subplots(1, 2), (summary.diameter, summary.ratio), (DIAMETER_EDGES, RATIO_EDGES),
            ("equivalent diameter / Å", "Fourier ratio"), strict=True,
        ):  # fmt: skip
            axes.stairs(counts, edges, fill=True, color=_LIGHT["first"], alpha=0.85)
            axes.set_xscale("log")
            filled = np.flatnonzero(counts)
            if filled.size:
                low, high = edges[filled[0]], edges[filled[-1] + 1]
                widen = max(1.15, np.sqrt(6 * low / high))
                axes.set_xlim(low / widen, high * widen)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
            axes.set_xlabel(words)
            axes.set_ylabel("particles")
            if edges is RATIO_EDGES and threshold is not None:
                axes.axvline(threshold, color=_LIGHT["second"], linestyle="--", linewidth=1)

    return render(draw, (9.6, 2.9), f"Histograms over {summary.rows} particles: equivalent diameter; Fourier ratio")


def thin(
    time: np.ndarray, numbers: np.ndarray, bins: int = MOST_POINTS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Time, mean, least and most of consecutive bins of a long series, NaN where one is empty; a short one as it is."""
    if len(numbers) <= bins:
        return time, numbers, numbers, numbers
    edges = np.linspace(0, len(numbers), bins + 1).astype(int)
    out = np.full((4, bins), np.nan)
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        good = numbers[a:b][np.isfinite(numbers[a:b])]
        out[0, i] = time[a:b].mean()
        if good.size:
            out[1:, i] = good.mean(), good.min(), good.max()
    return out[0], out[1], out[2], out[3]


def _line(
    axes: Axes,
    time: np.ndarray,
    numbers: np.ndarray,
    colour: object,
    *,
    error: np.ndarray | None = None,
    label: str | None = None,
) -> None:
    when, middle, least, most = thin(time, numbers)
    if error is not None:
        spread = thin(time, error)[1]
        least, most = least - spread, most + spread
    axes.fill_between(when, least, most, color=colour, alpha=0.25, linewidth=0)
    axes.plot(when, middle, color=colour, label=label, marker="o" if len(numbers) <= 80 else "", markersize=2.6)


def _flags(axes: Axes, series: FrameSeries) -> None:
    """A tick below the axis for each frame that was not measured."""
    when = series.time[~series.measured]
    if not len(when):  # a line without points has a boundless box, which breaks the layout
        return
    if len(when) > MOST_POINTS:
        when = when[np.linspace(0, len(when) - 1, MOST_POINTS).astype(int)]
    axes.plot(
        when, np.zeros(len(when)), linestyle="", marker="|", markersize=9, markeredgewidth=1.6, color=_LIGHT["flag"],
        transform=axes.get_xaxis_transform(), clip_on=False, zorder=5,
    )  # fmt: skip


def _path(figure: Figure, axes: Axes, series: FrameSeries) -> None:
    time, y, *_ = thin(series.time, series.drift[:, 0])
    x = thin(series.time, series.drift[:, 1])[1]
    points = np.stack([x, y], axis=1)
    segments = np.stack([points[:-1], points[1:]], axis=1)
    lines = LineCollection(list(segments), cmap="viridis", linewidths=1.6)
    lines.set_array((time[:-1] + time[1:]) / 2)
    lines.set_clim(*((time[0], time[-1]) if len(time) > 1 else (0, 1)))
    axes.add_collection(lines)
    if len(x):
        axes.plot(x[:1], y[:1], marker="o", color=_LIGHT["ink"], markersize=5, linestyle="")
        axes.annotate("start", (x[0], y[0]), xytext=(6, 5), textcoords="offset points", fontsize=8.5)
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.12)
    axes.autoscale_view()
    axes.invert_yaxis()
    axes.set_xlabel("drift x (across) / Å")
    axes.set_ylabel("drift y (down) / Å")
    if len(time) > 1:
        figure.colorbar(lines, ax=axes, label="time / s", shrink=0.75, pad=0.02).outline.set_visible(False)
