"""The verbs that make and judge models: simulate, mtf, train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

models = typer.Typer()
out = Console(soft_wrap=True, highlight=False)

OutputOption = Annotated[Path | None, typer.Option("-o", "--output", help="file to write")]


@models.command()
def simulate(
    spec: Annotated[Path, typer.Argument(help="YAML file of a movie's specification")],
    target: Annotated[Path, typer.Argument(help="TIFF or MRC file to write; the truth goes beside it")],
    seed: Annotated[int, typer.Option(help="seed of everything random")] = 0,
) -> None:
    """Simulate a movie with a known answer."""
    from pipeline.results.evaluate import truth_of
    from pipeline.simulate.files import load_spec, write_movie
    from pipeline.simulate.movie import simulate_movie

    movie = simulate_movie(load_spec(spec), seed)
    write_movie(movie, target)
    truth = target.with_suffix(".truth.npz")
    truth_of(movie).save(truth)
    out.print(f"wrote {target} and its truth {truth}", markup=False)


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
    what: Annotated[str, typer.Argument(help="columns or denoise")],
    output: OutputOption = None,
    steps: Annotated[int | None, typer.Option(help="training steps; default: those of the shipped weights")] = None,
) -> None:
    """Train the weights that ship with the project again."""
    from pipeline.networks.shipped import train as train_weights

    digest = train_weights(what, output, steps=steps, report=lambda line: out.print(line, markup=False))
    out.print(f"wrote weights with SHA-256 {digest}", markup=False)
