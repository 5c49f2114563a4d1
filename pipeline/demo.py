"""The demonstration: a movie with a known answer goes the whole way, and the result is scored against the answer."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from rich.console import Console

from cluster import connect
from pipeline.progress import display
from pipeline.results.evaluate import as_table, evaluate, truth_of
from pipeline.results.report import report
from pipeline.simulate.files import write_movie
from pipeline.simulate.movie import MovieSpec, simulate_movie
from pipeline.story import run
from schemas.jobfile import validate
from schemas.profiles import load_profile

DEMO = MovieSpec(
    kind="nanoparticle", element="Au", zone="110", frames=32, shape=(256, 256), sampling=0.17, energy=300.0, dose=400.0,
    frame_interval=0.0025, mtf=(1.0, 0.0, 0.35, 2.5), events=4,
)  # fmt: skip
SEED = 7


def run_demo(folder: Path, *, profile_name: str | None, console: Console, out: Console) -> None:
    """Simulate, write as a detector would, ingest, process, score, report; everything below ``folder``."""
    begin = time.perf_counter()
    shutil.rmtree(folder / "results", ignore_errors=True)
    movie_file, truth_file = folder / "gold_particle.tif", folder / "gold_particle.truth.npz"
    out.print(f"simulating {DEMO.frames} frames of a gold particle, {DEMO.dose:g} e-/Å² per frame …", markup=False)
    movie = simulate_movie(DEMO, SEED)
    write_movie(movie, movie_file)
    truth = truth_of(movie)
    truth.save(truth_file)
    job = validate(
        {
            "movies": [{"source": str(movie_file.resolve())}],
            "output": str((folder / "results").resolve()),
            "source": {"energy": DEMO.energy, "counts_per_electron": 1.0},
            "denoise": {"weights": "pretrained"},
            "images": {"save": ["denoised"]},
        }
    )
    simulated = time.perf_counter()
    profile = load_profile(profile_name)
    with connect(profile) as client, display(console) as progress:
        outcomes = run(job, client=client, device=profile.device, progress=progress)
    done = time.perf_counter()
    (outcome,) = outcomes
    page = report(outcome.path, folder / "report.html")
    out.print(as_table(evaluate(outcome.path, truth)))
    pixels = DEMO.frames * DEMO.shape[0] * DEMO.shape[1]
    out.print(
        f"found {outcome.columns} atomic columns in {outcome.frames} frames; "
        f"{outcome.frames / (done - simulated):.1f} frames/s ({pixels / (done - simulated) / 1e6:.2f} Mpx/s) "
        f"from file to dataset, {done - begin:.0f} s in all",
        markup=False,
    )
    out.print(f"report: {page}\ndataset: {outcome.path}  (xarray.open_datatree)", markup=False)
