"""The shipped particle network does what its card says, on a few fresh movies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.networks import particle_check
from pipeline.networks.segment_check import recorded
from pipeline.networks.weights import SHIPPED, load_weights
from pipeline.simulate.movie import MovieSpec, simulate_movie
from pipeline.steps import segment
from pipeline.steps.segment import PARTICLE_SAMPLING_RANGE


@pytest.fixture(scope="module")
def particles():
    return load_weights("particles")


def judged(loaded, frame, truth, sampling):
    options = {"window": None, "halo": None, "batch": 1, "model_sampling": loaded.metadata["sampling"]}
    probability = segment.particle_probability(loaded.module, frame[None], sampling=sampling, **options)[0]
    return particle_check.judge(probability, truth, sampling=sampling)


@pytest.mark.parametrize(
    "spec",
    [
        MovieSpec(frames=1),
        MovieSpec(frames=1, contrast="dark", zone="100"),
        MovieSpec(frames=1, tilt=15.0),
        MovieSpec(frames=1, mode="haadf"),
        MovieSpec(frames=1, shape=(320, 320), sampling=0.25, particles=3, element="Pt", tilts=(0.0, 5.0, 12.0)),
    ],
    ids=["on zone", "dark", "tilted", "haadf", "three"],
)
def test_single_raw_frames_show_their_particles(particles, spec):
    movie = simulate_movie(spec, 7301)
    for dose, overlap in ((100.0, 0.75), (30.0, 0.6)):
        frame = recorded(movie, dose, 1).counts[0].astype(np.float32)
        verdict = judged(particles, frame, movie.masks[0], spec.sampling)
        assert verdict.detected == verdict.demanded == spec.particles
        assert verdict.iou > overlap and verdict.spurious == 0


@pytest.mark.parametrize(("sampling", "binned"), [(0.09, 1), (0.25, 2), (0.25, 3)])
def test_finer_and_coarser_detectors_do_as_well(particles, sampling, binned):
    edge = int(44 / sampling) // binned * binned
    movie = simulate_movie(MovieSpec(frames=1, shape=(edge, edge), sampling=sampling, radius=13.0), 7302)
    counts = recorded(movie, 200.0, 1).counts[0].astype(np.float32)
    frame = counts.reshape(edge // binned, binned, edge // binned, binned).sum((1, 3))
    truth = movie.masks[0][binned // 2 :: binned, binned // 2 :: binned]
    verdict = judged(particles, frame, truth, sampling * binned)
    assert verdict.iou > 0.75 and verdict.detected == 1


@pytest.mark.parametrize(
    "spec",
    [
        MovieSpec(kind="vacuum", energy=80.0),
        MovieSpec(kind="carbon"),
        MovieSpec(kind="mos2", energy=80.0),
        MovieSpec(kind="graphene", energy=80.0),
        MovieSpec(kind="graphene", mode="haadf", energy=60.0, sampling=0.08, groups=("trimer",)),
    ],
    ids=["vacuum", "carbon", "mos2", "graphene", "haadf of graphene"],
)
def test_where_nothing_is_next_to_nothing_is_found(particles, spec):
    movie = simulate_movie(replace(spec, frames=2), 7303)
    found = 0
    for dose in (30.0, 100.0, 1000.0):
        for counts in recorded(movie, dose, 2).counts.astype(np.float32):
            found += judged(particles, counts, np.zeros(counts.shape, np.uint16), spec.sampling).spurious
    assert found <= 1  # in six frames; the card says how often


def test_the_card_and_the_file_say_the_same():
    loaded = load_weights("particles")
    assert tuple(loaded.metadata["sampling_range"]) == PARTICLE_SAMPLING_RANGE
    card = (SHIPPED / "particles.md").read_text()
    assert f"| parameters | {sum(p.numel() for p in loaded.module.parameters())} |" in card
