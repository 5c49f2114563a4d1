"""How fast, against what: the pipeline, the machine's own limits, and the script a user would write, in one run."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import shift as move
from skimage.feature import peak_local_max
from skimage.filters import difference_of_gaussians
from skimage.registration import phase_cross_correlation

from pipeline import store
from pipeline.ledger import read_records
from pipeline.networks.weights import load_weights

NUMERIC = ("detector", "drift", "denoise", "lowpass", "segment", "columns", "residual", "adapt")
STORAGE = ("read", "write", "collect")


@dataclass(frozen=True)
class Ceilings:
    """Limits of the machine, each with one thread: matrix product [GFLOP/s], copy [GB/s], disk [MB/s]."""

    matmul_float32: float
    matmul_bfloat16: float
    copy: float
    disk_write: float
    disk_read: float


def _best(function: Callable[[], None], repeats: int = 5) -> float:
    """Shortest of several runs [s]: others on the machine only make it longer."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def matmul_rates(device: str) -> dict[str, float]:
    """Matrix products [GFLOP/s] of a device, on a CPU with one thread, in float32 and bfloat16."""
    torch.set_num_threads(1)
    n = 1024 if device == "cpu" else 8192
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

        def product(a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            _ = a @ b
            if device != "cpu":
                torch.cuda.synchronize()

        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / _best(product) / 1e9
    return rates


def measure_ceilings(folder: Path) -> Ceilings:
    """Measure what no program on this machine can exceed."""
    rates = list(matmul_rates("cpu").values())
    source = np.ones(2**25, dtype=np.float32)
    target = np.empty_like(source)
    copy = 2 * source.nbytes / _best(lambda: np.copyto(target, source)) / 1e9
    data = os.urandom(2**26)
    with tempfile.NamedTemporaryFile(dir=folder) as file:

        def write() -> None:
            file.seek(0)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

        def read() -> None:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            file.read()

        written, was_read = _best(write, 3), _best(read, 3)
    return Ceilings(rates[0], rates[1], copy, len(data) / written / 1e6, len(data) / was_read / 1e6)


def seconds_by_step(ledger: Path) -> dict[str, float]:
    """Seconds that all tasks of a movie spent in each step, from its ledger."""
    total: dict[str, float] = {}
    for record in read_records(ledger):
        for name, seconds in (record.get("seconds") or {}).items() if record["kind"] == "block" else ():
            total[name] = total.get(name, 0.0) + seconds
    return total


def network_rates(run: Path, seconds: Mapping[str, float]) -> dict[str, float]:
    """GFLOP/s that the networks reached on one worker, by step; ``seconds`` are those of all workers together."""
    state = store.attributes_of(run)
    stack = store.open_stack(run.parent / state["stack"])
    pixels = float(np.prod(stack.shape))
    rates = {}
    for step, name, scale in (("denoise", "denoise", 1.0), ("segment", "columns", _segment_scale(stack.sampling))):
        network: Any = load_weights(name).module
        if seconds.get(step):
            rates[step] = 2 * float(network.macs_per_pixel) * pixels * scale / seconds[step] / 1e9
    return rates


def _segment_scale(sampling: float) -> float:
    """Pixels of the segmentation network per pixel of the detector."""
    return (sampling / float(load_weights("columns").metadata["sampling"])) ** 2


# ------------------------------------------------------------------------------------------------------- yardstick


def plain_script(counts: np.ndarray, *, sampling: float, polarity: int) -> list[np.ndarray]:
    """What a user would write with scikit-image in one process: columns (y, x) [px] of each frame (time, y, x).

    Drift from cross-correlation with frame 0, the mean of five aligned frames, difference of Gaussians, local maxima.
    """
    frames = counts.astype(np.float32)
    drift = [phase_cross_correlation(frames[0], frame, upsample_factor=20, normalization=None)[0] for frame in frames]
    found = []
    for t in range(len(frames)):
        near = range(max(0, t - 2), min(len(frames), t + 3))
        mean = np.mean([move(frames[k], drift[k] - drift[t], order=1, mode="nearest") for k in near], axis=0)
        sharp = polarity * difference_of_gaussians(mean, 0.35 / sampling, 0.9 / sampling)
        found.append(peak_local_max(sharp, min_distance=max(1, round(0.8 / sampling)), threshold_rel=0.3).astype(float))
    return found
