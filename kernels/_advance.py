"""The inputs of a decode step, moved on to the next token: each buffer becomes the next row of its table.

One launch. The program that finishes last counts ``row`` up, after all have read it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels import _triton
from tinyfuse.kernels._gemv import pick, three
from tinyfuse.kernels._triton import Launch, jit, pdl, tl, triton
from tinyfuse.op import Kernel, Op

BLOCK = 1024  # bytes of a program
MOST = 3


def reference(tables: list[Tensor], dims: list[int], buffers: list[Tensor], row: Tensor, done: Tensor) -> None:
    """As :func:`advance`, on any device."""
    row.add_(1)
    for table, dim, buffer in zip(tables, dims, buffers, strict=True):
        torch.index_select(table, dim, row, out=buffer)


@jit(do_not_specialize=[f"{name}{i}" for name in ("inner", "rows", "size") for i in range(3)] + ["first1", "first2"])
def _advance(
    t0, t1, t2, b0, b1, b2, row, done, inner0, inner1, inner2, rows0, rows1, rows2, size0, size1, size2, first1, first2,
    MEMBERS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``inner``: bytes of a row, ``size``: of a buffer, ``first``: a table's first program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pid = tl.program_id(0)
    table, buffer, inner, rows, size = t0, b0, inner0, rows0, size0
    if MEMBERS > 1:
        which = (pid >= first1).to(tl.int32) + (pid >= first2).to(tl.int32)
        table, buffer = pick(which, t0, t1, t2, MEMBERS), pick(which, b0, b1, b2, MEMBERS)
        inner, rows = pick(which, inner0, inner1, inner2, MEMBERS), pick(which, rows0, rows1, rows2, MEMBERS)
        size = pick(which, size0, size1, size2, MEMBERS)
        pid -= pick(which, 0, first1, first2, MEMBERS)
    at = tl.load(row) + 1
    i = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    tl.store(buffer + i, tl.load(table + (i // inner * rows + at) * inner + i % inner, mask=inside), mask=inside)
    tl.debug_barrier()  # all threads have read ``row``
    if tl.atomic_add(done, 1, sem="acq_rel", scope="gpu") % tl.num_programs(0) == tl.num_programs(0) - 1:
        tl.store(row, at)


@lru_cache(4096)
def _bind(inner: tuple[int, ...], rows: tuple[int, ...], size: tuple[int, ...], ahead: bool, _device: Any) -> Launch:
    blocks = [triton.cdiv(n, BLOCK) for n in size]
    scalars = *three(inner), *three(rows), *three(size), blocks[0], sum(blocks[:2]), len(size), BLOCK, ahead
    return Launch(_advance, (sum(blocks),), scalars, 4, ahead)


def advance(tables: list[Tensor], dims: list[int], buffers: list[Tensor], row: Tensor, done: Tensor) -> None:
    """Count ``row`` [1] up and copy that row along ``dims[i]`` of each table into its buffer, whose size is 1 there.

    All contiguous. ``done`` int64 [1] counts programs and belongs to these tables; what it counts has no meaning.
    """
    sizes = [buffer.nbytes for buffer in buffers]
    inner = [math.prod(t.shape[dim + 1 :]) * t.element_size() for t, dim in zip(tables, dims, strict=True)]
    rows = [table.shape[dim] for table, dim in zip(tables, dims, strict=True)]
    launch = _bind(tuple(inner), tuple(rows), tuple(sizes), pdl(row.device), row.device)
    flat = [[tensor.reshape(-1).view(torch.uint8) for tensor in tensors] for tensors in (tables, buffers)]
    launch(*three(flat[0]), *three(flat[1]), row, done)


def _supports(tables: list[Tensor], dims: list[int], buffers: list[Tensor], row: Tensor, done: Tensor) -> str | None:
    if not 1 <= len(tables) <= MOST:
        return f"a decode step has {len(tables)} inputs that change, not 1 to {MOST}"
    return _triton.missing


OP = Op("advance", reference, reference, [Kernel("triton", "cuda", _supports, advance)])
