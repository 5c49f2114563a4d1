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
from pipeline.ingest.facts import Facts
from pipeline.ingest.formats_tvips import check_parts
from pipeline.ingest.members import Member, agreeing, file_entry, good_planes, joint_clock, load_members, same_sampling
from pipeline.ingest.readers import STACK
from pipeline.ingest.sources import MovieFiles
from schemas.errors import SourceError

__all__ = ["Description", "SourceOverrides", "describe"]


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
    members = load_members(files.paths, files.reader, overrides)
    first = agreeing(members)
    good = good_planes(members, first, overrides, findings)
    leading, defocus = _series(members, first, overrides, findings)
    sampling = calibration.sampling(first.spacing, overrides.sampling, findings)
    if overrides.sampling is None:
        same_sampling(members, sampling, findings)
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
        files=tuple(file_entry(member) for member in members),
        good_frames=tuple(np.all(good.reshape(leading[0], per_time), axis=1, keepdims=True)[:, 0].tolist()),
        notes=(*first.notes, *findings.notes),
    )


def _series(
    members: list[Member], first: Facts, overrides: SourceOverrides, findings: Findings
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
    members: list[Member], first: Facts, leading: tuple[int, ...], interval: float | None, findings: Findings
) -> np.ndarray:
    """Seconds of each time point: of its first frame where several frames form one."""
    if leading[0] <= 1:
        return np.zeros(leading[0])
    recorded = sum(member.facts.leading[0] if member.facts else first.leading[0] for member in members)
    step = max(recorded // leading[0], 1)
    clock = first.clock
    if len(members) > 1 or (clock is not None and clock.stamps is not None):
        clock = joint_clock(members, findings)
    values = calibration.times(clock, recorded, interval, findings, hint=first.hint)
    return values[::step][: leading[0]]


def _override(name: str, value: float | None, given: float | None, findings: Findings) -> float | None:
    if given is None:
        return value
    was = "missing" if value is None else f"{value:.6g}"
    findings.notes.append(f"{name}: {was} in the file -> source.{name} = {given:.6g}")
    return float(given)


def _place(files: MovieFiles) -> str:
    if len(files.paths) == 1:
        return str(files.paths[0])
    return f"{files.paths[0]} … {files.paths[-1].name} ({len(files.paths)} files)"
