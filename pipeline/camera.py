"""The body of the verb `mtf`: fit a camera from real frames, write what `simulate` needs and a picture of the fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.ingest.describe import SourceOverrides, describe
from pipeline.ingest.reading import read_frames
from pipeline.ingest.sources import discover
from pipeline.steps.mtf import DetectorFit, fit_dark, fit_detector, noise_power, transfer
from pipeline.steps.vacuum import Level, Region, find_vacuum, noise_spectra, third_moments
from schemas.errors import SettingsError

TOLERANCE = 0.2  # by which the slope of vacuum's spectrum may be off that of the flattest squares
MOST_FRAMES, MOST_PIXELS = 64, 160_000_000
TILES, TIMES = (128, 64, 32), 1.5  # px; the widest that fits so many times into a frame or region


@dataclass(frozen=True)
class Camera:
    """A fitted camera: the fit, the spectra it was made from, the regions, and a frame to show them on."""

    fit: DetectorFit
    levels: list[Level]
    regions: list[Region]
    frame: np.ndarray
    rounding: float
    source: str
    frames: int


def parse_region(text: str) -> Region:
    """A region from "top,left,height,width" [px]."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
        raise SettingsError(f"--region {text!r}; expected top,left,height,width in pixels, such as 0,0,512,512")
    top, left, height, width = (int(part) for part in parts)
    return top, left, height, width


def fit_camera(
    source: str,
    *,
    regions: list[Region],
    dark: str | None,
    offset: float | None,
    readout: float | None,
    dataset: str | None = None,
) -> Camera:
    """Fit MTF and noise from vacuum in at most 64 frames of a source, spread over it.

    regions: where only the beam is seen, chosen automatically where there are none; dark: a source without beam, from
    which offset and readout noise are taken unless they are given.
    """
    frames, rounding = _sample(source, dataset)
    notes: list[str] = []
    if dark is not None:
        unlit, unlit_rounding = _sample(dark, dataset)
        found = fit_dark(unlit, rounding=unlit_rounding)
        offset = found.offset if offset is None else offset
        readout = found.readout if readout is None else readout
        if found.clipped:
            notes.append("dark readings were cut off at zero; offset and readout are from those above")
    smallest = min(frames.shape[1:]) if not regions else min(min(region[2:]) for region in regions)
    tile = next((tile for tile in TILES if TIMES * tile <= smallest), TILES[-1])
    if not regions:
        tiles = find_vacuum(frames, tile=tile, tolerance=TOLERANCE)
        regions = [
            (int(top), int(left), tile, tile)
            for top, left, chosen in zip(tiles.top, tiles.left, tiles.chosen, strict=True)
            if chosen
        ]
    levels = noise_spectra(frames, regions, tile=tile)
    brightest = max(levels, key=lambda level: level.mean)
    third = third_moments(frames, regions, tile=tile, level=brightest) if readout is None else None
    fit = fit_detector(levels, offset=offset, readout=readout, rounding=rounding, third=third)
    fit = fit._replace(notes=(*notes, *fit.notes))
    return Camera(fit, levels, regions, frames.mean(0), rounding, source, len(frames))


def _sample(source: str, dataset: str | None) -> tuple[np.ndarray, float]:
    """Frames (time, y, x) float32 spread over a source, and the variance that rounding to whole counts gave them."""
    movies = discover([source], dataset=dataset).movies
    if len(movies) != 1:
        raise SettingsError(f"{source} holds {len(movies)} movies; name one of its files")
    # Frequencies are in cycles per pixel: neither sampling nor times matter here.
    description = describe(movies[0], SourceOverrides(sampling=1.0, frame_interval=1.0, dataset=dataset))
    good = np.flatnonzero(description.good_frames)
    count = int(min(len(good), MOST_FRAMES, max(2, MOST_PIXELS // int(np.prod(description.shape[1:])))))
    chosen = good[np.unique(np.linspace(0, len(good) - 1, count).astype(int))]
    frames = np.concatenate([read_frames(description, int(i), int(i) + 1) for i in chosen])
    rounding = 1 / 12 if np.issubdtype(frames.dtype, np.integer) else 0.0
    return frames.reshape(-1, *frames.shape[-2:]).astype(np.float32), rounding


def as_yaml(camera: Camera) -> str:
    """Fields of a movie's specification, with standard errors and what could not be known as comments."""
    fit = camera.fit
    lines = [
        f"# Camera fitted from {camera.frames} frame(s) of {Path(camera.source).name}, {len(camera.regions)} place(s),",
        f"# mean reading {', '.join(f'{signal:.4g}' for signal in fit.signal)} counts, chi² per ring {fit.chi2:.2f}.",
        "# Fields of a specification for `colonnade simulate`; lengths of the MTF in cycles per pixel.",
        *(f"# Note: {note}." for note in fit.notes),
    ]
    if fit.mtf is not None:
        errors = ", ".join("-" if np.isnan(e) else f"{e:.2g}" for e in fit.mtf_errors)
        lines += [
            f"mtf: [{', '.join(f'{value:.6g}' for value in fit.mtf)}]  # c0, c1, c2, c3; standard errors {errors}",
            "noise: integrating",
        ]
    else:
        lines.append("noise: counting")
    for name, value, error in (
        ("counts_per_electron", fit.counts_per_electron, fit.counts_per_electron_error),
        ("offset", fit.offset, fit.offset_error),
        ("readout", fit.readout, fit.readout_error),
    ):
        lines.append(f"{name}: {value:.6g}  # {'not fitted' if np.isnan(error) else f'± {error:.2g}'}")
    return "\n".join(lines) + "\n"


def draw(camera: Camera, path: Path) -> None:
    """Write a PNG: the mean frame with its vacuum, the noise spectrum against the fit, and the MTF."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    image, spectrum, curve = figure.subplots(1, 3)
    _show_frame(image, camera)
    k = np.linspace(0, 0.72, 200)
    for level in camera.levels:
        spectrum.plot(level.k, level.power, ".", ms=3, label=f"measured at {level.mean:.4g} counts")
        power = noise_power(k, camera.fit, level.mean, rounding=camera.rounding)
        spectrum.plot(k, power, "-", color="black", lw=1, label="fit" if level is camera.levels[0] else None)
    floor = camera.fit.readout**2 + camera.rounding
    if floor > 0:
        spectrum.axhline(floor, color="grey", ls=":", lw=1, label="readout and rounding")
    lowest, highest = (pick(float(pick(level.power)) for level in camera.levels) for pick in (min, max))
    spectrum.set_ylim(lowest / 3, highest * 3)
    spectrum.set(yscale="log", xlabel="cycles per pixel", ylabel="noise power [counts² per pixel]")
    spectrum.set_title(f"noise spectrum, chi² {camera.fit.chi2:.2f}")
    spectrum.legend(fontsize=8, frameon=False)
    curve.plot(k, transfer(k, camera.fit.mtf), color="black", lw=1)
    for level in camera.levels:
        shot = camera.fit.counts_per_electron * (level.mean - camera.fit.offset)
        curve.plot(level.k, np.sqrt(np.maximum(level.power - floor, 0) / shot), ".", ms=3)
    curve.axvline(0.5, color="grey", ls=":", lw=1)
    curve.set(xlabel="cycles per pixel", ylabel="MTF", ylim=(0, 1.15), xlim=(0, 0.72))
    values = camera.fit.mtf
    curve.set_title("no blur" if values is None else "c0 {:.3g}, c1 {:.3g}, c2 {:.3g}, c3 {:.3g}".format(*values))
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _show_frame(axes: Axes, camera: Camera) -> None:
    step = max(1, max(camera.frame.shape) // 800)
    shown = camera.frame[::step, ::step]
    low, high = np.quantile(shown, [0.005, 0.995])
    height, width = camera.frame.shape
    axes.imshow(shown, cmap="gray", vmin=low, vmax=high, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    for top, left, h, w in camera.regions:
        axes.add_patch(Rectangle((left, top), w, h, fill=False, edgecolor="#56b4e9", lw=0.8))
    axes.set_title(f"mean of {camera.frames} frame(s); blue: vacuum")


def run_mtf(
    source: str, output: Path, *, report: Callable[[str], None], regions: list[Region], dark: str | None,
    offset: float | None, readout: float | None, dataset: str | None = None,
) -> Camera:  # fmt: skip
    """Fit a camera, write its YAML and the picture beside it, and report what was found."""
    camera = fit_camera(source, regions=regions, dark=dark, offset=offset, readout=readout, dataset=dataset)
    output.parent.mkdir(parents=True, exist_ok=True)
    text = as_yaml(camera)
    output.write_text(text)
    draw(camera, output.with_suffix(".png"))
    report(text.rstrip())
    report(f"wrote {output} and {output.with_suffix('.png')}")
    return camera
