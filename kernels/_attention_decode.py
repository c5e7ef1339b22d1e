"""Attention of a few query rows over a long cache, split along the keys (Flash-Decoding, Dao et al., 2023).

Split s of S takes key blocks s, s + S, s + 2S, ... so that the written part of a static cache is spread
over all splits whatever its length, and the grid depends on the cache alone. For a bool mask a split first
narrows its blocks to those that hold a True, then loads only the keys and values of positions that some
row attends: the unwritten part of a cache costs one byte per position. Scores are in units of log2 e.
The splits of a row are merged by the row's program that finishes last, or by a second kernel where that is much for
one program. The order of the additions is the same in both and depends on no program's speed.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tinyfuse.kernels._counters import counters, is_last
from tinyfuse.kernels._triton import jit, pdl, start, tl, triton
from tinyfuse.kernels.rope import table_strides

MASK_NONE, MASK_BOOL, MASK_FLOAT = 0, 1, 2
MAX_ROWS = 16
MAX_SPLITS = 64
# A program of `_decode` merges at most so many numbers (splits x rows x head_dim, each padded to a power of two): with
# 8192 it takes 2 to 3 µs longer than a kernel that merges twice as many splits.
MERGED = 4096


class Plan(NamedTuple):
    """Rows per program, keys per block, splits of the keys, warps, pipeline stages."""

    block_r: int
    block_n: int
    splits: int
    warps: int
    stages: int


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
def _fold(x, STEPS: tl.constexpr):
    """Sum over the first of three axes, of length 2 ** ``STEPS``: one addition an element each time, whose terms
    may swap, so that the bits depend on no layout."""
    for _ in tl.static_range(STEPS):
        x = tl.sum(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1], x.shape[2]]), 0)
    return x


@jit
def _merge(out, partial, stats, row, row_ok, splits, DV: tl.constexpr, BLOCK_DV: tl.constexpr, STEPS: tl.constexpr):
    """Store rows ``row`` [1, rows, 1] of ``out``, each of ``splits`` <= 2 ** ``STEPS`` splits.

    Past L1 (.cg), which does not see what other programs of the same launch have written."""
    s = tl.arange(0, 1 << STEPS)[:, None, None]
    e = tl.arange(0, BLOCK_DV)[None, None, :]
    slot = row * splits + s
    inside = row_ok & (s < splits)
    top = tl.load(stats + slot * 2, mask=inside, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(stats + slot * 2 + 1, mask=inside, other=0.0, cache_modifier=".cg")
    acc = tl.load(partial + slot * DV + e, mask=inside & (e < DV), other=0.0, cache_modifier=".cg")
    best = tl.max(top, 0)[None, :, :]
    weight = tl.exp2(top - tl.where(best == float("-inf"), 0.0, best))
    # fma with 0: a product that the compiler may fuse with an addition would have other bits in some layouts.
    total = _fold(tl.fma(total, weight, 0.0), STEPS)
    result = _fold(tl.fma(acc, weight, 0.0), STEPS) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * DV + e, result, mask=row_ok & (e < DV))


@jit
def _merge_if_last(
    out, partial, stats, counter, b, kv_head, first_row, H, Sq, splits, GROUP: tl.constexpr,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` from ``first_row`` on, in the last of the ``splits`` programs that add to ``counter``."""
    if is_last(counter, splits):
        r = first_row + tl.arange(0, ROWS)[None, :, None]
        row = (b * Sq + r % Sq) * H + kv_head * GROUP + r // Sq
        _merge(out, partial, stats, row, r < GROUP * Sq, splits, DV, BLOCK_DV, STEPS)


@jit
def _partner(x, d, mask, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """What rotation mixes with columns ``d`` of the rows at ``x``: the other half, or the other of a pair."""
    other = (d ^ 1) if INTERLEAVED else tl.where(d < R // 2, d + R // 2, d - R // 2)
    return tl.load(x + other, mask=mask & (d < R), other=0.0)


@jit
def _load(
    i, split, splits, k, v, k_n, v_n, mask, mask_n, at, first, last, read, row, rows_ok, KIND: tl.constexpr,
    BY_ROW: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Block i of a split, but for the key at ``at``: keys, values and the bias of the scores."""
    d, e = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    start = tl.cast((split + i * splits) * BLOCK_N, tl.int64)
    tile = tl.arange(0, BLOCK_N)
    n = start + tile
    keep, bias = _block_mask(mask, mask_n, n, first, last, read, row, rows_ok, KIND, BY_ROW, CAUSAL)
    keep = (keep & (n != at))[:, None]
    key = tl.load(k + start * k_n + (tile[:, None] * k_n + d), mask=keep & (d < D), other=0.0)
    value = tl.load(v + start * v_n + (tile[:, None] * v_n + e), mask=keep & (e < DV), other=0.0)
    return key, value, tl.where((n != at)[None, :], bias, float("-inf"))


@jit
def _attend(top, total, acc, query, key, value, bias, scale, cap):
    """The largest score, the sum and the weighted values of each row after more keys."""
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if cap is not None:
        score = capped(score, cap)
    score += bias
    higher = tl.maximum(top, tl.max(score, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(score - shift[:, None])
    decay = tl.exp2(top - shift)
    acc = tl.dot(p.to(value.dtype), value, acc * decay[:, None], input_precision="ieee")
    return higher, total * decay + tl.sum(p, 1), acc


@jit
def _decode(
    q, k, v, mask, bounds, out, partial, stats, counters, new_k, new_v, cos, sin, pos, scale, cap, H, Sq, Skv, splits,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_m, mask_n,
    new_k_b, new_k_h, new_v_b, new_v_h, cos_b, cos_r, sin_b, sin_r,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROW_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SCAN: tl.constexpr, STAGES: tl.constexpr,
    KIND: tl.constexpr, BY_ROW: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    MERGE_ROWS: tl.constexpr, MERGE_STEPS: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``MERGE_ROWS``: the power of two that holds the rows of a program, or 0 to leave them to ``_combine``.

    With ``new_k`` q and it are rotated first, and it and ``new_v`` are position ``pos`` of the cache: the program whose
    split that is in writes them there, and ends with their score instead of reading them back."""
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
    # Blocks from ``plain`` on need no look at the mask, which would hold up the loads of keys and values. The first of
    # them, whose keys are all masked if there is none, is on its way before the query is turned.
    UNMASKED: tl.constexpr = KIND == 0 or bounds is not None
    plain = hi
    if bounds is not None:
        plain = tl.where(read > first, hi, lo)
    elif KIND == 0:
        plain = lo
    if UNMASKED:
        key, value, bias = _load(
            plain, split, splits, k, v, k_n, v_n, mask_ptr, mask_n, at, first, last, read, row, rows_ok, 0, False,
            CAUSAL, BLOCK_N, D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    if new_k is not None:
        sign = tl.where((column % 2 == 0) if INTERLEAVED else (column < R // 2), -1.0, 1.0)
        cf, sf = c.to(tl.float32), s.to(tl.float32) * sign
        query = (query.to(tl.float32) * cf + q_other.to(tl.float32) * sf).to(q.dtype.element_ty)
        query = tl.broadcast_to(query, [BLOCK_R, BLOCK_D])
        key_row = (k_new.to(tl.float32) * cf + k_other.to(tl.float32) * sf).to(k.dtype.element_ty)

    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    if UNMASKED:
        top, total, acc = _attend(top, total, acc, query, key, value, bias, scale, cap)
    if KIND != 0:
        for i in tl.range(lo, plain, num_stages=STAGES):
            key, value, bias = _load(
                i, split, splits, k, v, k_n, v_n, mask_ptr, mask_n, at, first, last, read, row, rows_ok, KIND, BY_ROW,
                CAUSAL, BLOCK_N, D, DV, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            top, total, acc = _attend(top, total, acc, query, key, value, bias, scale, cap)
    if UNMASKED:
        for i in tl.range(plain + 1, hi, num_stages=STAGES):
            key, value, bias = _load(
                i, split, splits, k, v, k_n, v_n, mask_ptr, mask_n, at, first, last, read, row, rows_ok, 0, False,
                CAUSAL, BLOCK_N, D, DV, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            top, total, acc = _attend(top, total, acc, query, key, value, bias, scale, cap)
    if new_k is not None:
        mine = (at >= 0) & (at < Skv) & ((at // BLOCK_N) % splits == split)
        tl.store(k + at * k_n + column, key_row, mask=column < tl.where(mine, D, 0))
        tl.store(v + at * v_n + e[None, :], v_new, mask=e[None, :] < tl.where(mine, DV, 0))
        _, new_bias = _block_mask(
            mask_ptr, mask_n, at + tl.arange(0, 1), first, last, read, row, rows_ok, KIND, BY_ROW, CAUSAL
        )
        new_score = tl.sum(query.to(tl.float32) * key_row.to(tl.float32), 1) * scale
        if cap is not None:
            new_score = capped(new_score, cap)
        new_score = tl.where(mine, tl.sum(new_score[:, None] + new_bias, 1), float("-inf"))
        higher = tl.maximum(top, new_score)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p, decay = tl.exp2(new_score - shift), tl.exp2(top - shift)
        top, total = higher, total * decay + p
        acc = acc * decay[:, None] + p[:, None] * v_new.to(tl.float32)

    out_row = (b * Sq + row) * H + head
    if SPLIT:
        slot = out_row * splits + split
        tl.store(stats + slot * 2, top, mask=rows_ok)
        tl.store(stats + slot * 2 + 1, total, mask=rows_ok)
        tl.store(partial + slot[:, None] * DV + e[None, :], acc, mask=rows_ok[:, None] & (e < DV)[None, :])
        if MERGE_ROWS:
            _merge_if_last(
                out, partial, stats, counters + tl.program_id(2) * tl.num_programs(1) + tl.program_id(1),
                b, kv_head, first_row, H, Sq, splits, GROUP, DV, BLOCK_DV, MERGE_ROWS, MERGE_STEPS,
            )  # fmt: skip
    else:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + out_row[:, None] * DV + e[None, :], result, mask=rows_ok[:, None] & (e < DV)[None, :])


@jit
def _combine(
    out, partial, stats, splits, DV: tl.constexpr, BLOCK_DV: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[None, :, None]
    _merge(out, partial, stats, row, row >= 0, splits, DV, BLOCK_DV, STEPS)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache(4096)
def plan(rows: int, programs: int, Skv: int, width: int, itemsize: int, device: torch.device) -> Plan:
    """rows: query rows that share a kv head; programs: batch times kv heads; width: the larger padded head_dim.

    As measured in whole decode steps on an H200. Few blocks: each program loads all of its keys and values at once,
    with 8 warps if a multiprocessor has one program, which has no registers for two of them. Else they come in blocks,
    some on their way, for two programs to a multiprocessor or, where several rows share wide keys, for one of 8 warps.
    Beyond four, which hide each other's latency, one warp and small blocks are faster.
    """
    block_r = min(64, max(16, triton.next_power_of_2(rows)))
    processors = _multiprocessors(device)
    wave = 2 * processors / (programs * triton.cdiv(rows, block_r))
    key = width * itemsize
    wide_group = rows > 1 and key >= 256
    block_n, large = max(16, min(128, 32768 // key)), max(16, min(128, 16384 // key))
    blocks, smaller = triton.cdiv(Skv, block_n), triton.cdiv(Skv, large)
    if block_r == 16:
        alone = min(processors // programs, MAX_SPLITS)
        if wide_group and smaller <= alone:
            return Plan(block_r, large, smaller, 8, 1)
        if blocks <= min(alone, 4):
            return Plan(block_r, block_n, blocks, 8, 1)
        if not wide_group and blocks <= min(wave, MAX_SPLITS):
            return Plan(block_r, block_n, blocks, 4, 1)
        if wave < 0.5 and rows == 1 and key <= 256:
            return Plan(block_r, max(16, 4096 // key), 1, 1, 3)
        splits, warps, stages = int(wave), 4, 2
        if wide_group and wave >= 4:
            splits, warps, stages = alone, 8, 3
        elif wide_group:
            large, stages = max(16, large // 2), 3
        return Plan(block_r, large, max(1, min(splits, triton.cdiv(Skv, large), MAX_SPLITS)), warps, stages)
    block_n = max(16, min(128, 8192 // key))
    blocks = triton.cdiv(Skv, block_n)
    # Two programs per multiprocessor, or four small ones once each has 8 blocks: partial results stay few.
    splits = int(max(wave, min(2 * wave, blocks / 8)))
    return Plan(block_r, block_n, max(1, min(splits, blocks, MAX_SPLITS)), 4, 3)


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
    p = chosen or plan(group * Sq, B * kv_heads, Skv, max(block_d, block_dv), q.element_size(), q.device)
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
    options = {"num_warps": p.warps, "launch_pdl": True} if ahead else {"num_warps": p.warps}
    row_blocks = triton.cdiv(group * Sq, p.block_r)
    steps = (p.splits - 1).bit_length()
    merge_rows = triton.next_power_of_2(min(p.block_r, group * Sq))
    counted = None
    if split and (merge_rows * block_dv << steps) <= MERGED:
        counted = counters(q.device, p.splits, kv_heads * B * row_blocks)
    merge = (0, 0) if counted is None else (merge_rows, steps)
    start(
        _decode, (p.splits, kv_heads, B * row_blocks),
        q, k, v, mask, bounds, out, partial, stats, counted, *(new[:5] if new else (None,) * 5),
        *in_log2(scale, softcap), H, Sq, Skv, p.splits,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides, *_strides_of_new(new),
        group, D, DV, block_d, block_dv, row_blocks, p.block_r, p.block_n, scan, p.stages,
        kind, by_row, is_causal, split, *merge, *((new.cos.shape[3], new.interleaved) if new else (0, False)),
        ahead,
        **options,
    )  # fmt: skip
    if split and counted is None:
        options["num_warps"] = 2 if block_dv << steps <= 8192 else 4  # 8 cost 2 µs
        start(_combine, (rows,), out, partial, stats, p.splits, DV, block_dv, steps, ahead, **options)
    return out.transpose(1, 2)
