"""What Python runs, as one CUDA graph."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch
from torch import Tensor

WARM_UPS = 3
_making = threading.local()


def making() -> bool:
    """Whether this thread is making a CUDA graph, or running first what it will hold."""
    return getattr(_making, "on", False) or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


class CaptureStreams:
    """The streams that one model captures on, one per device. They go back for the next model to use."""

    free: ClassVar[dict[torch.device, list[torch.cuda.Stream]]] = {}

    def __init__(self) -> None:
        self.held: dict[torch.device, torch.cuda.Stream] = {}
        weakref.finalize(self, CaptureStreams._give_back, self.held)

    def on(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self.held:
            free = self.free.get(device)
            self.held[device] = free.pop() if free else torch.cuda.Stream(device)
        return self.held[device]

    def release(self) -> None:
        self._give_back(self.held)

    @classmethod
    def _give_back(cls, held: dict[torch.device, torch.cuda.Stream]) -> None:
        for device, stream in held.items():
            cls.free.setdefault(device, []).append(stream)
        held.clear()


class NotCapturable(Exception):
    """An operation cannot be part of a CUDA graph; the message is its error."""


class Captured:
    """``run`` as one CUDA graph.

    ``state``: what ``run`` changes and has to be found unchanged after the warm-up, as are the random numbers. The keys
    and values that the warm-up writes are those that the first replay writes again. ``stream`` is one that no other
    model captures on: products count their programs per stream. ``like``: a graph whose memory this one shares, for the
    two never run at the same time. Raises NotCapturable, with ``state`` as it was.
    """

    def __init__(
        self, run: Callable[[], Any], state: list[Tensor], stream: torch.cuda.Stream, like: Captured | None = None
    ):
        held = [tensor.clone() for tensor in state]
        device = stream.device
        random = torch.cuda.default_generators[device.index]
        drawn = random.get_offset()
        self.graph = torch.cuda.CUDAGraph()
        self.pool = like.pool if like is not None else torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream(device))
        _making.on = True
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    try:
                        run()
                    finally:
                        if state:
                            torch._foreach_copy_(state, held)
            torch.cuda.current_stream(device).wait_stream(stream)
            torch.cuda.synchronize(device)
            with torch.cuda.stream(stream), _own_workspaces(), no_collection():
                torch.cuda.empty_cache()
                self._capture(run, device)
        finally:
            _making.on = False
            random.set_offset(drawn)

    def _capture(self, run: Callable[[], Any], device: torch.device) -> None:
        self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        failure = None
        try:
            self.result = run()
        except Exception as error:
            failure = error
        try:
            self.graph.capture_end()
        except Exception as error:
            failure = failure or error
            _finish_capture(self.pool, device)
        if failure is not None:
            raise NotCapturable(f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}") from failure

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result


@contextmanager
def no_collection() -> Iterator[None]:
    """The garbage collector waits: what a destructor asks of CUDA, such as the end of a module or of another graph, may
    end a capture, and looking through all that is imported took it a fifth of a first call."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """cuBLAS takes its workspaces from the memory of the graph captured meanwhile. It keeps one per stream, which
    anyone may free: Inductor does so before it records a graph of its own."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _finish_capture(pool: Any, device: torch.device) -> None:
    """What torch leaves undone when a capture ends in an error: the random numbers count as captured until a capture
    ends well, and the allocator still serves ``pool``, unless this torch has seen to that."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    torch.zeros(1, device=device)
    graph.capture_end()
    for finish in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with suppress(RuntimeError):
            finish(device.index, pool)
