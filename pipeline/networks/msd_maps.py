"""The feature maps of a mixed-scale dense network, with nothing ever concatenated: the fast ways, and their gradient.

Layer i makes `width` maps: ReLU of a dilated 3 × 3 convolution of all maps before. All maps live in one buffer. Three
ways to fill it, of which the one is taken that was measured to be the fastest (`scripts/benchmark --networks`):

* `stepwise`, for wide layers: one convolution after the other; in the buffer a pixel's channels lie side by side.
* `rolling`, the same for large images that need no gradient: the buffer holds few rows of the image and moves down it.
  Each layer stays as far behind the one before as it looks ahead, so that nothing is computed twice, and a strip of all
  layers stays in the cache.
* `blocked`, for narrow layers, where a convolution with one or two outputs wastes the vector units. Rows of the image
  lie one after the other with zeros between, so that a shifted image is the same memory read from another place. Then a
  block of layers needs one matrix product, (9 taps of all its outputs) × (all earlier maps), whose rows are added to
  the block's sums at their nine places; within the block the few new maps follow layer by layer in the same manner.
  It runs over the image in tiles whose products stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

NARROW = 4  # widest layers for which `blocked` is faster
BLOCK = 10  # layers that share a matrix product
TILE = 8192  # px
SMALL = 256 * 256  # px of an image whose maps stay in the cache, so that `rolling` gains nothing
ROWS, COLUMNS = 64, 512  # px that each layer of `rolling` computes at once


class Layers(NamedTuple):
    """Weights (width, maps before, 3, 3), biases (width,) and dilations, layer by layer."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    dilations: Sequence[int]

    @property
    def width(self) -> int:
        """Maps that each layer makes."""
        return len(self.biases[0])

    @property
    def narrow(self) -> bool:
        """Whether `blocked` is the faster way."""
        return self.width <= NARROW and self.weights[0].device.type == "cpu"


def feature_maps(images: Tensor, layers: Layers) -> Tensor:
    """Images (batch, inputs, y, x) and all feature maps, (batch, maps, y, x); gradients flow back without copies."""
    if torch.is_grad_enabled():
        return cast(Tensor, _Maps.apply(images, tuple(layers.dilations), *layers.weights, *layers.biases))
    return _maps(images, layers)


def logits(images: Tensor, layers: Layers, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1 × 1 convolution, weight (outputs, maps, 1, 1), of all feature maps of images; no gradients."""
    if not layers.narrow:
        if images.device.type == "cpu" and images.shape[-2] * images.shape[-1] > SMALL:
            return rolling(images, layers, weight, bias)
        return functional.conv2d(stepwise(images, layers), weight, bias)
    matrix = weight[:, :, 0, 0]
    return torch.stack([_inner(bias[:, None] + matrix @ held.rows, held) for held in _each_blocked(images, layers)])


def _maps(images: Tensor, layers: Layers) -> Tensor:
    if not layers.narrow:
        return stepwise(images, layers)
    return torch.stack([_inner(held.rows, held) for held in _each_blocked(images, layers)])


def stepwise(images: Tensor, layers: Layers) -> Tensor:
    """Feature maps by one convolution for each layer."""
    batch, inputs, height, width = images.shape
    maps = inputs + sum(map(len, layers.biases))
    form = torch.channels_last if images.device.type == "cpu" else torch.contiguous_format
    buffer = torch.empty((batch, maps, height, width), dtype=images.dtype, device=images.device, memory_format=form)
    buffer[:, :inputs] = images
    filled = inputs
    for weight, bias, dilation in zip(*layers, strict=True):
        made = functional.conv2d(
            buffer[:, :filled], weight.contiguous(memory_format=form), bias, padding=dilation, dilation=dilation
        )
        torch.clamp_min(made, 0.0, out=buffer[:, filled : filled + len(bias)])
        filled += len(bias)
    return buffer


def rolling(images: Tensor, layers: Layers, weight: Tensor, bias: Tensor) -> Tensor:
    """What `logits` says, strip by strip of an image; takes the memory of one strip only."""
    form = torch.channels_last
    batch, inputs, height, width = images.shape
    reach, lags = max(layers.dilations), [*accumulate(layers.dilations)]
    above = lags[-1] + reach  # rows before those of the newest input that some layer still reads
    rows = max(ROWS, above)  # what is kept must not overlap the place it is moved to
    size = (1, weight.shape[1], above + rows + reach, width + 2 * reach)
    held = torch.empty(size, dtype=images.dtype, device=images.device, memory_format=form)
    layers = layers._replace(weights=[kernel.contiguous(memory_format=form) for kernel in layers.weights])
    out = images.new_empty(batch, len(weight), height, width)
    for image, made in zip(images, out, strict=True):
        held[:, :, :above], held[..., :reach], held[..., -reach:] = 0, 0, 0
        for top in range(0, height + lags[-1], rows):
            down = above - top  # from a row of the image to its row in the buffer
            if top:
                held[:, :, :above] = held[:, :, rows : rows + above]
            shown = image[:, top : top + rows]
            held[0, :inputs, above : above + shown.shape[1], reach:-reach] = shown
            held[:, :, height + down :] = 0
            for left in range(0, width + lags[-1], COLUMNS):
                filled = inputs
                for kernel, offset, dilation, lag in zip(*layers, lags, strict=True):
                    y = _range(top - lag, rows, height)
                    x = _range(left - lag, COLUMNS, width)
                    if len(y) and len(x):
                        maps = held[:, :filled, _cut(y, down, dilation), _cut(x, reach, dilation)]
                        new = functional.conv2d(maps, kernel, offset, dilation=dilation)
                        place = (..., _cut(y, down), _cut(x, reach))
                        torch.clamp_min(new, 0.0, out=held[:, filled : filled + len(offset)][place])
                    filled += len(offset)
                if len(y) and len(x):
                    made[..., _cut(y), _cut(x)] = functional.conv2d(held[place], weight, bias)[0]
    return out


def _range(first: int, count: int, size: int) -> range:
    """Of `count` pixels from `first` on, those of an axis of `size`."""
    return range(max(first, 0), min(first + count, size))


def _cut(pixels: range, offset: int = 0, border: int = 0) -> slice:
    """Pixels, and a border on either side, of an array whose first element lies `offset` before pixel 0."""
    return slice(pixels.start + offset - border, pixels.stop + offset + border)


# ------------------------------------------------------------------------------------------------------------ blocked


class _Held(NamedTuple):
    """Maps (map, …) of one image in rows of `stride` pixels, zeros after each row and `pad` zeros at either end."""

    buffer: Tensor
    pad: int
    stride: int
    height: int
    width: int

    @property
    def rows(self) -> Tensor:
        """The maps (map, height × stride) without the zeros at either end."""
        return self.buffer[:, self.pad : self.pad + self.height * self.stride]


def _inner(rows: Tensor, held: _Held) -> Tensor:
    """Maps (map, y, x) of (map, height × stride), a view."""
    return rows.view(len(rows), held.height, held.stride)[:, :, : held.width]


def _each_blocked(images: Tensor, layers: Layers) -> list[_Held]:
    return [blocked(image, layers) for image in images]


def blocked(image: Tensor, layers: Layers) -> _Held:
    """Feature maps of one image (inputs, y, x) by one matrix product for each block of layers."""
    inputs, height, _ = image.shape
    held = _empty(image, inputs + sum(map(len, layers.biases)), max(layers.dilations))
    inner = _inner(held.rows, held)
    inner[:inputs] = image
    sums = image.new_empty(BLOCK * layers.width, held.buffer.shape[1])
    scratch = image.new_empty(9 * BLOCK * layers.width * TILE)
    filled, count = inputs, len(layers.dilations)
    for first in range(0, count, BLOCK):
        block = range(first, min(first + BLOCK, count))
        before = filled
        places = [sums[k * layers.width : (k + 1) * layers.width] for k in range(len(block))]
        for index, place in zip(block, places, strict=True):
            place.copy_(layers.biases[index][:, None].expand_as(place))
        _spread(held, layers, block, places, slice(0, before), scratch)
        for index, place in zip(block, places, strict=True):
            if filled > before:
                _spread(held, layers, [index], [place], slice(before, filled), scratch)
            made = place[:, held.pad : held.pad + height * held.stride]
            torch.clamp_min(_inner(made, held), 0.0, out=inner[filled : filled + layers.width])
            filled += layers.width
    return held


def _empty(image: Tensor, maps: int, reach: int) -> _Held:
    """Room for the maps of an image; what is no pixel is zero, as far as a dilation of `reach` looks."""
    height, width = image.shape[-2:]
    stride, pad = width + reach, (width + reach) * reach + reach
    buffer = image.new_empty(maps, 2 * pad + height * stride)
    buffer[:, :pad] = 0
    buffer[:, -pad:] = 0
    held = _Held(buffer, pad, stride, height, width)
    held.rows.view(maps, height, stride)[:, :, width:] = 0
    return held


def _spread(
    held: _Held, layers: Layers, chosen: Sequence[int], sums: Sequence[Tensor], maps: slice, scratch: Tensor
) -> None:
    """Add to the sums (width, …) of the chosen layers what some of the maps contribute."""
    width, stride = layers.width, held.stride
    taps = [layers.weights[index][:, maps].permute(2, 3, 0, 1).reshape(9 * width, -1) for index in chosen]
    matrix, length = torch.cat(taps), held.height * stride
    for start in range(0, length, TILE):
        size = min(TILE, length - start)
        product = scratch[: len(matrix) * size].view(len(matrix), size)
        torch.mm(matrix, held.buffer[maps].narrow(1, held.pad + start, size), out=product)
        rows = iter(product.view(-1, width, size).unbind(0))
        for index, place in zip(chosen, sums, strict=True):
            dilation = layers.dilations[index]
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    # A pixel lends its tap (down, right) to the pixel that lies that much before it.
                    at = held.pad + start - (down * stride + right) * dilation
                    place.narrow(1, at, size).add_(next(rows))


# ----------------------------------------------------------------------------------------------------------- gradient


class _Maps(torch.autograd.Function):
    """Keeps each map once; autograd alone would keep every concatenation, which grows as the depth squared."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, dilations: tuple[int, ...], *parameters: Tensor) -> Tensor:
        count = len(dilations)
        layers = Layers(parameters[:count], parameters[count:], dilations)
        maps = _maps(images, layers)
        ctx.dilations = dilations
        ctx.save_for_backward(maps, *layers.weights)
        return maps

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        maps, *weights = ctx.saved_tensors
        wanted = gradients[0].clone()
        of_weights: list[Tensor] = []
        of_biases: list[Tensor] = []
        first = maps.shape[1]
        for weight, dilation in zip(reversed(weights), reversed(ctx.dilations), strict=True):
            first, last = first - len(weight), first
            own = wanted[:, first:last] * (maps[:, first:last] > 0)
            back = first > 0 or ctx.needs_input_grad[0]
            before, of_weight, of_bias = torch.ops.aten.convolution_backward(
                own, maps[:, :first], weight, [len(weight)], [1, 1], [dilation] * 2, [dilation] * 2, False, [0, 0], 1,
                [back, True, True],
            )  # fmt: skip
            wanted[:, :first] += before
            of_weights.insert(0, of_weight)
            of_biases.insert(0, of_bias)
        return wanted[:, :first] if ctx.needs_input_grad[0] else None, None, *of_weights, *of_biases
