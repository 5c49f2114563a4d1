"""From a profile to a checked Dask client."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import dask.config
import psutil
from distributed import Client, Security, Worker, WorkerPlugin
from distributed.comm import connect as dial
from distributed.core import Status

from cluster.checks import check_workers
from cluster.gpu import cuda_cluster
from cluster.local import local_cluster
from schemas.errors import ResourceError
from schemas.profiles import Profile

CLOSE_SECONDS = 15.0

CONFIG = {
    # A task lost with its worker says nothing of the task: Dask's own counter must never end a run.
    "distributed.scheduler.allowed-failures": 1_000_000,
    # Blocks are sized to fit; spilling or pausing would hide that they do not, and stalls a night.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.98,
    # A numeric step holds the interpreter for long; that is no reason to declare the worker dead or to warn.
    "distributed.comm.timeouts.connect": "60s",
    "distributed.admin.tick.limit": "1h",
    "distributed.scheduler.work-stealing": False,
    "distributed.worker.profile.enabled": False,
    # What the scheduler remembers must not grow with the number of blocks.
    "distributed.diagnostics.computations.max-history": 1,
    "distributed.admin.low-level-log-length": 1000,
    "distributed.admin.log-length": 1000,
    "distributed.admin.event-loop-monitor-interval": "1h",
    # Dask tells malloc to hand freed memory back at once; networks take and free the same tensors all the time, and
    # half of the processor would go into new pages (measured: 23 s of CPU against 10 s).
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": str(2**30),
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": str(2**30),
    "distributed.nanny.pre-spawn-environ.MALLOC_ARENA_MAX": "1",
}


class IgnoreInterrupts(WorkerPlugin):
    """Ctrl-C reaches every process of a terminal; what becomes of the workers is for the driver to decide."""

    name = "ignore-interrupts"

    def setup(self, worker: Worker) -> None:
        """Called as each worker starts, restarted ones too."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def connect(profile: Profile) -> Iterator[Client | None]:
    """A client whose workers were checked to run this very copy; None for the serial profile.

    Raises ``ResourceError`` that says what was asked, what was found and what to do.
    """
    if profile.kind == "serial":
        yield None
        return
    with dask.config.set(CONFIG):
        if profile.kind == "address":
            try:
                asyncio.run(_call_up(profile.address, profile.start_timeout))
            except (OSError, ValueError) as error:
                raise ResourceError(
                    f"no scheduler answers at {profile.address} within {profile.start_timeout:g} s ({error}); "
                    "start one with `dask scheduler`, or check the address"
                ) from None
            with Client(profile.address, timeout=profile.start_timeout, set_as_default=False) as client:
                check_workers(client, profile)
                yield client
            return
        start = cuda_cluster if profile.kind == "cuda" else local_cluster
        with _closing(start(profile)) as cluster, Client(cluster, set_as_default=False) as client:
            client.register_plugin(IgnoreInterrupts())
            check_workers(client, profile)
            yield client


async def _call_up(address: str | None, timeout: float) -> None:
    """Raise ``OSError`` or ``ValueError`` if nobody answers.

    Asked before a client is made: one whose constructor fails cannot be closed, and locks up the process if it is
    collected while another one starts.
    """
    comm = await dial(address or "", timeout=timeout, **Security().get_connection_args("client"))
    comm.abort()


@contextmanager
def _closing(cluster: Any) -> Iterator[Any]:
    """Close a cluster of our own within bounded time.

    Dask waits for ever for a worker that died just before it was asked to close; by then all results are on disk, so
    the processes that are left may be killed.
    """
    try:
        yield cluster
    finally:
        try:
            cluster.close(timeout=CLOSE_SECONDS)
        except TimeoutError:
            cluster.shutdown_on_close = False  # Dask would try once more as the interpreter exits
            for nanny in cluster.workers.values():
                nanny.status = Status.closing  # or it would replace the worker that is ended here
            _kill_workers()


def _kill_workers() -> None:
    """End worker processes that this process started."""
    workers = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any("spawn_main" in word for word in child.cmdline()):
                child.kill()
                workers.append(child)
    psutil.wait_procs(workers, timeout=5)
