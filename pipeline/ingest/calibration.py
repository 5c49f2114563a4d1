"""From what a file says about pixel size and time to ångström and seconds, or to an error that says what to set.

A missing calibration never becomes 1 pixel silently: every doubt is a SourceError naming the setting that decides it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.ingest.facts import Clock, Spacing
from schemas.errors import SourceError

LENGTHS = {  # Å per unit, keys lower-case without blanks
    **dict.fromkeys(("å", "a", "ang", "angstrom", "angstroms", "angström", "ångström", "ångstrom"), 1.0),
    **dict.fromkeys(("pm", "p_m", "picometer", "picometre"), 1e-2),
    **dict.fromkeys(("nm", "n_m", "nanometer", "nanometre", "nanometers", "nanometres"), 1e1),
    **dict.fromkeys(("um", "µm", "μm", "u_m", "micron", "microns", "micrometer", "micrometre"), 1e4),
    **dict.fromkeys(("mm", "m_m", "millimeter", "millimetre"), 1e7),
    **dict.fromkeys(("m", "_m", "meter", "metre", "meters", "metres"), 1e10),
}
TIMES = {  # s per unit
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds", "_s"), 1.0),
    **dict.fromkeys(("ms", "msec", "m_s", "millisecond", "milliseconds"), 1e-3),
    **dict.fromkeys(("us", "µs", "μs", "u_s", "microsecond", "microseconds"), 1e-6),
    **dict.fromkeys(("ns", "n_s", "nanosecond", "nanoseconds"), 1e-9),
    **dict.fromkeys(("min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3600.0),
}
# Two pixel sizes that differ by less are one: 0.1 % is 4 px over 4096 px, ten times below what a magnification is
# calibrated to (about 1 %), and a hundred times above the rounding of the rational and float32 numbers in files.
SQUARE_TOLERANCE = 1e-3
SMALLEST, LARGEST = 1e-3, 1e3  # [Å/px] outside of this a "pixel size" is the pitch of the camera, or no length at all

SET_SAMPLING = "Set source.sampling to the Å per pixel, for example --set source.sampling=0.17"
SET_INTERVAL = "Set source.frame_interval to the seconds between frames, for example --set source.frame_interval=0.4"


@dataclass(frozen=True)
class SourceOverrides:
    """What the job says instead of, or in place of, what the file says.

    sampling [Å/px], frame_interval [s] between successive frames as recorded, energy [keV], defocus [Å] (one value per
    image of a focal series, positive is underfocus; that many consecutive frames form one time point).
    """

    sampling: float | None = None
    frame_interval: float | None = None
    energy: float | None = None
    counts_per_electron: float | None = None
    defocus: list[float] | None = None
    dataset: str | None = None
    on_error: str = "stop"


@dataclass
class Findings:
    """Problems of one source, so that all are told at once, and notes on decisions taken."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def stop_on_problems(self, source: Path | str) -> None:
        """Raise one SourceError with every problem."""
        if len(self.problems) == 1:
            raise SourceError(f"{source}: {self.problems[0]}")
        if self.problems:
            raise SourceError(f"{source}:" + "".join(f"\n  - {problem}" for problem in self.problems))


def check_overrides(overrides: SourceOverrides, findings: Findings) -> None:
    """Every supplied number must be positive and finite, every defocus finite."""
    for name in ("sampling", "frame_interval", "energy", "counts_per_electron"):
        value = getattr(overrides, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            findings.problems.append(f"source.{name} is {value}; expected a positive number.")
    if overrides.on_error not in ("stop", "quarantine"):
        findings.problems.append(f"on_error is {overrides.on_error!r}; expected 'stop' or 'quarantine'.")
    if overrides.defocus is not None and not all(math.isfinite(value) for value in overrides.defocus):
        findings.problems.append(f"source.defocus is {overrides.defocus}; expected finite numbers in Å.")


def sampling(spacing: Spacing | None, override: float | None, findings: Findings) -> float:
    """The size of a pixel [Å]; problems go to `findings` and the result is then NaN."""
    value, problem = _file_sampling(spacing)
    if override is not None:
        if spacing is None:
            was = "missing"
        elif problem:
            was = f"unusable ({problem})"
        else:
            was = f"{value:.6g} Å/px ({spacing.where})"
        findings.notes.append(f"sampling: {was} in the file -> source.sampling = {override:.6g} Å/px")
        return float(override)
    if problem:
        findings.problems.append(f"{problem}. {SET_SAMPLING}.")
    return value


def _file_sampling(spacing: Spacing | None) -> tuple[float, str]:
    if spacing is None:
        return math.nan, "the file holds no pixel size"
    shown = f"{_shown(spacing.y, spacing.y_unit)} (y) × {_shown(spacing.x, spacing.x_unit)} (x)"
    if spacing.y == spacing.x and spacing.y_unit == spacing.x_unit:
        shown = _shown(spacing.x, spacing.x_unit)
    shown = f"{shown} in {spacing.where}"
    for value, unit in ((spacing.y, spacing.y_unit), (spacing.x, spacing.x_unit)):
        if not math.isfinite(value) or value <= 0:
            return math.nan, f"the pixel size is {shown}: expected a positive length"
        if _is_reciprocal(unit):
            return math.nan, f"the pixel size is {shown}: a reciprocal unit (a diffraction pattern?), expected a length"
        if _key(unit) not in LENGTHS:
            what = "has no unit" if not unit.strip() else f"has the unknown unit {unit!r}"
            return math.nan, f"the pixel size {what}: {shown}; expected nm, Å, pm, µm, mm or m"
    y, x = spacing.y * LENGTHS[_key(spacing.y_unit)], spacing.x * LENGTHS[_key(spacing.x_unit)]
    if abs(y - x) > SQUARE_TOLERANCE * max(y, x):
        return math.nan, f"the pixels are not square: {shown}, that is {y:.6g} Å × {x:.6g} Å"
    value = x if y == x else (y + x) / 2
    if not SMALLEST <= value <= LARGEST:
        return math.nan, f"the pixel size {shown} is {value:.4g} Å, not that of a micrograph ({SMALLEST}–{LARGEST:g} Å)"
    return value, ""


def times(
    clock: Clock | None, frames: int, override: float | None, findings: Findings, *, hint: str = ""
) -> np.ndarray:
    """Seconds from the first frame, (frames,); problems go to `findings` and the result is then all NaN."""
    values, problem = _file_times(clock, frames)
    if override is not None:
        was = "missing" if clock is None else f"unusable ({problem})" if problem else _summary(values, clock)
        findings.notes.append(f"frame times: {was} in the file -> source.frame_interval = {override:.6g} s")
        return np.arange(frames) * float(override)
    if frames == 1:  # one picture needs no clock
        return np.zeros(1)
    if problem:
        findings.problems.append(f"{problem}{f' ({hint})' if hint else ''}. {SET_INTERVAL}.")
    return values


def _file_times(clock: Clock | None, frames: int) -> tuple[np.ndarray, str]:
    nothing = np.full(frames, math.nan)
    if clock is None:
        return nothing, f"the file holds no frame times for its {frames} frames"
    scale = TIMES.get(_key(clock.unit))
    if clock.stamps is not None and scale is not None:
        stamps = np.asarray(clock.stamps, np.float64)
        if len(stamps) != frames or not np.isfinite(stamps).all():
            return nothing, f"{clock.where} holds {len(stamps)} usable time stamps for {frames} frames"
        late = np.flatnonzero(np.diff(stamps) <= 0)
        if len(late):
            i = int(late[0])
            shown = f"{stamps[i]:.10g} {clock.unit} then {stamps[i + 1]:.10g} {clock.unit}"
            return nothing, f"the time stamps in {clock.where} do not increase: frames {i} and {i + 1} have {shown}"
        return (stamps - stamps[0]) * scale, ""
    interval = math.nan if clock.interval is None else clock.interval
    shown = f"{_shown(interval, clock.unit)} in {clock.where}"
    if scale is None:
        what = "has no unit" if not clock.unit.strip() else f"has the unknown unit {clock.unit!r}"
        return nothing, f"the frame interval {what}: {shown}; expected s, ms, µs or min"
    if not math.isfinite(interval) or interval <= 0:
        return nothing, f"the frame interval is {shown}: expected a positive time"
    return np.arange(frames) * (interval * scale), ""


def fill_gaps(stamps: list[float]) -> tuple[tuple[float, ...], int]:
    """Time stamps with the unknown ones (NaN) interpolated or continued at the mean interval, and their number."""
    values = np.asarray(stamps, np.float64)
    known = np.flatnonzero(np.isfinite(values))
    gaps = len(values) - len(known)
    if gaps == 0 or len(known) < 2:
        return tuple(stamps), gaps
    index = np.arange(len(values))
    filled = np.interp(index, known, values[known])
    first, last = known[0], known[-1]
    step = (values[last] - values[first]) / (last - first)
    filled[:first] = values[first] + step * (index[:first] - first)
    filled[last + 1 :] = values[last] + step * (index[last + 1 :] - last)
    return tuple(filled.tolist()), gaps


def _summary(values: np.ndarray, clock: Clock) -> str:
    mean = values[-1] / max(len(values) - 1, 1)
    return f"{mean:.6g} s between frames ({clock.where})"


def is_time(unit: str) -> bool:
    """Whether a unit is one of time."""
    return _key(unit) in TIMES


def is_length(unit: str) -> bool:
    """Whether a unit is one of length."""
    return _key(unit) in LENGTHS


def to_angstrom(value: float, unit: str) -> float:
    """A length in Å; the unit must be one of LENGTHS."""
    return value * LENGTHS[_key(unit)]


def _key(unit: str) -> str:
    return "".join(unit.split()).lower()


def _is_reciprocal(unit: str) -> bool:
    key = _key(unit).replace("−", "-").replace("⁻¹", "-1").replace("**", "^")
    base = key[2:] if key.startswith("1/") else key.removesuffix("-1").removesuffix("^")
    return base != key and base in LENGTHS


def _shown(value: float, unit: str) -> str:
    return f"{value:.6g} {unit.strip()}".strip()
