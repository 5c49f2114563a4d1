from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.simulate.files import load_spec, write_movie
from pipeline.simulate.movie import Answer, MovieSpec, simulate_movie
from schemas.errors import SettingsError

MOVIES = sorted((Path(__file__).parents[2] / "scripts" / "movies").glob("*.yaml"))


@pytest.mark.parametrize("path", MOVIES, ids=lambda path: path.stem)
def test_every_example_can_be_simulated(path):
    spec = load_spec(path)
    small = replace(spec, shape=(96, 96), frames=2, particles=min(spec.particles, 6), groups=spec.groups[:1])
    frame = Answer(replace(small, radius=min(spec.radius or 8.0, 8.0)), 1).frame(1)
    assert frame.counts.shape[-2:] == (96, 96) and frame.counts.std() > 0
    assert len(frame.columns) or frame.mask.any()


def test_there_is_an_example_of_each_family():
    assert {load_spec(path).kind for path in MOVIES} == {"nanoparticle", "field", "mos2", "graphene"}


def test_values_get_the_type_of_their_field(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "zone: 110\nspherical: -5e4\ntilts: [1, 2]\nparticles: 2\nshape: [64, 80]\nframes: 3.0\ndefocus: null\n"
    )
    spec = load_spec(file)
    assert spec == MovieSpec(zone="110", spherical=-5e4, tilts=(1.0, 2.0), particles=2, shape=(64, 80), frames=3)
    assert isinstance(spec.frames, int) and hash(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dose: many", "dose is 'many'; expected float"),
        ("shape: 64", "shape is 64; expected tuple"),
        ("shape: [64]", "shape is .64.; expected tuple"),
        ("frames: 2.5", "frames is 2.5; expected int"),
        ("frames: null", "frames is None; expected int"),
        ("atomwise: 3", "atomwise is 3; expected bool"),
        ("doze: 3", "doze is no field of a movie; did you mean 'dose'"),
    ],
)
def test_wrong_values_are_named(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_spec(tmp_path / "a.yaml")


def test_focal_series_do_not_go_into_tiff(tmp_path):
    movie = simulate_movie(MovieSpec(kind="vacuum", shape=(16, 16), frames=2, defoci=(0.0, 50.0)), 1)
    assert movie.counts.shape == (2, 2, 16, 16) and np.all(movie.clean == 1)
    with pytest.raises(SettingsError, match=r"focal series.*a\.zarr"):
        write_movie(movie, tmp_path / "a.tif")
