"""A blind-spot network over neighbouring frames at half resolution, blind to its own 2 x 2 pixels by construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

# Reach [px] of the filter of the neighbours, and the mean of how many frames it filters. Both for long-range order: it
# costs no convolutions, and beyond this little is gained.
CONTEXT_RADIUS = 96
AROUND = 15
_COMMON = {"context": CONTEXT_RADIUS, "around": AROUND, "errors": True}
# By cost: about 1.5, 5 and 20 thousand multiplications per pixel.
TIERS: dict[str, dict[str, Any]] = {
    "small": {"frames": 5, "channels": 16, "dilations": [2], **_COMMON},
    "medium": {"frames": 7, "channels": 32, "dilations": [2], **_COMMON},
    "large": {"frames": 7, "channels": 48, "dilations": [2, 4, 2], **_COMMON},
}
# Contrast that, at high dose, becomes an input of one; at low dose the noise does (see `scale_of`).
_CONTRAST = 0.2
# The context has little noise, hence little amplitude in units of the noise: more of it makes it learnt sooner.
_GAIN = 4.0
# The least error [units of `scale_of`] that a network can expect, and where learning it begins, before the softplus.
_LEAST_ERROR, _FIRST_ERROR = 1e-3, -2.5


def scale_of(level: Tensor) -> Tensor:
    """Electrons that make one unit at the input: the noise at low dose, a fifth of the mean at high dose."""
    mean, variance = level.float()
    return torch.sqrt(variance + (_CONTRAST * mean) ** 2)


def offsets_of(frames: int) -> tuple[int, ...]:
    """An odd number of frames, counted from the middle one."""
    return tuple(range(-(frames // 2), frames // 2 + 1))


def offsets_around(frames: int, around: int) -> tuple[int, ...]:
    """The same for the frames of the context, of which `frames` are the middle ones; 0: just these."""
    if around and (around % 2 == 0 or around < frames):
        raise ValueError(f"around is {around}; expected an odd number from {frames} (frames) on, or 0")
    return offsets_of(around or frames)


class MaskedConv(nn.Conv2d):
    """A 3 x 3 convolution that cannot see the centre of its kernel in the channels [start, stop)."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, *, start: int, stop: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        mask = torch.ones(1, inputs, 3, 3)
        mask[:, start:stop, 1, 1] = 0
        self.register_buffer("mask", mask, persistent=False)
        with torch.no_grad():
            self.weight.mul_(mask)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the centre weights held at zero."""
        return functional.conv2d(input, self.weight * self.mask, self.bias, padding=1)


class BlindSpot(nn.Module):
    """Estimate a frame from its neighbours in time and space without looking at the pixel that is estimated.

    Four pixels become four channels of one half-resolution pixel q. The first convolution sees every frame but, in the
    centre frame, not q itself; what it sees there lies an odd number of steps away along y or x. All later
    convolutions have even dilation, so no path leads back to q: the 2 x 2 pixels of q are blind.
    `frames` is odd (neighbours -r … r); `channels` must be a multiple of 16, because torch's bfloat16 gradients of
    dilated convolutions are otherwise NaN on CPUs. With `context` > 0 the network is also given the mean of the
    neighbours (never the centre frame) filtered by `kernel`, which reaches that many pixels: what long-range order
    tells at no cost in convolutions. That mean is over `around` frames, an odd number (0: over `frames`). Without
    `own_frame` it sees nothing of a centre frame that has any neighbour: where a detector spreads the noise of a pixel
    over others, these would betray it. `motion`: how far parts of its movie move on their own [px] (see
    `pipeline.steps.motion`), empty where that is not known. With `errors` it can also say how far off it expects to be,
    from the same features, hence as blind; see `with_errors`. With `leftover` the mean of the neighbours behind a
    second filter, `leftover_kernel`, is added to the estimate: what the network leaves over of its movie (see
    `pipeline.networks.wiener.leftover_filter`).
    """

    periodic = False
    kernel: Tensor
    leftover_kernel: Tensor | None

    def __init__(
        self,
        *,
        frames: int,
        channels: int,
        dilations: Sequence[int],
        context: int = 0,
        around: int = 0,
        own_frame: bool = True,
        motion: Sequence[float] = (),
        errors: bool = False,
        leftover: bool = False,
    ) -> None:
        super().__init__()
        if frames < 1 or frames % 2 == 0:
            raise ValueError(f"frames is {frames}; expected an odd number")
        if channels < 16 or channels % 16:
            raise ValueError(f"channels is {channels}; expected a multiple of 16")
        if any(d < 2 or d % 2 for d in dilations):
            raise ValueError(f"dilations are {tuple(dilations)}; expected even numbers, or the network is not blind")
        moving = list(motion) if any(motion) else []
        more = {"context": context, "around": around, "motion": moving, "errors": errors, "leftover": leftover}
        more = {name: value for name, value in more.items() if value} | ({} if own_frame else {"own_frame": False})
        self.config = {"frames": frames, "channels": channels, "dilations": list(dilations), **more}
        self.motion = tuple(motion)
        self.context_radius, radius = context, frames // 2
        self.offsets = offsets_of(frames)
        self.around = offsets_around(frames, around)
        # In full-resolution pixels: half-resolution steps, times two, and one for the phase within the 2 x 2 block.
        self.receptive_radius = 2 * (1 + sum(dilations)) + 1
        self.first = MaskedConv(4 * frames, channels, start=4 * radius, stop=4 * radius + 4)
        self.missing = nn.Conv2d(frames, channels, 1, bias=False)
        self.body = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=d, dilation=d) for d in dilations)
        self.mix = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.last = nn.Conv2d(channels, 4, 1)
        gains = nn.Linear(16, 2 * channels * (1 + len(dilations)))
        self.dose = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), gains)
        if context:
            self.register_buffer("kernel", torch.zeros(2 * context + 1, 2 * context + 1))
            self.register_buffer("leftover_kernel", torch.zeros_like(self.kernel) if leftover else None)
            self.early = nn.Conv2d(4, channels, 1, bias=False)
            self.skip = nn.Parameter(torch.zeros(1))
            nn.init.zeros_(self.early.weight)
        self.error = nn.Conv2d(channels, 4, 1) if errors else None  # the last one: it changes no other's first weights
        with torch.no_grad():
            self.missing.weight.zero_()
            self.last.weight.mul_(0.3)
            if self.error is not None:
                self.error.weight.zero_()
                cast(Tensor, self.error.bias).fill_(_FIRST_ERROR)
            gains.weight.mul_(0.1)
            gains.bias.zero_()

    @property
    def macs_per_pixel(self) -> float:
        """Multiply-accumulate operations of inference per pixel of a frame."""
        convolutions = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        return sum(m.weight.numel() for m in convolutions) / 4

    @property
    def kernels(self) -> Tensor:
        """The filters of the mean of the neighbours, (1 or 2, y, x)."""
        parts = (self.kernel, self.leftover_kernel)
        return torch.stack([part for part in parts if part is not None])

    def forward(self, frames: Tensor, valid: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """Estimate the centre frame, (batch, y, x) [electrons].

        frames (batch, slot, y, x) [electrons], slots in the order of `offsets`, holding the mean of `level` where they
        have no data; valid (batch, slot, y, x) bool: where they have; level (2,): mean and noise variance of the movie
        [electrons], one for the whole batch; context (batch, k, y, x) [electrons about the mean]: the mean of the
        neighbours behind each of `kernels`, for a network that uses it.
        """
        return self._run(frames, valid, level, context, errors=False)[:, 0]

    def with_errors(self, frames: Tensor, valid: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """The estimate, as `forward` makes it, and the standard deviation of its error, (batch, 2, y, x) [electrons].

        A network without `errors` knows none: NaN.
        """
        return self._run(frames, valid, level, context, errors=True)

    def _run(self, frames: Tensor, valid: Tensor, level: Tensor, context: Tensor | None, *, errors: bool) -> Tensor:
        height, width = frames.shape[-2:]
        scale, mean = scale_of(level), level[0]
        x = (frames - mean).mul_(1 / scale)
        if not self.config.get("own_frame", True):
            own, seen = frames.shape[1] // 2, valid.flatten(2).any(2)
            hidden = (seen.sum(1) > seen[:, own].long())[:, None, None]
            x[:, own] = x[:, own].masked_fill(hidden, 0)
            valid = valid.clone()
            valid[:, own] &= ~hidden
        # An odd edge is repeated inside its own 2 x 2 block, which is blind as a whole; reflecting it would leak.
        odd = (0, width % 2, 0, height % 2)
        extra = None if context is None or not self.context_radius else context[:, :1] / scale
        if any(odd):
            x = functional.pad(x, odd, mode="replicate")
            extra = None if extra is None else functional.pad(extra, odd, mode="replicate")
            valid = functional.pad(valid.to(x.dtype), odd, mode="replicate") > 0
        precision = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        # In use a GPU is never waited for, and what it does may be captured; it adds zeros instead.
        complete = not (x.is_cuda and torch.is_inference_mode_enabled()) and bool(valid.all())
        missing = None if complete else ~_blocks_all(valid)
        extra = None if extra is None else _unshuffle(extra)
        h = self._half(_unshuffle(x.to(precision)), missing, level, extra)
        y = self.last(h).float()
        if extra is not None:
            y = y + self.skip * extra
        made = [torch.add(mean, _shuffle(y)[:, :height, :width] * scale)]
        if context is not None and context.shape[1] > 1:
            made[0] = made[0] + context[:, 1]
        if errors and self.error is None:
            made.append(torch.full_like(made[0], torch.nan))
        elif errors and self.error is not None:
            # Not an exponential: what is brighter than all that was trained on would be stated to be off by anything.
            expected = functional.softplus(self.error(h).float()) + _LEAST_ERROR
            made.append(_shuffle(expected)[:, :height, :width] * scale)
        return torch.stack(made, 1)

    def _half(self, x: Tensor, missing: Tensor | None, level: Tensor, extra: Tensor | None) -> Tensor:
        """The network proper: (batch, 4 slots, y/2, x/2), in units of `scale_of`, to features (batch, c, y/2, x/2)."""
        gains = self._gains(level)
        h = self._scaled(self.first, self.first.weight * self.first.mask, x, gains[0])
        if extra is not None:
            h = h.add_(self.early((_GAIN * extra).to(x.dtype)))
        if missing is not None:
            weight = self.missing.weight * (1 + gains[0][0])[:, None, None, None]
            missing = missing.to(x.dtype).contiguous(memory_format=torch.channels_last)
            h = h.add_(functional.conv2d(missing, weight))
        for layer, gain in zip(self.body, gains[1:], strict=True):
            convolution = cast(nn.Conv2d, layer)
            h = self._scaled(convolution, convolution.weight, functional.leaky_relu(h, 0.1), gain).add_(h)
        h = functional.leaky_relu(h, 0.1, inplace=True)
        for mix in self.mix:
            h = functional.leaky_relu(mix(h), 0.1, inplace=True)
        return h

    def _gains(self, level: Tensor) -> list[Tensor]:
        """Gain and offset of each 3 x 3 layer, (2, channels), from the signal-to-noise ratio that the dose allows."""
        with torch.autocast(level.device.type, enabled=False):
            mean, variance = level.float()
            signal = torch.log10(mean.clamp_min(1e-6) ** 2 / variance.clamp_min(1e-9)).clamp(-2, 3)
            gains: Tensor = self.dose(torch.stack([signal, signal**2 / 3]))
        return list(gains.reshape(1 + len(self.body), 2, -1))

    @staticmethod
    def _scaled(convolution: nn.Conv2d, weight: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        """The convolution times (1 + gain) plus offset, folded into its weights: one pass over the pixels less."""
        factor = 1 + gain[0]
        bias = cast(Tensor, convolution.bias) * factor + gain[1]
        weight = weight * factor[:, None, None, None]
        return functional.conv2d(x, weight, bias, padding=convolution.padding, dilation=convolution.dilation)  # type: ignore[arg-type]


def rebuilt(network: BlindSpot, config: dict[str, Any], tensors: dict[str, Tensor]) -> BlindSpot:
    """A copy with another configuration, some of its tensors given; what only one of both has is new or lost."""
    made = BlindSpot(**{**network.config, **config})
    known = {**network.state_dict(), **tensors}
    made.load_state_dict({name: known.get(name, value) for name, value in made.state_dict().items()})
    return made.train(network.training).to(next(network.parameters()).device)


def _unshuffle(x: Tensor) -> Tensor:
    """`pixel_unshuffle` by 2 that writes channels last, in one copy."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2, w // 2, 4 * c)
    return x.permute(0, 3, 1, 2)


def _shuffle(x: Tensor) -> Tensor:
    """`pixel_shuffle` by 2 of four channels: (batch, 4, y, x) to (batch, 2 y, 2 x)."""
    b, _, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(b, h, w, 2, 2).permute(0, 1, 3, 2, 4).reshape(b, 2 * h, 2 * w)


def _blocks_all(valid: Tensor) -> Tensor:
    """Whether all of each 2 x 2 block is valid, (batch, slot, y/2, x/2) bool."""
    rows = valid[..., ::2, :] & valid[..., 1::2, :]
    return rows[..., ::2] & rows[..., 1::2]
