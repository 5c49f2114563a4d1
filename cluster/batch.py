"""Batch systems: the scripts of workers and drivers, and how to submit, ask for and cancel jobs.

dask-jobqueue writes the scripts, because it knows the dialects.
"""

from __future__ import annotations

import logging
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import dask.config
from dask.utils import parse_bytes

from schemas.errors import ResourceError, SettingsError
from schemas.profiles import Profile

log = logging.getLogger("colonnade")

# Of a worker for which neither the profile nor jobqueue.yaml says.
DEFAULTS = {"memory": "4GB", "cores": 1, "walltime": "01:00:00"}
# How a job knows its own number, as its submission was answered: the name of its worker.
JOB_NUMBER = {"slurm": "$SLURM_JOB_ID", "pbs": "${PBS_JOBID%%.*}", "lsf": "$LSB_JOBID", "sge": "$JOB_ID"}
COMMAND_SECONDS = 60.0
# Workers leave on their own terms before the batch system ends them, and not all at once: results that one holds are
# fetched within seconds, but a whole pool that ends at one moment leaves nobody to work on.
LIFETIME, STAGGER, LEAST_LIFETIME = 0.9, 0.1, 600.0
# What is asked for over what was seen, and what Dask's process beside a worker takes [GB].
MARGIN, NANNY_MEMORY = 1.25, 0.25
_ENDED = {
    "COMPLETED", "COMPLETING", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
    "OUT_OF_MEMORY",
}  # fmt: skip
DEATH_TIMEOUT = 60  # s after which a worker that finds no scheduler ends its job
# A job that is submitted from within another must not inherit what that one was given.
_INHERITED = re.compile(r"^(SLURM_(?!CONF$|CLUSTERS$)|SRUN_|PMI_|PBS_(?!CONF_FILE$|SERVER$|DEFAULT$)|LSB_|PE_)")


def job_class(kind: str) -> Any:
    """The dialect of a batch system, from dask-jobqueue."""
    import dask_jobqueue as dialects

    names = {"slurm": "SLURM", "pbs": "PBS", "lsf": "LSF", "sge": "SGE", "htcondor": "HTCondor"}
    return getattr(dialects, f"{names[kind]}Cluster").job_cls


def seconds_of(walltime: str) -> float:
    """A walltime in seconds, as Slurm reads it: m, m:ss, h:mm:ss, d-h, d-h:mm, d-h:mm:ss."""
    days, dash, clock = walltime.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not dash and len(parts) < 3:  # minutes come first, unless hours do
        parts = [0, *parts]
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _wanted(profile: Profile, name: str, value: Any) -> Any:
    """What the profile says, else the user's jobqueue.yaml, else our default."""
    return value or dask.config.get(f"jobqueue.{profile.kind}.{name}", None) or DEFAULTS[name]


def _job(profile: Profile, *, name: str, scheduler: str, logs: Path, walltime: str, **options: Any) -> Any:
    batch = profile.batch
    given = {"queue": batch.queue, "account": batch.account, "walltime": walltime, **options}
    if profile.kind == "htcondor":  # it has neither queues nor walltimes, but wants to know of the disk
        for word in ("queue", "account", "walltime"):
            given.pop(word)
        given["disk"] = "1GB"
    if profile.kind == "lsf":
        given["project"] = given.pop("account")
        given["walltime"] = walltime.rpartition(":")[0] if walltime.count(":") == 2 else walltime  # it has no seconds
    known = {word: value for word, value in given.items() if value is not None}
    local = str(profile.local_directory) if profile.local_directory else None
    if re.search(r"\s", str(logs) + (local or "") + sys.executable):
        raise SettingsError(
            f"a path holds white space, which batch scripts part: {logs}, {local or ''}, {sys.executable}; use others"
        )
    return job_class(profile.kind)(
        scheduler=scheduler, name=name, job_name=name, cores=_wanted(profile, "cores", batch.cores),
        processes=1, python=sys.executable, log_directory=str(logs), local_directory=local, interface=batch.interface,
        death_timeout=DEATH_TIMEOUT, **known,
    )  # fmt: skip


def worker_script(profile: Profile, *, scheduler: str = "tcp://DRIVER:PORT", logs: Path, settings: str = "…") -> str:
    """The batch script of one worker. settings: Dask's, serialised."""
    batch = profile.batch
    extra = ["--resources", f'"{_declared(profile)}"']
    walltime = str(_wanted(profile, "walltime", batch.walltime))
    if (span := seconds_of(walltime)) >= LEAST_LIFETIME:
        extra += ["--lifetime", f"{LIFETIME * span:.0f}s", "--lifetime-stagger", f"{STAGGER * span:.0f}s"]
    directives = list(batch.directives)
    if profile.kind == "slurm":
        # A worker that was preempted is replaced as soon as it ends; put back by Slurm too it would be one too many.
        directives = ["--no-requeue", *directives, *([f"--gres=gpu:{batch.gpus}"] if batch.gpus else [])]
    prologue = [*batch.prologue, "export OMP_NUM_THREADS=1", f"export DASK_INTERNAL_INHERIT_CONFIG={settings}"]
    memory = _wanted(profile, "memory", f"{profile.memory:g}GB" if profile.memory else None)
    made = _job(
        profile, name="colonnade-worker", scheduler=scheduler, logs=logs, walltime=walltime, memory=memory,
        worker_extra_args=extra, job_extra_directives=directives or None, job_script_prologue=prologue,
    )  # fmt: skip
    # One thread computes, whatever the number of cores: results must not depend on it. Names must differ.
    script = re.sub(r"--nthreads \d+", "--nthreads 1", made.job_script())
    script = re.sub(r"--memory-limit \S+", f"--memory-limit {_limit(parse_bytes(memory))}", script)
    number = JOB_NUMBER.get(profile.kind)
    return script.replace("--name colonnade-worker", f'--name "{number}"' if number else "")


def _limit(memory: float) -> str:
    """What a worker may use of the memory of its job [bytes], as Dask reads it."""
    return f"{memory / 1e9 - NANNY_MEMORY:.3f}GB"


def _declared(profile: Profile) -> str:
    return ",".join(f"{name}={number}" for name, number in profile.resources.items())


def driver_script(profile: Profile, command: list[str], *, folder: Path, logs: Path) -> str:
    """The batch script of the driver: run, and ahead of the walltime save and come back.

    USR1 is the batch system's warning: stop after the blocks in flight, then requeue. TERM is a user's cancel: stop.
    """
    batch = profile.batch
    if profile.kind == "htcondor":
        raise SettingsError(
            "HTCondor runs no scripts of ours as drivers; start `colonnade run … --cluster PROFILE` on a submit node"
        )
    slurm = profile.kind == "slurm"
    if batch.one_allocation and not slurm:
        raise SettingsError(f"batch.one_allocation is for slurm alone; {profile.kind} starts no tasks within a job")
    directives = [f"--signal=B:USR1@{batch.warning}", "--requeue", "--open-mode=append"] if slurm else []
    made = _job(
        profile, name="colonnade-driver", scheduler="none", logs=logs, memory=f"{batch.driver_memory:g}GB",
        queue=batch.driver_queue or batch.queue, walltime=batch.driver_walltime,
        job_extra_directives=[*directives, *batch.directives, *_room(profile)] or None,
        job_directives_skip=["-n 1", "--cpus-per-task", "--mem="] if batch.one_allocation else None,
    )  # fmt: skip
    words = " ".join(_quoted(word) for word in command)
    again = 'scontrol requeue "$SLURM_JOB_ID"' if slurm else 'echo "run the same command again to go on"'
    return f"""{made.shebang}

{made.job_header}
cd {_quoted(str(folder))} || exit 4
{chr(10).join(batch.prologue)}
{words} &
child=$!
again=0
trap 'again=1; kill -TERM $child' USR1
trap 'kill -TERM $child' TERM INT
wait $child
code=$?
while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
if [ $again = 1 ] && [ $code -ge 128 ]; then {again}; fi
exit $code
"""


def _room(profile: Profile) -> list[str]:
    """What a job is asked for that holds the workers too; the driver lives on what its node's first worker leaves."""
    if not profile.batch.one_allocation:
        return []
    cores = int(_wanted(profile, "cores", profile.batch.cores))
    memory = (profile.memory or 4.0) + profile.batch.driver_memory / (profile.workers or 1)
    room = [
        f"--ntasks={profile.workers or 1}",
        f"--cpus-per-task={cores}",
        f"--mem-per-cpu={memory * 1000 / cores:.0f}M",
    ]
    return room + ([f"--gpus-per-task={profile.batch.gpus}"] if profile.batch.gpus else [])


def request(profile: Profile, *, workers: int, seconds: float, memory: float, driver: float) -> list[str]:
    """Lines that say what to ask for, as in a profile, for a job of so many seconds once its workers run.

    memory, driver: peaks of a worker and of the driver that were measured [bytes].
    """
    batch = profile.batch
    gigabytes = (math.ceil(2 * (MARGIN * peak / 1e9 + NANNY_MEMORY)) / 2 for peak in (memory, driver))
    worker_memory, driver_memory = gigabytes
    given = str(_wanted(profile, "walltime", batch.walltime)) if profile.is_batch else ""
    needed = _walltime(MARGIN * seconds / LIFETIME)
    lines = [f"workers: {workers}", f"memory: {worker_memory:g}            # GB of each; {memory / 1e9:.2f} expected"]
    if not profile.is_batch:
        return [*lines, f"# of a batch job that holds all of it: {needed}"]
    own = {} if batch.one_allocation else {"workers": (given, LIFETIME * seconds_of(given))}
    span = seconds_of(batch.driver_walltime) - batch.warning
    own["driver, workers and all" if batch.one_allocation else "driver"] = (batch.driver_walltime, max(60.0, span))
    if seconds_of(needed) < seconds_of(given) and not batch.one_allocation:
        lines.append(f'batch.walltime: "{needed}"   # shorter ones wait less; the profile says {given}')
    lines.append(f"batch.driver_memory: {driver_memory:g}   # GB; {driver / 1e9:.2f} measured")
    for who, (walltime, useful) in own.items():
        count = math.ceil(seconds / useful)
        number = {1: "one allocation", 2: "two allocations"}.get(count, f"{count} allocations")
        lines.append(f"# {who}: {number} of {walltime}")
    return lines


def _walltime(seconds: float) -> str:
    """Seconds as [d-]hh:mm:ss, rounded up to ten minutes."""
    days, minutes = divmod(10 * math.ceil(seconds / 600), 1440)
    return f"{f'{days}-' if days else ''}{minutes // 60:02d}:{minutes % 60:02d}:00"


def step_command(profile: Profile, scheduler: str) -> list[str]:
    """The command that starts all workers inside the job that this process runs in."""
    batch = profile.batch
    words = ["srun", "--overlap", f"--ntasks={profile.workers or 1}", "--kill-on-bad-exit=0"]
    words += [f"--cpus-per-task={_wanted(profile, 'cores', batch.cores)}"]
    words += [f"--gpus-per-task={batch.gpus}"] if batch.gpus else []
    words += [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, "--nthreads", "1", "--nanny"]
    words += ["--memory-limit", _limit((profile.memory or 4.0) * 1e9), "--death-timeout", str(DEATH_TIMEOUT)]
    words += ["--resources", _declared(profile)]
    words += ["--local-directory", str(profile.local_directory)] if profile.local_directory else []
    return words + (["--interface", batch.interface] if batch.interface else [])


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def submit(profile: Profile, script: str, folder: Path) -> str:
    """Hand a script to the batch system; the number of the job. ``ResourceError`` with its words if it refuses."""
    made = job_class(profile.kind)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".sh", delete=False) as file:
        file.write(script)
    environment = {name: value for name, value in os.environ.items() if not _INHERITED.match(name)}
    words = [*made.submit_command.split(), file.name]
    try:
        if made.submit_command.endswith("bsub"):  # LSF reads scripts from its standard input
            answer = _run(words[:-1], environment, Path(file.name).read_text())
        else:
            answer = _run(words, environment)
    finally:
        Path(file.name).unlink()
    pattern = r"submitted to cluster (?P<job_id>\d+)" if profile.kind == "htcondor" else made.job_id_regexp
    if (found := re.search(pattern, answer)) is None:
        raise ResourceError(f"{made.submit_command} answered {answer!r}; expected the number of the job")
    return found.group("job_id")


def cancel(profile: Profile, jobs: list[str]) -> None:
    """End jobs; ``ResourceError`` if some of them go on. Those that had ended already are no error."""
    if not jobs:
        return
    try:
        _run([*job_class(profile.kind).cancel_command.split(), *jobs], dict(os.environ))
    except ResourceError:
        states = states_of(profile, jobs)
        if states is None or any(alive(state) for state in states.values()):
            raise


def _run(words: list[str], environment: dict[str, str], text: str | None = None) -> str:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, input=text, timeout=COMMAND_SECONDS, check=False, env=environment
        )
    except FileNotFoundError:
        raise ResourceError(
            f"{words[0]} is not on this machine; run on a login node of the cluster, or use --cluster local"
        ) from None
    except subprocess.TimeoutExpired:
        raise ResourceError(f"{words[0]} did not answer within {COMMAND_SECONDS:g} s; try again later") from None
    if done.returncode:
        raise ResourceError(f"{words[0]} refused: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def alive(state: tuple[str, str] | None) -> bool:
    """Whether a job that the batch system describes so will still work; words that we do not know count as life."""
    return state is not None and state[0] not in _ENDED


def states_of(profile: Profile, jobs: list[str]) -> dict[str, tuple[str, str]] | None:
    """State and reason of each job that the batch system still has; None if it cannot be asked."""
    if profile.kind != "slurm" or not jobs:
        return None
    try:
        answer = _run(["squeue", "-h", "--me", "-o", "%i|%T|%r"], dict(os.environ))
    except ResourceError as error:
        log.debug("squeue: %s", error)
        return None
    rows = [line.split("|", 2) for line in answer.splitlines() if line.count("|") >= 2]
    return {job: (state, reason if reason != "None" else "") for job, state, reason in rows if job in jobs}


def settings_for_workers() -> str:
    """Dask's settings of this process as one word, for processes that it does not start itself."""
    return str(dask.config.serialize(dask.config.global_config))
