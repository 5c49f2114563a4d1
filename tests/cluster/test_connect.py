"""From a profile to a checked client: what the site cannot give is said before work starts."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from distributed import Client, Nanny

from cluster import checks, connect
from cluster.local import ATTEMPTS, size
from schemas.errors import ResourceError
from schemas.profiles import Profile
from tests.kill_tools import kill_all, workers_of


def test_serial_needs_no_scheduler() -> None:
    with connect(Profile(kind="serial")) as client:
        assert client is None


def test_local_gives_checked_single_threaded_workers() -> None:
    with connect(Profile(kind="local", workers=2, memory=1.25)) as client:
        assert client is not None
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        assert [worker["nthreads"] for worker in workers] == [1, 1]
        assert [worker["resources"] for worker in workers] == [{"CPU": 1}] * 2
        assert all(worker["memory_limit"] == pytest.approx(1.25e9, rel=0.01) for worker in workers)
        assert {facts["code"] for facts in client.run(checks.describe_process).values()} == {checks.code_digest()}
        with pytest.raises(ResourceError, match=r"of 3 worker\(s\) came within 0\.1 s"):
            checks.check_workers(client, Profile(kind="local", workers=3, start_timeout=0.1))


def answer_or_die(token: str) -> int:
    """Of all workers that are asked, one ends itself, and does not again."""
    try:
        os.close(os.open(token, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return os.getpid()
    os._exit(1)


def test_a_worker_that_is_lost_while_all_are_asked_ends_nothing(tmp_path: Path) -> None:
    with connect(Profile(kind="local", workers=2, memory=1.25)) as client:
        assert client is not None
        with pytest.raises(OSError, match="Scheduler Broadcast"):
            client.run(answer_or_die, str(tmp_path / "first"))
        client.wait_for_workers(2, timeout=60)
        found = checks.asked(client, lambda: client.run(answer_or_die, str(tmp_path / "second")))
        assert found and os.getpid() not in found.values()


def kill_the_first(number: int) -> threading.Thread:
    """Kill the first so many worker processes of this process, each as soon as it exists."""

    def kill() -> None:
        killed: set[int] = set()
        while len(killed) < number:
            for worker in workers_of(os.getpid()):
                if worker.pid not in killed and len(killed) < number:
                    kill_all([worker])
                    killed.add(worker.pid)
            time.sleep(0.005)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_a_worker_that_is_killed_as_it_starts_is_started_again() -> None:
    killer = kill_the_first(1)
    with connect(Profile(kind="local", workers=2, memory=1.25)) as client:
        assert client is not None
        assert len(client.nthreads()) == 2
    killer.join()


def test_workers_that_die_each_time_are_a_matter_of_the_site() -> None:
    killer = kill_the_first(ATTEMPTS)
    expected = f"{ATTEMPTS} times.*memory"
    with pytest.raises(ResourceError, match=expected), connect(Profile(kind="local", workers=1, memory=1.25)):
        pass
    killer.join()


def test_the_machine_decides_what_is_not_stated() -> None:
    workers, memory = size(Profile())
    assert workers >= 1
    assert memory > 0
    assert size(Profile(workers=1))[0] == 1


@pytest.mark.parametrize("profile", [Profile(memory=1e5), Profile(workers=4000, memory=1.0)])
def test_more_memory_than_the_machine_has_is_refused(profile: Profile) -> None:
    with pytest.raises(ResourceError, match=r"need .* GB; this machine has .* ask for fewer workers"), connect(profile):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said() -> None:
    with (
        pytest.raises(ResourceError, match=r"a GPU was asked for, but torch .* sees none"),
        connect(Profile(kind="cuda")),
    ):
        pass


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "tcp://no.such.host.invalid:8786", "nonsense://x", "tcp://"])
def test_an_address_where_nothing_answers_is_said(address: str) -> None:
    profile = Profile(kind="address", address=address, start_timeout=5.0)
    gc.collect()
    gc.disable()  # a client that is left behind would be collected at any moment, also while another one starts
    try:
        with pytest.raises(ResourceError, match=r"no scheduler answers at .*check the address"), connect(profile):
            pass
        assert not [left for left in gc.get_objects() if type(left) is Client and left.status != "closed"]
    finally:
        gc.enable()


def test_workers_that_run_another_copy_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = checks.describe_process()

    class Stub:
        """A cluster whose one worker has another torch, and another copy of this code."""

        def wait_for_workers(self, n: int, timeout: float) -> None:
            pass

        def run(self, function: object) -> dict[str, dict[str, object]]:
            return {"tcp://far:1": {**ours, "torch": "0.1", "code": "other", "root": "/elsewhere"}}

        def scheduler_info(self, n_workers: int) -> dict[str, object]:
            return {"workers": {"tcp://far:1": {"resources": {"CPU": 1}}}}

    with pytest.raises(ResourceError) as caught:
        checks.check_workers(Stub(), Profile(kind="address", address="tcp://far:0"))  # type: ignore[arg-type]
    told = str(caught.value)
    assert "tcp://far:1: torch is 0.1, here" in told
    assert "tcp://far:1: code is other" in told
    assert "imported from /elsewhere" in told


# ------------------------------------------------------------------------------------------- a scheduler of the user's


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text().strip():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """``dask scheduler`` as a user starts it: its address, and a folder for workers."""
    folder = tmp_path_factory.mktemp("scheduler")
    file = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    with subprocess.Popen([*dask, "--scheduler-file", str(file)], stderr=subprocess.DEVNULL) as process:
        wait_for(file, process)
        import json

        yield json.loads(file.read_text())["address"], folder
        process.terminate()


def test_an_existing_scheduler_is_used_by_its_address(scheduler: tuple[str, Path]) -> None:
    address, folder = scheduler
    worker = [sys.executable, "-m", "dask", "worker", address, "--nthreads", "1", "--local-directory", str(folder)]
    profile = Profile(kind="address", address=address, start_timeout=5.0)
    with pytest.raises(ResourceError, match=r"0 of 1 worker\(s\) came within 5 s"), connect(profile):
        pass
    profile = Profile(kind="address", address=address, start_timeout=60.0)
    with ExitStack() as stack:
        plain = stack.enter_context(subprocess.Popen([*worker, "--no-dashboard"], stderr=subprocess.DEVNULL))
        with pytest.raises(ResourceError, match=r'declare no resources.*--resources "CPU=1"'), connect(profile):
            pass
        plain.terminate()
        plain.wait()
    with Client(address, set_as_default=False) as client:  # a loaded scheduler notices later that a worker has gone
        deadline = time.monotonic() + 60
        while client.nthreads() and time.monotonic() < deadline:
            time.sleep(0.1)
    with ExitStack() as stack:
        command = [*worker, "--no-dashboard", "--resources", "CPU=1"]
        good = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        with connect(profile) as client:
            assert isinstance(client, Client)
            assert client.submit(sum, [1, 2], resources={"CPU": 1}).result() == 3
        good.terminate()


def test_a_worker_that_never_closes_does_not_hold_up_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(self: Nanny, *args: object, **kwargs: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(sys.modules[connect.__module__], "CLOSE_SECONDS", 0.5)
    with connect(Profile(workers=1)) as client:
        assert client is not None
        (pid,) = client.run(os.getpid).values()
        monkeypatch.setattr(Nanny, "close", never)
    assert not psutil.pid_exists(pid)
    left = [child for child in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]
    assert left == []
