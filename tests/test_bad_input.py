"""One bad input stops nothing else: bad frames are flagged, bad files quarantined with reasons, bugs stop at once."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import tifffile
import xarray as xr

from pipeline import blocks, cli, store, story
from pipeline.layout import stack_layout
from schemas.conventions import STATUS
from tests import e2e_tools as tools

FRAMES = 9


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Small untrained networks: what is tested lies around them."""
    return {**tools.untrained(tmp_path_factory.mktemp("weights")), "blocks.frames": 4, "images.examples": 1}


@pytest.fixture(scope="module")
def counts():
    return tools.lattice((56, 64), frames=FRAMES, seed=2)[0]


def truncated(path, counts):
    """A movie whose file ends in the middle of its sixth frame."""
    tools.write_movie(path, counts)
    with tifffile.TiffFile(path) as file:
        offset = file.series[0].dataoffset if file.series[0].dataoffset is not None else file.pages[0].dataoffsets[0]
    with path.open("r+b") as file:
        file.truncate(offset + int(5.5 * counts[0].nbytes))
    return path


def spoilt(folder, counts):
    """Movies with one bad frame each, and a good one: {name: (file, bad frame)}."""
    made = {}
    for name, index in (("fine", None), ("zero", 4), ("nan", 3), ("saturated", 5)):
        frames = counts.copy()
        if name == "nan":
            frames = frames.astype(np.float32)
            frames[index, 10:20, 10:20] = np.nan
        elif name == "zero":
            frames[index] = 0
        elif name == "saturated":
            frames[index, :20] = np.iinfo(counts.dtype).max
        made[name] = tools.write_movie(folder / f"{name}.tif", frames), index
    return made


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, counts, settings):
    """A job of five movies, one of them truncated, run by the command on two workers."""
    folder = tmp_path_factory.mktemp("mixed")
    made = spoilt(folder, counts)
    broken = truncated(folder / "broken.tif", counts)
    output = folder / "out"
    file = tools.write_jobfile(folder / "job.yaml", [*(str(p) for p, _ in made.values()), broken], output, **settings)
    return tools.colonnade("run", file), made, output


def test_quarantined_file_makes_the_exit_code_3_and_is_named_with_its_reason(mixed):
    done, _, output = mixed
    assert done.returncode == 3, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("broken"))
    assert "QUARANTINED" in line and "broken.tif" in line and "frame" in line
    assert "1 of 5 movies quarantined" in done.stdout
    assert not (output / "broken.zarr").exists()


def test_all_other_movies_are_complete_and_their_bad_frames_flagged_with_reasons(mixed):
    _, made, output = mixed
    words = {"zero": "zero", "nan": "nan|finite", "saturated": "saturat"}
    for name, (_, bad) in made.items():
        frames = tools.tables(output / f"{name}.zarr")["frames"]
        dropped = np.flatnonzero(frames["status"].values == STATUS["dropped"])
        assert dropped.tolist() == ([] if bad is None else [bad]), name
        assert (frames["status"].values[np.arange(FRAMES) != bad] == STATUS["measured"]).all()
        if bad is not None:
            reason = str(frames["reason"].values[bad]).lower()
            assert any(word in reason for word in words[name].split("|")), reason
            assert frames["column_count"].values[bad] == 0
            assert np.isnan(frames["snr"].values[bad])


def test_bad_frame_leaves_distant_frames_as_they_were(mixed):
    """Good frames far from the bad one see the same neighbours; only what is fitted to the whole movie may differ."""
    _, _, output = mixed
    fine, zero = (tools.tables(output / f"{name}.zarr")["frames"] for name in ("fine", "zero"))
    drift = [np.stack([t["drift_y"], t["drift_x"]], 1)[[0, 1, 8]] for t in (fine, zero)]
    assert np.abs(drift[0] - drift[1]).max() < 0.25 * tools.SAMPLING


def test_flagged_frames_alone_exit_0(tmp_path, counts, settings):
    path, _ = spoilt(tmp_path, counts)["zero"]
    file = tools.write_jobfile(tmp_path / "job.yaml", [path], tmp_path / "out", **settings)
    done = tools.colonnade("run", file, "--cluster", "serial")
    assert done.returncode == 0, done.stderr
    assert "1 frames flagged" in done.stdout


def test_good_frames_of_a_truncated_file_are_kept_on_request(tmp_path, counts, settings):
    path = truncated(tmp_path / "broken.tif", counts)
    (outcome,) = tools.run_job(path, tmp_path / "out", source__on_error="quarantine", **settings)
    frames = tools.tables(outcome.path)["frames"]
    good = frames["status"].values == STATUS["measured"]
    assert outcome.status == "complete"
    assert good[:5].all() and not good[5:].any()
    assert all(frames["reason"].values[~good])


@pytest.mark.parametrize("value", [0, 65535])
def test_movie_of_bad_frames_only_ends_with_all_of_them_flagged(tmp_path, settings, value):
    path = tools.write_movie(tmp_path / "bad.tif", np.full((6, 40, 40), value, np.uint16))
    (outcome,) = tools.run_job(path, tmp_path / "out", **settings)
    found = tools.tables(outcome.path)
    assert (outcome.status, outcome.dropped, outcome.columns) == ("complete", 6, 0)
    assert (found["frames"]["status"] == STATUS["dropped"]).all()
    assert found["columns"].sizes["column"] == 0


def test_pure_noise_ends_well_with_the_shipped_weights(tmp_path):
    noise = np.random.default_rng(5).poisson(12.0, (6, 64, 64)).astype(np.uint16)
    (outcome,) = tools.run_job(tools.write_movie(tmp_path / "noise.tif", noise), tmp_path / "out")
    assert (outcome.status, outcome.dropped) == ("complete", 0)
    assert outcome.columns <= 1


@pytest.mark.parametrize(
    ("frames", "shape"), [(1, (48, 48)), (2, (48, 48)), (5, (32, 32)), (3, (33, 71)), (17, (47, 35))]
)
def test_small_and_odd_movies(tmp_path, settings, frames, shape):
    counts, _ = tools.lattice(shape, frames=frames, seed=1)
    path = tools.write_movie(tmp_path / "small.tif", counts)
    (outcome,) = tools.run_job(path, tmp_path / "out", source__frame_interval=0.5, **settings)
    found = tools.tables(outcome.path)
    assert outcome.status == "complete"
    assert found["frames"].sizes["time"] == frames
    assert (found["frames"]["status"] == STATUS["measured"]).all()
    assert np.isfinite(found["frames"]["drift_y"]).all()


@pytest.mark.parametrize("weights", ["adapt", "scratch"])
def test_tiny_movies_can_be_trained_on(tmp_path, weights):
    counts, _ = tools.lattice((32, 33), frames=2, seed=1)
    path = tools.write_movie(tmp_path / "small.tif", counts)
    (outcome,) = tools.run_job(path, tmp_path / "out", denoise__weights=weights, denoise__steps=3)
    assert outcome.status == "complete"


def test_uncalibrated_floats_get_no_dose(tmp_path, counts, settings):
    frames = (counts * 37.5 - 120).astype(np.float32)
    path = tools.write_movie(tmp_path / "float.tif", frames)
    (outcome,) = tools.run_job(path, tmp_path / "out", **settings)
    found = tools.tables(outcome.path)["frames"]
    assert (found["status"] == STATUS["measured"]).all()
    assert np.isnan(found["dose"]).all() and np.isfinite(found["snr"]).all()


def timed_stack(path, counts, times):
    """A stack with time stamps of its own."""
    layout = stack_layout(counts.shape, counts.dtype, shard_megabytes=64)
    facts = {"content_hash": hashlib.sha256(counts.tobytes()).hexdigest(), "counts_per_electron": 1.0, "sampling": 0.2}
    store.create_stack(
        path, shape=counts.shape, dtype=counts.dtype, time=times, sampling=0.2, layout=layout, attributes=facts
    )
    store.write_frames(path, 0, counts)
    store.finish_stack(path, frame_ok=np.ones(len(counts), bool), attributes=facts)
    return path


def test_gap_in_time_parts_neighbours(tmp_path, counts, settings):
    """What lies beyond a gap has no say: frames before it are denoised as in a movie that ends there."""
    given = {**settings, "drift.correct": False, "detector.bad_pixels": False, "images.save": ["denoised"]}
    changed = counts.copy()
    changed[5:] = counts[5:, ::-1]
    denoised = {}
    for name, frames, gap in (("gap", counts, 60.0), ("other", changed, 60.0), ("none", counts, 0.0)):
        times = np.arange(FRAMES) * 1.0
        times[5:] += gap
        path = timed_stack(tmp_path / f"{name}.zarr", frames, times)
        (outcome,) = tools.run_job(path, tmp_path / f"run_{name}", **given)
        with xr.open_datatree(outcome.path, engine="zarr", consolidated=False) as tree:
            np.testing.assert_allclose(tree["frames/time"], times)
            denoised[name] = tree["images/denoised/s0/denoised"].values
    # The brightness of the whole movie, which scales the input, is the same to the last digits only.
    np.testing.assert_allclose(denoised["gap"][:5], denoised["other"][:5], rtol=1e-3, atol=1e-3)
    assert np.abs(denoised["gap"][4] - denoised["none"][4]).max() > 0.01


def test_bug_stops_at_once_and_the_same_run_goes_on_afterwards(tmp_path, counts, settings, monkeypatch):
    path = tools.write_movie(tmp_path / "movie.tif", counts)
    calls = []

    def broken(task):
        calls.append(task.start)
        if task.start >= 4:
            raise ZeroDivisionError("a bug at frame 4")
        return blocks.process(task)

    with monkeypatch.context() as patch:
        patch.setitem(story.TASKS, "process", broken)
        with pytest.raises(ZeroDivisionError, match="a bug at frame 4"):
            tools.run_job(path, tmp_path / "out", **settings)
    assert calls == [0, 4]
    failure = next(r for r in tools.records(tmp_path / "out") if r["kind"] == "failure")
    assert failure["step"] == "process" and "a bug at frame 4" in failure["reason"]
    before = tools.computed(tmp_path / "out")
    (outcome,) = tools.run_job(path, tmp_path / "out", **settings)
    after = tools.computed(tmp_path / "out")
    assert outcome.status == "complete"
    assert len(set(after)) == len(after)
    assert [block[:2] for block in after[len(before) :]] == [("process", 4), ("process", 8), ("collect", 0)]


def test_bug_on_a_worker_stops_the_job_too(tmp_path, counts, settings, monkeypatch):
    path = tools.write_movie(tmp_path / "movie.tif", counts)

    def broken(task):
        raise ZeroDivisionError(f"a bug at frame {task.start}")

    monkeypatch.setitem(story.TASKS, "survey", broken)
    with pytest.raises(ZeroDivisionError, match="a bug at frame"):
        tools.run_job(path, tmp_path / "out", workers=1, **settings)
    assert {step for step, *_ in tools.computed(tmp_path / "out")} == {"calibrate"}


def test_command_shows_a_bug_once_and_how_to_go_on(tmp_path, counts, settings, monkeypatch, capsys):
    path = tools.write_movie(tmp_path / "movie.tif", counts)
    file = tools.write_jobfile(tmp_path / "job.yaml", [path], tmp_path / "out", **settings)

    def broken(task):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setitem(story.TASKS, "process", broken)
    monkeypatch.setattr("sys.argv", ["colonnade", "run", str(file), "--cluster", "serial"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 1
    assert said.count("This is a bug of ours") == 1 and said.count("ZeroDivisionError: a bug of ours") == 1
    assert f"colonnade run {file} --cluster serial" in " ".join(said.split())
    assert "ZeroDivisionError" in (tmp_path / "out" / "debug.log").read_text()


def test_sample_of_bad_frames_is_replaced_by_good_ones(tmp_path, settings):
    """Calibration looks at two of six frames; both are bad."""
    counts, _ = tools.lattice((48, 48), frames=6, seed=3)
    counts[:2] = 0
    path = tools.write_movie(tmp_path / "movie.tif", counts)
    (outcome,) = tools.run_job(path, tmp_path / "out", **{**settings, "detector.sample_frames": 2})
    frames = tools.tables(outcome.path)["frames"]
    assert outcome.dropped == 2
    assert np.isfinite(frames["dose"].values[2:]).all()
