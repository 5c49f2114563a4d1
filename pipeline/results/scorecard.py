"""An evaluation to look at: further tables for the terminal, and one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from pipeline.results.evaluate import Evaluation
from pipeline.results.truth import Truth
from pipeline.steps.agreement import Calibration, Confusion


def tables(found: Evaluation) -> list[Table]:
    """Confusion of species and reliability of probabilities, those that there are."""
    out = []
    if found.species is not None:
        out.append(confusion_table(found.species.confusion))
    if found.calibration is not None:
        out.append(reliability_table(found.calibration))
    return out


def confusion_table(confusion: Confusion) -> Table:
    """True classes down, found ones across."""
    table = Table(title="Species: true down, found across", title_justify="left")
    table.add_column("")
    for name in confusion.found:
        table.add_column(name, justify="right")
    for name, row in zip(confusion.true, confusion.counts, strict=True):
        table.add_row(name, *(f"{count:,}" if count else "·" for count in row))
    return table


def reliability_table(found: Calibration) -> Table:
    """Stated probability and what came true, per bin that is not empty."""
    table = Table(title=f"Probabilities of columns, expected error {found.error:.3f}", title_justify="left")
    for name in ("stated", "came true", "columns"):
        table.add_column(name, justify="right")
    for stated, share, error, number in zip(*found[:4], strict=True):
        if number:
            table.add_row(f"{stated:.3f}", f"{share:.3f} ± {error:.3f}", f"{number:,}")
    return table


def draw(found: Evaluation, truth: Truth, path: Path) -> None:
    """Write a PNG: the frame that came out worst with what was found, lost and spurious; F1 over time; the errors of
    position against their bound; the reliability of probabilities."""
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    axes = figure.subplots(2, 2)
    _frame(axes[0, 0], found, truth)
    _course(axes[0, 1], found)
    _errors(axes[1, 0], found)
    _reliability(axes[1, 1], found.calibration)
    figure.suptitle(
        f"precision {found.precision:.4f}   recall {found.recall:.4f}   F1 {found.f1:.4f}   "
        f"RMS {found.position_rms:.3f} Å" + (f" = {found.bound_multiple:.2f} × bound" if found.bound_multiple else "")
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _frame(axes: Axes, found: Evaluation, truth: Truth) -> None:
    if not found.matches:
        axes.set_title("no frame was measured")
        return
    match = max(found.matches, key=lambda one: len(one.lost) + len(one.spurious))
    height, width = truth.shape
    if truth.clean is not None:
        axes.imshow(truth.clean[match.frame], cmap="gray")
    scale = truth.sampling
    axes.plot(truth.x[match.true], truth.y[match.true], ".", ms=4, color="#56b4e9", label=f"found, {len(match.true)}")
    axes.plot(truth.x[match.lost], truth.y[match.lost], "x", color="#d55e00", label=f"lost, {len(match.lost)}")
    if match.spurious_at.size:
        at = match.spurious_at / scale
        axes.plot(at[:, 1], at[:, 0], "s", mfc="none", color="#f0e442", label=f"spurious, {len(at)}")
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
    axes.set_title(f"frame {match.frame}, the worst")
    axes.legend(fontsize=8, loc="upper right")


def _course(axes: Axes, found: Evaluation) -> None:
    frames = [match.frame for match in found.matches]
    lost = [len(match.lost) for match in found.matches]
    spurious = [len(match.spurious) for match in found.matches]
    axes.plot(frames, lost, "x-", color="#d55e00", label="lost")
    axes.plot(frames, spurious, "s-", mfc="none", color="#0072b2", label="spurious")
    axes.set(xlabel="frame", ylabel="columns")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _errors(axes: Axes, found: Evaluation) -> None:
    off = np.concatenate([match.off for match in found.matches]) if found.matches else np.empty((0, 2))
    if found.bound_ratios is not None and len(found.bound_ratios):
        axes.hist(np.minimum(found.bound_ratios, 5), [0.1 * n for n in range(51)], density=True, color="#56b4e9")
        r = np.linspace(0, 5, 200)
        axes.plot(r, 2 * r * np.exp(-(r**2)), color="black", lw=1, label="an estimate that reaches the bound")
        axes.set(xlabel="distance from the truth, in multiples of the bound", ylabel="density")
        axes.legend(frameon=False)
    elif len(off):
        axes.hist(np.hypot(*off.T), 50, color="#56b4e9")
        axes.set(xlabel="distance from the truth [Å]", ylabel="columns")


def _reliability(axes: Axes, found: Calibration | None) -> None:
    axes.plot([0, 1], [0, 1], color="grey", lw=1)
    if found is not None:
        full = found.number > 0
        axes.errorbar(
            found.probability[full], found.share[full], found.share_error[full], fmt="o-", color="#0072b2", ms=4
        )
        axes.set_title(f"probabilities of columns, expected error {found.error:.3f}")
    axes.set(xlabel="stated", ylabel="came true", xlim=(0, 1.02), ylim=(0, 1.05))
