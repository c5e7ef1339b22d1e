"""A compiled graph as CUDA graphs, one per kind of arguments: the GPU waits for Python at each kernel of a small model.

Weights and caches are read and written where they lie, other arguments are copied in, and results are copied out, so
that no call changes what an earlier one returned.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.utils._pytree import tree_leaves, tree_map_only

from tinyfuse import fallback
from tinyfuse.graph.nodes import storage
from tinyfuse.graph.share import written
from tinyfuse.runtime.captured import Captured, CaptureStreams, making

DEVICES = ("cuda",)
MOST = 16  # CUDA graphs of one compiled graph, those that have paid for themselves not counted
PAID = 16  # replays that save what the recording took
MOST_KINDS = 1024  # that are told apart
MOST_BYTES = 1 << 22  # copied in at each call
MOST_RETURNED = 1 << 25  # bytes that a graph holds beside what the caller gets
SMALL = 1 << 16  # bytes that are sooner copied than recorded anew
BUSY = 1.5  # times as long as Python takes: then the GPU does not wait for it


def written_arguments(traced: Graph) -> set[int] | None:
    """Which arguments of Dynamo's graph it writes; None if it returns one, as itself or as a view."""
    arguments = [storage(node) for node in traced.find_nodes(op="placeholder")]
    returned = set(map(storage, traced.output_node().all_input_nodes)) - {None}
    changed = written(traced)
    return None if returned & set(arguments) else {i for i, memory in enumerate(arguments) if memory in changed}


class Replay:
    """Calls ``run``: the first two times of a kind as it is, then as a CUDA graph if Python was what took long.

    Weights are the arguments ``written`` and those that are the same tensors from call to call, large ones also if
    others come in their place now and then, as the keys and values of the next prompt do.
    """

    def __init__(self, run: Callable[..., Any], written: set[int]):
        self.run, self.written = run, written
        self.lock = threading.Lock()
        self.streams = CaptureStreams()
        self.weights: dict[int, tuple[weakref.ref[Tensor], int]] | None = None
        self.kinds: dict[Any, Recorded | int | None] = {}  # graphs; how often seen; None: never to be recorded
        self.left = MOST
        self.calm = 0  # calls since a weight was another tensor
        self.last: torch.cuda.Stream | None = None

    def __call__(self, *args: Any) -> Any:
        if making() or not (self.left or self.kinds):
            return self.run(*args)
        with self.lock:
            self._find_weights(args)
            given = {i: arg for i, arg in enumerate(args) if i not in self.weights}
            kind = tuple([_kind(arg) for arg in given.values()])
            seen = self.kinds.get(kind, 0)
            if isinstance(seen, Recorded):
                self._in_order(seen.device)
                return seen(given)
            if seen == 1:
                return self._decide(kind, args, given)
            if len(self.kinds) < MOST_KINDS:
                self.kinds.setdefault(kind, 1)
        return self.run(*args)

    def _find_weights(self, args: Sequence[Any]) -> None:
        """What was recorded of other tensors, or of other memory, is dropped."""
        if self.weights is None:
            self.weights = {i: (weakref.ref(a), a.data_ptr()) for i, a in enumerate(args) if isinstance(a, Tensor)}
            return
        known = self.weights.items()
        changed = [i for i, (ref, address) in known if args[i] is not ref() or args[i].data_ptr() != address]
        for i in changed:
            ref, _ = self.weights.pop(i)
            if args[i] is ref() or i in self.written or (self.calm >= 2 and args[i].nbytes > SMALL):
                self.weights[i] = weakref.ref(args[i]), args[i].data_ptr()
        if changed:
            self.left += sum(isinstance(kind, Recorded) and kind.replays >= PAID for kind in self.kinds.values())
            self.kinds.clear()
        self.calm = 0 if changed else self.calm + 1

    def _decide(self, kind: Any, args: Sequence[Any], given: dict[int, Any]) -> Any:
        """The third call of a kind, after which it is recorded or never will be."""
        self.kinds[kind] = None
        if reason := self._unfit(args, given):
            fallback.note("backend", f"a graph is launched from Python: {reason}")
            return self.run(*args)
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        outputs, waits = _timed(self.run, args, device)
        if waits and sum(leaf.nbytes for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)) <= MOST_RETURNED:
            self.left -= 1
            try:
                self.kinds[kind] = self._record(args, given, device)
            except Exception as error:
                if not isinstance(error, torch.OutOfMemoryError):
                    self.left = 0
                    self.kinds.clear()
                fallback.note("backend", f"a graph is launched from Python, since it is no CUDA graph: {error}")
        return outputs

    def _unfit(self, args: Sequence[Any], given: dict[int, Any]) -> str | None:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        kinds = {type(tensor).__name__ for tensor in tensors} - {"Tensor", "Parameter"}
        devices = sorted({str(tensor.device) for tensor in tensors})
        copied = sum(arg.nbytes for arg in given.values() if isinstance(arg, Tensor))
        if kinds:
            return f"its arguments include a {kinds.pop()}"
        if len(devices) != 1:
            return f"its arguments are on {' and '.join(devices)}"
        if copied > MOST_BYTES:
            return f"{copied} bytes of its arguments are new at each call, more than {MOST_BYTES}"
        return None if self.left else f"it has {MOST} CUDA graphs for other kinds of arguments"

    def _record(self, args: Sequence[Any], given: dict[int, Any], device: torch.device) -> Recorded:
        self._in_order(device)
        others = [kind.run for kind in self.kinds.values() if isinstance(kind, Recorded)]
        stream = self.streams.on(device) if device.type == "cuda" else None
        state = [args[i] for i in sorted(self.written)]
        return Recorded(self.run, args, given, state, device, stream, next(iter(others), None))

    def _in_order(self, device: torch.device) -> None:
        """What follows on the current stream starts after the last such use of the buffers, whatever its stream."""
        if device.type != "cuda":
            return
        stream = torch.cuda.current_stream(device)
        if self.last is not None and stream != self.last:
            stream.wait_stream(self.last)
        self.last = stream


class Recorded:
    """``run`` on buffers in place of the arguments ``given`` by position, and on the others themselves. ``state``:
    what it writes; ``stream``: that it is captured on, None for a device without CUDA graphs; ``like``: a graph whose
    memory it shares."""

    def __init__(
        self, run: Callable[..., Any], args: Sequence[Any], given: dict[int, Any], state: list[Tensor],
        device: torch.device, stream: torch.cuda.Stream | None, like: Captured | None,
    ):  # fmt: skip
        self.device, self.replays = device, 0
        with torch.inference_mode(False), torch.no_grad():
            self.buffers = {i: arg.clone() for i, arg in given.items() if isinstance(arg, Tensor)}
            on_buffers = [self.buffers.get(i, arg) for i, arg in enumerate(args)]
            self.run: Callable[[], Any] = partial(run, *on_buffers)
            if stream is not None:
                self.run = Captured(self.run, state, stream, like)

    def __call__(self, given: dict[int, Any]) -> Any:
        self.replays += 1
        if self.buffers:
            torch._foreach_copy_(list(self.buffers.values()), [given[i] for i in self.buffers])
        return tree_map_only(Tensor, torch.clone, self.run())


def _kind(arg: Any) -> Any:
    """What calls of one CUDA graph have in common in an argument that is copied in, wherever it lies."""
    return (arg.dtype, arg.shape, arg.stride(), arg.device) if isinstance(arg, Tensor) else arg


def _timed(run: Callable[..., Any], args: Sequence[Any], device: torch.device) -> tuple[Any, bool]:
    """What ``run`` returns, and whether the GPU waits for Python meanwhile."""
    if device.type != "cuda":
        return run(*args), True
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began = time.perf_counter()
    start.record()
    outputs = run(*args)
    end.record()
    host = time.perf_counter() - began
    end.synchronize()
    return outputs, start.elapsed_time(end) * 1e-3 < BUSY * host
