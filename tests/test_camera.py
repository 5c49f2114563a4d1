"""The verb `mtf`: from frames to YAML that the simulator takes, and a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml

from pipeline.camera import fit_camera, parse_region, run_mtf
from pipeline.simulate.files import load_spec, write_movie
from pipeline.simulate.movie import MovieSpec, simulate_movie
from schemas.errors import SettingsError, SourceError

DATA = Path(__file__).parents[1].parent / "shared" / "data"
CAMERA = {"mtf": (1.0, 0.08, 0.12, 2.5), "counts_per_electron": 4.0, "readout": 3.0, "offset": 30.0}


def vacuum(path: Path, **changes: object) -> Path:
    base = {"kind": "vacuum", "shape": (192, 192), "frames": 6, "sampling": 1.0, "dose": 25.0, "noise": "integrating"}
    write_movie(simulate_movie(MovieSpec(**{**base, **CAMERA, **changes}), 3), path)  # type: ignore[arg-type]
    return path


def test_what_is_fitted_is_a_specification_and_is_near_the_truth(tmp_path: Path) -> None:
    source, dark = vacuum(tmp_path / "vacuum.tif"), vacuum(tmp_path / "dark.tif", dose=1e-9)
    lines: list[str] = []
    target = tmp_path / "out" / "camera.yaml"
    run_mtf(str(source), target, report=lines.append, regions=[], dark=str(dark), offset=None, readout=None)
    spec = load_spec(target)
    assert spec.noise == "integrating"
    assert spec.mtf == pytest.approx(CAMERA["mtf"], rel=0.25)
    assert (spec.counts_per_electron, spec.readout, spec.offset) == pytest.approx((4.0, 3.0, 30.0), rel=0.1)
    assert target.with_suffix(".png").stat().st_size > 10_000
    assert str(target) in lines[-1]
    assert "standard errors" in target.read_text()


def test_a_counting_camera_is_written_as_such(tmp_path: Path) -> None:
    source = vacuum(tmp_path / "vacuum.tif", noise="counting", mtf=None, readout=0.0, offset=0.0)
    run_mtf(
        str(source), tmp_path / "c.yaml", report=lambda line: None, regions=[], dark=None, offset=None, readout=None
    )
    written = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert written["noise"] == "counting"
    assert "mtf" not in written
    assert written["counts_per_electron"] == pytest.approx(4.0, rel=0.05)


def test_a_given_region_is_used_and_nothing_else(tmp_path: Path) -> None:
    """The right half holds a lattice; the left alone is fitted as if it were not there."""
    frames = np.random.default_rng(0).poisson(50.0, (4, 128, 256)).astype(float)
    frames[:, :, 128:] += 30 * (1 + np.cos(2 * np.pi * np.arange(128) / 9))
    tifffile.imwrite(tmp_path / "half.tif", np.rint(frames).astype(np.uint16), photometric="minisblack")
    camera = fit_camera(
        str(tmp_path / "half.tif"), regions=[parse_region("0,0,128,128")], dark=None, offset=0.0, readout=0.0
    )
    assert camera.regions == [(0, 0, 128, 128)]
    assert camera.fit.mtf is None
    assert camera.fit.counts_per_electron == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "0,0,-5,5", ""])
def test_a_region_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="expected top,left,height,width"):
        parse_region(text)


def test_a_region_too_small_is_refused(tmp_path: Path) -> None:
    source = vacuum(tmp_path / "vacuum.tif", frames=2)
    with pytest.raises(SourceError, match="name a larger one"):
        fit_camera(str(source), regions=[(0, 0, 20, 20)], dark=None, offset=None, readout=None)


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real movies is not beside the checkout")
def test_real_frames() -> None:
    """Between the gold particles of a real image the noise has the stated form; a full lattice is refused."""
    camera = fit_camera(
        str(DATA / "vendor/example_Au_nanoparticle.emd"), regions=[], dark=None, offset=None, readout=None
    )
    assert len(camera.regions) > 50
    assert not any("not of this form" in note for note in camera.fit.notes)
    with pytest.raises(SourceError, match="--region"):
        fit_camera(str(DATA / "vendor/16_STOimage_1.ser"), regions=[], dark=None, offset=None, readout=None)
