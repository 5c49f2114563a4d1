"""Worker processes on this machine."""

from __future__ import annotations

import logging
import os
from typing import Any

import psutil
from distributed import LocalCluster
from distributed.scheduler import DEFAULT_EXTENSIONS
from distributed.spans import SpansSchedulerExtension

from schemas.errors import ResourceError
from schemas.profiles import Profile

log = logging.getLogger("colonnade")

LEAST_MEMORY = 1.0  # GB that a worker needs to import torch and hold a small block
ATTEMPTS = 3  # at starting workers, where Dask itself gives up as soon as one of them dies


def size(profile: Profile) -> tuple[int, float]:
    """Workers and GB per worker that the profile asks for, or that the machine gives."""
    total = psutil.virtual_memory().total / 1e9
    cores = len(os.sched_getaffinity(0))
    workers = profile.workers or max(1, min(cores, int(total * 0.8 / LEAST_MEMORY)))
    memory = profile.memory or total * 0.8 / workers
    if workers * memory > total:
        raise ResourceError(
            f"{workers} worker(s) of {memory:.1f} GB need {workers * memory:.1f} GB; this machine has {total:.1f} GB: "
            "ask for fewer workers or less memory in the profile"
        )
    return workers, memory


class _NoSpans(SpansSchedulerExtension):
    """In place of what Dask notes for ever of every call that submits tasks, and of every group of them."""

    def observe_tasks(self, tss: Any, code: Any, span_metadata: Any) -> Any:
        """Called by the scheduler with new tasks."""
        return {}

    def heartbeat(self, ws: Any, data: Any) -> None:
        """Called with what workers measured."""


def scheduler_options(profile: Profile) -> dict[str, Any]:
    """For a scheduler in the driver's process: ``scheduler_kwargs`` and ``dashboard_address`` of a ``LocalCluster``.

    Nothing listens but the scheduler, unless the profile asks for Dask's pages; and what it remembers does not grow
    with the number of blocks.
    """
    extensions = {name: kind for name, kind in DEFAULT_EXTENSIONS.items() if name != "stealing"} | {"spans": _NoSpans}
    return {
        "dashboard_address": profile.dashboard or "127.0.0.1:0",
        "scheduler_kwargs": {"dashboard": profile.dashboard is not None, "extensions": extensions},
    }


def local_cluster(profile: Profile) -> LocalCluster:
    """One single-threaded process per core: convolutions of one thread are what makes results repeatable."""
    workers, memory = size(profile)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _start(profile, workers, memory)
        except RuntimeError as error:  # Dask has closed what it had started
            log.warning("worker processes ended as they started (%s), attempt %d of %d", error, attempt, ATTEMPTS)
            failure = error
    raise ResourceError(
        f"worker processes ended as they started, {ATTEMPTS} times ({failure}); "
        "is there memory for them, or does the machine end them? Ask for fewer workers in the profile"
    ) from failure


def _start(profile: Profile, workers: int, memory: float) -> LocalCluster:
    return LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        memory_limit=f"{memory:.3f}GB",
        resources={"CPU": 1},
        host="127.0.0.1",
        local_directory=str(profile.local_directory) if profile.local_directory else None,
        # A heartbeat that is cut off when the cluster closes is no error of the user's.
        silence_logs=logging.CRITICAL,
        **scheduler_options(profile),
    )
