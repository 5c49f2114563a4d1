"""What a query gives is the same in every format."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import xarray as xr

from pipeline.results import export
from pipeline.results.open import open_run
from pipeline.results.query import query
from schemas import columns as schema
from schemas.errors import SettingsError

CONDITION = "significance > 8 or snr < 2"
COLUMNS = {variable.name: variable.attrs for variable in schema.COLUMNS.variables}


def _read(path: Path, format: str) -> pd.DataFrame:
    if format == "csv":
        return pd.read_csv(path, keep_default_na=False, na_values={"dose": [""], "snr": [""]})
    if format == "parquet":
        return pd.read_parquet(path)
    with xr.open_dataset(path, engine="h5netcdf") as dataset:
        return dataset.to_dataframe().reset_index(drop="column" in dataset.dims)


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("format", ["csv", "parquet", "netcdf"])
def test_columns_survive_each_format(run_path: Path, tmp_path: Path, format: str, rows: int) -> None:
    answer = query(run_path, CONDITION, table="columns", rows=rows)
    whole = answer.to_dataframe()
    assert 0 < len(whole) < 10
    assert export.write(answer, tmp_path / "out", format) == len(whole)
    found = _read(tmp_path / "out", format)
    assert sorted(found.columns) == sorted(whole.columns)
    for name in whole.columns:
        if whole[name].dtype.kind == "f":
            assert np.allclose(found[name], whole[name], rtol=1e-6), name
        elif format != "netcdf" or "flag_meanings" not in COLUMNS.get(name, {}):  # there flags stay numbers
            assert found[name].tolist() == whole[name].tolist(), name


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_flags_are_words(run_path: Path, tmp_path: Path, format: str) -> None:
    export.write(query(run_path, table="frames"), tmp_path / "out", format)
    found = _read(tmp_path / "out", format)
    assert found["status"].tolist() == ["measured", "measured", "dropped", "measured", "measured", "not_computed"]
    assert np.isnan(found["dose"][2])


def test_netcdf_keeps_flags_units_and_integers(run_path: Path, tmp_path: Path) -> None:
    export.write(query(run_path, table="frames"), tmp_path / "out.nc", "netcdf")
    with xr.open_dataset(tmp_path / "out.nc", engine="h5netcdf") as found:
        assert found["status"].values.tolist() == [0, 0, 1, 0, 0, 3]
        assert found["status"].attrs["flag_meanings"].split()[1] == "dropped"
        assert found["column_count"].dtype == np.int32
        assert found["column_count"].values.tolist() == [3, 0, -1, 5, 2, -1]
        assert "sample_dimension" not in found["column_count"].attrs
        assert found["drift_x"].attrs["units"] == "angstrom"
        assert found["drift_x"].dims == ("time",)
        assert found["time"].values.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
        assert found.attrs["Conventions"].startswith("CF-")


def test_parquet_says_the_units(run_path: Path, tmp_path: Path) -> None:
    export.write(query(run_path, table="columns"), tmp_path / "out.parquet", "parquet")
    field = pq.read_schema(tmp_path / "out.parquet").field("y")
    assert field.metadata[b"units"] == b"angstrom"
    assert b"specimen frame" in field.metadata[b"long_name"]


@pytest.mark.parametrize("format", ["csv", "parquet", "netcdf"])
def test_an_empty_answer_still_has_its_variables(run_path: Path, tmp_path: Path, format: str) -> None:
    answer = query(run_path, "probability > 2", select=["x", "species"])
    assert export.write(answer, tmp_path / "out", format) == 0
    found = _read(tmp_path / "out", format)
    assert (sorted(found.columns), len(found)) == (["species", "x"], 0)


def test_movies_are_named_in_a_file_of_several(make_run, tmp_path: Path) -> None:
    make_run("b")
    make_run("a", counts=(1, 2))
    export.write(query(tmp_path, "column_count > 1", select=["column_count"]), tmp_path / "out.nc", "netcdf")
    with xr.open_dataset(tmp_path / "out.nc", engine="h5netcdf") as found:
        assert found["movie"].values.tolist() == ["a", "b", "b", "b"]
        assert found["column_count"].dims == ("row",)


def test_a_failed_write_leaves_the_old_file(run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.csv").write_text("old")
    answer = query(run_path, table="columns", rows=2)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match="disk full"):
        export.write(answer, tmp_path / "out.csv", "csv")
    assert (tmp_path / "out.csv").read_text() == "old"
    assert not list(tmp_path.glob(".*partial"))


def test_unknown_formats_and_folders_are_refused(run_path: Path, tmp_path: Path) -> None:
    answer = query(run_path)
    with pytest.raises(
        SettingsError, match="format 'xlsx' cannot be written to a file; expected one of csv, parquet, netcdf"
    ):
        export.write(answer, tmp_path / "out", "xlsx")
    with pytest.raises(SettingsError, match="does not exist"):
        export.write(answer, tmp_path / "nowhere" / "out.csv", "csv")


def test_csv_can_go_to_a_stream(run_path: Path) -> None:
    stream = io.StringIO()
    assert export.write_csv(query(run_path, "column_count > 2", select=["frame", "snr"], rows=2), stream) == 2
    assert stream.getvalue() == "frame,snr\n0,1.0\n3,4.0\n"


def test_the_text_shows_units_and_totals(run_path: Path) -> None:
    text = export.as_text(query(run_path, table="columns", select=["x", "species"], rows=3), limit=4)
    lines = text.splitlines()
    assert lines[0].split() == ["x", "[Å]", "species"]
    assert len(lines) == 1 + 4 + 1
    assert lines[-1] == "4 of 10 columns"
    first = float(open_run(run_path)["columns/x"].values[0])
    assert float(lines[1].split()[0]) == pytest.approx(first, rel=1e-4)
    assert export.as_text(query(run_path, "snr > 100")) == "0 frames"
    assert export.as_text(query(run_path, "snr > 4.5"), limit=None).splitlines()[-1] == "1 frame"
