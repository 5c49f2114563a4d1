from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.networks.msdnet import MSDNet
from pipeline.networks.unet import UNet
from pipeline.steps import windows
from schemas.errors import SettingsError


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = MSDNet(inputs=1, outputs=2, width=3, dilations=(1, 2, 4, 2))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.3)
    return network.eval()


def run(network, image, window, *, halo=None, trim=None, batch=1):
    radius = network.receptive_radius
    with torch.no_grad():
        return windows.blend(
            network,
            image,
            window=window,
            halo=radius if halo is None else halo,
            receptive_radius=radius if trim is None else trim,
            batch=batch,
        )


def image_of(height, width, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(1, height, width)).astype(np.float32))


@pytest.mark.parametrize("window", [24, 40, 64, 200])
@pytest.mark.parametrize("halo", [9, 11])
@pytest.mark.parametrize("shape", [(100, 83), (37, 130), (12, 60)])
def test_any_window_gives_what_the_whole_image_gives(network, window, halo, shape):
    image = image_of(*shape)
    whole = run(network, image, None)
    assert torch.allclose(run(network, image, window, halo=halo), whole, atol=2e-5 * float(whole.abs().max()))


def test_without_the_trim_seams_appear(network):
    """The check above can fail: weights alone do not hide the borders that the windows' cuts contaminate."""
    image = image_of(100, 83)
    whole = run(network, image, None)
    seams = (run(network, image, 40, halo=9, trim=0) - whole).abs().max()
    assert seams > 1e-2 * whole.abs().max()


def test_overlapping_windows_are_mixed_and_not_cut():
    """Each call returns its own constant; with blending the result passes smoothly from one window to the next."""

    def steps(halo, trim):
        calls = iter(range(100))

        def constant(stack):
            return torch.full((len(stack), 1, *stack.shape[-2:]), float(next(calls)))

        made = windows.blend(constant, image_of(10, 120), window=40, halo=halo, receptive_radius=trim, batch=1)
        return made[0, 5].diff().abs().max()

    assert steps(12, 2) < 0.2
    assert steps(12, 12) >= 1.0


def test_a_constant_stays_a_constant_up_to_the_border():
    out = windows.blend(lambda s: s * 2, torch.full((1, 50, 61), 3.0), window=20, halo=4, receptive_radius=4, batch=3)
    assert torch.allclose(out, torch.full((1, 50, 61), 6.0))


def test_batches_have_one_shape_and_change_nothing(network):
    shapes = set()

    def watched(stack):
        shapes.add(tuple(stack.shape))
        return network(stack)

    image = image_of(90, 70)
    watched.receptive_radius = network.receptive_radius
    together = run(watched, image, 32, batch=4)
    # 7 cores of at most 14 px cover 90 px, each 13 px; 5 of 14 px cover 70 px.
    assert shapes == {(4, 1, 31, 32)}
    assert torch.allclose(together, run(network, image, 32), atol=1e-5)


def test_frame_borders_are_continued_by_reflection(network):
    image = image_of(40, 44)
    radius = network.receptive_radius
    padded = torch.nn.functional.pad(image[None], (radius,) * 4, mode="reflect")
    with torch.no_grad():
        expected = network(padded)[0, :, radius:-radius, radius:-radius]
    assert torch.allclose(run(network, image, 30), expected, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 30), before=st.integers(0, 40), after=st.integers(0, 40))
def test_reflected_equals_numpy(size, before, after):
    expected = np.pad(np.arange(size), (before, after), mode="reflect" if size > 1 else "edge")
    assert np.array_equal(windows.reflected(-before, size + after, size).numpy(), expected)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 400), core=st.integers(1, 80), halo=st.integers(0, 30))
def test_cores_cover_an_axis_and_windows_start_once(size, core, halo):
    starts = list(windows._starts(size, core, halo))
    assert len(starts) == len(set(starts))
    covered = np.zeros(size, int)
    for start in starts:
        covered[max(start + halo, 0) : start + halo + core] += 1
    assert covered.min() >= 1


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 400), most=st.integers(1, 80), halo=st.integers(0, 30))
def test_windows_are_as_few_as_can_be_and_overlap_by_less_than_a_pixel_each(size, most, halo):
    core = windows._core(size, most + 2 * halo, halo)
    count = len(list(windows._starts(size, core, halo)))
    assert core <= most and count == -(-size // most) and core * count < size + count


@pytest.mark.parametrize("window", [92, 100, 121, 150])
def test_windows_begin_where_blocks_of_a_unet_begin(window):
    torch.manual_seed(0)
    unet = UNet(inputs=1, outputs=1, features=(4, 8, 8)).eval()
    radius, alignment = unet.receptive_radius, unet.alignment
    with torch.no_grad():
        whole, cut = (
            windows.blend(
                unet, image_of(137, 210), window=edge, halo=radius + -radius % alignment, receptive_radius=radius,
                batch=1, alignment=alignment,
            )
            for edge in (None, window)
        )  # fmt: skip
    assert torch.allclose(cut, whole, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused(network):
    with pytest.raises(SettingsError, match=r"halo is 3 px; expected at least .* 9 px"):
        run(network, image_of(40, 40), 30, halo=3)
    with pytest.raises(SettingsError, match=r"window is 18 px; expected more than two halos of 9 px"):
        run(network, image_of(40, 40), 18)


def test_memory_is_bounded_by_the_window_and_as_predicted():
    """A network that allocates with NumPy, so that its memory can be traced; the images are 4 and 81 windows large."""

    def function(stack):
        maps = np.ones((len(stack), 30, *stack.shape[-2:]), np.float32)
        return torch.from_numpy(maps[:, :2].copy())

    peaks = {}
    for edge in (224, 1008):  # cores of 112 px
        image = torch.zeros(1, edge, edge)
        tracemalloc.start()
        windows.blend(function, image, window=128, halo=8, receptive_radius=8, batch=1)
        peaks[edge] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[1008] < 1.2 * peaks[224]
