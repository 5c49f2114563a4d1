"""The contract of ``/particles``: one row per particle and frame, contiguous ragged over time."""

from __future__ import annotations

from schemas.conventions import ANGSTROM, ANGSTROM2, CONTACT, DIMENSIONLESS, INTERPRETABLE, RADIAN, flags_of
from schemas.variables import Schema, Variable

_ROW = ("particle",)

PARTICLES = Schema(
    group="/particles",
    row="particle",
    variables=(
        Variable("frame", _ROW, "int32", DIMENSIONLESS, "index of the frame along time"),
        Variable("y", _ROW, "float64", ANGSTROM, "centroid down, in the specimen frame (drift removed)"),
        Variable("x", _ROW, "float64", ANGSTROM, "centroid across, in the specimen frame (drift removed)"),
        Variable("area", _ROW, "float32", ANGSTROM2, "projected area, as far as it lies in the field of view"),
        Variable("equivalent_diameter", _ROW, "float32", ANGSTROM, "diameter of the circle of that area"),
        Variable("perimeter", _ROW, "float32", ANGSTROM, "length of the outline"),
        Variable(
            "orientation", _ROW, "float32", RADIAN,
            "angle of the major axis from x towards y (down), in (-pi/2, pi/2]; that of the ellipse of equal moments",
        ),
        Variable("major_axis", _ROW, "float32", ANGSTROM, "full length of that ellipse"),
        Variable("minor_axis", _ROW, "float32", ANGSTROM, "full width of that ellipse"),
        Variable(
            "contact", _ROW, "int8", DIMENSIONLESS, "what the particle touches: the border of the view, another one",
            attrs=flags_of(CONTACT),
        ),
        Variable("probability", _ROW, "float32", DIMENSIONLESS, "mean probability of its pixels given by the network"),
        Variable(
            "fourier_ratio", _ROW, "float32", DIMENSIONLESS,
            "brightest to dimmest symmetric pair of peaks in its Fourier transform; NaN where there are not two",
        ),
        Variable("lattice_spacing_1", _ROW, "float32", ANGSTROM, "widest lattice spacing seen in it; NaN without"),
        Variable("lattice_spacing_2", _ROW, "float32", ANGSTROM, "the next in another direction; NaN without"),
        Variable("zone", _ROW, "string", "", "zone axis that the spacings and their angle fit; empty where none does"),
        Variable(
            "interpretable", _ROW, "int8", DIMENSIONLESS,
            "whether the lattice is seen well enough for its columns to be trusted (fourier.threshold)",
            attrs=flags_of(INTERPRETABLE),
        ),
    ),
)  # fmt: skip
