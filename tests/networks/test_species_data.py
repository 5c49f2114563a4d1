"""What species networks are trained on: formulas, sheets, images, specifications; and a training that is repeatable."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import abtem
import numpy as np
import pytest
import torch

from pipeline.networks import species_check as check
from pipeline.networks import species_images as images
from pipeline.networks import train_species
from pipeline.networks.species_data import IGNORED, example, labels, scene, specimen
from pipeline.networks.species_spec import SpeciesSpec, atoms_of, load
from pipeline.networks.weights import load_weights
from pipeline.simulate import imaging
from pipeline.steps.species import SpeciesModel
from schemas.errors import SettingsError

SPECS = Path(__file__).parents[2] / "scripts" / "specs"
SMALL = SpeciesSpec(
    title="small",
    host="mos2",
    mode="hrtem",
    columns={"Mo": ("Mo",), "S": ("2S", "1S", "0S")},
    shares={"1S": (0.1, 0.2), "0S": (0.05, 0.1)},
    seed=5,
    edge=10.0,
    scenes=3,
    steps=4,
    batch=2,
    check_every=2,
    width=2,
    dilations=(1, 2),
)


def test_formulas_of_classes() -> None:
    assert atoms_of("Mo") == [42]
    assert atoms_of("2S") == [16, 16]
    assert atoms_of("0S") == []
    assert Counter(atoms_of("TeSe")) == Counter([52, 34])
    assert atoms_of("1Se") == [34]
    for wrong in ("mo", "2", "", "2S?", "Xq"):
        with pytest.raises(SettingsError, match="class"):
            atoms_of(wrong)


@pytest.mark.parametrize("name", ["mos2-hrtem", "graphene-haadf", "tmd-haadf"])
def test_shipped_specifications_make_images_of_all_their_classes(name: str) -> None:
    spec = load(SPECS / f"{name}.yaml")
    rng = np.random.default_rng(1)
    found: Counter[str] = Counter()
    for _ in range(6):
        made = specimen(dataclasses.replace(spec, vacuum=0.0), rng, half=15.0)
        expected = sorted(number for one in made.classes for number in atoms_of(spec.classes[one]))
        assert sorted(made.numbers.tolist()) == expected
        found.update(spec.classes[one] for one in made.classes)
    assert set(found) == set(spec.classes)
    one = scene(dataclasses.replace(spec, edge=12.0), rng)
    shown = example(spec, one, rng)
    assert shown.image.shape == (spec.planes, *shown.labels.shape)
    assert torch.isfinite(shown.image).all()


def test_missing_atoms_of_the_shipped_classes() -> None:
    assert dict(zip(SMALL.classes, SMALL.missing, strict=True)) == {"Mo": 0, "2S": 0, "1S": 1, "0S": 2}
    tmd = load(SPECS / "tmd-haadf.yaml")
    missing = dict(zip(tmd.classes, tmd.missing, strict=True))
    assert missing == {"W": 0, "Mo": 0, "2Se": 0, "TeSe": 0, "2Te": 0, "1Se": 1, "0Se": 2}
    assert 1.2 < SMALL.distance < 1.4  # 0.7 of Mo–S in projection, 1.836 Å


def test_some_views_hold_nothing_but_noise() -> None:
    for mode in ("hrtem", "haadf"):
        spec = dataclasses.replace(SMALL, vacuum=1.0, mode=mode, clusters=0.1)
        rng = np.random.default_rng(0)
        shown = example(spec, scene(spec, rng), rng)
        assert not shown.labels.any()
        assert torch.isfinite(shown.image).all()


def test_labels_mark_sites_doubt_and_nothing() -> None:
    made = labels(np.array([[20.0, 20.0], [20.0, 60.0]]), np.array([2, 0]), (40, 80), 0.2)
    rows, cols = np.indices((40, 80))
    for x, name in ((20, 3), (60, 1)):
        distance = np.hypot(rows - 20, cols - x) * 0.2
        assert set(np.unique(made[distance < 0.44])) == {name}
        assert set(np.unique(made[(distance > 0.46) & (distance < 0.69)])) == {IGNORED}
    assert (made == 0).mean() > 0.95


def test_atoms_are_dark_or_bright_where_the_sites_are_said_to_be() -> None:
    """HAADF of a sheet: the image is brighter at the sites than anywhere else, so positions and pixels agree."""
    spec = load(SPECS / "graphene-haadf.yaml")
    scan = dataclasses.replace(spec.scan, jitter=(0.0, 0.0), smear=(0.0, 0.0), probe=(0.7, 0.8), cloud=(0.0, 0.0))
    spec = dataclasses.replace(spec, scan=scan, edge=16.0, clusters=0.0)
    rng = np.random.default_rng(2)
    one = scene(spec, rng)
    shown = example(spec, one, rng, dose=1e6)
    near = shown.image[0].numpy()
    places = np.rint(shown.sites).astype(int)
    inner = ((places > 3) & (places < len(near) - 4)).all(1)
    for y, x in places[inner]:
        top = np.unravel_index(near[y - 2 : y + 3, x - 2 : x + 3].argmax(), (5, 5))
        assert abs(top[0] - 2) <= 1
        assert abs(top[1] - 2) <= 1


@pytest.mark.parametrize(("angular", "aberrated"), [(0.3, False), (0.0, True)])
def test_the_transfer_of_waves_is_that_of_abtem(angular: float, aberrated: bool) -> None:
    """Round lenses in partial coherence; aberrations without angular spread, for its envelope leaves them out here."""
    made = specimen(SMALL, np.random.default_rng(0), half=6.4)
    points = made.atoms + np.array([6.4, 6.4, 0.0])
    wave = imaging.exit_wave(points, made.numbers, gpts=64, sampling=0.2, energy=80.0)
    azimuth = [0.7, -0.4, 0.9]  # of astigmatism, coma, threefold; abTEM counts from the axis that is y here
    size = [15.0, 150.0, 120.0] if aberrated else [0.0, 0.0, 0.0]
    residual = [s * np.exp(1j * n * (np.pi / 2 - a)) for s, n, a in zip(size, (2, 1, 3), azimuth, strict=True)]
    lens = images.transfer(
        64, sampling=0.2, energy=80.0, defocus=40.0, spherical=-5e4, spread=(25.0, angular), residual=tuple(residual)
    )
    names = [("C12", "phi12"), ("C21", "phi21"), ("C23", "phi23")]
    coefficients = {n: v for (c, p), s, a in zip(names, size, azimuth, strict=True) for n, v in ((c, s), (p, a))}
    ctf = abtem.CTF(
        energy=80e3,
        C10=-40.0,
        Cs=-5e4,
        focal_spread=25,
        angular_spread=angular,
        aberration_coefficients=coefficients,
    )
    ours = np.abs(np.fft.ifft2(np.fft.fft2(wave.array) * lens)) ** 2
    theirs = np.abs(np.asarray(wave.apply_ctf(ctf).array)) ** 2
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * theirs.std())


def test_a_specification_with_a_wrong_key_or_class_is_refused(tmp_path: Path) -> None:
    text = (SPECS / "mos2-hrtem.yaml").read_text()
    path = tmp_path / "wrong.yaml"
    for wrong, message in (
        (text + "\nsteppes: 3\n", "steppes is no field; did you mean 'steps'"),
        (text + "\nphase:\n  planet: 3\n", "phase: .*\n.*planet is no field; did you mean 'planes'"),
        (text.replace("0S]", "3S]"), "shares name"),
        (text.replace("host: mos2", "host: mos3"), "host is 'mos3'"),
        ("- 1\n", "holds list"),
    ):
        path.write_text(wrong)
        with pytest.raises(SettingsError, match=message):
            load(path)


def test_a_training_gives_the_same_weights_again(tmp_path: Path) -> None:
    lines: list[str] = []
    first = train_species.train(SMALL, tmp_path / "a.safetensors", folder=tmp_path / "a", report=lines.append)
    again = train_species.train(SMALL, tmp_path / "b.safetensors", folder=None, report=lines.append)
    other = dataclasses.replace(SMALL, seed=6)
    assert first == again
    assert first != train_species.train(other, tmp_path / "c.safetensors", folder=None, report=lines.append)
    loaded = load_weights(tmp_path / "a.safetensors")
    model = SpeciesModel.of(loaded.module, loaded.metadata)
    assert model.classes == ("Mo", "2S", "1S", "0S")
    assert model.missing == (0, 0, 1, 2)
    assert model.planes == 3
    card = (tmp_path / "a.md").read_text()
    assert "2S, 1S, 0S" in card
    assert "| spherical |" in card
    assert (tmp_path / "a" / "curve.csv").is_file()


def test_a_judgement_of_perfect_maps_is_perfect() -> None:
    """A network that answers with the truth is judged to be right in everything, and its counts are exact."""
    spec = dataclasses.replace(SMALL, edge=20.0)
    image = check.drawn(spec, [3], dose=2000.0)[0]
    grid = round(image.planes.shape[1] * image.sampling / 0.2)
    scale = grid / image.planes.shape[1]
    classes = np.array([spec.classes.index(name) for name in image.names])
    truth = torch.from_numpy(labels((image.sites + 0.5) * scale - 0.5, classes, (grid, grid), 0.2).astype(np.int64))

    class Truth(torch.nn.Module):
        receptive_radius = 0

        def forward(self, shown: torch.Tensor) -> torch.Tensor:
            assert shown.shape[-2:] == truth.shape
            return 20.0 * torch.nn.functional.one_hot(truth.clamp(min=0), 5).permute(2, 0, 1)[None].float()

    judged = check.judge(SpeciesModel.of(Truth(), train_species.metadata(spec)), [image])
    assert judged.accuracy == 1.0
    assert judged.balanced == 1.0
    assert judged.confusion[-1].sum() == 0
    true, found, error = judged.vacancies[0]
    assert true > 5
    assert found == pytest.approx(true, abs=1.0)  # a site at the very margin may be found outside it
    assert error < 0.1
    assert judged.counted(1) == 1.0
    assert "0S" in check.table(judged)
