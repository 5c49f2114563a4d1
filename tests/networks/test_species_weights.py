"""The shipped species networks: what their files say, what they make of simulations, and of images made by others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy.ndimage import center_of_mass, label

from pipeline.networks import species_check as check
from pipeline.networks import train_species
from pipeline.networks.species_spec import load
from pipeline.networks.weights import SHIPPED, load_weights
from pipeline.simulate.movie import MovieSpec
from pipeline.steps.score import match_columns
from pipeline.steps.species import Sites, SpeciesModel, classify, vacancies

SPECS = Path(__file__).parents[2] / "scripts" / "specs"
DATA = Path(__file__).parents[2].parent / "shared" / "data"
NAMES = ("mos2-hrtem", "graphene-haadf", "tmd-haadf")
needs_data = [
    pytest.mark.data,
    pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real movies is not beside the checkout"),
]


def model_of(name: str) -> SpeciesModel:
    loaded = load_weights(name)
    return SpeciesModel.of(loaded.module, loaded.metadata)


def find(model: SpeciesModel, plane: np.ndarray, sampling: float) -> Sites:
    return classify(
        model,
        plane[None].astype(np.float32),
        columns=check.NONE,
        sampling=sampling,
        threshold=0.5,
        margin=1.0,
        windowing=(None, 1),
    ).sites


@pytest.mark.parametrize("name", NAMES)
def test_weights_were_trained_from_the_specification_in_the_repository(name: str) -> None:
    metadata = load_weights(name).metadata
    spec = load(SPECS / f"{name}.yaml")
    expected = json.loads(json.dumps(train_species.metadata(spec)))
    assert {key: metadata[key] for key in expected} == expected
    card = (SHIPPED / f"{name}.md").read_text()
    assert f"scripts/train_species scripts/specs/{name}.yaml" in card
    assert f"{metadata['validation']['score']:.4g}" in card


@pytest.mark.parametrize(("dose", "least"), [(2000.0, 0.97), (400.0, 0.93)])
def test_atoms_of_mos2_are_told_apart(dose: float, least: float) -> None:
    movie = MovieSpec(
        kind="mos2",
        energy=80.0,
        frames=1,
        events=0,
        shape=(160, 160),
        sampling=0.18,
        defoci=(-50.0, 0.0, 50.0),
        focal_spread=20.0,
        vacancies=0.05,
        drift_step=0.0,
        drift_jitter=0.0,
        dose=dose,
    )
    judged = check.judge(model_of("mos2-hrtem"), check.simulated(movie, [1, 2, 3]))
    assert judged.accuracy > least
    assert judged.confusion[:-1, :-1].sum() > 400
    assert judged.vacancies[:, 0].min() >= 3


def test_silicon_is_told_from_carbon_and_chalcogens_from_each_other() -> None:
    for name, least in (("graphene-haadf", 0.99), ("tmd-haadf", 0.9)):
        spec = load(SPECS / f"{name}.yaml")
        judged = check.judge(model_of(name), check.drawn(spec, range(3), dose=3000.0))
        assert judged.accuracy > least, name


def test_noise_holds_no_vacancies_and_no_silicon() -> None:
    """At doses that were trained (200 e/Å² here are 4.5 electrons per pixel); the fainter, the more is made up."""
    rng = np.random.default_rng(4)
    for name in NAMES:
        model = model_of(name)
        for electrons in (6.0, 30.0):
            planes = rng.poisson(electrons, (model.planes, 160, 160)).astype(np.float32)
            found = classify(
                model,
                planes,
                columns=check.NONE,
                sampling=0.15,
                threshold=0.5,
                margin=1.0,
                windowing=(None, 1),
            ).sites
            assert vacancies(found.probabilities, missing=model.missing)[0] < 0.05
            named = np.array(model.classes)[found.probabilities.argmax(1)]
            assert not np.isin(named, ["Si", "1S", "0S", "0Se"]).any(), (name, electrons)


class TestImagesOfOthers:
    """Nothing here was trained on."""

    pytestmark = needs_data

    def test_three_silicon_atoms_of_a_trimer(self) -> None:
        model, sampling = model_of("graphene-haadf"), 0.078125
        frames = tifffile.imread(DATA / "movies" / "Si3_trimer_graphene.tif")
        truth = json.loads((DATA / "movies" / "Si3_trimer_graphene.json").read_text())["frames"]
        used = [entry for entry in truth if entry["frame"] != 22][::4]
        whole = spurious = 0
        for entry in used:
            known = np.array([(a["y"], a["x"]) for a in entry["atoms"] if a["species"] == "Si"])
            found = find(model, frames[entry["frame"]], sampling)
            silicon = found.probabilities.argmax(1) == model.classes.index("Si")
            places = np.column_stack([found.y, found.x])[silicon]
            match = match_columns(places, known, max_distance=0.7 / sampling)
            whole += not len(match.lost)
            spurious += len(match.spurious)
        assert whole >= 0.95 * len(used)
        assert spurious <= 0.2 * len(used)

    def test_vacancies_of_alloyed_wse2(self) -> None:
        model, sampling = model_of("tmd-haadf"), 0.207
        folder = DATA / "labelled" / "wsete" / "1"
        found = find(model, tifffile.imread(folder / "input.tiff"), sampling)
        mask = tifffile.imread(folder / "label_vacancy.tiff") > 0
        labels, count = label(mask)
        known = np.array(center_of_mass(mask, labels, range(1, count + 1)))
        empty = found.probabilities.argmax(1) == model.classes.index("0Se")
        places = np.column_stack([found.y, found.x])[empty]
        hits = len(match_columns(places, known, max_distance=0.7 / sampling).true)
        assert 2 * hits / (len(places) + len(known)) >= 0.8
