"""Movies of a group: one adaptation for all, told in each run, whatever becomes of the first movie."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.ndimage import gaussian_filter

from pipeline import store, story
from pipeline.groups import Groups
from pipeline.job import movies_of
from pipeline.movie import Lead, Task
from pipeline.parts import read_meta
from pipeline.patience import Stopped
from pipeline.preflight import plan_of
from pipeline.verify import verify
from schemas.errors import SchemaError, SettingsError
from tests import e2e_tools as tools

TRAINED = {
    "denoise.weights": "adapt",
    "denoise.tier": "small",
    "denoise.steps": 30,
    "denoise.group": "night",
    # Of so few steps the filter of well-aligned neighbours is no worse.
    "denoise.motion": False,
}


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
        assert differing == {"kernel", "leftover_kernel"}  # the filters of the neighbours are each movie's own


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
    job = tools.job([broken, *movies[:2]], tmp_path / "out", **TRAINED)
    assert [plan_of(job, movie).done for movie in movies_of(job)[0][1:]] == [True, True]


def test_a_first_movie_of_mere_noise_leads_nobody(movies, tmp_path):
    counts = np.random.default_rng(0).poisson(10.0, (8, 96, 96)).astype(np.uint16)
    noise = tools.write_movie(tmp_path / "noise.tif", counts)
    tools.run_job([noise, movies[0]], tmp_path / "out", **TRAINED)
    assert adaptation(tmp_path / "out", "noise")[0]["training"]["kept"] == "wiener"
    meta, _ = adaptation(tmp_path / "out", "movie0")
    assert "shared" not in meta and meta["training"]["steps"] == 30
    (note,) = (note for note in store.attributes_of(tmp_path / "out" / "movie0.zarr")["notes"] if "noise" in note)
    assert "was of no use; this movie has a denoiser of its own" in note


def test_a_first_movie_that_fails_later_leads_nobody_and_its_return_is_noticed(movies, tmp_path, monkeypatch):
    solve = story.TASKS["drift"]

    def fails(task: Task) -> object:
        if task.run.endswith("movie0.zarr"):
            raise SchemaError("the part is damaged")
        return solve(task)

    monkeypatch.setitem(story.TASKS, "drift", fails)
    outcomes = tools.run_job(movies[:2], tmp_path, **TRAINED)
    assert [one.status for one in outcomes] == ["quarantined", "complete"]
    alone = adaptation(tmp_path, "movie1")[0]
    assert "lead" not in alone and alone["training"]["steps"] == 30
    assert verify(tmp_path / "movie1.zarr", count=1, seed=0).problems == ()
    monkeypatch.undo()
    tools.run_job(movies[:2], tmp_path, **TRAINED)
    said = store.attributes_of(tmp_path / "movie1.zarr")
    assert said["models"]["denoise"]["lead"]["movie"] == "movie0" and said["models"]["denoise"]["shared"]


def test_a_movie_whose_noise_is_correlated_is_not_shown_its_pixels_by_a_lead_of_white_noise(movies, tmp_path):
    counts, _ = tools.lattice((96, 96), frames=8, seed=0, dose=10.0)
    blurred = np.round(gaussian_filter(counts.astype(float), (0, 0.7, 0.7)) * 20).astype(np.uint16)
    other = tools.write_movie(tmp_path / "blurred.tif", blurred)
    first = {"source": str(movies[0]), "set": {"source.counts_per_electron": 1}}
    second = {"source": str(other), "set": {"source.counts_per_electron": 20}}
    tools.run_job([first, second], tmp_path / "out", **TRAINED)
    meta, _ = adaptation(tmp_path / "out", "blurred")
    assert adaptation(tmp_path / "out", "movie0")[0]["blind"] == "pixels"
    assert meta["blind"] == "frame" and meta["training"]["steps"] == 30 and "shared" not in meta


def test_movies_that_ask_for_different_networks_are_no_group(movies, tmp_path):
    other = {"source": str(movies[1]), "set": {"denoise.tier": "large"}}
    with pytest.raises(SettingsError, match=r"movie1 is of group 'night' .* denoise.tier 'large' instead of 'small'"):
        movies_of(tools.job([str(movies[0]), other], tmp_path, **TRAINED))


def test_the_name_of_a_group_is_no_reason_to_compute_again(shared, movies):
    job = tools.job(movies, shared, **TRAINED | {"denoise.group": "other"})
    assert all(plan_of(job, movie).done for movie in movies_of(job)[0])


def test_nobody_waits_for_a_movie_that_has_ended(movies, tmp_path):
    job = tools.job(movies, tmp_path, **TRAINED)
    groups, stop = Groups(movies_of(job)[0]), threading.Event()
    lead = Lead("movie1", "key", "part")
    groups.left("movie0")
    groups.opened("movie1", lead)
    assert groups.lead_of("movie2", stop) == lead
    groups.left("movie1")
    groups.wait_for(lead, stop)
    stop.set()  # what has ended may have ended because all must
    for wait in (lambda: groups.lead_of("movie2", stop), lambda: groups.wait_for(lead, stop)):
        with pytest.raises(Stopped):
            wait()


@pytest.mark.parametrize("change", [{"denoise.weights": "pretrained"}, {"denoise.network": "wcvd"}])
def test_a_group_without_training_to_share_is_refused(change):
    with pytest.raises(SettingsError, match=r"group is 'night', but network .* trains nothing that movies could share"):
        tools.job("movie.tif", Path("out"), **TRAINED | change)
