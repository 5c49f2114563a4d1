from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy.ndimage import gaussian_filter

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def script():
    loader = importlib.machinery.SourceFileLoader("accuracy_single_atoms", str(SCRIPTS / "accuracy_single_atoms"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def spots(points):
    image = np.zeros((120, 120))
    image[tuple(points.astype(int).T)] = 1.0
    return gaussian_filter(image, 2.5) + np.random.default_rng(len(points)).normal(0, 0.002, image.shape)


def test_marks_that_were_saved_one_image_late_are_joined_again(script):
    rng = np.random.default_rng(2)
    grid = np.stack(np.mgrid[12:120:16, 12:120:16], -1).reshape(-1, 2)
    truth = {n: grid[rng.choice(len(grid), 12, replace=False)] for n in range(3)}
    files = {0: truth[0][:5], 1: np.concatenate([truth[1][:3], truth[0][5:]])}
    files |= {2: np.concatenate([truth[2][:12], truth[1][3:]]), 3: np.zeros((0, 2))}
    marks = script.joined({n: spots(points) for n, points in truth.items()}, files)
    assert {n: sorted(map(tuple, points)) for n, points in marks.items()} == {
        n: sorted(map(tuple, points)) for n, points in truth.items()
    }


def test_a_lone_image_is_run_and_its_atoms_come_back_in_pixels(script, tmp_path):
    points = np.array([[40, 50], [70, 30], [80, 85]])
    counts = np.random.default_rng(0).poisson(20 + 3000 * np.maximum(spots(points), 0))
    tifffile.imwrite(tmp_path / "image1.tif", counts.astype(np.uint16))
    options = script.parser.parse_args([str(tmp_path)])
    found = script.columns_found({1: tmp_path / "image1.tif"}, tmp_path / "out", options, 0.4)[1]
    distance = np.linalg.norm(found[None] - points[:, None], axis=2).min(1)
    assert (distance < 2).all()


def test_points_are_read_with_and_without_a_heading(script, tmp_path):
    for name, text in (("a1.csv", "X,Y\n3,4\n\n5,6\n"), ("a2.csv", "3,4\n5,6\n")):
        (tmp_path / name).write_text(text)
        assert script.read_points(tmp_path / name).tolist() == [[4.0, 3.0], [6.0, 5.0]]
    assert script.number(tmp_path / "a12.csv") == 12
