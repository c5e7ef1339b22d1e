"""Softcap: y = c tanh(x / c), which bounds logits by c (Bello et al., 2016).

x [..., N], any strides, c > 0; y contiguous, in x's dtype. The quotient and the tanh are rounded to that dtype, as
eager code does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels import _rows
from tinyfuse.kernels._attention_decode import capped
from tinyfuse.kernels._triton import Launch, jit, pdl, tl, triton
from tinyfuse.op import Kernel, register

BLOCK_N = 1024


def reference(x: Tensor, cap: float) -> Tensor:
    return (torch.tanh(x / cap) * cap).contiguous()


@jit(do_not_specialize=["per_row", "n1", "n2"])
def _softcap(
    x, y, N, cap, per_row, n1, n2, x_0, x_1, x_2, y_0, y_1, y_2,
    BLOCK_N: tl.constexpr, DIMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, col = _rows.block(per_row, BLOCK_N)
    value = tl.load(x + _rows.offset(row, n1, n2, x_0, x_1, x_2, DIMS) + col, mask=col < N, other=0.0)
    share = (value.to(tl.float32) / cap).to(value.dtype).to(tl.float32)
    bounded = capped(share, 1.0).to(value.dtype).to(tl.float32)
    tl.store(y + _rows.offset(row, n1, n2, y_0, y_1, y_2, DIMS) + col, bounded * cap, mask=col < N)


@lru_cache(4096)
def _bind(
    shape: tuple[int, ...], x: tuple[int, ...], y: tuple[int, ...], cap: float, *dtype_device_ahead: Any
) -> Launch:
    """x, y: strides."""
    N, rows = _rows.merge_columns(shape, x, y)
    per_row, ahead = triton.cdiv(N, BLOCK_N), dtype_device_ahead[-1]
    scalars = (N, cap, per_row, *rows.sizes, *rows.strides, BLOCK_N, rows.dims, ahead)
    return Launch(_softcap, (rows.count * per_row,), scalars, 4, ahead)


def supports_triton(x: Tensor, cap: float) -> str | None:
    return _rows.unsupported("softcap", x)


def run_triton(x: Tensor, cap: float) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        _bind(x.shape, x.stride(), y.stride(), cap, y.dtype, y.device, pdl(y.device))(x, y)
    return y


def fake(x: Tensor, cap: float) -> Tensor:
    return x.new_empty(x.shape)


OP = register(
    "softcap(Tensor x, float cap) -> Tensor",
    reference=reference,
    fake=fake,
    kernels=[Kernel("triton", "cuda", supports_triton, run_triton)],
)
