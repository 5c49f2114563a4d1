"""Movies with a known answer: the only entry that tests, training and the demo need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.simulate import detector
from pipeline.simulate.camera import Camera, plane_shifts, polarity_of
from pipeline.simulate.motion import ColumnEvent
from pipeline.simulate.scene import Scene, build_scene, columns_of
from pipeline.simulate.spec import MovieSpec
from pipeline.simulate.truth import mask_of, sites_of

__all__ = ["Camera", "MovieSpec", "SimulatedMovie", "polarity_of", "simulate_frames", "simulate_movie"]


@dataclass(frozen=True)
class SimulatedMovie:
    """A movie and its truth.

    counts (time, y, x) uint16, of a focal series (time, defocus, y, x); clean likewise: relative intensity, mean about
    1, as the detector would give it without noise; drift (time, 2) [px], how the specimen moved since frame 0.
    columns: one structured array per frame (column, y [px], x [px], atoms, visible, species, particle, site); columns
    that are not visible (too few atoms, too tilted) should neither be demanded nor count as spurious.
    sites: one structured array per frame (site, y [px], x [px], species) with every lattice site of a sheet, empty ones
    too (0S, 0C). masks (time, y, x) uint16: labels of particles, 0 where there is none; label n is row n − 1 of
    particles, a structured array (particle, y, x [Å] off the middle, radius [Å], element, shape, zone, tilt [degrees]).
    events: what appears or vanishes; polarity: +1 atoms bright, −1 dark, 0 mixed or no atoms, and contrast_share: share
    of the visible columns that have this sign, both of the first plane of frame 0; defocus [Å] used (> 0 is
    underfocus), of a focal series the first. plane_shifts (time, defocus, 2) [px]: how the specimen moved in each plane
    since the first of its frame.
    """

    counts: np.ndarray
    clean: np.ndarray
    drift: np.ndarray
    columns: list[np.ndarray]
    sites: list[np.ndarray]
    masks: np.ndarray
    particles: np.ndarray
    events: tuple[ColumnEvent, ...]
    polarity: int
    contrast_share: float
    defocus: float
    plane_shifts: np.ndarray
    spec: MovieSpec

    @property
    def sampling(self) -> float:
        """Å per pixel."""
        return self.spec.sampling

    @property
    def energy(self) -> float:
        """Beam energy [keV]."""
        return self.spec.energy

    @property
    def dose(self) -> float:
        """Electrons per Å² and frame."""
        return self.spec.dose

    @property
    def mode(self) -> str:
        """Either hrtem or haadf."""
        return self.spec.mode

    @property
    def frame_interval(self) -> float:
        """Seconds between frames."""
        return self.spec.frame_interval


def simulate_movie(spec: MovieSpec, seed: int) -> SimulatedMovie:
    """Simulate a movie; the same spec and seed give the same bits.

    Drift is applied to the atoms (or, where nothing else moves, as a phase ramp to the wave, which is the same),
    noise is added last, frame by frame from a seed of its own.
    """
    answer = Answer(spec, seed)
    frames = [answer.frame(index) for index in range(spec.frames)]
    clean, columns = np.stack([frame.clean for frame in frames]), [frame.columns for frame in frames]
    polarity, share = polarity_of(clean[0] if spec.defoci is None else clean[0, 0], columns[0], spec)
    return SimulatedMovie(
        counts=np.stack([frame.counts for frame in frames]),
        clean=clean,
        drift=answer.scene.drift / spec.sampling,
        columns=columns,
        sites=[frame.sites for frame in frames],
        masks=np.stack([frame.mask for frame in frames]),
        particles=answer.scene.crystal.particles,
        events=answer.scene.events,
        polarity=polarity,
        contrast_share=share,
        defocus=answer.planes[0],
        plane_shifts=np.stack([frame.plane_shifts for frame in frames]),
        spec=spec,
    )


class Frame(NamedTuple):
    """One frame and its truth, as the fields of ``SimulatedMovie`` without time."""

    counts: np.ndarray
    clean: np.ndarray
    columns: np.ndarray
    sites: np.ndarray
    mask: np.ndarray
    plane_shifts: np.ndarray


class Answer:
    """A movie to be computed frame by frame; a frame does not depend on which others are computed here."""

    def __init__(self, spec: MovieSpec, seed: int, planes: tuple[float, ...] | None = None) -> None:
        self.scene = build_scene(spec, seed)
        self.camera = Camera(self.scene)
        self.recording = detector.detector_of(spec, seed)
        self.planes = self.camera.find_planes() if planes is None else planes

    def frame(self, index: int) -> Frame:
        """Everything about one frame."""
        scene, camera = self.scene, self.camera
        clean = camera.frame(index, self.planes)
        return Frame(
            counts_of(clean, scene, index, self.recording),
            clean,
            columns_of(scene, index, camera.origin),
            sites_of(scene, index, camera.origin),
            mask_of(scene, index, camera.origin),
            plane_shifts(scene, index, len(self.planes)) / scene.spec.sampling,
        )


def counts_of(clean: np.ndarray, scene: Scene, frame: int, camera: detector.Detector) -> np.ndarray:
    """What the detector writes of one frame ([defocus,] y, x); noise is the same whoever computes the frame."""
    electrons = scene.spec.dose * scene.spec.sampling**2
    rng = np.random.default_rng([scene.seed, 2, frame])
    return detector.record(clean, rng, electrons_per_pixel=electrons, detector=camera)


def simulate_frames(shape: tuple[int, int], frames: int, *, sampling: float, dose: float, seed: int) -> SimulatedMovie:
    """A movie of pure noise: an empty, evenly lit view."""
    return simulate_movie(MovieSpec(kind="vacuum", shape=shape, frames=frames, sampling=sampling, dose=dose), seed)
