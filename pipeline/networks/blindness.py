"""What a denoiser may not see of the frame that it estimates: its own pixels or, for correlated noise, all of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pipeline.networks.adapt_sample import Sample
from pipeline.networks.blindspot import BlindSpot
from pipeline.networks.weights import build
from pipeline.steps.neighbours import neighbour_stack
from pipeline.steps.noise import noise_correlation

# Correlation of the noise of pixels nearby from which on a network sees nothing of the frame that it estimates. The
# more electrons, the more a frame's own pixels tell, and the less their noise harms: so much more correlation per
# electron (where both ways are equally good on simulated lattices that move).
CORRELATED, PER_ELECTRON = 0.05, 0.01


class Blinded(NamedTuple):
    """A network, what it does not see of the frame it estimates, and how correlated the noise is (NaN: unknown).

    correlated: whether that is more than may be overlooked.
    """

    network: nn.Module
    blind: Literal["pixels", "frame"]
    correlation: float
    correlated: bool


def blinded(
    network: nn.Module, sample: Sample, *, wanted: Literal["auto", "pixels", "frame"], steps: int, calibrated: bool
) -> Blinded:
    """The network that fits the noise of a sample.

    wanted: "pixels" and "frame" are obeyed; "auto": a BlindSpot is hidden the frame if the noise of pixels nearby is
    correlated and it is to be trained for some `steps`, in which it would learn to tell noise by noise. calibrated:
    whether the electrons of the sample are true ones, not fitted to a variance that the correlation made smaller.
    """
    correlation, shrunk = noise_correlation(_pairs(sample))
    electrons = sample.level.mean if calibrated else sample.level.mean / shrunk
    correlated = bool(abs(correlation) > CORRELATED + PER_ELECTRON * electrons)  # False where it is not known
    hide = wanted == "frame" or (wanted == "auto" and correlated and steps > 0)
    if not isinstance(network, BlindSpot) or not hide:
        return Blinded(network, blind_of(network), correlation, correlated)
    hidden = cast(nn.Module, build("blindspot", {**network.config, "own_frame": False}))
    hidden.load_state_dict(network.state_dict())
    return Blinded(hidden, "frame", correlation, correlated)


def blind_of(network: nn.Module) -> Literal["pixels", "frame"]:
    """What a denoiser does not see of the frame that it estimates."""
    hidden = isinstance(network, BlindSpot) and not network.config.get("own_frame", True)
    return "frame" if hidden else "pixels"


def _pairs(sample: Sample) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Consecutive frames of the sample, the second on the grid of the first; NaN where it shows something else."""
    for index in range(len(sample.frames) - 1):
        pair, valid = neighbour_stack(sample.frames, index, offsets=(0, 1), links=sample.links, fill=float("nan"))
        if bool(valid[1].any()):
            yield pair[0].numpy(), pair[1].numpy()
