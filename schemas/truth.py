"""The contract of the truth group of a simulated stack: what was where, in pixels of the detector."""

from __future__ import annotations

from schemas.conventions import ANGSTROM, DIMENSIONLESS, PIXEL, RADIAN
from schemas.variables import Schema, Variable

TRUTH_FRAMES = Schema(
    group="/truth",
    row="time",
    variables=(
        Variable("clean", ("time", "y", "x"), "float32", DIMENSIONLESS, "relative intensity without noise"),
        Variable("masks", ("time", "y", "x"), "uint16", DIMENSIONLESS, "particle's label (row + 1), 0 where none is"),
        Variable("drift", ("time", "axis"), "float64", PIXEL, "how the specimen moved since frame 0 (y, x)"),
        Variable("angle", ("time",), "float64", RADIAN, "how the specimen turned since frame 0, from y towards x"),
    ),
)
"""``clean`` has dimensions (time, defocus, y, x) in a focal series; there is ``plane_shifts`` (time, defocus, axis)."""

TRUTH_TABLES: dict[str, tuple[Variable, ...]] = {
    "column": (
        Variable("column_frame", ("column",), "int32", DIMENSIONLESS, "index of the frame along time"),
        Variable("column_id", ("column",), "int32", DIMENSIONLESS, "which column it is, the same in all frames"),
        Variable("column_y", ("column",), "float64", PIXEL, "position down the detector"),
        Variable("column_x", ("column",), "float64", PIXEL, "position across the detector"),
        Variable("column_atoms", ("column",), "int32", DIMENSIONLESS, "atoms of the column"),
        Variable("column_visible", ("column",), "bool", DIMENSIONLESS, "whether it must be found; if not it may be"),
        Variable("column_species", ("column",), "string", DIMENSIONLESS, "what the column is"),
        Variable("column_particle", ("column",), "int32", DIMENSIONLESS, "its particle's row, -1 for none"),
        Variable("column_site", ("column",), "int32", DIMENSIONLESS, "its lattice site, -1 for none"),
    ),
    "site": (
        Variable("site_frame", ("site",), "int32", DIMENSIONLESS, "index of the frame along time"),
        Variable("site_id", ("site",), "int32", DIMENSIONLESS, "which site it is, the same in all frames"),
        Variable("site_y", ("site",), "float64", PIXEL, "position down the detector"),
        Variable("site_x", ("site",), "float64", PIXEL, "position across the detector"),
        Variable("site_species", ("site",), "string", DIMENSIONLESS, "what the site holds; 0S or 0C if it is empty"),
    ),
    "event": (
        Variable("event_kind", ("event",), "string", DIMENSIONLESS, "appear, vanish, hop or coordination"),
        Variable("event_frame", ("event",), "int32", DIMENSIONLESS, "first frame of the new state"),
        Variable("event_column", ("event",), "int32", DIMENSIONLESS, "column_id (in a field: particle) it happens to"),
        Variable("event_to", ("event",), "int32", DIMENSIONLESS, "column_id that it becomes, -1 for none"),
        Variable("event_y", ("event",), "float64", PIXEL, "position down the detector in that frame"),
        Variable("event_x", ("event",), "float64", PIXEL, "position across the detector in that frame"),
        Variable("event_to_y", ("event",), "float64", PIXEL, "position it goes to"),
        Variable("event_to_x", ("event",), "float64", PIXEL, "position it goes to"),
        Variable("event_before", ("event",), "string", DIMENSIONLESS, "what the place held, or how it was bound"),
        Variable("event_after", ("event",), "string", DIMENSIONLESS, "what the place holds, or how it is bound"),
    ),
    "particle": (
        Variable("particle_y", ("particle",), "float64", ANGSTROM, "middle, down from the middle of the view"),
        Variable("particle_x", ("particle",), "float64", ANGSTROM, "middle, across from the middle of the view"),
        Variable("particle_radius", ("particle",), "float64", ANGSTROM, "radius"),
        Variable("particle_element", ("particle",), "string", DIMENSIONLESS, "element"),
        Variable("particle_shape", ("particle",), "string", DIMENSIONLESS, "shape"),
        Variable("particle_zone", ("particle",), "string", DIMENSIONLESS, "nearest zone axis; empty if twinned"),
        Variable("particle_tilt", ("particle",), "float64", "degree", "how far off that zone axis; NaN if twinned"),
    ),
}
"""One row per thing and frame (columns, sites) or per thing (events, particles), in the order of the frames."""
