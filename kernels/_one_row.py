"""Matrix-vector products for one row of x: y_i = W_i x (* scale_i) (+ bias_i) (+ residual), or act(W_0 x) (* (W_1 x)).

With int8 weights there may be up to four rows, one after the other. A program loads all of its weight rows before it
waits for the kernel that makes x, in memory order. Int8 weights meet int8 digits of x four at a time in ``dp4a``, with
exact int32 sums and no conversion of a weight; 16-bit weights are widened and summed in fp32.

The digits come from a kernel of their own (``_gemm.split``), with one scale per row, or, where weights are small, from
every program anew: that takes fewer microseconds than another launch, and it can make the norm too. Then there is a
scale for what one thread holds of each STEP, so that none waits for another.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels import _norm_digits, _rows
from tinyfuse.kernels._gemm import digit_count, split
from tinyfuse.kernels._gemv import pick, three
from tinyfuse.kernels._gemv import rows as rows_of
from tinyfuse.kernels._rows import Norm
from tinyfuse.kernels._triton import Launch, aligned, interpreted, jit, pdl, tl, triton
from tinyfuse.kernels.gated_act import activate

if triton is not None:
    WIDEN_BF16 = tl.constexpr(
        "{ .reg .b32 a, b; mov.b64 {a, b}, $4; shl.b32 $0, a, 16; and.b32 $1, a, 0xffff0000; shl.b32 $2, b, 16;"
        " and.b32 $3, b, 0xffff0000; }"
    )
    WIDEN_FP16 = tl.constexpr(
        "{ .reg .b32 a, b; .reg .f16 h<4>; mov.b64 {a, b}, $4; mov.b32 {h0, h1}, a; mov.b32 {h2, h3}, b;"
        " cvt.f32.f16 $0, h0; cvt.f32.f16 $1, h1; cvt.f32.f16 $2, h2; cvt.f32.f16 $3, h3; }"
    )
    # 1.5 * 2^23 + 128 + n has n + 128 in its low 16 bits: their high byte is d0, their low byte d1 + 128.
    SPLIT = tl.constexpr(
        "{ .reg .f32 f<4>; .reg .b32 n<4>, a, b; "
        + " ".join(f"fma.rn.f32 f{j}, ${2 + j}, $6, 0f4B400080; mov.b32 n{j}, f{j};" for j in range(4))
        + " prmt.b32 a, n0, n1, 0x5140; prmt.b32 b, n2, n3, 0x5140; prmt.b32 $0, a, b, 0x7632;"
        " prmt.b32 $1, a, b, 0x5410; xor.b32 $1, $1, 0x80808080; }"
    )


@jit
def _dp4a(w, d, acc, ASM: tl.constexpr):
    """acc + the product of the four bytes of each word."""
    if ASM:
        return tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, d, acc], tl.int32, True, 1)
    else:
        for shift in tl.static_range(0, 32, 8):
            acc += ((w << (24 - shift)) >> 24) * ((d << (24 - shift)) >> 24)
        return acc


@jit
def load(at, i, step: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr, EVICT: tl.constexpr):
    """Elements step * STEP + i of each row, 0 past its end."""
    if (step + 1) * STEP > COUNT:
        return tl.load(at + step * STEP, mask=i < COUNT - step * STEP, other=0, eviction_policy=EVICT)
    else:
        return tl.load(at + step * STEP, eviction_policy=EVICT)


@jit
def lanes(acc, ROWS: tl.constexpr, STEP: tl.constexpr, VECTOR: tl.constexpr):
    """The sums over what one thread holds: [ROWS, STEP // VECTOR]."""
    return tl.sum(tl.reshape(acc, [ROWS, STEP // VECTOR, VECTOR]), 2)


@jit
def digit_sums(
    at, apart, tiles, i, COUNT: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, DIGITS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """The products of weight rows and the digits of a row, the first at ``at``, the others ``apart`` from each other,
    in fp32, summed over what a thread holds."""
    zero = tl.zeros([ROWS, STEP], tl.int32)
    sums = (zero,)
    for _ in tl.static_range(DIGITS - 1):
        sums += (zero,)
    for step in tl.static_range(len(tiles)):
        more = ()
        for d in tl.static_range(DIGITS):
            digit = tl.broadcast_to(load(at + d * apart, i, step, COUNT, STEP, ""), [ROWS, STEP])
            more += (_dp4a(tiles[step], digit, sums[d], ASM),)
        sums = more
    total = lanes(sums[0], ROWS, STEP, 4).to(tl.float32)
    for d in tl.static_range(1, DIGITS):
        total = total * 256 + lanes(sums[d], ROWS, STEP, 4).to(tl.float32)
    return total


@jit
def _four(at, i, step: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr, ASM: tl.constexpr):
    """Elements 4 j ... 4 j + 3, j = step * STEP + i, of the row at ``at``: four tensors in fp32, 0 past its end."""
    TYPE: tl.constexpr = at.dtype.element_ty
    if ASM and TYPE.primitive_bitwidth == 16:
        word = load(at.to(tl.pointer_type(tl.int64)) + i, i, step, COUNT, STEP, "")
        return tl.inline_asm_elementwise(
            WIDEN_FP16 if tl.float16 == TYPE else WIDEN_BF16, "=f,=f,=f,=f,l", [word],
            (tl.float32, tl.float32, tl.float32, tl.float32), True, 1,
        )  # fmt: skip
    else:
        at += 4 * (step * STEP + i)
        values, inside = (), i < COUNT - step * STEP
        for j in tl.static_range(4):
            values += (tl.load(at + j, mask=inside, other=0.0).to(tl.float32),)
        return values


@jit
def _split_four(v0, v1, v2, v3, inverse, ASM: tl.constexpr):
    """The digits of four numbers, as the bytes of a word each."""
    if ASM:
        return tl.inline_asm_elementwise(
            SPLIT, "=r,=r,f,f,f,f,f", [v0, v1, v2, v3, inverse], (tl.int32, tl.int32), True, 1
        )
    else:
        high, low, values = tl.zeros_like(inverse).to(tl.int32), tl.zeros_like(inverse).to(tl.int32), (v0, v1, v2, v3)
        for j in tl.static_range(4):
            n = tl.floor(values[j] * inverse + 0.5).to(tl.int32) + 128
            high |= ((n >> 8) & 255) << (8 * j)
            low |= ((n & 255) ^ 128) << (8 * j)
        return high, low


@jit
def _own_digits(
    x, gains, i, eps, COUNT: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """(words of high digits, of low ones, their unit) of the row at ``x`` or, under NORM, of its RMS norm, unrounded.
    An infinite number or NaN makes the unit one."""
    values = ()
    for step in tl.static_range(STEPS):
        values += _four(x, i, step, COUNT, STEP, ASM)
    factor = 1.0
    if NORM:
        square = values[0] * values[0]
        for j in tl.static_range(1, len(values)):
            square += values[j] * values[j]
        factor = tl.rsqrt(tl.sum(tl.sum(square, 1), 0) / (4 * COUNT) + eps)
    if len(gains) > 0:
        products = ()
        for j in tl.static_range(len(values)):
            products += (values[j] * (gains[j] + (1.0 if UNIT_OFFSET else 0.0)),)
        values = products
    top = tl.abs(values[0])
    for j in tl.static_range(1, len(values)):
        top = tl.maximum(top, tl.abs(values[j]), propagate_nan=tl.PropagateNan.ALL)
    inverse = 32639.0 / tl.maximum(top, 1e-30, propagate_nan=tl.PropagateNan.ALL)  # 127.5 * 256, less room to round up
    highs, lows = (), ()
    for j in tl.static_range(0, len(values), 4):
        high, low = _split_four(values[j], values[j + 1], values[j + 2], values[j + 3], inverse, ASM)
        highs += (high,)
        lows += (low,)
    return highs, lows, top * (1.0 / 32639.0) * factor


@jit
def _own_digit_sums(highs, lows, unit, tiles, ROWS: tl.constexpr, STEP: tl.constexpr, ASM: tl.constexpr):
    """As :func:`digit_sums`, of what :func:`_own_digits` gives."""
    high = tl.zeros([ROWS, STEP], tl.int32)
    low = high
    for step in tl.static_range(len(tiles)):
        high = _dp4a(tiles[step], tl.broadcast_to(highs[step], [ROWS, STEP]), high, ASM)
        low = _dp4a(tiles[step], tl.broadcast_to(lows[step], [ROWS, STEP]), low, ASM)
    return lanes((high * 256 + low).to(tl.float32) * unit, ROWS, STEP, 4)


@jit
def _normed(
    values, gains, eps, K: tl.constexpr, DTYPE: tl.constexpr, UNIT_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr
):
    """The RMS norm of the row of K elements that ``values`` hold in fp32, rounded to DTYPE."""
    square = values[0] * values[0]
    for step in tl.static_range(1, len(values)):
        square += values[step] * values[step]
    factor = tl.rsqrt(tl.sum(square, 1) / K + eps)
    out = ()
    for step in tl.static_range(len(values)):
        gain = None
        if len(gains) > 0:
            gain = gains[step]
        out += (_rows.scaled(values[step], factor[:, None], gain, DTYPE, UNIT_OFFSET, CAST_FIRST).to(tl.float32),)
    return out


@jit
def _one_row(
    x, x_scale, gain, residual, w0, w1, w2, s0, s1, s2, b0, b1, b2, y0, y1, y2,
    n0, n1, n2, stride0, stride1, stride2, first1, first2, eps,
    EACH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
    M: tl.constexpr, MEMBERS: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, DIGITS: tl.constexpr,
    NORM: tl.constexpr, UNIT_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one weight, or of each of two under ACT. ``first``: its first program. int8 with ``x_scale``: x is
    [DIGITS, M, K] digits; else M is 1. NORM: the weights meet the RMS norm of x. EACH to STEPS: :func:`steps`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    INT: tl.constexpr = tl.int8 == w0.dtype.element_ty
    OWN: tl.constexpr = INT and x_scale is None
    PAIR: tl.constexpr = ACT != "" and MEMBERS == 2

    pid = tl.program_id(0)
    w, s, b, y, n, stride = w0, s0, b0, y0, n0, stride0
    if MEMBERS > 1 and not PAIR:
        which = (pid >= first1).to(tl.int32) + (pid >= first2).to(tl.int32)
        w, y = pick(which, w0, w1, w2, MEMBERS), pick(which, y0, y1, y2, MEMBERS)
        n, stride = pick(which, n0, n1, n2, MEMBERS), pick(which, stride0, stride1, stride2, MEMBERS)
        if s0 is not None:
            s = pick(which, s0, s1, s2, MEMBERS)
        if b0 is not None:
            b = pick(which, b0, b1, b2, MEMBERS)
        pid -= pick(which, 0, first1, first2, MEMBERS)
    row = pid * ROWS + tl.arange(0, ROWS)
    live = row < n
    safe = tl.minimum(row, n - 1).to(tl.int64)[:, None]
    i = tl.arange(0, STEP)[None, :]
    if INT:
        w = w.to(tl.pointer_type(tl.int32))
        if not OWN:
            x = x.to(tl.pointer_type(tl.int32))
    at = w + safe * (stride // EACH) + i
    at2 = at
    if PAIR:
        up = w1
        if INT:
            up = w1.to(tl.pointer_type(tl.int32))
        at2 = up + safe * (stride1 // EACH) + i
    tiles, tiles2, gains = (), (), ()
    for step in tl.static_range(STEPS):
        if gain is not None:
            if OWN:
                gains += _four(gain, i, step, COUNT, STEP, ASM)
            else:
                gains += (load(gain + i, i, step, COUNT, STEP, ""),)
        tiles += (load(at, i, step, COUNT, STEP, "evict_first"),)
        if PAIR:
            tiles2 += (load(at2, i, step, COUNT, STEP, "evict_first"),)
    scale, scale2, bias, bias2 = 1.0, 1.0, 0.0, 0.0
    if s0 is not None:
        scale = tl.load(s + row, mask=live, other=0.0)
        if PAIR:
            scale2 = tl.load(s1 + row, mask=live, other=0.0)
    if b0 is not None:
        bias = tl.load(b + row, mask=live, other=0.0).to(tl.float32)
        if PAIR:
            bias2 = tl.load(b1 + row, mask=live, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()

    if OWN:
        highs, lows, unit = _own_digits(x, gains, i, eps, COUNT, STEP, STEPS, NORM, UNIT_OFFSET, ASM)
    elif NORM:
        values = ()
        for step in tl.static_range(STEPS):
            values += (load(x + i, i, step, COUNT, STEP, "").to(tl.float32),)
        values = _normed(values, gains, eps, COUNT, x.dtype.element_ty, UNIT_OFFSET, CAST_FIRST)
    for m in tl.static_range(M):
        total = tl.zeros([ROWS, STEP // VECTOR], tl.float32)
        total2 = total
        number = 1.0
        if OWN:
            total = _own_digit_sums(highs, lows, unit, tiles, ROWS, STEP, ASM)
            if PAIR:
                total2 = _own_digit_sums(highs, lows, unit, tiles2, ROWS, STEP, ASM)
        elif INT:
            number = tl.load(x_scale + m)
            at_x = x + m * COUNT + i
            total = digit_sums(at_x, M * COUNT, tiles, i, COUNT, ROWS, STEP, DIGITS, ASM)
            if PAIR:
                total2 = digit_sums(at_x, M * COUNT, tiles2, i, COUNT, ROWS, STEP, DIGITS, ASM)
        else:
            for step in tl.static_range(STEPS):
                v = values[step] if NORM else load(x + i, i, step, COUNT, STEP, "").to(tl.float32)
                total += lanes(tiles[step].to(tl.float32) * v, ROWS, STEP, VECTOR)
                if PAIR:
                    total2 += lanes(tiles2[step].to(tl.float32) * v, ROWS, STEP, VECTOR)
        value = tl.sum(total, 1) * (scale * number) + bias
        if ACT != "":
            value = activate(value, ACT)
        if PAIR:
            value *= tl.sum(total2, 1) * (scale2 * number) + bias2
        if residual is not None:
            value += tl.load(residual + m * n + row, mask=live, other=0.0).to(tl.float32)
        tl.store(y + m * n + row, value.to(y.dtype.element_ty), mask=live)


@lru_cache(4096)
def _bind(
    m: int, k: int, sizes: tuple[int, ...], strides: tuple[int, ...], act: str, rows: int, warps: int, count: int,
    norm: tuple[float, bool, bool] | None, ahead: bool, int8: bool, *_dtypes_device: Any,
) -> Launch:  # fmt: skip
    """count: digits; norm, if the kernel makes it: eps, unit_offset, cast_first."""
    eps, *flags = norm or (0.0, False, False)
    blocks = [triton.cdiv(n, rows) for n in (sizes[:1] if act else sizes)]
    scalars = (
        *three(sizes), *three(strides), blocks[0], sum(blocks[:2]), eps, *steps(k, int8, warps), m,
        len(sizes), act, rows, count, norm is not None, *flags, ahead, not interpreted(),
    )  # fmt: skip
    return Launch(_one_row, (sum(blocks),), scalars, warps, ahead)


def steps(k: int, int8: bool, warps: int) -> tuple[int, ...]:
    """How a kernel reads a row of k elements: EACH of them at once, COUNT times; VECTOR of these, 16 bytes, are a
    thread's and STEP the program's in one of STEPS."""
    each, vector = (4, 4) if int8 else (1, 8)
    count, step = k // each, warps * 32 * vector
    return each, count, vector, step, triton.cdiv(count, step)


def most_rows(x: Tensor, weights: list[Tensor]) -> int:
    """The rows of x up to which this kernel was faster with int8 weights than the tensor cores, on an H200."""
    if digit_count(x.dtype) > 2:
        return 1
    return 4 if sum(w.shape[0] for w in weights) * x.shape[-1] <= 4096 * 4096 else 2


def splits_itself(x: Tensor, weights: list[Tensor]) -> bool:
    """Whether every program makes the digits of x, and its norm: faster on an H200 up to 33 million int8 weights."""
    return x.numel() == x.shape[-1] and sum(w.shape[0] for w in weights) * x.shape[-1] <= 1 << 25


def tile(
    k_bytes: int, n: int, int8: bool, pair: bool, norm: bool = False, m: int = 1, own: bool = False
) -> tuple[int, int]:
    """(weight rows of a program, its warps), as measured on an H200; at most 128 registers of weights to a thread.
    Every program makes the norm, or its ``own`` digits, anew: larger ones make them less often."""
    if own:
        rows, warps = 4 if pair or (k_bytes <= 2048 < n) else 8, 2 if k_bytes <= 4096 else 4
    elif m > 1:
        rows, warps = 2 if pair else 4, min(8, 1 << max(1, k_bytes // 2048).bit_length() - 1)
    elif int8:
        rows, warps = (2, 8) if k_bytes > 8192 else (4, 4) if n >= 8192 and k_bytes > 2048 else (4, 2)
        rows, warps = (8, 1) if k_bytes <= 1024 else (rows, warps)
        rows, warps = (2, 1) if pair and k_bytes <= 4096 else (rows, warps)
    else:
        rows, warps = (1, 8) if k_bytes > 16384 else (2, 8) if k_bytes > 4096 else (2, 4) if k_bytes > 2048 else (4, 2)
        rows, warps = (4, 4) if norm and k_bytes <= 8192 else (2 * rows if norm else rows, warps)
        rows = max(1, rows // 2) if pair else rows
    while rows * (1 + pair) * k_bytes > warps * 32 * 512 and (rows > 1 or warps < 16):
        rows, warps = (rows // 2, warps) if rows > 1 else (rows, 2 * warps)
    return rows, warps


def one_row(
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None],
    residual: Tensor | None = None, act: str = "", config: tuple[int, int] | None = None,
    norm: Norm | None = None, own: bool | None = None,
) -> list[Tensor]:  # fmt: skip
    """x [..., K] of one row, with int8 weights of up to four; else as :func:`_gemv.gemv`, of x or its ``norm``.
    ``config`` and ``own`` override :func:`tile` and :func:`splits_itself`."""
    int8 = weights[0].dtype == torch.int8
    own = int8 and (splits_itself(x, weights) if own is None else own)
    lead, x = x.shape[:-1], rows_of(x)
    m, k = x.shape
    sizes = tuple([w.shape[0] for w in weights])
    pair, inside = act != "" and len(sizes) == 2, norm if own or not int8 else None
    config = config or tile(k if int8 else 2 * k, sum(sizes), int8, pair, norm is not None, m, own)
    outs = [x.new_empty((*lead, n)) for n in (sizes[:1] if act else sizes)]
    residual = None if residual is None else residual.reshape(m, sizes[0]).contiguous()
    gain = None if inside is None else inside.weight
    if gain is not None and not aligned(gain):
        gain = gain.clone()
    count = digit_count(x.dtype)
    launch = _bind(
        m, k, sizes, tuple([w.stride(0) for w in weights]), act, *config, count, inside and inside[1:], pdl(x.device),
        int8, x.dtype, x.device, biases[0] is None or biases[0].dtype, residual is None or residual.dtype,
        gain is None or gain.dtype,
    )  # fmt: skip
    operand, x_scale = x, None
    if int8 and not own:
        operand, x_scale = split(x, count, m, 0) if norm is None else _norm_digits.split(norm, x, count, m, 0)
    launch(operand, x_scale, gain, residual, *three(weights), *three(scales), *three(biases), *three(outs))
    return outs
