"""Commands for batch systems: submit a night's job, cancel it, show what would be submitted, try a cluster out."""

from __future__ import annotations

import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from schemas.errors import ResourceError, SettingsError
from schemas.profiles import Profile
from schemas.settings import Job

cluster_app = typer.Typer(name="cluster", help="Batch systems.", no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False)

CLOCK_SKEW = 5.0  # s between two machines from which on times in the records mislead


def batch_profile(name: str) -> Profile:
    """A profile of a batch system; ``SettingsError`` for any other."""
    from schemas.profiles import BATCH_KINDS, load_profile

    profile = load_profile(name)
    if not profile.is_batch:
        raise SettingsError(
            f"--cluster {name!r} is of kind {profile.kind}; expected a batch system ({', '.join(BATCH_KINDS)}); for "
            "others use `colonnade run`"
        )
    return profile


def submit(
    job: Annotated[Path, typer.Argument(help="job file (.yaml)")],
    cluster: Annotated[str, typer.Option("--cluster", help="slurm, pbs, lsf, sge, or a profile file")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="a setting, section.key=value")] = None,
) -> None:
    """Submit a job to a batch system, driver and all; it ends by itself, and continues after its walltime."""
    from cluster import batch, pool
    from pipeline.preflight import problems_of
    from schemas.jobfile import load_job
    from schemas.profiles import BATCH_KINDS

    profile, wanted = batch_profile(cluster), load_job(job, overrides or [])
    found, _ = problems_of(wanted)
    if found:
        raise SettingsError(f"{len(found)} problem(s)\n  " + "\n  ".join(found))
    folder = wanted.output.resolve() / "cluster"
    before = pool.read_state(folder / pool.DRIVER_FILE)
    if before and before["job"] in (batch.states_of(profile, [before["job"]]) or {}):
        raise SettingsError(
            f"job {before['job']} works on {wanted.output} already; `colonnade status {wanted.output}` tells how far, "
            f"`colonnade cancel {wanted.output}` ends it"
        )
    place = cluster if cluster in BATCH_KINDS else str(Path(cluster).resolve())
    command = [sys.executable, "-m", "pipeline.cli", "run", str(job.resolve()), "--cluster", place]
    for change in overrides or []:
        command += ["--set", change]
    script = batch.driver_script(profile, command, folder=Path.cwd(), logs=folder / "logs")
    number = batch.submit(profile, script, folder)
    state = {"kind": profile.kind, "job": number, "command": shlex.join(command), "submitted": time.time()}
    pool.write_state(folder / pool.DRIVER_FILE, state)
    out.print(f"submitted as job {number} of {profile.kind}; its log: {folder / 'logs'}", markup=False)
    out.print(f"  colonnade status {wanted.output}\n  colonnade cancel {wanted.output}", markup=False)


def cancel(folder: Annotated[Path, typer.Argument(help="folder of the runs")]) -> None:
    """Stop a submitted job; what is done is kept, and submitting it again goes on."""
    from cluster import batch, pool

    driver, *pools = (pool.read_state(folder / "cluster" / name) for name in (pool.DRIVER_FILE, *pool.WORKERS_FILES))
    if not driver:
        raise SettingsError(f"{folder} holds no submitted job; expected the output folder of `colonnade submit`")
    profile = Profile(kind=driver["kind"])
    workers = [worker["job"] for state in pools for worker in state.get("workers", [])]
    batch.cancel(profile, [driver["job"], *workers])
    out.print(f"cancelled job {driver['job']} of {driver['kind']}; what is done is kept", markup=False)


@cluster_app.command()
def show(name: Annotated[str, typer.Argument(help="slurm, pbs, lsf, sge, htcondor, or a profile file")]) -> None:
    """Print the batch scripts that a profile makes, of a worker and of the driver; nothing is submitted."""
    from cluster import batch

    profile, logs = batch_profile(name), Path("OUTPUT/cluster/logs")
    for one in profile.pools:
        out.print(
            f"# --- worker, {', '.join(one.resources)}", batch.worker_script(one, logs=logs), sep="\n", markup=False
        )
    if profile.kind != "htcondor":
        words = ["colonnade", "run", "JOB.yaml", "--cluster", name]
        out.print(
            "# --- driver", batch.driver_script(profile, words, folder=Path.cwd(), logs=logs), sep="\n", markup=False
        )


def run_pilot(job: Job, profile: Profile, console: Console) -> None:
    """Compute a few blocks where the profile says, and print what the whole job will take there."""
    from cluster import Interrupted, batch, connect
    from pipeline.cli_run import Signals
    from pipeline.forecast import clock, forecast, left_of, print_forecast
    from pipeline.job import movies_of
    from pipeline.patience import Stopped
    from pipeline.pilot import beside, measure
    from pipeline.preflight import plan_of
    from pipeline.progress import display
    from pipeline.results.status import duration

    left = left_of([plan_of(job, movie) for movie in movies_of(job)[0]])
    if not left:
        out.print("nothing is left to do")
        return
    # One worker tells what a block costs; a whole pool would wait in the queue for it.
    few = profile.model_copy(update={"workers": 1, "cpu": None}) if profile.is_batch else profile
    with beside(job.output) as folder, Signals() as signals:
        try:
            # The logs of worker jobs outlive the folder: they say why none came.
            with connect(few, job.output / "cluster" / "pilot", signals.stop) as client, display(console) as progress:
                found = measure(
                    left[0], folder, client=client, device=profile.device, progress=progress, stop=signals.stop
                )
        except (Interrupted, Stopped):
            console.print(f"stopped by signal {signals.number}; nothing of the pilot is kept", markup=False)
            raise typer.Exit(128 + signals.number) from None
    workers = (profile.workers or 1) if profile.is_batch else found.workers
    ahead = forecast(left, found, workers)
    print_forecast(out, found, left, ahead, workers)
    lines = batch.request(profile, workers=workers, seconds=ahead.seconds, memory=ahead.memory, driver=found.driver)
    out.print("request:", *lines, sep="\n  ", markup=False)
    done = clock(ahead.seconds, datetime.now())
    out.print(f"done at about {done}: {duration(ahead.seconds)} once {workers} worker(s) run", markup=False)


def check_cluster(profile: Profile, output: Path) -> list[str]:
    """Start one worker where the profile says and report from inside it; ``ResourceError`` with the remedy."""
    from cluster import connect
    from cluster.checks import report_from

    with connect(profile.model_copy(update={"workers": 1, "cpu": None}), output / "cluster") as client:
        if client is None:
            return ["cluster: serial, in this process"]
        token = output / "cluster" / "reachable"
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text("here")
        found = next(iter(client.run(report_from, str(token)).values()))
        skew = abs(found["time"] - time.time())
    token.unlink()
    problems = []
    if not found["reachable"]:
        problems.append(f"the worker on {found['host']} does not see {output}: use a folder on the shared file system")
    if not found["scratch"]:
        problems.append(f"the worker on {found['host']} cannot write to {found['folder']}: set local_directory")
    if skew > CLOCK_SKEW:
        problems.append(f"the clock of {found['host']} is off by {skew:.0f} s: times in the records will mislead")
    if problems:
        raise ResourceError("\n  ".join(problems))
    gpu = "a GPU" if found["cuda"] else "no GPU"
    return [f"cluster: a worker on {found['host']} runs this copy, sees {gpu}, and reaches {output}"]
