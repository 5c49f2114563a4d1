"""The only file that builds Dask tasks: opaque calls, resources stated on each, a bounded window in flight.

Collections would drop resources when they are fused, and hold a graph as large as the archive; so every task is one
``client.submit`` of a plain function on a JSON-able context and a range of frames. Its result is a small record.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import dask.config
from distributed import CancelledError, Client, Future
from distributed.scheduler import KilledWorker
from threadpoolctl import ThreadpoolController

from pipeline.steps.denoise import one_thread
from schemas.errors import ResourceError

log = logging.getLogger("colonnade")

Item = TypeVar("Item")
Result = TypeVar("Result")

STOP_POLL = 0.3  # s
# What a full quota, a read-only remount or a file server that restarts looks like; pauses and patience in seconds.
SITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
FIRST_PAUSE, LONGEST_PAUSE, PATIENCE = 1.0, 60.0, 900.0
WIDTH_SECONDS = 5.0  # between two looks at how many workers there are
NO_WORKERS = 600.0  # s without any worker after which waiting is given up; on batch systems start_timeout if longer


class Stopped(Exception):
    """The user, or the batch system, asked the run to stop."""


def stream(
    client: Client | None,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    label: str,
    stop: threading.Event,
    resources: dict[str, float] | None = None,
    in_flight: int = 0,
) -> Iterator[tuple[Item, Result]]:
    """Call ``function`` on every item and yield (item, result) as they finish.

    With ``client`` None everything is computed here, in order. Else at most ``in_flight`` tasks are known to the
    scheduler at any time (default: twice the workers), so that its memory does not grow with the archive. A task
    whose worker died is sent again, without limit; one that found the disk full or read-only again and again for
    PATIENCE seconds; any other exception of the function itself is raised here.
    """
    if client is None:
        for item in items:
            if stop.is_set():
                raise Stopped
            yield item, _patiently(function, item, stop)
        return
    yield from _stream_on_cluster(client, function, iter(items), label, stop, resources or {"CPU": 1}, in_flight)


@functools.cache
def _thread_pools() -> ThreadpoolController:
    """The thread pools of BLAS and OpenMP in this process; finding them costs more than setting them."""
    return ThreadpoolController()


def single_threaded(function: Callable[[Item], Result], item: Item) -> Result:
    """``function(item)`` on one thread, here as on any worker: how many share a sum decides its last bits."""
    with one_thread(), _thread_pools().limit(limits=1):
        return function(item)


class _Patience:
    """How long to bear with a site whose disk is full or read-only: ever longer pauses, PATIENCE seconds in all."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Something worked: all is well again."""
        self._since, self._pause = 0.0, FIRST_PAUSE

    def wait(self, error: Exception, stop: threading.Event) -> None:
        """Pause before the next attempt, or raise: the error if it is of another kind, else when patience is over."""
        if (number := _site_errno(error)) is None:
            raise error
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since > PATIENCE:
            raise ResourceError(
                f"{os.strerror(number)} for {now - self._since:.0f} s ({error}); mend it and run the same command again"
            ) from error
        log.warning("%s (%s); trying again in %.0f s", os.strerror(number), error, self._pause)
        if stop.wait(self._pause):
            raise Stopped from None
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


def _site_errno(error: BaseException | None) -> int | None:
    """What the operating system said, if it is something that a site may mend while a run waits; else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in SITE_ERRORS:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _patiently(function: Callable[[Item], Result], item: Item, stop: threading.Event) -> Result:
    patience = _Patience()
    while True:
        try:
            return single_threaded(function, item)
        except Exception as error:
            patience.wait(error, stop)


class _Window:
    """How many tasks the scheduler may know: as given, or twice the workers, which come and go on a batch system."""

    def __init__(self, client: Client, given: int) -> None:
        self._client, self._given, self._asked, self._workers = client, given, -WIDTH_SECONDS, 0

    def tasks(self) -> int:
        """The number now; workers are counted every WIDTH_SECONDS, since it costs more than a small block."""
        if not self._given and time.monotonic() - self._asked >= WIDTH_SECONDS:
            self._workers, self._asked = len(self._client.nthreads()), time.monotonic()
        return max(1, self._given or 2 * self._workers)


def _stream_on_cluster(
    client: Client,
    function: Callable[[Item], Result],
    pending: Iterator[Item],
    label: str,
    stop: threading.Event,
    resources: dict[str, float],
    in_flight: int,
) -> Iterator[tuple[Item, Result]]:
    futures: dict[Future[Result], Item] = {}
    finished: queue.SimpleQueue[Future[Result]] = queue.SimpleQueue()
    window, patience = _Window(client, in_flight), _Patience()

    def send(item: Item) -> None:
        key = f"{label}-{uuid.uuid4().hex}"
        future = client.submit(single_threaded, function, item, key=key, resources=resources, pure=False, retries=0)
        futures[future] = item
        future.add_done_callback(finished.put)

    def refill() -> None:
        while len(futures) < window.tasks():
            try:
                send(next(pending))
            except StopIteration:
                return

    idle = _Idle(client)
    try:
        refill()
        while futures:
            try:
                future = finished.get(timeout=STOP_POLL)
            except queue.Empty:
                # A worker may be busy for a minute; a user who stops the run does not wait for it.
                if stop.is_set():
                    raise Stopped from None
                idle.check()
                continue
            item = futures.pop(future)
            try:
                result = future.result()
            except CancelledError as error:
                raise ResourceError(f"the scheduler was lost ({error}); run the same command again to go on") from None
            except Exception as error:
                if not isinstance(error, KilledWorker):
                    patience.wait(error, stop)
                send(item)
                continue
            patience.reset()
            future.release()
            yield item, result
            if stop.is_set():
                raise Stopped
            refill()
    finally:
        for future in futures:
            future.cancel()


class _Idle:
    """Watches for a cluster without any worker: not for ever, but a batch system may take as long as for the first."""

    def __init__(self, client: Client) -> None:
        self._client, self._asked, self._since = client, time.monotonic(), math.inf
        self._limit = max(NO_WORKERS, float(dask.config.get("colonnade.start-timeout", 0.0)))

    def check(self) -> None:
        """Raise ``ResourceError`` if there has been no worker for too long; asks every few seconds."""
        now = time.monotonic()
        if now - self._asked < min(WIDTH_SECONDS, NO_WORKERS):
            return
        self._asked = now
        if self._client.nthreads():
            self._since = math.inf
            return
        self._since = min(self._since, now)
        if now - self._since >= self._limit:
            raise ResourceError(
                f"no worker is left on {self._client.scheduler_info()['address']}; see the workers' logs "
                "for why they ended, start them again, and run the same command again"
            )


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


def smallest_memory(client: Client | None) -> float:
    """Bytes that the smallest worker may use; infinite where no limit is known."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values() if client is not None else []
    return min((float(worker["memory_limit"] or math.inf) for worker in workers), default=math.inf)
