"""What a task does when memory runs out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline import blocks, models
from pipeline.movie import Task, device_text
from pipeline.parts import write_part
from schemas.errors import ResourceError
from schemas.settings import Settings

TASK = Task(
    "stack",
    "run",
    "parts",
    10,
    Settings.model_validate({"segment": {"window": 384}}),
    (("process", "key"),),
    "cpu",
    0,
    10,
)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_smaller_tiles_are_tried_and_told(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    tried: list[Task] = []

    def process(task: Task, clock: object) -> dict[str, str]:
        tried.append(task)
        if len(tried) < 3:
            raise error("no room")
        return {"device": device_text(task.device, "float32", task.halvings)}

    monkeypatch.setattr(blocks, "_process", process)
    assert "tiles halved 2 times" in blocks.process(TASK)["device"]
    sizes = [(task.settings.denoise.tile, task.settings.segment.window) for task in tried]
    # A window is never smaller than what its halos leave a core.
    least = 4 * models.halo_of(TASK.settings.segment)
    assert 96 < least < 192 and sizes == [(384, 384), (192, 192), (96, least)]
    assert {task.part("process") for task in tried} == {TASK.part("process")}


def test_memory_that_is_too_small_for_good_is_the_sites_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(task: Task, clock: object) -> dict[str, str]:
        raise MemoryError("no room")

    monkeypatch.setattr(blocks, "_process", process)
    with pytest.raises(ResourceError, match=r"smallest tiles \(no room\); give workers more"):
        blocks.process(TASK)


@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_want_of_memory_is_told_from_other_errors_of_torch(
    monkeypatch: pytest.MonkeyPatch, kind: type[RuntimeError]
) -> None:
    def process(task: Task, clock: object) -> dict[str, str]:
        raise kind("shapes do not fit")

    monkeypatch.setattr(blocks, "_process", process)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        blocks.process(TASK)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)  # what torch says when the host has no room

    def starve(task: Task, clock: object) -> dict[str, str]:
        raise kind(str(caught.value))

    monkeypatch.setattr(blocks, "_process", starve)
    with pytest.raises(ResourceError, match="smallest tiles"):
        blocks.process(TASK)


def test_a_block_that_is_on_disk_is_not_computed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its worker may have died after the part was written and before anybody was told."""
    task = dataclasses.replace(TASK, parts=str(tmp_path))
    monkeypatch.setattr(blocks, "_process", lambda task, clock: {"rows": 5, "seconds": {"denoise": 1.0}})
    assert "adopted" not in blocks.process(task)
    write_part(task.part("process"), {}, {"fingerprint": "another", "rows": 3})
    assert "adopted" not in blocks.process(task)
    made = {"rows": 3, "particles": 2, "device": "cpu, float32", "models": {"segment": "0123"}}
    write_part(task.part("process"), {}, {"fingerprint": "key", **made})
    assert blocks.process(task) == {"seconds": {}, "adopted": True, **made}
