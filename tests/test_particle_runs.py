"""Movies with particles, from file to tables: a known network on discs whose place and size are known."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from pipeline import query
from pipeline.preflight import problems_of
from schemas import variables
from schemas.conventions import CONTACT, INTERPRETABLE
from schemas.particles import PARTICLES
from tests import e2e_tools as tools
from tests.steps.test_anchor import scene

SHAPE = (160, 176)
DISCS = (
    (48.0, 46.0, 38.0),
    (90.0, 124.0, 34.0),
    (140.0, 40.0, 40.0),
)  # y, x, radius [px]; the last is cut
FRAMES = 5
FINDS = {"blocks.frames": 4, "images.examples": 2, "particles.min_area": 20.0, "fourier.significance": 5.0}


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    """A TIFF of crystalline discs that drift, and their drift [px]."""
    counts, path = tools.lattice(SHAPE, frames=FRAMES, drift=(0.4, -0.3), dose=30.0)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    for t in range(FRAMES):
        inside = np.zeros(SHAPE, bool)
        for cy, cx, radius in DISCS:
            inside |= np.hypot(y - cy - path[t, 0], x - cx - path[t, 1]) <= radius
        counts[t] = np.where(inside, counts[t] + 6, rng.poisson(14.0, inside.shape))
    return tools.write_movie(tmp_path_factory.mktemp("movie") / "discs.tif", counts), path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Weights that call a pixel a particle where it is clearly brighter than the mean."""
    path = tmp_path_factory.mktemp("weights") / "bright.safetensors"
    return tools.linear(path, np.array([[8.0]]), np.array([4.0]), sampling=0.4, sampling_range=[0.1, 0.8])


@pytest.fixture(scope="module")
def reference(movie, model, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference")
    (outcome,) = tools.run_job(
        movie[0], output, **{**FINDS, "particles.model": model, "images.save": ["labels"]}
    )  # fmt: skip
    assert (outcome.status, outcome.particles) == ("complete", 3 * FRAMES)
    return outcome.path


def test_particles_are_where_they_are(movie, reference):
    found = tools.tables(reference)
    rows = found["particles"]
    variables.check(rows, PARTICLES)
    assert found["frames"]["particle_count"].values.tolist() == [3] * FRAMES
    assert rows["frame"].values.tolist() == np.repeat(np.arange(FRAMES), 3).tolist()
    shown = [rows.isel(particle=slice(i, None, 3)) for i in range(3)]
    for (y, x, radius), rows_of_one in zip(DISCS[:2], shown, strict=False):
        # The specimen frame takes the drift out, so each stays where it was.
        assert rows_of_one["y"].values == pytest.approx(y * tools.SAMPLING, abs=0.2)
        assert rows_of_one["x"].values == pytest.approx(x * tools.SAMPLING, abs=0.2)
        assert rows_of_one["area"].values == pytest.approx(np.pi * (radius * tools.SAMPLING) ** 2, rel=0.12)
        assert (rows_of_one["contact"] == CONTACT["free"]).all()
    assert (shown[2]["contact"] == CONTACT["border"]).all()


def test_columns_know_their_particle(reference):
    found = tools.tables(reference)
    columns, rows = found["columns"], found["particles"]
    assert columns.sizes["column"] > 100
    first = np.concatenate([[0], np.cumsum(found["frames"]["particle_count"].values)])[columns["frame"].values]
    mine = columns["particle"].values
    assert set(np.unique(mine)) <= {-1, 0, 1, 2} and (mine >= 0).mean() > 0.8
    inside = mine >= 0
    centre = rows.isel(particle=(first + mine)[inside])
    away = np.hypot(centre["y"].values - columns["y"].values[inside], centre["x"].values - columns["x"].values[inside])
    assert (away <= 0.75 * centre["major_axis"].values).all()
    np.testing.assert_array_equal(columns["particle_ratio"].values[inside], centre["fourier_ratio"].values)
    np.testing.assert_array_equal(columns["particle_interpretable"].values[inside], centre["interpretable"].values)
    assert np.isnan(columns["particle_ratio"].values[~inside]).all()
    assert (columns["particle_interpretable"].values[~inside] == -1).all()


def test_labels_are_kept_and_agree_with_the_table(reference):
    with xr.open_datatree(reference, engine="zarr", consolidated=False) as tree:
        labels = tree["images/labels/s0/labels"].values
        area = tree["particles/area"].values.reshape(FRAMES, 3)
    assert labels.dtype == np.int32 and labels.shape == (FRAMES, *SHAPE)
    counted = np.stack([[(frame == i).sum() for i in (1, 2, 3)] for frame in labels])
    np.testing.assert_allclose(area, counted * tools.SAMPLING**2, rtol=1e-6)


def test_the_lattice_decides_what_can_be_interpreted(movie, model, reference, tmp_path):
    """The lattice of the discs, 2.25 Å between rows, is seen; another threshold computes no pixel again."""
    rows, frames = (tools.tables(reference)[name] for name in ("particles", "frames"))
    assert np.isfinite(rows["fourier_ratio"]).mean() > 0.6
    spacing = rows["lattice_spacing_1"].values
    assert spacing[np.isfinite(spacing)] == pytest.approx(13 * tools.SAMPLING * np.sqrt(3) / 2, rel=0.08)
    ratio = frames["fourier_ratio"].values
    # That of the largest particle which has one.
    area = np.where(np.isfinite(rows["fourier_ratio"]), rows["area"], 0).reshape(FRAMES, 3)
    largest = rows["fourier_ratio"].values.reshape(FRAMES, 3)[np.arange(FRAMES), area.argmax(1)]
    np.testing.assert_array_equal(ratio, largest)

    settings = {**FINDS, "particles.model": model}
    for threshold in (float(np.nanmedian(ratio)), 1e3):
        (outcome,) = tools.run_job(movie[0], tmp_path, **settings, fourier__threshold=threshold)
        found = tools.tables(outcome.path)
        for table in ("frames", "particles"):
            told = found[table]["interpretable"].values == INTERPRETABLE["yes"]
            np.testing.assert_array_equal(told, found[table]["fourier_ratio"].values <= threshold)
    steps = [step for step, *_ in tools.computed(tmp_path)]
    assert (steps.count("process"), steps.count("collect")) == (2, 2)


@pytest.mark.parametrize(("workers", "block"), [(None, 6), (2, 2)])
def test_no_cut_changes_a_bit(movie, model, reference, tmp_path, workers, block):
    settings = {**FINDS, "particles.model": model, "blocks.frames": block}
    (outcome,) = tools.run_job(movie[0], tmp_path, workers=workers, **settings)
    assert tools.differences(reference, outcome.path) == []


def test_queries_answer_about_particles(reference):
    every = query(reference, table="particles").to_dataframe()
    assert len(every) == 3 * FRAMES and {"frame", "area", "contact", "zone"} <= set(every)
    free = query(reference, "contact == 'free' and area > 1 and snr > 0", table="particles").to_dataframe()
    assert len(free) == 2 * FRAMES


def test_a_movie_without_a_model_has_an_empty_table(movie, tmp_path):
    (outcome,) = tools.run_job(movie[0], tmp_path, **{**FINDS, "denoise.network": "none", "particles.model": None})
    found = tools.tables(outcome.path)
    variables.check(found["particles"], PARTICLES)
    assert found["particles"].sizes["particle"] == 0
    assert (found["frames"]["particle_count"] == 0).all() and (found["columns"]["particle"] == -1).all()
    assert query(outcome.path, table="particles").to_dataframe().empty


def test_a_sampling_that_the_network_does_not_know_is_told(movie, tmp_path):
    narrow = tools.linear(
        tmp_path / "narrow.safetensors", np.array([[8.0]]), np.array([4.0]), sampling=0.9, sampling_range=[0.8, 1.1]
    )
    settings = {**FINDS, "denoise.network": "none", "particles.model": narrow}
    (outcome,) = tools.run_job(movie[0], tmp_path / "out", **settings)
    assert (outcome.status, outcome.particles) == ("complete", 0)
    with xr.open_datatree(outcome.path, engine="zarr", consolidated=False) as tree:
        notes = tree.attrs["colonnade"]["notes"]
    assert any("no particles were looked for: 0.2 Å/px" in note and "0.8 to 1.1 Å/px" in note for note in notes)


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """A TIFF of a crystalline disc that walks over a granular film, and the paths of film and disc [px]."""
    counts, film, disc, _ = scene(1, dose=20.0)
    return tools.write_movie(tmp_path_factory.mktemp("divided") / "walk.tif", counts.astype(np.uint16)), film, disc


@pytest.mark.parametrize(("which", "block"), [("support", 4), ("largest", 16)])
def test_drift_is_that_of_what_the_anchor_names(divided, tmp_path, which, block):
    """With the shipped network of particles, which is shown nothing but the movie; no cut matters."""
    source, film, disc = divided
    columns = tools.untrained(tmp_path)["segment.model"]
    settings = {"denoise.network": "none", "segment.model": columns, "drift.anchor": which, "blocks.frames": block}
    (outcome,) = tools.run_job(source, tmp_path, **settings)
    table = tools.tables(outcome.path)["frames"]
    found = np.stack([table[f"drift_{axis}"].values for axis in "yx"], 1) / tools.SAMPLING
    wanted, other = (film, disc) if which == "support" else (disc, film)
    off = found - wanted
    assert np.sqrt(np.mean((off - off.mean(0)) ** 2)) < 0.3
    assert np.abs(found - other).max() > 5
    with xr.open_datatree(outcome.path, engine="zarr", consolidated=False) as tree:
        assert any("(drift.anchor)" in note and "drift is that of" in note for note in tree.attrs["colonnade"]["notes"])


def test_an_anchor_that_is_not_seen_is_told_and_one_that_cannot_be_is_refused(movie, model, tmp_path):
    settings = {**FINDS, "denoise.network": "none", "drift.anchor": "particle"}
    (outcome,) = tools.run_job(
        movie[0], tmp_path / "unseen", **settings, particles__model=model, particles__min_area=1e6
    )
    with xr.open_datatree(outcome.path, engine="zarr", consolidated=False) as tree:
        notes = tree.attrs["colonnade"]["notes"]
    assert any("no sample frame shows the particles" in note and "the whole view" in note for note in notes)
    path = np.stack([tools.tables(outcome.path)["frames"][f"drift_{axis}"].values for axis in "yx"], 1)
    assert path / tools.SAMPLING == pytest.approx(movie[1], abs=0.3)
    job = tools.job(movie[0], tmp_path / "refused", **settings, particles__model=None)
    assert any("drift.anchor is particle" in one and "particles.model is none" in one for one in problems_of(job)[0])
