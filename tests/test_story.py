"""What a run answers after settings changed and changed back, records were lost, or steps were asked for again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from pipeline import store, story
from pipeline.job import Engine, Outcome
from pipeline.ledger import Ledger, read_records
from pipeline.results.open import open_run
from pipeline.steps.lowpass import ROLL_OFF, information_limit
from schemas.conventions import STATUS
from schemas.jobfile import parse_overrides, validate

FINDS = ["columns.threshold=0.05", "columns.min_significance=-100", "columns.min_relative=0", "blocks.frames=3"]


class Runs:
    """One movie in one folder, run again and again."""

    def __init__(self, movie: Path, output: Path, settings: list[str]) -> None:
        self.movie, self.output, self.settings = movie, output, settings

    def __call__(self, *more: str, redo: str | None = None) -> Outcome:
        data = parse_overrides([*self.settings, *FINDS, *more])
        job = validate({**data, "movies": [{"source": str(self.movie)}], "output": str(self.output)})
        (outcome,) = story.run(job, redo=redo)
        assert outcome.status == "complete", outcome.reason
        return outcome

    def tables(self) -> tuple[xr.Dataset, xr.Dataset]:
        with store.open_tree(self.output / "tiny.zarr") as tree:
            return tree["frames"].to_dataset().load(), tree["columns"].to_dataset().load()

    def computed(self) -> dict[str, int]:
        """Blocks that were computed so far, by step; adopted ones do not count."""
        found: dict[str, int] = {}
        for record in read_records(self.output / "ledger" / "tiny"):
            if record["kind"] == "block" and record["status"] == "done" and not record.get("adopted"):
                found[record["step"]] = found.get(record["step"], 0) + 1
        return found


@pytest.fixture
def runs(tiny_movie: Path, quick: list[str], tmp_path: Path) -> Runs:
    return Runs(tiny_movie, tmp_path / "out", quick)


def same(one: tuple[xr.Dataset, xr.Dataset], other: tuple[xr.Dataset, xr.Dataset]) -> bool:
    return all(a.identical(b) for a, b in zip(one, other, strict=True))


def test_tables_hold_every_frame_and_its_columns(runs: Runs) -> None:
    outcome = runs()
    frames, columns = runs.tables()
    assert outcome.columns == columns.sizes["column"] > 0
    assert (frames.status == STATUS["measured"]).all()
    assert np.array_equal(np.repeat(np.arange(8), frames.column_count), columns.frame)
    assert runs.computed() == {
        "calibrate": 1, "survey": 3, "drift": 1, "adapt": 1, "vote": 1, "process": 3, "collect": 1,
    }  # fmt: skip


def test_the_same_again_computes_nothing(runs: Runs) -> None:
    runs()
    before, counted = runs.tables(), runs.computed()
    runs()
    assert runs.computed() == counted
    assert same(runs.tables(), before)
    assert store.attributes_of(runs.output / "tiny.zarr")["state"] == "complete"


def test_recalibration_moves_positions_and_keeps_pixels(runs: Runs) -> None:
    runs("columns.min_distance=1", "columns.width=0.5", "columns.margin=0")
    before, counted = runs.tables(), runs.computed()
    runs("source.sampling=0.21", "columns.min_distance=1.05", "columns.width=0.525", "columns.margin=0")
    after = runs.tables()
    assert runs.computed() == {**counted, "vote": 2, "process": 6, "collect": 2}
    assert np.allclose(after[0].drift_y, before[0].drift_y * 1.05)
    assert float(after[1].y.max()) > float(before[1].y.max())


def test_another_frame_interval_changes_times_only(runs: Runs) -> None:
    runs()
    before, counted = runs.tables(), runs.computed()
    runs("source.frame_interval=2")
    assert runs.computed() == {**counted, "collect": 2}
    frames, columns = runs.tables()
    assert frames.time.values.tolist() == [2.0 * t for t in range(8)]
    assert columns.identical(before[1])


def test_settings_that_change_back_give_the_first_answer(runs: Runs) -> None:
    runs()
    before = runs.tables()
    assert runs("columns.threshold=0.9999").columns != before[1].sizes["column"]
    counted = runs.computed()
    runs()
    assert same(runs.tables(), before)
    assert runs.computed() == {**counted, "collect": 3}  # blocks of the first settings are still there


def test_tables_of_an_interrupted_collect_are_not_vouched_for(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs()
    before = runs.tables()
    with monkeypatch.context() as patch:

        def killed(*args: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(story.collect, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            runs("columns.threshold=0.3")
    assert (runs.tables()[0].status == STATUS["not_computed"]).all()
    assert store.attributes_of(runs.output / "tiny.zarr")["state"] == "running"
    runs()  # the first settings again, whose collect is on record as done
    assert same(runs.tables(), before)


def test_blocks_whose_records_were_lost_keep_their_rows(runs: Runs) -> None:
    """A driver that is killed loses the records that it had not written yet."""
    runs()
    before = runs.tables()
    shutil.rmtree(runs.output / "ledger" / "tiny")
    runs()
    assert same(runs.tables(), before)
    assert runs.computed() == {"collect": 1}


def test_a_damaged_part_names_its_remedy_and_is_done_again(runs: Runs) -> None:
    runs()
    before = runs.tables()
    (part,) = (runs.output / "parts" / "tiny").glob("process-000000003-*")
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(AssertionError, match=r"is damaged .*remove it and run again"):
        runs("images.examples=2")
    part.unlink()
    runs()
    assert same(runs.tables(), before)


@pytest.mark.parametrize(("step", "again"), [("collect", {"collect"}), ("process", {"process", "collect"})])
def test_redo_does_a_step_and_those_after_again(runs: Runs, step: str, again: set[str]) -> None:
    runs()
    before, counted = runs.tables(), runs.computed()
    runs(redo=step)
    assert runs.computed() == {name: n * (2 if name in again else 1) for name, n in counted.items()}
    assert same(runs.tables(), before)


def image(runs: Runs, name: str) -> np.ndarray:
    with store.open_tree(runs.output / "tiny.zarr") as tree:
        return np.asarray(tree[f"images/{name}/s0/{name}"].values)


def denoised(runs: Runs) -> np.ndarray:
    return image(runs, "denoised")


def test_images_are_those_of_the_settings(runs: Runs) -> None:
    runs("images.save=[denoised]")
    plain = denoised(runs)
    runs("images.save=[denoised]", "lowpass.cutoff=0.3")
    assert not np.array_equal(denoised(runs), plain)
    runs("images.save=[denoised,uncertainty]")
    assert np.array_equal(denoised(runs), plain)
    assert np.isnan(image(runs, "uncertainty")).all()  # WCVD does not know its own
    runs()
    assert not (runs.output / "tiny.zarr" / "images").exists()  # nobody asked for them: none are left over


def test_denoised_frames_end_at_the_information_limit(runs: Runs) -> None:
    """Where the energy is known; the same bits as with the number given, and the run says so."""
    runs("images.save=[denoised]", "source.energy=300", "lowpass.cutoff=information")
    found, limit = denoised(runs), information_limit(300.0, focal_spread=20.0) / (1 - ROLL_OFF)
    notes = open_run(runs.output / "tiny.zarr").attrs["colonnade"]["notes"]
    assert any("beyond 1.51 1/Å, the information limit at 300 keV" in note for note in notes)
    runs("images.save=[denoised]", "source.energy=300", f"lowpass.cutoff={limit!r}")
    assert np.array_equal(denoised(runs), found)
    runs("images.save=[denoised]", "source.energy=300", "lowpass.cutoff=none")
    assert not np.array_equal(denoised(runs), found)


def test_shipped_weights_given_by_name_get_the_filter_of_the_movie(runs: Runs) -> None:
    runs("denoise.weights=denoise-small")
    blocks = [record for record in read_records(runs.output / "ledger" / "tiny") if record["kind"] == "block"]
    (weights,) = [record["weights"] for record in blocks if record["step"] == "adapt"]
    assert weights == "own"


def test_a_stack_that_is_not_kept_is_made_again_when_it_is_needed(runs: Runs) -> None:
    runs("stacks.keep=false")
    before, counted = runs.tables(), runs.computed()
    assert not (runs.output / "stacks" / "tiny.zarr").exists()
    runs("stacks.keep=false")
    assert same(runs.tables(), before)
    assert runs.computed() == counted


def test_the_ledger_says_what_changed(runs: Runs) -> None:
    runs()
    runs("drift.max_motion=3")
    ledger = Ledger(runs.output / "ledger" / "tiny")
    assert ledger.last_deps("drift")[1]["drift.max_motion"] == 3.0


def test_only_steps_that_compute_on_a_gpu_ask_for_one(tmp_path):
    engine = Engine(tmp_path, None, "cuda")
    wanted = {step: engine.resources(step) for step in story.TASKS}
    assert {step for step, needs in wanted.items() if needs == {"GPU": 1}} == set(story.TASKS) - {"drift"}
    assert engine.resources("collect") == {"CPU": 1}
    assert {frozenset(Engine(tmp_path, None, "cpu").resources(step)) for step in story.TASKS} == {frozenset({"CPU"})}
