"""What a task does when memory runs out."""

from __future__ import annotations

import pytest
import torch

from pipeline import blocks, models
from pipeline.movie import Task, device_text
from schemas.settings import Settings

TASK = Task("stack", "run", "parts", 10, Settings(), (("process", "key"),), "cpu", 0, 10)


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


def test_memory_that_is_too_small_for_good_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(task: Task, clock: object) -> dict[str, str]:
        raise MemoryError("no room")

    monkeypatch.setattr(blocks, "_process", process)
    with pytest.raises(MemoryError, match="no room"):
        blocks.process(TASK)
