"""RMS norm whose result goes into int8 products: the normalised row as digits, with no copy of it in between."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels import _gemm, _rows
from tinyfuse.kernels._rows import MAX_BLOCK, Norm
from tinyfuse.kernels._triton import Launch, jit, pdl, tl


@jit(do_not_specialize=["rows", "tiles"])
def _norm_split(
    x, weight, out, scale, stride, rows, tiles, eps, K: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
    PIECE: tl.constexpr, UNIT_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)`` of x, normalised and rounded to x's dtype, as ``_gemm._split`` gives it.

    One dimension throughout: of [1, BLOCK] Triton once gave all elements to each thread."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    k = tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if weight is not None:
            _rows.prefetch(weight, K, BLOCK)
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    gain = _rows.load_gain(weight, k, K)  # on its way during the sum, past whose barrier no load is moved up
    factor = tl.rsqrt(tl.sum(value * value, 0) / K + eps)
    value = _rows.scaled(value, factor, gain, x.dtype.element_ty, UNIT_OFFSET, CAST_FIRST).to(tl.float32)
    largest = _gemm.magnitude(value)
    if PIECE < BLOCK:
        k = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        gain = _rows.load_gain(weight, k, K)
        value = _rows.scaled(value, factor, gain, x.dtype.element_ty, UNIT_OFFSET, CAST_FIRST).to(tl.float32)
    _gemm.store_digits(value, largest, out, scale, row, k, rows, tiles, K, DIGITS)


@lru_cache(4096)
def _bind(
    m: int, k: int, count: int, padded: int, tiles: int, stride: int, eps: float, unit_offset: bool, cast_first: bool,
    ahead: bool, device: torch.device, *_dtypes: Any,
) -> Launch:  # fmt: skip
    block, piece, grid, warps = _gemm.pieces(m, k, device)
    scalars = stride, padded, tiles, eps, k, count, block, piece, unit_offset, cast_first, ahead
    return Launch(_norm_split, grid, scalars, warps, ahead)


def reason(x: Tensor, weight: Tensor | None) -> str | None:
    """Why the norm of x cannot be fused with what follows."""
    if x.shape[-1] > MAX_BLOCK:
        return f"the fused norms take rows of at most {MAX_BLOCK} elements"
    return _rows.unsupported_weight("rms_norm", x, weight)


def split(norm: Norm, x: Tensor, count: int, padded: int, tiles: int) -> tuple[Tensor, Tensor]:
    """``_gemm.split`` of the norm of x [M, K]."""
    m, k = x.shape
    digits, scale = _gemm.digit_buffers(x, count, padded, tiles)
    weight_dtype = None if norm.weight is None else norm.weight.dtype
    launch = _bind(m, k, count, padded, tiles, x.stride(0), *norm[1:], pdl(x.device), x.device, x.dtype, weight_dtype)
    launch(x, norm.weight, digits, scale)
    return digits, scale
