"""Status from files alone: half-finished, stopped, failed, damaged."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ledger import Lease, Ledger
from pipeline.pulse import Pulse, read_pulse
from pipeline.results.history import History, frames_text, read_history, runs_of
from pipeline.results.status import as_text, duration, status
from schemas.errors import SettingsError

START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
WriteLedger = Callable[[Path, str, list[dict[str, Any]]], Path]


def block(step: str, start: int, stop: int, at: float, status: str = "done", **more: Any) -> dict[str, Any]:
    when = (START + timedelta(seconds=at)).isoformat(timespec="milliseconds")
    common = {"kind": "block", "step": step, "start": start, "stop": stop, "fingerprint": "f", "status": status}
    return {**common, "seconds": {"read": 0.5, "denoise": 1.5}, "time": when, **more}


def half_finished() -> list[dict[str, Any]]:
    """Survey done; 3 of 8 blocks of process done, one failed."""
    records: list[dict[str, Any]] = [{"kind": "plan", "blocks": {"survey": 2, "drift": 1, "process": 8}}]
    records += [block("survey", 0, 16, 1), block("survey", 16, 32, 2), block("drift", 0, 32, 3)]
    records += [block("process", 4 * i, 4 * i + 4, 10 + 2 * i) for i in range(3)]
    return [*records, block("process", 12, 16, 16, "failed", reason="RuntimeError: no luck", worker="w1")]


def lease(folder: Path, **changes: Any) -> None:
    own = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    (folder / "ledger").mkdir(parents=True, exist_ok=True)
    given = {**own, "token": "t", "heartbeat": time.time() - 4, **changes}
    (folder / "ledger" / "lease.json").write_text(json.dumps(given))


def pulse(folder: Path, workers: int, sent: list[list[Any]]) -> None:
    (folder / "ledger" / "pulse.json").write_text(json.dumps({"time": 0.0, "workers": workers, "sent": sent}))


def test_a_half_finished_run(tmp_path: Path, write_ledger: WriteLedger) -> None:
    write_ledger(tmp_path, "gold", half_finished())
    (movie,) = status(tmp_path).movies
    steps = {step.step: step for step in movie.steps}
    assert movie.state == "stopped"
    assert [step.step for step in movie.steps] == ["survey", "drift", "process"]
    assert (steps["survey"].done, steps["survey"].total) == (2, 2)
    assert steps["survey"].finished
    assert (steps["process"].done, steps["process"].failed, steps["process"].total) == (3, 1, 8)
    assert steps["process"].frames == 12
    assert steps["process"].rate == pytest.approx(2.0)  # 4 frames in 2 s
    assert movie.remaining is None
    assert [record.reason for record in movie.problems] == ["RuntimeError: no luck"]


def test_a_movie_that_is_read_in_does_not_wait_any_more(tmp_path: Path) -> None:
    (tmp_path / "ledger" / "gold").mkdir(parents=True)
    (tmp_path / "ledger" / "silver").mkdir()
    (tmp_path / "stacks" / "gold.zarr").mkdir(parents=True)
    lease(tmp_path)
    assert [(movie.name, movie.state) for movie in status(tmp_path).movies] == [
        ("gold", "running"),
        ("silver", "waiting"),
    ]


def test_a_living_driver_gives_an_end(tmp_path: Path, write_ledger: WriteLedger) -> None:
    write_ledger(tmp_path, "gold", half_finished())
    lease(tmp_path, started=START.timestamp())
    (movie,) = status(tmp_path).movies
    assert movie.driver is not None
    assert movie.driver.pid == os.getpid()
    # The process in the lease began at another time than this one: a reused process id is not the driver.
    assert not movie.driver.alive
    lease(tmp_path, host="another", started=START.timestamp())
    (movie,) = status(tmp_path).movies
    assert movie.state == "running"
    assert movie.remaining == pytest.approx(5 * 4 / 2.0)
    text = as_text(status(tmp_path))
    assert "driver alive" in text
    assert "on another" in text
    assert "about 10 s left" in text


def test_what_the_workers_have_is_said_while_the_driver_lives(tmp_path: Path, write_ledger: WriteLedger) -> None:
    write_ledger(tmp_path, "gold", half_finished())
    pulse(tmp_path, 2, [["gold", "process", 4], ["iron", "survey", 4]])
    assert status(tmp_path).workers is None
    assert status(tmp_path).movies[0].steps[-1].running == 0
    lease(tmp_path)
    found = status(tmp_path)
    # Eight blocks were sent to two workers: two are computed, the others wait.
    assert (found.workers, found.movies[0].steps[-1].running) == (2, 1)
    assert "ago, 2 workers" in as_text(found)
    assert "process   3/8 blocks, 1 running, 1 failed" in as_text(found)
    (tmp_path / "ledger" / "pulse.json").write_text('{"workers": 2, "se')
    assert status(tmp_path).workers is None


def test_histories_are_brought_up_to_date(tmp_path: Path, write_ledger: WriteLedger) -> None:
    file = write_ledger(tmp_path, "gold", half_finished())
    histories: dict[str, History] = {}
    assert status(tmp_path, histories).movies[0].steps[-1].done == 3
    write_ledger(tmp_path, "gold", [block("process", 12, 16, 30)])
    file.write_text("no longer read")
    (movie,) = status(tmp_path, histories).movies
    assert (movie.steps[-1].done, movie.unreadable) == (4, 0)


def test_a_run_tells_what_it_is_at(tmp_path: Path) -> None:
    """What ``pipeline.pulse`` writes is what is read here; it leaves nothing behind."""
    found = Pulse()
    for _ in range(3):
        found.sent("gold", "process")
    found.finished("gold", "process")
    found.sent("gold", "survey")
    found.dropped("gold", "survey")
    with found.beating(tmp_path, None):
        deadline = time.monotonic() + 30
        while (seen := read_pulse(tmp_path)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert seen == (1, {("gold", "process"): 1})
    assert read_pulse(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_this_process_as_the_driver(tmp_path: Path, write_ledger: WriteLedger) -> None:
    write_ledger(tmp_path, "gold", half_finished())
    lease(tmp_path)
    (movie,) = status(tmp_path).movies
    assert movie.state == "running"
    assert movie.remaining is None  # nothing was done since it began, so no rate is known


def test_a_silent_driver_is_gone(tmp_path: Path, write_ledger: WriteLedger) -> None:
    write_ledger(tmp_path, "gold", half_finished())
    lease(tmp_path, host="another", heartbeat=time.time() - 3600)
    (movie,) = status(tmp_path).movies
    assert movie.state == "stopped"
    assert "driver gone" in as_text(status(tmp_path))
    assert "1 h 00 min ago" in as_text(status(tmp_path))


def test_the_newest_word_on_a_block_counts(tmp_path: Path, write_ledger: WriteLedger) -> None:
    write_ledger(tmp_path, "gold", half_finished())
    write_ledger(tmp_path, "gold", [block("process", 12, 16, 30)])
    (movie,) = status(tmp_path).movies
    assert movie.problems == ()
    assert movie.steps[-1].done == 4


def test_blocks_of_other_settings_do_not_count(tmp_path: Path, write_ledger: WriteLedger) -> None:
    new = {"kind": "plan", "blocks": {"survey": 2, "drift": 1, "process": 8}, "fingerprints": {"process": "g"}}
    write_ledger(tmp_path, "gold", [*half_finished(), new, block("process", 0, 4, 50, fingerprint="g")])
    (movie,) = status(tmp_path).movies
    steps = {step.step: step for step in movie.steps}
    assert (steps["survey"].done, steps["process"].done, steps["process"].failed) == (2, 1, 0)


def test_redone_steps_begin_anew(tmp_path: Path, write_ledger: WriteLedger) -> None:
    write_ledger(tmp_path, "gold", [*half_finished(), {"kind": "redo", "steps": ["process", "collect"]}])
    (movie,) = status(tmp_path).movies
    assert (movie.steps[-1].done, movie.steps[-1].total) == (0, 8)


def test_quarantine_and_completion(tmp_path: Path, write_ledger: WriteLedger) -> None:
    write_ledger(tmp_path, "bad", [{"kind": "movie", "status": "quarantined", "reason": "bad.dm4 is truncated"}])
    write_ledger(tmp_path, "good", [*half_finished()[:-1], {"kind": "movie", "status": "complete", "reason": ""}])
    found = {movie.name: movie for movie in status(tmp_path).movies}
    assert (found["bad"].state, found["bad"].reason) == ("quarantined", "bad.dm4 is truncated")
    assert found["good"].state == "complete"
    assert "2 movies, 1 complete, 1 quarantined" in as_text(status(tmp_path))


def test_a_new_attempt_is_not_complete(tmp_path: Path, write_ledger: WriteLedger) -> None:
    done = {"kind": "movie", "status": "complete", "reason": ""}
    write_ledger(tmp_path, "gold", [*half_finished()[:-1], done, {"kind": "plan", "blocks": {"process": 9}}])
    assert status(tmp_path).movies[0].state == "stopped"


def test_what_stopped_the_last_attempt_is_said(tmp_path: Path, write_ledger: WriteLedger) -> None:
    failure = {"kind": "failure", "step": "adapt", "fingerprint": "f", "reason": "ValueError: oops"}
    write_ledger(tmp_path, "gold", [*half_finished(), failure])
    assert "stopped in adapt: ValueError: oops" in as_text(status(tmp_path))
    write_ledger(tmp_path, "gold", [{"kind": "plan", "blocks": {"process": 8}}])
    assert status(tmp_path).movies[0].stops == ()


def test_damaged_lines_are_counted_and_harmless(tmp_path: Path, write_ledger: WriteLedger) -> None:
    file = write_ledger(tmp_path, "gold", half_finished())
    with file.open("ab") as stream:
        stream.write(b'{"kind": "block", "step": "pro\n\xff\xfe\n[1]\n{"kind": "block"}\nnull\n')
    (movie,) = status(tmp_path).movies
    assert movie.unreadable == 5
    assert movie.steps[-1].done == 3
    assert "5 lines of the ledger could not be read" in as_text(status(tmp_path))


def test_a_run_without_a_ledger(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = make_run("copied")
    assert status(path).movies[0].state == "complete"
    make_run("begun", state="running")
    assert [movie.state for movie in status(tmp_path).movies] == ["stopped", "complete"]


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.zarr"):
        with pytest.raises(SettingsError, match="holds no run and no ledger"):
            status(path)


def test_records_of_the_real_ledger_are_understood(tmp_path: Path) -> None:
    """What ``pipeline.ledger`` writes is what is read here."""
    with Lease(tmp_path / "ledger") as held:
        ledger = Ledger(tmp_path / "ledger" / "gold", held)
        ledger.add("plan", blocks={"process": 2}, fingerprints={"process": "f"})
        ledger.add(
            "block", step="process", start=0, stop=4, fingerprint="f", status="done", seconds={"denoise": 2.0}, rows=7
        )
        ledger.flush()
        (movie,) = status(tmp_path).movies
        assert movie.state == "running"
        assert (movie.steps[0].done, movie.steps[0].total) == (1, 2)
        assert movie.unreadable == 0
    assert status(tmp_path).movies[0].state == "stopped"


def test_time_is_summed_by_step_and_part(tmp_path: Path, write_ledger: WriteLedger) -> None:
    write_ledger(tmp_path, "gold", half_finished())
    history = read_history(tmp_path, "gold")
    assert history.seconds()["process", "denoise"] == pytest.approx(4.5)
    assert history.seconds()["survey", "read"] == pytest.approx(1.0)
    assert history.span() == pytest.approx(15.0)  # from 12:00:01 less 2 s of work to 12:00:14


@given(st.sets(st.integers(0, 40)))
def test_runs_of_indices_tile_them(indices: set[int]) -> None:
    runs = list(runs_of(sorted(indices)))
    assert [i for start, stop in runs for i in range(start, stop)] == sorted(indices)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs))


def test_words() -> None:
    assert (frames_text(3, 4), frames_text(3, 8)) == ("frame 3", "frames 3–7")
    spans = {0.0: "0.0 s", 4.24: "4.2 s", 42.4: "42 s", 200: "3 min 20 s", 59.9: "60 s", 18_420: "5 h 07 min"}
    assert {seconds: duration(seconds) for seconds in spans} == spans
