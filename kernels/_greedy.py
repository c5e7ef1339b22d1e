"""The end of a greedy decode step: pick every row's token, pad finished rows, write the token down.

``_peaks`` reduces chunks of the vocabulary, ``_choose`` the chunks of a row. The latter is one program for all rows
because the last thing it does is to move ``written``, which every row reads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels import _triton
from tinyfuse.kernels._triton import Launch, jit, pdl, tl, triton
from tinyfuse.op import Kernel, Op

CHUNK = 1024


def reference(
    logits: Tensor, banned: Tensor, eos: Tensor, pad: Tensor, unfinished: Tensor, written: Tensor, token: Tensor,
    tokens: Tensor,
) -> None:  # fmt: skip
    """As :func:`greedy`, on any device."""
    picked = logits.max(-1).indices  # on a CPU a quarter of argmax's time in bf16
    if len(banned) and (logits.device.type != "cpu" or torch.isin(picked, banned).any()):
        picked = logits.index_fill(-1, banned, -torch.inf).max(-1).indices
    if len(eos):
        picked = picked * unfinished + pad * (1 - unfinished)
        unfinished.mul_((picked[:, None] != eos).all(-1))
    token.copy_(picked[:, None])
    tokens.index_copy_(1, written, token)
    written.add_(1)


@jit
def _first_largest(a, i, b, j):
    """Which of the values a and b, at i and j, argmax picks: NaN is the largest, and the first of equals wins."""
    larger = (a > b) | ((a != a) & (b == b))
    equal = (a == b) | ((a != a) & (b != b))
    left = larger | (equal & (i < j))
    return tl.where(left, a, b), tl.where(left, i, j)


@jit(do_not_specialize=["forbidden"])
def _peaks(logits, banned, values, indices, stride, V, forbidden, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """Program (chunk, row): the largest logit of the chunk and its index, [batch, chunks]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logits + row * stride + index, mask=index < V, other=float("-inf")).to(values.dtype.element_ty)
    for i in range(forbidden):
        value = tl.where(index == tl.load(banned + i), float("-inf"), value)
    value, index = tl.reduce((value, index), 0, _first_largest)
    at = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(values + at, value)
    tl.store(indices + at, index)


@jit(do_not_specialize=["batch", "chunks", "length", "ends"])
def _choose(
    values, indices, eos, pad, unfinished, written, token, tokens,
    batch, chunks, length, ends, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All rows, ROWS at a time."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    position, padding = tl.load(written), tl.load(pad)
    column = tl.arange(0, COLUMNS)[None, :]
    for start in range(0, batch, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < batch
        mask = inside[:, None] & (column < chunks)
        at = row[:, None] * chunks + column
        value = tl.load(values + at, mask=mask, other=float("-inf"))
        index = tl.load(indices + at, mask=mask, other=0x7FFFFFFF)
        going = tl.load(unfinished + row, mask=inside, other=0)
        _, index = tl.reduce((value, index), 1, _first_largest)
        picked = tl.where((going != 0) | (ends == 0), index.to(tl.int64), padding)
        for i in range(ends):
            going = tl.where(picked == tl.load(eos + i), 0, going)
        tl.debug_barrier()  # threads hold copies of ``going`` and ``position``: all have read before one writes
        tl.store(unfinished + row, going, mask=inside)
        tl.store(token + row, picked, mask=inside)
        tl.store(tokens + row.to(tl.int64) * length + position, picked, mask=inside)
    tl.store(written, position + 1)


@lru_cache(4096)
def _bind(
    batch: int, size: int, stride: int, length: int, banned: int, eos: int, chunk: int, ahead: bool,
    *_dtype_device: Any,
) -> tuple[Launch, Launch]:  # fmt: skip
    chunks = triton.cdiv(size, chunk)
    columns = triton.next_power_of_2(chunks)
    rows = min(triton.next_power_of_2(batch), max(1, 1024 // columns))
    peaks = Launch(_peaks, (chunks, batch), (stride, size, banned, chunk, ahead), 4, ahead)
    return peaks, Launch(_choose, (1,), (batch, chunks, length, eos, rows, columns, ahead), 1, ahead)


def greedy(
    logits: Tensor, banned: Tensor, eos: Tensor, pad: Tensor, unfinished: Tensor, written: Tensor, token: Tensor,
    tokens: Tensor, chunk: int = CHUNK,
) -> None:  # fmt: skip
    """Pick the largest of ``logits`` [batch, V], any float dtype and strides; ids in ``banned`` count as -inf.

    The rest is int64 and contiguous. With ids in ``eos``, rows whose ``unfinished`` [batch] is 0 get ``pad`` [], and it
    becomes 0 for rows that get an id in ``eos``. The result goes to ``token`` [batch, 1] and to column ``written`` [1]
    of ``tokens`` [batch, length], which must exist; ``written`` grows by one.
    """
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    batch, size = logits.shape
    peaks, choose = _bind(
        batch, size, logits.stride(0), tokens.shape[1], len(banned), len(eos), chunk, pdl(logits.device),
        logits.dtype, logits.device,
    )  # fmt: skip
    shape = batch, triton.cdiv(size, chunk)
    values = logits.new_empty(shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    indices = logits.new_empty(shape, dtype=torch.int32)
    peaks(logits, banned, values, indices)
    choose(values, indices, eos, pad, unfinished, written, token, tokens)


def _supports(*_args: Tensor) -> str | None:
    return _triton.missing


OP = Op("greedy", reference, reference, [Kernel("triton", "cuda", _supports, greedy)])
