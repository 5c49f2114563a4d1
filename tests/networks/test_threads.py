"""What is computed side by side comes in order, on one thread each, and a failure comes through."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from pipeline.networks import threads
from pipeline.steps.denoise import one_thread


@pytest.fixture(params=[1, 2], ids=["one core", "two cores"])
def cores(request, monkeypatch):
    monkeypatch.setattr(threads, "_cores", lambda: request.param)
    threads._crew.cache_clear()
    yield request.param
    threads._crew.cache_clear()


def test_results_come_in_the_order_of_the_items(cores):
    def slow_first(item):
        time.sleep(0.02 * (item == 0))
        return item

    assert list(threads.side_by_side(slow_first, range(9))) == list(range(9))


def test_each_computes_on_one_thread_and_two_cores_have_two(cores):
    gate = threading.Barrier(cores, timeout=30)

    def who(_):
        gate.wait()  # nobody passes alone
        return threading.get_ident(), torch.get_num_threads()

    with one_thread():
        found = list(threads.side_by_side(who, range(2 * cores)))
    assert len({ident for ident, _ in found}) == cores
    assert {count for _, count in found} == {1}


def test_no_more_is_begun_than_is_soon_asked_for(cores):
    begun = []
    results = threads.side_by_side(begun.append, range(100))
    next(results)
    time.sleep(0.05)
    assert len(begun) <= threads.MOST + 1


def test_a_failure_comes_through(cores):
    def fails(item):
        if item == 2:
            raise ValueError("item 2")
        return item

    with pytest.raises(ValueError, match="item 2"):
        list(threads.side_by_side(fails, range(5)))
