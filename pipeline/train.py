"""The verb `train`: a specification in; weights, model card and learning curve out; here, or on one worker."""

from __future__ import annotations

import dataclasses
import difflib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from distributed import Client

from pipeline import graph
from pipeline.networks.training import training_on
from schemas.errors import SettingsError

Report = Callable[[str], None]
LOG = "train.log"
LISTEN = 1.0  # s between looks at what a worker has written


class Kind(NamedTuple):
    """Where a kind of training is found, as module:name: its function, its specification, a reader of its own."""

    train: str
    spec: str
    load: str | None = None


KINDS = {
    "columns": Kind("pipeline.networks.train_columns:train", "pipeline.networks.train_columns:ColumnTraining"),
    "particles": Kind("pipeline.networks.train_particles:train", "pipeline.networks.particle_data:ParticleSpec"),
    "species": Kind(
        "pipeline.networks.train_species:train",
        "pipeline.networks.species_spec:SpeciesSpec",
        "pipeline.networks.species_spec:load",
    ),
}


def named(path: str) -> Any:
    """What module:name stands for."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


def load_spec(what: str, path: Path | None) -> Any:
    """The specification of a training from a YAML file; without one, that of the shipped weights where there is one.

    Raises SettingsError for an unknown kind, unknown keys (with the nearest that is known) and values that do not fit.
    """
    if what not in KINDS:
        raise SettingsError(f"{what!r} cannot be trained; expected one of {', '.join([*KINDS, 'denoise'])}")
    kind = KINDS[what]
    if kind.load is not None:
        if path is None:
            raise SettingsError(
                f"train {what} needs a specification: which material, which classes; expected a YAML file such as "
                "scripts/specs/mos2-hrtem.yaml"
            )
        return named(kind.load)(path)
    return fields_from(named(kind.spec), path) if path is not None else named(kind.spec)()


def fields_from(cls: Any, path: Path) -> Any:
    """A dataclass from a YAML file whose keys are some of its fields; lists become tuples."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read as YAML: {error}") from None
    data = {} if data is None else data
    known = {item.name: item for item in dataclasses.fields(cls)}
    if not isinstance(data, dict):
        raise SettingsError(f"{path} holds {type(data).__name__}; expected some of the fields {', '.join(known)}")
    problems = []
    for key, value in data.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            problems.append(f"{key} is no field; " + (f"did you mean {near[0]!r}?" if near else _expected(known)))
        elif not _like(value, known[key].default):
            problems.append(f"{key} is {value!r}; expected something like {known[key].default!r}")
    if problems:
        raise SettingsError(f"{path}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


def _expected(known: Any) -> str:
    return f"expected some of: {', '.join(known)}"


def _like(value: Any, default: Any) -> bool:
    """Whether a value of a file may stand for a field with this default; a whole number may stand for any number."""
    if isinstance(default, tuple):
        return isinstance(value, list) and bool(value) and all(_like(item, default[0]) for item in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return type(value) is type(default)
    return isinstance(value, int | float) if isinstance(default, float) else isinstance(value, type(default))


# -------------------------------------------------------------------------------------------------------------- work


def train(
    what: str, spec: Path | None, output: Path, *, client: Client | None, device: str, steps: int | None, report: Report
) -> str:
    """Train weights `output` (.safetensors), on a worker of `client` if there is one; their SHA-256.

    Checkpoints, learning curve and log are kept in a folder beside them; the same call again goes on from there.
    """
    if output.suffix != ".safetensors":
        raise SettingsError(f"the weights would be {output}; expected a name that ends in .safetensors")
    _with_steps(load_spec(what, spec), steps)
    folder = output.resolve().with_suffix(".training")
    folder.mkdir(parents=True, exist_ok=True)
    task = {
        "what": what,
        "spec": str(spec.resolve()) if spec is not None else None,
        "output": str(output.resolve()),
        "folder": str(folder),
        "device": device,
        "steps": steps,
    }
    (folder / LOG).touch()
    with _listening(folder / LOG, report):
        return graph.call(client, run_task, task, label="train", stop=threading.Event())


def run_task(task: dict[str, Any]) -> str:
    """One training, wherever this process runs."""
    log = Path(task["folder"]) / LOG

    def report(line: str) -> None:
        with log.open("a") as file:
            file.write(line + "\n")

    path = Path(task["spec"]) if task["spec"] else None
    spec = _with_steps(load_spec(task["what"], path), task["steps"])
    output = Path(task["output"])
    output.parent.mkdir(parents=True, exist_ok=True)
    with training_on(task["device"]):
        return str(named(KINDS[task["what"]].train)(spec, output, folder=Path(task["folder"]), report=report))


def _with_steps(spec: Any, steps: int | None) -> Any:
    return spec if steps is None else dataclasses.replace(spec, steps=steps)


@contextmanager
def _listening(log: Path, report: Report) -> Iterator[None]:
    """Report each line that is added to a log, by this process or another on the same disk."""
    done = threading.Event()

    def listen() -> None:
        with log.open() as file:
            file.seek(0, 2)
            started.set()
            rest = ""
            while True:
                last = done.wait(LISTEN)
                *lines, rest = (rest + file.read()).split("\n")
                for line in lines:
                    report(line)
                if last:
                    return

    started = threading.Event()
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    started.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()
