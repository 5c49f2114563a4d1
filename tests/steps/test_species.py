"""Classes of columns and sites from maps of a network whose answer is known; vacancy counts; mixtures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.networks.msdnet import MSDNet
from pipeline.steps import species
from pipeline.steps.species import SpeciesModel
from schemas.errors import SettingsError

CLASSES = ("Mo", "2S", "1S", "0S")
FACTS = {
    "classes": list(CLASSES),
    "missing": [0, 0, 1, 2],
    "hosts": [0, 1, 1, 1],
    "mode": "hrtem",
    "planes": 3,
    "sampling": 0.2,
    "sampling_range": [0.1, 0.25],
    "distance": 1.3,
}
NOTHING = (np.zeros(0), np.zeros(0))


class Known(nn.Module):
    """Answers with discs of 0.45 Å around given sites, whatever it is shown."""

    receptive_radius = 0

    def __init__(self, sites: list[tuple[float, float, int]], sure: float = 8.0) -> None:
        super().__init__()
        self.sites, self.sure = sites, sure

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        logits = torch.zeros(1, 5, height, width)
        logits[:, 0] = self.sure
        for y, x, name in self.sites:
            disc = torch.hypot(rows - y, cols - x) * 0.2 < 0.45
            logits[0, :, disc] = 0.0
            logits[0, 1 + name, disc] = self.sure
        return logits


def classify(network: nn.Module, planes: np.ndarray, columns=NOTHING, sampling=0.2, window=None, margin=1.0):
    model = SpeciesModel.of(network, FACTS)
    return species.classify(
        model, planes, columns=columns, sampling=sampling, threshold=0.5, margin=margin, windowing=(window, 2)
    )


def test_sites_and_columns_get_the_classes_of_the_maps() -> None:
    sites = [(20.0, 20.0, 0), (20.0, 30.0, 1), (30.0, 25.0, 2), (40.0, 40.0, 3), (2.0, 30.0, 1)]
    planes = np.ones((3, 64, 64), np.float32)
    found = classify(Known(sites), planes, columns=(np.array([20.4, 30.0]), np.array([19.7, 25.5])))
    assert list(found.columns.name) == ["Mo", "1S"]
    assert np.all(found.columns.probability > 0.99)
    np.testing.assert_allclose(found.columns.probabilities.sum(1), 1)
    # The site 0.4 Å from the edge is left out.
    places = np.column_stack([found.sites.y, found.sites.x])
    np.testing.assert_allclose(places, [(y, x) for y, x, _ in sites[:4]], atol=0.3)
    assert [CLASSES[k] for k in found.sites.probabilities.argmax(1)] == ["Mo", "2S", "1S", "0S"]


def test_a_column_is_never_called_empty_but_its_site_is() -> None:
    planes = np.ones((3, 64, 64), np.float32)
    found = classify(Known([(32.0, 32.0, 3)]), planes, columns=(np.array([32.0]), np.array([32.0])))
    assert found.columns.name[0] != "0S"
    assert found.columns.probability[0] < 0.01
    assert species.vacancies(found.sites.probabilities, missing=(0, 0, 1, 2))[0] == pytest.approx(2, abs=0.02)


@pytest.mark.parametrize("sampling", [0.1, 0.25])
def test_positions_are_in_pixels_of_the_planes(sampling: float) -> None:
    """A site at a place in ångström, counted from the corner of the view, is found there at any sampling."""
    size = round(12.0 / sampling)
    place = (6.0, 7.0)
    found = classify(
        Known([(place[0] / 0.2 - 0.5, place[1] / 0.2 - 0.5, 1)]), np.ones((3, size, size)), sampling=sampling
    )
    np.testing.assert_allclose((found.sites.y[0] + 0.5) * sampling, place[0], atol=0.06)
    np.testing.assert_allclose((found.sites.x[0] + 0.5) * sampling, place[1], atol=0.06)


def test_windows_give_the_answer_of_the_whole_image() -> None:
    torch.manual_seed(3)
    network = MSDNet(inputs=3, outputs=5, width=3, dilations=(1, 2, 4))
    nn.init.normal_(network.last.weight, 0, 0.5)
    planes = np.random.default_rng(0).poisson(20, (3, 150, 130)).astype(np.float32)
    model = SpeciesModel.of(network.eval(), FACTS)
    whole, cut = (species.class_maps(model, planes, sampling=0.2, windowing=w) for w in ((None, 1), (64, 3)))
    assert whole.shape == (5, 150, 130)
    torch.testing.assert_close(cut, whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(whole.sum(0), torch.ones(150, 130))


def test_the_input_does_not_depend_on_dose_or_gain() -> None:
    planes = np.random.default_rng(1).uniform(0.8, 1.2, (3, 60, 60)).astype(np.float32)
    for mode in ("hrtem", "haadf"):
        first = species.prepare(planes, sampling=0.15, model_sampling=0.2, mode=mode)
        torch.testing.assert_close(
            species.prepare(planes * 370, sampling=0.15, model_sampling=0.2, mode=mode), first, atol=1e-4, rtol=1e-3
        )
        assert first.shape == (3, 45, 45)
    offset = species.prepare(planes + 5, sampling=0.15, model_sampling=0.2, mode="haadf")
    torch.testing.assert_close(offset, first, atol=1e-3, rtol=1e-3)


def test_what_was_not_trained_is_refused() -> None:
    network = Known([])
    with pytest.raises(SettingsError, match=r"0\.5 Å/px.*0\.1 to 0\.25"):
        classify(network, np.ones((3, 30, 30)), sampling=0.5)
    with pytest.raises(SettingsError, match=r"has 1 image\(s\) per time point; the species model expects 3"):
        classify(network, np.ones((1, 30, 30)))
    with pytest.raises(SettingsError, match="tell no species apart"):
        SpeciesModel.of(network, {"sampling": 0.2})


def test_neighbours_settle_which_element_a_place_is_of() -> None:
    """Sites of a honeycomb lattice whose own evidence is weak, wrong at some, and too near to each other at one."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(-9, 9), np.arange(-9, 9)), -1).reshape(-1, 2)
    vectors = 3.18 / 0.2 * np.array([[1.0, 0.0], [-0.5, np.sqrt(3) / 2]])
    places = np.concatenate([grid @ vectors, (grid + np.array([1 / 3, 2 / 3])) @ vectors]) + 200
    is_mo = np.repeat([True, False], len(grid))
    evidence = np.where(is_mo, 1, -1) * rng.normal(0.5, 1.0, len(places))
    assert np.mean((evidence > 0) == is_mo) < 0.75
    places, evidence = np.vstack([places, places.mean(0) + 3]), np.append(evidence, 2.0)
    probability = 1 / (1 + np.exp(-evidence))
    probabilities = np.column_stack([probability, 1 - probability, np.zeros((len(places), 2))])
    model = SpeciesModel.of(Known([]), FACTS)
    settled = species._settled(model, probabilities, species._from_neighbours(model, *places.T, probabilities))
    np.testing.assert_allclose(settled.sum(1), 1)
    assert np.mean((settled[:-1, 0] > 0.5) == is_mo) > 0.99


@pytest.mark.parametrize("seen", [6, 3])
def test_the_middle_of_a_ring_is_no_vacancy(seen: int) -> None:
    """A ring of Mo and S in turn, part of it out of view, with a site said to be empty inside; an empty S beside it."""
    bond = 1.84 / 0.2
    angle = np.deg2rad(60 * np.arange(6) + 30)
    ring = [(30 + bond * np.sin(a), 30 + bond * np.cos(a), k % 2) for k, a in enumerate(angle)][:seen]
    around_empty = [(60 + bond * np.sin(a), 60 + bond * np.cos(a), 0) for a in np.deg2rad([90, 210, 330])]
    sites = [*ring, (30.0, 30.0, 3), (60.0, 60.0, 3), *around_empty]
    found = classify(Known(sites), np.ones((3, 90, 90), np.float32)).sites
    places = np.column_stack([found.y, found.x])
    assert len(places) == len(sites) - 1
    assert np.linalg.norm(places - 30, axis=1).min() > 0.9 * bond
    assert species.vacancies(found.probabilities, missing=(0, 0, 1, 2))[0] == pytest.approx(2, abs=0.02)


def test_no_sites_mean_no_vacancies() -> None:
    found = classify(Known([]), np.ones((3, 40, 40), np.float32))
    assert len(found.sites.y) == 0
    assert species.vacancies(found.sites.probabilities, missing=(0, 0, 1, 2)) == (0.0, 0.0)


def test_vacancy_counts_have_the_mean_and_spread_of_drawn_ones() -> None:
    """Oracle: draw the class of every site from its probabilities, many times."""
    rng = np.random.default_rng(5)
    probabilities = rng.dirichlet((5, 5, 0.5, 0.2), 60)
    missing = np.array([0, 0, 1, 2])
    count, error = species.vacancies(probabilities, missing=(0, 0, 1, 2))
    cumulated = probabilities.cumsum(1)
    drawn = [(missing[(rng.random((60, 1)) > cumulated).sum(1)]).sum() for _ in range(4000)]
    assert count == pytest.approx(np.mean(drawn), abs=4 * error / 4000**0.5)
    assert error == pytest.approx(np.std(drawn), rel=0.06)


def intensities(rng: np.random.Generator, means, counts, sigma) -> tuple[np.ndarray, np.ndarray]:
    truth = np.repeat(np.arange(len(means)), counts)
    return np.array(means)[truth] + rng.normal(0, sigma, len(truth)), truth


@pytest.mark.parametrize(
    ("means", "counts"), [((1.0, 4.2), (300, 6)), ((0.0, 0.8, 1.6, 2.4), (20, 60, 500, 40)), ((1.0, 1.7), (250, 200))]
)
def test_a_mixture_finds_how_many_classes_there_are(means, counts) -> None:
    for seed in range(2):
        values, truth = intensities(np.random.default_rng(seed), means, counts, 0.1)
        found = species.mixture(values, classes=None, most=6, common_width=True, least=5)
        np.testing.assert_allclose(found.mean, means, atol=0.1)
        np.testing.assert_allclose(found.share, np.array(counts) / sum(counts), atol=0.02)
        assert np.mean(found.probabilities.argmax(1) == truth) > 0.99


def test_one_class_is_not_split() -> None:
    for seed in range(2):
        values = np.random.default_rng(seed).normal(3, 0.5, 400)
        assert len(species.mixture(values, classes=None, most=5).mean) == 1


def test_a_mixture_scales_with_its_intensities_and_says_nothing_of_what_was_not_measured() -> None:
    values, _ = intensities(np.random.default_rng(1), (1.0, 3.0), (80, 40), 0.3)
    values[7] = np.nan
    one = species.mixture(values, classes=2, most=2)
    other = species.mixture(values * 250 + 1000, classes=2, most=2)
    np.testing.assert_allclose(other.mean, one.mean * 250 + 1000, rtol=1e-5)
    np.testing.assert_allclose(other.probabilities, one.probabilities, atol=1e-5)
    assert np.isnan(one.probabilities[7]).all()
    assert np.isfinite(np.delete(one.probabilities, 7, 0)).all()


def test_too_few_intensities_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"5 column intensities for 2 class\(es\)"):
        species.mixture(np.arange(5.0), classes=2, most=2)
