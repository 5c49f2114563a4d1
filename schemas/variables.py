"""What a stored variable must look like, said once; writer, checker and documentation are derived from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from schemas.errors import SchemaError


@dataclass(frozen=True)
class Variable:
    """One array of a group: its dimensions, type ("any": the detector's), units and meaning.

    ``fill`` is what an element reads as before it is written: chosen so that it cannot be taken for a result.
    An ``optional`` one exists only where its dimensions do, such as those over defocus in focal series.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str
    units: str
    meaning: str
    fill: Any = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False

    @property
    def fill_value(self) -> Any:
        """Value of elements that were never written."""
        if self.fill is not None:
            return self.fill
        kind = np.dtype(self.dtype).kind if self.dtype != "string" else "U"
        return {"f": float("nan"), "i": -1, "u": 0, "b": False, "U": ""}[kind]

    @property
    def attributes(self) -> dict[str, Any]:
        """CF attributes stored beside the array."""
        units = {} if self.dtype in ("string", "bool") else {"units": self.units}
        return {"long_name": self.meaning, **units, **self.attrs}


@dataclass(frozen=True)
class Schema:
    """The variables that one group must hold."""

    group: str
    row: str
    variables: tuple[Variable, ...]

    def __getitem__(self, name: str) -> Variable:
        for variable in self.variables:
            if variable.name == name:
                return variable
        raise KeyError(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all variables, in stored order."""
        return tuple(variable.name for variable in self.variables)

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the variables that every store of ours holds."""
        return tuple(variable.name for variable in self.variables if not variable.optional)

    def table(self) -> str:
        """The schema as a Markdown table, for the documentation."""
        lines = [f"| `{self.group}` variable | dims | dtype | units | meaning |", "|---|---|---|---|---|"]
        lines += [f"| `{v.name}` | {', '.join(v.dims)} | {v.dtype} | {v.units} | {v.meaning} |" for v in self.variables]
        return "\n".join(lines)


def _dtype_matches(found: np.dtype[Any], wanted: str) -> bool:
    if wanted == "any":
        return found.kind in "iuf"
    if wanted == "string":
        return found.kind in "UTO"
    return found == np.dtype(wanted)


def problems(dataset: Any, schema: Schema) -> list[str]:
    """All disagreements between an xarray-like dataset and a schema, as sentences.

    ``dataset`` maps names to arrays with ``dims``, ``dtype`` and ``attrs``.
    """
    found = []
    for variable in schema.variables:
        where = f"{schema.group}/{variable.name}"
        if variable.name not in dataset:
            if variable.optional:
                continue
            found.append(f"{where} is missing; expected {variable.dtype} over {variable.dims}")
            continue
        array = dataset[variable.name]
        if tuple(array.dims) != variable.dims:
            found.append(f"{where} has dimensions {tuple(array.dims)}; expected {variable.dims}")
        if not _dtype_matches(array.dtype, variable.dtype):
            found.append(f"{where} has dtype {array.dtype}; expected {variable.dtype}")
        units = variable.attributes.get("units")
        if units is not None and array.attrs.get("units", units) != units:
            found.append(f"{where} has units {array.attrs.get('units')!r}; expected {units!r}")
        if "long_name" not in array.attrs:
            found.append(f"{where} has no long_name; expected {variable.meaning!r}")
    return found


def check(dataset: Any, schema: Schema) -> None:
    """Raise a ``SchemaError`` that lists every disagreement at once."""
    if found := problems(dataset, schema):
        raise SchemaError(f"{len(found)} problem(s) with group {schema.group}:\n  " + "\n  ".join(found))
