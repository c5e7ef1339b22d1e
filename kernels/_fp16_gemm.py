"""Products of few rows with an int8 weight on the tensor cores, in one launch.

    y = scale * (x W^T) (+ bias) (+ residual)

int8 weights widen to fp16 exactly. So do rows of bf16 that a power of two has moved to the top of fp16's range: what is
lost lies 2^-39 below the row's largest magnitude in the tile. Sums are fp32. A program has one tile of the weight,
which it loads into registers before it waits for the kernel that makes x.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels import _gemv
from tinyfuse.kernels._counters import counters, is_last, sum_shares
from tinyfuse.kernels._gemm import store, tile_of
from tinyfuse.kernels._gemv import residual_rows, rows
from tinyfuse.kernels._triton import Launch, interpreted, jit, pdl, tl, triton

BLOCK_M = 8  # rows of x: as few columns as ``mma.sync`` has; more rows are more programs
# Rows and columns of the weight in a tile, warps.
Config = tuple[int, int, int]

if triton is not None:
    # 0x6400 + u is 1024 + u in fp16; u is the weight + 128.
    WIDEN = tl.constexpr(
        "{ .reg .b32 u, a, b, c; mov.b32 c, 0x64806480; xor.b32 u, $2, 0x80808080; prmt.b32 a, u, 0x64646464, 0x4140;"
        " prmt.b32 b, u, 0x64646464, 0x4342; sub.rn.f16x2 $0, a, c; sub.rn.f16x2 $1, b, c; }"
    )


@jit
def _widen(w, ASM: tl.constexpr):
    """int8 as fp16; Triton's own cast takes three times the instructions."""
    return tl.inline_asm_elementwise(WIDEN, "=r,=r,r", [w], tl.float16, True, 4) if ASM else w.to(tl.float16)


@jit
def _product(w, scale, x, ASM: tl.constexpr):
    """scale * (w x^T), w [BLOCK_N, BLOCK_K], with the rows of x [BLOCK_M, BLOCK_K] moved into fp16's range and back."""
    if x.dtype == tl.float16:
        return tl.dot(_widen(w, ASM), tl.trans(x)) * scale[:, None]
    else:
        x = x.to(tl.float32)
        # The bits of |x| order as integers do. Rows below 2^-112 move less far; infinities and NaN stay what they are.
        exponent = tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1) >> 23
        exponent = tl.minimum(tl.maximum(exponent, 15), 254)
        up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
        total = tl.dot(_widen(w, ASM), tl.trans((x * up[:, None]).to(tl.float16)))
        return total * scale[:, None] * down[None, :]


@jit(do_not_specialize=["M"])
def _fp16_gemm(
    x, w, scale, bias, residual, parts, counters, y, M, N, x_stride, w_stride, residual_stride,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A tile of y. Of PARTS programs, each with BLOCK_K columns of w, the last to finish sums up in order. Programs
    that share weights are neighbours."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    tile_of_y, part, k = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_K)
    first = tile_of_y // blocks_m * BLOCK_N
    m = tile_of_y % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    safe = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1)
    start = part * BLOCK_K
    w += safe.to(tl.int64)[:, None] * w_stride + k[None, :]
    x += tl.minimum(m, M - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    tile = tile_of(w, k, start, K, BLOCK_K)
    scales = tl.load(scale + safe)
    if bias is not None:
        offset = tl.load(bias + safe).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = _product(tile, scales, tile_of(x, k, start, K, BLOCK_K), ASM)
    last = True
    if PARTS > 1:
        inside = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        parts += tile_of_y.to(tl.int64) * (BLOCK_N * BLOCK_M) + inside
        step = tl.num_programs(0).to(tl.int64) * (BLOCK_N * BLOCK_M)
        tl.store(parts + part * step, total)
        last = is_last(counters + tile_of_y, PARTS)
    if last:
        if PARTS > 1:
            total = sum_shares(parts, step, PARTS)
        if bias is not None:
            total += offset[:, None]
        store(total, residual, residual_stride, y, m, first, M, N)


@lru_cache(4096)
def _bind(
    m: int, n: int, k: int, strides: tuple[int, int, int], config: Config, ahead: bool, *_dtypes_device: Any
) -> Launch:
    block_n, block_k, warps = config
    grid = triton.cdiv(m, BLOCK_M) * triton.cdiv(n, block_n), triton.cdiv(k, block_k)
    scalars = m, n, *strides, k, BLOCK_M, block_n, block_k, grid[1], ahead, not interpreted()
    return Launch(_fp16_gemm, grid, scalars, warps, ahead)


def reason(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> str | None:
    """Why :func:`fp16_gemm` does not run these."""
    if scale is None:
        return "cuBLAS multiplies weights in x's dtype"
    most = most_rows(*weight.shape)
    if not 3 <= x.numel() // x.shape[-1] <= most:
        return f"3 to {most} rows of x are faster in fp16 with this weight" if most else "large weights meet digits"
    return _gemv.reason(x, [weight], [scale], [bias])


def fp16_gemm(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K], int8 weight [N, K] with rows of any stride, scale [N], bias [N], residual [..., N]: y [..., N]."""
    lead, x = x.shape[:-1], rows(x)
    m, k = x.shape
    n = weight.shape[0]
    y = x.new_empty((*lead, n))
    residual = residual_rows(residual, n)
    config = config or tile(m, n, k)
    launch = _bind(
        m, n, k, (x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0)), config, pdl(x.device),
        x.dtype, x.device, bias is None or bias.dtype, residual is None,
    )  # fmt: skip
    tiles, parts, _ = launch.grid
    sums = counted = None
    if parts > 1:
        sums = x.new_empty((parts * tiles * BLOCK_M * config[0],), dtype=torch.float32)
        counted = counters(x.device, parts, tiles)
        if counted is None:  # zeroed in the graph that is captured
            counted = torch.zeros(tiles, dtype=torch.int64, device=x.device)
    launch(x, weight, scale, bias, residual, sums, counted, y)
    return y


def most_rows(n: int, k: int) -> int:
    """Rows of x up to which a weight [n, k] was faster so than with digits on an H200. The last program of a tile reads
    the sums of all others, so k is bounded too."""
    if k > 8192:
        return 0
    return 32 if n * k <= 1 << 21 else 16 if n * k <= 3 << 21 else 8 if n * k <= 1 << 24 else 0


def tile(m: int, n: int, k: int) -> Config:
    """Tiles as measured on an H200: large ones where few programs have them all."""
    programs = triton.cdiv(m, BLOCK_M) * triton.cdiv(n, 128) * triton.cdiv(k, 512)
    return (128, 512, 8) if n * k <= 1 << 21 or programs <= 64 else (64, 512, 4)
