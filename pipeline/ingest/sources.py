"""From what the user names (files, folders, globs) to movies, in natural order."""

from __future__ import annotations

import difflib
import glob
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from natsort import natsorted, ns

from pipeline.ingest.formats_tvips import all_parts, part_number
from pipeline.ingest.readers import STACK, inspect, reader_for
from schemas.errors import SourceError

# Gatan's in-situ cameras sort the frames of one recording into Hour_00/Minute_00/Second_00/…
CLOCK_FOLDER = re.compile(r"(Hour|Minute|Second)_\d+$")
ZARR_MARKS = ("zarr.json", ".zgroup", ".zarray")


@dataclass(frozen=True)
class MovieFiles:
    """The files of one movie in order, and the reader that claims them."""

    name: str
    paths: tuple[Path, ...]
    reader: str


@dataclass(frozen=True)
class Discovery:
    """Movies found, and what was passed over with the reason."""

    movies: tuple[MovieFiles, ...]
    ignored: tuple[tuple[Path, str], ...]


def discover(patterns: Sequence[str | Path], *, dataset: str | None = None) -> Discovery:
    """Movies among files, folders and globs: single-frame files of a folder form one movie, others one movie each.

    A folder is not searched in depth (a glob with ** is). What a folder or glob leads to outside of itself (links) and
    what no reader claims is listed as ignored. Raises SourceError for a name that does not exist.
    """
    ignored: dict[Path, str] = {}
    claimed: dict[Path, Path] = {}  # resolved -> as named: a file named twice counts once
    for pattern in patterns:
        for path in _expand(str(pattern), ignored):
            claimed.setdefault(path.resolve(), path)
    movies = _group(list(claimed.values()), dataset)
    return Discovery(tuple(movies), tuple(ignored.items()))


def _expand(pattern: str, ignored: dict[Path, str]) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir() and not is_zarr(path):
        listing = _natural(path.iterdir())
        if any(item.is_dir() and CLOCK_FOLDER.match(item.name) for item in listing):
            listing = [item for item in _natural(path.rglob("*")) if item.is_file()]
        return _claim(listing, path, ignored)
    if path.exists():
        return _claim([path], None, ignored)
    if glob.has_magic(pattern):
        found = _natural(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207
        fixed = path.parts[: _first_magic(path)]
        base = Path(*fixed) if fixed else Path()
        if not found:
            raise SourceError(f"{pattern}: no file matches. Expected a file, a folder, or a pattern that matches some.")
        deep = "**" in path.parts
        return _claim([file for item in found for file in _contents(item, deep)], base, ignored)
    near = difflib.get_close_matches(path.name, [item.name for item in _siblings(path)], n=1)
    remedy = f" Did you mean {near[0]!r}?" if near else f" Paths are relative to {Path.cwd()}."
    raise SourceError(f"{pattern}: no such file or folder.{remedy}")


def _contents(path: Path, deep: bool) -> list[Path]:
    """A file itself; a folder that a pattern matches stands for its files, unless ** finds those by itself."""
    if not path.is_dir() or is_zarr(path):
        return [path]
    return [] if deep else [item for item in _natural(path.iterdir()) if not item.is_dir() or is_zarr(item)]


def _first_magic(path: Path) -> int:
    return next(i for i, part in enumerate(path.parts) if glob.has_magic(part))


def _siblings(path: Path) -> list[Path]:
    return list(path.parent.iterdir()) if path.parent.is_dir() else []


def _claim(paths: Iterable[Path], base: Path | None, ignored: dict[Path, str]) -> list[Path]:
    """Paths that a reader claims; a listing or glob must not leave the folder `base` (None: named by the user)."""
    claimed: list[Path] = []
    for path in paths:
        if base is not None and not path.resolve().is_relative_to(base.resolve()):
            ignored[path] = f"leads out of {base} (to {path.resolve()}); name that file itself if it is meant"
        elif base is not None and path.name.startswith("."):
            ignored[path] = "hidden"
        elif path.is_dir():
            if is_zarr(path):
                claimed.append(path)
            else:
                ignored[path] = "a folder within the folder; name it itself, or use a pattern with **"
        elif path.suffix.lower() == ".emi":
            sers = _natural(path.parent.glob(f"{glob.escape(path.stem)}_*.ser"))
            ignored[path] = (
                f"metadata of {sers[0].name}" if sers else f"its images ({path.stem}_1.ser) are not beside it"
            )
            claimed += sers if base is None else []
        elif reader_for(path) is None:
            ignored[path] = f"no reader for {path.suffix or 'names without ending'}"
        else:
            claimed.append(path)
    return claimed


def _group(paths: list[Path], dataset: str | None) -> list[MovieFiles]:
    """Movies in the order in which their first file was named."""
    groups: dict[tuple[str, ...], list[Path]] = {}
    singles: set[tuple[str, ...]] = set()
    for path in paths:
        key, single = _key(path, dataset)
        groups.setdefault(key, []).append(path)
        if single:
            singles.add(key)
    movies = []
    for key, members in groups.items():
        if key[0] == "folder" and key not in singles:  # nothing but damaged files: each is its own trouble
            movies += [MovieFiles(path.stem, (path,), key[2]) for path in members]
            continue
        ordered = tuple(_natural(members))
        if key[0] == "parts":
            ordered = all_parts(ordered)
        alone = sum(other[:2] == key[:2] for other in groups) == 1
        movies.append(MovieFiles(_name(key, ordered, alone), ordered, key[2]))
    return movies


def _key(path: Path, dataset: str | None) -> tuple[tuple[str, ...], bool]:
    """What a file is grouped by, and whether it is known to hold a single frame."""
    if path.is_dir():
        return ("file", str(path), STACK if is_stack(path) else "zarr"), False
    reader = reader_for(path)
    if reader is None:  # _claim has seen to it
        raise SourceError(f"{path}: no reader claims it.")
    if reader.name == "tvips" and (part := part_number(path)) is not None:
        return ("parts", str(path.parent / part[0]), "tvips"), False
    try:
        facts = inspect(path, reader.name, dataset)
    except SourceError:  # damaged: it belongs to the single frames beside it, if there are any
        return ("folder", str(_recording(path)), reader.name), False
    if facts.planes == 1:
        return ("folder", str(_recording(path)), reader.name), True
    return ("file", str(path), reader.name), False


def _recording(path: Path) -> Path:
    """The folder whose single frames form one movie."""
    folder = path.parent
    while CLOCK_FOLDER.match(folder.name):
        folder = folder.parent
    return folder


def _name(key: tuple[str, ...], paths: tuple[Path, ...], alone: bool) -> str:
    if key[0] == "parts":
        return Path(key[1]).name or paths[0].stem
    if len(paths) == 1:
        return paths[0].stem
    folder = _recording(paths[0].resolve()).name or "movie"
    return folder if alone else f"{folder}_{key[2]}"


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr array or group."""
    return path.is_dir() and any((path / mark).is_file() for mark in ZARR_MARKS)


def is_stack(path: Path) -> bool:
    """Whether a Zarr group says that it is a stack of Colonnade."""
    try:
        attributes = json.loads((path / "zarr.json").read_text(encoding="utf-8")).get("attributes") or {}
        return bool((attributes.get("colonnade") or {}).get("kind") == "stack")
    except (OSError, ValueError, AttributeError):
        return False


def _natural(paths: Iterable[Path]) -> list[Path]:
    return list(natsorted(paths, key=str, alg=ns.PATH))
