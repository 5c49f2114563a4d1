"""A pilot tries a few blocks of every step and leaves nothing behind; what it says of the whole job adds up."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline import pilot, plan, store
from pipeline.forecast import Forecast, clock, forecast, left_of, notes
from pipeline.graph import Stopped
from pipeline.job import Silent, movies_of
from pipeline.pilot import Disk, Measured, StepTime, beside, measure, step_times
from pipeline.preflight import MoviePlan, plan_of
from schemas.errors import SourceError
from tests import e2e_tools as tools
from tests.conftest import lattice_movie, write_movie
from tests.test_cli import Command, colonnade, options

__all__ = ["colonnade"]  # a fixture


def plans(movies: object, output: Path, quick: list[str], **more: object) -> list[MoviePlan]:
    given = dict(item.split("=", 1) for item in quick)
    settings = {name: yaml.safe_load(value) for name, value in given.items()}
    job = tools.job(movies, output, **{**settings, **more})
    return [plan_of(job, movie) for movie in movies_of(job)[0]]


# ---------------------------------------------------------------------------------------------------------- the times


def test_waves_after_the_first_show_the_pace() -> None:
    """Two workers, blocks of 4 s, and 3 s to warm up."""
    found = step_times(10.0, {"survey": [11, 11], "process": [18, 18.5, 22, 22.5, 26, 26.5]}, 2)
    assert found["survey"] == StepTime(2, 1.0)
    assert found["process"] == StepTime(6, 4.0, 3.5)


def test_a_movie_of_fewer_blocks_than_workers_shows_one_wave() -> None:
    assert step_times(0.0, {"process": [5.0, 5.5, 6.0]}, 8)["process"] == StepTime(3, 6.0)


def test_a_last_wave_that_is_not_full_takes_as_long_as_any() -> None:
    assert step_times(0.0, {"process": [4.0, 4.0, 8.0]}, 2)["process"] == StepTime(3, 4.0)


def test_steps_begin_where_the_one_before_ended() -> None:
    found = step_times(0.0, {"ingest": [2.0, 3.0], "calibrate": [4.0], "drift": [6.0], "collect": [7.0, 9.0]}, 4)
    assert found == {
        "ingest": StepTime(2, 3.0),
        "calibrate": StepTime(1, 1.0),
        "drift": StepTime(1, 2.0),
        "collect": StepTime(1, 3.0),
    }


# ------------------------------------------------------------------------------------------------------- the forecast


@pytest.fixture
def long_movie(tmp_path: Path) -> Path:
    return write_movie(tmp_path / "long.tif", np.repeat(lattice_movie(8), 5, axis=0))


def measured(tried: MoviePlan, frames: int, workers: int = 2) -> Measured:
    """A pilot of the first frames in which each step took a round number of seconds."""
    settings = tried.movie.settings
    few = settings.model_copy(update={"denoise": settings.denoise.model_copy(update={"steps": 10})})
    movie = dataclasses.replace(tried.movie, settings=few)
    once = {"ingest": 2.0, "calibrate": 3.0, "drift": 1.0, "adapt": 7.0, "vote": 1.0, "collect": 4.0}
    steps = {step: StepTime(1, seconds) for step, seconds in once.items()}
    steps |= {"survey": StepTime(6, 1.0), "process": StepTime(6, 8.0, 2.0)}
    return Measured(
        dataclasses.replace(tried, movie=movie, shape=(frames, *tried.shape[1:])), workers, steps, training=0.5,
        kept="adapted", part=0.01, disk=Disk(stack=100.0, results=50.0, fixed=1000.0, block_files=3.0, fixed_files=20),
        memory=1e9, driver=5e8, device=None,
    )  # fmt: skip


def test_a_forecast_is_the_sum_of_its_steps(long_movie: Path, quick: list[str], tmp_path: Path) -> None:
    trained = {"denoise.weights": "adapt", "denoise.steps": 100}
    (movie,) = plans(long_movie, tmp_path / "out", quick, blocks__frames=2, drift__lags=[1, 4], **trained)
    ahead = forecast([movie], measured(movie, frames=20), workers=4)
    assert ahead.steps == {
        "ingest": (1, 4.0),  # twice the frames, still one shard
        "calibrate": (1, pytest.approx(6.0)),  # all 40 frames are in the sample, as the 20 were
        # 20 blocks of 1 s on 4 workers; 16 frames that showed the pace had 15 + 12 pairs, all 40 have 39 + 36
        "survey": (20, pytest.approx(5.0 * (75 / 40) / (27 / 16))),
        "drift": (1, 2.0),
        "adapt": (1, (7.0 - 10 * 0.5) * 32 / 20 + 100 * 0.5),  # risks are of 32 frames at most
        "vote": (1, 1.0),
        "process": (20, 20 * 8.0 / 4 + 2.0),
        "collect": (1, pytest.approx(4.0 + 3 * 14 * 0.01)),
    }
    assert ahead.seconds == pytest.approx(sum(seconds for _, seconds in ahead.steps.values()))
    assert ahead.bytes == 40 * 150 + 1000
    assert ahead.files == 20 * 3 + 20 + 1
    assert ahead.memory >= 1e9
    assert list(notes([movie], measured(movie, 20))) == [
        "adaptation is counted with all of denoise.steps; it ends earlier where more do not help"
    ]


def test_two_movies_share_the_workers(long_movie: Path, quick: list[str], tmp_path: Path) -> None:
    other = write_movie(tmp_path / "other.tif", np.repeat(lattice_movie(8), 5, axis=0))
    both = plans([long_movie, other], tmp_path / "out", quick, blocks__frames=2)
    one, two = (forecast(movies, measured(both[0], 20), workers=4) for movies in (both[:1], both))
    for step in ("survey", "process"):
        assert two.steps[step][1] - 2.0 * (step == "process") == pytest.approx(
            2 * (one.steps[step][1] - 2.0 * (step == "process"))
        )
    for step in ("calibrate", "drift", "adapt", "vote", "collect"):  # side by side
        assert two.steps[step][1] == pytest.approx(one.steps[step][1])
    assert two.bytes == 2 * one.bytes


def test_larger_frames_cost_more(long_movie: Path, quick: list[str], tmp_path: Path) -> None:
    (small,) = plans(long_movie, tmp_path / "out", quick, blocks__frames=2)
    large = dataclasses.replace(small, shape=(40, 128, 128))
    one, four = (forecast([movie], measured(small, 20), workers=1) for movie in (small, large))
    assert four.steps["survey"][1] == pytest.approx(4 * one.steps["survey"][1])
    assert four.memory > one.memory
    assert left_of([small, large])[0] is large


def test_movies_with_settings_of_their_own_are_named(long_movie: Path, quick: list[str], tmp_path: Path) -> None:
    other = write_movie(tmp_path / "other.tif", lattice_movie(8))
    both = plans([long_movie, {"source": str(other), "set": {"denoise.tier": "small"}}], tmp_path / "out", quick)
    assert "other: other settings than long, taken to cost the same per pixel" in list(
        notes(both, measured(both[0], 20))
    )


def test_the_clock() -> None:
    assert clock(7200, datetime(2026, 3, 1, 4, 40)) == "06:40"
    assert clock(7200, datetime(2026, 3, 1, 23, 40)) == "Mon 02 Mar, 01:40"


# -------------------------------------------------------------------------------------------------------- real pilots


def try_out(movie: MoviePlan, output: Path, stop: threading.Event | None = None) -> tuple[Measured, Forecast]:
    with beside(output) as folder:
        assert folder.parent == output.parent
        found = measure(movie, folder, client=None, device="cpu", progress=Silent(), stop=stop or threading.Event())
    return found, forecast([movie], found, 1)


def test_a_pilot_runs_a_few_blocks_of_every_step(long_movie: Path, quick: list[str], tmp_path: Path) -> None:
    (movie,) = plans(long_movie, tmp_path / "out", quick, blocks__frames=2, images__save=["denoised"])
    before = set(tmp_path.iterdir())
    found, ahead = try_out(movie, tmp_path / "out")
    assert list(found.steps) == ["ingest", *plan.STEPS]
    assert [found.steps[step].blocks for step in ("survey", "process")] == [pilot.WAVES] * 2
    assert all(took.seconds > 0 for took in found.steps.values())
    assert found.memory == found.driver > 1e8
    assert found.disk.stack > 0 and found.disk.results > 0 and found.disk.block_files >= 3
    assert ahead.steps["process"][0] == 20
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("weights", ["adapt", "scratch"])
def test_a_training_step_is_measured(long_movie: Path, quick: list[str], tmp_path: Path, weights: str) -> None:
    chosen = {"denoise.weights": weights, "denoise.tier": "small", "denoise.crop": 32, "denoise.batch": 1}
    (movie,) = plans(long_movie, tmp_path / "out", quick, blocks__frames=2, denoise__steps=1000, **chosen)
    found, ahead = try_out(movie, tmp_path / "out")
    assert found.training > 0
    assert ahead.steps["adapt"][1] >= 1000 * found.training


def test_a_stack_is_tried_as_it_is(long_movie: Path, quick: list[str], tmp_path: Path) -> None:
    (movie,) = plans(long_movie, tmp_path / "first", quick)
    with beside(tmp_path / "first") as folder:
        measure(movie, folder, client=None, device="cpu", progress=Silent(), stop=threading.Event())
        stack = (folder / "stacks" / "long.zarr").rename(tmp_path / "long.zarr")
    given = [item for item in quick if not item.startswith("source.")]
    (again,) = plans(stack, tmp_path / "out", given, blocks__frames=2)
    found, _ = try_out(again, tmp_path / "out")
    assert "ingest" not in found.steps
    assert found.plan.shape == (2 * pilot.WAVES, 64, 64)
    assert store.open_stack(stack).shape[0] == movie.shape[0]


def test_what_is_done_is_not_forecast_again(long_movie: Path, quick: list[str], tmp_path: Path) -> None:
    def planned(**more: object) -> MoviePlan:
        return plans(long_movie, tmp_path / "out", quick, blocks__frames=10, **more)[0]

    movie = planned()
    tools.run_job(movie.movie.files.paths[0], tmp_path / "out", **_settings(movie))
    assert planned().done
    left = planned(columns__threshold=0.6)
    ahead = forecast([left], measured(left, 20), workers=1)
    assert {step: blocks for step, (blocks, _) in ahead.steps.items() if blocks} == {"process": 4, "collect": 1}
    assert sum(seconds for blocks, seconds in ahead.steps.values() if not blocks) == 0


def _settings(movie: MoviePlan) -> dict[str, object]:
    data = movie.movie.settings.model_dump(exclude_unset=True)
    return {f"{section}.{key}": value for section, keys in data.items() for key, value in keys.items()}


def test_a_stop_leaves_nothing_behind(long_movie: Path, quick: list[str], tmp_path: Path) -> None:
    (movie,) = plans(long_movie, tmp_path / "out", quick)
    before, stop = set(tmp_path.iterdir()), threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        try_out(movie, tmp_path / "out", stop)
    assert set(tmp_path.iterdir()) == before


def test_a_movie_that_cannot_be_read_is_said(long_movie: Path, quick: list[str], tmp_path: Path) -> None:
    (movie,) = plans(long_movie, tmp_path / "out", quick)
    long_movie.write_bytes(long_movie.read_bytes()[:20_000])
    before = set(tmp_path.iterdir())
    with pytest.raises(SourceError, match="the pilot cannot process long: "):
        try_out(movie, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("cluster", ["serial", "local"])
def test_the_command_says_when_it_will_be_done(
    colonnade: Command, long_movie: Path, quick: list[str], tmp_path: Path, cluster: str
) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({"kind": cluster, "workers": 1}))
    before = set(tmp_path.iterdir())
    words = ["plan", long_movie, "-o", tmp_path / "out", "--pilot", "--cluster", profile]
    code, out, err = colonnade(*words, *options(quick), "--set", "blocks.frames=2")
    assert code == 0, err
    for word in ("pilot: 6 frames of long on 1 worker(s)", "process", "GB per worker", "files", "request:", "memory: "):
        assert word in out, word
    assert "done at about " in out.splitlines()[-1]
    assert set(tmp_path.iterdir()) == before


def test_the_command_has_nothing_to_try_when_all_is_done(
    colonnade: Callable[..., tuple[int, str, str]], tiny_movie: Path, quick: list[str], tmp_path: Path
) -> None:
    words = [tiny_movie, "-o", tmp_path / "out", "--cluster", "serial", *options(quick)]
    assert colonnade("run", *words)[0] == 0
    assert colonnade("plan", *words, "--pilot")[:2] == (0, "nothing is left to do\n")
