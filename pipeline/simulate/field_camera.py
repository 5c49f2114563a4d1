"""The camera of large fields: the projected object of ``projected`` in place of multislice."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import abtem
import numpy as np

from pipeline.simulate import projected
from pipeline.simulate.scene import Scene
from pipeline.simulate.structures.specimen import turned

ON_ZONE = np.deg2rad(4.0)  # how far off a zone a particle still diffracts strongly


class FieldObject:
    """Half spectra of a field's particles and film, kept while the particles stay as they are."""

    def __init__(self, scene: Scene, gpts: int) -> None:
        self.scene, self.gpts = scene, gpts
        self.extent = gpts * scene.spec.sampling
        self.size = projected.grids(gpts, scene.spec.sampling)[1]
        self.k2 = projected.frequencies(self.size, self.extent)
        self.films: dict[int, np.ndarray] = {}
        self.kept: dict[tuple[bytes, float], tuple[np.ndarray, np.ndarray]] = {}

    def wave(self, frame: int, drift: np.ndarray) -> Any:
        """The abTEM wave behind the field in one frame, moved by a drift (2,) [Å]."""
        potential, lost = self._particles(frame)
        film = self._film(frame)
        potential = potential + film * projected.scattering(6, self.k2)
        ramp, lost = self._ramp(drift), lost + film * np.float32(projected.loss(np.array(6)))
        energy = self.scene.spec.energy
        array = projected.transmitted(potential * ramp, lost * ramp, energy=energy, extent=self.extent)
        return abtem.Waves(array, energy=energy * 1e3, sampling=self.extent / self.size)

    def haadf(self, frame: int, drift: np.ndarray) -> np.ndarray:
        """HAADF image (y, x) on the grid of waves."""
        _, strength = self._particles(frame)
        both = (strength + self._film(frame) * 6**1.7) * self._ramp(drift)
        return projected.incoherent(both, probe=self.scene.spec.probe, extent=self.extent)

    def _particles(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Half spectra of the particles' potential and of their losses (in HAADF: of Z^1.7)."""
        scene, crystal = self.scene, self.scene.crystal
        key = (scene.there[frame].tobytes(), float(scene.angle[frame]))
        if key not in self.kept:
            present = scene.present(frame)
            points = turned(crystal.positions[present, :2], key[1]) + self.extent / 2
            inside = ((points >= 0) & (points < self.extent)).all(1)
            points, numbers = points[inside], crystal.numbers[present][inside]
            strength = self._strength()[crystal.column[present][inside]]
            potential = np.zeros((self.size, self.size // 2 + 1), np.complex64)
            for number in np.unique(numbers).tolist():
                of = numbers == number
                spectrum = projected.density(points[of], np.ones(of.sum()), self.gpts, scene.spec.sampling)
                potential += spectrum * projected.scattering(number, self.k2)
            haadf = scene.spec.mode == "haadf"
            each = numbers**1.7 if haadf else strength * projected.loss(numbers)
            self.kept = {key: (potential, projected.density(points, each, self.gpts, scene.spec.sampling))}
        return self.kept[key]

    def _strength(self) -> np.ndarray:
        """How much each particle (particle,) takes from the beam, against one far off any zone axis."""
        tilt = np.deg2rad(np.nan_to_num(self.scene.crystal.particles["tilt"], nan=10.0))
        rng = np.random.default_rng([self.scene.seed, 7])
        return np.asarray((0.6 + 1.6 * np.exp(-np.square(tilt / ON_ZONE))) * np.exp(rng.normal(0, 0.25, len(tilt))))

    def _film(self, frame: int) -> np.ndarray:
        """Half spectrum of the film's atoms, which change places as slowly as carbon_walk [rad per frame] says.

        One arrangement turns into the next like cosine into sine, so that their statistics stay.
        """
        spec = self.scene.spec
        if not spec.carbon:
            return np.zeros((self.size, self.size // 2 + 1), np.complex64)
        step, turn = divmod(spec.carbon_walk * frame, np.pi / 2)
        wanted = (int(step), int(step) + 1) if turn else (int(step),)
        self.films = {i: self.films[i] if i in self.films else self._arrangement(i) for i in wanted}
        mean = projected.film(self.lit, spec.carbon, self.extent)
        parts = zip(wanted, (np.cos(turn), np.sin(turn)), strict=False)
        return np.asarray(mean + sum(self.films[i] * np.float32(share) for i, share in parts))

    def _arrangement(self, index: int) -> np.ndarray:
        """Half spectrum of one random arrangement of the film's atoms, without its mean."""
        rng = np.random.default_rng([self.scene.seed, 9, index])
        return projected.film(self.lit, self.scene.spec.carbon, self.extent, rng)

    @cached_property
    def lit(self) -> np.ndarray:
        """Where the film is (y, x): up to a wavy edge, as under single particles."""
        rng = np.random.default_rng([self.scene.seed, 8])
        spec, place = self.scene.spec, (np.arange(self.size) / self.size - 0.5) * self.extent
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        if spec.carbon_cover >= 1:
            return np.ones((self.size, self.size), np.float32)
        along = np.cos(angle) * place[:, None] - np.sin(angle) * place
        across = np.sin(angle) * place[:, None] + np.cos(angle) * place
        edge = self.extent / 2 * (2 * spec.carbon_cover - 1) + 0.02 * self.extent * np.sin(
            across * 12 / self.extent + phase
        )
        return np.asarray(along < edge, dtype=np.float32)

    def _ramp(self, drift: np.ndarray) -> np.ndarray:
        step = self.extent / self.size
        y, x = np.fft.fftfreq(self.size, step), np.fft.rfftfreq(self.size, step)
        ramp = np.exp(-2j * np.pi * y * drift[0])[:, None] * np.exp(-2j * np.pi * x * drift[1])
        return np.asarray(ramp, dtype=np.complex64)
