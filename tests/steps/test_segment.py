from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, maximum_filter

from pipeline.networks.adapt import bound
from pipeline.networks.msdnet import MSDNet
from pipeline.networks.weights import load_weights
from pipeline.simulate.movie import MovieSpec, simulate_frames, simulate_movie
from pipeline.steps import denoise, neighbours, segment
from schemas.errors import SettingsError


@pytest.fixture(scope="module")
def columns():
    return load_weights("columns")


@pytest.fixture(scope="module")
def random_network():
    torch.manual_seed(0)
    network = MSDNet(inputs=1, outputs=2, width=4, dilations=(1, 2, 4, 2))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.15)
    return network.eval()


def smoothed(movie, sigma=0.35):
    """Electrons, averaged over time and slightly in space: a stand-in for the denoiser."""
    mean = movie.counts.astype(np.float32).mean(0)
    return gaussian_filter(mean, sigma / movie.sampling)[None]


def probability(loaded, frames, sampling, polarity=1, **changes):
    options = {"window": None, "halo": None, "batch": 1, "model_sampling": loaded.metadata["sampling"]} | changes
    return segment.column_probability(loaded.module, frames, sampling=sampling, polarity=polarity, **options)


def peaks(image, sampling):
    size = 2 * int(0.6 / sampling) + 1
    return np.argwhere((image == maximum_filter(image, size)) & (image > 0.5))


def still(**changes):
    return MovieSpec(
        **{"shape": (160, 160), "frames": 4, "radius": 9.0, "drift_step": 1e-9, "drift_jitter": 0.0, "events": 0}
        | changes
    )


@pytest.mark.parametrize(
    ("spec", "polarity"),
    [
        (still(), 1),
        (still(contrast="dark"), -1),
        (still(zone="100"), 1),
        (still(kind="mos2", energy=80.0, sampling=0.15), 1),
        (still(kind="graphene", mode="haadf", energy=60.0, sampling=0.1), 1),
    ],
    ids=["au-bright", "au-dark", "au-100", "mos2", "graphene-haadf"],
)
def test_columns_are_found_where_they_are(columns, spec, polarity):
    movie = simulate_movie(spec, 101)
    found = peaks(probability(columns, smoothed(movie), spec.sampling, polarity)[0], spec.sampling)
    truth = movie.columns[0]
    place = np.column_stack([truth["y"], truth["x"]])
    gap = np.linalg.norm(place[:, None] - found[None], axis=2) * spec.sampling
    inner = (np.abs(place - 79.5) < 79.5 - 1.0 / spec.sampling).all(1)
    assert np.mean(gap.min(1)[truth["visible"] & inner] < 0.5) > 0.9
    assert np.mean(gap.min(0) < 0.5) > 0.9


@pytest.mark.parametrize("dose", [50.0, 200.0, 1000.0])
def test_pure_noise_once_denoised_holds_no_columns(columns, dose):
    movie = simulate_frames((200, 200), 8, sampling=0.17, dose=dose, seed=3)
    electrons = movie.counts.astype(np.float32)
    links = neighbours.FrameLinks(np.zeros((8, 2), np.int64), np.ones(8, bool), np.zeros(8, np.int64))
    level = neighbours.measure_level(electrons, readout_variance=0.0)
    network = bound(load_weights("denoise").module, electrons, links=links, level=level)
    made = denoise.denoise(network, electrons, [3, 4, 5], links=links, level=level, tile=None, dtype="auto")
    for polarity in (1, -1):
        assert not sum(len(peaks(map_, 0.17)) for map_ in probability(columns, made, 0.17, polarity))


@pytest.mark.parametrize(("contrast", "sign"), [("bright", 1), ("dark", -1)])
@pytest.mark.parametrize("kind", ["nanoparticle", "mos2", "graphene"])
def test_polarity_is_told_from_the_images(columns, kind, contrast, sign):
    energy = 300.0 if kind == "nanoparticle" else 80.0
    movie = simulate_movie(still(kind=kind, energy=energy, contrast=contrast, sampling=0.15), 102)
    assert movie.polarity == sign
    options = {"sampling": 0.15, "model_sampling": 0.2, "window": None, "halo": None, "batch": 1}
    assert segment.vote_polarity(columns.module, smoothed(movie), **options) == sign


@pytest.mark.parametrize("sampling", [0.05, 0.12, 0.17, 0.2, 0.31])
def test_windows_agree_with_the_whole_frame_at_any_sampling(random_network, sampling):
    frames = np.random.default_rng(1).poisson(8.0, (1, 150, 170)).astype(np.float32)
    options = {"sampling": sampling, "model_sampling": 0.2, "polarity": 1, "halo": 12, "batch": 1}
    whole = segment.column_probability(random_network, frames, window=None, **options)
    assert whole.shape == frames.shape and whole.std() > 1e-3
    for window in (40, 64):
        cut = segment.column_probability(random_network, frames, window=window, **options)
        assert np.abs(cut - whole).max() < 1e-4


def test_frames_do_not_depend_on_their_company(random_network):
    frames = np.random.default_rng(2).poisson(8.0, (4, 60, 64)).astype(np.float32)
    options = {"sampling": 0.2, "model_sampling": 0.2, "polarity": 1, "window": 40, "halo": None, "batch": 2}
    together = segment.column_probability(random_network, frames, **options)
    for index in range(4):
        assert np.array_equal(
            together[index], segment.column_probability(random_network, frames[index][None], **options)[0]
        )


@pytest.mark.parametrize("sampling", [0.08, 0.2, 0.33])
def test_resampling_there_and_back_moves_nothing(sampling):
    """A network that returns its input: a spot stays where it is on the detector's grid."""

    class Identity(torch.nn.Module):
        receptive_radius = 0

        def forward(self, images):
            return torch.cat([images, images], 1)

    shape = (int(24 / sampling), int(20 / sampling))
    y, x = shape[0] * 0.4, shape[1] * 0.63
    rows, cols = np.mgrid[: shape[0], : shape[1]]
    spot = np.exp(-0.5 * ((rows - y) ** 2 + (cols - x) ** 2) * (sampling / 0.6) ** 2).astype(np.float32)
    made = segment.column_probability(
        Identity(), spot[None], sampling=sampling, model_sampling=0.2, polarity=1, window=None, halo=None, batch=1
    )[0]
    weight = np.clip(made - 0.8, 0, None)
    centre = (weight * rows).sum() / weight.sum(), (weight * cols).sum() / weight.sum()
    assert np.abs(np.array(centre) - (y, x)).max() * sampling < 0.03


def test_prepared_frames_ignore_units_and_mirror_their_contrast():
    frame = torch.from_numpy(np.random.default_rng(4).normal(10, 2, (50, 60)).astype(np.float32))
    plain = segment.prepare(frame, sampling=0.2, model_sampling=0.2)
    assert torch.allclose(segment.prepare(37.0 * frame, sampling=0.2, model_sampling=0.2), plain, atol=1e-4)
    mirrored = segment.prepare(2 * frame.mean() - frame, sampling=0.2, model_sampling=0.2)
    assert torch.allclose(mirrored, -plain, atol=1e-3)


def test_flat_frames_stay_small():
    rng = np.random.default_rng(5)
    for spread, most in ((0.0, 1e-4), (0.002, 0.1), (0.2, 1.2)):
        frame = torch.from_numpy((1 + spread * rng.standard_normal((80, 80))).astype(np.float32))
        assert segment.prepare(frame, sampling=0.2, model_sampling=0.2).std() < most


def test_smooth_equals_scipy():
    image = np.random.default_rng(6).normal(size=(40, 33)).astype(np.float32)
    expected = gaussian_filter(image.astype(np.float64), 3.0, mode="mirror", truncate=3.0)
    assert np.allclose(segment.smooth(torch.from_numpy(image), 3.0).numpy(), expected, atol=1e-5)


def test_sampling_outside_the_range_is_refused(random_network):
    assert segment.usable(0.03) and segment.usable(0.4)
    assert not segment.usable(1.635) and not segment.usable(0.01)
    with pytest.raises(SettingsError, match=r"sampling is 1.635 Å/px; expected 0.03 to 0.4"):
        segment.check_sampling(1.635)
    with pytest.raises(SettingsError, match=r"sampling is 0\.5"):
        segment.column_probability(
            random_network,
            np.ones((1, 8, 8), np.float32),
            sampling=0.5,
            model_sampling=0.2,
            polarity=1,
            window=None,
            halo=None,
            batch=1,
        )
