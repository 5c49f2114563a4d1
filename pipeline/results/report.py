"""The report of a run: one HTML page that needs nothing but itself, to look at in the morning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import xarray as xr

from pipeline.results import sections
from pipeline.results.examples import Example, examples
from pipeline.results.figures import drift_figure, histogram_figure, lattice_figure, particle_figure, series_figure
from pipeline.results.history import History, movies_of, read_history
from pipeline.results.markup import Markup, element, join, number_text, page, table
from pipeline.results.montage import colours_of, example_figure
from pipeline.results.open import find_runs, movie_name, open_run, provenance
from pipeline.results.status import duration
from pipeline.results.summary import (
    ColumnSummary,
    FrameSeries,
    ParticleSummary,
    column_summary,
    frame_series,
    particle_summary,
)
from schemas.errors import SchemaError, SettingsError


@dataclass(frozen=True)
class _Row:
    """A movie in the index."""

    movie: str
    page: Path | None
    state: str
    reason: str
    frames: int = 0
    measured: int = 0
    columns: int = 0
    seconds: float = 0.0


def report(path: str | Path, output: str | Path | None = None, *, frames: Sequence[int] | None = None) -> Path:
    """Write the report of a run, or of every run in a folder with an index; gives the page to open first.

    ``output`` is the page to write, by default FOLDER/<movie>.html; for a folder it is the index, by default
    FOLDER/index.html, and the pages of the movies lie beside it. ``frames``: show these, as far as pictures of them are
    kept, else the examples nearest to them. Raises ``SettingsError`` where there is no run or no such frame,
    ``SchemaError`` for a run that cannot be read.
    """
    path = Path(path)
    runs = find_runs(path)
    if path.suffix == ".zarr" or runs == [path]:
        output = Path(output) if output is not None else path.with_suffix(".html")
        _write_run(path, output, frames=frames, index=None)
        return output
    names = movies_of(path)
    if not runs and not names:
        raise SettingsError(f"{path} holds no run; expected FOLDER/<movie>.zarr, or FOLDER, of `colonnade run`")
    output = Path(output) if output is not None else path / "index.html"
    rows = [_indexed(run, output, frames) for run in runs]
    rows += [_without_run(path, name) for name in names if name not in {run.stem for run in runs}]
    _save(output, _index_page(path, sorted(rows, key=lambda row: row.movie)))
    return output


def _indexed(run: Path, index: Path, frames: Sequence[int] | None) -> _Row:
    """Write the page of one run of a folder; one that cannot be read is listed with its reason and stops nothing."""
    target = index.parent / f"{run.stem}.html"
    if target == index:
        target = index.parent / f"{run.stem}.run.html"
    try:
        return _write_run(run, target, frames=frames, index=index)
    except SchemaError as error:
        return _Row(run.stem, None, "unreadable", str(error))


def _without_run(folder: Path, name: str) -> _Row:
    history = read_history(folder, name)
    return _Row(name, None, history.state or "no run yet", history.reason)


def _write_run(path: Path, output: Path, *, frames: Sequence[int] | None, index: Path | None) -> _Row:
    run = open_run(path)
    history = read_history(path.parent, path.stem)
    name = movie_name(run, path)
    series = frame_series(run) if "frames" in run.children else None
    summary = column_summary(run)
    shown = list(examples(run, frames, folder=path.parent)) if series else []
    particles = particle_summary(run)
    _save(output, _run_page(name, run, history, series, summary, particles, shown=shown, index=index))
    state = str(provenance(run).get("state", "unknown"))
    return _Row(
        movie=name,
        page=output,
        state="quarantined" if history.state == "quarantined" else state,
        reason=history.reason,
        frames=len(series.time) if series else 0,
        measured=int(series.measured.sum()) if series else 0,
        columns=summary.rows,
        seconds=history.span() or math.nan,
    )


def _run_page(
    name: str,
    run: xr.DataTree,
    history: History,
    series: FrameSeries | None,
    summary: ColumnSummary,
    particles: ParticleSummary,
    *,
    shown: Sequence[Example],
    index: Path | None,
) -> Markup:
    made = provenance(run)
    link = element("nav", element("a", "← all movies", href=quote(index.name))) if index else None
    body: list[Markup | None] = [
        link,
        element("h1", name),
        _lead(made, series),
        sections.banners(made, history, series),
    ]
    if series is None:
        body.append(element("p", "Nothing has been computed yet."))
    else:
        body += [
            sections.headline(made, history, series, summary, particles),
            sections.notes(made),
            _section("Example frames", *_montage(shown)),
            _section("Columns, signal and dose over time", _caption(series_figure(series), _flag_words(series))),
            _section(
                "Drift",
                _caption(drift_figure(series), "Shaded: one standard error. y points down, as on the detector."),
            ),
            _section(
                "Columns", _caption(histogram_figure(summary), f"Over all {summary.rows:,} columns of the movie.")
            ),
            *_particle_sections(made, series, particles),
            _section("Numbers", sections.numbers(series)),
            _section("Frames that were not measured", sections.flags(series)),
        ]
    body += [
        _section("Failures", sections.failures(history)),
        _section("Time", sections.timing(history, series)),
        _section("Provenance", sections.sources(made), sections.settings(made), sections.origins(made, series)),
        _footer(),
    ]
    return page(f"{name} – Colonnade", _style(), *body)


def _particle_sections(made: Mapping[str, Any], series: FrameSeries, particles: ParticleSummary) -> list[Markup | None]:
    """Particles, species' vacancies and the lattice, as far as the run has any."""
    threshold = made.get("settings", {}).get("fourier", {}).get("threshold")
    over_time = lattice_figure(series, threshold)
    words = "Fourier ratio: brightest to dimmest pair of lattice peaks; interpretable up to the dashed line."
    return [
        _section("Particles and lattice over time", _caption(over_time, words)) if over_time else None,
        _section(
            "Particles",
            _caption(particle_figure(particles, threshold), f"Over all {particles.rows:,} particles, frame by frame."),
        )
        if particles.rows
        else None,
    ]


def _lead(made: Mapping[str, Any], series: FrameSeries | None) -> Markup:
    words = [f"State: {made.get('state', 'unknown')}."]
    if series is not None and len(series.time):
        count, last = len(series.time), float(series.time[-1])
        words.insert(
            0, f"{count:,} frame{'' if count == 1 else 's'}" + (f" over {number_text(last)} s." if count > 1 else ".")
        )
    return element("p", " ".join(words), class_="lead")


def _montage(shown: Sequence[Example]) -> list[Markup]:
    colours = colours_of(shown)
    drawn = [example_figure(example, magnified=i == 0, colours=colours) for i, example in enumerate(shown)]
    if not drawn:
        return [element("p", "The run holds no example frames.", class_="note")]
    words = (
        "The frame as measured, denoised, and with the columns that were found; each picture has its own grey scale. "
        "Before the last, what the denoiser took away, in units of the noise that the detector's model predicts, from "
        "−4 (black) to 4: structure in it is signal that was lost. The blue square is magnified below it: crosses are "
        "positions, ellipses three standard errors."
    )
    if any(example.labels.any() for example in shown):
        words += (
            " Particles are coloured by their Fourier ratio, from yellow (peaks of one brightness) to violet "
            "(unequal); white where no lattice is seen."
        )
    keys = [
        element("span", name, class_="species", style=f"border-color: {colour}") for name, colour in colours.items()
    ]
    legend = [element("p", "Species: ", *keys, class_="note")] if keys else []
    return [element("p", words, class_="note"), *legend, *drawn]


def _histograms(summary: ColumnSummary) -> Markup:
    if not summary.rows:
        return element("p", "No column was found.")
    return _caption(histogram_figure(summary), f"Over all {summary.rows:,} columns of the movie.")


def _flag_words(series: FrameSeries) -> str:
    words = (
        "Beyond 1,500 frames: means of consecutive frames, shaded from least to most."
        if len(series.time) > 1500
        else ""
    )
    ticks = "Ticks on the axis mark frames that were not measured." if not series.measured.all() else ""
    return f"{words} {ticks}".strip()


def _caption(figure: Markup, words: str) -> Markup:
    return element("figure", figure, element("figcaption", words) if words else None)


def _section(title: str, *children: Markup | None) -> Markup | None:
    kept = [child for child in children if child is not None]
    return element("section", element("h2", title), *kept) if kept else None


def _index_page(folder: Path, rows: Sequence[_Row]) -> Markup:
    lines = []
    for row in rows:
        name = element("a", row.movie, href=quote(row.page.name)) if row.page else row.movie
        seconds = duration(row.seconds) if math.isfinite(row.seconds) and row.seconds else "–"
        state = row.state if not row.reason else f"{row.state}: {row.reason}"
        lines.append((name, state, row.frames, row.measured, row.columns, seconds))
    done = sum(row.state == "complete" for row in rows)
    tiles = sections.tiles(
        ("movies", len(rows), f"{done} complete"),
        ("frames measured", sum(row.measured for row in rows), f"of {number_text(sum(row.frames for row in rows))}"),
        ("columns found", sum(row.columns for row in rows), None),
    )
    head = ("movie", "state", "frames", "measured", "columns", "time taken")
    body = [element("h1", folder.resolve().name), element("p", "All movies of this folder.", class_="lead"), tiles]
    return page(
        f"{folder.resolve().name} – Colonnade", _style(), *body, _section("Movies", table(head, lines)), _footer()
    )


def _footer() -> Markup:
    return element("footer", f"Written by Colonnade on {datetime.now(UTC):%Y-%m-%d at %H:%M} UTC.")


def _style() -> str:
    return resources.files("pipeline.results").joinpath("report.css").read_text(encoding="utf-8")


def _save(path: Path, content: Markup) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(join([content]), encoding="utf-8", errors="backslashreplace")
    partial.replace(path)
