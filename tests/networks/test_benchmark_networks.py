from __future__ import annotations

import math

from pipeline import benchmark_networks as benchmark


def test_every_network_is_timed_and_ours_agree_with_concatenation():
    found = {speed.name: speed for speed in benchmark.measure(24, threads=1, device="cpu", repeats=1)}
    assert {"MS-D published, 1 × 100", benchmark.UNET, "encoder-decoder"} < set(found)
    assert any(name.startswith("MS-D shipped columns") for name in found)
    for name, speed in found.items():
        assert speed.seconds > 0
        if name.startswith("MS-D"):
            assert speed.concatenating > 0 and 0 <= speed.difference < 1e-4
        else:
            assert math.isnan(speed.concatenating)
    published = found["MS-D published, 1 × 100"]
    # Pelt & Sethian: 45 652 parameters with one input and one output.
    assert published.parameters == 45_652


def test_denoisers_are_timed_alone_in_a_batch_and_from_host_memory():
    alone = {(s.name, s.dtype): s for s in benchmark.measure_denoisers(64, device="cpu", repeats=1)}
    assert {"small", "medium", "large", "large, parts followed", "WCVD"} == {name for name, _ in alone}
    assert all(speed.seconds > 0 for speed in alone.values())
    many = list(benchmark.measure_throughput(64, device="cpu", frames=4, repeats=1))
    words = {speed.name for speed in many}
    assert {"large, in a batch of 4", "large, from and to host memory"} < words and len(words) == 6
