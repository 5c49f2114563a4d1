from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import cKDTree

from pipeline.simulate.movie import MovieSpec
from pipeline.simulate.scene import build_scene, columns_of
from pipeline.simulate.structures import SHAPES, Particle, nanoparticle
from pipeline.simulate.structures.nanoparticle import nearest_zone
from pipeline.simulate.truth import sites_of
from schemas.errors import SettingsError

ORIGIN = np.array([-128.0, -128.0])
GRAPHENE = {"kind": "graphene", "shape": (256, 256), "sampling": 0.15, "vacancies": 0.0, "dopants": 0.0, "events": 0}


def neighbours(points, reach):
    return np.array([len(found) - 1 for found in cKDTree(points).query_ball_point(points, reach)])


@pytest.mark.parametrize("shape", SHAPES)
def test_atoms_of_every_shape_are_a_bond_apart(shape):
    made = nanoparticle(np.random.default_rng(1), Particle("Au", 12.0, 24.0, shape=shape))
    gap = cKDTree(made.positions).query(made.positions, k=2)[0][:, 1]
    assert gap.min() > 0.9 * 4.078 / np.sqrt(2) and gap.max() < 1.1 * 4.078 / np.sqrt(2)
    assert 60 < len(made.positions) < 600
    assert neighbours(made.positions, 3.2).max() == 12
    assert made.positions[:, 2].min() == 0


@pytest.mark.parametrize(("shape", "ratio"), [("cube", 1.0), ("octahedron", np.sqrt(2)), ("sphere", 1.0)])
def test_shapes_seen_along_100_have_their_outline(shape, ratio):
    """Longest over shortest width of the outline about the cell's axes and its diagonals."""
    made = nanoparticle(np.random.default_rng(3), Particle("Pt", 30.0, 80.0, zone="100", shape=shape))
    flat = made.positions[:, :2]
    widths = [np.ptp(flat @ [np.cos(a), np.sin(a)]) for a in np.linspace(0, np.pi, 180)]
    assert max(widths) / min(widths) == pytest.approx(max(ratio, np.sqrt(2) if shape != "sphere" else 1.0), rel=0.12)


def test_random_orientation_is_told_as_tilt_off_the_nearest_zone():
    for name, axis in (("100", [0, 0, -1]), ("110", [0, 1, -1]), ("111", [-1, 1, 1])):
        zone, frame, angle = nearest_zone(np.array(axis) / np.linalg.norm(axis))
        assert zone == name and angle == pytest.approx(0, abs=1e-6)
        assert np.allclose(frame @ frame.T, np.eye(3)) and np.linalg.det(frame) == pytest.approx(1)
    tilts = []
    for seed in range(8):
        made = nanoparticle(np.random.default_rng(seed), Particle("Au", 10.0, 24.0, zone="random"))
        tilts.append(float(made.particles["tilt"][0]))
        assert made.particles["zone"][0] in ("100", "110", "111")
    assert min(tilts) > 0 and max(tilts) < 30 and len(set(tilts)) == 8


def test_vacancies_thin_columns_and_adatoms_are_thin_columns_beside_the_rim():
    plan = {"element": "Au", "radius": 14.0, "thickness": 24.0}
    plain = nanoparticle(np.random.default_rng(2), Particle(**plan))
    holed = nanoparticle(np.random.default_rng(2), Particle(**plan, vacancies=0.2))
    assert len(holed.positions) == pytest.approx(0.8 * len(plain.positions), rel=0.1)
    assert np.unique(holed.column).size == holed.count == plain.count
    adorned = nanoparticle(np.random.default_rng(2), Particle(**plan, adatoms=5, mobile=True))
    extra = np.unique([column for move in adorned.moves for column in (move.column, move.to)])
    count = np.bincount(adorned.column)
    assert len(extra) >= 5 and (count[extra] <= 3).all()
    steady = nanoparticle(np.random.default_rng(2), Particle(**plan, adatoms=5))
    assert not steady.moves and not steady.absent.any() and not steady.movable[-5:].any()
    assert (np.bincount(steady.column)[-5:] <= 3).all()
    assert neighbours(adorned.positions, 3.2).min() >= 1


def test_hops_of_adatoms_are_in_the_truth():
    spec = MovieSpec(shape=(256, 256), frames=12, adatoms=5, hops=6, events=0, radius=14.0, vibration=0.0)
    scene = build_scene(spec, 4)
    assert len(scene.events) >= 4
    for event in scene.events:
        assert event.kind == "hop"
        before, after = (set(columns_of(scene, event.frame - k, ORIGIN)["column"]) for k in (1, 0))
        assert event.column in before - after and event.to in after - before
        assert len(before) == len(after)


def test_groups_of_silicon_have_the_bonds_their_names_say():
    spec = MovieSpec(**GRAPHENE, frames=1, vibration=0.0, groups=("3-fold", "4-fold", "dimer", "trimer"))
    scene = build_scene(spec, 5)
    points, numbers, _ = scene.atoms(0)
    silicon, carbon = points[numbers == 14, :2], points[numbers == 6, :2]
    assert len(silicon) == 7
    others = neighbours(silicon, 3.0)
    assert sorted(others) == [0, 0, 1, 1, 2, 2, 2]
    distance = cKDTree(carbon).query(silicon, k=5)[0]
    single = distance[others == 0]
    bonds = sorted((single < 2.0).sum(1))
    assert bonds == [3, 4]
    assert ((single[:, 0] > 1.6) & (single[:, 0] < 1.95)).all()
    holes = sites_of(scene, 0, ORIGIN)
    assert (holes["species"] == "0C").sum() == 2 + 1 + 1 and (holes["species"] == "Si").sum() == 7
    with pytest.raises(SettingsError, match=r"5-fold.*3-fold, 4-fold"):
        build_scene(MovieSpec(**GRAPHENE, groups=("5-fold",)), 1)


def test_silicon_hops_and_changes_its_bonds():
    spec = MovieSpec(**GRAPHENE, frames=40, groups=("3-fold",), hops=30, drift_step=1e-9, drift_jitter=0.0)
    scene = build_scene(spec, 6)
    assert {event.kind for event in scene.events} == {"hop", "coordination"}
    for event in scene.events:
        before, after = (scene.present(event.frame - k) for k in (1, 0))
        silicon = scene.crystal.numbers == 14
        assert (before & silicon).sum() == (after & silicon).sum() == 1
        carbons = (after & ~silicon).sum() - (before & ~silicon).sum()
        assert (carbons == 0) == (event.kind == "hop")
        assert scene.crystal.column[before & silicon][0] == event.column
        assert scene.crystal.column[after & silicon][0] == event.to


def test_sulphur_hops_into_vacancies_and_the_count_of_vacancies_stays():
    spec = MovieSpec(kind="mos2", shape=(200, 200), sampling=0.15, frames=10, vacancies=0.05, hops=7, events=0)
    scene = build_scene(spec, 3)
    assert len(scene.events) >= 5
    counts = {int(scene.present(frame).sum()) for frame in range(10)}
    assert len(counts) == 1
    moved = [not np.array_equal(scene.present(frame), scene.present(frame - 1)) for frame in range(1, 10)]
    assert [frame for frame, change in enumerate(moved, 1) if change] == [event.frame for event in scene.events]


@pytest.mark.parametrize(
    ("kind", "names"), [("mos2", {"Mo", "W", "2S", "SeS", "2Se", "1S", "1Se", "0S"}),
                        ("wse2", {"W", "Mo", "2Se", "TeSe", "2Te", "1Se", "1Te", "0Se"})]
)  # fmt: skip
def test_substitutions_and_vacancies_of_either_kind(kind, names):
    spec = MovieSpec(
        kind=kind, shape=(512, 512), sampling=0.15, frames=1, vacancies=0.1, double_vacancies=0.1, substitutions=0.3,
        metal_substitutions=0.2, events=0,
    )  # fmt: skip
    sites = sites_of(build_scene(spec, 1), 0, np.array([-256.0, -256.0]))
    assert set(sites["species"]) == names
    share = {name: (sites["species"] == name).sum() * 2 / len(sites) for name in names}
    empty = next(name for name in names if name.startswith("0"))
    assert share[empty] == pytest.approx(0.1 + 0.9 * 0.01, abs=0.03)
    metals = sites[np.isin(sites["species"], ("Mo", "W"))]
    assert (metals["species"] == ("W" if kind == "mos2" else "Mo")).mean() == pytest.approx(0.2, abs=0.05)


def test_single_atoms_of_a_pair_come_and_go():
    spec = MovieSpec(kind="mos2", shape=(200, 200), sampling=0.15, frames=8, vacancies=0.0, events=5, atomwise=True)
    scene = build_scene(spec, 2)
    assert len(scene.events) == 5
    assert [int((~scene.present(frame)).sum()) for frame in (0, 7)] == [0, 5]
    names = list(sites_of(scene, 7, np.array([-100.0, -100.0]))["species"])
    assert names.count("1S") + 2 * names.count("0S") == 5
