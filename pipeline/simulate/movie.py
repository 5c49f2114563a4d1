"""Movies with a known answer: the only entry that tests, training and the demo need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.fft import fft2, ifft2, next_fast_len

from pipeline.simulate import detector, imaging
from pipeline.simulate.motion import ColumnEvent
from pipeline.simulate.scene import BORDER, Scene, build_scene, columns_of
from pipeline.simulate.spec import MovieSpec
from pipeline.simulate.truth import mask_of, sites_of

__all__ = ["MovieSpec", "SimulatedMovie", "simulate_frames", "simulate_movie"]

DEFOCI = np.arange(-100.0, 101.0, 10.0)  # Å, scanned when a spec names a contrast and no defocus


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
    underfocus), of a focal series the first.
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


class Camera:
    """Turns frames of a scene into clean images; keeps what several frames share."""

    def __init__(self, scene: Scene) -> None:
        self.scene, spec = scene, scene.spec
        # A shifted wave brings the canvas' wrap into view unless the border is as wide as the drift.
        border = BORDER + (spec.drift_limit if spec.still else 0.0)
        self.gpts = next_fast_len(max(spec.shape) + 2 * int(np.ceil(border / spec.sampling)))
        self.corner = (self.gpts - np.array(spec.shape)) // 2
        self.middle = self.gpts * spec.sampling / 2
        self.origin = self.corner - self.gpts / 2
        self.kept: dict[tuple[bytes, float], np.ndarray] = {}
        self.waves: dict[object, Any] = {}

    def find_planes(self) -> tuple[float, ...]:
        """Defoci [Å] at which every frame is imaged: those of the focal series, or one."""
        spec = self.scene.spec
        if spec.defoci is not None:
            return spec.defoci
        return (self.find_defocus() if spec.defocus is None else spec.defocus,)

    def frame(self, frame: int, planes: tuple[float, ...]) -> np.ndarray:
        """Clean relative intensity of one frame, (y, x), or (defocus, y, x) in a focal series."""
        images = [self.image(frame, defocus) for defocus in planes]
        return images[0] if self.scene.spec.defoci is None else np.stack(images)

    def image(self, frame: int, defocus: float) -> np.ndarray:
        """Clean relative intensity (y, x) of one frame at a defocus [Å]."""
        spec = self.scene.spec
        if spec.kind == "vacuum":
            return np.ones(spec.shape, np.float32)
        canvas = self._still_canvas(frame, defocus) if spec.still else self._canvas(frame, defocus)
        return self.on_detector(canvas)

    def on_detector(self, canvas: np.ndarray) -> np.ndarray:
        """What the detector sees of a canvas (y, x): blurred by its MTF, without the border."""
        spec = self.scene.spec
        canvas = detector.apply_mtf(canvas, spec.mtf) if spec.mtf else canvas
        (top, left), (height, width) = self.corner, spec.shape
        return np.ascontiguousarray(canvas[top : top + height, left : left + width])

    def find_defocus(self) -> float:
        """The defocus of DEFOCI at which the visible columns show the wanted contrast best; 60 Å without columns."""
        spec = self.scene.spec
        truth = columns_of(self.scene, 0, self.origin)
        truth = truth[truth["visible"]]
        if spec.mode == "haadf" or not len(truth):
            return 0.0 if spec.mode == "haadf" else 60.0
        wave = self.wave(0, self.scene.drift[0])
        sign = 1 if spec.contrast == "bright" else -1
        y, x = truth["y"] + self.corner[0], truth["x"] + self.corner[1]
        clear, contrast = [], []
        for defocus in DEFOCI:
            canvas = self.with_ctf(wave, defocus)
            clear.append(imaging.clarity(sign * canvas, y, x, spec.sampling))
            contrast.append(sign * imaging.column_contrast(canvas, y, x, 1.2 / spec.sampling).mean())
        return float(DEFOCI[int(np.argmax(imaging.merit(np.array(clear), np.array(contrast))))])

    def _placed(self, frame: int, drift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points, numbers, _ = self.scene.atoms(frame)
        points = points + np.array([drift[0] + self.middle, drift[1] + self.middle, 0.0])
        extent = self.gpts * self.scene.spec.sampling
        inside = ((points[:, :2] >= 0) & (points[:, :2] < extent)).all(1)
        return points[inside], numbers[inside]

    def wave(self, frame: int, drift: np.ndarray) -> Any:
        """The abTEM wave that leaves the specimen of one frame, moved by a drift (2,) [Å]."""
        spec = self.scene.spec
        points, numbers = self._placed(frame, drift)
        return imaging.exit_wave(points, numbers, gpts=self.gpts, sampling=spec.sampling, energy=spec.energy)

    def with_ctf(self, wave: Any, defocus: float, *, complex_wave: bool = False) -> np.ndarray:
        """Intensity (y, x) of the canvas, or the wave itself, behind the objective lens at a defocus [Å]."""
        spec = self.scene.spec
        return imaging.hrtem(
            wave,
            energy=spec.energy,
            defocus=defocus,
            spherical=spec.spherical,
            focal_spread=spec.focal_spread,
            angular_spread=spec.angular_spread,
            complex_wave=complex_wave,
        )

    def _canvas(self, frame: int, defocus: float) -> np.ndarray:
        spec, drift = self.scene.spec, self.scene.drift[frame]
        if spec.mode == "haadf":
            points, numbers = self._placed(frame, drift)
            return imaging.haadf(points, numbers, gpts=self.gpts, sampling=spec.sampling, probe=spec.probe)
        return self.with_ctf(self._kept_wave(frame, lambda: self.wave(frame, drift)), defocus)

    def _kept_wave(self, key: object, make: Callable[[], Any]) -> Any:
        """An exit wave, kept until another is asked for: all planes of a focal series are imaged from one."""
        if key not in self.waves:
            self.waves = {key: make()}
        return self.waves[key]

    def _still_canvas(self, frame: int, defocus: float) -> np.ndarray:
        spec = self.scene.spec
        state = self.scene.there[frame].tobytes()
        if (state, defocus) not in self.kept:
            # States follow one another: only the last is worth keeping.
            self.kept = {key: canvas for key, canvas in self.kept.items() if key[0] == state}
            if spec.mode == "haadf":
                points, numbers = self._placed(frame, np.zeros(2))
                made = imaging.haadf(points, numbers, gpts=self.gpts, sampling=spec.sampling, probe=spec.probe)
            else:
                wave = self._kept_wave(state, lambda: self.wave(frame, np.zeros(2)))
                made = self.with_ctf(wave, defocus, complex_wave=True)
            self.kept[state, defocus] = fft2(made)
        k = np.fft.fftfreq(self.gpts)
        dy, dx = self.scene.drift[frame] / spec.sampling
        ramp = np.exp(-2j * np.pi * k * dy)[:, None] * np.exp(-2j * np.pi * k * dx)
        moved = ifft2(self.kept[state, defocus] * ramp)
        return (moved.real if spec.mode == "haadf" else np.abs(moved) ** 2).astype(np.float32)


def polarity_of(clean: np.ndarray, truth: np.ndarray, spec: MovieSpec) -> tuple[int, float]:
    """The sign that at least 85 % of the visible columns have, else 0, and the share that has the commoner sign."""
    truth = truth[truth["visible"]]
    if not len(truth):
        return 0, 0.0
    values = imaging.column_contrast(clean, truth["y"], truth["x"], 1.2 / spec.sampling)
    bright = float((values > 0).mean())
    share = max(bright, 1 - bright)
    return (0 if share < 0.85 else 1 if bright > 0.5 else -1), share
