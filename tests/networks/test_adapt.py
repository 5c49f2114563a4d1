from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from pipeline.networks.adapt import _averaged, adapt, bound, untrained, with_context
from pipeline.networks.adapt_sample import (
    SLOT_DROPOUT,
    Batches,
    Sample,
    Seen,
    plan_sample,
    training_sample,
    turned,
    turned_back,
)
from pipeline.networks.phantoms import phantom
from pipeline.networks.risk import Judge, Look
from pipeline.networks.weights import load_weights
from pipeline.networks.wiener import NeighbourWiener, leftover_filter, wiener_kernel
from pipeline.steps.denoise import denoise
from pipeline.steps.neighbours import (
    FrameLinks,
    Level,
    convolved,
    frame_context,
    measure_level,
    neighbour_stack,
)

CONFIG = {"frames": 5, "channels": 16, "dilations": [2]}
DOSE = 0.5
SETTINGS = {"crop": 48, "batch": 4, "learning_rate": 5e-3, "seed": 0, "dtype": "float32"}


def links_of(n, drift=None):
    drift = np.zeros((n, 2), dtype=int) if drift is None else drift
    return FrameLinks(drift, np.ones(n, dtype=bool), np.zeros(n, dtype=int))


@pytest.fixture(scope="module")
def movie():
    """Clean frames, counts and links of a small drifting lattice."""
    made = phantom(np.random.default_rng(18), frames=10, side=96)
    counts = np.random.default_rng(1).poisson(DOSE * made.frames).astype(np.float32)
    return made.frames, counts, links_of(10, np.round(made.drift).astype(int))


@pytest.fixture(scope="module")
def adapted(movie):
    _, counts, links = movie
    sample = Sample(torch.from_numpy(counts), links, measure_level(counts, readout_variance=0))
    return sample, adapt(untrained("blindspot", CONFIG, seed=0), sample, steps=375, **SETTINGS)


def psnr(estimate, clean):
    return 10 * np.log10(np.ptp(clean) ** 2 / np.mean((estimate / DOSE - clean) ** 2))


def inferred(network, counts, links):
    level = measure_level(counts, readout_variance=0)
    return denoise(network, counts, range(len(counts)), links=links, level=level, tile=None, dtype="float32")


def test_an_adapted_network_beats_the_noise_and_the_mean_of_aligned_frames(movie, adapted):
    clean, counts, links = movie
    means = np.stack(
        [_mean(*neighbour_stack(counts, i, offsets=range(-2, 3), links=links, fill=0)) for i in range(len(counts))]
    )
    result = psnr(inferred(adapted[1].network, counts, links), clean)
    assert result > psnr(means, clean) + 6
    assert result > psnr(counts, clean) + 12
    assert result > psnr(np.full_like(clean, counts.mean()), clean) + 1.5


def _mean(stack, valid):
    return ((stack * valid).sum(0) / valid.sum(0)).numpy()


def test_the_record_says_what_was_done(adapted):
    sample, (network, record) = adapted
    assert record["final_risk"] < record["initial_risk"]
    assert (record["kept"], record["steps"], record["sample_frames"]) == ("adapted", 375, len(sample.frames))
    assert record["seconds"] > 0
    assert not network.training


def test_the_same_seed_gives_the_same_bits_and_leaves_the_start_alone(adapted, monkeypatch):
    monkeypatch.setattr("pipeline.networks.adapt.beats", lambda one, other, *, sure: True)
    sample, _ = adapted
    start = untrained("blindspot", CONFIG, seed=3)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    arguments = {**SETTINGS, "dtype": "auto"}
    first, second = (adapt(start, sample, steps=12, **arguments).network for _ in range(2))
    other = adapt(start, sample, steps=12, **{**arguments, "seed": 1}).network
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()["last.weight"], other.state_dict()["last.weight"])


def judged_by(monkeypatch, risks):
    """Have all networks judged by these risks, and none completed."""
    monkeypatch.setattr(Judge, "look", lambda judge, network: Look(network, torch.empty(0), risks(judge, network)))
    monkeypatch.setattr(Judge, "completed", lambda judge, look: look)


def test_the_number_of_cores_changes_no_bit(movie, monkeypatch):
    _, counts, links = movie
    sample = Sample(torch.from_numpy(counts), links, measure_level(counts, readout_variance=0))
    start, found = load_weights("denoise-small").module, []
    monkeypatch.setattr("pipeline.networks.adapt.MANY", 12)
    for cores in (1, 2):
        monkeypatch.setattr("pipeline.networks.threads._cores", lambda cores=cores: cores)
        found.append(adapt(start, sample, steps=12, **{**SETTINGS, "dtype": "auto"}))
    one, two = found
    assert one.record["final_risk"] == two.record["final_risk"]
    states = (made.network.state_dict() for made in found)
    for (name, left), right in zip(next(states).items(), next(states).values(), strict=True):
        assert torch.equal(left, right), name


def test_the_weights_of_least_risk_are_kept_and_training_ends_when_it_rises(movie, monkeypatch):
    """Looks at steps 10, 20, …: best at 20, no better at 30 and 40, and 50 is never reached; no more do estimates."""
    _, counts, links = movie
    sample = Sample(torch.from_numpy(counts), links, measure_level(counts, readout_variance=0))
    looks = []

    def risks(_, network):
        if isinstance(network, NeighbourWiener):
            return np.full(4, 9.0)
        looks.append(network.state_dict()["last.weight"].clone())
        return np.full(4, {0: 5.0, 1: 3.0, 2: 1.0}.get(len(looks) - 1, 2.0)) + np.arange(4) / 100

    judged_by(monkeypatch, risks)
    monkeypatch.setattr("pipeline.networks.adapt.APART", 5)
    monkeypatch.setattr("pipeline.networks.adapt.MANY", 90)
    network, record = adapt(untrained("blindspot", CONFIG, seed=0), sample, steps=90, **SETTINGS)
    assert (record["best_step"], record["kept"], len(looks)) == (20, "adapted", 6)
    assert torch.equal(network.state_dict()["last.weight"], looks[2])
    assert not torch.equal(looks[2], looks[3])


def test_a_short_training_is_looked_at_less_often(movie, monkeypatch):
    _, counts, links = movie
    sample = Sample(torch.from_numpy(counts), links, measure_level(counts, readout_variance=0))
    monkeypatch.setattr("pipeline.networks.adapt.APART", 10)
    monkeypatch.setattr("pipeline.networks.adapt.MANY", 30)
    looks = []
    judged_by(monkeypatch, lambda *_: (looks.append(1), np.arange(3.0, 5))[1])
    adapt(untrained("blindspot", CONFIG, seed=0), sample, steps=30, **SETTINGS)
    assert len(looks) == 1 + 2 + 1 + 1  # before, in 20 steps, after the last 10, of the filter


@pytest.mark.parametrize(("scatter", "kept"), [(0.0, 20), (1.0, 30)])
def test_the_last_part_is_kept_unless_it_did_harm_beyond_chance(movie, monkeypatch, scatter, kept):
    """Its gain is less than what a dark movie tells of its risk: a risk that is higher by chance proves nothing."""
    _, counts, links = movie
    sample = Sample(torch.from_numpy(counts), links, measure_level(counts, readout_variance=0))
    means = iter([5.0, 1.0, 1.1, 9.0])  # before, after the first part, after the last, of the filter
    noise = iter(scatter * np.random.default_rng(1).normal(size=(4, 8)))

    def risks(*_):
        own = next(noise)
        return next(means) + own - own.mean()

    judged_by(monkeypatch, risks)
    monkeypatch.setattr("pipeline.networks.adapt.MANY", 30)
    _, record = adapt(untrained("blindspot", CONFIG, seed=0), sample, steps=30, **SETTINGS)
    assert record["best_step"] == kept


def test_training_on_its_own_averaged_estimates_brings_a_network_nearer_to_the_truth(movie, adapted, monkeypatch):
    clean, counts, links = movie
    start = partial(untrained, "blindspot", CONFIG, seed=0)
    network, record = adapt(start(), adapted[0], steps=900, **SETTINGS)
    assert record["best_step"] > 600  # a step of the last third was kept, by the risk alone
    monkeypatch.setattr("pipeline.networks.adapt.LAST_SHARE", 0.0)
    other = adapt(start(), adapted[0], steps=900, **SETTINGS)
    assert psnr(inferred(network, counts, links), clean) > psnr(inferred(other.network, counts, links), clean) + 0.1


def test_averaged_estimates_turn_with_the_frames(adapted):
    sample, (network, _) = adapted
    frames = sample.frames[:, :, :80]
    for turn in range(8):
        assert torch.equal(turned_back(turned(frames, turn), turn), frames)
    still = Sample(frames, links_of(10), sample.level)
    averaged = partial(_averaged, network, dtype="float32")
    blank = Seen(torch.zeros(1, len(frames), 1, *frames.shape[1:]), None)
    here = averaged(still, blank)
    for turn in (1, 4, 6):
        there = averaged(
            Sample(turned(frames, turn), links_of(10), sample.level), Seen(turned(blank.contexts, turn), None)
        )
        assert torch.allclose(turned_back(there, turn), here, atol=1e-4)
    assert not torch.allclose(turned(here, 1), here, atol=1e-2)


def test_without_steps_the_network_is_kept_unless_the_filter_is_as_good(movie, adapted):
    sample, (network, _) = adapted
    assert adapt(network, sample, steps=0, **SETTINGS).record["kept"] == "initial"
    weak = adapt(untrained("blindspot", CONFIG, seed=0), sample, steps=0, **SETTINGS)
    assert weak.record["kept"] == "wiener" and weak.record["best_step"] == 0


def test_the_filter_of_the_neighbours_is_that_of_wiener():
    """Waves pass, white noise does not; the filtered neighbours alone resemble the clean frames."""
    y, x = np.mgrid[:96, :96]
    clean = np.repeat((1 + 0.4 * np.cos(0.7 * x) * np.cos(0.6 * y + 0.3 * x))[None], 12, 0).astype(np.float32)
    counts = np.random.default_rng(0).poisson(DOSE * clean).astype(np.float32)
    level = measure_level(counts, readout_variance=0)
    sample = Sample(torch.from_numpy(counts), links_of(12), level)
    network = with_context(untrained("blindspot", CONFIG, seed=0), sample)
    assert network.config == {**CONFIG, "context": network.context_radius}
    assert network.context_radius > 0
    contexts = [frame_context(network, sample.frames, i, links=sample.links, level=level) for i in range(2, 10)]
    inner = np.concatenate(contexts)[:, 16:-16, 16:-16] / DOSE + 1
    truth = clean[2:10, 16:-16, 16:-16]
    assert np.mean((inner - truth) ** 2) < 0.15 * truth.var()
    noise = torch.from_numpy(np.random.default_rng(1).poisson(0.5, (12, 96, 96)).astype(np.float32))
    plain = NeighbourWiener(frames=5, around=9, context=64)
    kernel = wiener_kernel(plain, noise, links=sample.links, level=Level(0.5, 0.5))
    assert float(kernel.abs().sum()) == 0


def test_adding_context_changes_no_estimate():
    counts = np.random.default_rng(0).poisson(1.0, (5, 40, 42)).astype(np.float32)
    network = untrained("blindspot", CONFIG, seed=0)
    grown = with_context(network, Sample(torch.from_numpy(counts), links_of(5), Level(1, 1)))
    assert np.array_equal(inferred(network, counts, links_of(5)), inferred(grown, counts, links_of(5)))
    again = with_context(grown, Sample(torch.from_numpy(counts), links_of(5), Level(1, 1)))
    assert again.config == grown.config


@pytest.mark.parametrize(("many", "shares"), [(13, [0.0, 0.0]), (12, [SLOT_DROPOUT, SLOT_DROPOUT, 0.0, 0.0])])
def test_few_steps_leave_no_neighbour_out(adapted, monkeypatch, many, shares):
    drawn = []

    class Spy(Batches):
        def __init__(self, *parts, dropout, **how):
            drawn.append(dropout)
            super().__init__(*parts, dropout=dropout, **how)

    monkeypatch.setattr("pipeline.networks.adapt.Batches", Spy)
    monkeypatch.setattr("pipeline.networks.adapt.MANY", many)
    adapt(untrained("blindspot", CONFIG, seed=0), adapted[0], steps=12, **SETTINGS)
    assert drawn == shares


@pytest.mark.parametrize("dose", [0.1, 1.0])
def test_mere_noise_is_left_to_the_wiener_filter_which_makes_a_constant_of_it(dose):
    counts = np.random.default_rng(5).poisson(dose, (12, 96, 96)).astype(np.float32)
    sample = Sample(torch.from_numpy(counts), links_of(12), measure_level(counts, readout_variance=0))
    network, record = adapt(untrained("blindspot", CONFIG, seed=0), sample, steps=60, **SETTINGS)
    assert record["kept"] == "wiener" and isinstance(network, NeighbourWiener)
    assert inferred(network, counts, links_of(12)).std() < 0.01 * dose


def test_the_wiener_filter_is_blind_and_keeps_a_lattice(movie, adapted):
    clean, counts, links = movie
    network, record = adapted[1]
    assert record["final_risk"] < record["wiener_risk"]
    plain = NeighbourWiener(frames=5, context=network.context_radius)
    plain.kernel.copy_(network.kernel)
    found = inferred(plain, counts, links)
    assert psnr(found, clean) > psnr(np.full_like(clean, counts.mean()), clean) + 1
    level, changed = measure_level(counts, readout_variance=0), counts.copy()
    changed[4] = 0
    again = denoise(plain, changed, [4], links=links, level=level, tile=None, dtype="float32")
    assert np.array_equal(again[0], found[4])


def test_what_a_network_left_over_is_found_and_noise_is_not():
    """A known filter of the context, out of noise as strong as that; where there is none, nothing is made up."""
    rng = np.random.default_rng(2)
    contexts = torch.from_numpy(rng.normal(size=(12, 64, 80)).astype(np.float32))
    known = torch.zeros(33, 33)
    known[16, 16] = -0.5
    known[[14, 18], 16], known[16, [13, 19]] = 0.3, 0.2
    noise = torch.from_numpy(rng.normal(size=(12, 64, 80)).astype(np.float32))
    residuals = convolved(contexts, known) + noise
    residuals[:, 10:20, 30:50] = torch.nan
    found = leftover_filter(residuals, contexts)
    reach = found.shape[0] // 2
    near = found[reach - 2 : reach + 3, reach - 3 : reach + 4]
    assert (near - known[14:19, 13:20]).abs().max() < 0.08
    left = (convolved(contexts, found) - convolved(contexts, known)).var() / convolved(contexts, known).var()
    assert left < 0.25
    nothing = convolved(contexts, leftover_filter(noise, contexts))
    assert nothing.var() < 0.01 * convolved(contexts, known).var()
    assert not leftover_filter(noise, 0 * contexts).any()


def test_what_the_shipped_network_left_over_of_a_movie_is_added(movie):
    """Of a lattice whose contrast it is told wrongly, say by half, more than that it adds; held to the truth."""
    clean, counts, links = movie
    level = measure_level(counts, readout_variance=0)
    shipped = load_weights("denoise-small").module
    with torch.no_grad():
        for part in (shipped.last.weight, shipped.last.bias, shipped.skip):
            part.mul_(0.5)
    sample = Sample(torch.from_numpy(counts), links, level)
    raw, whole = with_context(shipped, sample).eval(), bound(shipped, counts, links=links, level=level)
    assert whole.config["leftover"] and "leftover" not in raw.config
    assert psnr(inferred(whole, counts, links), clean) > psnr(inferred(raw, counts, links), clean) + 0.5
    again = bound(whole, counts, links=links, level=level)
    assert torch.equal(again.leftover_kernel, whole.leftover_kernel)


def test_training_that_does_harm_is_thrown_away(adapted):
    sample, (network, _) = adapted
    harmed = adapt(network, sample, steps=30, **{**SETTINGS, "learning_rate": 30.0})
    assert harmed.record["kept"] == "initial"
    for name, tensor in network.state_dict().items():
        assert torch.equal(harmed.network.state_dict()[name], tensor)


@pytest.mark.parametrize("shape", [(1, 40, 33), (2, 18, 90)])
def test_tiny_movies_and_bad_frames_are_survived(shape):
    counts = np.random.default_rng(0).poisson(1.0, shape).astype(np.float32)
    counts[-1, :3] = np.nan
    links = FrameLinks(np.zeros((len(counts), 2), dtype=int), np.arange(len(counts)) == 0, np.zeros(len(counts), int))
    sample = Sample(torch.from_numpy(counts), links, Level(1.0, 1.0))
    network, record = adapt(untrained("blindspot", CONFIG, seed=0), sample, steps=5, **SETTINGS)
    assert np.isfinite(record["final_risk"])
    assert np.isfinite(denoise(network, counts, [0], links=links, level=sample.level, tile=None, dtype="float32")).all()


def test_no_good_frame_leaves_the_network_as_it_was():
    counts = np.zeros((3, 32, 32), dtype=np.float32)
    links = FrameLinks(np.zeros((3, 2), dtype=int), np.zeros(3, dtype=bool), np.zeros(3, dtype=int))
    result = adapt(
        untrained("blindspot", CONFIG, seed=0),
        Sample(torch.from_numpy(counts), links, Level(1, 1)),
        steps=5,
        **SETTINGS,
    )
    assert result.record["kept"] == "initial"


def plan(shape, **changes):
    n = shape[0]
    arguments = {"good": np.ones(n, bool), "run": np.zeros(n, int), "max_frames": 48, "max_side": 64, **changes}
    return plan_sample(shape, **arguments)


def test_a_movie_that_fits_is_taken_whole():
    result = plan((20, 60, 50))
    assert result.frames.tolist() == list(range(20))
    assert (result.height, result.width, result.top.max(), result.left.max()) == (60, 50, 0, 0)


@pytest.mark.parametrize("shape", [(49, 40, 40), (8000, 40, 40), (30, 500, 70), (5000, 4096, 4096), (1, 300, 300)])
def test_samples_are_bounded_spread_and_inside(shape):
    result = plan(shape)
    assert 0 < len(result.frames) <= 48
    assert (result.height, result.width) == (min(shape[1], 64), min(shape[2], 64))
    assert (result.top >= 0).all()
    assert (result.top + result.height <= shape[1]).all()
    assert (result.left + result.width <= shape[2]).all()
    for number in np.unique(result.run):
        part = result.run == number
        assert (np.diff(result.frames[part]) == 1).all()
        assert len(np.unique(result.top[part])) == 1
    if shape[0] > 100:
        assert result.frames[0] == 0
        assert result.frames[-1] == shape[0] - 1


def test_a_gap_in_the_movie_is_a_gap_in_the_sample():
    run = (np.arange(100) > 90).astype(int)
    result = plan((100, 40, 40), run=run)
    joined = {int(r): set(run[result.frames[result.run == r]]) for r in np.unique(result.run)}
    assert all(len(parts) == 1 for parts in joined.values())
    assert result.frames.max() == 99


def test_a_sample_takes_drift_and_good_of_its_frames():
    result = plan((100, 40, 40))
    drift = np.arange(200).reshape(100, 2)
    good = np.arange(100) % 2 == 0
    frames = np.zeros((len(result.frames), 40, 40), dtype=np.float32)
    sample = training_sample(frames, plan=result, whole_px_drift=drift, good=good, level=Level(1, 1))
    assert np.array_equal(sample.links.drift, drift[result.frames])
    assert np.array_equal(sample.links.good, good[result.frames])
