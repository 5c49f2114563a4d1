"""`colonnade verify`: a sound run is found sound, whatever is wrong with another is found and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline import plan, store
from pipeline.results.open import open_run
from pipeline.verify import verify
from schemas.errors import SettingsError
from tests import e2e_tools as tools


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run of thirty frames in blocks of four, with particles."""
    folder = tmp_path_factory.mktemp("verify")
    counts, _ = tools.lattice((64, 72), frames=30, seed=4)
    bright = tools.linear(
        folder / "bright.safetensors", np.array([[8.0]]), np.array([0.0]), sampling=0.4, sampling_range=[0.1, 0.8]
    )
    settings = {**tools.untrained(folder), "particles.model": bright, "particles.min_area": 1.0, "blocks.frames": 4}
    movie = tools.write_movie(folder / "lattice.tif", counts)
    (outcome,) = tools.run_job(movie, folder / "out", **settings, **{"images.save": ["denoised", "uncertainty"]})
    assert outcome.particles > 30
    return folder / "out"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out" / "lattice.zarr"


def test_a_sound_run_is_the_same_bit_for_bit_with_other_cuts(run):
    done = verify(run, count=6, seed=1)
    assert done.problems == () and done.remarks == ()
    assert done.exact and done.frames >= 6 and done.arrays > 50
    said = tools.colonnade("verify", run.parent, "--blocks", 2)
    assert said.returncode == 0, said.stderr
    assert "nothing differs" in said.stdout and "bit for bit" in said.stdout


def test_the_uncertainty_of_every_pixel_is_kept_where_the_denoiser_states_it(run):
    uncertainty = open_run(run)["images/uncertainty/s0/uncertainty"]
    assert uncertainty.attrs["units"] == "electron"
    assert (uncertainty.values > 0).all()


@pytest.mark.parametrize("name", ["particles/y", "frames/drift_x", "frames/snr", "frames/particle_count"])
def test_a_changed_number_is_found_and_named(run, name):
    array = zarr.open_group(run, mode="r+")[name]
    values = np.asarray(array[...])
    array[...] = np.nextafter(values, np.inf) if values.dtype.kind == "f" else values + 1
    done = verify(run, count=3, seed=0)
    assert any("/frames" in text or f"/{name}" in text for text in done.problems), done.problems
    assert tools.colonnade("verify", run, "--blocks", 3).returncode == 3


@pytest.mark.parametrize(
    "where", ["lattice.zarr/frames/snr", "lattice.zarr/images/denoised", "stacks/lattice.zarr/counts"]
)
def test_a_flipped_byte_is_found_by_its_checksum(run, where):
    chunks = [path for path in (run.parent / where).rglob("c/**/*") if path.is_file()]
    data = bytearray(chunks[0].read_bytes())
    data[len(data) // 2] ^= 0x10
    chunks[0].write_bytes(bytes(data))
    done = verify(run, count=0, seed=0)
    assert len(done.problems) == 1
    assert where.split("/")[-1] in done.problems[0]


@pytest.mark.parametrize("how", ["missing", "empty"])
@pytest.mark.parametrize(
    "where", ["lattice.zarr/particles/y", "lattice.zarr/frames/drift_y", "stacks/lattice.zarr/counts"]
)
def test_a_lost_shard_is_no_fill_value(run, where, how):
    chunk = next(path for path in (run.parent / where).rglob("c/**/*") if path.is_file())
    if how == "missing":
        chunk.unlink()
    else:
        chunk.write_bytes(b"")
    done = verify(run, count=0, seed=0)
    assert len(done.problems) == 1 and where.split("/")[-1] in done.problems[0]


def test_another_version_is_compared_with_a_tolerance_of_hundredths_of_an_angstrom(run, monkeypatch):
    monkeypatch.setattr("pipeline.verify.versions", lambda: {"torch": "another"})
    assert verify(run, count=3, seed=0).problems == ()
    array = zarr.open_group(run, mode="r+")["particles/y"]
    array[...] = np.asarray(array[...]) + 0.05
    done = verify(run, count=3, seed=0)
    assert not done.exact and any("/particles/y" in text for text in done.problems)


def test_what_cannot_be_verified_is_refused_with_the_remedy(run, monkeypatch):
    name, (version, before, sections) = "process", plan.STEPS["process"]
    with monkeypatch.context() as patch:
        patch.setitem(plan.STEPS, name, (version + 1, before, sections))
        with pytest.raises(SettingsError, match="another version of a step"):
            verify(run, count=1, seed=0)
    store.update_run(run, {"state": "running"})
    with pytest.raises(SettingsError, match="no complete run"):
        verify(run, count=1, seed=0)
    store.update_run(run, {"state": "complete"})
    store.remove(run.parent / "stacks" / "lattice.zarr")
    with pytest.raises(SettingsError, match="which is gone"):
        verify(run, count=1, seed=0)
