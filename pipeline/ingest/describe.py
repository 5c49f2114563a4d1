"""What a movie is, decided once and before any pixel is read: shape, calibration, times, which frames are whole."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.ingest import calibration
from pipeline.ingest.calibration import Findings, SourceOverrides
from pipeline.ingest.facts import Clock, Facts
from pipeline.ingest.formats_tvips import check_parts
from pipeline.ingest.readers import STACK, inspect
from pipeline.ingest.sources import MovieFiles
from schemas.errors import SourceError

__all__ = ["Description", "SourceOverrides", "describe"]

KEEP_GOOD = "To keep the good frames and flag the others use --on-error quarantine"


@dataclass(frozen=True)
class Description:
    """One movie as it will be ingested.

    shape is (time, y, x) or (time, defocus, y, x); sampling [Å/px], time [s] from the first frame, defocus [Å]
    (positive is underfocus), energy [keV], dose [e-/Å² per frame]. files holds, per file, path, size, mtime_ns, frames,
    and what the reader needs (layout, bad). good_frames has one flag per time point: where it is False, the frame is
    read as zeros and must be flagged.
    """

    name: str
    paths: tuple[Path, ...]
    reader: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    sampling: float
    time: tuple[float, ...]
    files: tuple[dict[str, Any], ...]
    good_frames: tuple[bool, ...]
    dataset: str | None = None
    defocus: tuple[float, ...] | None = None
    energy: float | None = None
    counts_per_electron: float | None = None
    detector: str | None = None
    dose: float | None = None
    vendor: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A tree that JSON can hold."""
        tree = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        tree["paths"] = [str(path) for path in self.paths]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in tree.items()}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Description:
        """The inverse of to_dict, also after JSON."""
        tree = {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}
        return cls(**{**tree, "paths": tuple(Path(path) for path in tree["paths"])})


@dataclass
class _Member:
    path: Path
    facts: Facts | None  # None: damaged beyond description
    problem: str = ""


def describe(files: MovieFiles, overrides: SourceOverrides) -> Description:
    """Shape, calibration and times of a movie; raises SourceError with every problem of it and the settings that help.

    With on_error="quarantine" damaged frames are marked in good_frames instead; a movie without a good frame, members
    of another shape, and missing calibration stay errors.
    """
    findings = Findings()
    calibration.check_overrides(overrides, findings)
    findings.stop_on_problems("settings")
    if files.reader == STACK:
        raise SourceError(f"{files.paths[0]}: is already a stack of Colonnade; it needs no description.")
    if files.reader == "tvips":
        check_parts(files.paths)
    members = _members(files, overrides)
    first = _agreeing(members)
    good = _good_planes(members, first, overrides, findings)
    leading, defocus = _series(members, first, overrides, findings)
    sampling = calibration.sampling(first.spacing, overrides.sampling, findings)
    if overrides.sampling is None:
        _same_sampling(members, sampling, findings)
    per_time = math.prod(leading[1:])
    times = _times(members, first, leading, overrides.frame_interval, findings)
    findings.stop_on_problems(_place(files))
    return Description(
        name=files.name,
        paths=files.paths,
        reader=files.reader,
        dataset=overrides.dataset,
        shape=(*leading, *first.plane),
        dtype=first.dtype,
        axes=("time", "defocus", "y", "x") if len(leading) == 2 else ("time", "y", "x"),
        sampling=sampling,
        time=tuple(float(value) for value in times),
        defocus=defocus,
        energy=_override("energy", first.energy, overrides.energy, findings),
        counts_per_electron=_override(
            "counts_per_electron", first.counts_per_electron, overrides.counts_per_electron, findings
        ),
        detector=first.detector,
        dose=first.dose,
        vendor=first.vendor,
        files=tuple(_file(member) for member in members),
        good_frames=tuple(np.all(good.reshape(leading[0], per_time), axis=1, keepdims=True)[:, 0].tolist()),
        notes=(*first.notes, *findings.notes),
    )


def _members(files: MovieFiles, overrides: SourceOverrides) -> list[_Member]:
    members = []
    for path in files.paths:
        try:
            members.append(_Member(path, inspect(path, files.reader, overrides.dataset)))
        except SourceError as error:
            if len(files.paths) == 1 or overrides.on_error == "stop":
                more = f" {KEEP_GOOD}." if len(files.paths) > 1 else ""
                raise SourceError(f"{error}{more}") from error
            members.append(_Member(path, None, str(error)))
    return members


def _agreeing(members: list[_Member]) -> Facts:
    """The facts of the first readable member, once all have the same frame shape and dtype."""
    known = [(member.path, member.facts) for member in members if member.facts is not None]
    if not known:
        raise SourceError(f"{members[0].path}: no file of the movie can be read: {members[0].problem}")
    path, first = known[0]
    for other, facts in known[1:]:
        if (facts.plane, facts.dtype) != (first.plane, first.dtype):
            raise SourceError(
                f"{other}: its frames are {_yx(facts)}, those of {path.name} are {_yx(first)}. "
                "Single-frame files of one folder form one movie and must agree; name the files of each movie apart."
            )
    return first


def _yx(facts: Facts) -> str:
    return f"{facts.plane[0]} × {facts.plane[1]} px {facts.dtype}"


def _good_planes(members: list[_Member], first: Facts, overrides: SourceOverrides, findings: Findings) -> np.ndarray:
    """One flag per plane of the movie; damage is an error, or a note where it is to be quarantined."""
    flags = []
    for member in members:
        facts = member.facts
        flag = np.ones(facts.planes if facts is not None else first.planes, bool)
        if facts is None:
            flag[:] = False
            findings.notes.append(f"quarantined: {member.problem}")
        else:
            flag[list(facts.bad)] = False
            if facts.bad or facts.damage:
                _judge(member.path, facts, flag, overrides, findings)
        flags.append(flag)
    good = np.concatenate(flags)
    if not good.any():
        why = next((m.problem or (m.facts.damage if m.facts else "") for m in members), "")
        raise SourceError(f"{members[0].path}: holds no complete frame ({why or 'it is empty'}).")
    return good


def _judge(path: Path, facts: Facts, flag: np.ndarray, overrides: SourceOverrides, findings: Findings) -> None:
    whole = int(flag.argmin()) if not flag.all() else len(flag)
    last = f"the last good frame is {whole - 1}" if whole else "no frame is complete"
    what = f"truncated or corrupt, {last} ({flag.sum()} of {len(flag)} frames are good): {facts.damage}"
    if overrides.on_error == "stop":
        raise SourceError(f"{path}: {what}. {KEEP_GOOD}, or copy the file again.")
    findings.notes.append(f"quarantined: {path}: {what}")


def _series(
    members: list[_Member], first: Facts, overrides: SourceOverrides, findings: Findings
) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    """The axes before (y, x), and the defoci [Å] of a focal series."""
    planes = sum(member.facts.planes if member.facts else first.planes for member in members)
    given = tuple(float(value) for value in overrides.defocus) if overrides.defocus else None
    if len(first.leading) == 2:
        size = first.leading[1]
        defocus = given or first.defocus
        if defocus is None or len(defocus) != size:
            has = "none is known" if defocus is None else f"{len(defocus)} are given"
            findings.problems.append(
                f"has {first.leading[0]} × {size} frames: the second axis needs {size} defoci, {has}. "
                f"Set source.defocus to {size} values in Å (positive is underfocus)."
            )
            return (planes // size, size), None
        return (planes // size, size), defocus
    if given is None:
        return (planes,), None
    if planes % len(given):
        findings.problems.append(
            f"has {planes} frames, which do not divide into focal series of {len(given)}. "
            f"source.defocus holds {len(given)} values; expected a number that divides {planes}."
        )
        return (planes,), None
    findings.notes.append(f"focal series: every {len(given)} consecutive frames form one time point (source.defocus)")
    return (planes // len(given), len(given)), given


def _times(
    members: list[_Member], first: Facts, leading: tuple[int, ...], interval: float | None, findings: Findings
) -> np.ndarray:
    """Seconds of each time point: of its first frame where several frames form one."""
    if leading[0] <= 1:
        return np.zeros(leading[0])
    recorded = sum(member.facts.leading[0] if member.facts else first.leading[0] for member in members)
    step = max(recorded // leading[0], 1)
    clock = first.clock
    if len(members) > 1 or (clock is not None and clock.stamps is not None):
        clock = _joint_clock(members, findings)
    values = calibration.times(clock, recorded, interval, findings, hint=first.hint)
    return values[::step][: leading[0]]


def _joint_clock(members: list[_Member], findings: Findings) -> Clock | None:
    """Time stamps through all files of a movie where each has its own; those of damaged frames are interpolated."""
    stamps: list[float] = []
    where = ""
    for member in members:
        facts = member.facts
        if facts is None:
            stamps.append(math.nan)
        elif facts.clock is not None and facts.clock.stamps is not None:
            lost = facts.leading[0] - len(facts.clock.stamps) if facts.bad else 0
            stamps += [*facts.clock.stamps, *[math.nan] * lost]
            where = where or facts.clock.where
            unit = facts.clock.unit
        elif facts.planes == 1 and facts.origin is not None:
            stamps.append(facts.origin)
            where, unit = where or "the acquisition times of the files", "s"
        else:
            return None
    if not where:
        return None
    filled, gaps = calibration.fill_gaps(stamps)
    if gaps:
        findings.notes.append(f"frame times: those of {gaps} damaged frames are interpolated")
    return Clock(where, unit, stamps=filled)


def _same_sampling(members: list[_Member], expected: float, findings: Findings) -> None:
    for member in members[1:]:
        if member.facts is None or not math.isfinite(expected):
            continue
        value = calibration.sampling(member.facts.spacing, None, Findings())
        if not abs(value - expected) <= calibration.SQUARE_TOLERANCE * expected:
            findings.problems.append(
                f"{member.path.name} has {value:.6g} Å/px, the first file {expected:.6g}. {calibration.SET_SAMPLING}."
            )
            return


def _override(name: str, value: float | None, given: float | None, findings: Findings) -> float | None:
    if given is None:
        return value
    was = "missing" if value is None else f"{value:.6g}"
    findings.notes.append(f"{name}: {was} in the file -> source.{name} = {given:.6g}")
    return float(given)


def _file(member: _Member) -> dict[str, Any]:
    stat = member.path.stat()
    facts = member.facts
    return {
        "path": str(member.path),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "frames": facts.planes if facts else 1,
        "layout": facts.layout if facts else {},
        "bad": list(facts.bad) if facts else [0],
    }


def _place(files: MovieFiles) -> str:
    if len(files.paths) == 1:
        return str(files.paths[0])
    return f"{files.paths[0]} … {files.paths[-1].name} ({len(files.paths)} files)"
