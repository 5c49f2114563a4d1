"""What a run bears with, and for how long: disks that are full or away, and clusters without workers."""

from __future__ import annotations

import errno
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import dask.config
from distributed import Client

from schemas.errors import ResourceError

log = logging.getLogger("colonnade")

# What a full quota, a read-only remount or a file server that restarts looks like; pauses and patience in seconds.
SITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
FIRST_PAUSE, LONGEST_PAUSE, PATIENCE = 1.0, 60.0, 900.0
LOOK_SECONDS = 5.0  # between two looks at how many workers there are
NO_WORKERS = 600.0  # s without any worker after which waiting is given up; on batch systems start_timeout if longer


class Stopped(Exception):
    """The user, or the batch system, asked the run to stop."""


class Patience:
    """How long to bear with a site whose disk is full or read-only: ever longer pauses, PATIENCE seconds in all."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Something worked: all is well again."""
        self._since, self._pause = 0.0, FIRST_PAUSE

    def wait(self, error: Exception, stop: threading.Event) -> None:
        """Pause before the next attempt, or raise ``ResourceError`` when patience is over."""
        now = time.monotonic()
        self._since = self._since or now
        words = os.strerror(site_errno(error) or errno.EIO)
        if now - self._since > PATIENCE:
            raise ResourceError(
                f"{words} for {now - self._since:.0f} s ({error}); mend it and run the same command again"
            ) from error
        log.warning("%s (%s); trying again in %.0f s", words, error, self._pause)
        if stop.wait(self._pause):
            raise Stopped from None
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


def site_errno(error: BaseException | None) -> int | None:
    """What the operating system said, if it is something that a site may mend while a run waits; else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in SITE_ERRORS:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def able(client: Client, resources: Mapping[str, float]) -> dict[str, Mapping[str, Any]]:
    """What the scheduler knows of each worker that has these resources, by address."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return {address: facts for address, facts in workers.items() if set(resources) <= set(facts["resources"] or {})}


class Idle:
    """Watches for a cluster that has no worker for a task: not for ever, but a batch system may take its time."""

    def __init__(self, client: Client, resources: Mapping[str, float]) -> None:
        self._client, self._resources = client, resources
        self._asked, self._since = time.monotonic(), math.inf
        self._limit = max(NO_WORKERS, float(dask.config.get("colonnade.start-timeout", 0.0)))

    def check(self) -> None:
        """Raise ``ResourceError`` if there has been no worker for too long; asks every few seconds."""
        now = time.monotonic()
        if now - self._asked < min(LOOK_SECONDS, NO_WORKERS):
            return
        self._asked = now
        if able(self._client, self._resources):
            self._since = math.inf
            return
        self._since = min(self._since, now)
        if now - self._since >= self._limit:
            raise ResourceError(
                f"no worker with {', '.join(self._resources)} is left on {self._client.scheduler_info()['address']}; "
                "see the workers' logs for why they ended, start them again, and run the same command again"
            )
