"""A movie as a task sees it: its stack, its settings, and the answers of earlier steps, read from part files."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import store
from pipeline.ingest.describe import SourceOverrides, describe
from pipeline.ingest.reading import read_frames
from pipeline.ingest.sources import discover
from pipeline.parts import part_path, read_part
from pipeline.steps import detector, drift, neighbours, noise
from schemas.errors import ResourceError, SettingsError
from schemas.settings import Settings


@dataclass(frozen=True)
class Lead:
    """The movie whose network others of its group take over: its name, and the answer of its adapt step."""

    movie: str
    fingerprint: str
    part: str


@dataclass(frozen=True)
class Task:
    """What a worker needs to compute frames [start, stop) of one step: paths, settings and fingerprints."""

    stack: str
    run: str
    parts: str
    frames: int
    settings: Settings
    keys: tuple[tuple[str, str], ...]
    device: str
    start: int = 0
    stop: int = 0
    halvings: int = 0
    lead: Lead | None = None

    def part(self, step: str, start: int | None = None, stop: int | None = None) -> Path:
        """Part file of a step; of this task's own frames, unless others are named."""
        first = self.start if start is None else start
        end = self.stop if stop is None else stop
        return part_path(Path(self.parts), step, first, end, dict(self.keys)[step])

    def answer(self, step: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The global answer of an earlier step."""
        return read_part(self.part(step, 0, self.frames))


@dataclass
class Clock:
    """Seconds spent in each numeric step of a task, and in reading and writing."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Count the body's time towards ``step``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - begin


def require_device(device: str) -> None:
    """Stop where a GPU was asked for and this process has none: never compute on a CPU in silence."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError(
            f"the run asked for {device}, but torch {torch.__version__} sees no GPU in this worker; "
            "check the driver and the CUDA build of torch, or use `--cluster local`"
        )


def device_text(device: str, dtype: str, halvings: int) -> str:
    """Device, number format, torch and CUDA build, as stored with every frame, and if memory forced smaller tiles."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    smaller = f", tiles halved {halvings} times for want of memory" if halvings else ""
    return f"{name}, {dtype}, torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}{smaller}"


@dataclass(frozen=True)
class Movie:
    """An opened movie. Fields of steps that have not run yet are None.

    drift_px and drift_err (time, 2) [px]; offsets (time, defocus, 2) [px] of the planes of a focal series.
    """

    task: Task
    stack: store.Stack
    bad: np.ndarray | None = None
    model: noise.NoiseModel | None = None
    level: neighbours.Level | None = None
    drift_px: np.ndarray | None = None
    drift_err: np.ndarray | None = None
    good: np.ndarray | None = None
    offsets: np.ndarray | None = None
    dark: np.ndarray | None = None
    gain: np.ndarray | None = None

    @property
    def settings(self) -> Settings:
        """The movie's resolved settings."""
        return self.task.settings

    @property
    def dose(self) -> float:
        """Mean dose [e⁻/Å² per image]; NaN where the counts are not calibrated."""
        if self.level is None or self.model is None or not self.model.calibrated:
            return float("nan")
        return self.level.mean / self.stack.sampling**2

    def counts(self, start: int, stop: int) -> np.ndarray:
        """Raw frames [start, stop), (time, y, x)."""
        return self.stack.read(start, stop, plane=self.settings.source.defocus_plane)

    def electrons(self, counts: np.ndarray) -> np.ndarray:
        """Corrected frames in electrons (or effective electrons), (time, y, x) float32, of raw ones.

        Pixels that are not finite stay so: their frames are flagged, and no neighbour takes anything from them.
        """
        if self.bad is None or self.model is None:
            raise RuntimeError("the movie was opened before it was calibrated")
        corrected = detector.correct(counts, dark=self.dark, gain=self.gain, bad=self.bad)
        return noise.to_electrons(corrected, self.model)

    def planes(self, frame: int) -> np.ndarray:
        """All planes of one frame in electrons, (defocus, y, x) float32, each on its own grid."""
        return self.electrons(self.stack.read(frame, frame + 1, plane=slice(None))[0])

    def links(self, start: int, stop: int) -> neighbours.FrameLinks:
        """How frames [start, stop) follow each other: whole-pixel drift, good frames, gaps in time."""
        if self.drift_px is None or self.good is None:
            raise RuntimeError("the movie was opened before its drift was solved")
        runs = neighbours.frame_runs(self.stack.time, max_gap=self.settings.denoise.max_gap)
        path = drift.whole_path(self.drift_px)[start:stop]
        return neighbours.FrameLinks(path, self.good[start:stop], runs[start:stop])


def open_movie(task: Task) -> Movie:
    """The movie of a task with all that earlier steps found; kept for the tasks that follow in this process."""
    require_device(task.device)
    return _open(replace(task, start=0, stop=0), _present(task))


def _present(task: Task) -> tuple[bool, bool]:
    return task.part("calibrate", 0, task.frames).exists(), task.part("drift", 0, task.frames).exists()


@functools.lru_cache(maxsize=2)
def _open(task: Task, present: tuple[bool, bool]) -> Movie:
    stack = store.open_stack(Path(task.stack))
    dark, gain = (_reference(path, stack, task.settings) for path in (task.settings.detector.dark,
                                                                        task.settings.detector.gain))  # fmt: skip
    movie = Movie(task, stack, dark=dark, gain=gain)
    if present[0]:
        arrays, meta = task.answer("calibrate")
        bad = np.zeros(stack.shape[1:], dtype=bool)
        bad[arrays["bad_y"], arrays["bad_x"]] = True
        movie = replace(movie, bad=bad, model=noise.NoiseModel(**meta["noise"]), level=neighbours.Level(*meta["level"]))
    if present[1]:
        arrays, _ = task.answer("drift")
        movie = replace(
            movie, drift_px=arrays["drift"], drift_err=arrays["error"], good=arrays["good"],
            offsets=arrays.get("offsets"),
        )  # fmt: skip
    return movie


def _reference(path: Path | None, stack: store.Stack, settings: Settings) -> np.ndarray | None:
    """A dark or gain map, cut like the movie."""
    if path is None:
        return None
    if settings.source.binning != 1:
        raise SettingsError(
            f"source.binning is {settings.source.binning} and {path} is a map of single pixels; bin afterwards, or "
            "leave source.binning at 1"
        )
    files = discover([str(path)]).movies[0]
    description = describe(files, SourceOverrides(sampling=1.0, frame_interval=1.0))
    image = read_frames(description, 0, description.shape[0]).astype(np.float64).mean(0)
    if settings.source.region is not None:
        y0, y1, x0, x1 = settings.source.region
        image = image[y0:y1, x0:x1]
    if image.shape != stack.shape[1:]:
        raise SettingsError(
            f"{path} has {image.shape[0]} x {image.shape[1]} pixels; the movie has {stack.shape[1]} x {stack.shape[2]}"
        )
    return image.astype(np.float32)


def saturation_of(stack: store.Stack, settings: Settings) -> float | None:
    """Counts at which a pixel is full: as set, else the largest value of an integer type."""
    if settings.detector.saturation is not None:
        return settings.detector.saturation
    dtype = np.dtype(stack.counts.dtype)
    return float(np.iinfo(dtype).max) if dtype.kind in "iu" else None


def record(clock: Clock, **facts: Any) -> Mapping[str, Any]:
    """What a task tells the driver: small, JSON-able."""
    return {"seconds": {name: round(value, 4) for name, value in clock.seconds.items()}, **facts}
