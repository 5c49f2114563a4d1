"""Specimens, one file per family of structures: atoms in ångström around the centre of the view.

Positions are (y, x, z): y down and x right on the detector, z along the beam (the electron meets small z first).
A new family is one file with a function that returns a ``Specimen`` and one line in ``scene.crystal_of``.
"""

from __future__ import annotations

from pipeline.simulate.structures.film import carbon
from pipeline.simulate.structures.nanoparticle import ZONES, Particle, nanoparticle
from pipeline.simulate.structures.shapes import LATTICES, SHAPES
from pipeline.simulate.structures.sheet import SHEETS, sheet
from pipeline.simulate.structures.specimen import Sites, Specimen, empty, named, turned

__all__ = [
    "LATTICES", "SHAPES", "SHEETS", "ZONES", "Particle", "Sites", "Specimen", "carbon", "empty", "named",
    "nanoparticle", "sheet", "turned",
]  # fmt: skip
