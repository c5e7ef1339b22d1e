"""Matrix-vector products of 2 to 8 rows with 16-bit weights, streamed through registers into the tensor cores.

    y_i = x W_i^T (+ bias_i) (+ residual)    or    y = act(x W_0^T + b_0) (* (x W_1^T + b_1))

A warp holds 8 weight rows by 64 bytes, 16 bytes to a lane, which is at once what a 128-bit load gives and the
B operand of two ``mma.sync`` (m16n8k8) once the order of K within those 64 bytes is permuted in both operands alike. So
no weight byte is converted or moved, and the instructions per 512 bytes of weights are one load and a few products.
Activations are the A operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels._triton import Launch, aligned, interpreted, jit, pdl, tl, triton
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

    # Up to 8 rows: A's rows 0-7 are words 0 and 2 of a lane's quadruple of x and its rows 8-15 are words 1 and 3, in
    # the order of the registers, so that nothing moves; what meets the other word's weights is not used.
    _ROWS8 = ("t 8 | 20 21 | 16", "0 t | 22 23 | 18", "t 12 | 20 21 | 17", "4 t | 22 23 | 19")
    BF16_ROWS8, FP16_ROWS8 = _float("bf16", 8, *_ROWS8), _float("f16", 8, *_ROWS8)
    FLOAT8 = tl.constexpr(",".join(["=f"] * 8 + ["f"] * 8 + ["r"] * 8))


@jit
def _unpack(words, part: tl.constexpr, TYPE: tl.constexpr):
    """Half ``part`` of every 32-bit word."""
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
    for part in tl.static_range(2):
        total += tl.sum(_unpack(w, part, TYPE) * _unpack(x, part, TYPE), 4)
    total = tl.permute(tl.reshape(total, [WARPS, 2, 8, 4, 2]), [0, 2, 3, 1, 4])
    return acc + tl.reshape(total, [WARPS * 128])


@jit
def _step(acc, w, x, WARPS: tl.constexpr, TYPE: tl.constexpr, ASM: tl.constexpr):
    """The accumulators after 64 more bytes of 8 weight rows."""
    args = [acc[0], acc[1], w, x]
    if not ASM:
        w0, w1, w2, w3 = _quadruple(w, WARPS)
        x0, x1, x2, x3 = _quadruple(x, WARPS)
        a = _mma(acc[0], x0, x1, x2, x3, w0, w2, WARPS, TYPE)
        return a, _mma(acc[1], x0, x1, x2, x3, w1, w3, WARPS, TYPE)
    elif tl.float16 == TYPE:
        return tl.inline_asm_elementwise(FP16_ROWS8, FLOAT8, args, (tl.float32, tl.float32), True, 4)
    else:
        return tl.inline_asm_elementwise(BF16_ROWS8, FLOAT8, args, (tl.float32, tl.float32), True, 4)


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
def _rows(acc, ROW_WARPS: tl.constexpr, K_WARPS: tl.constexpr):
    """The sums of rows g of x: [ROW_WARPS, 8, 4, 2], (warp, g, t, l) of weight row 8 warp + 2 t + l."""
    return tl.sum(_half(acc[0], 0, ROW_WARPS, K_WARPS) + _half(acc[1], 1, ROW_WARPS, K_WARPS), 1)


@jit
def _load(at, word, j, STEP: tl.constexpr, WORDS: tl.constexpr, LAST: tl.constexpr):
    """The words of step ``j``; the last step of a row may be partial and is 0 beyond the row."""
    if LAST and WORDS % STEP != 0:
        return tl.load(at + j * STEP, mask=word < WORDS - j * STEP, other=0, eviction_policy="evict_first")
    else:
        return tl.load(at + j * STEP, eviction_policy="evict_first")


@jit
def _activations(at, word, j, STEP: tl.constexpr, WORDS: tl.constexpr, LAST: tl.constexpr):
    """The words of x that meet those of the weights in step ``j``."""
    if LAST and WORDS % STEP != 0:
        return tl.load(at + j * STEP, mask=word < WORDS - j * STEP, other=0)
    else:
        return tl.load(at + j * STEP)


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
    x, residual, w0, w1, w2, b0, b1, b2, y0, y1, y2,
    x_stride, residual_stride, n0, n1, n2, stride0, stride1, stride2, first1, first2, loops,
    M: tl.constexpr, K: tl.constexpr, MEMBERS: tl.constexpr, ACT: tl.constexpr, ROW_WARPS: tl.constexpr,
    K_WARPS: tl.constexpr, GROUPS: tl.constexpr, AHEAD: tl.constexpr, BATCH: tl.constexpr, PDL: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """8 ROW_WARPS GROUPS rows of one weight, or 8 ROW_WARPS rows of each of two under ACT. ``first``: its first
    program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    TYPE: tl.constexpr = w0.dtype.element_ty
    WARPS: tl.constexpr = ROW_WARPS * K_WARPS
    WORDS: tl.constexpr = K // 2
    STEP: tl.constexpr = K_WARPS * 16
    STEPS: tl.constexpr = (WORDS + STEP - 1) // STEP
    BOTH: tl.constexpr = ACT != "" and MEMBERS == 2
    PAIR: tl.constexpr = BOTH or GROUPS == 2

    pid = tl.program_id(0)
    w, b, y, n, stride = w0, b0, y0, n0, stride0
    if MEMBERS > 1 and not BOTH:
        which = (pid >= first1).to(tl.int32) + (pid >= first2).to(tl.int32)
        w, y, n = pick(which, w0, w1, w2, MEMBERS), pick(which, y0, y1, y2, MEMBERS), pick(which, n0, n1, n2, MEMBERS)
        stride = pick(which, stride0, stride1, stride2, MEMBERS)
        if b0 is not None:
            b = pick(which, b0, b1, b2, MEMBERS)
        pid -= pick(which, 0, first1, first2, MEMBERS)
    start = pid * (8 * ROW_WARPS * (1 if BOTH else GROUPS))

    # Element i: warp i // 128 (of ROW_WARPS by K_WARPS), then 8 rows, then 4 lanes of 4 words each.
    i = tl.arange(0, WARPS * 128)
    g = i // 16 % 8
    word = i // 128 % K_WARPS * 16 + i % 16
    row = start + i // (128 * K_WARPS) * 8 + g
    at = w.to(tl.pointer_type(tl.int32)) + tl.minimum(row, n - 1).to(tl.int64) * (stride // 2) + word
    at2 = at
    if BOTH:
        at2 = w1.to(tl.pointer_type(tl.int32)) + tl.minimum(row, n - 1).to(tl.int64) * (stride1 // 2) + word
    elif PAIR:
        row += 8 * ROW_WARPS
        at2 = w.to(tl.pointer_type(tl.int32)) + tl.minimum(row, n - 1).to(tl.int64) * (stride // 2) + word
    x = x.to(tl.pointer_type(tl.int32)) + tl.minimum(g, M - 1) * (x_stride // 2) + word

    BLOCKS: tl.constexpr = WORDS // STEP // AHEAD  # of AHEAD whole steps; the rest follows one by one
    LEFT: tl.constexpr = STEPS - BLOCKS * AHEAD
    tiles, tiles2 = (), ()
    for j in tl.static_range(AHEAD):
        tiles += (_load(at, word, j, STEP, WORDS, False),)
        if PAIR:
            tiles2 += (_load(at2, word, j, STEP, WORDS, False),)
    column = start + 8 * tl.arange(0, ROW_WARPS)[:, None, None, None] + 2 * tl.arange(0, 4)[None, None, :, None]
    column += tl.arange(0, 2)[None, None, None, :]
    column2 = column if BOTH else column + 8 * ROW_WARPS
    bias, bias2 = 0.0, 0.0
    if b0 is not None:
        bias = _column(b, column, n)
        bias2 = _column(b1 if BOTH else b, column2, n) if PAIR else bias
    if PDL:
        tl.extra.cuda.gdc_wait()

    zero = tl.zeros([WARPS * 128], tl.float32)
    acc = (zero, zero)
    acc2 = acc
    if BLOCKS > 1:
        for block in range(loops):  # BLOCKS - 1, at run time: unrolled code would run at the speed of its fetch
            fresh, fresh2 = (), ()
            for batch in tl.static_range(0, AHEAD, BATCH):
                a = ()
                for j in tl.static_range(batch, min(batch + BATCH, AHEAD)):
                    a += (_activations(x, word, block * AHEAD + j, STEP, WORDS, False),)
                for j in tl.static_range(batch, min(batch + BATCH, AHEAD)):
                    acc = _step(acc, tiles[j], a[j - batch], WARPS, TYPE, ASM)
                    fresh += (_load(at, word, (block + 1) * AHEAD + j, STEP, WORDS, False),)
                    if PAIR:
                        acc2 = _step(acc2, tiles2[j], a[j - batch], WARPS, TYPE, ASM)
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
            a += (_activations(x, word, (BLOCKS - 1) * AHEAD + j, STEP, WORDS, j == REST - 1),)
        for j in tl.static_range(batch, min(batch + BATCH, REST)):
            acc = _step(acc, tiles[j], a[j - batch], WARPS, TYPE, ASM)
            if PAIR:
                acc2 = _step(acc2, tiles2[j], a[j - batch], WARPS, TYPE, ASM)

    m = tl.arange(0, 8)[None, :, None, None]
    value = _rows(acc, ROW_WARPS, K_WARPS) + bias
    if ACT != "":
        value = activate(value, ACT)
    if PAIR:
        value2 = _rows(acc2, ROW_WARPS, K_WARPS) + bias2
        if BOTH:
            value *= value2
        else:
            if ACT != "":
                value2 = activate(value2, ACT)
            _store(y, value2, residual, residual_stride, m, column2, M, n)
    _store(y, value, residual, residual_stride, m, column, M, n)


@jit
def _column(values, n, N):
    """Biases of the weight rows n, in fp32."""
    return tl.load(values + n, mask=n < N, other=0.0).to(tl.float32)


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
    if len({b.dtype for b in biases if b is not None}) > 1:
        return "the GPU linears take biases of one dtype"
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
        if x.stride(1) == 1 and x.stride(0) % 16 == 0 and aligned(x)
        else x.clone(memory_format=torch.contiguous_format)
    )


def residual_rows(residual: Tensor | None, n: int) -> Tensor | None:
    """The residual as [M, n], each row dense."""
    if residual is None:
        return None
    residual = residual.reshape(-1, n)
    return residual if residual.stride(1) == 1 else residual.contiguous()


def tile(n: int, k: int) -> tuple[int, int, int, int, int]:
    """(warps over rows, warps over K, groups of 8 rows, steps loaded ahead, steps whose x is loaded together), as
    measured on an H200."""
    if k <= 2048:
        return 1, 4, 2, 8, 8
    return (1, 8, 1, 16, 8) if n >= 8192 else (1, 8, 2, 8, 8)


@lru_cache(4096)
def _bind(
    m: int, k: int, sizes: tuple[int, ...], strides: tuple[int, ...], residual_stride: int, act: str,
    config: tuple[int, int, int, int, int], ahead: bool, *_dtypes_device: Any,
) -> Launch:  # fmt: skip
    """strides: of x, then of the weights."""
    row_warps, k_warps, groups, depth, batch = config
    while k_warps * 32 > k:
        k_warps //= 2
    steps = k // (32 * k_warps)  # whole ones
    depth = min(depth, steps)
    block = 8 * row_warps * (1 if act and len(sizes) == 2 else groups)
    blocks = [triton.cdiv(n, block) for n in (sizes[:1] if act else sizes)]
    scalars = (
        strides[0], residual_stride, *three(sizes), *three(strides[1:]), blocks[0], sum(blocks[:2]),
        steps // depth - 1, m, k, len(sizes), act, row_warps, k_warps, groups, depth, batch, ahead, not interpreted(),
    )  # fmt: skip
    return Launch(_gemv, (sum(blocks),), scalars, row_warps * k_warps, ahead)


def three(values: Sequence[Any]) -> tuple[Any, ...]:
    return (*values, *[values[0]] * (3 - len(values)))


def gemv(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None],
    residual: Tensor | None = None, act: str = "", config: tuple[int, int, int, int, int] | None = None,
) -> list[Tensor]:  # fmt: skip
    """x [..., K] of up to 8 rows, 1 to 3 weights in its dtype as :func:`reason` has them; one output [..., N_i] each,
    or one under ``act``."""
    lead, x = x.shape[:-1], rows(x)
    m, k = x.shape
    sizes = tuple([w.shape[0] for w in weights])
    config = config or tile(sum(sizes), k)
    outs = [x.new_empty((*lead, n)) for n in (sizes[:1] if act else sizes)]
    residual = residual_rows(residual, sizes[0])
    strides = (x.stride(0), *[w.stride(0) for w in weights])
    launch = _bind(
        m, k, sizes, strides, 0 if residual is None else residual.stride(0), act, config, pdl(x.device),
        x.dtype, x.device, biases[0] is None or biases[0].dtype, residual is None or residual.dtype,
    )  # fmt: skip
    launch(x, residual, *three(weights), *three(biases), *three(outs))
    return outs
