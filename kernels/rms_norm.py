"""RMS normalisation over the last dimension (Zhang and Sennrich, 2019).

    y = x * (mean(x^2) + eps)^(-1/2) * g,    g = w, 1 + w or 1

x [..., N]; weight [N] or None; y has x's shape and dtype. The mean and the product run in fp32.
``cast_first``: the normalised value is rounded to x's dtype before the weight multiplies it; otherwise the product is
fp32 and is rounded once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tinyfuse.kernels import _native, _rows
from tinyfuse.kernels._triton import Launch, jit, tl, triton
from tinyfuse.op import Kernel, register


def reference(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast_first:
        gain = 1.0 + weight if unit_offset else weight
        return (gain * normed.to(x.dtype)).to(x.dtype)
    gain = 1.0 + weight.float() if unit_offset else weight.float()
    return (gain * normed).to(x.dtype)


# --- GPU ---


@jit(do_not_specialize=["rows", "n1", "n2"])
def _rms_norm(
    x, residual, weight, total, y, rows, eps, n1, n2,
    x_0, x_1, x_2, r_0, r_1, r_2, t_0, t_1, t_2, y_0, y_1, y_2,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of BLOCK_N columns in registers, longer ones in two passes; residual and total: both None or neither."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if weight is not None:
            _rows.prefetch(weight, N, BLOCK_N)
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_N)[None, :]
    x += _rows.offset(row, n1, n2, x_0, x_1, x_2, DIMS)[:, None]
    y += _rows.offset(row, n1, n2, y_0, y_1, y_2, DIMS)[:, None]
    if residual is not None:
        residual += _rows.offset(row, n1, n2, r_0, r_1, r_2, DIMS)[:, None]
        total += _rows.offset(row, n1, n2, t_0, t_1, t_2, DIMS)[:, None]
    inside = (row < rows)[:, None]
    DTYPE: tl.constexpr = y.dtype.element_ty
    if N <= BLOCK_N:
        value = _rows.load_sum(x, residual, total, col, inside & (col < N))
        scale = tl.rsqrt(tl.sum(value * value, 1) / N + eps)
        out = _rows.scaled(value, scale[:, None], _rows.load_gain(weight, col, N), DTYPE, UNIT_OFFSET, CAST_FIRST)
        tl.store(y + col, out, mask=inside & (col < N))
    else:
        square = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            value = _rows.load_sum(x, residual, total, start + col, inside & (start + col < N))
            square += value * value
        scale = tl.rsqrt(tl.sum(square, 1) / N + eps)
        for start in range(0, N, BLOCK_N):
            value = _rows.load_sum(x, residual, None, start + col, inside & (start + col < N))
            gain = _rows.load_gain(weight, start + col, N)
            out = _rows.scaled(value, scale[:, None], gain, DTYPE, UNIT_OFFSET, CAST_FIRST)
            tl.store(y + start + col, out, mask=inside & (start + col < N))


@lru_cache(4096)
def bind(place: _rows.Layout, eps: float, unit_offset: bool, cast_first: bool) -> Launch:
    rows, tile, _ = _rows.plan(place)
    scalars = (
        rows.count, eps, *rows.sizes, *rows.strides,
        place.shape[-1], tile.block_n, tile.rows, rows.dims, unit_offset, cast_first, place.ahead,
    )  # fmt: skip
    return Launch(_rms_norm, (triton.cdiv(rows.count, tile.rows),), scalars, tile.warps, place.ahead)


def launch(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, total: Tensor | None, y: Tensor,
    eps: float, unit_offset: bool, cast_first: bool,
) -> None:  # fmt: skip
    """y = rms_norm(x), or total = x + residual and y = rms_norm(total)."""
    if y.numel():
        place = _rows.layout(x, residual, total, y, weight, None)
        bind(place, eps, unit_offset, cast_first)(x, residual, weight, total, y)


def supports_triton(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool) -> str | None:
    return _rows.unsupported("rms_norm", x) or _rows.unsupported_weight("rms_norm", x, weight)


def run_triton(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool) -> Tensor:
    y = torch.empty_like(x)
    launch(x, None, weight, None, y, eps, unit_offset, cast_first)
    return y


# --- CPU ---


def supports_native(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool) -> str | None:
    return _native.norm_reason(x, None, weight, None)


def run_native(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool) -> Tensor:
    return _native.norm(x, None, weight, None, eps, False, unit_offset, cast_first)[1]


OP = register(
    "rms_norm(Tensor x, Tensor? weight, float eps, bool unit_offset, bool cast_first) -> Tensor",
    reference=reference,
    kernels=[
        Kernel("triton", "cuda", supports_triton, run_triton),
        Kernel("native", "cpu", supports_native, run_native),
    ],
)
