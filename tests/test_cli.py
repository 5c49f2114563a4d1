"""The command line: exit codes that scripts can rely on, messages that say what to do, nothing computed by accident."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from pipeline import cli, store
from pipeline.cli_run import without_redo
from pipeline.ledger import Lease
from schemas.errors import ResourceError
from schemas.jobfile import load_job

VERBS = ("init", "check", "plan", "ingest", "run", "status", "query", "report", "simulate", "train", "demo")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def colonnade(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process: (exit code, standard output, standard error)."""

    def command(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["colonnade", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return command


def options(quick: list[str]) -> list[str]:
    return [word for item in quick for word in ("--set", item)]


def no_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every way to compute a block fail."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr("pipeline.graph.stream", refuse)
    monkeypatch.setattr("pipeline.ingest.to_stack.stream", refuse)
    monkeypatch.setattr("pipeline.ingest.to_stack.read_frames", refuse)


# ------------------------------------------------------------------------------------------------------------ manners


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(colonnade: Command, verb: str) -> None:
    code, out, _ = colonnade(verb, "--help")
    assert code == 0
    assert f"colonnade {verb}" in out.replace("pytest", "colonnade")
    assert len(out.splitlines()) > 5


def test_without_a_verb_the_verbs_are_shown(colonnade: Command) -> None:
    _, out, err = colonnade()
    assert all(verb in out + err for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu", "a.tif"], "No such command"),
        (["run"], "Missing argument"),
        (["run", "a.tif"], "no output folder; give one with -o FOLDER"),
        (["run", "a.tif", "job.yaml", "-o", "x"], "expected one job file, or sources without one"),
        (["run", "nothing.tif", "-o", "out"], "no such file"),
        (["run", "nothing.yaml"], "cannot be read"),
        (["check", "a.tif", "-o", "out", "--set", "source.samplng=1"], "did you mean 'sampling'?"),
        (["run", "a.tif", "-o", "out", "--cluster", "slurmm"], "is no cluster profile"),
        (["run", "a.tif", "-o", "out", "--redo", "everything"], "is no step; expected one of: calibrate"),
        (["ingest", "a.tif"], "colonnade ingest SOURCE… STACK.zarr"),
    ],
)
def test_what_the_user_can_mend_exits_2_without_a_trace(
    colonnade: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = colonnade(*words)
    assert code == 2
    assert said in (out + err).replace("\n", " ")
    assert "Traceback" not in err
    assert "File " not in err


def test_a_bug_exits_1_with_one_short_trace(
    colonnade: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("schemas.jobfile.template", broken)
    code, _, err = colonnade("init", tmp_path / "job.yaml")
    assert code == 1
    assert "ZeroDivisionError: ours" in err
    assert err.count("File ") <= 4


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(28, "No space left on device"), 4), (OSError(5, "Input/output error"), 1)]
)
def test_a_full_disk_is_the_sites(
    colonnade: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, code: int
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("schemas.jobfile.template", broken)
    assert colonnade("init", tmp_path / "job.yaml")[0] == code


def test_redo_is_left_out_of_what_to_repeat() -> None:
    assert without_redo(["colonnade", "run", "process", "--redo", "process", "-o", "x"]) == [
        "colonnade", "run", "process", "-o", "x",
    ]  # fmt: skip
    assert without_redo(["run", "--redo=drift", "a"]) == ["run", "a"]


# -------------------------------------------------------------------------------------------------- init, check, plan


def test_init_writes_a_job_that_loads_and_never_overwrites(colonnade: Command, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    code, out, _ = colonnade("init", path, "--source", "a.tif")
    assert code == 0
    assert "colonnade check" in out
    assert load_job(path).movies[0].source == str(tmp_path / "a.tif")
    path.write_text("mine")
    code, _, err = colonnade("init", path)
    assert (code, path.read_text()) == (2, "mine")
    assert "exists; choose another name" in err


def test_check_lists_all_problems_and_computes_nothing(
    colonnade: Command, tiny_movie: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_computing(monkeypatch)
    second = tmp_path / "second.tif"
    tifffile.imwrite(second, np.zeros((3, 8, 8), np.uint16), photometric="minisblack")
    job = tmp_path / "job.yaml"
    job.write_text(
        f"movies:\n  - source: {tiny_movie}\n    set: {{source.frames: [90, 99]}}\n"
        f"  - source: {second}\n    set: {{segment.model: nothing}}\noutput: {tmp_path / 'out'}\n"
    )
    code, _, err = colonnade("check", job, *options([i for i in quick if "segment" not in i]))
    assert code == 2
    assert "2 problem(s)" in err
    assert "source.frames is [90, 99], but tiny has 8 frames" in err
    assert "no weights 'nothing'" in err
    assert not (tmp_path / "out").exists()


def test_check_of_a_good_job(colonnade: Command, tiny_movie: Path, quick: list[str], tmp_path: Path) -> None:
    code, out, _ = colonnade("check", tiny_movie, "-o", tmp_path / "out", *options(quick))
    assert code == 0
    assert "tiny: 8 x 64 x 64 uint16, 0.2 Å/px" in out
    assert "no problem found" in out


def test_check_knows_that_a_halo_is_too_small(
    colonnade: Command, tiny_movie: Path, quick: list[str], tmp_path: Path
) -> None:
    given = [*options(quick), "--set", "segment.halo=9"]
    code, _, err = colonnade("check", tiny_movie, "-o", tmp_path / "out", *given)
    assert code == 2
    assert "segment.halo is 9 px; the network of segment.model looks 23 px around" in err.replace("\n", " ")
    _, _, err = colonnade("check", tiny_movie, "-o", tmp_path / "out", *options(quick), "--set", "segment.window=40")
    assert "segment.window is 40 px; expected more than two halos of 23 px" in err.replace("\n", " ")


def test_missing_calibration_names_the_setting(colonnade: Command, tiny_movie: Path, tmp_path: Path) -> None:
    code, _, err = colonnade("check", tiny_movie, "-o", tmp_path / "out")
    assert code == 2
    assert "source.sampling" in err
    assert str(tiny_movie) in err


def test_plan_says_why_and_computes_nothing(
    colonnade: Command, tiny_movie: Path, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_computing(monkeypatch)
    monkeypatch.setattr(
        "pipeline.preflight.trial", lambda settings: {"process": 1e-6, "survey": 1e-6, "training": 1e-3}
    )
    code, out, _ = colonnade(
        "plan", tiny_movie, "-o", tmp_path / "out", "--cluster", "serial", *options(quick), "--set", "blocks.frames=3"
    )
    assert code == 0
    for word in (
        "tiny: 8 frames of 64 x 64",
        "missing",
        "blocks of 3 frames (+2 on each side)",
        "GB per task",
        "disk:",
    ):
        assert word in out, word
    assert not (tmp_path / "out" / "stacks").exists()


# ------------------------------------------------------------------------------------------------------------- ingest


def test_ingest_writes_a_stack(colonnade: Command, tiny_movie: Path, tmp_path: Path) -> None:
    target = tmp_path / "stack.zarr"
    given = ["--set", "source.sampling=0.2", "--set", "source.frame_interval=0.5", "--cluster", "serial"]
    code, out, _ = colonnade("ingest", tiny_movie, target, *given)
    assert code == 0
    assert "8 x 64 x 64 uint16" in out
    assert store.open_stack(target).shape == (8, 64, 64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stack.zarr", "tiny.tif"]
    code, _, err = colonnade("ingest", target, tmp_path / "again.zarr", "--cluster", "serial")
    assert code == 2
    assert "is a stack already" in err


def test_ingest_never_writes_over_its_last_argument(colonnade: Command, tmp_path: Path, tiny_movie: Path) -> None:
    """`colonnade ingest *.tif` without a target: the last movie must survive."""
    last = tmp_path / "z.tif"
    last.write_bytes(tiny_movie.read_bytes())
    code, _, err = colonnade("ingest", tiny_movie, last, "--set", "source.sampling=0.2", "--cluster", "serial")
    assert code == 2
    assert "is a file; expected the stack to write" in err.replace("\n", " ")
    assert last.read_bytes() == tiny_movie.read_bytes()


# ---------------------------------------------------------------------------------------------------------------- run


def test_a_run_ends_with_0_and_resumes_without_computing(
    colonnade: Command, tiny_movie: Path, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    words = ["run", tiny_movie, "-o", output, "--cluster", "serial", *options(quick), "--set", "blocks.frames=4"]
    code, out, err = colonnade(*words)
    assert code == 0, err
    assert "tiny: 8 frames" in out
    assert {"tiny.zarr", "stacks", "user.log", "debug.log", "ledger"} <= {p.name for p in output.iterdir()}
    assert [p.name for p in output.glob("*.zarr")] == ["tiny.zarr"]

    code, out, _ = colonnade("status", output)
    assert code == 0
    assert "tiny" in out
    assert "complete" in out

    before = {p: p.stat().st_mtime_ns for p in (output / "parts").rglob("*.npz")}
    no_computing(monkeypatch)
    monkeypatch.setattr("pipeline.story.graph.stream", lambda *a, **k: iter(()))
    assert colonnade(*words)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in (output / "parts").rglob("*.npz")} == before


def test_status_knows_of_movies_that_wait(
    colonnade: Command, tiny_movie: Path, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise ResourceError("the first movie already stops the run")

    other = tiny_movie.with_name("other.tif")
    other.write_bytes(tiny_movie.read_bytes())
    monkeypatch.setattr("pipeline.story.run_movie", refuse)
    output = tmp_path / "out"
    assert colonnade("run", tiny_movie, other, "-o", output, "--cluster", "serial", *options(quick))[0] == 4
    code, out, _ = colonnade("status", output)
    assert code == 0
    assert "2 movies, 2 waiting" in out


def test_a_quarantined_file_makes_it_3(colonnade: Command, tiny_movie: Path, quick: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.tif"
    bad.write_bytes(tiny_movie.read_bytes()[:20_000])
    output = tmp_path / "out"
    code, out, _ = colonnade("run", tiny_movie, bad, "-o", output, "--cluster", "serial", *options(quick))
    assert code == 3
    assert "bad: QUARANTINED: " in out
    assert "1 of 2 movies quarantined" in out
    assert store.attributes_of(output / "tiny.zarr")["state"] == "complete"


def test_a_folder_in_use_makes_it_4(colonnade: Command, tiny_movie: Path, quick: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Lease(output / "ledger"):
        code, _, err = colonnade("run", tiny_movie, "-o", output, "--cluster", "serial", *options(quick))
    assert code == 4
    assert f"is in use by process {os.getpid()}" in err
    assert "To go on:" in err


def test_a_run_is_never_written_over_its_source(
    colonnade: Command, tiny_movie: Path, quick: list[str], tmp_path: Path
) -> None:
    given = ["--set", "source.sampling=0.2", "--set", "source.frame_interval=0.5", "--cluster", "serial"]
    colonnade("ingest", tiny_movie, tmp_path / "movie.zarr", *given)
    code, _, err = colonnade("run", tmp_path / "movie.zarr", "-o", tmp_path, "--cluster", "serial", *options(quick))
    assert code == 2
    assert "is a stack; a run would be written there" in err.replace("\n", " ")
    assert store.open_stack(tmp_path / "movie.zarr").shape == (8, 64, 64)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_and_says_how_to_go_on(
    tiny_movie: Path, quick: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "out"
    words = ["run", str(tiny_movie), "-o", str(output), "--cluster", "serial", *options(quick)]
    words += ["--set", "denoise.weights=scratch", "--set", "denoise.steps=100000"]
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(output.glob("ledger/claim-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:  # within a long task of the serial profile a second signal ends it
            process.send_signal(number)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 128 + number
    if "stopped by signal" in said:
        assert "To go on:" in said
    claims = [json.loads(p.read_text()) for p in output.glob("ledger/claim-*.json")]
    assert len(claims) == 1
