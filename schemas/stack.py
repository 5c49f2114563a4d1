"""The contract of a stack: counts on disk, calibrated, with nothing interpreted yet."""

from __future__ import annotations

from schemas.conventions import ANGSTROM, DIMENSIONLESS, SECOND
from schemas.variables import Schema, Variable

STACK = Schema(
    group="/",
    row="time",
    variables=(
        Variable("counts", ("time", "y", "x"), "any", "counts", "counts as the detector wrote them"),
        Variable("time", ("time",), "float64", SECOND, "time stamp of the frame since the first"),
        Variable("y", ("y",), "float64", ANGSTROM, "position of the pixel centre down the detector"),
        Variable("x", ("x",), "float64", ANGSTROM, "position of the pixel centre across the detector"),
        Variable(
            "frame_ok",
            ("time",),
            "int8",
            DIMENSIONLESS,
            "1 where the frame was read, 0 where the file was damaged, -1 before ingest has finished",
        ),
    ),
)
"""``counts`` has dimensions (time, defocus, y, x) in a focal series, with a coordinate ``defocus`` [angstrom]."""

STACK_ATTRIBUTES = ("colonnade", "ome", "sampling", "energy", "counts_per_electron", "detector", "dose", "source")
"""Attributes of the group; ``source`` holds files with content hashes and the vendor metadata as read."""
