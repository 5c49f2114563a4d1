"""Tasks: the same answers with and without a cluster, few in flight, sent again when a worker dies, stopped at once."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import dask
import psutil
import pytest
from distributed import Client, Nanny, Scheduler, SpecCluster

from cluster import connect
from cluster.connect import CONFIG
from pipeline.graph import call, smallest_memory, stream
from pipeline.patience import Stopped
from schemas.errors import ResourceError, SourceError
from schemas.profiles import Profile


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Workers import the functions below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        yield


@pytest.fixture(scope="module")
def client(importable: None) -> Iterator[Client]:
    with connect(Profile(kind="local", workers=2, memory=1.5)) as client:
        assert client is not None
        yield client


def square(x: int) -> int:
    return x * x


def kill_once(marker: str) -> str:
    """Take the worker down the first time, as a node that fails does."""
    path = Path(marker)
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), 9)
    return "survived"


def slow(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def bad_file(name: str) -> None:
    with Path(name).open("a") as file:
        file.write("x")
    raise SourceError(f"{name}: line 3 is damaged")


def results(client: Client | None, items: range) -> dict[int, int]:
    return dict(stream(client, square, items, label="square", stop=threading.Event()))


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_a_cluster_answers_like_none(client: Client, count: int) -> None:
    expected = {x: x * x for x in range(count)}
    assert results(None, range(count)) == expected
    assert results(client, range(count)) == expected


def test_one_task(client: Client) -> None:
    for where in (None, client):
        assert call(where, square, 7, label="one", stop=threading.Event()) == 49


@pytest.mark.parametrize("in_flight", [1, 3])
def test_few_tasks_are_known_at_any_time(client: Client, in_flight: int) -> None:
    """The items are taken from the iterator only as fast as results are."""
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for x in range(40):
            taken += 1
            yield x

    done = 0
    for _ in stream(client, square, items(), label="w", stop=threading.Event(), in_flight=in_flight):
        done += 1
        assert taken - done <= in_flight
    assert done == 40
    deadline = time.monotonic() + 10
    while any(client.has_what().values()):  # nothing is kept on the workers
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_task_whose_worker_dies_is_done_by_another(client: Client, tmp_path: Path) -> None:
    markers = [str(tmp_path / name) for name in "abc"]
    found = dict(stream(client, kill_once, markers, label="kill", stop=threading.Event()))
    assert found == dict.fromkeys(markers, "survived")


@pytest.mark.parametrize("serial", [True, False])
def test_an_error_of_the_task_is_raised_once_and_never_retried(client: Client, tmp_path: Path, serial: bool) -> None:
    name = str(tmp_path / "tried")
    with pytest.raises(SourceError, match="line 3 is damaged"):
        list(stream(None if serial else client, bad_file, [name], label="bad", stop=threading.Event()))
    time.sleep(0.2)
    assert Path(name).read_text() == "x"


def bug_once(marker: str) -> int:
    """A bug on the first worker that comes along, and on no other: what a GPU that met an error does."""
    path = Path(marker)
    if not path.exists():
        path.write_text(str(os.getpid()))
    if int(path.read_text()) == os.getpid():
        raise ZeroDivisionError("this worker is ill")
    return os.getpid()


def bug_everywhere(name: str) -> None:
    with Path(name).open("a") as file:
        file.write(f"{os.getpid()}\n")
    raise ZeroDivisionError("one over nothing")


def test_a_bug_of_one_worker_is_disproved_by_another_and_the_worker_renewed(client: Client, tmp_path: Path) -> None:
    marker = tmp_path / "ill"
    ((_, found),) = stream(client, bug_once, [str(marker)], label="ill", stop=threading.Event())
    ill = int(marker.read_text())
    assert found != ill
    end = time.monotonic() + 60
    while psutil.pid_exists(ill) or len(client.nthreads()) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_bug_that_two_workers_agree_on_is_raised_once_with_its_place(client: Client, tmp_path: Path) -> None:
    name = tmp_path / "tried"
    with pytest.raises(ZeroDivisionError, match="one over nothing") as caught:
        list(stream(client, bug_everywhere, [str(name)], label="bug", stop=threading.Event()))
    assert len(set(name.read_text().split())) == 2
    (note,) = caught.value.__notes__
    assert "on worker tcp://" in note and "in bug_everywhere" in note


class Unpackable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_unpackable(_: int) -> None:
    raise Unpackable(1, 2)


def test_an_exception_that_cannot_travel_is_told_by_its_words(client: Client) -> None:
    with pytest.raises(RuntimeError, match="Unpackable: 1 and 2"):
        list(stream(client, raise_unpackable, [0], label="odd", stop=threading.Event()))


def eat(item: tuple[str, int]) -> int:
    """Needs more memory than a worker has, unless it was made smaller."""
    folder, megabytes = item
    (Path(folder) / f"{megabytes}-{os.getpid()}").touch()
    held = bytearray(megabytes * 2**20)
    held[:: 2**12] = b"x" * len(held[:: 2**12])
    time.sleep(1.5 if megabytes > 500 else 0)  # until the nanny has looked
    return megabytes


def test_want_of_memory_costs_smaller_pieces_and_ends_with_the_reason(client: Client, tmp_path: Path) -> None:
    def smaller(item: tuple[str, int]) -> tuple[str, int] | None:
        return (item[0], 10) if item[1] > 1500 and item[1] % 2 == 0 else None

    item = (str(tmp_path), 1800)
    ((sent, found),) = stream(client, eat, [item], label="eat", stop=threading.Event(), smaller=smaller)
    assert sent == (str(tmp_path), 10) and found == 10
    assert len(list(tmp_path.glob("1800-*"))) >= 2  # the first death may have been a neighbour's fault
    with pytest.raises(ResourceError, match=r"workers of 1\.5 GB, [23] of them for want of memory"):
        list(stream(client, eat, [(str(tmp_path), 1801)], label="eat", stop=threading.Event(), smaller=smaller))


def differ(name: str) -> None:
    """A bug whose words are never the same, as those that hold addresses or what memory is free."""
    with Path(name).open("a") as file:
        file.write("x")
    raise ZeroDivisionError(f"at {uuid.uuid4()}")


def test_a_bug_need_not_say_the_same_twice(client: Client, tmp_path: Path) -> None:
    name = tmp_path / "tried"
    with pytest.raises(ZeroDivisionError):
        list(stream(client, differ, [str(name)], label="differ", stop=threading.Event()))
    assert name.read_text() == "xx"


def fall_over(item: tuple[str, int]) -> int:
    """Takes the worker down, as often as told, while others wait behind it on the same worker."""
    folder, deaths = item
    if len(list(Path(folder).glob("*"))) < deaths:
        (Path(folder) / uuid.uuid4().hex).touch()
        time.sleep(0.2)  # for its start to be told
        os.kill(os.getpid(), 9)
    return deaths


def test_a_block_that_only_waited_on_a_dead_worker_is_not_blamed(tmp_path: Path, caplog) -> None:
    with connect(Profile(kind="local", workers=1, memory=1.5)) as client:
        items = [(str(tmp_path), 2), *((str(tmp_path), -n) for n in range(3))]
        found = dict(stream(client, fall_over, items, label="fall", stop=threading.Event(), in_flight=4))
    assert found == {item: item[1] for item in items}
    said = [record.getMessage() for record in caplog.records if "was lost" in record.getMessage()]
    assert len(said) == 2 and said[-1].endswith("(2)")


@pytest.fixture
def mixed() -> Iterator[Client]:
    """One worker with a GPU, as far as Dask is told, and one without."""
    parts = {
        name: {"cls": Nanny, "options": {"nthreads": 1, "resources": {resource: 1}, "memory_limit": "1.5GB"}}
        for name, resource in (("gpu", "GPU"), ("cpu", "CPU"))
    }
    with (
        dask.config.set(CONFIG),
        SpecCluster(
            parts, scheduler={"cls": Scheduler, "options": {"dashboard": False, "host": "127.0.0.1"}}
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(2)
        yield client


def test_a_task_that_failed_goes_to_no_worker_that_lacks_what_it_needs(mixed: Client, tmp_path: Path) -> None:
    options = {"stop": threading.Event(), "resources": {"GPU": 1}}
    assert dict(stream(mixed, square, range(5), label="sound", **options)) == {x: x * x for x in range(5)}
    with pytest.raises(ZeroDivisionError, match="one over nothing"):
        list(stream(mixed, bug_everywhere, [str(tmp_path / "tried")], label="bug", **options))
    assert len((tmp_path / "tried").read_text().split()) == 1


def test_a_stop_ends_the_stream_between_tasks_here() -> None:
    stop = threading.Event()
    seen = []
    with pytest.raises(Stopped):
        for x, _ in stream(None, square, range(9), label="s", stop=stop):
            seen.append(x)
            if x == 3:
                stop.set()
    assert seen == [0, 1, 2, 3]


def test_a_stop_does_not_wait_for_tasks_on_the_cluster(client: Client) -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    begin = time.monotonic()
    with pytest.raises(Stopped):
        list(stream(client, slow, [4.0] * 6, label="slow", stop=stop))
    assert time.monotonic() - begin < 3


def test_a_task_waits_for_a_worker_that_has_what_it_needs(client: Client) -> None:
    """No worker of this cluster has a GPU: the task must not run on a CPU in silence."""
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    with pytest.raises(Stopped):
        list(stream(client, square, [3], label="gpu", stop=stop, resources={"GPU": 1}))


def test_tasks_of_one_worker_run_one_after_another(client: Client) -> None:
    begin = time.monotonic()
    list(stream(client, slow, [0.4] * 6, label="one-cpu", stop=threading.Event(), in_flight=6))
    assert time.monotonic() - begin >= 3 * 0.4


def test_tasks_compute_on_one_thread_everywhere(client: Client) -> None:
    import torch

    for where in (None, client):
        assert call(where, threads_in_use, 0, label="t", stop=threading.Event()) == 1
    torch.set_num_threads(1)


def threads_in_use(_: int) -> int:
    import torch

    return int(torch.get_num_threads())


def test_the_smallest_worker_counts(client: Client) -> None:
    assert smallest_memory(client, {"CPU": 1}) == pytest.approx(1.5e9, rel=0.01)
    assert smallest_memory(client, {"GPU": 1}) == smallest_memory(None, {"CPU": 1}) == float("inf")


def test_a_cluster_that_lost_all_workers_is_an_error_and_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import patience

    monkeypatch.setattr(patience, "NO_WORKERS", 0.5)
    with connect(Profile(kind="local", workers=1, memory=1.5)) as client:
        assert client is not None
        client.cluster.scale(0)
        while client.nthreads():
            time.sleep(0.1)
        with pytest.raises(ResourceError, match="no worker with CPU is left"):
            list(stream(client, square, [1], label="none", stop=threading.Event()))
