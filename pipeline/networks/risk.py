"""What a denoiser gets wrong on a movie, estimated from its counts alone; and what it leaves over of them."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.networks.adapt_sample import Sample, Seen
from pipeline.networks.blindspot import BlindSpot, rebuilt
from pipeline.networks.threads import side_by_side
from pipeline.networks.wiener import leftover_filter
from pipeline.steps.denoise import DType, reduced_precision
from pipeline.steps.neighbours import DenoisingNetwork, convolved

# Frames that are looked at.
CHECK_FRAMES = 32


class Look(NamedTuple):
    """A network, what it makes of the frames that are looked at, (m, y, x) [electrons], and its risk, frame by frame:
    estimated mean squared error over the squared mean."""

    network: nn.Module
    estimates: Tensor
    risks: NDArray[np.float64]


class Judge(NamedTuple):
    """Judges networks on a sample by estimates that are independent of the noise they are compared with.

    E(y - mu)² - variance is the error of a blind estimate mu; with the same pixels for all, their noise cancels.
    held (m, y, x) bool: pixels that count, which were no network's target; `told`: see `Seen`.
    """

    sample: Sample
    held: Tensor
    told: Seen
    dtype: DType

    @property
    def chosen(self) -> NDArray[np.int64]:
        """Frames that are looked at."""
        usable = np.flatnonzero(self.sample.links.good)
        last = max(len(usable) - 1, 0)
        return usable[np.unique(np.linspace(0, last, CHECK_FRAMES).round().astype(int))] if len(usable) else usable

    def look(self, network: nn.Module) -> Look:
        """At a network, by pixels that were never a target."""
        estimates = self._estimates(network)
        return Look(network, estimates, self._risks(estimates))

    def completed(self, look: Look) -> Look:
        """The same with what a BlindSpot left over of the sample."""
        network, estimates, _ = look
        if not isinstance(network, BlindSpot) or not network.context_radius or not bool(network.kernel.any()):
            return look._replace(risks=self._risks(estimates))
        contexts = self.told.contexts[:, self.chosen, 0]
        found = leftover_filter(self.sample.frames[self.chosen] - estimates, self._joined(contexts))
        kernel = convolved(network.kernel, found.to(network.kernel.device))
        grown = rebuilt(network, {"leftover": True}, {"leftover_kernel": kernel})
        added = torch.stack(list(side_by_side(partial(convolved, kernels=found), contexts.flatten(0, 1))))
        estimates = estimates + self._joined(added.view_as(contexts))
        return Look(grown, estimates, self._risks(estimates))

    def _estimates(self, network: nn.Module) -> Tensor:
        """Of the frames that are looked at, (m, y, x) [electrons]."""
        device = next(chain(network.parameters(), network.buffers())).device
        level = torch.tensor(self.sample.level, dtype=torch.float32, device=device)
        offsets = cast(DenoisingNetwork, network).offsets

        def estimates(index: int) -> list[Tensor]:
            made = []
            with torch.inference_mode(), reduced_precision(str(device), self.dtype):
                for view in range(len(self.told.contexts)):
                    parts = self.told.inputs(self.sample, view, index, offsets, None)
                    stack, valid, context = (part[None].to(device) for part in parts)
                    made.append(network(stack, valid, level, context)[0].float().cpu())
            return made

        views = torch.zeros(len(self.told.contexts), len(self.chosen), *self.sample.frames.shape[-2:])
        for row, made in enumerate(side_by_side(estimates, self.chosen.tolist())):
            views[:, row] = torch.stack(made)
        return self._joined(views)

    def _joined(self, views: Tensor) -> Tensor:
        """Of images (view, m, y, x) those pixels whose view knows nothing of the frame there, (m, y, x)."""
        out = views[0].clone()
        for view in range(1, len(views)):
            out[:, self.told.judged(view)] = views[view][:, self.told.judged(view)]
        return out

    def _risks(self, estimates: Tensor) -> NDArray[np.float64]:
        frames, level = self.sample.frames, self.sample.level
        # The noise of a count is estimated by the count itself; that of a difference of networks cancels.
        readout = level.variance - level.mean
        risks = []
        for index, estimate in zip(self.chosen, estimates, strict=True):
            use = self.held[index] & torch.isfinite(frames[index])
            counts = frames[index][use].double()
            excess = (counts - estimate[use]) ** 2 - counts - readout
            if len(excess):
                risks.append(float(excess.mean()) / level.mean**2)
        return np.array(risks)


def mean_risk(risks: NDArray[np.float64]) -> float:
    """The mean over frames; NaN without any."""
    return float(risks.mean()) if len(risks) else float("nan")


def beats(one: NDArray[np.float64], other: NDArray[np.float64], *, sure: float) -> bool:
    """Whether the risks `one` are below `other`, frame by frame, by `sure` standard errors of their difference."""
    gain = other - one
    chance = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    return bool(gain.mean() > sure * chance) if len(gain) else False
