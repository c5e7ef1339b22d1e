"""Attention of many query rows (FlashAttention-2, Dao, 2023) that skips what a dense bool mask hides.

A pass over the mask marks every tile of it as empty, full or mixed. A program of the main kernel runs the first
run of full tiles without reading the mask, then the tiles around it with the mask, up to the outermost that is
not empty. So a causal, sliding or padded mask given as a
dense tensor costs what the flag would. Layers share their mask, and the pass runs once per mask.

Where the mask is computed from positions (``Reach``) nothing is read but one byte per key that a block of rows reaches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tinyfuse.kernels._attention_decode import MAX_ROWS, capped, decode, in_log2, mask_kind, mask_strides, to_log2
from tinyfuse.kernels._triton import jit, rehearsing, start, tl, triton


class Plan(NamedTuple):
    """Query rows and keys per block, warps, pipeline stages of the full tiles and of the others."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    edge_stages: int


class Reach(NamedTuple):
    """Which keys a query attends, as in ``causal_attention``: rows int64 [Sq], columns int64 [Skv], keys bool [>= B, P]
    or None, window or None."""

    rows: Tensor
    columns: Tensor
    keys: Tensor | None
    window: int | None


class BlockMap(NamedTuple):
    """What the rows of each block of queries attend: ``tiles`` int8 [Bm, Hm, blocks of rows, blocks of keys],
    0 for nothing, 2 for everything, 1 for something between; ``columns`` bool [Bm, Hm, blocks of rows, Skv],
    the keys that some row attends. Bm and Hm are 1 where the mask is broadcast."""

    tiles: Tensor
    columns: Tensor


@jit
def _map(
    mask, tiles, columns, mask_b, mask_h, mask_m, mask_n, heads, Sq, Skv,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    line = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + block
    mask += (tl.program_id(2) // heads).to(tl.int64) * mask_b + (tl.program_id(2) % heads).to(tl.int64) * mask_h
    mask += (block * BLOCK_M).to(tl.int64) * mask_m
    row = tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * TILES * BLOCK_N + tl.arange(0, TILES * BLOCK_N)
    rows = tl.minimum(Sq - block * BLOCK_M, BLOCK_M)
    inside = (row < rows)[:, None] & (n < Skv)[None, :]
    at = row[:, None] * mask_m + n.to(tl.int64)[None, :] * mask_n
    count = tl.sum(tl.load(mask + at, mask=inside, other=0).to(tl.int32), 0)
    tl.store(columns + line * Skv + n, count > 0, mask=n < Skv)
    # Keys past the end count nothing, so the last block is full only if it is whole.
    count = tl.reshape(count, [TILES, BLOCK_N])
    some = tl.max(count, 1) > 0
    every = tl.min(count, 1) == rows
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    blocks = tl.cdiv(Skv, BLOCK_N)
    tl.store(tiles + line * blocks + tile, some.to(tl.int8) + every.to(tl.int8), mask=tile < blocks)


@jit
def _spans(tiles, blocks, CHUNK: tl.constexpr):
    """(lo, hi, full_lo, full_hi): something is attended in [lo, hi) only; [full_lo, full_hi) is the first run of
    full blocks, empty at lo where there is none."""
    lo = blocks
    hi = 0
    full_lo = blocks
    full_hi = blocks
    for first in range(0, blocks, CHUNK):
        i = first + tl.arange(0, CHUNK)
        kind = tl.load(tiles + i, mask=i < blocks, other=0).to(tl.int32)
        lo = tl.minimum(lo, tl.min(tl.where(kind > 0, i, blocks)))
        hi = tl.maximum(hi, tl.max(tl.where(kind > 0, i + 1, 0)))
        full_lo = tl.minimum(full_lo, tl.min(tl.where(kind == 2, i, blocks)))
        full_hi = tl.minimum(full_hi, tl.min(tl.where((i > full_lo) & (kind != 2), i, blocks)))
    none = full_lo == blocks
    return lo, hi, tl.where(none, lo, full_lo), tl.where(none, lo, full_hi)


@jit
def _present(keys, stride, begin, end, CHUNK: tl.constexpr):
    """(begin, end, whole) of what is True in ``keys`` from ``begin`` to ``end``; empty at ``begin`` if nothing is.
    ``whole``: nothing between is False."""
    tile = tl.arange(0, CHUNK)
    firsts = tl.full([CHUNK], 2147483647, tl.int32)
    lasts = tl.zeros([CHUNK], tl.int32)
    counts = tl.zeros([CHUNK], tl.int32)
    for i in range(begin, end, CHUNK):
        n = i + tile
        true = tl.load(keys + n.to(tl.int64) * stride, mask=n < end, other=0) != 0
        firsts = tl.where(true, tl.minimum(firsts, n), firsts)
        lasts = tl.where(true, n + 1, lasts)
        counts += true.to(tl.int32)
    first, last = tl.min(firsts), tl.max(lasts)
    count = tl.sum(counts)
    return tl.where(count > 0, first, begin), tl.where(count > 0, last, begin), count == last - first


@jit
def _reach(keys, stride, top, bottom, window, count, CHUNK: tl.constexpr):
    """(begin, end, full_begin, full_end): what rows that reach up to keys ``top`` ... ``bottom`` of ``count`` attend
    lies in [begin, end), and all of them attend all of [full_begin, full_end)."""
    begin = 0
    end = tl.maximum(tl.minimum(count, bottom + 1), 0)
    full_begin = 0
    full_end = tl.maximum(tl.minimum(count, top + 1), 0)
    if window is not None:
        begin = tl.minimum(tl.maximum(top + 1 - window, 0), end)
        full_begin = tl.maximum(bottom + 1 - window, 0)
    if keys is not None:
        begin, end, whole = _present(keys, stride, begin, end, CHUNK)
        full_begin = tl.maximum(full_begin, begin)
        full_end = tl.where(whole, tl.minimum(full_end, end), 0)
    return begin, end, full_begin, full_end


@jit
def _load(ptr, keep, inner, MASKED: tl.constexpr, PADDED: tl.constexpr):
    if MASKED and PADDED:
        return tl.load(ptr, mask=keep[:, None] & inner[None, :], other=0.0)
    elif MASKED:
        return tl.load(ptr, mask=keep[:, None], other=0.0)
    elif PADDED:
        return tl.load(ptr, mask=inner[None, :], other=0.0)
    else:
        return tl.load(ptr)


@jit(do_not_specialize=["keys_b", "held"])
def _prefill(
    q, k, v, mask, tiles, columns, rows_at, columns_at, keys, window, out, scale, cap, Sq, Skv,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_m, mask_n, map_b, map_h, keys_b, keys_n, held,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, EDGE_STAGES: tl.constexpr,
    KIND: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    # The last rows see the most keys of a causal mask: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    tile = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = m < Sq
    rows = m.to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    q_ptr = q + b * q_b + head * q_h + rows[:, None] * q_m + d[None, :]
    query = tl.load(q_ptr, mask=rows_ok[:, None] & (d < D)[None, :], other=0.0)
    k_ptr = k + b * k_b + (head // GROUP) * k_h + tile[:, None] * k_n + d[None, :]
    v_ptr = v + b * v_b + (head // GROUP) * v_h + tile[:, None] * v_n + e[None, :]

    lo = 0
    hi = tl.cdiv(Skv, BLOCK_N)
    full_lo = 0
    full_hi = Skv // BLOCK_N
    begin = 0
    end = Skv
    reach = m
    if CAUSAL:
        offset = 0
        if rows_at is not None:
            column = tl.load(columns_at)
            offset = (tl.load(rows_at) - column).to(tl.int32)
            if keys is not None:
                keys += b * keys_b + column * keys_n
                end = tl.minimum(end, (held - column).to(tl.int32))
        reach += offset
        bottom = tl.minimum((block + 1) * BLOCK_M, Sq) - 1 + offset
        begin, end, full_lo, full_hi = _reach(keys, keys_n, block * BLOCK_M + offset, bottom, window, end, 2048)
        lo = begin // BLOCK_N
        hi = tl.cdiv(end, BLOCK_N)
        full_lo = tl.maximum(tl.cdiv(full_lo, BLOCK_N), lo)
        full_hi = tl.maximum(full_hi // BLOCK_N, full_lo)
    if KIND == 1:
        line = b * map_b + head * map_h + block
        lo, hi, full_lo, full_hi = _spans(tiles + line * hi, hi, 128)
        columns += line * Skv
    if KIND == 2:
        full_hi = 0
    if KIND != 0:
        mask += b * mask_b + head * mask_h + (block * BLOCK_M).to(tl.int64) * mask_m

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in tl.range(full_lo, full_hi, num_stages=STAGES):
        start = tl.cast(i, tl.int64) * BLOCK_N
        key = _load(k_ptr + start * k_n, tile, d < D, False, BLOCK_D != D)
        score = tl.dot(query, tl.trans(key))
        if cap is not None:
            score = capped(score * scale, cap)
            higher = tl.maximum(top, tl.max(score, 1))
            p = tl.exp2(score - higher[:, None])
        else:
            higher = tl.maximum(top, tl.max(score, 1) * scale)
            p = tl.exp2(score * scale - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(p, 1)
        value = _load(v_ptr + start * v_n, tile, e < DV, False, BLOCK_DV != DV)
        acc = tl.dot(p.to(value.dtype), value, acc * decay[:, None])
        top = higher
    for i in tl.range(lo, hi - (full_hi - full_lo), num_stages=EDGE_STAGES):
        i += tl.where(i < full_lo, 0, full_hi - full_lo)
        start = tl.cast(i, tl.int64) * BLOCK_N
        n = start + tile
        keep = (n >= begin) & (n < end)
        if keys is not None:
            keep = tl.load(keys + n * keys_n, mask=keep, other=0) != 0
        if KIND == 1:
            keep = tl.load(columns + n, mask=keep, other=0) != 0
        key = _load(k_ptr + start * k_n, keep, d < D, True, BLOCK_D != D)
        value = _load(v_ptr + start * v_n, keep, e < DV, True, BLOCK_DV != DV)
        score = tl.dot(query, tl.trans(key)) * scale
        if cap is not None:
            score = capped(score, cap)
        if KIND == 0:
            score = tl.where(keep[None, :], score, float("-inf"))
        else:
            inside = rows_ok[:, None] & (n < Skv)[None, :]
            at = row[:, None] * mask_m + tile[None, :] * mask_n
            hidden = tl.load(mask + start * mask_n + at, mask=inside, other=0)
            if KIND == 1:
                score = tl.where(hidden != 0, score, float("-inf"))
            else:
                score = tl.where(keep[None, :], score + to_log2(hidden), float("-inf"))
        if CAUSAL:
            seen = n[None, :] <= reach[:, None]
            if window is not None:
                seen &= n[None, :] > reach[:, None] - window
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(score - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(value.dtype), value, acc * decay[:, None])
        top = higher

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptr = out + (((b * Sq + rows) * tl.num_programs(1) + head) * DV)[:, None] + e[None, :]
    tl.store(out_ptr, acc, mask=rows_ok[:, None] & (e < DV)[None, :])


def plan(Sq: int, width: int) -> Plan:
    """width: the larger padded head_dim."""
    if width > 128:
        return Plan(64, 64, 4, 2, 1)
    if width <= 64 and Sq > 4096:
        return Plan(128, 64, 4, 3, 1)
    return Plan(64, 64, 4, 3 if Sq > 256 else 2, 2)


_maps: list[tuple[tuple, StorageWeakRef, BlockMap]] = []


def block_map(mask: Tensor, size: tuple[int, int, int, int], p: Plan) -> BlockMap:
    """The map of a bool mask broadcast to ``size`` = (B, H, Sq, Skv), from the last two maps where possible.

    The weak reference pins the storage's identity without its memory, and the version counter sees writes.
    Inference tensors have no counter, and a captured graph must hold the pass: both always compute.
    """
    on_gpu = mask.is_cuda
    if rehearsing() or mask.is_inference() or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return _make_map(mask, size, p)
    stream = torch.cuda.current_stream(mask.device).cuda_stream if on_gpu else 0
    storage = mask.untyped_storage()
    key = (storage._cdata, mask.storage_offset(), mask._version, mask.shape, mask.stride(), size, p, stream)
    for known, _, made in _maps:
        if known == key:
            return made
    made = _make_map(mask, size, p)
    _maps[:] = [(key, StorageWeakRef(storage), made), *_maps[:1]]
    return made


def _make_map(mask: Tensor, size: tuple[int, int, int, int], p: Plan) -> BlockMap:
    B, H, Sq, Skv = size
    strides = mask_strides(mask)
    shape = (B if strides[0] else 1, H if strides[1] else 1, triton.cdiv(Sq, p.block_m))
    blocks = triton.cdiv(Skv, p.block_n)
    tiles = torch.empty((*shape, blocks), dtype=torch.int8, device=mask.device)
    columns = torch.empty((*shape, Skv), dtype=torch.bool, device=mask.device)
    per_program = 256 // p.block_n
    grid = shape[2], triton.cdiv(blocks, per_program), shape[0] * shape[1]
    start(_map, grid, mask, tiles, columns, *strides, shape[1], Sq, Skv, p.block_m, p.block_n, per_program, num_warps=8)
    return BlockMap(tiles, columns)


def prefill(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, chosen: Plan | None = None,
    softcap: float | None = None, reach: Reach | None = None,
) -> Tensor:  # fmt: skip
    """Launch the kernels; arguments as in ``attention``, ``chosen`` overrides :func:`plan`; ``reach`` may stand in for
    a mask, where ``is_causal`` is counted from its positions."""
    B, H, Sq, D = q.shape
    if Sq <= MAX_ROWS and reach is None:
        return decode(q, k, v, mask, scale, is_causal, softcap=softcap)
    Skv, DV = v.shape[2:]
    block_d, block_dv = triton.next_power_of_2(D), triton.next_power_of_2(DV)
    p = chosen or plan(Sq, max(block_d, block_dv))
    kind = mask_kind(mask)
    tiles = columns = None
    map_b = map_h = 0
    rows, at, keys, window = reach or (None,) * 4
    if mask is not None and mask.dtype == torch.bool:
        tiles, columns = block_map(mask, (B, H, Sq, Skv), p)
        heads, blocks = tiles.shape[1:3]
        map_b, map_h = 0 if tiles.shape[0] == 1 else heads * blocks, 0 if heads == 1 else blocks
    out = torch.empty((B, Sq, H, DV), dtype=q.dtype, device=q.device)
    start(
        _prefill, (triton.cdiv(Sq, p.block_m), H, B),
        q, k, v, mask, tiles, columns, rows, at, keys, window, out, *in_log2(scale, softcap), Sq, Skv,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask_strides(mask), map_b, map_h,
        *((0, 0, 0) if keys is None else (*keys.stride(), keys.shape[1])),
        H // k.shape[1], D, DV, block_d, block_dv, p.block_m, p.block_n, p.stages, p.edge_stages,
        kind, is_causal, num_warps=p.warps,
    )  # fmt: skip
    return out.transpose(1, 2)
