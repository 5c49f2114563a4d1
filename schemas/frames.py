"""The contract of ``/frames``: one row per frame of the movie."""

from __future__ import annotations

from schemas.conventions import ANGSTROM, DIMENSIONLESS, DOSE, ELECTRON, SECOND, STATUS
from schemas.variables import Schema, Variable

_FLAGS = {"flag_values": list(STATUS.values()), "flag_meanings": " ".join(STATUS)}
_TIME = ("time",)

FRAMES = Schema(
    group="/frames",
    row="time",
    variables=(
        Variable("time", _TIME, "float64", SECOND, "time stamp of the frame since the first"),
        Variable(
            "status", _TIME, "int8", DIMENSIONLESS, "what is known of the frame", STATUS["not_computed"], attrs=_FLAGS
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
            "species_count",
            ("time", "species_class"),
            "int32",
            DIMENSIONLESS,
            "columns of each species; -1 where nothing was computed",
        ),
        Variable("mean_electrons", _TIME, "float32", ELECTRON, "mean electrons (or effective electrons) per pixel"),
        Variable("dose", _TIME, "float32", DOSE, "electrons per area and frame; NaN where counts are uncalibrated"),
        Variable("snr", _TIME, "float32", DIMENSIONLESS, "standard deviation of the denoised frame over that of noise"),
        Variable("saturated_fraction", _TIME, "float32", DIMENSIONLESS, "share of pixels at or above saturation"),
        Variable("denoiser", _TIME, "string", "", "weights that denoised the frame"),
        Variable("device", _TIME, "string", "", "device, number format and torch build that computed the frame"),
    ),
)
