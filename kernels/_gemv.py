"""Matrix-vector products that stream their weights through registers into the tensor cores: 1 to 16 rows.

    y_i = x W_i^T (* scale_i) (+ bias_i) (+ residual)        or        y = act(x W_0^T) * (x W_1^T)

A warp holds 8 weight rows by 64 bytes, 16 bytes to a lane, which is at once what a 128-bit load gives and the
B operand of two ``mma.sync`` (m16n8k16 for 16-bit weights, m16n8k32 for int8) once the order of K within those
64 bytes is permuted in both operands alike. So no weight byte is converted or moved, and the instructions per
512 bytes of weights are one load and a few products. Activations are the A operand.

Digits: x = s (65536 d0 + 256 d1 + d2) with one fp32 s per row and d in [-128, 127], so that int8 weights meet int8
activations with exact int32 sums. Three digits carry 24 bits of the row's largest magnitude. They are stored in the
order in which a lane's registers take them (``_digits``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels._triton import Launch, interpreted, jit, pdl, tl, triton
from tinyfuse.kernels.gated_act import activate


def _asm(product: str, *rows: str) -> str:
    """``out = into + A B`` in PTX: each row is "out into | A | B" in operand numbers; t: the temporaries."""

    def group(numbers: list[str]) -> str:
        return "{" + ",".join(f"${number}" for number in numbers) + "}"

    def four(start: str) -> str:
        return "{t0,t1,t2,t3}" if start == "t" else group([str(int(start) + i) for i in range(4)])

    lines = []
    for row in rows:
        accumulators, a, b = (part.split() for part in row.split("|"))
        lines.append(f"{product} {four(accumulators[0])}, {group(a)}, {group(b)}, {four(accumulators[1])};")
    return " ".join(lines)


if triton is not None:

    def _float(kind: str, k: int, *rows: str) -> tl.constexpr:
        product = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32"
        return tl.constexpr(f"{{ .reg .f32 t<4>; {_asm(product, *rows)} }}")

    def _int(*rows: str) -> tl.constexpr:
        return tl.constexpr(f"{{ .reg .s32 t<4>; {_asm('mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32', *rows)} }}")

    # Up to 8 rows: A's rows 0-7 are words 0 and 2 of a lane's quadruple of x and its rows 8-15 are words 1 and 3, in
    # the order of the registers, so that nothing moves; what meets the other word's weights is not used.
    _ROWS8 = ("t 8 | 20 21 | 16", "0 t | 22 23 | 18", "t 12 | 20 21 | 17", "4 t | 22 23 | 19")
    BF16_ROWS8, FP16_ROWS8 = _float("bf16", 8, *_ROWS8), _float("f16", 8, *_ROWS8)
    FLOAT8 = tl.constexpr(",".join(["=f"] * 8 + ["f"] * 8 + ["r"] * 8))
    # Up to 16 rows: two quadruples, of rows 0-7 and of rows 8-15.
    _ROWS16 = ("t 4 | 12 16 13 17 | 8 9", "0 t | 14 18 15 19 | 10 11")
    BF16_ROWS16, FP16_ROWS16 = _float("bf16", 16, *_ROWS16), _float("f16", 16, *_ROWS16)
    FLOAT16 = tl.constexpr(",".join(["=f"] * 4 + ["f"] * 4 + ["r"] * 12))
    # Digits lie in memory in the order of the registers. Up to 2 rows: rows 0-7 are words 0 and 1 of two rows' digits.
    INT8_ROWS2 = _int("0 8 | 20 21 22 23 | 16 17", "4 12 | 20 21 22 23 | 18 19")
    INT2 = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 16))
    # Up to 8 rows: digits 0 and 1 as rows 0-7 and 8-15, then digit 2 as above.
    INT8_ROWS8 = _int(
        "t 12 | 28 29 30 31 | 24 25", "0 t | 32 33 34 35 | 26 27",
        "4 16 | 36 37 38 39 | 24 25", "8 20 | 36 37 38 39 | 26 27",
    )  # fmt: skip
    INT8 = tl.constexpr(",".join(["=r"] * 12 + ["r"] * 28))
    INT8_ROWS16 = _int("t 4 | 12 13 14 15 | 8 9", "0 t | 16 17 18 19 | 10 11")
    INT16 = tl.constexpr(",".join(["=r"] * 4 + ["r"] * 16))


@jit
def _unpack(words, part: tl.constexpr, TYPE: tl.constexpr):
    """Element ``part`` of every 32-bit word."""
    if tl.int8 == TYPE:
        return (words << (24 - 8 * part)) >> 24
    else:
        half = ((words >> (16 * part)) & 0xFFFF).to(tl.int16)
        return half.to(TYPE, bitcast=True).to(tl.float32)


@jit
def _word(x, q: tl.constexpr, WARPS: tl.constexpr):
    """Word q of every lane: [WARPS, 8, 4]."""
    pick = tl.arange(0, 4)[None, None, None, :] == q
    return tl.sum(tl.where(pick, tl.reshape(x, [WARPS, 8, 4, 4]), 0), 3)


@jit
def _mma(acc, low0, high0, low1, high1, w0, w1, WARPS: tl.constexpr, TYPE: tl.constexpr):
    """``mma`` in plain operations: element (warp, g, t, h, l) of acc is row g + 8 h, column 2 t + l."""
    total = tl.zeros([WARPS, 2, 8, 8], acc.dtype)
    x = tl.permute(tl.join(tl.join(low0, high0), tl.join(low1, high1)), [0, 3, 1, 2, 4])
    x = tl.reshape(x, [WARPS, 2, 8, 1, 8])
    w = tl.reshape(tl.join(w0, w1), [WARPS, 1, 1, 8, 8])
    for part in tl.static_range(32 // TYPE.primitive_bitwidth):
        total += tl.sum(_unpack(w, part, TYPE) * _unpack(x, part, TYPE), 4)
    total = tl.permute(tl.reshape(total, [WARPS, 2, 8, 4, 2]), [0, 2, 3, 1, 4])
    return acc + tl.reshape(total, [WARPS * 128])


@jit
def _step(acc, w, x, SETS: tl.constexpr, WARPS: tl.constexpr, TYPE: tl.constexpr, ASM: tl.constexpr):
    """The accumulators after 64 more bytes of 8 weight rows."""
    if not ASM:
        return _step_emulated(acc, w, x, SETS, WARPS, TYPE)
    elif SETS > 0:
        out = ()
        for d in tl.static_range(len(acc)):
            args = [acc[d], w, x[2 * d], x[2 * d + 1]]
            if tl.int8 == TYPE:
                out += (tl.inline_asm_elementwise(INT8_ROWS16, INT16, args, tl.int32, True, 4),)
            elif tl.float16 == TYPE:
                out += (tl.inline_asm_elementwise(FP16_ROWS16, FLOAT16, args, tl.float32, True, 4),)
            else:
                out += (tl.inline_asm_elementwise(BF16_ROWS16, FLOAT16, args, tl.float32, True, 4),)
        return out
    elif tl.int8 == TYPE and len(acc) == 2:
        args = [acc[0], acc[1], w, x[0]]
        return tl.inline_asm_elementwise(INT8_ROWS2, INT2, args, (tl.int32, tl.int32), True, 4)
    elif tl.int8 == TYPE:
        args = [acc[0], acc[1], acc[2], w, x[0], x[1], x[2]]
        return tl.inline_asm_elementwise(INT8_ROWS8, INT8, args, (tl.int32, tl.int32, tl.int32), True, 4)
    elif tl.float16 == TYPE:
        args = [acc[0], acc[1], w, x[0]]
        return tl.inline_asm_elementwise(FP16_ROWS8, FLOAT8, args, (tl.float32, tl.float32), True, 4)
    else:
        args = [acc[0], acc[1], w, x[0]]
        return tl.inline_asm_elementwise(BF16_ROWS8, FLOAT8, args, (tl.float32, tl.float32), True, 4)


@jit
def _step_emulated(acc, w, x, SETS: tl.constexpr, WARPS: tl.constexpr, TYPE: tl.constexpr):
    w0, w1, w2, w3 = _word(w, 0, WARPS), _word(w, 1, WARPS), _word(w, 2, WARPS), _word(w, 3, WARPS)
    if SETS > 0:
        out = ()
        for d in tl.static_range(len(acc)):
            y, z = _quadruple(x[2 * d], WARPS), _quadruple(x[2 * d + 1], WARPS)
            if tl.int8 == TYPE:
                part = _mma(acc[d], y[0], y[1], y[2], y[3], w0, w1, WARPS, TYPE)
                out += (_mma(part, z[0], z[1], z[2], z[3], w2, w3, WARPS, TYPE),)
            else:
                part = _mma(acc[d], y[0], z[0], y[1], z[1], w0, w1, WARPS, TYPE)
                out += (_mma(part, y[2], z[2], y[3], z[3], w2, w3, WARPS, TYPE),)
        return out
    elif tl.int8 == TYPE and len(acc) == 2:
        y = _quadruple(x[0], WARPS)
        a = _mma(acc[0], y[0], y[1], y[2], y[3], w0, w1, WARPS, TYPE)
        return a, _mma(acc[1], y[0], y[1], y[2], y[3], w2, w3, WARPS, TYPE)
    elif tl.int8 == TYPE:
        y, z, v = _quadruple(x[0], WARPS), _quadruple(x[1], WARPS), _quadruple(x[2], WARPS)
        a = _mma(acc[0], y[0], y[1], y[2], y[3], w0, w1, WARPS, TYPE)
        a = _mma(a, z[0], z[1], z[2], z[3], w2, w3, WARPS, TYPE)
        b = _mma(acc[1], v[0], v[1], v[2], v[3], w0, w1, WARPS, TYPE)
        return a, b, _mma(acc[2], v[0], v[1], v[2], v[3], w2, w3, WARPS, TYPE)
    else:
        y = _quadruple(x[0], WARPS)
        a = _mma(acc[0], y[0], y[1], y[2], y[3], w0, w2, WARPS, TYPE)
        return a, _mma(acc[1], y[0], y[1], y[2], y[3], w1, w3, WARPS, TYPE)


@jit
def _quadruple(x, WARPS: tl.constexpr):
    return _word(x, 0, WARPS), _word(x, 1, WARPS), _word(x, 2, WARPS), _word(x, 3, WARPS)


@jit
def _half(acc, h: tl.constexpr, ROW_WARPS: tl.constexpr, K_WARPS: tl.constexpr):
    """Rows g + 8 h of the accumulator, fp32: [ROW_WARPS, K_WARPS, g, t, l]."""
    low, high = tl.split(tl.permute(tl.reshape(acc, [ROW_WARPS, K_WARPS, 8, 4, 2, 2]), [0, 1, 2, 3, 5, 4]))
    if h == 0:
        return low.to(tl.float32)
    else:
        return high.to(tl.float32)


@jit
def _rows(
    acc, part: tl.constexpr, SETS: tl.constexpr, ROW_WARPS: tl.constexpr, K_WARPS: tl.constexpr, INT: tl.constexpr
):
    """The sums of rows 8 part + g of x: [ROW_WARPS, 8, 4, 2], (warp, g, t, l) of weight row 8 warp + 2 t + l.

    Two rows of digits give [ROW_WARPS, 2, 4, 2].
    """
    h: tl.constexpr = part % 2
    if SETS > 0 and INT:
        first: tl.constexpr = part // 2 * 3
        total = _half(acc[first], h, ROW_WARPS, K_WARPS) * 65536
        total += _half(acc[first + 1], h, ROW_WARPS, K_WARPS) * 256 + _half(acc[first + 2], h, ROW_WARPS, K_WARPS)
    elif SETS > 0:
        total = _half(acc[part // 2], h, ROW_WARPS, K_WARPS)
    elif INT and len(acc) == 2:
        total = tl.sum(_half(acc[0], 0, ROW_WARPS, K_WARPS) + _half(acc[1], 1, ROW_WARPS, K_WARPS), 1)
        digit = tl.arange(0, 4)[None, None, :, None, None]
        total = tl.reshape(total, [ROW_WARPS, 2, 4, 4, 2])
        total = tl.where(digit == 0, total * 65536, tl.where(digit == 1, total * 256, tl.where(digit == 2, total, 0)))
        total = tl.reshape(tl.sum(total, 2), [ROW_WARPS, 1, 2, 4, 2])
    elif INT:
        total = _half(acc[0], 0, ROW_WARPS, K_WARPS) * 65536 + _half(acc[0], 1, ROW_WARPS, K_WARPS) * 256
        total += _half(acc[1], 0, ROW_WARPS, K_WARPS) + _half(acc[2], 1, ROW_WARPS, K_WARPS)
    else:
        total = _half(acc[0], 0, ROW_WARPS, K_WARPS) + _half(acc[1], 1, ROW_WARPS, K_WARPS)
    return tl.sum(total, 1)


@jit
def _digits(
    x, out, scale, stride, M: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr, SETS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)`` of x as digits, and its scale.

    Word q of lane t of the 64 bytes c goes, for up to 2 rows, to [c, 4 row + d, t, 2 (q % 2) + q // 2] (d = 3 is not
    written); for up to 8 rows to [c, block, row, t, slot]: digit 0 to block q // 2,
    slot 2 (q % 2), digit 1 one slot on, digit 2 to block 2, slot 2 (q % 2) + q // 2; for more rows digit d goes to
    [c, row // 16, 2 d + q // 2, row % 8, t, 2 (q % 2) + row // 8 % 2]. 0 past the end of the row.
    """
    row = tl.program_id(0)
    word = tl.arange(0, WORDS)
    k = word[:, None] * 4 + tl.arange(0, 4)[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row.to(tl.int64) * stride + k, mask=k < K, other=0.0).to(tl.float32)
    # The bits of |x| order as integers do, with infinities and NaN on top: a row that holds one becomes NaN.
    largest = tl.max(tl.max(tl.abs(value).to(tl.int32, bitcast=True), 1), 0)
    bad = largest >= 0x7F800000
    largest = tl.maximum(largest.to(tl.float32, bitcast=True), 1e-30)
    tl.store(scale + row, tl.where(bad, float("nan"), largest / 8355000.0))  # 127.5 * 65536 less room to round up
    number = tl.floor(value * (8355000.0 / largest) + 0.5).to(tl.int32) + 0x808080
    c, t, q = word // 16, word // 4 % 4, word % 4
    mask = c < (K + 63) // 64
    for d in tl.static_range(3):
        digit = (((number >> (16 - 8 * d)) & 255) - 128) & 255
        packed = tl.sum(digit << (8 * tl.arange(0, 4)[None, :]), 1)
        if SETS > 0:
            at = (((c * SETS + row // 16) * 6 + 2 * d + q // 2) * 8 + row % 8) * 16
            at += t * 4 + 2 * (q % 2) + row // 8 % 2
        elif M <= 2:
            at = (c * (4 * M) + 4 * row + d) * 16 + t * 4 + 2 * (q % 2) + q // 2
        elif d < 2:
            at = ((c * 3 + q // 2) * M + row) * 16 + t * 4 + 2 * (q % 2) + d
        else:
            at = ((c * 3 + 2) * M + row) * 16 + t * 4 + 2 * (q % 2) + q // 2
        tl.store(out + at, packed, mask=mask)


@jit
def _load(at, word, j, STEP: tl.constexpr, WORDS: tl.constexpr, LAST: tl.constexpr):
    """The words of step ``j``; the last step of a row may be partial and is 0 beyond the row."""
    if LAST and WORDS % STEP != 0:
        return tl.load(at + j * STEP, mask=word < WORDS - j * STEP, other=0, eviction_policy="evict_first")
    else:
        return tl.load(at + j * STEP, eviction_policy="evict_first")


@jit
def _activations(at, at2, word, j, STEP: tl.constexpr, WORDS: tl.constexpr, LAST: tl.constexpr,
                 M: tl.constexpr, SETS: tl.constexpr, INT: tl.constexpr):  # fmt: skip
    """What the products of step ``j`` take beside the weights."""
    out = ()
    if INT and SETS > 0:
        at += j * (STEP * 48 * SETS)
        for quadruple in tl.static_range(6 * SETS):
            out += (tl.load(at + 128 * quadruple),)
    elif INT and M <= 2:
        out = (tl.load(at + j * (STEP * 4 * M)),)
    elif INT:
        at += j * (STEP * 3 * M)
        out = (tl.load(at), tl.load(at + 16 * M), tl.load(at + 32 * M))
    elif LAST and WORDS % STEP != 0:
        out = (tl.load(at + j * STEP, mask=word < WORDS - j * STEP, other=0),)
        if SETS > 0:
            out += (tl.load(at2 + j * STEP, mask=word < WORDS - j * STEP, other=0),)
    else:
        out = (tl.load(at + j * STEP),)
        if SETS > 0:
            out += (tl.load(at2 + j * STEP),)
    return out


@jit
def pick(which, a0, a1, a2, MEMBERS: tl.constexpr):
    """a0, a1 or a2 by the number ``which``."""
    if MEMBERS == 1:
        return a0
    elif MEMBERS == 2:
        return tl.where(which == 0, a0, a1)
    else:
        return tl.where(which == 0, a0, tl.where(which == 1, a1, a2))


@jit
def _gemv(
    x, x_scale, residual, w0, w1, w2, s0, s1, s2, b0, b1, b2, y0, y1, y2,
    x_stride, residual_stride, n0, n1, n2, stride0, stride1, stride2, first1, first2, loops,
    M: tl.constexpr, K: tl.constexpr, MEMBERS: tl.constexpr, ACT: tl.constexpr, ROW_WARPS: tl.constexpr,
    K_WARPS: tl.constexpr, GROUPS: tl.constexpr, AHEAD: tl.constexpr, BATCH: tl.constexpr, PDL: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """8 ROW_WARPS GROUPS rows of one weight, or under ACT 8 ROW_WARPS rows of both. ``first``: its first program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    TYPE: tl.constexpr = w0.dtype.element_ty
    INT: tl.constexpr = tl.int8 == TYPE
    SETS: tl.constexpr = 0 if M <= 8 else (M + 15) // 16  # of 16 rows of x
    WARPS: tl.constexpr = ROW_WARPS * K_WARPS
    EACH: tl.constexpr = 32 // TYPE.primitive_bitwidth  # elements a word
    WORDS: tl.constexpr = K // EACH
    STEP: tl.constexpr = K_WARPS * 16
    STEPS: tl.constexpr = (WORDS + STEP - 1) // STEP
    ROWS: tl.constexpr = 2 if INT and M <= 2 else 8
    PAIR: tl.constexpr = ACT != "" or GROUPS == 2

    pid = tl.program_id(0)
    w, s, b, y, n, stride = w0, s0, b0, y0, n0, stride0
    if ACT == "" and MEMBERS > 1:
        which = (pid >= first1).to(tl.int32) + (pid >= first2).to(tl.int32)
        w, y, n = pick(which, w0, w1, w2, MEMBERS), pick(which, y0, y1, y2, MEMBERS), pick(which, n0, n1, n2, MEMBERS)
        stride = pick(which, stride0, stride1, stride2, MEMBERS)
        if s0 is not None:
            s = pick(which, s0, s1, s2, MEMBERS)
        if b0 is not None:
            b = pick(which, b0, b1, b2, MEMBERS)
        pid -= pick(which, 0, first1, first2, MEMBERS)
    start = pid * (8 * ROW_WARPS * (1 if ACT != "" else GROUPS))

    # Element i: warp i // 128 (of ROW_WARPS by K_WARPS), then 8 rows, then 4 lanes of 4 words each.
    i = tl.arange(0, WARPS * 128)
    g = i // 16 % 8
    word = i // 128 % K_WARPS * 16 + i % 16
    row = start + i // (128 * K_WARPS) * 8 + g
    at = w.to(tl.pointer_type(tl.int32)) + tl.minimum(row, n - 1).to(tl.int64) * (stride // EACH) + word
    at2 = at
    if ACT != "":
        at2 = w1.to(tl.pointer_type(tl.int32)) + tl.minimum(row, n - 1).to(tl.int64) * (stride1 // EACH) + word
    elif PAIR:
        row += 8 * ROW_WARPS
        at2 = w.to(tl.pointer_type(tl.int32)) + tl.minimum(row, n - 1).to(tl.int64) * (stride // EACH) + word
    x = x.to(tl.pointer_type(tl.int32))
    if INT:
        c = i // 128 % K_WARPS
        if SETS > 0:
            x += c * (SETS * 768) + i % 128
        elif M <= 2:
            x += c * (4 * M * 16) + g % (4 * M) * 16 + i % 16
        else:
            x += c * (3 * M * 16) + tl.minimum(g, M - 1) * 16 + i % 16
        x2 = x
    else:
        x2 = x + tl.minimum(g + 8, M - 1) * (x_stride // EACH) + word
        x += tl.minimum(g, M - 1) * (x_stride // EACH) + word

    BLOCKS: tl.constexpr = WORDS // STEP // AHEAD  # of AHEAD whole steps; the rest follows one by one
    LEFT: tl.constexpr = STEPS - BLOCKS * AHEAD
    tiles, tiles2 = (), ()
    for j in tl.static_range(AHEAD):
        tiles += (_load(at, word, j, STEP, WORDS, False),)
        if PAIR:
            tiles2 += (_load(at2, word, j, STEP, WORDS, False),)
    column = start + 8 * tl.arange(0, ROW_WARPS)[:, None, None, None] + 2 * tl.arange(0, 4)[None, None, :, None]
    column += tl.arange(0, 2)[None, None, None, :]
    column2 = column if ACT != "" else column + 8 * ROW_WARPS
    scale, scale2, bias, bias2 = 0.0, 0.0, 0.0, 0.0
    if s0 is not None:
        scale = _column(s, column, n)
        scale2 = _column(s1 if ACT != "" else s, column2, n) if PAIR else scale
    if b0 is not None:
        bias = _column(b, column, n)
        bias2 = _column(b1 if ACT != "" else b, column2, n) if PAIR else bias
    if PDL:
        tl.extra.cuda.gdc_wait()

    zero = tl.zeros([WARPS * 128], tl.int32 if INT else tl.float32)
    if INT and M > 2:
        acc = (zero, zero, zero)
        for _ in tl.static_range(SETS - 1):
            acc += (zero, zero, zero)
    elif SETS > 0:
        acc = (zero,)
    else:
        acc = (zero, zero)
    acc2 = acc
    if BLOCKS > 1:
        for block in range(loops):  # BLOCKS - 1, at run time: unrolled code would run at the speed of its fetch
            fresh, fresh2 = (), ()
            for batch in tl.static_range(0, AHEAD, BATCH):
                a = ()
                for j in tl.static_range(batch, min(batch + BATCH, AHEAD)):
                    a += (_activations(x, x2, word, block * AHEAD + j, STEP, WORDS, False, M, SETS, INT),)
                for j in tl.static_range(batch, min(batch + BATCH, AHEAD)):
                    acc = _step(acc, tiles[j], a[j - batch], SETS, WARPS, TYPE, ASM)
                    fresh += (_load(at, word, (block + 1) * AHEAD + j, STEP, WORDS, False),)
                    if PAIR:
                        acc2 = _step(acc2, tiles2[j], a[j - batch], SETS, WARPS, TYPE, ASM)
                        fresh2 += (_load(at2, word, (block + 1) * AHEAD + j, STEP, WORDS, False),)
            tiles, tiles2 = fresh, fresh2
    for j in tl.static_range(LEFT):
        tiles += (_load(at, word, BLOCKS * AHEAD + j, STEP, WORDS, j == LEFT - 1),)
        if PAIR:
            tiles2 += (_load(at2, word, BLOCKS * AHEAD + j, STEP, WORDS, j == LEFT - 1),)
    REST: tl.constexpr = AHEAD + LEFT
    for batch in tl.static_range(0, REST, BATCH):
        a = ()
        for j in tl.static_range(batch, min(batch + BATCH, REST)):
            a += (_activations(x, x2, word, (BLOCKS - 1) * AHEAD + j, STEP, WORDS, j == REST - 1, M, SETS, INT),)
        for j in tl.static_range(batch, min(batch + BATCH, REST)):
            acc = _step(acc, tiles[j], a[j - batch], SETS, WARPS, TYPE, ASM)
            if PAIR:
                acc2 = _step(acc2, tiles2[j], a[j - batch], SETS, WARPS, TYPE, ASM)

    for part in tl.static_range((M + 7) // 8):
        m = tl.arange(0, ROWS)[None, :, None, None] + 8 * part
        value = _scaled(_rows(acc, part, SETS, ROW_WARPS, K_WARPS, INT), x_scale, scale, bias, m, M)
        if ACT != "":
            up = _scaled(_rows(acc2, part, SETS, ROW_WARPS, K_WARPS, INT), x_scale, scale2, bias2, m, M)
            _store(y, activate(value, ACT) * up, None, 0, m, column, M, n)
        else:
            _store(y, value, residual, residual_stride, m, column, M, n)
            if PAIR:
                value = _scaled(_rows(acc2, part, SETS, ROW_WARPS, K_WARPS, INT), x_scale, scale2, bias2, m, M)
                _store(y, value, residual, residual_stride, m, column2, M, n)


@jit
def _column(values, n, N):
    """Scales or biases of the weight rows n, in fp32."""
    return tl.load(values + n, mask=n < N, other=0.0).to(tl.float32)


@jit
def _scaled(value, x_scale, scale, bias, m, M: tl.constexpr):
    if x_scale is not None:
        value *= tl.load(x_scale + m, mask=m < M, other=0.0) * scale
    return value + bias


@jit
def _store(y, value, residual, residual_stride, m, n, M: tl.constexpr, N):
    mask = (m < M) & (n < N)
    if residual is not None:
        value += tl.load(residual + m * residual_stride + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + m.to(tl.int64) * N + n, value.to(y.dtype.element_ty), mask=mask)


def reason(x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None]) -> str | None:
    """Why :func:`gemv` cannot run these, whatever the rows."""
    first = weights[0]
    if x.numel() == 0:
        return "there is nothing to multiply"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the GPU linears take bfloat16 or float16 activations, not {x.dtype}"
    if first.dtype not in (torch.int8, x.dtype) or any(w.dtype != first.dtype for w in weights):
        return "the GPU linears take weights in int8 or in x's dtype, all alike"
    if any(w.stride(1) != 1 or w.stride(0) % 16 or w.storage_offset() % 16 for w in weights) or first.shape[1] % 16:
        return "the GPU matrix-vector products need rows of weights that begin and end at multiples of 16 elements"
    if not 64 <= first.shape[1] <= 100_000:
        return "the GPU matrix-vector products take 64 to 100000 columns"
    if any((s is None) != (scales[0] is None) for s in scales) or any(
        (b is None) != (biases[0] is None) for b in biases
    ):
        return "the GPU linears take scales and biases for all weights of a group or for none"
    if (scales[0] is None) != (first.dtype != torch.int8):
        return "int8 weights, and no others, have scales"
    if any(t is not None and not t.is_contiguous() for t in (*scales, *biases)):
        return "the GPU linears take contiguous scales and biases"
    return None


MOST_ROWS = 8  # of x, up to which these kernels are the fastest for 16-bit weights, as measured on an H200


def rows(x: Tensor) -> Tensor:
    """x as [M, K], rows at multiples of 16 elements."""
    x = x.reshape(-1, x.shape[-1])
    return (
        x
        if x.stride(1) == 1 and x.stride(0) % 16 == 0 and not x.data_ptr() & 15
        else x.clone(memory_format=torch.contiguous_format)
    )


@lru_cache(4096)
def _bind_digits(m: int, k: int, stride: int, dtype: torch.dtype, device: torch.device, ahead: bool) -> Launch:
    sets = 0 if m <= 8 else triton.cdiv(m, 16)
    words = triton.next_power_of_2(triton.cdiv(k, 512) * 128)
    return Launch(_digits, (m,), (stride, m, k, words, sets, ahead), min(16, max(4, words // 128)), ahead)


def digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [M, K] as int8 digits in the order of ``_digits``, and fp32 scales [M]."""
    m, k = x.shape
    steps = triton.cdiv(k, 512) * 8  # whole steps of 8 warps
    words = 16 * m * (4 if m <= 2 else 3) if m <= 8 else 768 * triton.cdiv(m, 16)  # a step
    out = x.new_empty((steps * words,), dtype=torch.int32)
    scale = x.new_empty((m,), dtype=torch.float32)
    _bind_digits(m, k, x.stride(0), x.dtype, x.device, pdl(x.device))(x, out, scale)
    return out, scale


def tile(m: int, n: int, k_bytes: int, int8: bool) -> tuple[int, int, int, int, int]:
    """(warps over rows, warps over K, groups of 8 rows, steps loaded ahead, steps whose x is loaded together), as
    measured on an H200."""
    if int8:
        return (1, 4, 1, 16, 4) if m <= 8 or k_bytes > 8192 else (1, 4, 2, 8, 2)
    if k_bytes <= 4096:
        return 1, 4, 2, 8, 8
    return (1, 8, 1, 16, 8) if n >= 8192 else (1, 8, 2, 8, 8)


@lru_cache(4096)
def _bind(
    m: int, k: int, sizes: tuple[int, ...], strides: tuple[int, ...], residual_stride: int, act: str,
    config: tuple[int, int, int, int, int], int8: bool, ahead: bool, *_dtypes_device: Any,
) -> Launch:  # fmt: skip
    """strides: of x, then of the weights."""
    row_warps, k_warps, groups, depth, batch = config
    k_bytes = k if int8 else 2 * k
    while k_warps * 64 > k_bytes:
        k_warps //= 2
    steps = k_bytes // (64 * k_warps)  # whole ones
    depth = min(depth, steps)
    block = 8 * row_warps * (1 if act else groups)
    blocks = [triton.cdiv(n, block) for n in (sizes[:1] if act else sizes)]
    scalars = (
        strides[0], residual_stride, *three(sizes), *three(strides[1:]), blocks[0], sum(blocks[:2]),
        steps // depth - 1, m, k, len(sizes), act, row_warps, k_warps, groups, depth, batch, ahead, not interpreted(),
    )  # fmt: skip
    return Launch(_gemv, (sum(blocks),), scalars, row_warps * k_warps, ahead)


def three(values: Sequence[Any]) -> tuple[Any, ...]:
    return (*values, *[values[0]] * (3 - len(values)))


def gemv(
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None],
    residual: Tensor | None = None, act: str = "", config: tuple[int, int, int, int, int] | None = None,
) -> list[Tensor]:  # fmt: skip
    """x [..., K], 1 to 3 weights as :func:`reason` has them; one output [..., N_i] each, or one under ``act``."""
    lead, x = x.shape[:-1], rows(x)
    m, k = x.shape
    int8 = weights[0].dtype == torch.int8
    sizes = tuple([w.shape[0] for w in weights])
    config = config or tile(m, sum(sizes), k if int8 else 2 * k, int8)
    outs = [x.new_empty((*lead, n)) for n in (sizes[:1] if act else sizes)]
    if residual is not None:
        residual = residual.reshape(-1, sizes[0])
        if residual.stride(1) != 1:
            residual = residual.contiguous()
    strides = (x.stride(0), *[w.stride(0) for w in weights])
    launch = _bind(
        m, k, sizes, strides, 0 if residual is None else residual.stride(0), act, config, int8, pdl(x.device),
        x.dtype, x.device, biases[0] is None or biases[0].dtype, residual is None or residual.dtype,
    )  # fmt: skip
    operand, x_scale = digits(x) if int8 else (x, None)
    launch(operand, x_scale, residual, *three(weights), *three(scales), *three(biases), *three(outs))
    return outs
