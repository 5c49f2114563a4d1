"""The contract of ``/frames``: one row per frame of the movie."""

from __future__ import annotations

from schemas.conventions import ANGSTROM, DIMENSIONLESS, DOSE, ELECTRON, INTERPRETABLE, SECOND, STATUS, flags_of
from schemas.variables import Schema, Variable

_TIME = ("time",)

FRAMES = Schema(
    group="/frames",
    row="time",
    variables=(
        Variable("time", _TIME, "float64", SECOND, "time stamp of the frame since the first"),
        Variable(
            "status", _TIME, "int8", DIMENSIONLESS, "what is known of the frame", STATUS["not_computed"],
            attrs=flags_of(STATUS),
        ),
        Variable("reason", _TIME, "string", "", "why the frame was dropped or failed; empty where it was measured"),
        Variable("drift_y", _TIME, "float64", ANGSTROM, "drift down the detector since the first frame"),
        Variable("drift_x", _TIME, "float64", ANGSTROM, "drift across the detector since the first frame"),
        Variable("drift_y_err", _TIME, "float64", ANGSTROM, "standard error of drift_y"),
        Variable("drift_x_err", _TIME, "float64", ANGSTROM, "standard error of drift_x"),
        Variable(
            "column_count",
            _TIME,
            "int32",
            DIMENSIONLESS,
            "columns found in the frame; -1 where nothing was computed",
            attrs={"sample_dimension": "column"},
        ),
        Variable(
            "particle_count", _TIME, "int32", DIMENSIONLESS,
            "particles found in the frame; -1 where nothing was computed", attrs={"sample_dimension": "particle"},
        ),
        Variable(
            "species_count",
            ("time", "species_class"),
            "int32",
            DIMENSIONLESS,
            "columns of each species; -1 where nothing was computed",
        ),
        Variable(
            "vacancy_count", _TIME, "int32", DIMENSIONLESS,
            "atoms missing in the frame, by the species model; -1 where none was used",
        ),
        Variable(
            "vacancy_count_err", _TIME, "float32", DIMENSIONLESS,
            "standard error of vacancy_count, from the probabilities of the species; NaN where none was used",
        ),
        Variable(
            "fourier_ratio", _TIME, "float32", DIMENSIONLESS,
            "brightest to dimmest symmetric pair of peaks in the Fourier transform: of the largest particle that has "
            "two, of the whole frame where there is no particle; NaN without",
        ),
        Variable(
            "interpretable", _TIME, "int8", DIMENSIONLESS,
            "whether the columns of the frame can be trusted, by its fourier_ratio (fourier.threshold)",
            attrs=flags_of(INTERPRETABLE),
        ),
        Variable(
            "defocus", ("defocus",), "float64", ANGSTROM,
            "defocus of a plane, positive: underfocus; in focal series only", optional=True,
        ),
        Variable(
            "defocus_shift_y", ("time", "defocus"), "float64", ANGSTROM,
            "how far down the view lies in a plane against the plane that is processed; in focal series only",
            optional=True,
        ),
        Variable(
            "defocus_shift_x", ("time", "defocus"), "float64", ANGSTROM,
            "how far across the view lies in a plane against the plane that is processed; in focal series only",
            optional=True,
        ),
        Variable("mean_electrons", _TIME, "float32", ELECTRON, "mean electrons (or effective electrons) per pixel"),
        Variable("dose", _TIME, "float32", DOSE, "electrons per area and frame; NaN where counts are uncalibrated"),
        Variable("snr", _TIME, "float32", DIMENSIONLESS, "standard deviation of the denoised frame over that of noise"),
        Variable(
            "residual_spread", _TIME, "float32", DIMENSIONLESS,
            "rms of measured less denoised frame over the noise predicted; 1: all noise was taken and nothing else",
        ),
        Variable(
            "residual_correlation", _TIME, "float32", DIMENSIONLESS,
            "correlation of that difference between pixels at most 3 apart, the largest in size; 0 if it is white",
        ),
        Variable("saturated_fraction", _TIME, "float32", DIMENSIONLESS, "share of pixels at or above saturation"),
        Variable("denoiser", _TIME, "string", "", "weights that denoised the frame"),
        Variable("device", _TIME, "string", "", "device, number format and torch build that computed the frame"),
    ),
)  # fmt: skip
