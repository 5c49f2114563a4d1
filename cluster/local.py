"""Worker processes on this machine."""

from __future__ import annotations

import logging
import os

import psutil
from distributed import LocalCluster

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
        # Nothing listens but the scheduler, unless the profile asks for Dask's pages.
        dashboard_address=profile.dashboard or "127.0.0.1:0",
        scheduler_kwargs={"dashboard": profile.dashboard is not None},
        local_directory=str(profile.local_directory) if profile.local_directory else None,
        # A heartbeat that is cut off when the cluster closes is no error of the user's.
        silence_logs=logging.CRITICAL,
    )
