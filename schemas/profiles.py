"""Where a job runs, apart from what it computes: site settings, one YAML file per site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError

from schemas.errors import SettingsError
from schemas.settings import Section


class Profile(Section):
    """A place to run. ``serial`` computes in this process, without any scheduler."""

    kind: Literal["local", "serial", "cuda", "address"] = Field("local", description="local, serial, cuda or address")
    workers: Annotated[int, Field(ge=1)] | None = Field(
        None, description="worker processes; default: one per core that memory allows, or one per GPU"
    )
    memory: float | None = Field(None, gt=0, description="GB that one worker may use; default: the machine's share")
    address: str | None = Field(None, description="address of a running scheduler, tcp://host:port")
    dashboard: str | None = Field(None, description="host:port of Dask's dashboard; default: none")
    local_directory: Path | None = Field(None, description="fast local folder for workers' scratch files")
    start_timeout: float = Field(120.0, gt=0, description="seconds to wait for the first worker")

    @property
    def device(self) -> str:
        """The device that numeric steps use."""
        return "cuda" if self.kind == "cuda" else "cpu"


def load_profile(name: str | None) -> Profile:
    """A profile by name (local, serial, cuda), scheduler address (tcp://…), or YAML file."""
    if name is None or name in ("local", "serial", "cuda"):
        return Profile.model_validate({"kind": name or "local"})
    if "://" in name:
        return Profile(kind="address", address=name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise SettingsError(
            f"{name!r} is no cluster profile; expected local, serial, cuda, an address such as tcp://host:8786, "
            "or a YAML file"
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
