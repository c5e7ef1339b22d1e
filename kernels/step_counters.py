"""The position counters of a static cache's layers in a decode step: read, then advanced by one.

counters: int64 [] each. Returns the values before, [1] each, in memory of their own; modulo ``rings[i]`` where that is
not 0.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tinyfuse.kernels import _native, _triton
from tinyfuse.kernels._triton import Launch, jit, pdl, rehearsing, tl, triton
from tinyfuse.op import Kernel, register


def reference(counters: list[Tensor], rings: list[int]) -> list[Tensor]:
    positions = [copy.reshape(1) for copy in torch._foreach_add(counters, 0)]
    torch._foreach_add_(counters, 1)
    return [position % ring if ring else position for position, ring in zip(positions, rings, strict=True)]


def fake(counters: list[Tensor], rings: list[int]) -> list[Tensor]:
    return [counter.new_empty(1) for counter in counters]


# --- CPU ---


def supports_native(counters: list[Tensor], rings: list[int]) -> str | None:
    return _not_counters(counters) or _native.unavailable()


def run_native(counters: list[Tensor], rings: list[int]) -> list[Tensor]:
    return list(_native.step_counters(counters, rings).unbind())


def _not_counters(counters: list[Tensor]) -> str | None:
    if any(counter.dtype != torch.int64 or counter.dim() for counter in counters):
        return "the counters of the cache are not single 64-bit integers"
    return None


# --- GPU ---


@jit
def _advance(counters, positions, rings, COUNT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    i = tl.arange(0, BLOCK)
    ring = tl.load(rings + i, mask=i < COUNT, other=1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(counters + i, mask=i < COUNT, other=0)
    tl.store(positions + 2 * i, tl.where(ring > 0, value % tl.maximum(ring, 1), value), mask=i < COUNT)
    tl.store(counters + i, value + 1, mask=i < COUNT)


@lru_cache(64)
def _bind(rings: tuple[int, ...], ahead: bool, device: torch.device) -> tuple[Launch, Tensor]:
    count = len(rings)
    launch = Launch(_advance, (1,), (count, triton.next_power_of_2(count), ahead), 1, ahead)
    return launch, torch.tensor(rings, dtype=torch.long, device=device)


def supports_triton(counters: list[Tensor], rings: list[int]) -> str | None:
    return _not_counters(counters) or _triton.missing


def run_triton(counters: list[Tensor], rings: list[int]) -> list[Tensor]:
    """One launch where the counters follow each other in memory, as those of the decode loop's caches do."""
    if not rehearsing():
        first = counters[0].data_ptr()
        if any(counter.data_ptr() != first + 8 * i for i, counter in enumerate(counters)):
            return reference(counters, rings)
    positions = counters[0].new_empty((len(counters), 2))  # each at a multiple of 16 bytes
    bind = _bind.__wrapped__ if rehearsing() else _bind  # which would keep a fake tensor
    launch, sizes = bind(tuple(rings), pdl(positions.device), positions.device)
    launch(counters[0], positions, sizes)
    return list(positions[:, :1].unbind())


OP = register(
    "step_counters(Tensor(a!)[] counters, int[] rings) -> Tensor[]",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("triton", "cuda", supports_triton, run_triton),
        Kernel("native", "cpu", supports_native, run_native),
    ],
)
