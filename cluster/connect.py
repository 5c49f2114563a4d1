"""From a profile to a checked Dask client."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import dask.config
import psutil
from distributed import Client, LocalCluster, Security, Worker, WorkerPlugin
from distributed.comm import connect as dial
from distributed.core import Status
from distributed.utils import get_ip, get_ip_interface

from cluster.batch import settings_for_workers
from cluster.checks import asked, check_workers, describe_process, differences_of
from cluster.gpu import cuda_cluster
from cluster.local import local_cluster, scheduler_options
from cluster.pool import FAILURES, WORKERS_FILES, Pool, Step
from schemas.errors import ResourceError
from schemas.profiles import Profile

CLOSE_SECONDS = 15.0

CONFIG = {
    # A task lost with its worker comes back to us, who send it again without limit and know why it was lost.
    "distributed.scheduler.allowed-failures": 0,
    # A nanny starts a worker again that was killed; on a busy machine that takes longer than Dask waits before it gives
    # up on the nanny itself, for good.
    "distributed.deploy.lost-worker-timeout": "1h",
    # Blocks are sized to fit; spilling or pausing would hide that they do not, and stalls a night.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.98,
    # A numeric step holds the interpreter for long; that is no reason to declare the worker dead or to warn.
    "distributed.comm.timeouts.connect": "60s",
    "distributed.admin.tick.limit": "1h",
    # What nobody looks at costs driver and workers some per cent of a core: ticks fifty times a second, and counters of
    # disks and networks.
    "distributed.admin.tick.interval": "10s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.admin.system-monitor.disk": False,
    "distributed.admin.system-monitor.gil.enabled": False,
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


class Interrupted(Exception):
    """The run was asked to stop before it had any worker."""


class SameCopy(WorkerPlugin):
    """Refuses to start a worker that would not run this very copy: they come and go all night."""

    name = "same-copy"

    def __init__(self, ours: dict[str, Any], device: str) -> None:
        self.ours, self.device = ours, device

    def setup(self, worker: Worker) -> None:
        """Called as each worker starts."""
        # Of a mixed pool some workers are to have no GPU, and say so.
        device = self.device if "GPU" in worker.state.total_resources else "cpu"
        if found := differences_of(describe_process(), self.ours, place=worker.address, device=device):
            raise ResourceError("this worker differs from its driver:\n  " + "\n  ".join(found))


@contextmanager
def connect(
    profile: Profile, folder: Path | None = None, stop: threading.Event | None = None
) -> Iterator[Client | None]:
    """A client whose workers were checked to run this very copy; None for the serial profile.

    folder: for the scripts, logs and state of the workers of a batch system; default: ``cluster`` in this folder.
    stop: ends the wait for their first worker with an ``Interrupted``.
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
        if profile.is_batch:
            patience = dask.config.set({"colonnade.start-timeout": profile.start_timeout})
            with patience, _batch(profile, folder or Path.cwd() / "cluster", stop or threading.Event()) as client:
                yield client
            return
        start = cuda_cluster if profile.kind == "cuda" else local_cluster
        with _closing(start(profile)) as cluster, Client(cluster, set_as_default=False) as client:
            asked(client, partial(client.register_plugin, IgnoreInterrupts()))
            check_workers(client, profile)
            yield client


@contextmanager
def _batch(profile: Profile, folder: Path, stop: threading.Event) -> Iterator[Client]:
    """A scheduler here, and workers that are jobs of a batch system."""
    for name in WORKERS_FILES:  # of an earlier run, which may have had other pools
        (folder / name).unlink(missing_ok=True)
    host = get_ip_interface(profile.batch.interface) if profile.batch.interface else get_ip()
    cluster = LocalCluster(n_workers=0, host=host, silence_logs=logging.CRITICAL, **scheduler_options(profile))

    def names() -> list[str]:
        return [str(worker.name) for worker in list(cluster.scheduler.workers.values())]

    facts = (cluster.scheduler_address, folder, settings_for_workers())
    pools: list[Pool | Step] = (
        [Step(profile, *facts)]
        if profile.batch.one_allocation
        else [Pool(one, *facts, names, file) for one, file in zip(profile.pools, WORKERS_FILES, strict=False)]
    )
    with _closing(cluster), Client(cluster, set_as_default=False) as client, ExitStack() as closing:
        for pool in pools:
            closing.callback(pool.close)
            pool.start()
        _wait_for_first(client, pools[0], profile.start_timeout, stop)
        check_workers(client, profile.model_copy(update={"workers": 1}))
        asked(client, partial(client.register_plugin, SameCopy(describe_process(), profile.device)))
        yield client


def _wait_for_first(client: Client, pool: Pool | Step, timeout: float, stop: threading.Event) -> None:
    end = time.monotonic() + timeout
    while not client.nthreads():
        if stop.is_set():
            raise Interrupted("stopped while it waited for the first worker")
        if time.monotonic() > end:
            raise ResourceError(f"no worker came within {timeout:g} s (start_timeout). {pool.reasons()}")
        if pool.failures >= FAILURES:
            raise ResourceError(f"{pool.failures} worker jobs ended before their worker called. {pool.reasons()}")
        stop.wait(0.3)


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
