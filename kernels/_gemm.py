"""Matrix products with int8 weights on the tensor cores, and the cast that lets cuBLAS do them.

    y = scale * (x W^T) (+ bias) (+ residual)

Weights are the first operand of ``tl.dot`` (its wide one), so that few rows of x waste little. x is split into int8
digits, x = s (256^2 d0 + 256 d1 + d2) or s (256 d0 + d1) with one fp32 s per row, so that everything is int8 with
exact int32 sums. Two digits carry 16 bits of the row's largest magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyfuse.kernels._gemv import rows
from tinyfuse.kernels._triton import jit, pdl, tl, triton

MOST_ROWS = 256  # beyond, expanding the weight and cuBLAS are faster


@jit
def _split(x, out, scale, stride, M, K, DIGITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Row ``program_id(0)`` of x [M, K] as its digits, [DIGITS, M, K], and its scale."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * stride + k, mask=k < K, other=0.0).to(tl.float32)
    limit: tl.constexpr = 8355000.0 if DIGITS == 3 else 32639.0  # 127.5 * 256^d, less room to round up
    step = tl.maximum(tl.max(tl.abs(value), 0), 1e-30) / limit + tl.sum(value - value, 0)
    number = tl.floor(value / step + 0.5).to(tl.int32) + (0x808080 if DIGITS == 3 else 0x8080)
    tl.store(scale + row, step)
    for d in tl.static_range(DIGITS):
        digit = ((number >> (8 * (DIGITS - 1 - d))) & 255) - 128
        tl.store(out + (d * M + row) * K + k, digit.to(tl.int8), mask=k < K)


@jit
def _tile(at, k, left, EVEN: tl.constexpr):
    return tl.load(at) if EVEN else tl.load(at, mask=k[None, :] < left, other=0)


@jit
def _gemm(
    x, x_scale, w, w_stride, scale, bias, residual, residual_stride, y, M, N, K,
    EVEN: tl.constexpr, DIGITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of y. x: digits [DIGITS, M, K]. Programs that share weights are neighbours."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // blocks_m * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w += tl.minimum(n, N - 1).to(tl.int64)[:, None] * w_stride + k[None, :]
    x0 = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K + k[None, :]
    x1 = x0 + M.to(tl.int64) * K
    x2 = x1 + M.to(tl.int64) * K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc0 = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    acc1 = acc0
    acc2 = acc0
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
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
    total *= tl.load(x_scale + m, mask=m < M, other=0.0)[:, None] * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if residual is not None:
        at = residual + m.to(tl.int64)[:, None] * residual_stride + n[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=mask)


def gemm(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    config: tuple[int, int, int, int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K], int8 weight [N, K]; config: digits, rows, columns, depth of a tile, stages, warps."""
    lead, x = x.shape[:-1], rows(x)
    m, k = x.shape
    n = weight.shape[0]
    count, block_m, block_n, block_k, stages, warps = config or tile(m, n)
    y = x.new_empty((*lead, n))
    if residual is not None:
        residual = residual.reshape(-1, n)
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
    digits = torch.empty((count, m, k), dtype=torch.int8, device=x.device)
    x_scale = torch.empty(m, dtype=torch.float32, device=x.device)
    extra = {"launch_pdl": True} if pdl(x.device) else {}
    block = triton.next_power_of_2(k)
    warps_split = min(16, max(4, block // 512))
    _split[(m,)](x, digits, x_scale, x.stride(0), m, k, count, block, bool(extra), num_warps=warps_split, **extra)
    _gemm[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        digits, x_scale, weight, weight.stride(0), scale, bias, residual,
        residual.stride(0) if residual is not None else 0, y, m, n, k,
        k % block_k == 0, count, block_m, block_n, block_k, stages, bool(extra), num_warps=warps, **extra,
    )  # fmt: skip
    return y


def tile(m: int, n: int) -> tuple[int, int, int, int, int, int]:
    """(digits, rows, columns and depth of a tile, stages, warps)."""
    if m <= 32:
        return (3, 32, 64, 128, 4, 4) if n >= 8192 else (3, 32, 64, 256, 3, 4)
    if m <= 64:
        return (2, 64, 64, 128, 4, 4) if n >= 8192 else (2, 64, 64, 256, 3, 4)
    return 2, 64, 128, 128, 4, 4


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
