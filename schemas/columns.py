"""The contract of ``/columns``: one row per atomic column and frame, contiguous ragged over time."""

from __future__ import annotations

from schemas.conventions import ANGSTROM, DIMENSIONLESS, ELECTRON, INTERPRETABLE, SUPPORTED, flags_of
from schemas.variables import Schema, Variable

_ROW = ("column",)

COLUMNS = Schema(
    group="/columns",
    row="column",
    variables=(
        Variable("frame", _ROW, "int32", DIMENSIONLESS, "index of the frame along time"),
        Variable("y", _ROW, "float64", ANGSTROM, "position down, in the specimen frame (drift removed)"),
        Variable("x", _ROW, "float64", ANGSTROM, "position across, in the specimen frame (drift removed)"),
        Variable("y_err", _ROW, "float32", ANGSTROM, "standard error of y within the frame (drift error not included)"),
        Variable("x_err", _ROW, "float32", ANGSTROM, "standard error of x within the frame (drift error not included)"),
        Variable("intensity", _ROW, "float32", ELECTRON, "electrons in the peak above background; < 0 for dark atoms"),
        Variable("intensity_err", _ROW, "float32", ELECTRON, "standard error of intensity"),
        Variable("background", _ROW, "float32", ELECTRON, "electrons per pixel under the peak"),
        Variable(
            "significance", _ROW, "float32", DIMENSIONLESS,
            "signal-to-noise ratio that the denoised peak has in the counts of the frame alone",
        ),
        Variable(
            "evidence", _ROW, "float32", DIMENSIONLESS,
            "log-likelihood ratio (nat) of a column against none, by the counts of the frames that the denoiser saw; "
            "< 0: they show the opposite",
        ),
        Variable(
            "supported", _ROW, "int8", DIMENSIONLESS,
            "whether the counts support the column (columns.min_evidence)", attrs=flags_of(SUPPORTED),
        ),
        Variable(
            "roundness", _ROW, "float32", DIMENSIONLESS,
            "least over greatest curvature of its image in the denoised frame: 1 round, 0 a fringe",
        ),
        Variable("probability", _ROW, "float32", DIMENSIONLESS, "probability of a column given by the network"),
        Variable("species", _ROW, "string", "", "atomic species of the column; 'unknown' without a species model"),
        Variable("species_probability", _ROW, "float32", DIMENSIONLESS, "probability of that species"),
        Variable("particle", _ROW, "int32", DIMENSIONLESS, "row among the particles of its frame; -1: in none"),
        Variable("particle_ratio", _ROW, "float32", DIMENSIONLESS, "fourier_ratio of that particle; NaN in none"),
        Variable(
            "particle_interpretable", _ROW, "int8", DIMENSIONLESS,
            "whether the columns of that particle can be trusted, by its lattice (fourier.threshold); -1: in none",
            attrs=flags_of(INTERPRETABLE),
        ),
    ),
)  # fmt: skip
