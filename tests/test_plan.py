"""The plan: a block is keyed by exactly what it depends on, says why it runs, and what it costs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import plan
from pipeline.ledger import Ledger
from pipeline.parts import part_path, write_part
from schemas.errors import ResourceError, SettingsError
from schemas.jobfile import flatten, parse_overrides
from schemas.settings import Settings

STEPS = tuple(plan.STEPS)
FACTS: dict[str, Any] = {"sampling": 0.2, "time": [0.0, 0.5, 1.0, 1.5], "energy": 300.0, "counts_per_electron": None}


@pytest.fixture
def weights(tiny_weights: dict[str, Path]) -> list[str]:
    return [f"denoise.weights={tiny_weights['denoise']}", f"segment.model={tiny_weights['columns']}"]


def keys(items: list[str], content: str = "c", **facts: Any) -> dict[str, str]:
    settings = Settings.model_validate(parse_overrides(items))
    calibration = plan.calibration(settings, **{**FACTS, **facts})
    return plan.fingerprints(plan.dependencies(settings, content, calibration))


def changed(before: dict[str, str], after: dict[str, str]) -> tuple[str, ...]:
    return tuple(step for step in STEPS if before[step] != after[step])


# ------------------------------------------------------------------------------------------------------ fingerprints


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("detector.bad_pixels=false", "calibrate"),
        ("source.counts_per_electron=3", "calibrate"),
        ("source.defocus_plane=1", "calibrate"),
        ("drift.correct=false", "calibrate"),
        ("drift.band=[0.02, 0.3]", "calibrate"),
        ("drift.lags=[1]", "survey"),
        ("drift.max_motion=5", "drift"),
        ("denoise.steps=7", "adapt"),
        ("denoise.max_gap=9", "adapt"),
        ("source.mode=haadf", "vote"),
        ("lowpass.cutoff=1", "vote"),
        ("segment.contrast=dark", "vote"),
        ("segment.window=128", "process"),
        ("columns.threshold=0.6", "process"),
        ("particles.threshold=0.4", "process"),
        ("fourier.significance=3", "process"),
        ("fourier.threshold=3", "collect"),  # what can be interpreted is decided when tables are written
        ("species.margin=2", "process"),
        ("drift.defocus_shift=5", "survey"),
        ("images.save=[denoised]", "process"),
        ("images.examples=3", "collect"),
        ("blocks.frames=3", None),
        ("stacks.keep=false", None),
        ("stacks.shard_megabytes=1", None),
        ("source.on_error=quarantine", None),
    ],
)
def test_a_setting_changes_the_steps_that_read_it_and_those_after(
    weights: list[str], override: str, first: str | None
) -> None:
    expected = plan.from_step(first) if first else ()
    assert changed(keys(weights), keys([*weights, override])) == expected


def test_every_setting_belongs_to_a_step_or_changes_no_result() -> None:
    """A setting that no fingerprint knows would let stale results pass for new ones."""
    read = [*plan.ANCHOR, *(name for _, _, names in plan.STEPS.values() for name in names)]
    elsewhere = {
        # These change the stack: its pixels are hashed, its calibration is part of the fingerprints.
        "source.sampling", "source.frame_interval", "source.energy", "source.counts_per_electron", "source.defocus",
        "source.dataset", "source.frames", "source.region", "source.binning",
        # These change no result.
        "source.on_error", "stacks.keep", "stacks.shard_megabytes", "blocks.frames",
    }  # fmt: skip
    for name in flatten(Settings().model_dump()):
        known = any(name == entry or name.startswith(f"{entry}.") for entry in read)
        assert known != (name in elsewhere), name


def test_where_drift_is_that_of_particles_it_depends_on_how_they_are_found(weights: list[str]) -> None:
    anchored = [*weights, "drift.anchor=particle"]
    assert changed(keys(weights), keys(anchored)) == STEPS
    for one in ("drift.anchor=support", "particles.threshold=0.4", "particles.model=none"):
        assert changed(keys(anchored), keys([*anchored, one])) == STEPS
    assert changed(keys(anchored), keys(anchored, sampling=0.21)) == STEPS
    still = [*weights, "drift.correct=false"]
    assert changed(keys(still), keys([*still, "drift.anchor=particle"])) == ()


@pytest.mark.parametrize(
    ("facts", "first"),
    [
        ({"sampling": 0.21}, "vote"),  # positions are in Å: the drift in pixels and the denoiser stay
        ({"counts_per_electron": 2.0}, "calibrate"),
        ({"time": [0.0, 1.0, 2.0, 3.0]}, "collect"),  # another frame interval moves no gap
        ({"time": [0.0, 0.5, 9.0, 9.5]}, "adapt"),  # a gap parts neighbours
        ({"time": [7.0, 7.5, 8.0, 8.5]}, None),
        ({"energy": 80.0}, "collect"),
        ({"defocus": [0.0, 50.0]}, "survey"),  # the planes of a series are compared
    ],
)
def test_recalibration_redoes_only_what_depends_on_it(
    weights: list[str], facts: dict[str, Any], first: str | None
) -> None:
    assert changed(keys(weights), keys(weights, **facts)) == (plan.from_step(first) if first else ())


def test_other_pixels_change_everything(weights: list[str]) -> None:
    assert changed(keys(weights), keys(weights, content="d")) == STEPS


def test_a_setting_that_restates_the_file_changes_nothing(weights: list[str]) -> None:
    stated = keys([*weights, "source.counts_per_electron=2"], counts_per_electron=3.0)
    assert stated == keys(weights, counts_per_electron=2.0)


def test_detector_maps_are_known_by_their_content(weights: list[str], tmp_path: Path) -> None:
    path = tmp_path / "dark.tif"
    path.write_bytes(b"one")
    before = keys([*weights, f"detector.dark={path}"])
    path.write_bytes(b"two")
    assert changed(before, keys([*weights, f"detector.dark={path}"])) == STEPS
    path.unlink()
    with pytest.raises(SettingsError, match=r"detector\.dark is .*dark\.tif, which is no file"):
        keys([*weights, f"detector.dark={path}"])


def test_weights_are_known_by_their_content(tiny_weights: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "other.safetensors"
    copy.write_bytes(tiny_weights["columns"].read_bytes())
    items = [f"denoise.weights={tiny_weights['denoise']}", f"segment.model={copy}"]
    before = keys(items)
    copy.write_bytes(tiny_weights["columns"].read_bytes() + b" ")
    assert changed(before, keys(items)) == plan.from_step("vote")


@pytest.mark.parametrize("setting", ["particles.model", "species.model"])
def test_weights_of_what_is_measured_redo_process_alone(weights: list[str], tmp_path: Path, setting: str) -> None:
    path = tmp_path / "own.safetensors"
    path.write_bytes(b"one")
    before, without = keys([*weights, f"{setting}={path}"]), keys(weights)
    path.write_bytes(b"two")
    assert changed(before, keys([*weights, f"{setting}={path}"])) == plan.from_step("process")
    assert changed(before, without) == plan.from_step("process")


def test_other_defoci_of_as_many_planes_are_only_told_anew(weights: list[str]) -> None:
    assert changed(keys(weights, defocus=[0.0, 50.0]), keys(weights, defocus=[0.0, 60.0])) == ("collect",)


def test_a_new_version_of_a_step_redoes_it(weights: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(weights)
    version, after, names = plan.STEPS["adapt"]
    monkeypatch.setitem(plan.STEPS, "adapt", (version + 1, after, names))  # type: ignore[arg-type]
    assert changed(before, keys(weights)) == plan.from_step("adapt")


def test_fingerprints_are_the_same_in_every_process() -> None:
    assert plan.digest({"b": [1, 2.5], "a": None}) == plan.digest({"a": None, "b": [1, 2.5]})
    assert plan.digest({"a": 1}) == hashlib.sha256(b'{"a": 1}').hexdigest()


# --------------------------------------------------------------------------------------------------------------- why


def test_why_names_old_and_new() -> None:
    old = {"denoise.steps": 1500, "source.content": "a" * 64, "x": 1}
    new = {"denoise.steps": 10, "source.content": "b" * 64, "x": 1}
    assert plan.why_stale(old, new) == f"denoise.steps: 1500 → 10; source.content: {'a' * 12}… → {'b' * 12}…"
    assert plan.why_stale({str(i): 0 for i in range(9)}, {str(i): 1 for i in range(9)}).endswith("; …")


def plan_lines(folder: Path, items: list[str], frames: int = 10, size: int = 4) -> dict[str, plan.StepPlan]:
    settings = Settings.model_validate(parse_overrides(items))
    deps = plan.dependencies(settings, "c", plan.calibration(settings, **FACTS))
    lines = plan.plan_movie(Ledger(folder / "ledger"), folder / "parts", frames=frames, size=size, deps=deps)
    return {line.step: line for line in lines}


def finish(folder: Path, items: list[str], step: str, start: int, stop: int, *, told: bool = True) -> None:
    settings = Settings.model_validate(parse_overrides(items))
    deps = plan.dependencies(settings, "c", plan.calibration(settings, **FACTS))
    key = plan.fingerprints(deps)[step]
    write_part(part_path(folder / "parts", step, start, stop, key), {}, {"fingerprint": key})
    ledger = Ledger(folder / "ledger")
    ledger.add("deps", step=step, fingerprint=key, deps=deps[step])
    if told:
        ledger.add("block", step=step, start=start, stop=stop, fingerprint=key, status="done")
    ledger.flush()


def test_each_block_runs_for_a_reason(weights: list[str], tmp_path: Path) -> None:
    lines = plan_lines(tmp_path, weights)
    assert {(line.reason, line.todo == line.blocks) for line in lines.values()} == {("missing", True)}
    assert {step: line.blocks for step, line in lines.items()} == {
        "calibrate": 1, "survey": 3, "drift": 1, "adapt": 1, "vote": 1, "process": 3,
    }  # fmt: skip

    finish(tmp_path, weights, "survey", 0, 4)
    finish(tmp_path, weights, "survey", 8, 10, told=False)  # the driver died before it noted it
    finish(tmp_path, weights, "drift", 0, 10)
    lines = plan_lines(tmp_path, weights)
    assert (lines["survey"].todo, lines["survey"].reason) == (1, "missing (2 of 3 done)")
    assert (lines["drift"].todo, lines["drift"].reason) == (0, "done")

    lines = plan_lines(tmp_path, [*weights, "drift.lags=[1, 3]"])
    assert (lines["survey"].todo, lines["survey"].reason) == (3, "stale: drift.lags: [1, 2, 4, 8] → [1, 3]")
    assert lines["drift"].reason == "stale: drift.lags: [1, 2, 4, 8] → [1, 3]"


def test_a_record_without_its_part_is_not_done(weights: list[str], tmp_path: Path) -> None:
    finish(tmp_path, weights, "drift", 0, 10)
    for part in (tmp_path / "parts").iterdir():
        part.unlink()
    assert plan_lines(tmp_path, weights)["drift"].todo == 1


def test_a_failed_block_will_be_tried_again(weights: list[str], tmp_path: Path) -> None:
    settings = Settings.model_validate(parse_overrides(weights))
    key = plan.fingerprints(plan.dependencies(settings, "c", plan.calibration(settings, **FACTS)))["process"]
    ledger = Ledger(tmp_path / "ledger")
    ledger.add("block", step="process", start=4, stop=8, fingerprint=key, status="failed", reason="x")
    ledger.flush()
    assert plan_lines(tmp_path, weights)["process"].reason == "failed (1); will be tried again"


# ------------------------------------------------------------------------------------------------- blocks and memory


@given(st.integers(1, 5000), st.integers(1, 64))
def test_blocks_tile_the_frames_once(frames: int, size: int) -> None:
    cuts = list(plan.blocks(frames, size))
    assert [i for start, stop in cuts for i in range(start, stop)] == list(range(frames))
    assert all(stop - start == size for start, stop in cuts[:-1])


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_default_blocks_have_4_to_16_frames(height: int, width: int) -> None:
    assert 4 <= plan.block_frames(Settings(), (100, height, width)) <= 16


def memory(items: list[str], shape: tuple[int, int, int], size: int = 8) -> float:
    return plan.predict_memory(Settings.model_validate(parse_overrides(items)), shape, 2, size, 4)


def test_memory_grows_with_what_a_task_holds_and_not_with_the_movie() -> None:
    base = memory([], (1000, 1024, 1024))
    assert memory([], (100_000, 1024, 1024)) == base
    assert memory([], (1000, 2048, 2048)) > base
    assert memory([], (1000, 1024, 1024), size=64) > base
    assert memory(["images.save=[denoised]"], (1000, 1024, 1024)) >= base
    assert memory(["denoise.tile=256", "segment.window=256"], (1000, 4096, 4096)) < memory(
        ["denoise.tile=null", "segment.window=null"], (1000, 4096, 4096)
    )


def test_memory_counts_planes_and_particles(tmp_path: Path) -> None:
    settings, shape = Settings(), (100, 2048, 2048)
    one, three = (plan.predict_memory(settings, shape, 2, 4, 3, planes) for planes in (1, 3))
    assert three - one >= 3 * 2048**2 * 6 - 2048**2 * plan.SPECTRUM_BYTES
    assert memory([], shape) > memory(["particles.model=none"], shape)
    assert memory(["images.save=[labels]"], shape) > memory([], shape)


def test_memory_holds_at_least_the_frames_of_the_task() -> None:
    shape = (1000, 2048, 2048)
    held = (8 + 2 * 4) * 2048**2 * (2 + 4) + 8 * 2048**2 * 4
    assert memory([], shape) >= held
    assert memory([], shape) < 20 * held


def test_too_little_memory_is_refused_with_a_remedy() -> None:
    plan.require_memory(1e9, float("inf"))
    with pytest.raises(ResourceError, match=r"2\.50 GB; a worker has 1\.00 GB: ask for fewer workers, or set blocks"):
        plan.require_memory(2.5e9, 1e9)


def test_costs_count_the_stack() -> None:
    costs = plan.predict_costs(Settings(), (100, 512, 512), 2, size=16, halo=4, shard_frames=50)
    assert costs.stack_bytes == 100 * 512 * 512 * 2
    with_images = plan.predict_costs(
        Settings.model_validate({"images": {"save": ["denoised"]}}),
        (100, 512, 512),
        2,
        size=16,
        halo=4,
        shard_frames=50,
    )
    assert with_images.result_bytes - costs.result_bytes == pytest.approx(100 * 512 * 512 * 4 * 4 / 3, rel=0.01)


@pytest.mark.parametrize(
    ("items", "halo"),
    [(["denoise.network=none"], 0), (["denoise.network=wcvd"], 1), (["denoise.tier=small"], 7), ([], 7)],
)
def test_the_halo_is_what_the_denoiser_and_its_filter_look_at(items: list[str], halo: int, weights: list[str]) -> None:
    assert plan.denoiser_halo(Settings.model_validate(parse_overrides(items))) == halo
    assert plan.denoiser_halo(Settings.model_validate(parse_overrides(weights))) == 2


def test_calibration_does_not_mind_the_type_of_its_times() -> None:
    facts = {k: v for k, v in FACTS.items() if k != "time"}
    one = plan.calibration(Settings(), time=np.array(FACTS["time"]).tolist(), **facts)
    assert one == plan.calibration(Settings(), time=FACTS["time"], **facts)
