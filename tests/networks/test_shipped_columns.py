"""What the shipped column weights state about themselves."""

from __future__ import annotations

import pytest
import torch

from pipeline.networks import train_columns
from pipeline.networks.train_columns import ColumnTraining
from pipeline.networks.weights import load_weights


def test_the_shipped_weights_reach_the_score_that_they_state():
    loaded = load_weights("columns")
    stated = {k: tuple(v) if isinstance(v, list) else v for k, v in loaded.metadata["training"].items()}
    stated.pop("images")
    spec = ColumnTraining(**stated)
    assert spec == ColumnTraining(), "the shipped weights come from the default specification"
    with torch.no_grad():
        found = train_columns.validate(loaded.module, train_columns.validation_set(spec), spec)
    assert found["score"] == pytest.approx(loaded.metadata["validation"]["score"], rel=0.01)
