"""What a job is made of: its movies, what they share while they run, and what becomes of each."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from distributed import Client

from pipeline.ingest.describe import SourceOverrides
from pipeline.ingest.sources import MovieFiles, discover
from pipeline.ledger import Lease
from pipeline.pulse import Pulse
from schemas.errors import SettingsError, SourceError
from schemas.jobfile import settings_for
from schemas.settings import Job, Settings


class Progress(Protocol):
    """What a run tells of itself while it goes on."""

    def begin(self, movie: str, step: str, frames: int) -> None:
        """A step of a movie begins; it has so many frames to do."""

    def advance(self, movie: str, step: str, frames: int) -> None:
        """Frames were finished."""


class Silent:
    """No progress."""

    def begin(self, movie: str, step: str, frames: int) -> None:
        """Say nothing."""

    def advance(self, movie: str, step: str, frames: int) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class PlannedMovie:
    """A movie of a job: its name, its files, its settings, and those of its group."""

    name: str
    files: MovieFiles
    settings: Settings
    group: tuple[PlannedMovie, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Outcome:
    """What became of a movie: complete or quarantined, with counts."""

    movie: str
    status: str
    path: Path
    frames: int = 0
    columns: int = 0
    dropped: int = 0
    reason: str = ""
    seconds: float = 0.0
    particles: int = 0


HOST_STEPS = ("drift", "collect")
"""Steps that solve or gather what others computed; ingest and simulate never ask for a GPU either."""


@dataclass
class Engine:
    """What all movies of a job share."""

    output: Path
    client: Client | None
    device: str
    stop: threading.Event = field(default_factory=threading.Event)
    progress: Progress = field(default_factory=Silent)
    lease: Lease | None = None
    pulse: Pulse = field(default_factory=Pulse)

    def resources(self, step: str = "process") -> dict[str, float]:
        """What a task of a step needs of its worker: a GPU, if the run has some and the step computes on it."""
        return {"GPU": 1} if self.device.startswith("cuda") and step not in HOST_STEPS else {"CPU": 1}


def movies_of(job: Job) -> tuple[list[PlannedMovie], list[tuple[Path, str]]]:
    """The movies that a job names, and the files that no reader claims; two movies of one name are an error."""
    found: list[PlannedMovie] = []
    ignored: list[tuple[Path, str]] = []
    for entry in job.movies:
        settings = settings_for(job, entry)
        sources = [entry.source] if isinstance(entry.source, str) else list(entry.source)
        discovery = discover(sources, dataset=settings.source.dataset)
        ignored += discovery.ignored
        if entry.name is not None and len(discovery.movies) > 1:
            raise SettingsError(f"movie {entry.name!r}: {sources} holds {len(discovery.movies)} movies; name one file")
        found += [PlannedMovie(entry.name or files.name, files, settings) for files in discovery.movies]
    if not found:
        raise SourceError(f"no movie found in {[entry.source for entry in job.movies]}; ignored: {ignored}")
    for movie in found:
        if twins := [other for other in found if other.name == movie.name and other is not movie]:
            raise SettingsError(
                f"two movies are called {movie.name!r}: {movie.files.paths[0]} and {twins[0].files.paths[0]}; "
                "give one a name with `name:` in the job file, or run them into two folders"
            )
    return _grouped(found), ignored


def _grouped(movies: Sequence[PlannedMovie]) -> list[PlannedMovie]:
    """Movies that know their group, in the order of the job; those that would share a network must ask for the same."""
    groups: dict[str, list[PlannedMovie]] = {}
    for movie in movies:
        if (name := movie.settings.denoise.group) is not None:
            groups.setdefault(name, []).append(movie)
    for name, members in groups.items():
        first, asked = members[0].name, members[0].settings.denoise.model_dump()
        for other in members:
            given = other.settings.denoise.model_dump()
            if differing := [key for key in asked if asked[key] != given[key]]:
                told = ", ".join(f"denoise.{key} {given[key]!r} instead of {asked[key]!r}" for key in differing)
                raise SettingsError(
                    f"{other.name} is of group {name!r} as {first} is, with {told}; movies that share a network need "
                    "the same settings of denoise"
                )
    members_of = {name: tuple(members) for name, members in groups.items()}
    return [replace(movie, group=members_of.get(movie.settings.denoise.group or "", ())) for movie in movies]


def overrides_of(settings: Settings) -> SourceOverrides:
    """What the settings say about a source, for the readers."""
    source = settings.source
    return SourceOverrides(
        sampling=source.sampling,
        frame_interval=source.frame_interval,
        energy=source.energy,
        counts_per_electron=source.counts_per_electron,
        defocus=list(source.defocus) if source.defocus else None,
        dataset=source.dataset,
        on_error=source.on_error,
    )
