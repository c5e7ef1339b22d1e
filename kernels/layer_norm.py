"""Layer normalisation over the last dimension (Ba, Kiros and Hinton, 2016).

    y = (x - mean(x)) * (var(x) + eps)^(-1/2) * w + b

x [..., N]; weight, bias [N] or None; var is the biased variance; y has x's shape and dtype.
Statistics and the affine map run in fp32 with one rounding at the end, as ``F.layer_norm`` does.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfuse.kernels import _native, _rows
from tinyfuse.kernels._triton import Launch, jit, tl, triton
from tinyfuse.op import Kernel, register


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


# --- GPU ---


@jit
def _scaled(value, scale, weight, bias, col, N: tl.constexpr):
    """value * scale * weight + bias [rows, cols]."""
    out = value * scale[:, None]
    if weight is not None:
        out *= tl.load(weight + col, mask=col < N, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)
    return out


@jit(do_not_specialize=["rows", "n1", "n2"])
def _layer_norm(
    x, residual, weight, bias, total, y, rows, eps, n1, n2,
    x_0, x_1, x_2, r_0, r_1, r_2, t_0, t_1, t_2, y_0, y_1, y_2, x_n, r_n, t_n,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of BLOCK_N columns in registers, longer ones in three passes; residual and total: both None or neither."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if weight is not None:
            _rows.prefetch(weight, N, BLOCK_N)
        if bias is not None:
            _rows.prefetch(bias, N, BLOCK_N)
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_N)[None, :]
    x += _rows.offset(row, n1, n2, x_0, x_1, x_2, DIMS)[:, None]
    y += _rows.offset(row, n1, n2, y_0, y_1, y_2, DIMS)[:, None]
    if residual is not None:
        residual += _rows.offset(row, n1, n2, r_0, r_1, r_2, DIMS)[:, None]
        total += _rows.offset(row, n1, n2, t_0, t_1, t_2, DIMS)[:, None]
    inside = (row < rows)[:, None]
    if N <= BLOCK_N:
        value = _rows.load_sum(x, residual, total, col, inside & (col < N), x_n, r_n, t_n)
        value = tl.where(col < N, value - (tl.sum(value, 1) / N)[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(value * value, 1) / N + eps)
        tl.store(y + col, _scaled(value, scale, weight, bias, col, N), mask=inside & (col < N))
    else:
        acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            acc += _rows.load_sum(x, residual, total, start + col, inside & (start + col < N), x_n, r_n, t_n)
        mean = (tl.sum(acc, 1) / N)[:, None]
        square = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            value = _rows.load_sum(x, residual, None, start + col, inside & (start + col < N), x_n, r_n) - mean
            square += tl.where(start + col < N, value * value, 0.0)
        scale = tl.rsqrt(tl.sum(square, 1) / N + eps)
        for start in range(0, N, BLOCK_N):
            value = _rows.load_sum(x, residual, None, start + col, inside & (start + col < N), x_n, r_n) - mean
            out = _scaled(value, scale, weight, bias, start + col, N)
            tl.store(y + start + col, out, mask=inside & (start + col < N))


@lru_cache(4096)
def bind(place: _rows.Layout, eps: float) -> Launch:
    rows, tile, columns = _rows.plan(place)
    scalars = (
        rows.count, eps, *rows.sizes, *rows.strides, *columns[:3],
        place.shape[-1], tile.block_n, tile.rows, rows.dims, place.ahead,
    )  # fmt: skip
    return Launch(_layer_norm, (triton.cdiv(rows.count, tile.rows),), scalars, tile.warps, place.ahead)


def launch(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, total: Tensor | None, y: Tensor,
    eps: float,
) -> None:  # fmt: skip
    """y = layer_norm(x), or total = x + residual and y = layer_norm(total)."""
    if y.numel():
        bind(_rows.layout(x, residual, total, y, weight, bias), eps)(x, residual, weight, bias, total, y)


def supports_triton(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    return _rows.unsupported("layer_norm", x, columns=True) or _rows.unsupported_weight("layer_norm", x, weight, bias)


def run_triton(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(x, None, weight, bias, None, y, eps)
    return y


# --- CPU ---


def supports_native(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    return _native.norm_reason(x, None, weight, bias)


def run_native(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _native.norm(x, None, weight, bias, eps, True, False, False)[1]


OP = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=reference,
    kernels=[
        Kernel("triton", "cuda", supports_triton, run_triton),
        Kernel("native", "cpu", supports_native, run_native),
    ],
)
