"""Axes, origin, signs and units: the one place that says what a number means.

Axes are ``(time, y, x)``, or ``(time, defocus, y, x)`` for focal series. The origin is the top-left corner, y points
down, and pixel centres lie on integers. Lengths are in ångström, times in seconds, energies in keV, dose in electrons
per square ångström and frame. *drift* is how the specimen moved since frame 0; *shift* = -drift is what is applied to
a frame to bring it back. defocus > 0 is underfocus. Positions stored in results are in the specimen frame, that is in
the axes of frame 0 of the detector with drift removed: ``x_det = x + drift``.
"""

from __future__ import annotations

SCHEMA_VERSION = 1
"""Version of the layout of stacks and runs; a store with a newer one is refused."""

ANGSTROM = "angstrom"
SECOND = "s"
DIMENSIONLESS = "1"
ELECTRON = "electron"
DOSE = "electron angstrom-2"
PIXEL = "pixel"
KEV = "keV"

STATUS = {"measured": 0, "dropped": 1, "failed": 2, "not_computed": 3}
"""Values of ``/frames/status``. The fill value of an unwritten store is *not_computed*."""

STATUS_MEANING = {
    "measured": "the frame was processed",
    "dropped": "the frame was found unusable in the data (not finite, empty, saturated, missing in a damaged file)",
    "failed": "the block of the frame failed; see the ledger",
    "not_computed": "nothing has been computed for the frame yet",
}

UNKNOWN_SPECIES = "unknown"
"""Species of a column while no species model is set."""
