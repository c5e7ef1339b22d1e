"""Matrix products with int8 weights on the tensor cores, and the cast that lets cuBLAS do them.

    y = scale * (x W^T) (+ bias) (+ residual)

Weights are the first operand of ``tl.dot`` (its wide one), so that few rows of x waste little. x is split into int8
digits, x = s (256^2 d0 + 256 d1 + d2) or s (256 d0 + d1) with one fp32 s per row, so that everything is int8 with
exact int32 sums. Two digits carry 16 bits of the row's largest magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels import _gemv, _rows
from tinyfuse.kernels._counters import is_last, sum_shares
from tinyfuse.kernels._gemv import pick, residual_rows, rows, three
from tinyfuse.kernels._triton import Launch, jit, pdl, tl, triton
from tinyfuse.kernels.gated_act import activate

# Digits, rows, columns and depth of a tile, stages, warps, shares of K.
Config = tuple[int, int, int, int, int, int, int]
PIECE = 2048  # columns: a program makes the digits of so many, where there are few rows
FETCH = 512  # bytes of a weight row brought into L2 while up to 64 rows of x are made; more make that take longer


@jit(do_not_specialize=["rows", "tiles"])
def _split(
    x, out, scale, stride, rows, tiles, K, DIGITS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)`` of x as its digits, [DIGITS, rows, K], and its scale. Every program looks at all of the row
    and stores PIECE columns, from ``program_id(1) * PIECE`` on."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    k = tl.arange(0, BLOCK)
    value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    largest = magnitude(value)
    if PIECE < BLOCK:
        k = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    store_digits(value, largest, out, scale, row, k, rows, tiles, K, DIGITS)


@jit
def magnitude(value):
    """The bits of the largest |value|, which order as integers do, with infinities and NaN on top."""
    return tl.max(tl.abs(value).to(tl.int32, bitcast=True), 0)


@jit
def store_digits(value, largest, out, scale, row, k, rows, tiles, K, DIGITS: tl.constexpr):
    """Columns k of the digits of a row, ``value`` in fp32, whose :func:`magnitude` is ``largest``, and its scale;
    behind the scales of all rows its part of the zeros from which the programs of ``tiles`` tiles count. A row that
    holds an infinity or NaN becomes NaN."""
    bad = largest >= 0x7F800000
    largest = tl.maximum(largest.to(tl.float32, bitcast=True), 1e-30)
    limit: tl.constexpr = 8355000.0 if DIGITS == 3 else 32639.0  # 127.5 * 256^d, less room to round up
    if tl.program_id(1) == 0:
        for i in range(row, tiles, tl.num_programs(0)):
            tl.store(scale + tl.num_programs(0) + i, 0.0)
        tl.store(scale + row, tl.where(bad, float("nan"), largest / limit))
    number = tl.floor(value * (limit / largest) + 0.5).to(tl.int32) + (0x808080 if DIGITS == 3 else 0x8080)
    for d in tl.static_range(DIGITS):
        digit = ((number >> (8 * (DIGITS - 1 - d))) & 255) - 128
        tl.store(out + (d * rows + row) * K + k, digit.to(tl.int8), mask=k < K)


@jit(do_not_specialize=["M", "rows", "first1", "first2"])
def _gemm(
    x, x_scale, residual, parts, w0, w1, w2, s0, s1, s2, b0, b1, b2, y0, y1, y2,
    M, rows, residual_stride, per_part, n0, n1, n2, stride0, stride1, stride2, first1, first2,
    K: tl.constexpr, MEMBERS: tl.constexpr, ACT: tl.constexpr, DIGITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
    FETCH: tl.constexpr,
):  # fmt: skip
    """A tile of one y. x: digits [DIGITS, rows, K]. ``first``: the first block of columns of a weight. Under ACT y is
    act(W_0 x), or with two weights, of which a tile then holds rows of both, act(W_0 x) * (W_1 x). Programs that share
    weights are neighbours. Of PARTS programs, each with a share of K, the last to finish sums them in their order."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    part = tl.program_id(1)
    block = tl.program_id(0) // blocks_m
    PAIR: tl.constexpr = ACT != "" and MEMBERS == 2
    EACH: tl.constexpr = BLOCK_N // 2 if PAIR else BLOCK_N  # rows of a weight
    w, s, b, y, n, stride = w0, s0, b0, y0, n0, stride0
    if MEMBERS > 1 and not PAIR:
        which = (block >= first1).to(tl.int32) + (block >= first2).to(tl.int32)
        w, s, y = pick(which, w0, w1, w2, MEMBERS), pick(which, s0, s1, s2, MEMBERS), pick(which, y0, y1, y2, MEMBERS)
        n, stride = pick(which, n0, n1, n2, MEMBERS), pick(which, stride0, stride1, stride2, MEMBERS)
        if b0 is not None:
            b = pick(which, b0, b1, b2, MEMBERS)
        block -= pick(which, 0, first1, first2, MEMBERS)
    row = block * EACH + tl.arange(0, BLOCK_N) % EACH
    safe = tl.minimum(row, n - 1)
    k = tl.arange(0, BLOCK_K)
    if PAIR:
        up = tl.arange(0, BLOCK_N) >= EACH
        w = tl.where(up, w1, w0) + safe.to(tl.int64) * tl.where(up, stride1, stride0)
        w = tl.multiple_of(w, 16)  # as all rows are, which Triton cannot know of one of two: it would load single bytes
        scale = tl.load(tl.where(up, s1, s0) + safe)
        if b0 is not None:
            bias = tl.load(tl.where(up, b1, b0) + safe).to(tl.float32)
    else:
        w += safe.to(tl.int64) * stride
        scale = tl.load(s + safe)
        if b0 is not None:
            bias = tl.load(b + safe).to(tl.float32)
    if PDL and FETCH > 0:
        lines = tl.minimum(part * per_part + tl.arange(0, FETCH // 128) * 128, K - 1)
        _rows.fetch(w[:, None] + lines[None, :])
    w = w[:, None] + k[None, :]
    # All digits of BLOCK_M rows are the columns of one product; three of them leave a fourth slot, of weight 0.
    SLOTS: tl.constexpr = 4 if DIGITS == 3 else DIGITS
    column = tl.arange(0, SLOTS * BLOCK_M)
    first = tl.program_id(0) % blocks_m * BLOCK_M
    at = (tl.minimum(column // BLOCK_M, DIGITS - 1) * rows + first + column % BLOCK_M).to(tl.int64)
    x += at[:, None] * K + k[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_N, SLOTS * BLOCK_M], tl.int32)
    for start in tl.range(part * per_part, tl.minimum(part * per_part + per_part, K), BLOCK_K, num_stages=STAGES):
        acc = tl.dot(
            tile_of(w, k, start, K, BLOCK_K), tl.trans(tile_of(x, k, start, K, BLOCK_K)), acc, out_dtype=tl.int32
        )
    slot = tl.arange(0, SLOTS)[None, :, None]
    power = tl.where(slot == DIGITS - 1, 1.0, tl.where(slot == DIGITS - 2, 256.0, tl.where(slot == 0, 65536.0, 0.0)))
    total = tl.sum(tl.reshape(acc, [BLOCK_N, SLOTS, BLOCK_M]).to(tl.float32) * power, 1)
    last = True
    if PARTS > 1:
        tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        parts += tl.program_id(0).to(tl.int64) * (BLOCK_N * BLOCK_M) + tile
        step = tl.num_programs(0).to(tl.int64) * (BLOCK_N * BLOCK_M)
        tl.store(parts + part * step, total)
        counter = (x_scale + M + tl.program_id(0)).to(tl.pointer_type(tl.int32))
        last = is_last(counter, PARTS)
    m = first + tl.arange(0, BLOCK_M)
    if last:
        if PARTS > 1:
            total = sum_shares(parts, step, PARTS)
        total *= scale[:, None] * tl.load(x_scale + m, mask=m < M, other=0.0)[None, :]
        if b0 is not None:
            total += bias[:, None]
        if PAIR:
            gate, up_part = tl.split(tl.permute(tl.reshape(total, [2, EACH, BLOCK_M]), [1, 2, 0]))
            store(activate(gate, ACT) * up_part, residual, residual_stride, y, m, block * EACH, M, n)
        else:
            if ACT != "":
                total = activate(total, ACT)
            store(total, residual, residual_stride, y, m, block * EACH, M, n)


@jit
def store(total, residual, residual_stride, y, m, row, M, N):
    """Columns from ``row`` on of rows m of y, transposed in ``total``."""
    m, row = m.to(tl.int64)[None, :], (row + tl.arange(0, total.shape[0]))[:, None]
    mask = (m < M) & (row < N)
    if residual is not None:
        total += tl.load(residual + m * residual_stride + row, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + m * N + row, total.to(y.dtype.element_ty), mask=mask)


@jit
def tile_of(at, k, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns from ``start`` on of the rows at ``at``, 0 past their end."""
    if K % BLOCK_K == 0:
        return tl.load(at + start)
    else:
        return tl.load(at + start, mask=k[None, :] < K - start, other=0)


@lru_cache(4096)
def _bind_split(
    m: int, k: int, count: int, padded: int, tiles: int, stride: int, ahead: bool, device: torch.device, *_dtype: Any
) -> Launch:
    block, piece, grid, warps = pieces(m, k, device)
    return Launch(_split, grid, (stride, padded, tiles, k, count, block, piece, ahead), warps, ahead)


def pieces(m: int, k: int, device: torch.device) -> tuple[int, int, tuple[int, int], int]:
    """(a row padded, the columns of it whose digits a program makes, grid, warps)."""
    block = triton.next_power_of_2(k)
    piece = PIECE if m * triton.cdiv(k, PIECE) <= limits(device)[0] else block
    return block, piece, (m, triton.cdiv(k, piece)), min(16, max(4, block // 512))


def digit_buffers(x: Tensor, count: int, padded: int, tiles: int) -> tuple[Tensor, Tensor]:
    """What :func:`split` returns, unwritten."""
    m, k = x.shape
    digits = x.new_empty((count, padded, k), dtype=torch.int8)
    return digits, x.new_empty((m + tiles,), dtype=torch.float32)


def split(x: Tensor, count: int, padded: int, tiles: int) -> tuple[Tensor, Tensor]:
    """x [M, K] as int8 digits [count, padded, K], of which rows from M on are not written, and fp32 scales [M] with
    ``tiles`` zeros behind them."""
    m, k = x.shape
    digits, scale = digit_buffers(x, count, padded, tiles)
    _bind_split(m, k, count, padded, tiles, x.stride(0), pdl(x.device), x.device, x.dtype)(x, digits, scale)
    return digits, scale


Split = Callable[[Tensor, int, int, int], tuple[Tensor, Tensor]]


@lru_cache(4096)
def _bind(
    m: int, k: int, sizes: tuple[int, ...], strides: tuple[int, ...], residual_stride: int, act: str, config: Config,
    ahead: bool, *_dtypes_device: Any,
) -> Launch:  # fmt: skip
    count, block_m, block_n, block_k, stages, warps, parts = config
    blocks_m, per_part = triton.cdiv(m, block_m), triton.cdiv(triton.cdiv(k, block_k), parts) * block_k
    blocks = [triton.cdiv(n, block_n) for n in ((sum(sizes),) if act else sizes)]
    scalars = (
        m, blocks_m * block_m, residual_stride, per_part, *three(sizes), *three(strides), blocks[0], sum(blocks[:2]),
        k, len(sizes), act, count, block_m, block_n, block_k, stages, parts, ahead, FETCH if m <= 64 else 0,
    )  # fmt: skip
    return Launch(_gemm, (blocks_m * sum(blocks), parts), scalars, warps, ahead)


def reason(x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None]) -> str | None:
    """Why :func:`gemm` cannot run these."""
    if scales[0] is None:
        return "cuBLAS multiplies weights in x's dtype"
    if x.numel() // x.shape[-1] > most_rows(x.dtype):
        return f"the int8 tensor-core kernel takes at most {most_rows(x.dtype)} rows of x in {x.dtype}"
    if len(weights) > 3:
        return "the int8 tensor-core kernel takes at most 3 weights together"
    return _gemv.reason(x, weights, scales, biases)


def gemm(
    x: Tensor, weights: list[Tensor], scales: list[Tensor], biases: list[Tensor | None],
    residual: Tensor | None = None, act: str = "", config: Config | None = None, digits: Split = split,
) -> list[Tensor]:  # fmt: skip
    """x [..., K], 1 to 3 int8 weights as :func:`_gemv.reason` has them; one output [..., N_i] each, or with ``act``
    act(W_0 x) (* (W_1 x)). ``digits`` splits x, or what it makes of x."""
    lead, x = x.shape[:-1], rows(x)
    m, k = x.shape
    sizes = tuple([w.shape[0] for w in weights])
    config = config or tile(m, sum(sizes), k, x.dtype, x.device)
    outs = [x.new_empty((*lead, n)) for n in (sizes[:1] if act else sizes)]
    residual = residual_rows(residual, sizes[0])
    launch = _bind(
        m, k, sizes, tuple([w.stride(0) for w in weights]), 0 if residual is None else residual.stride(0), act, config,
        pdl(x.device), x.dtype, x.device, biases[0] is None or biases[0].dtype, residual is None or residual.dtype,
    )  # fmt: skip
    tiles, parts, _ = launch.grid
    operand, x_scale = digits(x, config[0], triton.cdiv(m, config[1]) * config[1], tiles if parts > 1 else 0)
    sums = x.new_empty((parts * tiles * config[1] * config[2],), dtype=torch.float32) if parts > 1 else None
    launch(operand, x_scale, residual, sums, *three(weights), *three(scales), *three(biases), *three(outs))
    return outs


@cache
def limits(device: torch.device) -> tuple[int, int]:
    """How many there are, and the bytes of shared memory that the programs on one of them share."""
    if device.type != "cuda":
        return 132, 233472
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor


def digit_count(dtype: torch.dtype) -> int:
    """Digits that keep an int8 product at least as exact as ``F.linear`` in ``dtype``.

    Two are 16 bits of the row's largest magnitude, which is at most sqrt(K) times its root mean square: an error of at
    most sqrt(K) / 113000, below the 1.7e-3 to which bf16 rounds a result for any K that fits. fp16 rounds to 2e-4.
    """
    return 3 if dtype == torch.float16 else 2


def most_rows(dtype: torch.dtype) -> int:
    """Rows of x up to which the kernel is faster on an H200 than cuBLAS with the weight expanded."""
    return 1024 if digit_count(dtype) == 2 else 256


@lru_cache(4096)
def tile(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Tiles as measured on an H200; all programs at once, each with the stages that then fit, measured faster than
    any fixed number of stages."""
    processors, shared = limits(device)
    count = digit_count(dtype)
    block_m = 8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 or count == 3 else 64
    block_k = 256 if m <= 16 else 128
    fewer = _fewer_rows(m, n, k, processors) if count == 2 else None
    block_m = fewer or block_m
    blocks_m = triton.cdiv(m, block_m)
    narrow, wide = triton.cdiv(n, 64) * blocks_m, triton.cdiv(n, 128) * blocks_m
    # Beyond 64 rows, tiles of 128 columns, two to a multiprocessor, win where they take fewer rounds than those of 64,
    # three to one.
    rounds = triton.cdiv(wide, 2 * processors) < triton.cdiv(narrow, 3 * processors)
    block_n = 128 if (rounds if m > 64 else narrow > 1024) else 64
    blocks = triton.cdiv(n, block_n) * blocks_m
    # From 9 to 64 rows two shares of K win where a quarter of the multiprocessors would have no tile (6144x4096); up to
    # 64, twice the depth where each has one program, and then six stages, unless shares are short (8192x8192).
    parts = 2 if 8 < m <= 64 and processors // 2 < blocks <= processors * 3 // 4 else 1
    while blocks * parts <= processors // 2 and parts < 8:
        parts *= 2
    parts = 1 if fewer else parts
    alone = blocks * parts <= processors
    if alone and (m <= 64 or blocks <= processors // 2):
        block_k = 256
    most = 5 if block_k == 128 else 6 if alone and (m <= 16 or parts == 1) and fewer != 32 else 4
    stage = (block_n + (4 if count == 3 else 2) * block_m) * block_k
    each = shared // triton.cdiv(blocks * parts, processors) - 1024  # the driver keeps 1 KiB of each program's
    return count, block_m, block_n, block_k, min(max(each // stage, 3), most), 4, parts


def _fewer_rows(m: int, n: int, k: int, processors: int) -> int | None:
    """Rows of a tile with which 17 to 64 rows of x are faster, without shares of K, or None: as few as leave one tile
    to a multiprocessor. Deeper than 2048, more than half of these must have one."""
    if not 16 < m <= 64 or k > 4096:
        return None
    block_m, blocks_n = 32 if m <= 32 else 64, triton.cdiv(n, 64)
    while block_m > 16 and blocks_n * triton.cdiv(m, block_m // 2) <= processors:
        block_m //= 2
    least = 0 if k <= 2048 else processors // 2
    return block_m if block_m < 64 and least < blocks_n * triton.cdiv(m, block_m) <= processors else None


@jit
def _cast(w, scale, out, stride, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(w + row * stride + k, mask=k < K, other=0).to(tl.float32) * tl.load(scale + row)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)


@lru_cache(4096)
def _bind_cast(n: int, k: int, stride: int, ahead: bool, *_dtype_device: Any) -> Launch:
    block = min(4096, triton.next_power_of_2(k))
    return Launch(_cast, (n, triton.cdiv(k, block)), (stride, k, block, ahead), 4, ahead)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype, made: bool = False) -> Tensor:
    """scale[:, None] * weight in ``dtype``. ``made``: a kernel may have just written them, so they are not read ahead
    of its end."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    ahead = pdl(weight.device) and not made
    launch = _bind_cast(*weight.shape, weight.stride(0), ahead, dtype, weight.device)
    launch(weight, scale, out)
    return out
