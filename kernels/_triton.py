"""Triton where it is installed, inert stand-ins where it is not, so that op files import anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from threading import Thread
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    missing: str | None = None
except ImportError as error:
    triton, tl = None, SimpleNamespace(constexpr=object)
    missing = f"Triton is not installed ({error}): pip install 'triton>=3.6'"

    def jit(function=None, **_):
        return function or jit


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` runs the kernels in Python on the CPU."""
    return triton is not None and triton.knobs.runtime.interpret


@cache
def pdl(device: torch.device) -> bool:
    """Whether kernels on ``device`` are launched with programmatic dependent launch (SM90 and later)."""
    if interpreted() or device.type != "cuda" or os.environ.get("TINYFUSE_PDL") == "0":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@dataclass
class _Block:
    """A block of :func:`side_by_side`: what its rehearsals have launched, (kernel, arguments, options) on a grid, and,
    in one of them, what ops gave by what they were given."""

    launches: dict[tuple[Any, ...], tuple[int, ...]] = field(default_factory=dict)
    results: dict[Any, Any] | None = None


_block: ContextVar[_Block | None] = ContextVar("block", default=None)


def rehearsing() -> bool:
    """Whether launches compile and do nothing else, and tensors have no memory."""
    block = _block.get()
    return block is not None and block.results is not None


def once(looks: Any, run: Callable[[], Any]) -> Any:
    """In a rehearsal: what ``run`` gives, which runs once for all calls that look alike."""
    results = _block.get().results
    if looks not in results:
        results[looks] = run()
    return results[looks]


class _Loader(ThreadPoolExecutor):
    """Loads what it compiles: for each kernel Triton builds a launcher too, with a C compiler."""

    def submit(self, compile_kernel: Callable[[], Any]) -> Future:
        return super().submit(_loaded, compile_kernel)


def _loaded(compile_kernel: Callable[[], Any]) -> Any:
    kernel = compile_kernel()
    kernel._init_handles()
    return kernel


@contextmanager
def side_by_side() -> Iterator[_Block]:
    """The kernels that rehearsals inside launch are compiled and loaded side by side at the end; one that cannot be is
    left to its first real launch."""
    if (outer := _block.get()) is not None:
        yield outer
        return
    block = _Block()
    token = _block.set(block)
    try:
        yield block
    finally:
        _block.reset(token)
    if block.launches:
        _compile(block.launches)


@contextmanager
def rehearsal() -> Iterator[None]:
    """Kernels that are launched inside, on fake tensors, are compiled at the end of the block of :func:`side_by_side`
    around it. Nothing may keep a tensor that it makes inside."""
    with side_by_side() as block:
        block.results = {}
        try:
            yield
        finally:
            block.results = None


def _compile(launches: dict[tuple[Any, ...], tuple[int, ...]]) -> None:
    """The kernels of most code come first: what takes longest is not to start last."""
    device = torch.cuda.current_device()
    awakening(device).join()
    pool = _Loader(os.cpu_count(), "compile", torch.cuda.set_device, (device,))
    with pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for kernel, kinds, options in sorted(launches, key=lambda launch: -len(launch[0].src)):
            kernel.warmup(*kinds, grid=launches[kernel, kinds, options], **dict(options))


@jit
def _nothing():
    pass


def _compile_nothing(device: int) -> None:
    with suppress(Exception):
        torch.cuda.set_device(device)
        _nothing.warmup(grid=(1,))


@cache
def awakening(device: int) -> Thread:
    """Does what Triton does once in a process: builds its driver with a C compiler, hashes its own code."""
    thread = Thread(target=_compile_nothing, args=(device,))
    thread.start()
    return thread


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
    """Launch ``kernel``, or compile it for arguments that begin at multiples of 16 bytes."""
    if not rehearsing():
        return kernel[grid](*args, **options)
    kinds = tuple([a.dtype if isinstance(a, torch.Tensor) else a for a in args])
    _block.get().launches.setdefault((kernel, kinds, tuple(options.items())), grid)
    return None


def aligned(x: torch.Tensor) -> bool:
    """Whether x begins at a multiple of 16 bytes."""
    return rehearsing() or not x.data_ptr() & 15


class Launch:
    """A kernel bound to everything but its tensors, which come first in its signature and keep dtypes and device.

    Triton binds and specialises the arguments once; later calls, as long as all tensors begin at multiples of
    16 bytes, launch the kernel that it compiled, which takes half the host time.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], scalars: tuple[Any, ...], num_warps: int, ahead: bool):
        """``ahead``: the kernel's ``PDL`` flag, whether it starts before the kernels in front of it end."""
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.scalars = scalars
        self.options = {"num_warps": num_warps, "launch_pdl": True} if ahead else {"num_warps": num_warps}
        self.compiled: Any = None
        self.device = 0

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        if rehearsing():
            start(self.kernel, self.grid, *tensors, *self.scalars, **self.options)
            return
        for x in tensors:
            if x is not None and x.data_ptr() & 15:
                self.kernel[self.grid](*tensors, *self.scalars, **self.options)
                return
        if self.compiled is None:
            compiled = self.kernel[self.grid](*tensors, *self.scalars, **self.options)
            self.compiled = compiled and compiled[self.grid]  # the interpreter compiles nothing
            self.device = tensors[0].device.index
        else:
            self.compiled(*tensors, *self.scalars, stream=torch._C._cuda_getCurrentRawStream(self.device))
