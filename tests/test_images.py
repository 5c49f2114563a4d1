"""The pixels that a run keeps: pyramids that others can read, and examples for the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from ome_zarr_models.v05 import Image

from pipeline import store
from pipeline.images import create_image, remove_images, write_examples, write_image


def make_run(path: Path) -> Path:
    store.create_run(path, {})
    return path


def make_image(path: Path, height: int = 600, width: int = 300) -> np.ndarray:
    frames = np.random.default_rng(0).normal(size=(3, height, width)).astype(np.float32)
    create_image(
        path, "denoised", time=np.arange(3) * 0.5, shape=frames.shape, sampling=0.2, origin=(1.0, 2.0), block_frames=2
    )  # fmt: skip
    write_image(path, "denoised", 0, frames[:2])
    write_image(path, "denoised", 2, frames[2:])
    return frames


def test_an_image_is_an_ome_zarr_pyramid(tmp_path: Path) -> None:
    path = make_run(tmp_path / "r.zarr")
    frames = make_image(path)
    image = Image.from_zarr(zarr.open_group(str(path / "images" / "denoised"), mode="r"))
    (multiscale,) = image.ome_attributes.multiscales
    assert [dataset.path for dataset in multiscale.datasets] == [f"s{k}/denoised" for k in range(3)]
    assert [d.coordinateTransformations[0].scale[-1] for d in multiscale.datasets] == pytest.approx([0.2, 0.4, 0.8])
    with xr.open_datatree(path, engine="zarr", consolidated=False) as tree:
        fine, coarse = (tree[f"images/denoised/s{k}"] for k in (0, 1))
        assert np.array_equal(fine["denoised"], frames)
        block = frames[:, :2, :2].mean((1, 2))
        assert np.allclose(coarse["denoised"][:, 0, 0], block, atol=1e-6)
        # A coarse pixel lies where the mean of the pixels lies that it was made of.
        assert float(coarse.y[0]) == pytest.approx(float(fine.y[:2].mean()))
        assert float(coarse.x[-1]) == pytest.approx(float(fine.x[-2:].mean()))


def test_narrow_images_have_pyramids_too(tmp_path: Path) -> None:
    path = make_run(tmp_path / "r.zarr")
    frames = make_image(path, 3, 2000)
    with store.open_tree(path) as tree:
        assert np.array_equal(tree["images/denoised/s0/denoised"], frames)
        assert tree["images/denoised/s1"].sizes["y"] == 1


def test_unwritten_images_are_not_zeros(tmp_path: Path) -> None:
    path = make_run(tmp_path / "r.zarr")
    create_image(
        path, "probability", time=np.arange(3.0), shape=(3, 8, 8), sampling=0.2, origin=(0, 0), block_frames=2
    )  # fmt: skip
    write_image(path, "probability", 0, np.zeros((2, 8, 8), np.float32))
    with store.open_tree(path) as tree:
        values = tree["images/probability/s0/probability"].values
    assert not values[:2].any()
    assert np.isnan(values[2]).all()
    remove_images(path)
    assert not (path / "images").exists()


def test_examples_replace_older_ones(tmp_path: Path) -> None:
    path = make_run(tmp_path / "r.zarr")
    for count in (3, 1):
        images = {"raw": np.ones((count, 4, 5)), "probability": np.ones((count, 4, 5))}
        write_examples(path, np.arange(count), images, sampling=0.2, origin=(0.0, 0.0))
    with store.open_tree(path) as tree:
        assert tree["examples"].sizes == {"example": 1, "y_example": 4, "x_example": 5}
        assert tree["examples/raw"].attrs["units"] == "electron"


def test_labels_are_never_averaged(tmp_path: Path) -> None:
    path = make_run(tmp_path / "r.zarr")
    labels = np.random.default_rng(0).integers(0, 5, (2, 600, 20)).astype(np.int32)
    create_image(path, "labels", time=np.arange(3.0), shape=(3, 600, 20), sampling=1.0, origin=(0, 0), block_frames=2)
    write_image(path, "labels", 0, labels)
    with store.open_tree(path) as tree:
        fine, coarse = (tree[f"images/labels/s{k}/labels"] for k in (0, 1))
        assert fine.dtype == np.int32
        assert np.array_equal(fine[:2], labels) and (fine[2] == -1).all()
        assert np.array_equal(coarse[:2], labels[:, ::2, ::2])
