"""Simulated movies as files: what a detector would write, and nothing of the truth in it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import tifffile
import yaml

from pipeline.simulate.movie import MovieSpec, SimulatedMovie
from schemas.errors import SettingsError


def load_spec(path: Path) -> MovieSpec:
    """A specification from a YAML file whose keys are the fields of ``MovieSpec``."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(data, dict):
        raise SettingsError(f"{path} holds {type(data).__name__}; expected fields of a movie such as `frames: 40`")
    known = {item.name: str(item.type) for item in dataclasses.fields(MovieSpec)}
    problems, values = [], {}
    for key, value in data.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected some of: {', '.join(sorted(known))}"
            problems.append(f"{key} is no field of a movie; {hint}")
            continue
        try:
            values[key] = _typed(value, known[key])
        except (TypeError, ValueError):
            problems.append(f"{key} is {value!r}; expected {known[key]}")
    if problems:
        raise SettingsError(f"{path}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))
    return MovieSpec(**values)


def _typed(value: Any, kind: str) -> Any:
    """A YAML value as the type that a field states; YAML takes 110 for a number and 5e4 for text."""
    kind, _, rest = kind.partition(" | ")
    if value is None and rest == "None":
        return None
    if kind.startswith("tuple["):
        if not isinstance(value, list):
            raise TypeError(kind)
        kinds = kind[len("tuple[") : -1].split(", ")
        kinds = [kinds[0]] * len(value) if kinds[-1] == "..." else kinds
        return tuple(_typed(one, each) for one, each in zip(value, kinds, strict=True))
    if isinstance(value, bool) != (kind == "bool") or isinstance(value, list | dict) or value is None:
        raise TypeError(kind)
    if kind == "int" and float(value) != int(float(value)):
        raise ValueError(kind)
    whole: Callable[[Any], Any] = int if not isinstance(value, str) else lambda text: int(float(text))
    convert: dict[str, Callable[[Any], Any]] = {"str": str, "float": float, "int": whole, "bool": bool}
    return convert[kind](value)


def write_movie(movie: SimulatedMovie, path: Path) -> None:
    """Write the counts as an ImageJ TIFF stack (calibrated in Å and s) or as MRC (calibrated in Å).

    The format follows the name's ending: .tif or .tiff, .mrc. Raises ``SettingsError`` for any other, and for a focal
    series, which these formats do not describe.
    """
    if movie.counts.ndim == 4:
        raise SettingsError(
            f"{path} cannot hold a focal series; expected a stack, named {path.with_suffix('.zarr').name}"
        )
    counts = np.ascontiguousarray(movie.counts)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".tif", ".tiff"):
        facts = {"axes": "TYX", "unit": "angstrom", "finterval": movie.frame_interval}
        per_unit = 1 / movie.sampling
        tifffile.imwrite(path, counts, imagej=True, resolution=(per_unit, per_unit), metadata=facts)
    elif path.suffix.lower() == ".mrc":
        with mrcfile.new(path, overwrite=True) as file:
            file.set_data(counts)
            file.set_image_stack()
            file.voxel_size = movie.sampling
    else:
        raise SettingsError(f"{path} ends in {path.suffix!r}; expected .tif, .tiff or .mrc")
