"""Where a job runs, apart from what it computes: site settings, one YAML file per site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from schemas.errors import SettingsError
from schemas.settings import Section

WALLTIME = r"^(\d+-)?\d+:\d\d:\d\d$"
BATCH_KINDS = ("slurm", "pbs", "lsf", "sge", "htcondor")


class Batch(Section):
    """What a batch system is asked for. What is left out comes from the user's ``jobqueue.yaml``, if there is one."""

    queue: str | None = Field(None, description="partition or queue of the workers")
    account: str | None = Field(None, description="account that is charged")
    walltime: str | None = Field(None, pattern=WALLTIME, description="of a worker, [d-]hh:mm:ss")
    cores: int | None = Field(None, ge=1, description="cores per worker; it computes on one of them")
    gpus: int = Field(0, ge=0, description="GPUs per worker; a worker uses one")
    interface: str | None = Field(None, description="network interface between driver and workers, such as ib0")
    directives: tuple[str, ...] = Field((), description="more options of the batch script, such as --constraint=a100")
    prologue: tuple[str, ...] = Field((), description="shell lines before the worker, such as module load cuda")
    driver_queue: str | None = Field(None, description="partition or queue of the driver; default: that of the workers")
    driver_walltime: str = Field(
        "12:00:00", pattern=WALLTIME, description="of the driver, which requeues itself before it ends"
    )
    driver_memory: float = Field(4.0, gt=0, description="GB of the driver")
    warning: int = Field(180, ge=60, description="seconds before its walltime at which the driver saves and requeues")
    one_allocation: bool = Field(
        False, description="slurm: driver and workers in one job, where jobs may submit no jobs; whole or not at all"
    )
    poll: float = Field(10.0, gt=0, description="seconds between two questions to the batch system")


class CpuPool(Section):
    """Workers without GPUs beside those with: they read, solve and write, and leave the GPUs to the pixels."""

    workers: int = Field(1, ge=1, description="worker jobs without a GPU")
    memory: float | None = Field(None, gt=0, description="GB that one of them may use")
    batch: Batch = Field(default_factory=Batch, description="what the batch system is asked for")


class Profile(Section):
    """A place to run. ``serial`` computes in this process, without any scheduler."""

    kind: Literal["local", "serial", "cuda", "address", "slurm", "pbs", "lsf", "sge", "htcondor"] = Field(
        "local", description="local, serial, cuda, address, or a batch system: slurm, pbs, lsf, sge, htcondor"
    )
    workers: Annotated[int, Field(ge=1)] | None = Field(
        None, description="worker processes; default: one per core that memory allows, or one per GPU"
    )
    memory: float | None = Field(None, gt=0, description="GB that one worker may use; default: the machine's share")
    address: str | None = Field(None, description="address of a running scheduler, tcp://host:port")
    dashboard: str | None = Field(None, description="host:port of Dask's dashboard; default: none")
    local_directory: Path | None = Field(None, description="fast local folder for workers' scratch files")
    start_timeout: float = Field(
        120.0, gt=0, description="seconds to wait for the first worker; of a batch system: for as long as queues are"
    )
    batch: Batch = Field(default_factory=Batch, description="what a batch system is asked for")
    cpu: CpuPool | None = Field(None, description="workers without a GPU beside those with; of batch systems")

    @model_validator(mode="after")
    def _mixed(self) -> Profile:
        if self.cpu is not None and (not self.batch.gpus or self.cpu.batch.gpus or self.batch.one_allocation):
            raise ValueError(
                f"cpu asks for workers without a GPU beside those with, but batch.gpus is {self.batch.gpus}, "
                f"cpu.batch.gpus {self.cpu.batch.gpus}, batch.one_allocation {self.batch.one_allocation}; expected "
                "batch.gpus of at least 1, cpu.batch.gpus 0, and one_allocation false"
            )
        return self

    @property
    def pools(self) -> tuple[Profile, ...]:
        """One profile for each kind of worker: those that process first."""
        if self.cpu is None:
            return (self,)
        return self, self.model_copy(update={**dict(self.cpu), "cpu": None})

    @property
    def resources(self) -> dict[str, int]:
        """What each worker declares and a task may ask for; one with a GPU does nothing else if others can."""
        if self.device != "cuda":
            return {"CPU": 1}
        return {"GPU": 1} if self.cpu is not None else {"CPU": 1, "GPU": 1}

    @property
    def device(self) -> str:
        """The device that numeric steps use."""
        return "cuda" if self.kind == "cuda" or (self.is_batch and self.batch.gpus) else "cpu"

    @property
    def is_batch(self) -> bool:
        """Whether workers are jobs of a batch system."""
        return self.kind in BATCH_KINDS


def load_profile(name: str | None) -> Profile:
    """A profile by name (local, serial, cuda, slurm …), scheduler address (tcp://…), or YAML file."""
    if name is None or name in ("local", "serial", "cuda", *BATCH_KINDS):
        return Profile.model_validate({"kind": name or "local"})
    if "://" in name:
        return Profile(kind="address", address=name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise SettingsError(
            f"{name!r} is no cluster profile; expected local, serial, cuda, {', '.join(BATCH_KINDS)}, an address such "
            "as tcp://host:8786, or a YAML file"
        )
    try:
        data = yaml.safe_load(path.read_text()) or {}
        profile = Profile.model_validate(data)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {error}") from None
    except ValidationError as error:
        found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r})" for e in error.errors()]
        raise SettingsError(f"{path}: {len(found)} problem(s)\n  " + "\n  ".join(found)) from None
    if profile.kind == "address" and not profile.address:
        raise SettingsError(f"{path}: kind is address, but address is missing; expected tcp://host:port")
    return profile
