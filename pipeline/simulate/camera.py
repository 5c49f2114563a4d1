"""From a scene to clean images: one exit wave or probe image per state, then the lens, the scan and the MTF."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.fft import fft2, ifft2, next_fast_len

from pipeline.simulate import detector, imaging
from pipeline.simulate.field_camera import FieldObject
from pipeline.simulate.projected import onto_detector
from pipeline.simulate.scene import BORDER, Scene, columns_of
from pipeline.simulate.spec import MovieSpec

DEFOCI = np.arange(-100.0, 101.0, 10.0)  # Å, scanned when a spec names a contrast and no defocus
STAYS = np.zeros(2)
FIELD_DEFOCUS = 1500.0  # Å, where a field names none
FIELD_BORDER = 16  # px around a field that Fresnel fringes may come from
SCAN_SHARES = np.array([0.4, 1.0])  # a scan is less steady along its fast axis, x


class Camera:
    """Turns frames of a scene into clean images; keeps what several frames share."""

    def __init__(self, scene: Scene) -> None:
        self.scene, spec = scene, scene.spec
        # A shifted wave brings the canvas' wrap into view unless the border is as wide as the drift.
        border = BORDER + (spec.drift_limit if spec.still or spec.kind == "field" else 0.0)
        border += FIELD_BORDER * spec.sampling if spec.kind == "field" else 0.0
        self.gpts = next_fast_len(max(spec.shape) + 2 * int(np.ceil(border / spec.sampling)))
        self.corner = (self.gpts - np.array(spec.shape)) // 2
        self.middle = self.gpts * spec.sampling / 2
        self.origin = self.corner - self.gpts / 2
        self.kept: dict[tuple[bytes, float], np.ndarray] = {}
        self.waves: dict[object, Any] = {}
        self.field = FieldObject(scene, self.gpts) if spec.kind == "field" else None

    def find_planes(self) -> tuple[float, ...]:
        """Defoci [Å] at which every frame is imaged: those of the focal series, or one."""
        spec = self.scene.spec
        if spec.defoci is not None:
            return spec.defoci
        return (self.find_defocus() if spec.defocus is None else spec.defocus,)

    def frame(self, frame: int, planes: tuple[float, ...]) -> np.ndarray:
        """Clean relative intensity of one frame, (y, x), or (defocus, y, x) in a focal series."""
        shifts = plane_shifts(self.scene, frame, len(planes))
        images = [self.image(frame, defocus, shift) for defocus, shift in zip(planes, shifts, strict=True)]
        return images[0] if self.scene.spec.defoci is None else np.stack(images)

    def image(self, frame: int, defocus: float, shift: np.ndarray = STAYS) -> np.ndarray:
        """Clean relative intensity (y, x) of one frame at a defocus [Å], moved by a shift (2,) [Å] beside its drift."""
        spec = self.scene.spec
        if spec.kind == "vacuum":
            return np.ones(spec.shape, np.float32)
        canvas = self._still_canvas(frame, defocus, shift) if spec.still else self._canvas(frame, defocus, shift)
        if spec.scan_jitter:
            rng = np.random.default_rng([self.scene.seed, 5, frame])
            off = rng.normal(0, spec.scan_jitter / spec.sampling, (self.gpts, 2)) * SCAN_SHARES
            canvas = imaging.scanned(canvas, off)
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
            return 0.0 if spec.mode == "haadf" else FIELD_DEFOCUS if self.field is not None else 60.0
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
        if self.field is not None:
            return self.field.wave(frame, drift)
        points, numbers = self._placed(frame, drift)
        return imaging.exit_wave(points, numbers, gpts=self.gpts, sampling=spec.sampling, energy=spec.energy)

    def with_ctf(self, wave: Any, defocus: float, *, complex_wave: bool = False) -> np.ndarray:
        """Intensity (y, x) of the canvas, or the wave itself, behind the objective lens at a defocus [Å]."""
        spec = self.scene.spec
        return imaging.hrtem(wave, lens=spec.lens, defocus=defocus, complex_wave=complex_wave)

    def _canvas(self, frame: int, defocus: float, shift: np.ndarray) -> np.ndarray:
        spec, drift = self.scene.spec, self.scene.drift[frame]
        if self.field is not None:
            if spec.mode == "haadf":
                return onto_detector(self.field.haadf(frame, drift))
            wave = self._kept_wave(frame, lambda: self.wave(frame, drift))
            spectrum = fft2(self.with_ctf(wave, defocus, complex_wave=True)) if shift.any() else None
            return onto_detector(self.with_ctf(wave, defocus) if spectrum is None else self._moved(spectrum, shift))
        if spec.mode == "haadf":
            points, numbers = self._placed(frame, drift)
            return imaging.haadf(points, numbers, gpts=self.gpts, sampling=spec.sampling, probe=spec.probe)
        wave = self._kept_wave(frame, lambda: self.wave(frame, drift))
        if not shift.any():
            return self.with_ctf(wave, defocus)
        return self._moved(fft2(self.with_ctf(wave, defocus, complex_wave=True)), shift)

    def _kept_wave(self, key: object, make: Callable[[], Any]) -> Any:
        """An exit wave, kept until another is asked for: all planes of a focal series are imaged from one."""
        if key not in self.waves:
            self.waves = {key: make()}
        return self.waves[key]

    def _still_canvas(self, frame: int, defocus: float, shift: np.ndarray) -> np.ndarray:
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
        return self._moved(self.kept[state, defocus], self.scene.drift[frame] + shift)

    def _moved(self, spectrum: np.ndarray, shift: np.ndarray) -> np.ndarray:
        """Intensity of the canvas whose Fourier transform is given, moved by a shift (2,) [Å]."""
        k = np.fft.fftfreq(len(spectrum))
        dy, dx = shift / self.scene.spec.sampling * (len(spectrum) / self.gpts)
        moved = ifft2(spectrum * (np.exp(-2j * np.pi * k * dy)[:, None] * np.exp(-2j * np.pi * k * dx)))
        return (moved.real if self.scene.spec.mode == "haadf" else np.abs(moved) ** 2).astype(np.float32)


def plane_shifts(scene: Scene, frame: int, planes: int) -> np.ndarray:
    """How far the specimen of a frame has moved in each plane of a focal series since the first (defocus, 2) [Å]."""
    spread = scene.spec.plane_drift
    if not spread:
        return np.zeros((planes, 2))
    moves = np.random.default_rng([scene.seed, 6, frame]).normal(0, spread, (planes, 2))
    moves[0] = 0.0
    return np.clip(moves, -BORDER / 2, BORDER / 2)


def polarity_of(clean: np.ndarray, truth: np.ndarray, spec: MovieSpec) -> tuple[int, float]:
    """The sign that at least 85 % of the visible columns have, else 0, and the share that has the commoner sign."""
    truth = truth[truth["visible"]]
    if not len(truth):
        return 0, 0.0
    values = imaging.column_contrast(clean, truth["y"], truth["x"], 1.2 / spec.sampling)
    bright = float((values > 0).mean())
    share = max(bright, 1 - bright)
    return (0 if share < 0.85 else 1 if bright > 0.5 else -1), share
