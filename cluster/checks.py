"""Before work is sent: do the workers exist, run this very copy, and own what they were asked to own?"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import dask.config
from distributed import Client

import schemas
from schemas.errors import ResourceError
from schemas.profiles import Profile

log = logging.getLogger("colonnade")

Answer = TypeVar("Answer")

PACKAGES = ("schemas", "pipeline", "cluster")
ATTEMPTS = 5  # at asking all workers, any of which may be lost just then
LIBRARIES = ("colonnade", "dask", "distributed", "numpy", "torch", "xarray", "zarr")


def code_digest() -> str:
    """Digest of the source files of our packages, as imported here."""
    root = Path(schemas.__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def describe_process() -> dict[str, Any]:
    """Versions, code and device of the process that calls it."""
    import torch

    return {
        "python": sys.version.split()[0],
        "code": code_digest(),
        "root": str(Path(schemas.__file__).resolve().parent.parent),
        "cuda": torch.cuda.is_available(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def report_from(token: str) -> dict[str, Any]:
    """What a worker finds: its host and clock, whether it sees the file `token` and may write to its scratch folder."""
    import torch

    folder = Path(dask.config.get("temporary-directory") or tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=folder):
            scratch = True
    except OSError:
        scratch = False
    return {
        "host": socket.gethostname(),
        "time": time.time(),
        "reachable": Path(token).is_file(),
        "folder": str(folder),
        "scratch": scratch,
        "cuda": torch.cuda.is_available(),
    }


def asked(client: Client, question: Callable[[], Answer]) -> Answer:
    """What a call returns that Dask sends to all workers: it raises ``OSError`` if one of them is lost just then."""
    for _ in range(ATTEMPTS - 1):
        try:
            return question()
        except TimeoutError:  # an OSError to Python
            raise
        except OSError as error:
            if client.status != "running":  # the scheduler is gone
                raise
            log.warning("a worker was lost while all were asked (%s); they are asked again", error)
            time.sleep(1.0)
    return question()


def check_workers(client: Client, profile: Profile) -> None:
    """Wait for a worker, then compare every worker with this process; all differences at once."""
    wanted = profile.workers or 1

    def described() -> dict[str, dict[str, Any]]:
        client.wait_for_workers(wanted, timeout=profile.start_timeout)
        return dict(client.run(describe_process))

    try:
        found = asked(client, described)
    except TimeoutError:
        raise ResourceError(
            f"{len(client.nthreads())} of {wanted} worker(s) came within {profile.start_timeout:g} s; "
            "see the workers' log for why the others did not start"
        ) from None
    ours, declared = describe_process(), _resources(client)
    differences = []
    for address, theirs in found.items():
        # Processes started here from the same folder run the same files by construction.
        same_place = profile.kind in ("local", "cuda") and theirs["root"] == ours["root"]
        known = {**theirs, "code": ours["code"]} if same_place else theirs
        device = "cpu" if profile.cpu is not None and "GPU" not in declared.get(address, {}) else profile.device
        differences += differences_of(known, ours, place=address, device=device)
    if differences:
        raise ResourceError(
            "workers differ from this process; install the same copy everywhere:\n  " + "\n  ".join(differences)
        )
    if missing := [address for address, has in declared.items() if "CPU" not in has and "GPU" not in has]:
        raise ResourceError(
            f"worker(s) {', '.join(missing)} declare no resources, so no task would ever start; "
            'start them with `dask worker … --resources "CPU=1" --nthreads 1`'
        )


def differences_of(theirs: dict[str, Any], ours: dict[str, Any], *, place: str, device: str) -> list[str]:
    """What of another process is not as here, a line each."""
    found = [
        f"{place}: {key} is {theirs[key]}, here {value} (imported from {theirs['root']})"
        for key, value in ours.items()
        if key not in ("root", "cuda") and theirs[key] != value
    ]
    if device == "cuda" and not theirs["cuda"]:
        found.append(f"{place}: a GPU was asked for, but torch sees none")
    return found


def _resources(client: Client) -> dict[str, dict[str, float]]:
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return {address: dict(info.get("resources") or {}) for address, info in workers.items()}
