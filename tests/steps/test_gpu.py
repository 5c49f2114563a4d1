from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.networks.weights import load_weights
from pipeline.steps.denoise import denoise, denoise_with_errors, reduced_precision
from pipeline.steps.gpu import PASSES, Graphs, Results, uploaded
from pipeline.steps.neighbours import FrameLinks, measure_level

FRAMES = np.random.default_rng(0).poisson(1.0, (12, 100, 120)).astype(np.float32)
HOW = {
    "links": FrameLinks(np.zeros((12, 2), int), np.ones(12, bool), np.zeros(12, int)),
    "level": measure_level(FRAMES, readout_variance=0),
    "tile": 48,
    "dtype": "float32",
}
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])])
def test_frames_travel_unchanged_and_no_later_than_they_are_read(device):
    results = Results(len(FRAMES), device)
    with uploaded(FRAMES, device) as (images, arrive):
        for index in range(len(FRAMES)):
            arrive(index + 3)
            results.add(images[index : index + 1] * 2)
    assert np.array_equal(results.all()[:, 0], 2 * FRAMES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.gpu
@no_gpu
def test_a_replayed_graph_gives_what_the_network_gives(dtype, recwarn):
    network = load_weights("denoise-small").module.cuda().eval()
    graphs = Graphs(network)
    level = torch.tensor(HOW["level"], device="cuda")
    with torch.inference_mode(), reduced_precision("cuda", dtype):
        for draw in range(PASSES + 4):
            frames = torch.poisson(torch.full((1, 5, 64, 64), 1.0 + draw, device="cuda"))
            valid = torch.rand_like(frames) < (1.0 if draw % 2 else 0.9)
            context = torch.randn(1, 1, 64, 64, device="cuda")
            made = graphs(frames, valid, level, context).clone()
            torch.testing.assert_close(made, network(frames, valid, level, context), rtol=1e-3, atol=1e-3)
    assert not recwarn.list


@pytest.mark.gpu
@no_gpu
def test_a_network_that_cannot_be_captured_runs_as_ever_and_says_so():
    def run(image):
        return image * 2 if bool((image > 0).all()) else image

    graphs = Graphs(run)
    image = torch.ones(4, 4, device="cuda")
    for _ in range(PASSES):
        graphs(image)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        assert torch.equal(graphs(image), 2 * image)
    assert torch.equal(graphs(3 * image), 6 * image)


@pytest.mark.parametrize("tier", ["denoise-small", "denoise"])
@pytest.mark.gpu
@no_gpu
def test_a_gpu_denoises_as_a_cpu_does(tier):
    network = load_weights(tier).module.eval()
    here = denoise(network, FRAMES, range(2, 10), **HOW)
    errors = denoise_with_errors(network, FRAMES, range(2, 10), **HOW)[1]
    network = network.cuda()
    there = denoise(network, FRAMES, range(2, 10), device="cuda", **HOW)
    np.testing.assert_allclose(there, here, atol=1e-2)
    np.testing.assert_allclose(
        denoise_with_errors(network, FRAMES, range(2, 10), device="cuda", **HOW)[1], errors, atol=1e-2
    )
