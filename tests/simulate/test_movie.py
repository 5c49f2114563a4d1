from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes, fourier_shift, gaussian_filter, map_coordinates, maximum_filter

from pipeline.simulate.movie import MovieSpec, simulate_frames, simulate_movie
from pipeline.simulate.scene import build_scene
from schemas.errors import SettingsError

SMALL = {"shape": (128, 128), "frames": 3, "radius": 8.0, "sampling": 0.17}


def peaks(image, sign, sigma):
    smooth = sign * gaussian_filter(image, sigma)
    top = (smooth == maximum_filter(smooth, 7)) & (smooth > smooth.mean() + smooth.std())
    return np.argwhere(top)


def distances(truth, found):
    return np.linalg.norm(truth[:, None] - found[None], axis=2)


def test_same_seed_same_bits_and_other_seed_other_movie():
    spec = MovieSpec(**SMALL)
    one, two, other = (simulate_movie(spec, seed) for seed in (3, 3, 4))
    assert np.array_equal(one.counts, two.counts)
    assert all(np.array_equal(a, b) for a, b in zip(one.columns, two.columns, strict=True))
    assert not np.array_equal(one.counts, other.counts)


@pytest.mark.parametrize(("contrast", "sign"), [("bright", 1), ("dark", -1)])
@pytest.mark.parametrize("zone", ["110", "100"])
def test_columns_of_a_particle_lie_on_extrema_of_the_clean_image(contrast, sign, zone):
    movie = simulate_movie(MovieSpec(**SMALL, contrast=contrast, zone=zone, carbon_walk=0.0), 5)
    assert movie.polarity == sign
    truth = movie.columns[0]
    truth = np.column_stack([truth["y"], truth["x"]])[truth["visible"]]
    assert len(truth) > 20
    nearest = distances(truth, peaks(movie.clean[0], sign, 1.0)).min(1)
    assert np.mean(nearest < 1.5) > 0.9


def test_rows_and_columns_are_not_swapped_on_a_wide_frame():
    movie = simulate_movie(MovieSpec(kind="mos2", shape=(64, 160), frames=2, sampling=0.15, mode="haadf"), 1)
    assert movie.counts.shape == (2, 64, 160)
    truth = movie.columns[1]
    assert truth["y"].max() < 64 < truth["x"].max()
    values = map_coordinates(movie.clean[1], [truth["y"], truth["x"]], order=1)
    assert values[truth["species"] == "Mo"].min() > movie.clean[1].mean()


def test_sheet_has_its_bond_length_and_species():
    movie = simulate_movie(MovieSpec(kind="mos2", shape=(160, 160), frames=1, sampling=0.15, vibration=0.0), 2)
    truth = movie.columns[0]
    place = np.column_stack([truth["y"], truth["x"]]) * 0.15
    gap = distances(place, place) + 1e9 * np.eye(len(place))
    middle = (np.abs(place - place.mean(0)) < 8).all(1)
    assert np.allclose(gap[middle].min(1), 3.18 / np.sqrt(3), atol=0.02)
    assert set(truth["species"]) <= {"Mo", "2S", "1S"}
    assert movie.polarity == 1


def test_drift_says_how_the_specimen_moved():
    spec = MovieSpec(**{**SMALL, "frames": 6}, drift_step=0.5, carbon_walk=0.0, vibration=0.0, events=0)
    movie = simulate_movie(spec, 8)
    assert not movie.drift[0].any() and np.abs(movie.drift[-1]).max() > 1
    first, last = movie.columns[0], movie.columns[-1]
    both = np.intersect1d(first["column"], last["column"])
    a, b = (c[np.isin(c["column"], both)] for c in (first, last))
    moved = np.column_stack([b["y"] - a["y"], b["x"] - a["x"]])
    assert np.allclose(moved, movie.drift[-1], atol=1e-9)
    spectrum = np.fft.fft2(movie.clean[0]) * np.conj(np.fft.fft2(movie.clean[-1]))
    peak = np.unravel_index(np.abs(np.fft.ifft2(spectrum)).argmax(), movie.clean[0].shape)
    shift = [-(p if p < 64 else p - 128) for p in peak]
    assert np.abs(np.array(shift) - movie.drift[-1]).max() <= 1.0


def test_a_shifted_wave_equals_moved_atoms():
    """The fast path for still specimens gives the image that moving every atom gives."""
    spec = MovieSpec(**SMALL, drift_step=0.4, carbon_walk=0.0, vibration=0.0, events=0, defocus=50.0)
    fast = simulate_movie(spec, 4)
    moved = simulate_movie(MovieSpec(**{**vars(spec), "vibration": 1e-6}), 4)
    inner = (slice(None), slice(12, -12), slice(12, -12))
    assert np.allclose(fast.drift, moved.drift)
    # Not closer: abTEM spreads an atom over four grid points, so a moved atom is blurred and a shifted wave is not.
    assert np.abs(fast.clean[inner] - moved.clean[inner]).max() < 0.1 * np.ptp(moved.clean)
    assert np.corrcoef(fast.clean[inner].ravel(), moved.clean[inner].ravel())[0, 1] > 0.995


def test_events_change_the_image_where_and_when_they_say():
    spec = MovieSpec(**{**SMALL, "frames": 12}, carbon_walk=0.0, vibration=0.0, drift_step=1e-9, drift_jitter=0.0)
    movie = simulate_movie(spec, 6)
    assert movie.events
    for event in movie.events:
        before, after = (movie.columns[event.frame - k]["column"] for k in (1, 0))
        assert (event.column in after, event.column in before) == (
            (True, False) if event.kind == "appear" else (False, True)
        )
        holder = movie.columns[event.frame if event.kind == "appear" else event.frame - 1]
        row = holder[holder["column"] == event.column][0]
        y, x = int(row["y"]), int(row["x"])
        change = np.abs(movie.clean[event.frame] - movie.clean[event.frame - 1])
        assert change[y - 3 : y + 4, x - 3 : x + 4].max() > 0.05


def test_counts_follow_poisson_statistics_of_the_dose():
    movie = simulate_frames((128, 128), 8, sampling=0.2, dose=200.0, seed=1)
    electrons = movie.counts.astype(float)
    assert electrons.mean() == pytest.approx(8.0, rel=0.01)
    assert electrons.var() == pytest.approx(8.0, rel=0.02)
    assert not len(movie.columns[0])
    scaled = simulate_movie(MovieSpec(kind="vacuum", frames=4, counts_per_electron=20.0, offset=100.0), 1)
    assert scaled.counts.mean() == pytest.approx(100 + 20 * 1000 * 0.17**2, rel=0.01)


def test_mtf_blurs_and_keeps_the_mean():
    plain = simulate_movie(MovieSpec(**SMALL), 2)
    blurred = simulate_movie(MovieSpec(**SMALL, mtf=(1.0, 0.0, 0.1, 2.5)), 2)
    assert blurred.clean.mean() == pytest.approx(plain.clean.mean(), rel=1e-2)
    assert blurred.clean.std() < 0.95 * plain.clean.std()


def test_several_particles_keep_apart():
    scene = build_scene(MovieSpec(shape=(512, 512), particles=3, frames=1), 0)
    assert scene.crystal.count == scene.crystal.column.max() + 1
    movie = simulate_movie(MovieSpec(shape=(256, 256), particles=3, frames=1), 0)
    place = np.column_stack([movie.columns[0]["y"], movie.columns[0]["x"]]) * 0.17
    gap = distances(place, place) + 1e9 * np.eye(len(place))
    assert gap.min() > 1.4


def test_a_focal_series_is_imaged_from_one_exit_wave():
    """Every plane is the image that a movie at that defocus has, with noise of its own."""
    spec = MovieSpec(**SMALL, defoci=(-40.0, 0.0, 60.0))
    series = simulate_movie(spec, 5)
    assert series.counts.shape == (3, 3, 128, 128) and series.defocus == -40.0
    for plane, defocus in enumerate(spec.defoci):
        alone = simulate_movie(MovieSpec(**SMALL, defocus=defocus), 5)
        assert np.array_equal(series.clean[:, plane], alone.clean)
        assert np.array_equal(np.concatenate(series.columns), np.concatenate(alone.columns))
    noise = series.counts - spec.dose * spec.sampling**2 * series.clean
    assert np.corrcoef(noise[0, 0].ravel(), noise[0, 1].ravel())[0, 1] < 0.03
    still = MovieSpec(**SMALL, defoci=(-40.0, 60.0), carbon_walk=0.0, vibration=0.0, events=0)
    moved = simulate_movie(MovieSpec(**{**vars(still), "defoci": (60.0,)}), 5)
    assert np.array_equal(simulate_movie(still, 5).clean[:, 1], moved.clean[:, 0])


def test_planes_of_a_series_are_shifted_as_the_truth_says():
    still = {"carbon_walk": 0.0, "vibration": 0.0, "events": 0}
    for extra in (still, {}):
        spec = MovieSpec(**SMALL, defoci=(60.0, 60.0), plane_drift=0.5, **extra)
        movie = simulate_movie(spec, 5)
        assert not movie.plane_shifts[:, 0].any() and np.abs(movie.plane_shifts[:, 1]).max() > 1
        for clean, shifts in zip(movie.clean, movie.plane_shifts, strict=True):
            back = np.fft.ifft2(fourier_shift(np.fft.fft2(clean[1]), -shifts[1])).real
            inner = (slice(20, -20), slice(20, -20))
            assert np.abs(back - clean[0])[inner].max() < 0.02 * np.ptp(clean[0])


def test_aberrations_act_as_their_names_say():
    """Twofold astigmatism of 50 Å at 0° is defocus of opposite sign along y and x."""
    spec = MovieSpec(kind="carbon", shape=(128, 128), frames=1, defocus=0.0, carbon_cover=2.0, astigmatism=600.0)
    power = np.abs(np.fft.fft2(simulate_movie(spec, 1).clean[0] - 1)) ** 2
    plain = np.abs(np.fft.fft2(simulate_movie(MovieSpec(**{**vars(spec), "astigmatism": 0.0}), 1).clean[0] - 1)) ** 2
    assert power.sum() > 1.3 * plain.sum()
    turned = simulate_movie(MovieSpec(**{**vars(spec), "astigmatism_angle": 90.0}), 1).clean[0]
    opposite = simulate_movie(MovieSpec(**{**vars(spec), "astigmatism": -600.0}), 1).clean[0]
    assert np.allclose(turned, opposite, atol=1e-3)
    assert not np.allclose(turned, simulate_movie(spec, 1).clean[0], atol=1e-2)


def test_scan_jitter_displaces_rows():
    spec = MovieSpec(kind="graphene", mode="haadf", shape=(128, 128), frames=2, sampling=0.1, scan_jitter=0.3, events=0)
    jittered = simulate_movie(spec, 2).clean[0]
    steady = simulate_movie(MovieSpec(**{**vars(spec), "scan_jitter": 0.0}), 2).clean[0]
    lags = []
    for one, other in zip(jittered, steady, strict=True):
        products = [np.dot(one[10:-10], np.roll(other, lag)[10:-10]) for lag in range(-10, 11)]
        lags.append(np.argmax(products) - 10)
    assert np.std(lags) * 0.1 == pytest.approx(0.3, rel=0.25)
    assert np.abs(jittered.mean() / steady.mean() - 1) < 0.02
    with pytest.raises(SettingsError, match="scan_jitter"):
        MovieSpec(scan_jitter=0.3)


def test_every_site_of_a_sheet_is_listed_with_what_it_holds():
    spec = MovieSpec(kind="mos2", shape=(160, 160), frames=2, sampling=0.15, vacancies=0.2, events=0, mode="haadf")
    movie = simulate_movie(spec, 4)
    sites, columns = movie.sites[1], movie.columns[1]
    assert set(sites["species"]) == {"Mo", "2S", "1S", "0S"}
    missing = np.isin(sites["species"], ("1S", "0S")).sum() + (sites["species"] == "0S").sum()
    sulphur = np.char.endswith(sites["species"], "S").sum() * 2
    assert missing / sulphur == pytest.approx(0.2, abs=0.08)
    by_site = {row["site"]: row for row in sites}
    for row in columns:
        if row["site"] in by_site:  # a column and its site may lie on different sides of the edge
            there = by_site[row["site"]]
            assert there["species"] == row["species"]
            assert np.hypot(there["y"] - row["y"], there["x"] - row["x"]) * 0.15 < 0.3
    empty = set(by_site) - set(columns["site"])
    assert {by_site[site]["species"] for site in empty if 3 < by_site[site]["y"] < 157 > by_site[site]["x"] > 3} == {
        "0S"
    }


def test_masks_outline_the_atoms_of_each_particle_without_gaps():
    spec = MovieSpec(shape=(224, 224), frames=2, particles=2, radius=7.0, sampling=0.2, drift_step=0.8, defocus=0.0)
    movie = simulate_movie(spec, 3)
    assert movie.masks.dtype == np.uint16 and list(movie.particles["particle"]) == [0, 1]
    for mask, columns in zip(movie.masks, movie.columns, strict=True):
        at = mask[np.rint(columns["y"]).astype(int), np.rint(columns["x"]).astype(int)]
        assert np.array_equal(at, columns["particle"] + 1)
        for label in (1, 2):
            inside = mask == label
            assert np.array_equal(binary_fill_holes(inside), inside)
            y, x = np.nonzero(inside)
            of_this = columns[columns["particle"] == label - 1]
            far = np.hypot(y[:, None] - of_this["y"], x[:, None] - of_this["x"]).min(1) * spec.sampling
            assert 1.4 < far.max() < 2.1
    assert not simulate_movie(MovieSpec(kind="graphene", shape=(48, 48), frames=1, mode="haadf"), 1).masks.any()


def test_particles_are_tilted_one_by_one():
    spec = MovieSpec(shape=(320, 320), frames=1, particles=2, radius=8.0, tilts=(0.0, 8.0), defocus=0.0, events=0)
    movie = simulate_movie(spec, 3)
    assert list(movie.particles["tilt"]) == [0.0, 8.0]
    columns = movie.columns[0]
    thick = columns["atoms"] >= 6
    assert columns["visible"][thick & (columns["particle"] == 0)].all()
    assert not columns["visible"][thick & (columns["particle"] == 1)].any()
    with pytest.raises(SettingsError, match=r"tilts is \(1.0,\).*each of the 2"):
        MovieSpec(particles=2, tilts=(1.0,))


def test_wrong_settings_are_named():
    with pytest.raises(SettingsError, match=r"tungsten.*expected one of"):
        MovieSpec(kind="tungsten")
    with pytest.raises(SettingsError, match=r"dose is -1.*positive"):
        MovieSpec(dose=-1.0)
    with pytest.raises(SettingsError, match="Xx"):
        simulate_movie(MovieSpec(element="Xx"), 0)
