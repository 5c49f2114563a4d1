"""Focal series, from file to tables: planes of either contrast that lie askew, and a species model that needs them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import xarray as xr

from pipeline.preflight import problems_of
from pipeline.results.open import open_run
from schemas import variables
from schemas.frames import FRAMES
from tests import e2e_tools as tools

SHAPE, TIMES, SPACING = (120, 136), 5, 14.0
OFFSETS = np.array([[3.4, -2.2], [0.0, 0.0], [-4.3, 1.6]])  # of the planes against the second [px]
DEFOCI = (-60.0, 20.0, 100.0)
CLASSES = ("Mo", "Se", "0Se")
FINDS = {
    "source.sampling": tools.SAMPLING, "source.frame_interval": 0.5, "source.defocus": DEFOCI,
    "source.defocus_plane": 1, "blocks.frames": 3, "segment.contrast": "bright", "images.examples": 1,
}  # fmt: skip
FACTS = {
    "classes": list(CLASSES), "missing": [0, 1, 2], "hosts": [0, 0, 0], "mode": "hrtem", "planes": 3,
    "sampling": 0.2, "sampling_range": [0.1, 0.3], "distance": 1.6, "temperature": 0.4,
}  # fmt: skip


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A .npy of (time, defocus, y, x), its heavy and light sites (site, 2) [px], drift, and offsets per frame."""
    rng = np.random.default_rng(4)
    i, j = (v.ravel() for v in np.mgrid[-14:15, -14:15])
    sites = np.stack([j * SPACING * np.sqrt(3) / 2, (i + j / 2) * SPACING], 1) + np.array(SHAPE) / 2
    weight = np.where(rng.random(len(sites)) < 0.35, 0.45, 1.0)
    drift = np.cumsum(rng.normal(0.2, 0.2, (TIMES, 2)), 0)
    drift -= drift[0]
    offsets = OFFSETS + rng.normal(0, 0.4, (TIMES, 3, 2))
    offsets[:, 1] = 0
    counts = np.empty((TIMES, 3, *SHAPE), np.uint16)
    for t, plane in np.ndindex(TIMES, 3):
        at = sites + drift[t] + offsets[t, plane]
        y, x = (np.exp(-0.5 * ((np.arange(n)[None] - at[:, k, None]) / 2.4) ** 2) for k, n in enumerate(SHAPE))
        image = (y * weight[:, None]).T @ x
        # The last plane shows atoms dark.
        counts[t, plane] = rng.poisson(30 * (0.6 + 1.5 * image if plane < 2 else 2.2 - 1.5 * image))
    path = tmp_path_factory.mktemp("movie") / "series.npy"
    np.save(path, counts)
    return path, sites, weight, drift, offsets


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network that adds the planes, the dark one with the other sign: clear only where they are aligned."""
    added = np.array([1.0, 1.0, -1.0])
    weights = np.stack([0 * added, 2 * added, added, 0 * added])
    path = tmp_path_factory.mktemp("weights") / "added.safetensors"
    return tools.linear(path, weights, np.array([0.0, -11.0, -3.0, -9.0]), **FACTS)


@pytest.fixture(scope="module")
def reference(series, model, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference")
    (outcome,) = tools.run_job(series[0], output, **{**FINDS, "species.model": model})
    assert outcome.status == "complete", outcome.reason
    return outcome.path


def test_offsets_between_defoci_are_found(series, reference):
    frames = tools.tables(reference)["frames"]
    variables.check(frames, FRAMES)
    assert frames["defocus"].values.tolist() == list(DEFOCI)
    assert frames["defocus_shift_y"].dims == ("time", "defocus")
    found = np.stack([frames["defocus_shift_y"], frames["defocus_shift_x"]], -1) / tools.SAMPLING
    assert np.abs(found - series[4]).max() < 0.35
    assert not found[:, 1].any()


def test_species_come_from_all_planes(series, reference):
    _, sites, weight, drift, _ = series
    found = tools.tables(reference)
    columns, frames = found["columns"], found["frames"]
    assert columns.sizes["column"] > 40 * TIMES
    at = np.stack([columns["y"], columns["x"]], 1) / tools.SAMPLING
    nearest = np.linalg.norm(at[:, None] - sites[None], axis=2).argmin(1)
    expected = np.where(weight[nearest] == 1, "Mo", "Se")
    assert (columns["species"].values == expected).mean() > 0.97
    assert ((columns["species_probability"] > 0.3) & (columns["species_probability"] <= 1)).all()
    count = frames["species_count"].values
    assert frames["species_class"].values.tolist() == list(CLASSES)
    named = [[(columns["species"].values[columns["frame"].values == t] == name).sum() for name in CLASSES[:2]]
             for t in range(TIMES)]  # fmt: skip
    assert count[:, :2].tolist() == named
    # Each light site lacks one atom, in the toy model; sites are counted where they lie 1 Å inside the view.
    inside = [((sites + d >= 5) & (sites + d <= np.array(SHAPE) - 6)).all(1) & (weight < 1) for d in drift]
    assert np.abs(frames["vacancy_count"].values - np.sum(inside, 1)).max() <= 4
    assert (frames["vacancy_count_err"] > 0).all()


def test_without_alignment_it_would_fail(series, reference, model, tmp_path, monkeypatch):
    """The toy model does need the planes on top of each other, so the test above tests that they are."""
    monkeypatch.setattr("pipeline.steps.focus.solve_offsets", lambda found, scale: np.zeros((*found.shape[:2], 2)))
    (outcome,) = tools.run_job(series[0], tmp_path, **{**FINDS, "species.model": model, "denoise.network": "none"})
    askew = tools.tables(outcome.path)["columns"]
    truth = np.where(series[2][_nearest(askew, series[1])] == 1, "Mo", "Se")
    assert (askew["species"].values == truth).mean() < 0.9


def _nearest(columns: xr.Dataset, sites: np.ndarray) -> np.ndarray:
    at = np.stack([columns["y"], columns["x"]], 1) / tools.SAMPLING
    return np.linalg.norm(at[:, None] - sites[None], axis=2).argmin(1)


def test_no_cut_changes_a_bit(series, model, reference, tmp_path):
    (outcome,) = tools.run_job(series[0], tmp_path, **{**FINDS, "species.model": model, "blocks.frames": 5})
    assert tools.differences(reference, outcome.path) == []


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ({"source.defocus": DEFOCI[:1], "source.defocus_plane": 0}, r"1 image\(s\) per time point.*expects 3"),
        ({"source.sampling": 0.05}, r"0\.05 Å/px.*trained for 0\.1 to 0\.3 Å/px"),
        ({"source.mode": "haadf"}, r"source\.mode is haadf.*trained for hrtem"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_work_starts(series, model, tmp_path, override, told):
    path = series[0]
    if "source.defocus" in override:
        path = tmp_path / "single.npy"
        np.save(path, np.load(series[0])[:, 0])
        override = {"source.defocus": None, "source.defocus_plane": 0}
    settings = {**FINDS, "species.model": model, **override}
    (problem,), _ = problems_of(tools.job(path, tmp_path / "out", **settings))
    (outcome,) = tools.run_job(path, tmp_path / "out", **settings)
    assert outcome.status == "quarantined"
    assert not list((tmp_path / "out").glob("stacks/*.zarr"))
    for text in (problem, outcome.reason):
        assert re.search(told, text), text


def test_a_plane_that_is_not_finite_leaves_species_unknown(series, model, tmp_path):
    counts = np.load(series[0]).astype(np.float32)
    counts[2, 0, 3, 3] = np.nan
    np.save(tmp_path / "broken.npy", counts)
    settings = {**FINDS, "species.model": model, "denoise.network": "none"}
    (outcome,) = tools.run_job(tmp_path / "broken.npy", tmp_path / "out", **settings)
    found = tools.tables(outcome.path)
    unknown = found["columns"]["species"].values == "unknown"
    assert np.array_equal(unknown, found["columns"]["frame"].values == 2) and unknown.any()
    assert found["frames"]["vacancy_count"].values[2] == -1 and np.isnan(found["frames"]["vacancy_count_err"][2])
    assert found["frames"]["species_count"].values[2].tolist() == [0, 0, 0]
    assert (found["frames"]["status"] == 0).all()


@pytest.mark.parametrize(("least", "named"), [(2000.0, False), (100.0, True)])
def test_frames_too_dim_for_the_model_get_no_species(series, tmp_path, least, named):
    """Some 30 to 60 electrons per pixel of 0.2 Å are 750 to 1500 e⁻/Å²."""
    facts = {**FACTS, "training": {"dose": [least, 4000.0]}}
    dim = tools.linear(tmp_path / "dim.safetensors", np.ones((4, 3)), np.zeros(4), **facts)
    settings = {**FINDS, "species.model": dim, "denoise.network": "none", "source.counts_per_electron": 1.0}
    (outcome,) = tools.run_job(series[0], tmp_path / "out", **settings)
    found = tools.tables(outcome.path)
    unknown = found["columns"]["species"].values == "unknown"
    assert unknown.size and unknown.all() != named and unknown.any() != named
    assert (found["frames"]["vacancy_count"] == -1).all() != named
    notes = [
        note for note in open_run(outcome.path).attrs["colonnade"]["notes"] if note.startswith("no species were named")
    ]
    assert len(notes) == (not named)
    assert named or re.search(r"e⁻/Å² per image; .*dim.* was trained with 2000 e⁻/Å² and more", notes[0])
