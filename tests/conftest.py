"""What tests of several rooms share: a tiny movie with known columns, tiny untrained weights, one torch thread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from pipeline.networks.weights import build, save_weights

SAMPLING = 0.2
"""Å per pixel of the tiny movie."""


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Convolutions of one thread and of two differ in the last bits."""
    torch.set_num_threads(1)


def lattice_movie(
    frames: int = 8, side: int = 64, *, drift: float = 0.4, dose: float = 20.0, seed: int = 0
) -> np.ndarray:
    """Counts (t, y, x) uint16 of a distorted lattice of Gaussian columns that drifts by ``drift`` px per frame."""
    rng = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(np.arange(-2, side + 12, 12.0), np.arange(-2, side + 12, 12.0), indexing="ij"), -1)
    at = at.reshape(-1, 2) + rng.uniform(-1.5, 1.5, (at.shape[0] * at.shape[1], 2))
    y, x = np.mgrid[:side, :side].astype(float)
    out = np.empty((frames, side, side), dtype=np.uint16)
    for t in range(frames):
        image = np.full((side, side), 0.6)
        for cy, cx in at + np.array([drift, -drift / 2]) * t:
            image += 1.6 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * 2.2**2))
        out[t] = rng.poisson(image * dose)
    return out


def write_movie(path: Path, frames: np.ndarray) -> Path:
    """A TIFF with one page per frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, frames, photometric="minisblack")
    return path


@pytest.fixture
def tiny_movie(tmp_path: Path) -> Path:
    """Eight frames of 64 x 64 pixels in a TIFF that states neither sampling nor times."""
    return write_movie(tmp_path / "tiny.tif", lattice_movie())


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained networks, small and always the same: {"denoise": …, "columns": …}."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    denoise = build("blindspot", {"frames": 5, "channels": 16, "dilations": [2]})
    columns = build("msdnet", {"inputs": 1, "outputs": 2, "width": 4, "dilations": [1, 2, 4, 8, 6, 2]})
    save_weights(denoise, folder / "denoise.safetensors", {"sampling": 0.2})
    save_weights(columns, folder / "columns.safetensors", {"sampling": 0.2})
    return {"denoise": folder / "denoise.safetensors", "columns": folder / "columns.safetensors"}


@pytest.fixture
def quick(tiny_weights: dict[str, Path]) -> list[str]:
    """Settings, as for ``--set``, under which the tiny movie runs in seconds."""
    return [
        f"source.sampling={SAMPLING}",
        "source.frame_interval=0.5",
        f"denoise.weights={tiny_weights['denoise']}",
        "denoise.dtype=float32",
        f"segment.model={tiny_weights['columns']}",
        "segment.window=64",
    ]
