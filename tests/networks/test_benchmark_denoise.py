from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.networks.adapt import untrained
from pipeline.networks.weights import save_weights

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_denoise"


@pytest.mark.slow
def test_the_benchmark_runs_and_lists_every_rival(tmp_path):
    network = untrained("blindspot", {"frames": 3, "channels": 16, "dilations": [2]}, seed=0)
    save_weights(network, tmp_path / "w.safetensors", {})
    command = [
        sys.executable,
        str(SCRIPT),
        "--quick",
        "--scenes",
        "Pt",
        "WSe2",
        "--size",
        "12",
        "100",
        "--doses",
        "1",
        "--steps",
        "3",
        "--seeds",
        "0",
        "1",
    ]
    command += ["--weights", str(tmp_path / "w.safetensors"), "--json", str(tmp_path / "figures.json")]
    command += ["--figure", str(tmp_path / "pareto.png")]
    done = subprocess.run([*command, "--tiers"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rivals = json.loads((tmp_path / "figures.json").read_text())
    assert not any(name.startswith("ours") for table in rivals.values() for name in table)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    assert set(figures) == {"Pt 1", "WSe2 1"}
    expected = {"noisy", "Gaussian", "low-pass", "3-frame mean", "5-frame mean", "9-frame mean", "Wiener", "WCVD"}
    expected |= {"9-frame mean + Wiener", "total variation", "non-local means", "ours, large, pretrained"}
    expected |= {
        "N2V, 1 frame",
        "N2V, 5 frames",
        "Wiener, 3-D",
        "ours, large, adapted, seed 0",
        "ours, large, adapted, seed 1",
    }
    assert all(figures[title].items() >= table.items() for title, table in rivals.items())
    for found in figures.values():
        assert expected <= set(found)
        assert all(entry["ssim"] <= 1 for entry in found.values())
        table = {method: entry["psnr"] for method, entry in found.items()}
        assert table["Gaussian"] > table["noisy"]
        assert table["9-frame mean + Wiener"] > table["9-frame mean"] > table["noisy"]
    assert "over WCVD at its best" in done.stdout
