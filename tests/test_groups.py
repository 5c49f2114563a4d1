"""Movies of a group: one adaptation for all, told in each run, whatever becomes of the first movie."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline import store
from pipeline.groups import Groups
from pipeline.job import movies_of
from pipeline.movie import Lead
from pipeline.parts import read_meta
from pipeline.preflight import plan_of
from pipeline.verify import verify
from schemas.errors import SettingsError
from tests import e2e_tools as tools

TRAINED = {"denoise.weights": "adapt", "denoise.tier": "small", "denoise.steps": 30, "denoise.group": "night"}


@pytest.fixture(scope="module")
def movies(tmp_path_factory) -> list[Path]:
    """Three views of lattices; the last one is another specimen."""
    folder, found = tmp_path_factory.mktemp("group"), []
    for index, spacing in enumerate((13.0, 13.0, 11.0)):
        counts, _ = tools.lattice((96, 96), frames=8, seed=index, dose=10.0, spacing=spacing)
        found.append(tools.write_movie(folder / f"movie{index}.tif", counts))
    return found


def adaptation(output: Path, movie: str) -> tuple[dict, dict[str, np.ndarray]]:
    """What the adaptation of a movie says of itself, and its weights."""
    (part,) = (output / "parts" / movie).glob("adapt-*.npz")
    meta = read_meta(part)
    assert meta is not None
    return meta, load_file(part.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def shared(movies, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("shared") / "out"
    assert [one.status for one in tools.run_job(movies, output, **TRAINED)] == ["complete"] * 3
    return output


def test_the_first_is_trained_and_the_others_take_its_network_over(shared):
    (first, weights), *others = (adaptation(shared, f"movie{n}") for n in range(3))
    assert first["training"]["steps"] == 30 and "lead" not in first
    for meta, taken in others:
        assert meta["shared"] and meta["lead"]["movie"] == "movie0" and meta["training"]["steps"] == 0
        assert set(taken) == set(weights)
        differing = {name for name in weights if not np.array_equal(weights[name], taken[name])}
        assert differing == {"kernel"}  # the filter of the neighbours is each movie's own


def test_each_run_says_whose_network_it_has(shared):
    notes = [store.attributes_of(shared / f"movie{n}.zarr")["notes"] for n in range(3)]
    assert not any("adapted to movie0" in note for note in notes[0])
    assert all(any("adapted to movie0" in note and "'night'" in note for note in found) for found in notes[1:])


def test_a_run_can_be_verified_and_nothing_is_left_to_do(shared, movies):
    assert verify(shared / "movie1.zarr", count=2, seed=0).problems == ()
    before = len(tools.computed(shared))
    tools.run_job(movies, shared, **TRAINED)
    assert len(tools.computed(shared)) == before
    job = tools.job(movies, shared, **TRAINED)
    plans = [plan_of(job, movie) for movie in movies_of(job)[0]]
    assert all(one.done for one in plans)
    assert [one.training_steps for one in plans] == [30, 0, 0]


def test_workers_side_by_side_give_the_same_bits(shared, movies, tmp_path):
    tools.run_job(movies, tmp_path / "out", workers=2, **TRAINED)
    for n in range(3):
        assert tools.differences(shared / f"movie{n}.zarr", tmp_path / "out" / f"movie{n}.zarr") == []


def test_another_first_movie_makes_the_others_stale(shared, movies, tmp_path):
    tools.run_job([movies[2], *movies[:2]], tmp_path / "out", **TRAINED)
    meta, _ = adaptation(tmp_path / "out", "movie1")
    assert meta["lead"]["movie"] == "movie2"
    assert meta["fingerprint"] != adaptation(shared, "movie1")[0]["fingerprint"]


def test_the_next_one_leads_where_the_first_cannot_be_read(movies, tmp_path):
    broken = tmp_path / "broken.tif"
    broken.write_bytes(movies[0].read_bytes()[:3000])
    outcomes = tools.run_job([broken, *movies[:2]], tmp_path / "out", workers=2, **TRAINED)
    assert [one.status for one in outcomes] == ["quarantined", "complete", "complete"]
    assert "lead" not in adaptation(tmp_path / "out", "movie0")[0]
    assert adaptation(tmp_path / "out", "movie1")[0]["lead"]["movie"] == "movie0"


def test_a_first_movie_of_mere_noise_leads_nobody(movies, tmp_path):
    counts = np.random.default_rng(0).poisson(10.0, (8, 96, 96)).astype(np.uint16)
    noise = tools.write_movie(tmp_path / "noise.tif", counts)
    tools.run_job([noise, movies[0]], tmp_path / "out", **TRAINED)
    assert adaptation(tmp_path / "out", "noise")[0]["training"]["kept"] == "wiener"
    meta, _ = adaptation(tmp_path / "out", "movie0")
    assert "shared" not in meta and meta["training"]["steps"] == 30
    (note,) = (note for note in store.attributes_of(tmp_path / "out" / "movie0.zarr")["notes"] if "noise" in note)
    assert "gave no network of use; this movie has its own" in note


def test_nobody_waits_for_a_movie_that_has_ended(movies, tmp_path):
    job = tools.job(movies, tmp_path, **TRAINED)
    groups, stop = Groups(movies_of(job)[0]), threading.Event()
    lead = Lead("movie1", "key", "part")
    groups.left("movie0")
    groups.opened("movie1", lead)
    assert groups.lead_of("movie2", stop) == lead
    groups.left("movie1")
    groups.wait_for(lead, stop)


def test_a_group_without_training_is_refused():
    with pytest.raises(SettingsError, match=r"group is 'night', but .* weights pretrained nothing is trained"):
        tools.job("movie.tif", Path("out"), **TRAINED | {"denoise.weights": "pretrained"})
