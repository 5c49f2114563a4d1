"""From what a file says to Å and s, or to an error that shows the value and the setting."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile

from pipeline.ingest import calibration
from pipeline.ingest.calibration import Findings
from pipeline.ingest.describe import Description, SourceOverrides, describe
from pipeline.ingest.facts import Clock, Spacing, json_able
from pipeline.ingest.reading import read_frames
from pipeline.ingest.sources import discover
from schemas.errors import SourceError

SQUARE = "the pixels are not square"


def one(path: Path, **overrides: object) -> Description:
    (files,) = discover([path]).movies
    return describe(files, SourceOverrides(**overrides))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.02, "nm", 0.2), (0.02, " n_m ", 0.2), (20, "pm", 0.2), (0.2, "Å", 0.2), (0.2, "A", 0.2),
        (0.2, "angstrom", 0.2),
        (2e-5, "µm", 0.2), (2e-5, "μm", 0.2), (2e-5, "um", 0.2), (2e-8, "mm", 0.2), (2e-11, "m", 0.2),
        (0.02, "nanometer", 0.2), (2e-5, "micron", 0.2),
    ],
)  # fmt: skip
def test_units_of_length(value: float, unit: str, expected: float) -> None:
    findings = Findings()
    assert calibration.sampling(Spacing(value, unit, value, unit, "a test"), None, findings) == pytest.approx(expected)
    assert not findings.problems


@pytest.mark.parametrize(
    ("y", "y_unit", "x", "x_unit", "told"),
    [
        (0.0, "nm", 0.0, "nm", "0 nm"),
        (-1.0, "nm", -1.0, "nm", "-1 nm"),
        (math.nan, "nm", 0.1, "nm", "nan nm"),
        (math.inf, "nm", math.inf, "nm", "inf nm"),
        (0.1, "", 0.1, "", "has no unit"),
        (0.1, "px", 0.1, "px", "unknown unit 'px'"),
        (0.1, "mrad", 0.1, "mrad", "unknown unit 'mrad'"),
        *((0.1, unit, 0.1, unit, "reciprocal") for unit in ("1/nm", "nm^-1", "1 / nm", "nm⁻¹", "1/n_m", "1/Å")),
        (0.1, "nm", 0.1, "1/nm", "reciprocal"),
        (2.0, "A", 1.0, "nm", "2 Å × 10 Å"),
        (3.0, "nm", 2.0, "pm", "3 nm (y) × 2 pm (x)"),
        (15.0, "µm", 15.0, "µm", "15 µm"),
    ],
)
def test_doubtful_pixel_sizes_are_refused(y: float, y_unit: str, x: float, x_unit: str, told: str) -> None:
    findings = Findings()
    result = calibration.sampling(Spacing(y, y_unit, x, x_unit, "a test"), None, findings)
    assert math.isnan(result)
    (problem,) = findings.problems
    assert told in problem
    assert "a test" in problem
    assert "--set source.sampling=0.17" in problem


def test_rounding_is_not_a_rectangle() -> None:
    assert calibration.sampling(Spacing(0.1, "nm", 0.10005, "nm", ""), None, Findings()) == pytest.approx(1.00025)
    findings = Findings()
    calibration.sampling(Spacing(0.1, "nm", 0.1002, "nm", ""), None, findings)
    assert SQUARE in findings.problems[0]


def test_overrides_win_and_are_recorded(write: SimpleNamespace, tmp_path: Path) -> None:
    path = write.velox(tmp_path / "a.emd", {"HAADF": write.movie(3)}, pixel=2e-11)
    described = one(path, sampling=0.3, frame_interval=2.0, energy=80.0, counts_per_electron=4.0)
    assert (described.sampling, described.time, described.energy) == (0.3, (0.0, 2.0, 4.0), 80.0)
    assert described.counts_per_electron == 4.0
    told = "\n".join(described.notes)
    assert "0.2 Å/px (the Velox metadata) in the file -> source.sampling = 0.3" in told
    assert "0.5 s between frames" in told
    assert "energy: 300 in the file -> source.energy = 80" in told
    assert "counts_per_electron: missing in the file" in told


@pytest.mark.parametrize("name", ["sampling", "frame_interval", "energy", "counts_per_electron"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_overrides_must_be_positive(name: str, value: float, write: SimpleNamespace, tmp_path: Path) -> None:
    path = write.mrc(tmp_path / "a.mrc", write.movie(1))
    with pytest.raises(SourceError, match=rf"source\.{name} is {value}; expected a positive number"):
        one(path, **{name: value})


@pytest.mark.parametrize(
    ("clock", "told"),
    [
        (Clock("a test", "s", interval=0.0), "0 s in a test"),
        (Clock("a test", "s", interval=-0.1), "-0.1 s in a test"),
        (Clock("a test", "", interval=1.0), "has no unit"),
        (Clock("a test", "nm", interval=1.0), "unknown unit 'nm'"),
        (Clock("a test", "s", stamps=(0.0, 1.0, 1.0)), "frames 1 and 2 have 1 s then 1 s"),
        (Clock("a test", "s", stamps=(0.0, 1.0)), "2 usable time stamps for 3 frames"),
        (None, "no frame times for its 3 frames"),
    ],
)
def test_doubtful_times_are_refused(clock: Clock | None, told: str) -> None:
    findings = Findings()
    assert np.isnan(calibration.times(clock, 3, None, findings)).all()
    (problem,) = findings.problems
    assert told in problem
    assert "--set source.frame_interval=0.4" in problem


def test_true_time_stamps_may_be_irregular(write: SimpleNamespace, tmp_path: Path) -> None:
    stamps = [1_575_540_226_000_000 + at for at in (0, 100_000, 150_000, 900_000)]
    path = write.velox(tmp_path / "a.emd", {"Ceta": write.movie(4)}, pixel=2e-11, stamps=stamps)
    np.testing.assert_allclose(one(path).time, [0.0, 0.1, 0.15, 0.9], atol=1e-6)


def test_gaps_in_time_stamps_are_interpolated() -> None:
    filled, gaps = calibration.fill_gaps([math.nan, 1.0, math.nan, 3.0, math.nan])
    assert gaps == 3
    np.testing.assert_allclose(filled, [0, 1, 2, 3, 4])


def test_both_problems_are_told_at_once(write: SimpleNamespace, tmp_path: Path) -> None:
    path = write.dm4(tmp_path / "a.dm4", write.movie(3), [(4.0, "um"), (3.0, "nm"), (2.0, "pm")])
    with pytest.raises(SourceError, match=SQUARE) as caught:
        one(path)
    assert "no frame times" in str(caught.value)


def test_direct_electron_header(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(5)
    path = write.mrc(tmp_path / "a.mrc", data, -10.0, extended=np.arange(777, dtype="u1").view("V1"))
    with pytest.raises(SourceError, match="-10 Å in the MRC header"):
        one(path)
    described = one(path, sampling=0.2, frame_interval=0.1)
    np.testing.assert_array_equal(read_frames(described, 1, 4), data[1:4])


def test_fei_extended_header(write: SimpleNamespace, tmp_path: Path) -> None:
    import mrcfile

    extended = np.zeros(4, mrcfile.dtypes.get_ext_header_dtype(b"FEI1"))
    extended["Metadata size"] = extended.itemsize
    extended["Pixel size X"] = extended["Pixel size Y"] = 1.7e-11
    extended["HT"], extended["Dose"] = 300_000, 2e21
    extended["Timestamp"] = 43_000 + np.array([0, 1, 2, 4]) / 86_400
    described = one(write.mrc(tmp_path / "a.mrc", write.movie(4), None, extended))
    assert described.sampling == pytest.approx(0.17)
    assert described.energy == pytest.approx(300)
    assert described.dose == pytest.approx(20)
    np.testing.assert_allclose(described.time, [0, 1, 2, 4], atol=1e-5)


def test_print_resolution_is_no_calibration(tmp_path: Path) -> None:
    frame = np.ones((8, 8), "u1")
    tifffile.imwrite(tmp_path / "inch.tif", frame, resolution=(300, 300), resolutionunit="inch", metadata=None)
    tifffile.imwrite(tmp_path / "cm.tif", frame, imagej=True, resolution=(300, 300), metadata={"unit": "cm"})
    tifffile.imwrite(tmp_path / "nothing.tif", frame, imagej=True, resolution=(1, 1))
    for path in sorted(tmp_path.glob("*.tif")):
        with pytest.raises(SourceError, match="no pixel size"):
            one(path)


def test_tiff_exported_by_digital_micrograph(tmp_path: Path) -> None:
    units = [(code, "s", 3, "nm", False) for code in (65003, 65004)]
    scales = [(code, "d", 1, 0.02, False) for code in (65009, 65010)]
    tifffile.imwrite(tmp_path / "a.tif", np.ones((8, 8), "u1"), extratags=[*units, *scales], metadata=None)
    assert one(tmp_path / "a.tif").sampling == pytest.approx(0.2)


def test_imagej_micrometres_and_frame_rate(tmp_path: Path) -> None:
    data = np.ones((3, 8, 8), "u2")
    metadata = {"unit": "\\u00B5m", "fps": 4.0, "axes": "TYX"}
    tifffile.imwrite(tmp_path / "a.tif", data, imagej=True, resolution=(50_000, 50_000), metadata=metadata)
    described = one(tmp_path / "a.tif")
    assert described.sampling == pytest.approx(0.2)
    assert described.time == (0.0, 0.25, 0.5)


def test_dm_metadata_are_kept(write: SimpleNamespace, tmp_path: Path) -> None:
    tags = {"Microscope Info": {"Voltage": 300_000.0}, "Acquisition": {"Device": {"Name": "K3"}}}
    path = write.dm4(tmp_path / "a.dm4", write.movie(1)[0], [(0.2, "Å"), (0.2, "Å")], tags)
    described = one(path)
    assert (described.energy, described.detector) == (300.0, "K3")
    assert described.vendor["ImageTags"]["Microscope Info"]["Voltage"] == 300_000.0


def test_vendor_metadata_stay_small() -> None:
    tree = {
        "a": np.arange(10**6),
        "b": list(range(1000)),
        "c": b"text\0",
        "d": np.float32(1.5),
        "e": math.nan,
        "f": "x" * 10**6,
    }
    small = json_able(tree)
    assert small["a"] == "<array int64, shape (1000000,)>"
    assert small["b"].startswith("<1000 values")
    assert (small["c"], small["d"], small["e"]) == ("text", 1.5, "nan")
    assert len(small["f"]) < 5000
    many = json_able({str(i): i for i in range(10**5)})
    assert len(many) <= 20_000
