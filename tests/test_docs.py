"""The documentation that is generated says what the schemas say."""

from __future__ import annotations

import subprocess
import sys

from tests.e2e_tools import ROOT, environment


def test_the_page_of_results_is_up_to_date() -> None:
    words = [sys.executable, ROOT / "scripts" / "docs", "--check"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
