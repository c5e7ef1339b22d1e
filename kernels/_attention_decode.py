"""Attention of a few query rows over a long cache, split along the keys (Flash-Decoding, Dao et al., 2023).

Split s of S takes key blocks s, s + S, s + 2S, ... so that the written part of a static cache is spread
over all splits whatever its length, and the grid depends on the cache alone. Scores are in units of log2 e. A second
kernel merges the splits of a row.

Attention of one row by a bool mask, which is where tokens come from, gets the bounds of the mask: keys and values are
then loaded without a look at it, each block during the one before. Without bounds a split first narrows its blocks to
those that hold a True, and loads only the positions that some row attends: the unwritten part of a cache costs one byte
per position.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tinyfuse.kernels._triton import interpreted, jit, pdl, start, tl, triton
from tinyfuse.kernels.rope import table_strides

MASK_NONE, MASK_BOOL, MASK_FLOAT = 0, 1, 2
MAX_ROWS = 16
MAX_SPLITS = 128
FEW_SPLITS = 64  # up to which the merge, which fills up to a power of two, is worth it for fewer than 8192 keys
STAGES = 3  # of the loop that waits for a mask
REGISTERS = 65536  # of a multiprocessor
BLOCK_BYTES = 8192  # of keys that one program of 4 warps has in registers, and as many of values


class Plan(NamedTuple):
    """Rows per program, keys per block, splits of the keys, warps, the most registers per thread."""

    block_r: int
    block_n: int
    splits: int
    warps: int = 4
    registers: int | None = None


def in_log2(scale: float, softcap: float | None) -> tuple[float, float | None]:
    return scale * 1.4426950408889634, None if softcap is None else softcap * 1.4426950408889634


@jit
def to_log2(value):
    """A float mask in units of log2 e. finfo.min stays finite, so a row full of it averages, as in SDPA."""
    wide = value.to(tl.float32)
    return tl.where(wide == float("-inf"), wide, tl.maximum(wide * 1.4426950408889634, -3.0e38))


@jit
def capped(score, cap):
    """cap * tanh(score / cap), exact for small scores where the difference of exponentials is not."""
    x = score / cap
    square = x * x
    near = x * (1.0 - square * (0.333333333 - square * (0.133333333 - square * 0.053968254)))
    far = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
    return cap * tl.where(square < 0.015625, near, far)


@jit
def _live_blocks(mask, stride, Skv, split, splits, blocks, BLOCK_N: tl.constexpr, SCAN: tl.constexpr):
    """The range of this split's blocks, counted 0 ... blocks - 1, outside which a mask row has no True."""
    lo = blocks
    hi = 0
    for first in range(0, blocks, SCAN):
        i = first + tl.arange(0, SCAN)
        n = (split + i[:, None] * splits) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        true = tl.load(mask + n.to(tl.int64) * stride, mask=n < Skv, other=0)
        live = tl.max(true.to(tl.int32), 1) > 0
        lo = tl.minimum(lo, tl.min(tl.where(live, i, blocks)))
        hi = tl.maximum(hi, tl.max(tl.where(live, i + 1, 0)))
    return lo, hi


@jit
def _block_mask(
    mask, stride, n, first, last, read, row, rows_ok, KIND: tl.constexpr, BY_ROW: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """(keys that some row attends [N], bias of the scores [rows or 1, N]): -inf where a key is masked.

    Keys lie from ``first`` to ``last``. mask: pointers [rows] if BY_ROW, else one pointer, of which a bool mask is True
    from ``read`` on."""
    inside = (n >= first) & (n < last)
    keep = inside
    bias = tl.where(inside, 0.0, float("-inf"))[None, :]
    if BY_ROW:
        tile = rows_ok[:, None] & inside[None, :]
        value = tl.load(mask[:, None] + n.to(tl.int64)[None, :] * stride, mask=tile, other=0)
        if KIND == 1:
            keep = tl.max(value.to(tl.int32), 0) > 0
            bias = tl.where(value != 0, 0.0, float("-inf"))
        else:
            bias += to_log2(value)
    elif KIND != 0:
        if KIND == 1:
            keep = inside & (tl.load(mask + n.to(tl.int64) * stride, mask=inside & (n < read), other=1) != 0)
            bias = tl.where(keep, 0.0, float("-inf"))[None, :]
        else:
            value = tl.load(mask + n.to(tl.int64) * stride, mask=inside, other=0)
            bias += to_log2(value)[None, :]
    if CAUSAL:
        bias = tl.where(n[None, :] <= row[:, None], bias, float("-inf"))
    return keep, bias


@jit
def _partner(x, d, mask, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """What rotation mixes with columns ``d`` of the rows at ``x``: the other half, or the other of a pair."""
    other = (d ^ 1) if INTERLEAVED else tl.where(d < R // 2, d + R // 2, d - R // 2)
    return tl.load(x + other, mask=mask & (d < R), other=0.0)


@jit
def _stay(x, ASM: tl.constexpr):
    """x, computed in the layout it has: Triton would do so in that of an operand of a product, in every warp anew."""
    if ASM and x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, 2)
    elif ASM:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], x.dtype, False, 1)
    else:
        return x


@jit
def _load(x, x_n: tl.constexpr, start, keep, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``start`` ... ``start`` + N - 1 of x, those that ``keep`` [N]."""
    n, d = tl.arange(0, N)[:, None], tl.arange(0, BLOCK_D)[None, :]
    return tl.load(x + start.to(tl.int64) * x_n + (n * x_n + d), mask=keep[:, None] & (d < D), other=0.0)


@jit
def _scores(query, key):
    """query key^T in fp32, [rows, keys]."""
    if query.shape[0] == 1:
        return tl.sum(key.to(tl.float32) * query.to(tl.float32), 1)[None, :]
    elif query.shape[0] < 16:
        return tl.sum(query.to(tl.float32)[:, None, :] * key.to(tl.float32)[None, :, :], 2)
    else:
        return tl.dot(query, tl.trans(key), input_precision="tf32x3")


@jit
def _add_values(acc, p, value):
    """acc + p value."""
    if p.shape[0] == 1:
        return acc + tl.sum(tl.trans(p) * value.to(tl.float32), 0)[None, :]
    elif p.shape[0] < 16:
        return acc + tl.sum(p[:, :, None] * value.to(tl.float32)[None, :, :], 1)
    else:
        return tl.dot(p.to(value.dtype), value, acc, input_precision="tf32x3")


@jit
def _decode(
    q, k, v, mask, bounds, out, partial, stats, new_k, new_v, cos, sin, pos, scale, cap, H, Sq, Skv, splits,
    q_b, q_h, q_m, k_b, k_h, k_n: tl.constexpr, v_b, v_h, v_n: tl.constexpr, mask_b, mask_h, mask_m, mask_n,
    new_k_b, new_k_h, new_v_b, new_v_h, cos_b, cos_r, sin_b, sin_r,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROW_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SCAN: tl.constexpr, STAGES: tl.constexpr,
    KIND: tl.constexpr, BY_ROW: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """With ``new_k``, q and it are turned first, and it and ``new_v`` are position ``pos`` of the cache: the program
    that has that position writes them there, and puts them into their block of keys instead of reading them back."""
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    first_row = (tl.program_id(2) % ROW_BLOCKS) * BLOCK_R
    b = (tl.program_id(2) // ROW_BLOCKS).to(tl.int64)
    r = first_row + tl.arange(0, BLOCK_R)
    rows_ok = r < GROUP * Sq
    head = kv_head * GROUP + r // Sq
    row = r % Sq
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    k += b * k_b + kv_head * k_h
    v += b * v_b + kv_head * v_h
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    column, column_ok = d[None, :], (d < D)[None, :]
    if GROUP == 1 and new_k is not None:  # one row, which stands for all
        q_ptr = q + b * q_b + kv_head * q_h
        q_mask = column_ok
    else:
        q_ptr = (q + b * q_b + head * q_h + row * q_m)[:, None]
        q_mask = rows_ok[:, None] & column_ok
    first, last, read = 0, Skv, Skv
    if bounds is not None:
        bounds += b * 4
        first, last, read = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2)
        read = tl.where(read > first, read, 0)
    query = tl.load(q_ptr + column, mask=q_mask, other=0.0)
    at = -1
    if new_k is not None:
        # Every program loads the new token at once, though one needs it: behind a branch it would wait for ``pos``.
        at = tl.load(pos)
        turns = column < R
        c = tl.load(cos + b * cos_b + column * cos_r, mask=turns, other=1.0)
        s = tl.load(sin + b * sin_b + column * sin_r, mask=turns, other=0.0)
        q_other = _partner(q_ptr, column, q_mask, R, INTERLEAVED)
        new_k += b * new_k_b + kv_head * new_k_h
        k_new = tl.load(new_k + column, mask=column_ok, other=0.0)
        k_other = _partner(new_k, column, column_ok, R, INTERLEAVED)
        v_new = tl.load(new_v + b * new_v_b + kv_head * new_v_h + e[None, :], mask=(e < DV)[None, :], other=0.0)

    lo = 0
    hi = tl.cdiv(tl.maximum(tl.cdiv(Skv, BLOCK_N) - split, 0), splits)
    mask_ptr = mask
    if KIND != 0:
        mask += b * mask_b + kv_head * GROUP * mask_h
        mask_ptr = mask
        if BY_ROW:
            mask_ptr = mask + (r // Sq).to(tl.int64) * mask_h + row.to(tl.int64) * mask_m
        if KIND == 1:
            blocks = hi
            if bounds is not None:
                lo = tl.cdiv(tl.maximum(first // BLOCK_N - split, 0), splits)
                hi = tl.minimum(hi, tl.cdiv(tl.maximum(tl.cdiv(last, BLOCK_N) - split, 0), splits))
            else:
                lo = blocks
                hi = 0
                last_row = first_row + 1
                if BY_ROW:
                    last_row = tl.minimum(first_row + BLOCK_R, GROUP * Sq)
                for i in range(first_row, last_row):
                    line = mask + (i // Sq).to(tl.int64) * mask_h + (i % Sq).to(tl.int64) * mask_m
                    begin, end = _live_blocks(line, mask_n, Skv, split, splits, blocks, BLOCK_N, SCAN)
                    lo = tl.minimum(lo, begin)
                    hi = tl.maximum(hi, end)
    # Without a mask, or with its bounds, keys and values are loaded before a look at it. Each block is on its way while
    # the one before is worked on, the first while the query is turned.
    AHEAD: tl.constexpr = KIND == 0 or bounds is not None
    tile = tl.arange(0, BLOCK_N)
    if AHEAD:
        start = (split + lo * splits) * BLOCK_N
        keep = (start + tile >= first) & (start + tile < last)
        key = _load(k, k_n, start, keep, BLOCK_N, D, BLOCK_D)
        value = _load(v, v_n, start, keep, BLOCK_N, DV, BLOCK_DV)
    at_block = -1
    if new_k is not None:
        sign = tl.where((column % 2 == 0) if INTERLEAVED else (column < R // 2), -1.0, 1.0)
        cf, sf = c.to(tl.float32), s.to(tl.float32) * sign
        query = (query.to(tl.float32) * cf + q_other.to(tl.float32) * sf).to(q.dtype.element_ty)
        query = _stay(tl.broadcast_to(query, [BLOCK_R, BLOCK_D]), ASM)
        k_new = (k_new.to(tl.float32) * cf + k_other.to(tl.float32) * sf).to(k.dtype.element_ty)
        if (at >= 0) & (at < Skv) & ((at // BLOCK_N) % splits == split):
            at_block = (at // BLOCK_N).to(tl.int32) // splits
        tl.store(k + at * k_n + column, k_new, mask=column < tl.where(at_block >= 0, D, 0))
        tl.store(v + at * v_n + e[None, :], v_new, mask=e[None, :] < tl.where(at_block >= 0, DV, 0))

    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    for i in tl.range(lo, hi, num_stages=1 if AHEAD else STAGES):
        start = (split + i * splits) * BLOCK_N
        n = start + tile
        if AHEAD:
            _, bias = _block_mask(mask_ptr, mask_n, n, first, last, read, row, rows_ok, 0, False, CAUSAL)
            if KIND != 0 and start < read:
                keep, bias = _block_mask(mask_ptr, mask_n, n, first, last, read, row, rows_ok, KIND, BY_ROW, CAUSAL)
                key, value = tl.where(keep[:, None], key, 0.0), tl.where(keep[:, None], value, 0.0)
        else:
            keep, bias = _block_mask(mask_ptr, mask_n, n, first, last, read, row, rows_ok, KIND, BY_ROW, CAUSAL)
            key = _load(k, k_n, start, keep, BLOCK_N, D, BLOCK_D)
            value = _load(v, v_n, start, keep, BLOCK_N, DV, BLOCK_DV)
        if new_k is not None and i == at_block:
            key, value = tl.where((n == at)[:, None], k_new, key), tl.where((n == at)[:, None], v_new, value)
        score = _scores(query, key) * scale
        if cap is not None:
            score = capped(score, cap)
        score += bias
        if AHEAD:
            start += splits * BLOCK_N
            key = _load(k, k_n, start, start + tile < last, BLOCK_N, D, BLOCK_D)
        higher = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(score - shift[:, None])
        decay = tl.exp2(top - shift)
        acc = _add_values(acc * decay[:, None], p, value)
        if AHEAD:
            value = _load(v, v_n, start, start + tile < last, BLOCK_N, DV, BLOCK_DV)
        total = total * decay + tl.sum(p, 1)
        top = higher
    out_row = (b * Sq + row) * H + head
    if SPLIT:
        slot = out_row * splits + split
        tl.store(stats + slot * 2, top, mask=rows_ok)
        tl.store(stats + slot * 2 + 1, total, mask=rows_ok)
        tl.store(partial + slot[:, None] * DV + e[None, :], acc, mask=rows_ok[:, None] & (e < DV)[None, :])
    else:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + out_row[:, None] * DV + e[None, :], result, mask=rows_ok[:, None] & (e < DV)[None, :])


@jit
def _combine(
    out, partial, stats, splits, DV: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """``COLUMNS`` of a row of ``out``, of ``splits`` <= ``SPLITS`` splits."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    s = tl.arange(0, SPLITS)[:, None]
    slot = row * splits + s
    top = tl.load(stats + slot * 2, mask=s < splits, other=float("-inf"))
    total = tl.load(stats + slot * 2 + 1, mask=s < splits, other=0.0)
    acc = tl.load(partial + slot * DV + e, mask=(s < splits) & (e < DV), other=0.0)
    best = tl.max(top, 0)[None, :]
    weight = tl.exp2(top - tl.where(best == float("-inf"), 0.0, best))
    total = tl.sum(total * weight, 0)[None, :]
    result = tl.sum(acc * weight, 0)[None, :] / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * DV + e, result, mask=e < DV)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache(4096)
def plan(
    rows: int, programs: int, Skv: int, width: int, itemsize: int, ahead: bool, new: bool, device: torch.device
) -> Plan:
    """rows: query rows that share a kv head; programs: batch times kv heads; width: the larger padded head_dim; ahead:
    whether keys are loaded before a look at a mask; new: whether a token enters the cache in the same launch.

    As measured in whole decode steps of 16 bits on an H200. Programs of up to 16 rows have 4 warps and blocks of
    ``BLOCK_BYTES``, four to a multiprocessor, or two where a key is large; together they fill it once.
    """
    key, processors = width * itemsize, _multiprocessors(device)
    if itemsize == 4 and rows <= 4:
        return _row_by_row(triton.next_power_of_2(rows), programs, Skv, key, processors)
    block_r = min(64, max(16, triton.next_power_of_2(rows)))
    programs *= triton.cdiv(rows, block_r)
    if ahead and block_r == 16 and itemsize == 2 and key <= 256:
        shape = programs, Skv, key, processors
        single = _single_row(*shape) if rows == 1 and new else None
        better = _one_wave(*shape) or single or _small_blocks(*shape)
        if better:
            return better
    block_n = max(32 if block_r == 16 and key <= 512 else 16, min(128, BLOCK_BYTES // key))
    blocks = triton.cdiv(Skv, block_n)
    registers = 128 if block_r == 16 and block_n * key <= BLOCK_BYTES else None
    wave = REGISTERS // (32 * 4 * (registers or 255)) * processors / programs
    # With more rows, four small programs once each has 8 blocks: partial results stay few.
    splits = int(wave) if block_r == 16 else int(max(wave, min(2 * wave, blocks / 8)))
    return Plan(block_r, block_n, max(1, min(splits, blocks, FEW_SPLITS)), 4, registers)


def _row_by_row(rows: int, programs: int, Skv: int, key: int, processors: int) -> Plan:
    """fp32 with few rows, which ``tl.dot`` would pad to 16: as measured alone on an H200, warps by themselves, 12 to a
    multiprocessor, or 8 where they hold more than 4 KB of products."""
    block_n = max(8 if rows == 1 else 4, 4096 // (key * rows))
    held = rows * block_n * key
    warps, registers = 1 if held <= 8192 else 2, 168 if held <= 4096 else 255
    wave = REGISTERS // (32 * warps * registers) * processors // programs
    return Plan(rows, block_n, max(1, min(wave, triton.cdiv(Skv, block_n), MAX_SPLITS)), warps, registers)


def _one_wave(programs: int, Skv: int, key: int, processors: int) -> Plan | None:
    """Short caches, where a merge takes longer than it saves: a program of 8 warps for each kv head, one or two to a
    multiprocessor, if that leaves few idle."""
    fills = 0.7 <= programs / processors <= 1 or 1.8 <= programs / processors <= 2
    return Plan(16, min(128, 16384 // key), 1, 8, 128) if fills and Skv * key <= 1 << 16 else None


def _single_row(programs: int, Skv: int, key: int, processors: int) -> Plan | None:
    """A row by itself, not padded to 16: eight programs of one warp to a multiprocessor where each has two blocks, or
    for small keys one block of up to 768 keys. Slower where no token enters the cache: 149 us for 124 in 32768 keys."""
    wave = 8 * processors // programs
    if key <= 128:
        blocks = triton.cdiv(Skv, 16)
        return Plan(1, 16, blocks, 1) if blocks <= min(wave, 48) else None
    if not 2 <= wave <= FEW_SPLITS:
        return None
    block_n = 16 if Skv >= 32 * wave else 8
    return Plan(1, block_n, wave, 1) if triton.cdiv(Skv, block_n) >= 2 * wave else None


def _small_blocks(programs: int, Skv: int, key: int, processors: int) -> Plan | None:
    """Eight programs of one warp, or two where a key is small, to a multiprocessor, if each has four blocks: the
    latencies of more programs overlap."""
    block_n, splits = min(128, 4096 // key), max(1, min(MAX_SPLITS, 8 * processors // programs))
    if programs * MAX_SPLITS < 7 * processors or triton.cdiv(Skv, block_n) < 4 * splits:
        return None
    return Plan(16, block_n, splits, 1) if key > 128 else Plan(16, block_n, splits, 2, 128)


def mask_strides(mask: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of the mask broadcast to four dimensions."""
    if mask is None:
        return 0, 0, 0, 0
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    return tuple([0] * (4 - len(strides)) + strides)


def mask_kind(mask: Tensor | None) -> int:
    return MASK_NONE if mask is None else MASK_BOOL if mask.dtype == torch.bool else MASK_FLOAT


class New(NamedTuple):
    """What enters the cache in the same launch: k [B, Hkv, 1, D], v [B, Hkv, 1, Dv], pos [1]; cos and sin
    [B or 1, 1, 1, R] turn k and q, as in ``rope``."""

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    pos: Tensor
    interleaved: bool


def _strides_of_new(new: New | None) -> tuple[int, ...]:
    if new is None:
        return (0,) * 8
    tables = [step for t in (new.cos, new.sin) for step in table_strides(t.shape, t.stride())[::2]]
    return (*new.k.stride()[:2], *new.v.stride()[:2], *tables)


def decode(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, chosen: Plan | None = None,
    new: New | None = None, bounds: Tensor | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Launch the kernels; arguments as in ``attention``, ``chosen`` overrides :func:`plan`; ``bounds`` are those of a
    mask that is the same for all rows and heads (``mask_bounds``)."""
    B, H, Sq, D = q.shape
    kv_heads, DV = k.shape[1], v.shape[3]
    Skv = min(k.shape[2], Sq) if is_causal else k.shape[2]
    group = H // kv_heads
    block_d, block_dv = triton.next_power_of_2(D), triton.next_power_of_2(DV)
    width, loads_ahead = max(block_d, block_dv), mask is None or bounds is not None
    shape = group * Sq, B * kv_heads, Skv, width, q.element_size()
    p = chosen or plan(*shape, loads_ahead, new is not None, q.device)
    out = torch.empty((B, Sq, H, DV), dtype=q.dtype, device=q.device)
    rows = B * Sq * H
    split = p.splits > 1
    partial = torch.empty((rows * p.splits * (DV + 2)) if split else 0, dtype=torch.float32, device=q.device)
    stats = partial[rows * p.splits * DV :]
    strides = mask_strides(mask)
    kind = mask_kind(mask)
    by_row = (Sq > 1 and strides[2] != 0) or (group > 1 and strides[1] != 0)
    scan = 1
    if kind == MASK_BOOL and bounds is None:
        per_split = triton.cdiv(triton.cdiv(Skv, p.block_n), p.splits)
        scan = min(triton.next_power_of_2(max(1, per_split)), 2048 // p.block_n)
    ahead = pdl(q.device)
    options = {"launch_pdl": True} if ahead else {}
    row_blocks = triton.cdiv(group * Sq, p.block_r)
    start(
        _decode, (p.splits, kv_heads, B * row_blocks),
        q, k, v, mask, bounds, out, partial, stats, *(new[:5] if new else (None,) * 5),
        *in_log2(scale, softcap), H, Sq, Skv, p.splits,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides, *_strides_of_new(new),
        group, D, DV, block_d, block_dv, row_blocks, p.block_r, p.block_n, scan, STAGES,
        kind, by_row, is_causal, split, *((new.cos.shape[3], new.interleaved) if new else (0, False)), ahead,
        not interpreted(), num_warps=p.warps, maxnreg=p.registers, **options,
    )  # fmt: skip
    if split:
        columns = min(32, block_dv)
        grid = rows, triton.cdiv(DV, columns)
        splits = triton.next_power_of_2(p.splits)
        start(_combine, grid, out, partial, stats, p.splits, DV, columns, splits, ahead, num_warps=1, **options)
    return out.transpose(1, 2)
