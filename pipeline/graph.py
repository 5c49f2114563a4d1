"""The only file that builds Dask tasks: opaque calls, resources stated on each, a bounded window in flight.

Collections would drop resources when they are fused, and hold a graph as large as the archive; so every task is a
plain function on a JSON-able context and a range of frames. Its result is a small record.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import queue
import threading
import time
import traceback
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from distributed import Client, Future, get_worker
from distributed.protocol import deserialize_bytes, serialize_bytes
from distributed.scheduler import KilledWorker
from threadpoolctl import ThreadpoolController

from pipeline.patience import LOOK_SECONDS, Idle, Patience, Stopped, able, site_errno
from pipeline.steps.denoise import one_thread
from schemas.errors import ColonnadeError, ResourceError

log = logging.getLogger("colonnade")

Item = TypeVar("Item")
Result = TypeVar("Result")
Smaller = Callable[[Item], Item | None]
"""Makes an item that needs less memory; None where there is none."""

POLL = 0.3  # s between two looks at what became of tasks that do not answer, and at a wish to stop
ANSWERS, STARVED = "colonnade-answers", "worker-restart-memory"  # topics of messages: ours, and one of Dask's nannies
# Workers that a block costs for want of memory before it is made smaller: the first may be a neighbour's fault.
MEMORY_DEATHS = 2
# Workers that a block costs for no known reason before it is made smaller too: a kernel that kills for memory tells
# nobody. What walltimes and preemption cost is spread over all blocks; one that cost HOPELESS workers never ends.
LOSSES, HOPELESS = 10, 100
MEMORY_SECONDS = 60.0  # in which a worker that was ended for its memory is missed; later its address may be another's
LOST = "the scheduler was lost; see its log for why, start it again, and run the same command again to go on"
ROOT = Path(__file__).resolve().parent.parent


def stream(
    client: Client | None,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    label: str,
    stop: threading.Event,
    resources: dict[str, float] | None = None,
    in_flight: int = 0,
    smaller: Smaller[Item] = lambda _: None,
) -> Iterator[tuple[Item, Result]]:
    """Call ``function`` on every item and yield (item, result) as they finish.

    With ``client`` None everything is computed here, in order. Else at most ``in_flight`` tasks are known to the
    scheduler at any time (default: twice the workers), so that its memory does not grow with the archive. A task
    whose worker died is sent again, without limit, unless it was memory that ran out: then ``smaller`` items are sent,
    and yielded, as long as there are any. One that found the disk full or read-only is sent again for PATIENCE seconds;
    a bug is raised once two workers agree on it; errors that a user must mend are raised at once.
    """
    if client is None:
        for item in items:
            if stop.is_set():
                raise Stopped
            yield item, _patiently(function, item, stop)
        return
    yield from _Stream(client, function, label, stop, resources or {"CPU": 1}, in_flight, smaller).run(iter(items))


def call(
    client: Client | None,
    function: Callable[[Item], Result],
    item: Item,
    *,
    label: str,
    stop: threading.Event,
    resources: dict[str, float] | None = None,
) -> Result:
    """One task: ``function(item)`` on a worker, or here."""
    return next(result for _, result in stream(client, function, [item], label=label, stop=stop, resources=resources))


def smallest_memory(client: Client | None, resources: Mapping[str, float]) -> float:
    """Bytes that the smallest worker with these resources may use; infinite where no limit is known."""
    workers = able(client, resources).values() if client is not None else []
    return min((float(worker["memory_limit"] or math.inf) for worker in workers), default=math.inf)


# ------------------------------------------------------------------------------------------------- where it computes


@functools.cache
def _thread_pools() -> ThreadpoolController:
    """The thread pools of BLAS and OpenMP in this process; finding them costs more than setting them."""
    return ThreadpoolController()


def single_threaded(function: Callable[[Item], Result], item: Item) -> Result:
    """``function(item)`` on one thread, here as on any worker: how many share a sum decides its last bits."""
    with one_thread(), _thread_pools().limit(limits=1):
        return function(item)


def _patiently(function: Callable[[Item], Result], item: Item, stop: threading.Event) -> Result:
    patience = Patience()
    while True:
        try:
            return single_threaded(function, item)
        except Exception as error:
            if site_errno(error) is None:
                raise
            patience.wait(error, stop)


def _answer(function: Callable[[Item], Any], item: Item, key: str) -> None:
    """What a worker does: the result travels as a message, ahead of Dask's own that the task has finished.

    So nothing need be fetched, and nothing that was told can be lost with the worker that computed it.
    """
    worker = get_worker()
    worker.log_event(ANSWERS, {"key": key, "worker": worker.address})
    try:
        answer: Any = single_threaded(function, item)
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
        error.add_note(f"on worker {worker.address}:\n" + "".join(traceback.format_list(frames[-4:])).rstrip())
        answer = error
    try:
        data = serialize_bytes(answer)
        deserialize_bytes(data)  # some exceptions can be packed and not unpacked
    except Exception:
        data = serialize_bytes(RuntimeError(f"{type(answer).__name__}: {answer}"))
    worker.log_event(ANSWERS, {"key": key, "worker": worker.address, "data": data})


# ----------------------------------------------------------------------------------------------- where it is awaited


class _Mail:
    """Messages of a client's workers, handed to the streams that wait for them."""

    def __init__(self, client: Client) -> None:
        self._boxes: dict[str, queue.SimpleQueue[tuple[str, str, bytes]]] = {}
        self.running: dict[str, str] = {}
        self._starved: dict[str, float] = {}
        self._renewed: set[str] = set()
        self._comm = client.scheduler_comm
        client.subscribe_topic(ANSWERS, self._deliver)
        client.subscribe_topic(STARVED, lambda event: self._starved.update({event[1]["worker"]: time.monotonic()}))

    def expect(self, keys: Sequence[str], box: queue.SimpleQueue[tuple[str, str, bytes]]) -> None:
        """Put the answers of tasks into a box, once each."""
        self._boxes.update(dict.fromkeys(keys, box))

    def forget(self, key: str) -> None:
        """Nobody waits for this task any more."""
        self._boxes.pop(key, None)

    def starved(self, worker: str) -> bool:
        """Whether a worker was ended just now because it took too much memory."""
        return time.monotonic() - self._starved.get(worker, -math.inf) < MEMORY_SECONDS

    def renew(self, client: Client, worker: str) -> None:
        """Start a worker anew, once; one without a nanny, which nobody would start again, is left alone."""
        if worker in self._renewed or not able(client, {}).get(worker, {}).get("nanny"):
            return
        self._renewed.add(worker)
        log.warning("worker %s failed where another one did not; it is started anew", worker)
        restart = functools.partial(client.restart_workers, [worker], raise_for_error=False)
        threading.Thread(target=restart, daemon=True, name="renew").start()

    def require(self, client: Client) -> None:
        """Raise ``ResourceError`` if the scheduler is another than at first: clients connect again without a word."""
        if client.scheduler_comm is not self._comm:
            raise ResourceError(LOST)

    def _deliver(self, event: tuple[float, dict[str, Any]]) -> None:
        message = event[1]
        if "data" not in message:
            self.running[message["worker"]] = message["key"]
        elif (box := self._boxes.pop(message["key"], None)) is not None:
            box.put((message["key"], message["worker"], message["data"]))


_mail: weakref.WeakKeyDictionary[Client, _Mail] = weakref.WeakKeyDictionary()
_mail_lock = threading.Lock()


def _mail_of(client: Client) -> _Mail:
    with _mail_lock:
        if client not in _mail:
            _mail[client] = _Mail(client)
        return _mail[client]


@dataclass
class _Sent(Generic[Item]):
    """A task that the scheduler knows, and the workers that it has cost."""

    item: Item
    future: Future[None] | None = None
    avoid: str = ""
    only: frozenset[str] = frozenset()
    lost: int = 0
    starved: int = 0
    silent: bool = False


class _Stream(Generic[Item, Result]):
    """One stream of tasks on a cluster."""

    def __init__(
        self, client: Client, function: Callable[[Item], Result], label: str, stop: threading.Event,
        resources: dict[str, float], in_flight: int, smaller: Smaller[Item],
    ) -> None:  # fmt: skip
        self._client, self._function, self._label, self._stop = client, function, label, stop
        self._resources, self._given, self._smaller = resources, in_flight, smaller
        self._sent: dict[str, _Sent[Item]] = {}
        self._mail, self._box = _mail_of(client), queue.SimpleQueue[tuple[str, str, bytes]]()
        self._workers, self._counted, self._looked = 0, -math.inf, time.monotonic()
        self._patience, self._idle = Patience(), Idle(client, resources)

    def run(self, pending: Iterator[Item]) -> Iterator[tuple[Item, Result]]:
        """All items, as they finish."""
        self._mail.require(self._client)
        try:
            self._refill(pending)
            while self._sent:
                for item, result in self._answered():
                    yield item, result
                    if self._stop.is_set():
                        raise Stopped
                if time.monotonic() - self._looked >= POLL:
                    self._look()
                self._refill(pending)
        finally:
            for key, sent in self._sent.items():
                self._mail.forget(key)
                if sent.future is not None:
                    sent.future.cancel()

    def _width(self) -> int:
        """Tasks that the scheduler may know: as given, or twice the workers, which come and go on a batch system."""
        if not self._given and time.monotonic() - self._counted >= LOOK_SECONDS:
            self._workers, self._counted = len(able(self._client, self._resources)), time.monotonic()
        return max(1, self._given or 2 * self._workers)

    def _refill(self, pending: Iterator[Item]) -> None:
        free = self._width() - len(self._sent)
        if free > 0 and (items := list(itertools.islice(pending, free))):
            self._send([_Sent(item) for item in items])

    def _send(self, tasks: list[_Sent[Item]]) -> None:
        """Many at once, since each call to the scheduler costs as much as a task."""
        keys = [f"{self._label}-{uuid.uuid4().hex}" for _ in tasks]
        self._mail.expect(keys, self._box)
        futures = self._client.map(
            _answer, [self._function] * len(keys), [task.item for task in tasks], keys, key=keys,
            resources=self._resources, workers=sorted(tasks[0].only) or None, pure=False, retries=0,
        )  # fmt: skip
        for key, task, future in zip(keys, tasks, futures, strict=True):
            task.future, task.silent = future, False
            self._sent[key] = task

    def _answered(self) -> Iterator[tuple[Item, Result]]:
        """Results that have come; waits for the first of them, but not for long."""
        try:
            answers = [self._box.get(timeout=POLL)]
        except queue.Empty:
            return
        while not self._box.empty():
            answers.append(self._box.get())
        for key, worker, data in answers:
            if (task := self._sent.pop(key, None)) is None:
                continue
            answer = deserialize_bytes(data)
            if isinstance(answer, Exception):
                self._failed(task, answer, worker)
                continue
            self._patience.reset()
            if task.future is not None:
                task.future.release()
            if task.avoid not in ("", worker):
                self._mail.renew(self._client, task.avoid)
            yield task.item, answer

    def _failed(self, task: _Sent[Item], error: Exception, worker: str) -> None:
        """Send a task that raised an exception again, or raise it here: what a user must mend, and bugs.

        A bug is what a second worker meets with the same block, or what there is no other worker to disprove.
        """
        task.only = frozenset()
        if site_errno(error) is not None:
            self._patience.wait(error, self._stop)
        else:
            task.only = frozenset(able(self._client, self._resources)) - {worker}
            if isinstance(error, ColonnadeError) or not task.only or task.avoid not in ("", worker):
                raise error
            log.error("%s: %s: %s on worker %s; another one tries", self._label, type(error).__name__, error, worker)
            task.avoid = worker
        self._send([task])

    def _look(self) -> None:
        """Find out what became of tasks whose worker said nothing."""
        self._looked = time.monotonic()
        if self._stop.is_set():  # a worker may be busy for a minute; a user who stops the run does not wait for it
            raise Stopped
        self._mail.require(self._client)
        self._idle.check()
        again = []
        for key, task in list(self._sent.items()):
            status = "lost" if task.future is None else task.future.status
            if status == "cancelled":
                raise ResourceError(LOST)
            # A worker's last words come before its end is known, but may be waiting in the box just now: look twice.
            if status in ("error", "finished") and task.silent:
                again.append(self._sent.pop(key))
                self._mail.forget(key)
                if status == "error" and task.future is not None:
                    self._lost(key, task, task.future.exception())
            task.silent = status in ("error", "finished")
            if task.only and status == "pending" and not task.only & set(self._client.nthreads()):
                again.append(self._sent.pop(key))  # those that it may run on have gone
                self._mail.forget(key)
                task.only = frozenset()
        for task in again:
            self._send([task])

    def _lost(self, key: str, task: _Sent[Item], error: BaseException | None) -> None:
        """Note that a worker died under a task, and make the task smaller if memory was the cause."""
        if not isinstance(error, KilledWorker):
            raise error or RuntimeError(f"{self._label}: a task failed without a reason")
        task.only = frozenset()
        worker = error.last_worker.address
        if self._mail.running.get(worker) != key:
            return  # it was only waiting there
        memory = self._mail.starved(worker)
        task.lost, task.starved = task.lost + 1, task.starved + memory
        cause = "ended for want of memory" if memory else "was lost"
        log.warning("%s: worker %s %s; its block is sent again (%d)", self._label, worker, cause, task.lost)
        starved = task.starved >= MEMORY_DEATHS
        if not starved and task.lost % LOSSES:
            return
        if (less := self._smaller(task.item)) is not None:
            task.item = less
        elif starved or task.lost >= HOPELESS:
            raise ResourceError(
                f"{self._label}: a block ended {task.lost} workers of {error.last_worker.memory_limit / 1e9:.1f} GB, "
                f"{task.starved} of them for want of memory; give workers more, or set blocks.frames lower"
            )
