"""The job: everything a user can set, with its default, unit and meaning. All scientific defaults live here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _none(cls, data: Any) -> Any:
        """Take the word none for nothing, where nothing is allowed: YAML itself only knows null."""
        if not isinstance(data, dict):
            return data
        optional = {name for name, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        return {name: None if value == "none" and name in optional else value for name, value in data.items()}


def _check_region(region: tuple[int, int, int, int] | None) -> tuple[int, int, int, int] | None:
    if region is not None:
        y0, y1, x0, x1 = region
        if not (0 <= y0 < y1 and 0 <= x0 < x1):
            raise ValueError(
                f"region {list(region)} is empty; expected [y0, y1, x0, x1] in pixels with y0 < y1, x0 < x1"
            )
    return region


def _check_frames(frames: tuple[int, int] | None) -> tuple[int, int] | None:
    if frames is not None and not 0 <= frames[0] < frames[1]:
        raise ValueError(f"frames {list(frames)} is empty; expected [first, end) with 0 <= first < end")
    return frames


class Source(Section):
    """What the files do not say, or say wrongly, and which part of them to use."""

    sampling: Positive | None = Field(None, description="Å per pixel; overrides the file")
    frame_interval: Positive | None = Field(None, description="seconds between frames; overrides the file")
    energy: Positive | None = Field(None, description="beam energy in keV; overrides the file")
    mode: Literal["hrtem", "haadf"] = Field("hrtem", description="imaging mode: hrtem or haadf")
    counts_per_electron: Positive | None = Field(
        None, description="detector counts per electron; fitted from the noise when absent, and dose is then left out"
    )
    defocus: tuple[float, ...] | None = Field(
        None, description="defoci in Å (> 0: underfocus) of a focal series whose frames follow each other"
    )
    defocus_plane: Annotated[int, Field(ge=0)] = Field(0, description="plane of a focal series that is processed")
    dataset: str | None = Field(None, description="path of the array inside an HDF5 or Zarr source")
    frames: Annotated[tuple[int, int] | None, AfterValidator(_check_frames)] = Field(
        None, description="[first, end): use only these frames, for a quick look"
    )
    region: Annotated[tuple[int, int, int, int] | None, AfterValidator(_check_region)] = Field(
        None, description="[y0, y1, x0, x1] in detector pixels: use only this region"
    )
    binning: Count = Field(1, description="sum n x n pixels into one")
    on_error: Literal["stop", "quarantine"] = Field(
        "stop", description="a damaged file: stop (the file is refused) or quarantine (its good frames are kept)"
    )


class Stacks(Section):
    """The chunked copy of the movie that everything else reads."""

    keep: bool = Field(True, description="keep FOLDER/stacks/<movie>.zarr after success")
    shard_megabytes: Positive = Field(64.0, description="uncompressed size of one shard, one file on disk")


class Blocks(Section):
    """How a movie is cut into tasks; never changes a result."""

    frames: Count | None = Field(None, description="frames that one task owns; default: by frame size, 4 to 16")


class Detector(Section):
    """From counts to electrons."""

    dark: Path | None = Field(None, description="dark reference, one image file of the detector's shape")
    gain: Path | None = Field(None, description="gain reference (multiplied), one image file of the detector's shape")
    bad_pixels: bool = Field(True, description="find hot and dead pixels in the data and repair them")
    bad_pixel_threshold: Positive = Field(7.0, description="how far outside, in sigma, a bad pixel lies")
    saturation: Positive | None = Field(None, description="counts at which the detector saturates; default: its dtype")
    max_saturated_fraction: Probability = Field(0.05, description="a frame with more saturated pixels is dropped")
    sample_frames: Count = Field(64, description="frames, spread over the movie, that bad pixels and noise come from")


class Drift(Section):
    """How the specimen moved."""

    correct: bool = Field(True, description="estimate drift; false: the specimen is taken to be still")
    anchor: Literal["frame", "support", "particle", "largest"] = Field(
        "frame",
        description="what stands still once drift is taken out: the view as a whole, what lies outside of particles, "
        "the particles, or the largest one",
    )
    lags: tuple[Count, ...] = Field((1, 2, 4, 8), description="frames apart of the pairs that are compared")
    band: tuple[Positive, Positive] = Field((0.01, 0.35), description="[low, high] frequencies used, cycles per pixel")
    taper: Probability = Field(0.15, description="part of the field, on each side, over which the window falls to zero")
    change: Probability = Field(0.0, description="part of the signal that changes for other reasons than drift")
    candidates: Count = Field(6, description="maxima of the correlation that are kept per pair")
    max_shift: Probability = Field(0.25, description="largest shift between two frames, as a part of the field")
    max_motion: Positive = Field(4.0, description="plausible motion from frame to frame in pixels; a scale, no limit")
    limit: Positive = Field(
        1.25, description="bound on small bright objects, in amplitudes that 90 % of the filtered image stays below"
    )
    cauchy: Positive = Field(2.5, description="residual, in standard errors, at which a pair counts half")
    defocus_shift: Positive = Field(
        6.0, description="plausible offset between the planes of a focal series in pixels; a scale, no limit"
    )


class Denoise(Section):
    """Self-supervised blind-spot denoising over neighbouring frames."""

    network: Literal["blindspot", "wcvd", "none"] = Field("blindspot", description="architecture; none: no denoising")
    tier: Literal["small", "medium", "large"] = Field(
        "large", description="blindspot of about 1.5, 5 or 20 thousand multiplications per pixel"
    )
    weights: str = Field(
        "adapt",
        description="pretrained | adapt (to each movie, from pretrained) | scratch | path of a safetensors file",
    )
    group: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="name of movies taken under equal conditions: they share the network adapted to the first of them "
        "in the job; none: each movie has its own",
    )
    blind: Literal["auto", "pixels", "frame"] = Field(
        "auto",
        description="what blindspot may not see of the frame that it estimates: its own 2 x 2 pixels, or all of it, as "
        "noise needs that is correlated between pixels; auto: by the noise measured",
    )
    motion: bool = Field(
        True, description="blindspot: follow parts of the view that move on their own between neighbouring frames"
    )
    steps: Count = Field(3000, description="most training steps of adapt and scratch, which end where more do not help")
    seed: int = Field(0, description="seed of the training")
    sample_frames: Count = Field(64, description="frames of the movie that adaptation may read")
    sample_side: Count = Field(512, description="edge in pixels of the regions that adaptation reads")
    crop: Count = Field(96, description="edge in pixels of a training crop")
    batch: Count = Field(6, description="crops per training step")
    learning_rate: Positive = Field(3e-3, description="largest learning rate of Adam")
    max_gap: Positive = Field(2.5, description="a longer gap, in median frame intervals, parts neighbours")
    tile: Count | None = Field(384, description="edge in pixels of a tile of inference; none: the whole frame")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="number format of the network; auto: bfloat16 where the processor has it"
    )

    graphs: bool = Field(
        False, description="on a GPU, replay the network's passes as CUDA graphs, checked against it; not tried yet"
    )

    @model_validator(mode="after")
    def _trained(self) -> Denoise:
        if self.group is not None and (self.network != "blindspot" or self.weights not in ("adapt", "scratch")):
            raise ValueError(
                f"group is {self.group!r}, but network {self.network} with weights {self.weights} trains nothing that "
                "movies could share; leave it out, or set network to blindspot and weights to adapt"
            )
        return self

    @model_validator(mode="after")
    def _hidden(self) -> Denoise:
        if self.blind == "frame" and self.network == "wcvd":
            raise ValueError("blind is frame, which network wcvd cannot be; expected network blindspot")
        return self


class Lowpass(Section):
    """Filter after denoising."""

    cutoff: Positive | Literal["information"] | None = Field(
        None,
        description="cut-off in 1/Å; information: the information limit, in hrtem of known energy; none: no filter",
    )
    focal_spread: Positive = Field(
        20.0,
        description="standard deviation of the focus in Å, by which the information limit is set; more: a lower one",
    )


class Segment(Section):
    """Where the network sees atomic columns."""

    model: str = Field("columns", description="name of shipped weights or path of a safetensors file")
    contrast: Literal["auto", "bright", "dark"] = Field(
        "auto", description="atoms bright or dark; auto: bright in haadf, voted by the network over the movie in hrtem"
    )
    window: Count | None = Field(
        768, description="largest edge of a window in pixels of the network; none: the whole frame"
    )
    halo: Count | None = Field(None, description="halo of a window on each side; none: what the network looks at")


class Columns(Section):
    """Atomic columns and their positions."""

    threshold: Probability = Field(0.4, description="least probability of a column")
    min_distance: Positive = Field(1.0, description="least distance of two columns in Å")
    min_significance: float = Field(1.0, description="least signal of a column in the counts of one frame, in sigma")
    min_evidence: float = Field(
        4.5, description="log-likelihood ratio in the counts below which a column is flagged as not supported"
    )
    min_relative: Probability = Field(
        0.25, description="hrtem: least signal of a column as a part of that of the frame's strong columns"
    )
    min_roundness: Probability = Field(
        0.55, description="least median roundness of columns near each other in a particle; below it they are fringes"
    )
    width: Positive = Field(0.5, description="standard deviation of a column's image in Å; a start if it is fitted")
    fit_width: bool = Field(True, description="fit one width per frame")
    margin: Annotated[float, Field(ge=0)] = Field(
        1.0, description="columns nearer to the edge of the view (Å) are left out"
    )
    displacement: Annotated[float, Field(ge=0)] = Field(
        0.015, description="Å by which the peak of a column's image lies off the column; added to its standard errors"
    )
    share: Probability = Field(0.3, description="how far a denoised position follows the noise of its own frame")


class Particles(Section):
    """Particles as a whole: where they are, how large, how they lie."""

    model: str | None = Field(
        "particles",
        description="name of shipped weights or path of a safetensors file; none: particles are not looked for",
    )
    threshold: Probability = Field(0.5, description="least probability of a pixel of a particle")
    min_area: Positive = Field(50.0, description="least area of a particle in Å²")
    max_hole: Annotated[float, Field(ge=0)] = Field(50.0, description="holes up to this area in Å² are filled")
    neck: Probability = Field(
        0.75, description="particles are parted where they touch along less than this part of the narrower one's width"
    )
    window: Count | None = Field(
        768, description="largest edge of a window in pixels of the network; none: the whole frame"
    )
    halo: Count | None = Field(None, description="halo of a window on each side; none: what the network looks at")


class Fourier(Section):
    """Whether the lattice of a particle, or of a frame without particles, is seen well enough to be interpreted."""

    band: tuple[Positive, Positive] = Field(
        (0.3, 0.9), description="[low, high] spatial frequencies of lattice peaks in 1/Å"
    )
    significance: Positive = Field(12.0, description="least power of a peak over the background at its frequency")
    threshold: Positive = Field(
        1.5, description="brightest-to-dimmest ratio of symmetric peaks up to which a lattice can be interpreted"
    )


class Species(Section):
    """What the columns are made of."""

    model: str | None = Field(
        None,
        description="mos2-hrtem | graphene-haadf | tmd-haadf | path of a safetensors file; none: every column is "
        "'unknown', or what `only` says",
    )
    threshold: Probability = Field(0.5, description="least probability of a site that the species model finds itself")
    margin: Annotated[float, Field(ge=0)] = Field(
        1.0, description="sites nearer to the edge of the view (Å) count for no vacancies"
    )
    window: Count | None = Field(
        768, description="largest edge of a window in pixels of the network; none: the whole frame"
    )
    only: str | None = Field(None, description="the one species that the movie holds, given to every column")


class Images(Section):
    """Pixels kept beside the numbers."""

    save: tuple[Literal["denoised", "uncertainty", "probability", "labels"], ...] = Field(
        (),
        description="images to keep: denoised, its uncertainty, probability (of columns), labels (of particles)",
    )
    examples: Annotated[int, Field(ge=0)] = Field(6, description="frames shown in the report")


class Settings(Section):
    """All science settings of one movie, resolved."""

    source: Source = Source()
    stacks: Stacks = Stacks()
    blocks: Blocks = Blocks()
    detector: Detector = Detector()
    drift: Drift = Drift()
    denoise: Denoise = Denoise()
    lowpass: Lowpass = Lowpass()
    segment: Segment = Segment()
    columns: Columns = Columns()
    particles: Particles = Particles()
    fourier: Fourier = Fourier()
    species: Species = Species()
    images: Images = Images()


def _check_name(name: str | None) -> str | None:
    if name is not None and (not name.strip() or name.startswith(".") or set(name) & set("/\\\0")):
        raise ValueError(f"name {name!r} cannot be a file name; expected one without slashes and leading dots")
    return name


class MovieEntry(Section):
    """One or several movies with settings of their own."""

    source: str | tuple[str, ...] = Field(description="file, folder or glob")
    name: Annotated[str | None, AfterValidator(_check_name)] = Field(
        None, description="name of the movie in the output folder"
    )
    set: dict[str, Any] = Field(default_factory=dict, description="settings that differ for this movie, section.key")


class Job(Settings):
    """A job file: movies, the folder for their runs, and settings common to all."""

    movies: tuple[MovieEntry, ...] = Field(description="what to process")
    output: Path = Field(description="folder of the runs")

    @model_validator(mode="after")
    def _some_movie(self) -> Job:
        if not self.movies:
            raise ValueError("movies is empty; expected at least one entry such as `- source: movie.tif`")
        return self
