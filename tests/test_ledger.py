"""The ledger keeps what it was told, in files that never change; and one driver at a time may write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import ledger as module
from pipeline.ledger import Lease, Ledger, is_alive, read_records
from schemas.errors import ResourceError, SchemaError

HOLD = """
import sys, time
from pathlib import Path
from pipeline.ledger import Lease
with Lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

RACE = """
import sys, time
from pathlib import Path
from pipeline.ledger import Lease
from schemas.errors import ResourceError
print("ready", flush=True)
start = float(sys.stdin.readline())
while time.time() < start:
    pass
try:
    with Lease(Path(sys.argv[1])) as lease:
        print("won" if lease.is_ours() else "lost it", flush=True)
        sys.stdin.read()
except ResourceError:
    print("refused", flush=True)
"""


def block(ledger: Ledger, start: int, fingerprint: str = "f", status: str = "done", **more: Any) -> None:
    ledger.add("block", step="process", start=start, stop=start + 4, fingerprint=fingerprint, status=status, **more)


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A driver in another process that holds the lease; it is killed in the end."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


# ----------------------------------------------------------------------------------------------------------- records


def test_records_survive_in_order(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for start in range(0, 400, 4):
        block(ledger, start, rows=start)
    ledger.flush()
    again = Ledger(tmp_path)
    assert [r["start"] for r in read_records(tmp_path)] == list(range(0, 400, 4))
    assert all(again.is_done("process", start, start + 4, "f") for start in range(0, 400, 4))
    assert again.rows("process", 396, 400) == 396
    assert again.state("process", 400, 404) is None


def test_batches_are_never_changed(tmp_path: Path) -> None:
    first = Ledger(tmp_path)
    block(first, 0)
    first.flush()
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.glob("*.jsonl")}
    second = Ledger(tmp_path)
    block(second, 4)
    second.flush()
    block(second, 0, "g")
    second.flush()
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in before} == before
    assert len(list(tmp_path.glob("*.jsonl"))) == 3
    assert Ledger(tmp_path).state("process", 0, 4) == ("g", "done", "")


def test_records_are_batched(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for start in range(module.FLUSH_RECORDS * 3):
        block(ledger, start)
    assert len(list(tmp_path.glob("*.jsonl"))) == 3


def test_done_means_done_with_this_fingerprint(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    block(ledger, 0, "old")
    assert not ledger.is_done("process", 0, 4, "new")
    block(ledger, 0, "old", status="running")
    assert not ledger.is_done("process", 0, 4, "old")


@pytest.mark.parametrize("reloaded", [False, True])
def test_redo_forgets_the_named_steps_only(tmp_path: Path, reloaded: bool) -> None:
    ledger = Ledger(tmp_path)
    block(ledger, 0)
    ledger.add("block", step="drift", start=0, stop=9, fingerprint="f", status="done")
    ledger.add("redo", steps=["process", "collect"])
    ledger.flush()
    seen = Ledger(tmp_path) if reloaded else ledger
    assert not seen.is_done("process", 0, 4, "f")
    assert seen.is_done("drift", 0, 9, "f")


def test_dependencies_are_the_newest(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.last_deps("drift") is None
    for key in "ab":
        ledger.add("deps", step="drift", fingerprint=key, deps={"drift.lags": key})
    ledger.flush()
    assert Ledger(tmp_path).last_deps("drift") == ("b", {"drift.lags": "b"})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    block(ledger, 0)
    ledger.flush()
    file = next(tmp_path.glob("*.jsonl"))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(SchemaError, match=r"line 1 is damaged; remove the file"):
        Ledger(tmp_path)


# ------------------------------------------------------------------------------------------------------------- lease


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as process, pytest.raises(ResourceError) as refused, Lease(tmp_path):
        pass
    assert f"in use by process {process.pid} on " in str(refused.value)


def test_also_within_one_process(tmp_path: Path) -> None:
    with Lease(tmp_path), pytest.raises(ResourceError, match=f"process {os.getpid()}"), Lease(tmp_path):
        pass


def test_a_lease_that_was_given_back_is_free(tmp_path: Path) -> None:
    for _ in range(3):
        with Lease(tmp_path) as lease:
            assert lease.is_ours()
        assert not lease.is_ours()
    assert not (tmp_path / "lease.json").exists()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_driver_is_taken_over_at_once(tmp_path: Path, reaped: bool) -> None:
    with held_elsewhere(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        if reaped:
            process.wait()
        else:  # a zombie: killed, and its parent has not asked yet
            deadline = time.time() + 10
            while "Z" not in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2][:3]:
                assert time.time() < deadline
                time.sleep(0.01)
        with Lease(tmp_path) as lease:
            assert lease.is_ours()


def test_a_driver_killed_before_its_first_heartbeat_is_taken_over(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path):
        pass
    (tmp_path / "lease.json").unlink()
    with Lease(tmp_path) as lease:
        assert lease.is_ours()


def test_a_driver_that_was_replaced_writes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(tmp_path) as old:
        ledger = Ledger(tmp_path / "movie", old)
        block(ledger, 0)
        ledger.flush()
        with monkeypatch.context() as patch:
            patch.setattr(module, "is_alive", lambda holder: False)  # it seemed dead: suspended, say
            with Lease(tmp_path) as new:
                block(ledger, 4)
                with pytest.raises(ResourceError, match="another driver took over"):
                    ledger.flush()
                old._beat_once()
                assert new.is_ours()
                assert new.holder()["token"] == new.token
    assert len(list((tmp_path / "movie").glob("*.jsonl"))) == 1


def test_of_drivers_that_start_at_one_instant_exactly_one_wins(tmp_path: Path) -> None:
    for attempt in ("fresh", "after a killed holder"):
        command = [sys.executable, "-c", RACE, str(tmp_path)]
        with ExitStack() as stack:
            drivers = [
                stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
                for _ in range(4)
            ]
            assert [driver.stdout.readline() for driver in drivers] == ["ready\n"] * 4
            start = time.time() + 0.2
            for driver in drivers:
                driver.stdin.write(f"{start}\n")
                driver.stdin.flush()
            assert sorted(driver.stdout.readline().strip() for driver in drivers) == ["refused"] * 3 + ["won"], attempt
        with held_elsewhere(tmp_path):
            pass


def test_a_claim_that_comes_late_is_withdrawn(tmp_path: Path) -> None:
    """A driver may see the dead holder 1, sleep, and wake after others came, went, and cleaned up."""
    sleeper = Lease(tmp_path)
    with Lease(tmp_path), pytest.raises(ResourceError), Lease(tmp_path):
        pass
    with Lease(tmp_path) as newest:
        assert not sleeper._claim(1)
        assert newest.is_ours()
        assert not sleeper.is_ours()


def test_a_holder_on_another_host_is_judged_by_its_heartbeat() -> None:
    far = {"host": "elsewhere", "pid": os.getpid(), "started": 0.0, "token": "t"}
    assert is_alive({**far, "heartbeat": time.time() - module.SILENCE / 2})
    assert not is_alive({**far, "heartbeat": time.time() - module.SILENCE * 1.1})


def test_a_host_of_the_same_name_is_not_this_one() -> None:
    mine = module._driver("t")
    assert is_alive(mine)
    assert not is_alive({**mine, "place": "another boot", "heartbeat": time.time() - 2 * module.SILENCE})
    assert is_alive({**mine, "place": "another boot", "pid": 2**22 + 1})


def test_a_reused_process_number_is_not_the_driver() -> None:
    assert not is_alive({**module._driver("t"), "started": time.time() - 10**6})


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    with Lease(tmp_path) as lease:
        first = json.loads(lease.path.read_text())["heartbeat"]
        deadline = time.time() + 10
        while lease.holder()["heartbeat"] == first:
            assert time.time() < deadline
            time.sleep(0.02)
