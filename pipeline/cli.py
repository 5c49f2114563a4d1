"""The ``colonnade`` command: one thin verb per thing a user does."""

from __future__ import annotations

import errno
import logging
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from pipeline.cli_cluster import cancel, cluster_app, submit
from pipeline.cli_models import models
from pipeline.cli_run import Signals, logs, resumable, without_redo
from schemas.errors import ColonnadeError, ResourceError, SettingsError

app = typer.Typer(
    help="Low-dose electron-microscopy movies to queryable atomic columns.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(stderr=True, soft_wrap=True)
out = Console(soft_wrap=True, highlight=False)

AGAIN = "run the same command again to go on"
DONE, BUG, USER, QUARANTINED, SITE = 0, 1, 2, 3, 4

SetOption = Annotated[list[str] | None, typer.Option("--set", help="a setting, section.key=value; may be repeated")]
ClusterOption = Annotated[
    str | None, typer.Option("--cluster", help="local, serial, cuda, slurm …, tcp://host:port, or a profile file")
]
OutputOption = Annotated[Path | None, typer.Option("-o", "--output", help="folder of the runs")]
SourcesArgument = Annotated[list[str], typer.Argument(help="a job file (.yaml), or movie files, folders and globs")]


def main() -> None:
    """Entry point: errors that a user can mend are printed without a trace."""
    try:
        # Outside of its standalone mode click returns the code of an Exit instead of raising it.
        sys.exit(app(standalone_mode=False) or DONE)
    except ColonnadeError as error:
        console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False, highlight=False)
        sys.exit(SITE if isinstance(error, ResourceError) else USER)
    except typer.Abort:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            console.print(f"ResourceError: {error}; make room or choose another folder, then repeat", markup=False)
            sys.exit(SITE)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            console.print(f"ResourceError: memory ran out ({error}); give workers more, then repeat", markup=False)
            sys.exit(SITE)
        if _is_lost(error):
            console.print(f"ResourceError: the scheduler does not answer ({error}); {AGAIN}", markup=False)
            sys.exit(SITE)
        if type(error).__module__.startswith(("click", "typer")):
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            console.print(message, markup=False)
            sys.exit(USER)
        _print_bug(error)
        sys.exit(BUG)


def _is_lost(error: Exception) -> bool:
    """Whether it was Dask's scheduler that did not answer, at whatever moment it was asked."""
    from distributed.comm import CommClosedError

    # Dask's own time-outs are bare OSErrors.
    return isinstance(error, CommClosedError) or (
        type(error) is OSError and error.errno is None and "://" in str(error)
    )


def _print_bug(error: Exception) -> None:
    """One trace, trimmed to our own code; the log holds all of it."""
    frames = traceback.extract_tb(error.__traceback__)
    root = str(Path(__file__).resolve().parent.parent)
    ours = [frame for frame in frames if frame.filename.startswith(root) and "site-packages" not in frame.filename]
    console.print("[bold red]This is a bug of ours[/]; please report it with debug.log:")
    console.print("".join(traceback.format_list(ours[-4:] or frames[-4:])).rstrip(), markup=False, highlight=False)
    console.print(f"{type(error).__name__}: {error}", markup=False, highlight=False)


# ------------------------------------------------------------------------------------------------------------ jobs


def _job(sources: list[str], output: Path | None, overrides: list[str] | None) -> Any:
    """A job from a job file, or from sources and settings on the command line."""
    from schemas.jobfile import load_job, parse_overrides, validate

    files = [source for source in sources if source.lower().endswith((".yaml", ".yml"))]
    changes = list(overrides or [])
    if files:
        if len(sources) > 1:
            raise SettingsError(f"{sources} holds a job file and more; expected one job file, or sources without one")
        return load_job(Path(files[0]), changes + ([f"output={Path(output).resolve()}"] if output else []))
    if output is None:
        raise SettingsError("no output folder; give one with -o FOLDER, or name a job file")
    absolute = [str(Path.cwd() / Path(source).expanduser()) for source in sources]
    # Each file that is named stands for itself; single frames of one folder still form one movie.
    return validate({**parse_overrides(changes), "movies": [{"source": absolute}], "output": str(output.resolve())})


@app.command()
def run(
    sources: SourcesArgument,
    output: OutputOption = None,
    overrides: SetOption = None,
    cluster: ClusterOption = None,
    redo: Annotated[str | None, typer.Option(help="compute this step and all after it again")] = None,
) -> None:
    """Process movies; what an earlier run finished is used."""
    from cluster import Interrupted, connect
    from pipeline import plan
    from pipeline.progress import display
    from pipeline.story import run as run_job
    from schemas.profiles import load_profile

    job = _job(sources, output, overrides)
    if redo is not None and redo not in plan.STEPS:
        raise SettingsError(f"--redo {redo!r} is no step; expected one of: {', '.join(plan.STEPS)}")
    profile = load_profile(cluster)
    again = shlex.join(without_redo(sys.argv))
    with logs(job.output), Signals() as signals:
        logging.getLogger("colonnade").info("run: %s", shlex.join(sys.argv))
        workers = connect(profile, job.output / "cluster", signals.stop)
        try:
            with workers as client, display(console) as progress, resumable(again, signals, console):
                outcomes = run_job(
                    job, client=client, device=profile.device, redo=redo, progress=progress, stop=signals.stop
                )
        except Interrupted as error:
            console.print(f"{error}, by signal {signals.number}. To go on:", again, markup=False)
            raise typer.Exit(128 + signals.number) from None
    raise typer.Exit(_tell(outcomes))


def _tell(outcomes: list[Any]) -> int:
    """Print what became of each movie; the exit code."""
    logger = logging.getLogger("colonnade")
    for outcome in outcomes:
        if outcome.status == "complete":
            text = f"{outcome.movie}: {outcome.frames} frames, {outcome.columns} columns"
            text += f", {outcome.particles} particles" if outcome.particles else ""
            text += f", {outcome.dropped} frames flagged" if outcome.dropped else ""
            text += f", {outcome.seconds:.1f} s -> {outcome.path}"
        else:
            text = f"{outcome.movie}: QUARANTINED: {outcome.reason}"
        logger.info(text)
        out.print(text, markup=False)
    bad = sum(outcome.status != "complete" for outcome in outcomes)
    if bad:
        out.print(f"{bad} of {len(outcomes)} movies quarantined; mend them and run the same command again")
    return QUARANTINED if bad else DONE


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="job file to write")] = Path("job.yaml"),
    sources: Annotated[list[str] | None, typer.Option("--source", help="movie to name in it")] = None,
) -> None:
    """Write a commented job file with every setting and its default."""
    from schemas.jobfile import template

    if path.exists():
        raise SettingsError(f"{path} exists; choose another name, or remove it first")
    path.write_text(template(sources or ["movie.tif"]))
    out.print(f"wrote {path}; edit it, then: colonnade check {path}", markup=False)


@app.command()
def check(
    sources: SourcesArgument, output: OutputOption = None, overrides: SetOption = None, cluster: ClusterOption = None
) -> None:
    """Validate settings, sources and environment without computing; lists all problems."""
    from pipeline.cli_cluster import check_cluster
    from pipeline.preflight import problems_of
    from schemas.profiles import load_profile

    job = _job(sources, output, overrides)
    profile = load_profile(cluster)
    found, facts = problems_of(job)
    if cluster is not None and not found:
        facts = [*facts, *check_cluster(profile, job.output)]
    for fact in facts:
        out.print(fact, markup=False)
    if found:
        raise SettingsError(f"{len(found)} problem(s)\n  " + "\n  ".join(found))
    out.print("no problem found")


@app.command()
def plan(
    sources: SourcesArgument,
    output: OutputOption = None,
    overrides: SetOption = None,
    cluster: ClusterOption = None,
    pilot: Annotated[bool, typer.Option("--pilot", help="compute a few blocks there and forecast from them")] = False,
) -> None:
    """Show blocks, windows, memory, time, bytes and files, and why each block runs; computes nothing but a pilot."""
    from cluster.local import size
    from pipeline.cli_cluster import run_pilot
    from pipeline.preflight import print_plan
    from schemas.profiles import load_profile

    job = _job(sources, output, overrides)
    profile = load_profile(cluster)
    if pilot:
        run_pilot(job, profile, console)
        return
    workers, memory = size(profile) if profile.kind == "local" else (profile.workers or 1, profile.memory)
    print_plan(job, out, workers=workers, memory=memory)


@app.command()
def ingest(
    sources: Annotated[list[str], typer.Argument(help="files, folders or globs, then the stack (or a folder)")],
    overrides: SetOption = None,
    on_error: Annotated[str, typer.Option(help="a damaged file: stop or quarantine")] = "stop",
    cluster: ClusterOption = None,
) -> None:
    """Copy movies into chunked, calibrated Zarr stacks: colonnade ingest SOURCE… STACK.zarr."""
    from cluster import connect
    from pipeline.patience import Stopped
    from pipeline.preflight import ingest_all
    from pipeline.progress import display
    from schemas.profiles import load_profile

    if len(sources) < 2:
        raise SettingsError("expected sources and a target: colonnade ingest SOURCE… STACK.zarr")
    target = Path(sources[-1])
    job = _job(sources[:-1], target.parent, [f"source.on_error={on_error}", *(overrides or [])])
    with connect(load_profile(cluster)) as client, display(console) as progress, Signals() as signals:
        try:
            lines, bad = ingest_all(job, target, client=client, progress=progress, stop=signals.stop)
        except Stopped:
            again = shlex.join(sys.argv)
            console.print(
                f"stopped by signal {signals.number}; what is done is kept. To go on:\n  {again}", markup=False
            )
            raise typer.Exit(128 + signals.number) from None
    for line in lines:
        out.print(line, markup=False)
    raise typer.Exit(QUARANTINED if bad else DONE)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="folder of the runs")],
    monitor: Annotated[bool, typer.Option("--monitor", help="again and again, until all is done or stopped")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="seconds between two looks of --monitor")] = 5.0,
) -> None:
    """How far a job is, from the files alone."""
    from cluster.pool import describe, is_queued
    from pipeline.results import status as state
    from pipeline.results.monitor import watch

    site = (folder.parent if folder.suffix == ".zarr" else folder) / "cluster"
    if monitor:
        watch(folder, out, interval=interval, ask=lambda: (describe(site), is_queued(site)))
        return
    for line in (lines := describe(site)):
        out.print(line, markup=False)
    try:
        out.print(state.as_text(state.status(folder)), markup=False)
    except SettingsError:
        if not lines:
            raise
        out.print(f"{folder}: no movie has begun", markup=False)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="a run, FOLDER/<movie>.zarr, or a folder of runs")],
    count: Annotated[int, typer.Option("--blocks", min=0, help="random cuts of each run to compute again")] = 20,
    seed: Annotated[int, typer.Option(help="of the choice")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Compute random frames of finished runs again, with another cut, and read every checksum."""
    from pipeline.results.open import find_runs
    from pipeline.verify import as_text
    from pipeline.verify import verify as verify_run

    wrong = False
    runs = find_runs(path)
    if not runs:
        raise SettingsError(f"{path} holds no run; expected FOLDER, or FOLDER/<movie>.zarr, of `colonnade run`")
    for run_path in runs:
        try:
            done = verify_run(run_path, count=count, seed=seed, device=device)
        except ColonnadeError as error:  # the others are looked at all the same
            wrong = True
            out.print(f"{run_path}: not verified: {error}", markup=False)
            continue
        wrong |= bool(done.problems)
        out.print(as_text(run_path, done), markup=False)
    raise typer.Exit(QUARANTINED if wrong else DONE)


@app.command()
def query(
    runs: Annotated[list[str], typer.Argument(help="one or more runs or folders of runs, then the condition")],
    select: Annotated[str | None, typer.Option(help="variables to show, separated by commas")] = None,
    table: Annotated[str | None, typer.Option(help="frames, columns or particles; default: by the names used")] = None,
    form: Annotated[str, typer.Option("--format", help="table, csv, parquet or netcdf")] = "table",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="file to write; csv may go to the screen")
    ] = None,
    limit: Annotated[int, typer.Option(help="most rows that --format table shows")] = 20,
) -> None:
    """Rows of a run that meet a condition: colonnade query RUN "column_count > 50 and snr > 2"."""
    from pipeline.results import export
    from pipeline.results import query as queries

    *paths, last = runs
    expression = last if paths and not Path(last).exists() else None
    answer = queries.query(
        paths if expression else runs,
        expression,
        select=[name.strip() for name in select.split(",")] if select else None,
        table=cast(Any, table),
    )
    if output is not None and form != "table":
        out.print(f"wrote {export.write(answer, output, form)} rows to {output}", markup=False)
    elif form == "csv":
        export.write_csv(answer, sys.stdout)
    elif form == "table":
        out.print(export.as_text(answer, limit=limit), markup=False)
    else:
        raise SettingsError(f"--format {form} needs a file; add -o FILE")


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="a run, or a folder of runs")],
    output: OutputOption = None,
    frames: Annotated[str | None, typer.Option(help="frames to show, separated by commas")] = None,
) -> None:
    """Write one self-contained HTML page per run."""
    from pipeline.results.report import report as write

    try:
        shown = [int(frame) for frame in frames.split(",")] if frames else None
    except ValueError:
        raise SettingsError(f"--frames {frames!r}; expected frame numbers separated by commas, such as 0,17") from None
    out.print(f"wrote {write(path, output, frames=shown)}", markup=False)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="folder to write")] = Path("demo"),
    cluster: ClusterOption = None,
) -> None:
    """Simulate a movie, process it on this machine, score the result, and write a report."""
    from pipeline.demo import run_demo

    run_demo(folder, profile_name=cluster, console=console, out=out)


app.command()(submit)
app.command()(cancel)
app.add_typer(cluster_app)
app.add_typer(models)

if __name__ == "__main__":
    main()
