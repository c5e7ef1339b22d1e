"""A run of CPU kernels on fixed memory, recorded once and replayed in one native call.

A decode step of a small model is some two hundred kernels of a few microseconds, each called from Python at about the
same price. :class:`Program` runs a function once, writes down every native call with its packed arguments, keeps every
tensor that it allocated, and later repeats the calls alone, in one parallel region. That is right as long as the
inputs lie where they lay, and the function does nothing but allocate, view and call native kernels: both are checked.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tinyfuse.kernels import _native

MOST_PROGRAMS = 8  # per segment: caches of different requests
STAGED_BYTES = 1 << 16  # inputs up to this size may move: they are copied to memory that stays
_recording = threading.Lock()


class NotReplayable(Exception):
    """The function does more than allocate, view and call native kernels; the message names what."""


class _Watch(TorchDispatchMode):
    """Keeps what is allocated; the name of the first operation that computes is left in ``computes``."""

    def __init__(self):
        super().__init__()
        self.kept: list[Any] = []
        self.computes: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.kept.append(out)
        if not (func.is_view or func.overloadpacket.__name__ in ("empty", "empty_like", "new_empty", "empty_strided")):
            self.computes = self.computes or str(func)
        return out


class Program:
    """``function(*args)``, run once on creation; :meth:`replay` repeats its native calls on the same memory.

    ``result`` holds the outputs, which every replay overwrites. Raises :class:`NotReplayable` (the result is then in
    ``NotReplayable.result``).
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]):
        watch, calls = _Watch(), []
        with _recording:
            _native.tape = calls
            _native.taping = threading.get_ident()
            try:
                with watch:
                    self.result = function(*args)
            finally:
                _native.tape = None
        if watch.computes:
            error = NotReplayable(f"{watch.computes} is no native kernel")
            error.result = self.result
            raise error
        self._kept = watch.kept
        self._packed = [packed for _, packed in calls]
        pointers = []
        for name, packed in calls:
            entry = ctypes.cast(_native.function(name), ctypes.c_void_p).value
            pointers += (entry, ctypes.cast(ctypes.c_char_p(packed), ctypes.c_void_p).value)
        self._calls = struct.pack(f"={len(pointers)}q", *pointers)
        address = ctypes.cast(ctypes.c_char_p(self._calls), ctypes.c_void_p).value
        self._replay = struct.pack("=3q", address, len(calls), _native.threads())

    def replay(self) -> Any:
        """The outputs, in the memory that the last call returned."""
        _native.call("tf_replay", self._replay)
        return self.result


class Segment:
    """A function of tensors that turns into programs, one for each place that its inputs are seen at twice in a row.

    ``written``: indices of the arguments that the function writes (caches). ``dynamic``: of those whose shape changes
    from call to call. ``constants``: of those that the caller knows to be the same memory in every call. Outputs are
    copies, so that a later call leaves them alone. Where the function cannot be replayed it runs as it is; ``reason``
    then says why.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        written: frozenset[int] = frozenset(),
        dynamic: frozenset[int] = frozenset(),
        constants: frozenset[int] = frozenset(),
    ):
        self.function = function
        self.constants = constants
        self.kept = written | dynamic  # never staged
        self.dynamic = sorted(dynamic)
        self.reason: str | None = None
        self._tensors: list[int] = []
        self._others: list[int] = []
        self._staged: dict[int, Tensor] = {}
        self._last: tuple[Any, ...] = ()
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        if self.reason is not None or not self._lock.acquire(blocking=False):
            return self.function(*args)  # another thread holds the buffers
        try:
            return self._run(args)
        finally:
            self._lock.release()

    def _run(self, args: tuple[Any, ...]) -> Any:
        if self._staged:
            args = list(args)
            for i, buffer in self._staged.items():
                args[i] = buffer.copy_(args[i])
        if not self._tensors:
            looked_at = [i for i in range(len(args)) if i not in self.constants]
            self._tensors = [i for i in looked_at if isinstance(args[i], Tensor)]
            self._others = [i for i in looked_at if not isinstance(args[i], Tensor)]
        key = (*map(Tensor.data_ptr, map(args.__getitem__, self._tensors)), *map(args.__getitem__, self._others))
        layout = tuple((args[i].shape, args[i].stride()) for i in self.dynamic if isinstance(args[i], Tensor))
        program = self._programs.get((key, layout, _native.threads()))
        if program is not None:
            return tree_map_only(Tensor, Tensor.clone, program.replay())
        last, self._last = self._last, (key, layout, _native.threads())
        if last == self._last:
            return self._record(last, tuple(args))
        if last:
            self._stage(args, last[0], key)
        return self.function(*args)

    def _stage(self, args: Sequence[Any], last: tuple[Any, ...], key: tuple[Any, ...]) -> None:
        """Small inputs that have moved since the last call are copied to memory that stays from the next call on."""
        moved = [i for i, now, then in zip(self._tensors, key, last, strict=False) if now != then]
        with torch.inference_mode(False):  # a tensor of inference mode could not be written outside it
            for i in moved:
                if i not in self.kept and i not in self._staged and args[i].nbytes <= STAGED_BYTES:
                    self._staged[i] = args[i].clone()

    def _record(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        if len(self._programs) == MOST_PROGRAMS:
            del self._programs[next(iter(self._programs))]
        try:
            program = self._programs[key] = Program(self.function, args)
        except NotReplayable as error:
            self.reason = str(error)
            return error.result
        return tree_map_only(Tensor, Tensor.clone, program.result)
