"""A small run with a known answer, written as the pipeline writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import store
from pipeline.images import write_examples
from schemas.columns import COLUMNS
from schemas.conventions import STATUS
from schemas.frames import FRAMES
from schemas.particles import PARTICLES

SAMPLING = 0.2
COUNTS = (3, 0, -1, 5, 2, -1)
"""Columns per frame: frame 1 is empty, frame 2 was dropped, frame 5 not computed."""

Tables = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def tables(counts: tuple[int, ...] = COUNTS, seed: int = 1) -> Tables:
    rng = np.random.default_rng(seed)
    n, total = len(counts), sum(max(c, 0) for c in counts)
    time = np.arange(n) * 0.5
    status = np.where(np.array(counts) < 0, STATUS["dropped"], STATUS["measured"]).astype("int8")
    if counts[-1] < 0:
        status[-1] = STATUS["not_computed"]
    frame = np.repeat(np.arange(n), np.maximum(counts, 0))
    frames = {
        "time": time,
        "status": status,
        "reason": np.array(["all-zero frame" if s == STATUS["dropped"] else "" for s in status], dtype=object),
        "drift_y": 0.3 * time,
        "drift_x": -0.7 * time,
        "drift_y_err": np.full(n, 0.01),
        "drift_x_err": np.full(n, 0.02),
        "column_count": np.array(counts, dtype="int32"),
        "species_count": np.stack([np.array(counts), np.where(np.array(counts) < 0, -1, 0)], axis=1).astype("int32"),
        "particle_count": np.where(np.array(counts) < 0, -1, 2).astype("int32"),
        "vacancy_count": np.full(n, -1, "int32"),
        "vacancy_count_err": np.full(n, np.nan, "float32"),
        "fourier_ratio": np.where(status == 0, 2.0 + np.arange(n), np.nan).astype("float32"),
        "interpretable": np.where(status == 0, np.arange(n) < 4, -1).astype("int8"),
        "mean_electrons": np.full(n, 8.0, "float32"),
        "dose": np.where(status == 0, 200.0, np.nan).astype("float32"),
        "snr": np.where(status == 0, 1.0 + np.arange(n), np.nan).astype("float32"),
        "residual_spread": np.full(n, 1.02, "float32"),
        "residual_correlation": np.full(n, -0.01, "float32"),
        "saturated_fraction": np.zeros(n, "float32"),
        "denoiser": np.array(["blindspot"] * n, dtype=object),
        "device": np.array(["cpu float32"] * n, dtype=object),
    }
    columns = {
        "frame": frame.astype("int32"),
        "y": rng.uniform(2, 8, total),
        "x": rng.uniform(2, 8, total),
        "y_err": np.full(total, 0.03, "float32"),
        "x_err": np.full(total, 0.04, "float32"),
        "intensity": rng.normal(50, 5, total).astype("float32"),
        "intensity_err": np.full(total, 2.0, "float32"),
        "background": np.full(total, 8.0, "float32"),
        "significance": rng.uniform(3, 20, total).astype("float32"),
        "evidence": rng.uniform(1, 90, total).astype("float32"),
        "supported": np.ones(total, "int8"),
        "roundness": np.full(total, 0.9, "float32"),
        "probability": np.linspace(0.5, 0.99, total).astype("float32"),
        "species": np.array(["Au"] * total, dtype=object),
        "species_probability": np.ones(total, "float32"),
        "particle": (np.arange(total) % 3 - 1).astype("int32"),
        "particle_ratio": np.full(total, 1.2, "float32"),
        "particle_interpretable": np.minimum(np.arange(total) % 3 - 1, 1).astype("int8"),
    }
    return frames, columns


def particles_of(frames: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of /particles that go with a table of frames."""
    frame = np.repeat(np.arange(len(frames["time"])), np.maximum(frames["particle_count"], 0))
    total = len(frame)
    rows: dict[str, np.ndarray] = {
        variable.name: np.linspace(1, 2, total).astype(variable.dtype)
        for variable in PARTICLES.variables
        if variable.dtype.startswith("float")
    }
    rows |= {"frame": frame.astype("int32"), "contact": (np.arange(total) % 4).astype("int8")}
    rows |= {"interpretable": (np.arange(total) % 2).astype("int8"), "zone": np.array(["110"] * total, dtype=object)}
    return rows


NOISE = {"offset": 0.0, "counts_per_electron": 1.0, "readout_variance": 0.5, "calibrated": True}


def write_run(path: Path, made: Tables, **attributes: Any) -> Path:
    frames, columns = made
    given = {
        "state": "complete",
        "movie": path.stem,
        "versions": {"python": "3.11", "torch": "2.13"},
        "settings": {"denoise": {"weights": "adapt", "steps": 77}, "source": {"sampling": SAMPLING}},
        "sources": [{"path": "movie.tif", "size": 1234567, "hash": "blake2b:abcdef", "frames": len(frames["time"])}],
        "models": {"denoise": {"name": "blindspot-small", "sha256": "0" * 64}},
        "plan": {"blocks": {"process": 2}},
        "notes": ["the dose is uncalibrated"],
        "prepare": {"polarity": 1, "bad_pixels": 7, "noise": NOISE},
        "stack": f"stacks/{path.stem}.zarr",
    }
    store.create_run(path, {**given, **attributes})
    classes = {"species_class": ["Au", "unknown"]}
    store.create_table(path, FRAMES, len(frames["time"]), sizes={"species_class": 2}, coordinates=classes)
    store.write_rows(path, FRAMES, 0, frames)
    store.create_table(path, COLUMNS, len(columns["frame"]), sizes={}, coordinates={})
    if len(columns["frame"]):
        store.write_rows(path, COLUMNS, 0, columns)
    particles = particles_of(frames)
    store.create_table(path, PARTICLES, len(particles["frame"]), sizes={}, coordinates={})
    if len(particles["frame"]):
        store.write_rows(path, PARTICLES, 0, particles)
    rng = np.random.default_rng(0)
    raw = rng.poisson(8, (2, 40, 48)).astype("float32")
    images = {"raw": raw, "denoised": raw * 0 + 8, "probability": raw * 0 + 0.1}
    write_examples(path, np.minimum([0, 3], len(frames["time"]) - 1), images, sampling=SAMPLING, origin=(1.0, 1.0))
    return path


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    return write_run(tmp_path / "movie.zarr", tables())


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "movie", counts: tuple[int, ...] = COUNTS, seed: int = 1, **attributes: Any) -> Path:
        return write_run(tmp_path / f"{name}.zarr", tables(counts, seed), **attributes)

    return make


@pytest.fixture
def write_ledger() -> Callable[[Path, str, list[dict[str, Any]]], Path]:
    def write(folder: Path, movie: str, records: list[dict[str, Any]]) -> Path:
        place = folder / "ledger" / movie
        place.mkdir(parents=True, exist_ok=True)
        file = place / f"{len(list(place.glob('*.jsonl'))):06d}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return file

    return write
