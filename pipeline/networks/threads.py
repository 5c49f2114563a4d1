"""Two CPU threads for what lies apart; each sum is computed on one, lest its bits depend on the machine."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
# Of one process; more would only wait for each other, or take the cores of the workers beside it.
MOST = 2


def side_by_side(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """``function`` of each item, in their order, a few of them at a time where the process has more than one core.

    Each is computed on one thread, so that the number of cores changes no bit. `function` enters for itself what is
    bound to a thread (inference mode, reduced precision) and does not call this again.
    """
    if _cores() == 1:
        yield from map(function, items)
        return
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(_crew().submit(function, item))
        if len(waiting) > MOST:  # what is not yet asked for is kept in memory
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _cores() -> int:
    return min(MOST, len(os.sched_getaffinity(0)))


@functools.cache
def _crew() -> ThreadPoolExecutor:
    """Threads that live as long as the process: what libraries keep by thread is made once."""
    return ThreadPoolExecutor(_cores(), thread_name_prefix="side", initializer=torch.set_num_threads, initargs=(1,))
