"""Rotate q and k, then write k and v into a static cache: the whole step between the q/k/v linears and attention.

q [B, H, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], any strides; cos, sin, interleaved as in ``rope``;
keys, values, pos as in ``kv_append``. Returns the rotated q, laid out in memory as [B, S, H, D].
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels import _native, _rows, kv_append, rope
from tinyfuse.kernels._triton import Launch, jit, pdl, tl, triton
from tinyfuse.kernels.kv_append import copy_heads
from tinyfuse.kernels.rope import turn
from tinyfuse.op import Kernel, register


def reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    kv_append.reference(keys, values, rope.reference(k, cos, sin, interleaved), v, pos)
    return rope.reference(q, cos, sin, interleaved)


# --- GPU ---


@jit(do_not_specialize=["H", "KV_HEADS", "S", "L", "q_groups"])
def _rope_append(
    q, k, v, cos, sin, keys, values, pos, y, H, KV_HEADS, S, L, q_groups, pos_s,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, cos_b, cos_s, cos_r, sin_b, sin_s, sin_r,
    keys_b, keys_h, keys_l, values_b, values_h, values_l,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_TAIL: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, group of heads): first the groups of query heads, then those of key and value heads."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    b = (token // S).to(tl.int64)
    s = (token % S).to(tl.int64)
    cos += b * cos_b + s * cos_s
    sin += b * sin_b + s * sin_s
    group = tl.program_id(1)
    if group < q_groups:
        h = group * BLOCK_H + tl.arange(0, BLOCK_H)
        turn(
            q + b * q_b + s * q_s, y + token.to(tl.int64) * (H * D), q_h, D, h, h < H, cos, sin, cos_r, sin_r,
            D, R, INTERLEAVED, BLOCK_R, BLOCK_TAIL,
        )  # fmt: skip
    else:
        kv_head = (group - q_groups) * BLOCK_KV + tl.arange(0, BLOCK_KV)
        at = tl.load(pos + s * pos_s)
        keep = kv_head < tl.where((at >= 0) & (at < L), KV_HEADS, 0)
        turn(
            k + b * k_b + s * k_s, keys + b * keys_b + at * keys_l, k_h, keys_h, kv_head, keep, cos, sin, cos_r, sin_r,
            D, R, INTERLEAVED, BLOCK_R, BLOCK_TAIL,
        )  # fmt: skip
        copy_heads(
            v + b * v_b + s * v_s, values + b * values_b + at * values_l, v_h, values_h, kv_head, keep, DV, BLOCK_DV
        )


@lru_cache(4096)
def bind(
    shape: tuple[int, ...], kv_heads: int, DV: int, table: tuple[int, ...], L: int,
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], cos: tuple[int, ...], sin: tuple[int, ...],
    keys: tuple[int, ...], values: tuple[int, ...], pos: tuple[int, ...], interleaved: bool, *dtypes_device_ahead: Any,
) -> Launch:  # fmt: skip
    """shape: of q; table: the shape of cos and sin; L: the length of the cache; q ... pos: strides."""
    (B, H, S, D), R, ahead = shape, table[-1], dtypes_device_ahead[-1]
    block_h = _rows.heads_per_program(H, D, B * S)
    block_kv = _rows.heads_per_program(kv_heads, max(D, DV), B * S)
    q_groups = triton.cdiv(H, block_h)
    scalars = (
        H, kv_heads, S, L, q_groups, *pos, *q[:3], *k[:3], *v[:3],
        *rope.table_strides(table, cos), *rope.table_strides(table, sin), *keys[:3], *values[:3],
        D, DV, R, interleaved, *rope.blocks(D, R), triton.next_power_of_2(DV), block_h, block_kv, ahead,
    )  # fmt: skip
    return Launch(_rope_append, (B * S, q_groups + triton.cdiv(kv_heads, block_kv)), scalars, 4, ahead)


def supports_triton(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool,
) -> str | None:  # fmt: skip
    return (
        rope.unsupported(q, cos, sin)
        or rope.unsupported(k, cos, sin)
        or kv_append.supports_triton(keys, values, k, v, pos)
    )


def run_triton(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    y = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
    if y.numel():
        strides = [x.stride() for x in (q, k, v, cos, sin, keys, values, pos)]
        bound = bind(
            q.shape, k.shape[1], v.shape[3], cos.shape, keys.shape[2], *strides, interleaved,
            q.dtype, v.dtype, cos.dtype, sin.dtype, q.device, pdl(q.device),
        )  # fmt: skip
        bound(q, k, v, cos, sin, keys, values, pos, y)
    return y.transpose(1, 2)


# --- CPU ---


def supports_native(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool,
) -> str | None:  # fmt: skip
    return (
        _native.rotary_reason(q, cos, sin)
        or _native.rows_reason(q, k, v, keys, values)
        or kv_append.supports_native(keys, values, k, v, pos)
    )


def run_native(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    return _native.rope(q, k, v, cos, sin, keys, values, pos, interleaved)


def fake(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    return rope.fake(q, cos, sin, interleaved)


OP = register(
    "rope_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values,"
    " Tensor pos, bool interleaved) -> Tensor",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("triton", "cuda", supports_triton, run_triton),
        Kernel("native", "cpu", supports_native, run_native),
    ],
)
