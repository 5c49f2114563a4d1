"""The parts of a report that are words and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.results.history import History, frames_text
from pipeline.results.markup import Markup, details, element, join, nested, number_text, table
from pipeline.results.status import duration
from pipeline.results.summary import ColumnSummary, FrameSeries, ParticleSummary, flagged, statistics
from schemas.conventions import STATUS_MEANING
from schemas.settings import Settings

_ROWS_SHOWN = 100
_LEAST_SHARE = 0.005


def tiles(*facts: tuple[str, float | str | None, str | None]) -> Markup:
    """Large numbers side by side: (name, value, smaller words below)."""
    drawn = []
    for name, value, below in facts:
        text = value if isinstance(value, str) else number_text(value)
        small = element("small", below) if below else None
        drawn.append(element("div", element("dt", name), element("dd", text, small)))
    return element("dl", *drawn, class_="tiles")


def banners(made: Mapping[str, Any], history: History, series: FrameSeries | None) -> Markup | None:
    """What the reader must know before any number: unfinished, quarantined, failed."""
    words: list[object] = []
    if history.state == "quarantined":
        words.append(f"This movie is quarantined: {history.reason}")
    elif made.get("state") != "complete":
        done = f" {int(series.measured.sum()):,} of {len(series.time):,} frames are measured." if series else ""
        words.append(f"This run is not finished (state: {made.get('state', 'unknown')}).{done}")
    words += [f"The last attempt stopped in {step}: {reason}" for step, reason in history.stops]
    if failed := history.problems():
        words.append(f"{len(failed)} block{'' if len(failed) == 1 else 's'} failed; see Failures below.")
    if not words:
        return None
    return element("div", element("ul", *(element("li", word) for word in words)), class_="banner", role="note")


def notes(made: Mapping[str, Any]) -> Markup | None:
    """What the run itself says that its reader should know."""
    words = [str(note) for note in made.get("notes") or ()]
    return element("ul", *(element("li", word) for word in words), class_="notes") if words else None


def headline(
    made: Mapping[str, Any],
    history: History,
    series: FrameSeries,
    summary: ColumnSummary,
    particles: ParticleSummary,
) -> Markup:
    """The numbers one looks for first."""
    spread = {row.name: row for row in statistics(series)}
    measured, total = int(series.measured.sum()), len(series.time)
    counts, drift, dose = spread["columns"], spread["drift since the first frame"], spread["dose"]
    dosed = math.isfinite(dose.median)
    error = summary.median_error()
    rate = _speed(history, measured)
    facts: list[tuple[str, float | str | None, str | None]] = [
        ("frames", measured, f"measured, of {total:,}"),
        (
            "columns found",
            summary.rows,
            f"{_range(counts.least, counts.most)} per frame, median {number_text(counts.median)}",
        ),
        *_evidence_facts(summary),
        *_particle_facts(series, particles),
        ("position error", _unit(error, "Å"), "median standard error of a coordinate"),
        ("drift", _unit(drift.most, "Å"), "farthest from the first frame"),
        ("signal-to-noise", spread["signal-to-noise ratio"].median, "median over frames, denoised"),
        (
            "dose",
            _unit(dose.median, "e⁻/Å²") if dosed else "–",
            _dose_words(series) if dosed else "counts are uncalibrated",
        ),
    ]
    if rate is not None:
        facts.append(("frames per second", rate, f"{duration(history.span() or 0)} from first to last block"))
    return tiles(*facts)


def _evidence_facts(summary: ColumnSummary) -> list[tuple[str, float | str | None, str | None]]:
    """The tile that says how many columns the counts bear out."""
    if summary.supported is None or not summary.rows:
        return []
    share = f"{100 * summary.supported / summary.rows:.1f} %"
    return [("supported", share, "of the columns, by the counts at their places")]


def _particle_facts(
    series: FrameSeries, particles: ParticleSummary
) -> list[tuple[str, float | str | None, str | None]]:
    """Tiles of particles, missing atoms and frames that can be interpreted, as far as anything is known of them."""
    spread = {row.name: row for row in statistics(series)}
    facts: list[tuple[str, float | str | None, str | None]] = []
    if particles.rows:
        counts = spread["particles"]
        facts.append(("particles found", particles.rows, f"{_range(counts.least, counts.most)} per frame"))
    missing = spread["missing atoms"]
    if math.isfinite(missing.median):
        words = f"per frame (median), {_range(missing.least, missing.most)}"
        facts.append(("missing atoms", missing.median, words))
    if math.isfinite(spread["Fourier ratio"].median):
        share = float(np.nanmean(series.interpretable))
        facts.append(("interpretable", f"{100 * share:.0f} %", "of the measured frames, by the lattice"))
    return facts


def numbers(series: FrameSeries) -> Markup:
    """Spread of the per-frame numbers over the movie."""
    rows = [(s.name, s.units, s.least, s.median, s.mean, s.most) for s in statistics(series) if math.isfinite(s.median)]
    species = {name: int(np.nansum(counts)) for name, counts in series.species.items()}
    total = max(sum(species.values()), 1)
    shares = [(name, count, f"{100 * count / total:.1f} %") for name, count in species.items() if count]
    return join(
        [
            table(("per frame", "units", "least", "median", "mean", "most"), rows),
            element("h3", "Species") if shares else None,
            table(("species", "columns", "share"), shares) if shares else None,
        ]
    )


def flags(series: FrameSeries) -> Markup:
    """Frames that were not measured, and why."""
    found = flagged(series)
    if not found:
        return element("p", f"None: all {len(series.time):,} frames were measured.")
    rows = [
        (frames_text(start, stop), stop - start, status.replace("_", " "), reason or STATUS_MEANING.get(status, ""))
        for start, stop, status, reason in found[:_ROWS_SHOWN]
    ]
    more = element("p", f"… and {len(found) - _ROWS_SHOWN:,} more groups.") if len(found) > _ROWS_SHOWN else None
    return join([table(("frames", "number", "status", "reason"), rows), more])


def failures(history: History) -> Markup:
    """Blocks that failed or were quarantined, and why."""
    found = history.problems()
    lines: list[Markup | None] = []
    if history.state == "quarantined":
        lines.append(element("p", f"The movie is quarantined: {history.reason}"))
    lines += [element("p", f"The last attempt stopped in {step}: {reason}") for step, reason in history.stops]
    rows = [
        (r.step, frames_text(r.start, r.stop), r.status, r.reason, " ".join(filter(None, (r.worker, r.device))))
        for r in found[-_ROWS_SHOWN:]
    ]
    if rows:
        lines.append(table(("step", "frames", "status", "reason", "where"), rows))
    if len(found) > _ROWS_SHOWN:
        lines.append(element("p", f"The last {_ROWS_SHOWN} of {len(found):,} are shown."))
    if history.unreadable:
        lines.append(element("p", f"{history.unreadable:,} lines of the ledger could not be read."))
    if not lines:
        known = "No block failed." if history.attempts else "There is no ledger beside this run, so nothing is known."
        lines.append(element("p", known))
    return join(lines)


def timing(history: History, series: FrameSeries | None) -> Markup:
    """How long what took, summed over the workers, and how fast the whole was."""
    spent = history.seconds()
    total = sum(spent.values())
    if not total:
        return element("p", "There is no ledger beside this run, so it is not known how long what took.")
    shown = {key: seconds for key, seconds in spent.items() if seconds >= _LEAST_SHARE * total}
    rows = [(step, part, duration(s), f"{100 * s / total:.1f} %", _bar(s / total)) for (step, part), s in shown.items()]
    if (rest := total - sum(shown.values())) > 0:
        rows.append(("all else", "", duration(rest), f"{100 * rest / total:.1f} %", _bar(rest / total)))
    measured = int(series.measured.sum()) if series is not None else 0
    span = history.span() or math.nan
    words = f"{duration(total)} of work in all, {duration(span)} from the first block to the last"
    rate = _speed(history, measured)
    words += f": {number_text(rate)} frames/s, pauses included." if rate is not None else "."
    return join([element("p", words), table(("step", "part", "time", "share", ""), rows)])


def sources(made: Mapping[str, Any]) -> Markup:
    """Files that the movie was read from, and the hash of what was in them."""
    listed = [source for source in made.get("sources") or () if isinstance(source, Mapping)]
    hashed = any(source.get("hash") for source in listed)
    rows = [
        (element("code", s.get("path", "")), s.get("frames"), _megabytes(s.get("size")))
        + ((element("code", s.get("hash", "")),) if hashed else ())
        for s in listed[:_ROWS_SHOWN]
    ]
    more = element("p", f"… and {len(listed) - _ROWS_SHOWN:,} more files.") if len(listed) > _ROWS_SHOWN else None
    facts = [
        f"{name} {made[key]:.6g} {units}"
        for key, name, units in (("sampling", "sampling", "Å/px"), ("energy", "energy", "keV"))
        if isinstance(made.get(key), int | float)
    ]
    calibration = element("p", "; ".join(facts)) if facts else None
    content = made.get("content_hash")
    whole = element("p", "Content of all counts: ", element("code", content)) if content else None
    head = ("file", "frames", "MB", *(("hash",) if hashed else ()))
    files = table(head, rows) if rows else element("p", "No files are recorded.")
    return join([element("h3", "Sources"), calibration, files, more, whole])


def settings(made: Mapping[str, Any]) -> Markup:
    """The resolved settings, those that differ from the default told apart."""
    given = made.get("settings")
    if not isinstance(given, Mapping) or not given:
        return element("p", "No settings are recorded.")
    resolved, usual = _flat(given), _flat(Settings().model_dump(mode="json"))
    changed = {name: value for name, value in resolved.items() if name not in usual or usual[name] != value}
    rows = [
        (element("code", n), element("code", _text(v)), element("code", _text(usual.get(n))))
        for n, v in changed.items()
    ]
    differing = table(("setting", "value", "default"), rows) if rows else element("p", "All are at their defaults.")
    everything = details("All settings", nested(given))
    return join([element("h3", "Settings that differ from their defaults"), differing, everything])


def origins(made: Mapping[str, Any], series: FrameSeries | None) -> Markup:
    """Versions, models, what was prepared, and devices."""
    parts: list[Markup] = []
    for name, title in (
        ("models", "Models"),
        ("versions", "Versions"),
        ("prepare", "Prepared for the movie"),
        ("plan", "Plan"),
    ):
        value = made.get(name)
        if isinstance(value, Mapping) and value:
            parts.append(details(title, nested(value), open_=name in ("models", "versions")))
    if series is not None:
        if series.devices:
            rows = [(name or "(not recorded)", count) for name, count in series.devices.items()]
            parts.append(table(("computed on", "frames"), rows))
        if series.denoisers:
            rows = [(name or "(none)", count) for name, count in series.denoisers.items()]
            parts.append(table(("denoised with", "frames"), rows))
    return join(parts)


def _speed(history: History, measured: int) -> float | None:
    span = history.span()
    return measured / span if span and measured else None


def _dose_words(series: FrameSeries) -> str:
    return f"per frame (median); {number_text(float(np.nansum(series.dose)))} over the movie"


def _range(least: float, most: float) -> str:
    return number_text(least) if least == most else f"{number_text(least)}–{number_text(most)}"


def _unit(value: float, units: str) -> str:
    return f"{number_text(value)} {units}" if math.isfinite(value) else "–"


def _bar(share: float) -> Markup:
    inner = element("span", style=f"width:{100 * share:.1f}%")
    return element("span", inner, class_="share", aria_hidden="true")


def _megabytes(size: object) -> float | None:
    return size / 1e6 if isinstance(size, int | float) else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "(none)"
    return "(not set)" if value is None else str(value)
