"""Small movies with a known answer, and ways to run jobs on them: what the end-to-end tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import tifffile
import torch
import xarray as xr
import yaml

from cluster import connect
from pipeline.ledger import read_records
from pipeline.networks.weights import build, save_weights
from pipeline.story import run
from schemas.jobfile import validate
from schemas.profiles import Profile

ROOT = Path(__file__).resolve().parent.parent
SAMPLING = 0.2  # Å/px
INTERVAL = 0.5  # s
QUICK = {"images.examples": 1, "denoise.weights": "pretrained"}


def lattice(shape, *, frames=12, seed=0, dose=20.0, drift=(0.23, -0.31), spacing=13.0):
    """Counts (time, y, x) uint16 of a drifting hexagonal lattice of bright columns, and its drift (time, 2) [px]."""
    rng = np.random.default_rng(seed)
    path = np.cumsum(rng.normal(drift, 0.2, (frames, 2)), axis=0)
    path -= path[0]
    reach = int(max(shape) / spacing) + 4
    i, j = (a.ravel() for a in np.mgrid[-reach:reach, -reach:reach])
    sites = np.stack([j * spacing * np.sqrt(3) / 2, (i + (j % 2) / 2) * spacing], 1) + np.array(shape) / 2
    weight = 1 - 0.5 * (rng.random(len(sites)) < 0.3)
    y, x = (np.arange(n, dtype=float) for n in shape)
    counts = np.empty((frames, *shape), np.uint16)
    for t in range(frames):
        gaussians = [
            np.exp(-0.5 * ((a[None] - (sites + path[t])[:, k, None]) / 2.4) ** 2) for k, a in enumerate((y, x))
        ]
        counts[t] = rng.poisson(dose * (0.6 + 1.5 * (gaussians[0] * weight[:, None]).T @ gaussians[1]))
    return counts, path


def write_movie(path: Path, counts: np.ndarray, *, sampling=SAMPLING, interval=INTERVAL) -> Path:
    """Write frames as a calibrated ImageJ TIFF."""
    meta = {"axes": "TYX", "unit": "angstrom", "finterval": interval, "tunit": "s"}
    tifffile.imwrite(path, counts, imagej=True, resolution=(1 / sampling, 1 / sampling), metadata=meta)
    return path


def untrained(folder: Path) -> dict[str, str]:
    """Settings that name untrained small networks: for tests of what surrounds them."""
    torch.manual_seed(0)
    made = {
        "denoise.weights": build("blindspot", {"frames": 7, "channels": 16, "dilations": [2, 4], "errors": True}),
        "segment.model": build("msdnet", {"inputs": 1, "outputs": 2, "width": 4, "dilations": [1, 2, 4]}),
    }
    paths = {}
    for key, network in made.items():
        path = folder / f"{key}.safetensors"
        save_weights(network, path, {"sampling": 0.2})
        paths[key] = str(path)
    return paths


def linear(path: Path, weights: np.ndarray, bias: np.ndarray, **facts) -> str:
    """Weights (output, input) of a network whose logits are linear in each pixel: a network whose answer is known."""
    outputs, inputs = weights.shape
    network = build("msdnet", {"inputs": inputs, "outputs": outputs, "width": 1, "dilations": [1]})
    with torch.no_grad():
        network.last.weight.zero_()
        network.last.weight[:, :inputs, 0, 0] = torch.as_tensor(weights)
        network.last.bias[:] = torch.as_tensor(bias)
    save_weights(network, path, facts)
    return str(path)


def job(movies, output: Path, **settings):
    """A job of movie files; ``settings`` may use double underscores or dots in names."""
    nested: dict = {}
    for name, value in {**QUICK, **settings}.items():
        section, key = name.replace("__", ".").split(".")
        nested.setdefault(section, {})[key] = value
    sources = [movies] if isinstance(movies, str | Path) else movies
    entries = [m if isinstance(m, dict) else {"source": str(m)} for m in sources]
    return validate({**nested, "movies": entries, "output": str(output)})


def run_job(movies, output: Path, *, workers: int | None = None, redo=None, progress=None, **settings):
    """Run movies here, or on so many worker processes."""
    wanted = job(movies, output, **settings)
    profile = Profile(kind="serial") if workers is None else Profile(kind="local", workers=workers, memory=3.0)
    with connect(profile) as client:
        return run(wanted, client=client, redo=redo, progress=progress)


def tables(run_path: Path) -> dict[str, xr.Dataset]:
    """``/frames``, ``/columns`` and ``/particles`` of a run, loaded."""
    with xr.open_datatree(run_path, engine="zarr", consolidated=False) as tree:
        return {name: tree[name].to_dataset().load() for name in ("frames", "columns", "particles")}


def differences(one: Path, other: Path) -> list[str]:
    """Every variable of the tables that is not bit for bit the same in two runs."""
    found = []
    ours, theirs = tables(one), tables(other)
    for group, table in ours.items():
        again = theirs[group]
        if set(table.variables) != set(again.variables):
            found.append(f"{group}: {sorted(set(table.variables) ^ set(again.variables))}")
        for name in set(table.variables) & set(again.variables):
            a, b = table[name].values, again[name].values
            same = a.shape == b.shape and a.dtype == b.dtype
            if same and a.dtype.kind == "f":
                same = a.tobytes() == b.tobytes()
            elif same:
                same = bool((a == b).all())
            if not same:
                found.append(f"{group}/{name}: {_example(a, b)}")
    return found


def _example(a: np.ndarray, b: np.ndarray) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.shape} {a.dtype} and {b.shape} {b.dtype}"
    where = np.flatnonzero((a != b).ravel())
    index = where[0] if len(where) else 0
    return f"{len(where)} of {a.size} differ, first {a.ravel()[index]!r} and {b.ravel()[index]!r} at {index}"


def write_jobfile(path: Path, movies, output: Path, **settings) -> Path:
    """The same job as YAML."""
    data = job(movies, output, **settings)
    full = data.model_dump(mode="json", exclude_defaults=True)
    path.write_text(yaml.safe_dump(full))
    return path


def command(*words: object) -> list[str]:
    """The ``colonnade`` command of this very copy."""
    return [sys.executable, "-m", "pipeline.cli", *map(str, words)]


def environment() -> dict[str, str]:
    """An environment in which subprocesses import this copy, whatever else is installed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}


def colonnade(*words: object, timeout: float = 300, **options) -> subprocess.CompletedProcess[str]:
    """Run a ``colonnade`` command to its end."""
    return subprocess.run(
        command(*words), env=environment(), capture_output=True, text=True, timeout=timeout, check=False, **options
    )


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def records(output: Path) -> list[dict]:
    """All records of a job's ledgers, oldest first."""
    return [record for folder in sorted((output / "ledger").glob("*/")) for record in read_records(folder)]


def computed(output: Path) -> list[tuple[str, int, int, str]]:
    """(step, first, end, fingerprint) of every block that was computed, in order, repeats included."""
    return [
        (record["step"], record["start"], record["stop"], record["fingerprint"])
        for record in records(output)
        if record["kind"] == "block" and record["status"] == "done" and not record.get("adopted")
    ]


def matched(columns: xr.Dataset, other: xr.Dataset, *, within: float) -> float:
    """Share of columns that have a column of the other table within so many Å in the same frame."""
    hits = 0
    for frame in np.unique(columns["frame"]):
        ours, theirs = (
            np.stack([table[axis].values[table["frame"].values == frame] for axis in ("y", "x")], 1)
            for table in (columns, other)
        )
        if len(theirs):
            hits += int((np.linalg.norm(ours[:, None] - theirs[None], axis=2).min(1) <= within).sum())
    return hits / columns.sizes["column"]
