"""From a YAML file or command-line settings to a checked job; all problems at once, with lines and nearest names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from schemas.errors import SettingsError
from schemas.settings import Job, MovieEntry, Settings

Location = tuple[str | int, ...]


def _lines(node: yaml.Node | None, at: Location = ()) -> dict[Location, int]:
    """Line (from 1) of each key and item of a YAML document, by its path."""
    found: dict[Location, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, key.value)
            found[here] = key.start_mark.line + 1
            found.update(_lines(value, here))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found[(*at, index)] = value.start_mark.line + 1
            found.update(_lines(value, (*at, index)))
    return found


def _duplicate_keys(node: yaml.Node | None, at: Location = ()) -> list[str]:
    found = []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                found.append(f"line {key.start_mark.line + 1}: {_dotted((*at, key.value))} is set twice; keep one")
            seen.add(key.value)
            found += _duplicate_keys(value, (*at, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found += _duplicate_keys(value, (*at, index))
    return found


def _dotted(location: Iterable[str | int]) -> str:
    return ".".join(str(part) for part in location)


def _fields_at(location: Location) -> list[str]:
    """Names that are allowed where an unknown key was found."""
    model: type[BaseModel] = Job
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        if part == "movies":
            model = MovieEntry
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _sentence(error: Mapping[str, Any], lines: Mapping[Location, int]) -> str:
    location: Location = tuple(error["loc"])
    line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
    place = f"line {line}: {_dotted(location)}" if line else _dotted(location)
    if error["type"] == "extra_forbidden":
        names = _fields_at(location)
        near = difflib.get_close_matches(str(location[-1]), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(names)}"
        return f"{place} is not a setting; {hint}"
    if error["type"] == "missing":
        return f"{place} is missing; it must be given"
    message = str(error["msg"]).removeprefix("Value error, ")
    shown = "" if error["type"] == "value_error" else f" (found {error['input']!r})"
    return f"{place}: {message}{shown}"


def validate(data: Any, *, lines: Mapping[Location, int] | None = None, where: str = "settings") -> Job:
    """A job from plain data; a ``SettingsError`` lists every problem."""
    try:
        job = Job.model_validate(data)
    except ValidationError as error:
        found = [_sentence(dict(problem), lines or {}) for problem in error.errors()]
        raise SettingsError(f"{where}: {len(found)} problem(s)\n  " + "\n  ".join(found)) from None
    found = []
    for index, entry in enumerate(job.movies):
        try:
            settings_for(job, entry)
        except SettingsError as error:
            line = (lines or {}).get(("movies", index))
            found.append(f"{f'line {line}: ' if line else ''}movies.{index}.set: {error}")
    if found:
        raise SettingsError(f"{where}: {len(found)} problem(s)\n  " + "\n  ".join(found))
    return job


def load_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file; ``overrides`` are ``section.key=value`` as on the command line.

    Relative paths in the file are relative to the file's folder.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read ({error.strerror}); expected a job file, see `colonnade init`"
        ) from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise SettingsError(f"{path} holds {type(data).__name__}; expected settings such as `movies:` and `output:`")
    if duplicates := _duplicate_keys(node):
        raise SettingsError(f"{path}: {len(duplicates)} problem(s)\n  " + "\n  ".join(duplicates))
    job = validate(_merge(_drop_empty(data), parse_overrides(overrides)), lines=_lines(node), where=str(path))
    return _resolve_paths(job, path.resolve().parent)


def _drop_empty(data: dict[Any, Any]) -> dict[Any, Any]:
    """A section whose keys are all commented out reads as None; it means the defaults."""
    return {key: value for key, value in data.items() if value is not None}


def _resolve_paths(job: Job, folder: Path) -> Job:
    def resolved(source: str) -> str:
        return str(folder / Path(source).expanduser())

    def moved(entry: MovieEntry) -> MovieEntry:
        source = entry.source
        sources = resolved(source) if isinstance(source, str) else tuple(resolved(each) for each in source)
        own = {name: _resolve_files(value, folder) for name, value in _nested(entry.set).items()}
        return entry.model_copy(update={"source": sources, "set": own})

    changed = _resolve_files(job.model_dump(include=set(Settings.model_fields)), folder)
    return Job.model_validate(
        {**changed, "movies": [moved(entry) for entry in job.movies], "output": folder / job.output.expanduser()}
    )


def _resolve_files(data: Any, folder: Path, name: str = "") -> Any:
    """Settings with absolute paths: of detector maps always, of weights where such a file lies below ``folder``."""
    if isinstance(data, Mapping):
        return {key: _resolve_files(value, folder, str(key)) for key, value in data.items()}
    if name in ("dark", "gain") and isinstance(data, str | Path):
        return folder / Path(data).expanduser()
    if name in ("weights", "model") and isinstance(data, str) and (folder / data).is_file():
        return str(folder / data)
    return data


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """``["source.sampling=0.2"]`` to nested settings; values are read as YAML."""
    data: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise SettingsError(f"{item!r} is not a setting; expected section.key=value, such as source.sampling=0.2")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise SettingsError(f"{item!r}: the value is not valid YAML; quote it if it is text") from None
        nested: Any = parsed
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        data = _merge(data, nested)
    return data


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def settings_for(job: Job, entry: MovieEntry) -> Settings:
    """The resolved settings of one movie: the job's, with the entry's own on top."""
    base = job.model_dump(include=set(Settings.model_fields))
    try:
        return Settings.model_validate(_merge(base, _nested(entry.set)))
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(dict(problem), {}) for problem in error.errors())) from None


def _nested(data: Mapping[str, Any]) -> dict[str, Any]:
    """``{"section.key": value}`` as nested settings; what is nested already stays."""
    over: dict[str, Any] = {}
    for key, value in data.items():
        leaf: Any = value
        for part in reversed(key.split(".")):
            leaf = {part: leaf}
        over = _merge(over, leaf)
    return over


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"section.key": value}``."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def template(sources: Sequence[str] = ("movie.tif",), output: str = "results") -> str:
    """A commented job file with every setting, its default and its meaning."""
    lines = ["# A Colonnade job: what to process, where to write, and every setting with its default.", ""]
    lines += ["movies:"] + [f"  - source: {yaml.safe_dump(source).splitlines()[0]}" for source in sources]
    lines += ["    # set: {source.sampling: 0.17}   # settings of this movie alone", f"output: {output}", ""]
    for section, field in Settings.model_fields.items():
        model = cast(type[BaseModel], field.annotation)
        lines += [f"{section}:  # {(model.__doc__ or '').splitlines()[0]}"]
        for name, setting in model.model_fields.items():
            default = setting.get_default()
            value = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
            lines.append(f"  # {name}: {value.splitlines()[0].removesuffix('...').strip()}  # {setting.description}")
        lines.append("")
    return "\n".join(lines)
