"""The scripts that measure cameras and interpretability, at toy size: they run, and their tables hold what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def output(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_cameras_are_measured() -> None:
    text = output("scripts/accuracy_mtf", "--frames", "2", "--side", "128", "--seeds", "1")
    assert "2 frames of 128²" in text
    for words in ("strong blur", "plateau", "weak blur", "dark frames", "counts per electron", "readout"):
        assert words in text


def test_interpretability_is_measured(tmp_path: Path) -> None:
    picture = tmp_path / "figure.png"
    text = output("scripts/study_interpretability", "--items", "2", "--doses", "200", "--figure", str(picture))
    assert "threshold from seed 7000" in text
    assert "±" in text
    assert picture.stat().st_size > 5000
