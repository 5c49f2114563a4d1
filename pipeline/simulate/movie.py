"""Movies with a known answer: the only entry that tests, training and the demo need."""

from __future__ import annotations

from dataclasses import dataclass

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
    scene = build_scene(spec, seed)
    camera = Camera(scene)
    planes = camera.find_planes()
    clean = np.stack([camera.frame(frame, planes) for frame in range(spec.frames)])
    columns = [columns_of(scene, frame, camera.origin) for frame in range(spec.frames)]
    recording = detector.detector_of(spec, seed)
    polarity, share = polarity_of(clean[0] if spec.defoci is None else clean[0, 0], columns[0], spec)
    return SimulatedMovie(
        counts=np.stack([counts_of(image, scene, frame, recording) for frame, image in enumerate(clean)]),
        clean=clean,
        drift=scene.drift / spec.sampling,
        columns=columns,
        sites=[sites_of(scene, frame, camera.origin) for frame in range(spec.frames)],
        masks=np.stack([mask_of(scene, frame, camera.origin) for frame in range(spec.frames)]),
        particles=scene.crystal.particles,
        events=scene.events,
        polarity=polarity,
        contrast_share=share,
        defocus=planes[0],
        plane_shifts=np.stack([plane_shifts(scene, frame, len(planes)) for frame in range(spec.frames)])
        / spec.sampling,
        spec=spec,
    )


def counts_of(clean: np.ndarray, scene: Scene, frame: int, camera: detector.Detector) -> np.ndarray:
    """What the detector writes of one frame ([defocus,] y, x); noise is the same whoever computes the frame."""
    electrons = scene.spec.dose * scene.spec.sampling**2
    rng = np.random.default_rng([scene.seed, 2, frame])
    return detector.record(clean, rng, electrons_per_pixel=electrons, detector=camera)


def simulate_frames(shape: tuple[int, int], frames: int, *, sampling: float, dose: float, seed: int) -> SimulatedMovie:
    """A movie of pure noise: an empty, evenly lit view."""
    return simulate_movie(MovieSpec(kind="vacuum", shape=shape, frames=frames, sampling=sampling, dose=dose), seed)
