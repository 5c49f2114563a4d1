"""Schemas: all disagreements are listed; unwritten elements cannot be taken for results."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from schemas.columns import COLUMNS
from schemas.conventions import STATUS, STATUS_MEANING
from schemas.errors import SchemaError
from schemas.frames import FRAMES
from schemas.stack import STACK
from schemas.variables import Schema, Variable, check, problems

SCHEMA = Schema(
    "/things",
    "thing",
    (
        Variable("size", ("thing",), "float32", "angstrom", "how large"),
        Variable("name", ("thing",), "string", "", "what it is called"),
        Variable("count", ("thing", "kind"), "int32", "1", "how many"),
    ),
)


def things() -> xr.Dataset:
    size = xr.DataArray(np.zeros(2, "float32"), dims="thing", attrs={"units": "angstrom", "long_name": "how large"})
    name = xr.DataArray(np.array(["a", "b"]), dims="thing", attrs={"long_name": "what it is called"})
    count = xr.DataArray(np.zeros((2, 3), "int32"), dims=("thing", "kind"), attrs={"units": "1", "long_name": "n"})
    return xr.Dataset({"size": size, "name": name, "count": count})


def test_what_fits_passes() -> None:
    check(things(), SCHEMA)


def test_all_problems_are_listed_at_once() -> None:
    wrong = things().drop_vars("name")
    wrong["size"] = wrong["size"].astype("float64").assign_attrs(units="nm")
    wrong["count"] = wrong["count"].transpose()
    del wrong["count"].attrs["long_name"]
    with pytest.raises(SchemaError) as caught:
        check(wrong, SCHEMA)
    told = str(caught.value)
    assert told.startswith("5 problem(s) with group /things")
    assert "/things/size has dtype float64; expected float32" in told
    assert "/things/size has units 'nm'; expected 'angstrom'" in told
    assert "/things/name is missing; expected string over ('thing',)" in told
    assert "/things/count has dimensions ('kind', 'thing'); expected ('thing', 'kind')" in told
    assert "/things/count has no long_name; expected 'how many'" in told


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_counts_are_of_any_number_type(dtype: str) -> None:
    array = xr.DataArray(np.zeros((1, 2, 2), dtype), dims=("time", "y", "x"), attrs={"long_name": "counts"})
    told = problems(xr.Dataset({"counts": array}), STACK)
    assert not [line for line in told if "/counts has" in line]


def test_counts_are_numbers() -> None:
    array = xr.DataArray(np.array([[["a"]]]), dims=("time", "y", "x"), attrs={"long_name": "counts"})
    assert any("counts has dtype" in line for line in problems(xr.Dataset({"counts": array}), STACK))


@pytest.mark.parametrize("schema", [FRAMES, COLUMNS], ids=lambda schema: schema.group)
def test_fill_values_are_no_results(schema: Schema) -> None:
    for variable in schema.variables:
        fill = variable.fill_value
        if variable.name == "status":
            assert fill == STATUS["not_computed"]
        elif variable.dtype.startswith("float"):
            assert np.isnan(fill), variable.name
        elif variable.dtype.startswith("int"):
            assert fill == -1, variable.name
        else:
            assert fill == "", variable.name


@pytest.mark.parametrize("schema", [FRAMES, COLUMNS, STACK], ids=lambda schema: schema.group)
def test_every_variable_has_units_and_a_meaning(schema: Schema) -> None:
    assert len(set(schema.names)) == len(schema.names)
    for variable in schema.variables:
        assert variable.meaning
        assert variable.units or variable.dtype == "string", variable.name
        assert f"| `{variable.name}` |" in schema.table()


def test_what_the_design_asks_of_frames_and_columns_is_there() -> None:
    frames = {"time", "status", "drift_y", "drift_x", "drift_y_err", "drift_x_err", "column_count", "species_count"}
    frames |= {"dose", "snr", "device"}
    columns = {"frame", "y", "x", "y_err", "x_err", "intensity", "probability", "species", "species_probability"}
    assert frames <= set(FRAMES.names)
    assert columns <= set(COLUMNS.names)
    assert FRAMES["column_count"].attributes["sample_dimension"] == "column"


def test_status_is_a_flag_that_says_its_meanings() -> None:
    attributes = FRAMES["status"].attributes
    assert dict(zip(attributes["flag_meanings"].split(), attributes["flag_values"], strict=True)) == STATUS
    assert set(STATUS_MEANING) == set(STATUS)


def test_an_unknown_variable_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="nothing"):
        FRAMES["nothing"]
