"""The files of one movie together: do they agree, which of their frames are whole, when was each taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.ingest import calibration
from pipeline.ingest.calibration import Findings, SourceOverrides
from pipeline.ingest.facts import MAX_SIDE, Clock, Facts
from pipeline.ingest.readers import inspect
from schemas.errors import SourceError

KEEP_GOOD = "To keep the good frames and flag the others use --on-error quarantine"


@dataclass(frozen=True)
class Member:
    """A file and its facts, or why there are none."""

    path: Path
    facts: Facts | None  # None: damaged beyond description
    problem: str = ""


def load_members(paths: Sequence[Path], reader: str, overrides: SourceOverrides) -> list[Member]:
    """Each file with what its reader finds; damage beyond description is an error, or kept with its reason."""
    members = []
    for path in paths:
        try:
            members.append(Member(path, inspect(path, reader, overrides.dataset)))
        except SourceError as error:
            if len(paths) == 1 or overrides.on_error == "stop":
                more = f" {KEEP_GOOD}." if len(paths) > 1 else ""
                raise SourceError(f"{error}{more}") from error
            members.append(Member(path, None, str(error)))
    return members


def agreeing(members: list[Member]) -> Facts:
    """The facts of the first readable member, once all have the same frame shape and dtype."""
    known = [(member.path, member.facts) for member in members if member.facts is not None]
    if not known:
        raise SourceError(f"{members[0].path}: no file of the movie can be read: {members[0].problem}")
    path, first = known[0]
    if max(first.plane) > MAX_SIDE:
        raise SourceError(f"{path}: is damaged: it says that its frames have {first.plane[0]} × {first.plane[1]} px.")
    for other, facts in known[1:]:
        if (facts.plane, facts.dtype) != (first.plane, first.dtype):
            raise SourceError(
                f"{other}: its frames are {_yx(facts)}, those of {path.name} are {_yx(first)}. "
                "Single-frame files of one folder form one movie and must agree; name the files of each movie apart."
            )
    return first


def _yx(facts: Facts) -> str:
    return f"{facts.plane[0]} × {facts.plane[1]} px {facts.dtype}"


def good_planes(members: list[Member], first: Facts, overrides: SourceOverrides, findings: Findings) -> np.ndarray:
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


def joint_clock(members: list[Member], findings: Findings) -> Clock | None:
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


def same_sampling(members: list[Member], expected: float, findings: Findings) -> None:
    """A pixel size that changes between the files is a problem."""
    for member in members[1:]:
        if member.facts is None or not math.isfinite(expected):
            continue
        value = calibration.sampling(member.facts.spacing, None, Findings())
        if not abs(value - expected) <= calibration.SQUARE_TOLERANCE * expected:
            findings.problems.append(
                f"{member.path.name} has {value:.6g} Å/px, the first file {expected:.6g}. {calibration.SET_SAMPLING}."
            )
            return


def file_entry(member: Member) -> dict[str, Any]:
    """What reading needs to know about a file, as JSON."""
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
