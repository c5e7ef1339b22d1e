"""Where the rows of a decode step's mask begin and end, found once for all layers.

mask bool [B, 1, 1, L], any strides. Returns int32 [B, 4]: the first True (L if there is none), one past the last (0),
up to where it has to be read between them (the second if a False lies there, else the first), 0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels import _triton
from tinyfuse.kernels._triton import Launch, jit, pdl, tl, triton
from tinyfuse.op import Kernel, register

MAX_BLOCK = 16384


def reference(mask: Tensor) -> Tensor:
    rows = mask[:, 0, 0].int()
    length = rows.shape[1]
    position = torch.arange(length, device=mask.device, dtype=torch.int32)
    first = torch.where(rows > 0, position, length).amin(1)
    last = torch.where(rows > 0, position + 1, 0).amax(1)
    read = torch.where(rows.sum(1) < last - first, last, first)
    return torch.stack((first, last, read, torch.zeros_like(first)), 1).int()


def fake(mask: Tensor) -> Tensor:
    return mask.new_empty((mask.shape[0], 4), dtype=torch.int32)


@jit(do_not_specialize=["L"])
def _mask_bounds(mask, out, L, stride_b, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program: a row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    first, last, count = L, 0, 0
    for start in range(0, L, BLOCK):
        n = start + tl.arange(0, BLOCK)
        true = tl.load(mask + row * stride_b + n.to(tl.int64) * stride, mask=n < L, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(true, n, L), 0))
        last = tl.maximum(last, tl.max(tl.where(true, n + 1, 0), 0))
        count += tl.sum(true.to(tl.int32), 0)
    i = tl.arange(0, 4)
    read = tl.where(count < last - first, last, first)
    tl.store(out + row * 4 + i, tl.where(i == 0, first, tl.where(i == 1, last, tl.where(i == 2, read, 0))))


@lru_cache(4096)
def _bind(shape: tuple[int, ...], strides: tuple[int, ...], ahead: bool, _device: Any) -> Launch:
    block = min(MAX_BLOCK, triton.next_power_of_2(shape[3]))
    step = 0 if shape[0] == 1 else strides[0]
    return Launch(
        _mask_bounds, (shape[0],), (shape[3], step, strides[3], block, ahead), 4 if block < 8192 else 16, ahead
    )


def supports_triton(mask: Tensor) -> str | None:
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.shape[0] == 0:
        return "the mask is not bool [B, 1, 1, L]"
    return _triton.missing


def run_triton(mask: Tensor) -> Tensor:
    out = fake(mask)
    _bind(mask.shape, mask.stride(), pdl(mask.device), mask.device)(mask, out)
    return out


OP = register(
    "mask_bounds(Tensor mask) -> Tensor",
    reference=reference,
    fake=fake,
    kernels=[Kernel("triton", "cuda", supports_triton, run_triton)],
)
