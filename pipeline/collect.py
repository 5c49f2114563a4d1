"""From part files to the run's tables: rows by prefix sum, one task per shard; and the examples for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import inference, store
from pipeline.images import write_examples as put_examples
from pipeline.measure import particles_of
from pipeline.movie import Clock, Task, open_movie, record
from pipeline.parts import read_part
from schemas.columns import COLUMNS
from schemas.conventions import INTERPRETABLE, STATUS
from schemas.frames import FRAMES
from schemas.particles import PARTICLES
from schemas.variables import Schema

TABLES: Mapping[str, Schema] = {"frames": FRAMES, "columns": COLUMNS, "particles": PARTICLES}

EXAMPLE_EDGE = 512  # pixels of an example that the report shows


@dataclass(frozen=True)
class Piece:
    """One block as collect sees it: its frames, and where its rows begin in the table that is written."""

    start: int
    stop: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class ShardOfRows:
    """Rows [start, stop) of a table and the blocks that hold them."""

    task: Task
    table: str
    start: int
    stop: int
    pieces: tuple[Piece, ...]


def shards(task: Task, table: str, pieces: Sequence[Piece]) -> list[ShardOfRows]:
    """Cut a table, one of ``TABLES``, into the shards that tasks own."""
    total = pieces[-1].first_row + pieces[-1].rows if pieces else 0
    size = store.shard_rows(TABLES[table])
    firsts = np.array([piece.first_row for piece in pieces])
    ends = firsts + np.array([piece.rows for piece in pieces])
    found = []
    for start in range(0, total, size):
        stop = min(start + size, total)
        inside = np.flatnonzero((ends > start) & (firsts < stop))
        found.append(ShardOfRows(task, table, start, stop, tuple(pieces[int(i)] for i in inside)))
    return found


def prefix_sum(blocks: Sequence[tuple[int, int]], rows: Sequence[int]) -> list[Piece]:
    """Where each block's rows begin, in the order of the frames."""
    first = np.concatenate([[0], np.cumsum(rows)])
    return [Piece(start, stop, int(first[i]), int(rows[i])) for i, (start, stop) in enumerate(blocks)]


def write_shard(shard: ShardOfRows) -> Mapping[str, Any]:
    """Gather the rows of one shard from the part files and write them."""
    clock = Clock()
    schema = TABLES[shard.table]
    gathered: dict[str, list[np.ndarray]] = {}
    with clock("collect"):
        for piece in shard.pieces:
            arrays, _ = read_part(shard.task.part("process", piece.start, piece.stop))
            rows = slice(max(0, shard.start - piece.first_row), min(piece.rows, shard.stop - piece.first_row))
            for variable in schema.variables:
                if f"{shard.table}.{variable.name}" in arrays:
                    values = arrays[f"{shard.table}.{variable.name}"][rows]
                    text = values.astype(object) if variable.dtype == "string" else values.astype(variable.dtype)
                    gathered.setdefault(variable.name, []).append(text)
        table = {name: np.concatenate(values) for name, values in gathered.items()}
        limit = shard.task.settings.fourier.threshold
        if "fourier_ratio" in table:
            table["interpretable"] = interpretable(table, threshold=limit)
        if "particle_ratio" in table:
            seen = interpretable({"fourier_ratio": table["particle_ratio"]}, threshold=limit)
            table["particle_interpretable"] = np.where(table["particle"] >= 0, seen, np.int8(-1))
        store.write_rows(Path(shard.task.run), schema, shard.start, table)
    return record(clock, rows=shard.stop - shard.start)


def interpretable(table: Mapping[str, np.ndarray], *, threshold: float) -> np.ndarray:
    """Whether rows of frames or particles can be interpreted, by their ``fourier_ratio``; −1 in frames not measured.

    Decided here and not with the pixels, so that another threshold computes nothing again.
    """
    with np.errstate(invalid="ignore"):
        seen = np.asarray(table["fourier_ratio"], dtype=np.float64) <= threshold
    found = np.where(seen, INTERPRETABLE["yes"], INTERPRETABLE["no"])
    if "status" in table:
        found = np.where(table["status"] == STATUS["measured"], found, -1)
    return found.astype(np.int8)


def write_examples(task: Task) -> Mapping[str, Any]:
    """Raw and denoised crops of a few good frames, and their particles, for the report."""
    clock, movie = Clock(), open_movie(task)
    good = np.flatnonzero(movie.good) if movie.good is not None else np.zeros(0, dtype=int)
    count = min(task.settings.images.examples, len(good))
    chosen = good[np.unique(np.linspace(0, len(good) - 1, count).round().astype(int))] if count else good[:0]
    height, width = movie.stack.shape[1:]
    top, left = max(0, height - EXAMPLE_EDGE) // 2, max(0, width - EXAMPLE_EDGE) // 2
    crop = (slice(None), slice(top, top + EXAMPLE_EDGE), slice(left, left + EXAMPLE_EDGE))
    images: dict[str, list[np.ndarray]] = {"raw": [], "denoised": [], "probability": [], "labels": []}
    for index in chosen:
        found = inference.infer(movie, range(int(index), int(index) + 1), clock)
        empty = np.full(found.denoised.shape, np.nan, dtype=np.float32)
        images["raw"].append(found.electrons[crop])
        images["denoised"].append(found.denoised[crop])
        images["probability"].append((empty if found.probability is None else found.probability)[crop])
        labels = particles_of(movie, found, 0, clock)[0]
        images["labels"].append((np.zeros(empty.shape, np.int32) if labels is None else labels[None])[crop])
    if count:
        sampling, origin = movie.stack.sampling, movie.stack.origin
        put_examples(
            Path(task.run), chosen, {name: np.concatenate(values) for name, values in images.items()},
            sampling=sampling, origin=(origin[0] + top * sampling, origin[1] + left * sampling),
        )  # fmt: skip
    return record(clock, rows=int(count))
