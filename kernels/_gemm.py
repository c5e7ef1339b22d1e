"""Matrix products with int8 weights on the tensor cores, and the cast that lets cuBLAS do them.

    y = scale * (x W^T) (+ bias) (+ residual)

Weights are the first operand of ``tl.dot`` (its wide one), so that few rows of x waste little. x is split into int8
digits, x = s (256^2 d0 + 256 d1 + d2) or s (256 d0 + d1) with one fp32 s per row, so that everything is int8 with
exact int32 sums. Two digits carry 16 bits of the row's largest magnitude.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels._gemv import rows
from tinyfuse.kernels._triton import Launch, jit, pdl, tl, triton

MOST_ROWS = 256  # beyond, expanding the weight and cuBLAS are faster


@jit
def _split(x, out, scale, stride, rows, K, DIGITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Row ``program_id(0)`` of x as its digits, [DIGITS, rows, K], and its scale."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * stride + k, mask=k < K, other=0.0).to(tl.float32)
    # The bits of |x| order as integers do, with infinities and NaN on top: a row that holds one becomes NaN.
    largest = tl.max(tl.abs(value).to(tl.int32, bitcast=True), 0)
    bad = largest >= 0x7F800000
    largest = tl.maximum(largest.to(tl.float32, bitcast=True), 1e-30)
    limit: tl.constexpr = 8355000.0 if DIGITS == 3 else 32639.0  # 127.5 * 256^d, less room to round up
    tl.store(scale + row, tl.where(bad, float("nan"), largest / limit))
    number = tl.floor(value * (limit / largest) + 0.5).to(tl.int32) + (0x808080 if DIGITS == 3 else 0x8080)
    for d in tl.static_range(DIGITS):
        digit = ((number >> (8 * (DIGITS - 1 - d))) & 255) - 128
        tl.store(out + (d * rows + row) * K + k, digit.to(tl.int8), mask=k < K)


@jit
def _tile(at, k, left, EVEN: tl.constexpr):
    return tl.load(at) if EVEN else tl.load(at, mask=k[None, :] < left, other=0)


@jit
def _gemm(
    x, x_scale, w, scale, bias, residual, y, parts, w_stride, residual_stride, M, rows, N, K, per_part,
    EVEN: tl.constexpr, DIGITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of y, or of one of PARTS shares of K. x: digits [DIGITS, rows, K]. Programs that share weights are
    neighbours."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    part = tl.program_id(1)
    m = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // blocks_m * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w += tl.minimum(n, N - 1).to(tl.int64)[:, None] * w_stride + k[None, :]
    x0 = x + m.to(tl.int64)[:, None] * K + k[None, :]
    x1 = x0 + rows.to(tl.int64) * K
    x2 = x1 + rows.to(tl.int64) * K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc0 = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    acc1 = acc0
    acc2 = acc0
    for start in tl.range(part * per_part, tl.minimum(part * per_part + per_part, K), BLOCK_K, num_stages=STAGES):
        a = _tile(w + start, k, K - start, EVEN)
        d0 = _tile(x0 + start, k, K - start, EVEN)
        d1 = _tile(x1 + start, k, K - start, EVEN)
        acc0 = tl.dot(a, tl.trans(d0), acc0, out_dtype=tl.int32)
        acc1 = tl.dot(a, tl.trans(d1), acc1, out_dtype=tl.int32)
        if DIGITS == 3:
            d2 = _tile(x2 + start, k, K - start, EVEN)
            acc2 = tl.dot(a, tl.trans(d2), acc2, out_dtype=tl.int32)
    total = acc0.to(tl.float32) * 256.0 + acc1.to(tl.float32)
    if DIGITS == 3:
        total = total * 256.0 + acc2.to(tl.float32)
    total = tl.trans(total)
    mask = (m < M)[:, None] & (n < N)[None, :]
    if PARTS > 1:
        at = (part * M + m).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(parts + at, total, mask=mask)
    else:
        _finish(total, x_scale, scale, bias, residual, residual_stride, y, m, n, mask, M, N)


@jit
def _finish(total, x_scale, scale, bias, residual, residual_stride, y, m, n, mask, M, N):
    total *= tl.load(x_scale + m, mask=m < M, other=0.0)[:, None] * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        at = residual + m.to(tl.int64)[:, None] * residual_stride + n[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=mask)


@jit
def _combine(
    parts, x_scale, scale, bias, residual, y, residual_stride, M, N,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The sum over the shares of K, in their order, of a row of y."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(0) + tl.arange(0, 1)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = parts + m.to(tl.int64)[:, None] * N + n[None, :]
    total = tl.load(at, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(at + part * M.to(tl.int64) * N, mask=mask, other=0.0)
    _finish(total, x_scale, scale, bias, residual, residual_stride, y, m, n, mask, M, N)


@lru_cache(4096)
def _bind_split(m: int, k: int, count: int, padded: int, stride: int, ahead: bool, *_dtype_device: Any) -> Launch:
    block = triton.next_power_of_2(k)
    return Launch(_split, (m,), (stride, padded, k, count, block, ahead), min(16, max(4, block // 512)), ahead)


def split(x: Tensor, count: int, padded: int) -> tuple[Tensor, Tensor]:
    """x [M, K] as int8 digits [count, padded, K], of which rows from M on are not written, and fp32 scales [M]."""
    m, k = x.shape
    digits = x.new_empty((count, padded, k), dtype=torch.int8)
    scale = x.new_empty((m,), dtype=torch.float32)
    _bind_split(m, k, count, padded, x.stride(0), pdl(x.device), x.dtype, x.device)(x, digits, scale)
    return digits, scale


def gemm(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    config: tuple[int, int, int, int, int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K], int8 weight [N, K]; config: digits, rows, columns, depth of a tile, stages, warps, shares of K."""
    lead, x = x.shape[:-1], rows(x)
    m, k = x.shape
    n = weight.shape[0]
    count, block_m, block_n, block_k, stages, warps, parts = config or tile(m, n)
    y = x.new_empty((*lead, n))
    if residual is not None:
        residual = residual.reshape(-1, n)
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
    residual_stride = residual.stride(0) if residual is not None else 0
    padded = triton.cdiv(m, block_m) * block_m
    digits, x_scale = split(x, count, padded)
    ahead = pdl(x.device)
    extra = {"launch_pdl": True} if ahead else {}
    sums = x.new_empty((parts, m, n), dtype=torch.float32) if parts > 1 else None
    per_part = triton.cdiv(triton.cdiv(k, block_k), parts) * block_k
    _gemm[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n), parts)](
        digits, x_scale, weight, scale, bias, residual, y, sums, weight.stride(0), residual_stride, m, padded, n, k,
        per_part, k % block_k == 0, count, block_m, block_n, block_k, stages, parts, ahead, num_warps=warps, **extra,
    )  # fmt: skip
    if parts > 1:
        _combine[(m, triton.cdiv(n, 1024))](
            sums, x_scale, scale, bias, residual, y, residual_stride, m, n, parts, 1024, ahead, num_warps=4, **extra
        )
    return y


def tile(m: int, n: int) -> tuple[int, int, int, int, int, int, int]:
    """(digits, rows, columns and depth of a tile, stages, warps, shares of K), as measured on an H200."""
    block_m = 32 if m <= 32 else 64
    parts = min(8, max(1, 256 // (triton.cdiv(n, 64) * triton.cdiv(m, block_m))))  # about two programs a processor
    return 3 if m <= 32 else 2, block_m, 64, 128, 4, 4, parts


@jit
def _cast(w, stride, scale, out, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(w + row * stride + k, mask=k < K, other=0).to(tl.float32) * tl.load(scale + row)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale[:, None] * weight in ``dtype``."""
    n, k = weight.shape
    out = torch.empty((n, k), dtype=dtype, device=weight.device)
    block = min(4096, triton.next_power_of_2(k))
    extra = {"launch_pdl": True} if pdl(weight.device) else {}
    _cast[(n, triton.cdiv(k, block))](weight, weight.stride(0), scale, out, k, block, bool(extra), num_warps=4, **extra)
    return out
