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


@pytest.mark.parametrize(("device", "side"), [("cpu", 60), pytest.param("cuda", 1024, marks=[pytest.mark.gpu, no_gpu])])
def test_frames_travel_unchanged_and_no_later_than_they_are_read(device, side):
    frames = np.random.default_rng(1).random((24, side, side), dtype=np.float32)
    for _ in range(3):
        results = Results(len(frames), device)
        with uploaded(frames, device) as (images, arrive):
            for index in range(len(frames)):
                arrive(index + 3)
                results.add(images[index : index + 4].sum(0, keepdim=True))
        expected = np.stack([frames[i : i + 4].sum(0) for i in range(len(frames))])
        np.testing.assert_allclose(results.all()[:, 0], expected, rtol=1e-5)


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
    assert not [one for one in recwarn.list if "CUDA graph" in str(one.message)]
    assert graphs._known


@pytest.mark.gpu
@no_gpu
def test_a_network_that_cannot_be_captured_runs_as_ever_and_says_so(monkeypatch):
    def run(image):
        return image * 2 if bool((image > 0).all()) else image

    monkeypatch.setattr(Graphs, "refused", False)
    graphs = Graphs(run)
    image, before = torch.ones(4, 4, device="cuda"), torch.cuda.current_stream()
    for _ in range(PASSES):
        graphs(image)
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        assert torch.equal(graphs(image), 2 * image)
    assert torch.equal(graphs(3 * image), 6 * image) and Graphs.refused
    assert torch.cuda.current_stream() == before and torch.rand(1, device="cuda") < 1


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("tier", ["denoise-small", "denoise"])
@pytest.mark.gpu
@no_gpu
def test_a_gpu_denoises_as_a_cpu_does(tier, graphs):
    """Ever again, since torch hands out the same few streams; convolutions are in TF32 there."""
    network = load_weights(tier).module.eval()
    here = denoise(network, FRAMES, range(2, 10), **HOW)
    errors = denoise_with_errors(network, FRAMES, range(2, 10), **HOW)[1]
    network, how = network.cuda(), {**HOW, "device": "cuda"}
    for _ in range(40):
        there = denoise(Graphs(network) if graphs else network, FRAMES, range(2, 10), **how)
        np.testing.assert_allclose(there, here, atol=1e-2)
    again = denoise_with_errors(network, FRAMES, range(2, 10), **how)[1]
    np.testing.assert_allclose(again, errors, atol=1e-2, rtol=2e-2)
