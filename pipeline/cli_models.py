"""The verbs that make and judge models: simulate, evaluate, mtf, train."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from schemas.errors import SettingsError

models = typer.Typer()
out = Console(soft_wrap=True, highlight=False)

OutputOption = Annotated[Path | None, typer.Option("-o", "--output", help="file to write")]


@models.command()
def simulate(
    spec: Annotated[Path, typer.Argument(help="YAML file of a movie's specification")],
    target: Annotated[Path, typer.Argument(help="stack (.zarr, with its truth inside), or TIFF or MRC (truth beside)")],
    seed: Annotated[int, typer.Option(help="seed of everything random")] = 0,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="workers to simulate a stack on, as of `run`")
    ] = None,
    block: Annotated[int | None, typer.Option(help="frames of a task and shard; changes no result")] = None,
) -> None:
    """Simulate a movie with a known answer; the same command again goes on where it was cut short."""
    from cluster import connect
    from pipeline.progress import display
    from pipeline.results.truth import truth_of
    from pipeline.simulate.files import load_spec, write_movie
    from pipeline.simulate.movie import simulate_movie
    from pipeline.simulation import simulate_stack
    from schemas.profiles import load_profile

    movie, begin = load_spec(spec), time.perf_counter()
    images = movie.frames * len(movie.defoci or (0,))
    if target.suffix.lower() == ".zarr":
        profile = load_profile(cluster or "serial")
        with connect(profile) as client, display(Console(stderr=True, soft_wrap=True)) as progress:
            begin = time.perf_counter()
            done = simulate_stack(movie, target, seed=seed, client=client, block=block, progress=progress)
        images = images * done.computed // done.frames
        out.print(
            f"wrote {target}: {done.frames} frames, {done.columns} columns, truth in {target}/truth", markup=False
        )
    else:
        made = simulate_movie(movie, seed)
        write_movie(made, target)
        truth = target.with_suffix(".truth.npz")
        truth_of(made).save(truth)
        out.print(f"wrote {target} and its truth {truth}", markup=False)
    seconds = time.perf_counter() - begin
    out.print(f"{images} images in {seconds:.1f} s: {images / seconds:.2f} images/s", markup=False)


@models.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run")],
    truth: Annotated[Path, typer.Argument(help="the truth that `simulate` wrote beside or into its movie")],
    output: OutputOption = None,
    max_distance: Annotated[float, typer.Option(help="Å beyond which a column is another one")] = 0.5,
    margin: Annotated[float, typer.Option(help="Å from the edge within which columns are not judged")] = 1.2,
) -> None:
    """Score a run against the known answer of a simulated movie; prints tables and writes a picture (PNG)."""
    from pipeline.results.evaluate import as_table, load_truth
    from pipeline.results.evaluate import evaluate as score
    from pipeline.results.scorecard import draw, tables

    known = load_truth(truth)
    found = score(run, known, max_distance=max_distance, margin=margin)
    for table in (as_table(found), *tables(found)):
        out.print(table)
    picture = output or run.parent / f"{run.stem}.evaluation.png"
    draw(found, known, picture)
    out.print(f"wrote {picture}", markup=False)


@models.command()
def mtf(
    source: Annotated[str, typer.Argument(help="frames of a camera in which some region shows only the beam")],
    output: OutputOption = None,
    region: Annotated[
        list[str] | None, typer.Option(help="top,left,height,width in px of such a region; default: found; repeatable")
    ] = None,
    dark: Annotated[
        str | None, typer.Option(help="frames without beam: offset and readout noise come from them")
    ] = None,
    offset: Annotated[float | None, typer.Option(help="reading without beam, in counts")] = None,
    readout: Annotated[float | None, typer.Option(help="readout noise, in counts rms")] = None,
    dataset: Annotated[str | None, typer.Option(help="which data set of a file that holds several")] = None,
) -> None:
    """Fit a camera's MTF and noise from vacuum; writes fields for `simulate` (YAML) and a picture of the fit."""
    from pipeline.camera import parse_region, run_mtf

    target = output or Path(f"{Path(source).stem}.mtf.yaml")
    run_mtf(
        source,
        target,
        report=lambda line: out.print(line, markup=False),
        regions=[parse_region(text) for text in region or []],
        dark=dark,
        offset=offset,
        readout=readout,
        dataset=dataset,
    )


@models.command()
def train(
    what: Annotated[str, typer.Argument(help="columns, particles, species, denoise, denoise-medium or denoise-small")],
    spec: Annotated[
        Path | None, typer.Argument(help="YAML file of the training; default: that of the shipped weights")
    ] = None,
    output: OutputOption = None,
    steps: Annotated[int | None, typer.Option(help="training steps instead of those of the specification")] = None,
    cluster: Annotated[str | None, typer.Option("--cluster", help="train on one worker of this profile")] = None,
) -> None:
    """Train a network from simulations; the same command again goes on where it was cut short."""
    from cluster import connect
    from pipeline import train as training
    from pipeline.networks.shipped import train as train_weights
    from schemas.profiles import load_profile

    def report(line: str) -> None:
        out.print(line, markup=False)

    if what.startswith("denoise"):
        digest = train_weights(what, output, steps=steps, report=report)
    elif output is None:
        raise SettingsError(f"no file for the weights of {what}; name it with -o FILE.safetensors")
    else:
        profile = load_profile(cluster or "serial")
        training.load_spec(what, spec)
        with connect(profile) as client:
            digest = training.train(
                what, spec, output, client=client, device=profile.device, steps=steps, report=report
            )
    out.print(f"wrote weights with SHA-256 {digest}", markup=False)
