"""Twenty kills at random over workers, nannies, schedulers, drivers; and that what is lost by kills would be seen."""

from __future__ import annotations

import itertools
import shutil
import sys
import threading
import time
from collections import Counter, deque

import pytest

from cluster import connect
from pipeline import graph, store
from pipeline.collect import TABLES
from schemas.errors import ResourceError
from schemas.profiles import Profile
from tests import soak
from tests.kill_tools import Site, false_counts, false_values, kill_all, stacks, start

KILLS = 20


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return soak.Known.make(tmp_path_factory.mktemp("known"))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a hang is noticed, and told, by the soak itself
def test_twenty_kills_lose_nothing(known, tmp_path, capsys):
    report = soak.soak(known, tmp_path, kills=KILLS, seed=1)
    with capsys.disabled():
        print(f"\n{report.table()}")
    assert report.kills == {"worker": 8, "nanny": 6, "scheduler": 3, "driver": 3}
    assert report.completed >= len(soak.VICTIMS)
    assert report.reads > 0
    assert not report.wrong, "\n".join(report.remarks)


def test_kills_are_the_same_for_a_seed_and_shared_out_fairly():
    def first(seed: int) -> list:
        return list(itertools.islice(soak.rounds(seed, 100), 6))

    assert first(1) == first(1) != first(2)
    kills = [kill for _, planned in first(1) for kill in planned]
    assert Counter(kill.victim for kill in kills) == {"worker": 24, "nanny": 18, "scheduler": 9, "driver": 9}
    assert {kill.victim for place, planned in first(1) if place == "local" for kill in planned} == {"worker", "driver"}
    assert all(0 <= kill.blocks < 100 for kill in kills)


def test_false_values_are_seen(known, tmp_path):
    run = shutil.copytree(known.run, tmp_path / "lattice.zarr")
    assert false_values(run, known.tables) == []
    columns = store.open_group(run, "r+")["columns/y"]
    true, columns[7] = columns[7], float("nan")  # not computed, in a run that says it is complete
    (found,) = false_values(run, known.tables)
    assert found.startswith("/columns/y: 1 of ")
    columns[7] = true
    assert false_values(run, known.tables) == []

    store.update_run(run, {"state": "running"})
    classes = known.tables["frames"].sizes["species_class"]
    store.create_table(run, TABLES["frames"], soak.FRAMES, sizes={"species_class": classes}, coordinates={})
    assert false_values(run, known.tables) == []
    store.open_group(run, "r+")["frames/column_count"][5] = 0
    assert false_values(run, known.tables) == ["/frames/column_count: 1 of 48 are false, such as np.int32(0)"]


def test_false_counts_are_seen(known):
    stack = known.run.parent / "stacks" / known.run.name
    assert false_counts(stack, known.counts) == []
    assert false_counts(stack, known.counts + 1) == [f"{stack} holds other counts than its source"]
    assert false_counts(known.run, known.counts) == []  # not a stack


def test_stacks_say_where_a_process_is(tmp_path):
    code = "import time\ndef stuck():\n    print('here', flush=True)\n    time.sleep(1000)\nstuck()"
    process = start([sys.executable, "-c", code], tmp_path / "stuck.log")
    while "here" not in (tmp_path / "stuck.log").read_text():
        assert process.poll() is None
    assert "in stuck" in stacks([process], tmp_path)
    assert process.returncode is not None


def test_a_run_that_does_not_move_is_a_hang(known, tmp_path):
    report = soak.Report()
    one = soak.Round(known, tmp_path / "out", None, report, patience=1.0)
    assert one.attend(deque()) < 0
    assert report.wrong == {"hangs": 1}
    assert "most recent call first" in "\n".join(report.remarks)
    kill_all(one.driver.gone())


@pytest.mark.slow
def test_a_scheduler_that_was_restarted_between_two_steps_ends_the_run(tmp_path):
    """A client connects to the new one without a word; tasks sent there would be answered to nobody."""
    stop = threading.Event()
    with Site(tmp_path) as site, connect(Profile(kind="address", address=site.address)) as client:
        assert dict(graph.stream(client, abs, range(4), label="a", stop=stop)) == {n: n for n in range(4)}
        before = client.scheduler_info()["id"]
        kill_all(site.processes("scheduler"))
        end = time.monotonic() + 60
        while client.status != "running" or client.scheduler_info()["id"] == before:
            assert time.monotonic() < end
            site.tend()
            time.sleep(0.1)
        with pytest.raises(ResourceError, match="scheduler was lost"):
            dict(graph.stream(client, abs, range(4), label="b", stop=stop))
