"""The live view shows what the files say, goes on while somebody works, and ends by itself."""

from __future__ import annotations

import io
import itertools
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.results import monitor
from pipeline.results.monitor import is_over, view, watch
from pipeline.results.status import as_text, status
from schemas.errors import SettingsError
from tests import e2e_tools as tools
from tests.results.test_status import WriteLedger, half_finished, lease, pulse

COMPLETE = {"kind": "movie", "status": "complete", "reason": ""}


def nobody() -> tuple[list[str], bool]:
    return [], False


def shown(folder: Path, lines: tuple[str, ...] = (), rows: int = 10) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(view(status(folder), lines, rows=rows))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_row_says_where_a_movie_is(tmp_path: Path, write_ledger: WriteLedger) -> None:
    write_ledger(tmp_path, "gold", half_finished())
    lease(tmp_path, host="another", started=0.0)
    pulse(tmp_path, 2, [["gold", "process", 2]])
    text = shown(tmp_path, ("workers: 2 running of 4 wanted",))
    row = next(line for line in text.splitlines() if "process" in line and "3/8" in line)
    cells = [cell.strip() for cell in row.split("│")]
    assert cells[1:4] == ["gold", "running", "process"]
    assert cells[5:10] == ["3/8", "2", "1", "", "2"]  # done, running, failed, quarantined, frames/s
    assert cells[10] == "10 s"
    for words in ("driver alive", "2 workers", "2 running of 4 wanted", "gold: failed: process", "no luck"):
        assert words in text, words


def test_movies_that_run_come_first_and_the_rest_is_counted(tmp_path: Path, write_ledger: WriteLedger) -> None:
    for name in ("a", "b", "c"):
        write_ledger(tmp_path, name, [*half_finished()[:-1], COMPLETE])
    write_ledger(tmp_path, "z", half_finished())
    text = shown(tmp_path, rows=2)
    assert " z " in text and " a " in text and " b " not in text
    assert "and 2 more" in text


def test_a_view_is_over_when_nothing_will_change(tmp_path: Path, write_ledger: WriteLedger) -> None:
    write_ledger(tmp_path, "gold", half_finished())
    assert is_over(status(tmp_path), expected=False)  # stopped, and nobody works on it
    assert not is_over(status(tmp_path), expected=True)  # but the driver's job waits to come back
    assert not is_over(None, expected=True)
    lease(tmp_path)
    assert not is_over(status(tmp_path), expected=False)
    write_ledger(tmp_path, "gold", [COMPLETE])
    assert is_over(status(tmp_path), expected=True)


@pytest.mark.parametrize("terminal", [True, False])
def test_it_goes_on_until_the_driver_has_done_its_work(
    tmp_path: Path, write_ledger: WriteLedger, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    write_ledger(tmp_path, "gold", half_finished())
    lease(tmp_path)
    looks = itertools.count()

    def sleep(seconds: float) -> None:
        assert seconds == 7.0
        if next(looks) == 2:
            write_ledger(tmp_path, "gold", [COMPLETE])

    monkeypatch.setattr(monitor.time, "sleep", sleep)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160, height=40)
    watch(tmp_path, console, interval=7.0, ask=nobody)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert next(looks) == 3
    assert "complete" in text
    if not terminal:
        assert text.count("gold: running") == 3
        assert text.rstrip().endswith(as_text(status(tmp_path)).splitlines()[-1])


def test_a_driver_in_the_queue_is_waited_for(
    tmp_path: Path, write_ledger: WriteLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor.time, "sleep", lambda seconds: write_ledger(tmp_path, "gold", [COMPLETE]))
    console = Console(file=io.StringIO(), width=160)
    watch(tmp_path, console, interval=1.0, ask=lambda: (["driver job 7 of slurm: PENDING"], True))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.index("PENDING") < text.index("not begun") < text.index("gold: complete")
    with pytest.raises(SettingsError, match="holds no run"):
        watch(tmp_path / "else", console, interval=1.0, ask=nobody)


def test_the_batch_system_is_left_in_peace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], []
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    site = monitor.Site(lambda: (asked.append(now[0]) or [], False))  # type: ignore[func-returns-value]
    for now[0] in range(0, 61, 5):
        site.look()
    assert asked == [0, 30, 60]


def test_ctrl_c_ends_it_well(tmp_path: Path, write_ledger: Callable[..., Any]) -> None:
    write_ledger(tmp_path, "gold", half_finished())
    lease(tmp_path)
    words = tools.command("status", tmp_path, "--monitor", "--interval", 0.2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background is deaf to it
    with subprocess.Popen(words, env=tools.environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "gold: running" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(30) == 0


def test_ended_runs_are_shown_once(tmp_path: Path, write_ledger: WriteLedger) -> None:
    write_ledger(tmp_path, "gold", half_finished())
    done = tools.colonnade("status", tmp_path, "--monitor", "--interval", 300)
    assert (done.returncode, done.stdout.count("gold: stopped")) == (0, 1), done.stderr
