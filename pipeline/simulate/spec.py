"""What a user asks to be simulated: the one place of the simulator's defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pipeline.simulate.imaging import Lens
from pipeline.simulate.structures.sheet import SHEETS
from schemas.errors import SettingsError

KINDS = ("nanoparticle", "field", *SHEETS, "carbon", "vacuum")
SHARES = (
    *("vacancies", "double_vacancies", "substitutions", "metal_substitutions", "dopants", "particle_vacancies"),
    "hot_pixels",
)


@dataclass(frozen=True)
class MovieSpec:
    """What to simulate. Lengths in Å, energy in keV, dose in e⁻/Å² per frame, angles in degrees, times in seconds.

    kind: nanoparticle, field (many particles at 0.5 to 3 Å per pixel), graphene, hbn, mos2, wse2, carbon (film only) or
    vacuum (pure noise).
    contrast: bright or dark atoms in HRTEM; the defocus (> 0 is underfocus) is then found by a scan unless it is given.
    drift_step and drift_jitter are per frame; drift_limit bounds the drift. mtf: coefficients c0, c1, c2, c3 or None.
    thickness: particles are flattened to this along the beam, as supported ones are; much thicker gold reverses its
    contrast. hole: radius of a hole in a sheet.
    defoci: a focal series: every frame is imaged at each of these from the same exit wave, but with noise of its own.
    plane_drift: rms shift of its planes against each other. scan_jitter: rms displacement of scanned rows (HAADF).
    shapes: drawn from for each particle. zone: 100, 110, 111 or random. adatoms: columns of 1 to 3 atoms beside each
    particle's rim; particle_vacancies: share of a particle's atoms that is missing. hops: how often something moves.
    In a field `particles` is how many are placed in and around the view, `radius` their median, size_spread the spread
    of its logarithm, gap the least distance between them (negative: they may overlap).
    vacancies, double_vacancies, substitutions (Se for S, Te for Se), metal_substitutions (W for Mo, Mo for W), dopants
    (Si for C): shares of a sheet's atoms; groups of Si in graphene: 3-fold, 4-fold, dimer, trimer; atomwise: events of
    a sheet move one atom of a pair.
    tilts: how far each particle is off its zone, where they differ; else all are off by `tilt`.
    min_atoms: columns with fewer atoms are kept in the truth but not marked visible (default 3, sheets 1).
    noise: counting (white, whatever the mtf) or integrating (blurred by the mtf as the image is; there `excess` is the
    relative rms of what one electron leaves). gain_spread: rms of the pixels' gain; hot_pixels: share of pixels.
    For HAADF, dose counts the electrons that reach the detector.
    """

    kind: str = "nanoparticle"
    shape: tuple[int, int] = (256, 256)
    frames: int = 40
    sampling: float = 0.17
    mode: str = "hrtem"
    energy: float = 300.0
    dose: float = 1000.0
    frame_interval: float = 0.1
    element: str = "Au"
    zone: str = "110"
    radius: float | None = None
    thickness: float = 22.0
    shapes: tuple[str, ...] = ("faceted",)
    particles: int = 1
    tilt: float = 0.0
    tilts: tuple[float, ...] | None = None
    size_spread: float = 0.25
    gap: float = 4.0
    carbon: float = 6.0
    carbon_cover: float = 0.6
    carbon_walk: float = 0.1
    vibration: float = 0.05
    particle_vacancies: float = 0.0
    adatoms: int = 0
    hops: int = 0
    vacancies: float = 0.01
    double_vacancies: float = 0.0
    substitutions: float = 0.0
    metal_substitutions: float = 0.0
    dopants: float = 0.004
    groups: tuple[str, ...] = ()
    atomwise: bool = False
    hole: float = 0.0
    events: int = 6
    rotation_step: float = 0.0
    drift_step: float = 0.06
    drift_jitter: float = 0.03
    drift_limit: float = 4.0
    contrast: str = "bright"
    defocus: float | None = None
    defoci: tuple[float, ...] | None = None
    spherical: float = -5e4
    focal_spread: float = 25.0
    angular_spread: float = 0.3
    astigmatism: float = 0.0
    astigmatism_angle: float = 0.0
    coma: float = 0.0
    coma_angle: float = 0.0
    plane_drift: float = 0.0
    probe: float = 0.9
    scan_jitter: float = 0.0
    mtf: tuple[float, float, float, float] | None = None
    min_atoms: int | None = None
    counts_per_electron: float = 1.0
    offset: float = 0.0
    readout: float = 0.0
    noise: str = "counting"
    excess: float = 0.0
    gain_spread: float = 0.0
    hot_pixels: float = 0.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, KINDS),
            ("mode", self.mode, ("hrtem", "haadf")),
            ("contrast", self.contrast, ("bright", "dark")),
            ("noise", self.noise, ("counting", "integrating")),
        ):
            if value not in allowed:
                raise SettingsError(f"MovieSpec.{name} is {value!r}; expected one of {', '.join(allowed)}")
        for name in ("sampling", "energy", "dose", "frames", "frame_interval", "particles", "counts_per_electron"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"MovieSpec.{name} is {getattr(self, name)!r}; expected a positive number")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"MovieSpec.{name} is {getattr(self, name)!r}; expected a share from 0 to 1")
        if self.tilts is not None and len(self.tilts) != self.particles:
            raise SettingsError(
                f"MovieSpec.tilts is {self.tilts!r}; expected one tilt for each of the {self.particles} particle(s)"
            )
        if self.scan_jitter and self.mode != "haadf":
            raise SettingsError(f"MovieSpec.scan_jitter is {self.scan_jitter!r} with mode hrtem; expected mode haadf")
        if self.defoci is not None and (self.mode != "hrtem" or not self.defoci):
            raise SettingsError(f"MovieSpec.defoci is {self.defoci!r} with mode {self.mode}; expected defoci for hrtem")

    @property
    def field_of_view(self) -> tuple[float, float]:
        """Height and width of the view [Å]."""
        return self.shape[0] * self.sampling, self.shape[1] * self.sampling

    @property
    def lens(self) -> Lens:
        """The objective lens."""
        return Lens(**{item.name: getattr(self, item.name) for item in fields(Lens)})

    @property
    def still(self) -> bool:
        """Whether nothing but drift and events changes, so that one wave serves many frames."""
        return self.kind != "field" and not (self.carbon_walk or self.vibration or self.rotation_step)

    @property
    def least_atoms(self) -> int:
        """Atoms that a column needs to count as visible."""
        return self.min_atoms if self.min_atoms is not None else (3 if self.kind == "nanoparticle" else 1)
