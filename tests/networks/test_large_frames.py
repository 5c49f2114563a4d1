"""Frames of 4096 × 4096 pixels: bounded memory, and the same answer however they are cut."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import numpy as np
import pytest

from pipeline.networks.weights import SHIPPED

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_windows"
MODELS = [name for name in ("columns", "particles") if (SHIPPED / f"{name}.safetensors").exists()]


@pytest.fixture(scope="module")
def measure():
    loader = SourceFileLoader("measure_windows", str(SCRIPT))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", MODELS)
def test_windows_of_shipped_networks_equal_the_whole_frame(measure, tmp_path, model):
    _, whole = measure.computed(model, 500, None, tmp_path)
    assert whole.std() > 1e-3
    _, cut = measure.computed(model, 500, 200, tmp_path)
    assert np.abs(cut - whole).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_large_frame_takes_less_than_two_gibibytes(measure, tmp_path, model):
    facts, found = measure.computed(model, 4096, 384, tmp_path)
    assert facts["extra"] < 2 * 2**30
    assert found.shape == (4096, 4096)
    other = measure.computed(model, 4096, 700, tmp_path)[1]
    assert max(float(np.abs(a - b).max()) for a, b in zip(found, other, strict=True)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_quarter_of_a_large_frame_equals_itself_in_one_piece(measure, tmp_path, model):
    whole, cut = (measure.computed(model, 2048, window, tmp_path)[1] for window in (None, 384))
    assert max(float(np.abs(a - b).max()) for a, b in zip(cut, whole, strict=True)) < 1e-4
