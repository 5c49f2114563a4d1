"""What keeps a GPU at work: frames that travel while it computes, and, if asked for, a network's passes as graphs.

Neither changes what is computed; on a CPU there is nothing to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Passes over one shape before it is captured, which takes as long as a few: a graph must be used to be worth it.
PASSES = 3


@contextmanager
def uploaded(frames: NDArray[Any] | Tensor, device: str) -> Iterator[tuple[Tensor, Callable[[int], None]]]:
    """Frames (n, y, x) on a device, and a function to call with the last frame that is about to be read.

    To a GPU they are copied one by one through two page-locked buffers, by a thread and on a stream of their own, so
    that the first ones are computed with while others still travel.
    """
    source = torch.as_tensor(frames)
    if not device.startswith("cuda") or source.is_cuda:
        yield source.to(device), lambda last: None
        return
    images = torch.empty_like(source, device=device)
    # Torch hands the same few streams of a priority out again and again; this must never be the one of `Graphs`.
    stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    # That memory may be in use until now, and is to be freed only after the last copy.
    stream.wait_stream(torch.cuda.current_stream(device))
    images.record_stream(stream)
    buffers = [torch.empty_like(source[:1], pin_memory=True) for _ in range(2)]
    there = [torch.cuda.Event(blocking=True) for _ in range(len(source))]  # type: ignore[no-untyped-call]

    def copy(index: int) -> None:
        buffer = buffers[index % 2]
        if index >= 2:
            there[index - 2].synchronize()  # the buffer is free again
        with torch.inference_mode(), torch.cuda.stream(stream):
            buffer[0].copy_(source[index])
            images[index].copy_(buffer[0], non_blocking=True)
            there[index].record(stream)

    carrier = ThreadPoolExecutor(1, thread_name_prefix="upload")
    copies: list[Future[None]] = [carrier.submit(copy, index) for index in range(len(source))]

    def arrive(last: int) -> None:
        if copies:
            last = min(last, len(copies) - 1)
            copies[last].result()
            torch.cuda.current_stream(device).wait_event(there[last])

    try:
        yield images, arrive
    finally:
        carrier.shutdown(cancel_futures=True)


class Results:
    """Images collected in host memory; from a GPU they are copied while it goes on."""

    def __init__(self, many: int, device: str) -> None:
        self._many, self._kept, self._added = many, list[Tensor](), 0
        self._stream: Any = torch.cuda.Stream(device, priority=-1) if device.startswith("cuda") else None  # type: ignore[no-untyped-call]
        self._host: Tensor | None = None

    def add(self, made: Tensor) -> None:
        """The next one (k, y, x), all of one shape."""
        if self._stream is None:
            self._kept.append(made)
            return
        if self._host is None:
            self._host = torch.empty((self._many, *made.shape), dtype=made.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(made.device))
        with torch.cuda.stream(self._stream):
            self._host[self._added].copy_(made, non_blocking=True)
        made.record_stream(self._stream)  # not freed, hence not overwritten, before it was copied
        self._added += 1

    def all(self) -> NDArray[np.float32]:
        """(many, k, y, x); at least one."""
        if self._host is None:
            return torch.stack(self._kept).numpy()
        self._stream.synchronize()
        return self._host.numpy().copy()  # what is page-locked serves the next frames


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class Graphs:
    """Stands for a network whose passes over inputs of the same shapes are replayed as a CUDA graph, one launch instead
    of some fifty. Written without a GPU at hand: not the default.

    The first replay of each is held against the pass itself; if they differ, or it cannot be captured, a warning says
    so and this process captures no more. What is returned is overwritten by the next call.
    """

    refused = False

    def __init__(self, run: Callable[..., Tensor]) -> None:
        self._run = run
        self._seen: dict[tuple[Any, ...], int] = {}
        self._known: dict[tuple[Any, ...], _Captured] = {}
        self._made: list[torch.cuda.CUDAGraph] = []
        self._pool: Any = None

    def __getattr__(self, name: str) -> Any:
        """All else is the network's."""
        return getattr(self._run, name)

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """A pass of the network over its inputs, some of which may be None."""
        key = tuple(None if part is None else (part.shape, part.dtype) for part in inputs)
        self._seen[key] = self._seen.get(key, 0) + 1
        if key in self._known:
            return _replayed(self._known[key], inputs)
        made = self._run(*inputs)
        if self._seen[key] > PASSES and not Graphs.refused:
            self._learn(key, inputs, made)
        return made

    def _learn(self, key: tuple[Any, ...], inputs: tuple[Tensor | None, ...], made: Tensor) -> None:
        try:
            found = self._capture(inputs)
            least = 1e-3 * float(made.nan_to_num().std())
            same = torch.allclose(_replayed(found, inputs), made, rtol=1e-3, atol=least, equal_nan=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            same, why = False, f"it could not be captured: {error}"
        else:
            why = "the graph's output was not the network's"
            self._made.append(found.graph)  # kept also if it is not used: others share its memory
            if same:
                self._known[key] = found
        if not same:
            Graphs.refused = True
            warnings.warn(f"the network runs without CUDA graphs: {why}", stacklevel=3)

    def _capture(self, inputs: tuple[Tensor | None, ...]) -> _Captured:
        # Not the values that the first replay is checked with.
        kept = tuple(None if part is None else torch.zeros_like(part) for part in inputs)
        device = next(part.device for part in inputs if part is not None)
        dtype, reduced = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        aside = _capture_stream(device)
        # Weights that autocast has converted before are not part of the graph, hence no cache.
        with torch.cuda.device(device), torch.autocast("cuda", dtype=dtype, enabled=reduced, cache_enabled=False):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._run(*kept)
                # Other threads copy meanwhile, on other streams.
                with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
                    output = self._run(*kept)
            torch.cuda.current_stream().wait_stream(aside)
        return _Captured(graph, tuple(part for part in kept if part is not None), output)


@cache
def _capture_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _replayed(found: _Captured, inputs: tuple[Tensor | None, ...]) -> Tensor:
    tensors = (part for part in inputs if part is not None)
    for kept, new in zip(found.inputs, tensors, strict=True):
        kept.copy_(new)
    found.graph.replay()
    return found.output
