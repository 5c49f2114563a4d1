"""Axes, origin, signs and units: the one place that says what a number means.

Axes are ``(time, y, x)``, or ``(time, defocus, y, x)`` for focal series. The origin is the top-left corner, y points
down, and pixel centres lie on integers. Lengths are in ångström, times in seconds, energies in keV, dose in electrons
per square ångström and frame. *drift* is how the specimen moved since frame 0; *shift* = -drift is what is applied to
a frame to bring it back. defocus > 0 is underfocus. Positions stored in results are in the specimen frame, that is in
the axes of frame 0 of the detector with drift removed: ``x_det = x + drift``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCHEMA_VERSION = 1
"""Version of the layout of stacks and runs; a store with a newer one is refused."""

ANGSTROM = "angstrom"
ANGSTROM2 = "angstrom2"
RADIAN = "radian"
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

CONTACT = {"free": 0, "border": 1, "touching": 2, "both": 3}
"""Values of ``/particles/contact``: cut by the border of the view (1), touching another particle (2), or both."""

INTERPRETABLE = {"no": 0, "yes": 1}
"""Values of ``interpretable``; -1 where nothing was computed, and of columns in no particle."""

SUPPORTED = {"no": 0, "yes": 1}
"""Values of ``supported``."""


def flags_of(words: Mapping[str, int]) -> dict[str, Any]:
    """CF attributes of a variable whose values stand for words."""
    return {"flag_values": list(words.values()), "flag_meanings": " ".join(words)}


UNKNOWN_SPECIES = "unknown"
"""Species of a column while no species model is set."""
