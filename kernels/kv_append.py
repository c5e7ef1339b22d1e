"""Write new keys and values into a static cache, in place: keys[:, :, pos] = k, values[:, :, pos] = v.

keys [B, H, L, D], values [B, H, L, Dv]; k [B, H, S, D], v [B, H, S, Dv] with any strides; pos int64 [S], 0 <= pos < L.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels import _native, _rows, _triton
from tinyfuse.kernels._triton import Launch, jit, pdl, tl, triton
from tinyfuse.op import Kernel, register


def reference(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> None:
    keys.index_copy_(2, pos, k)
    values.index_copy_(2, pos, v)


# --- GPU ---


@jit
def copy_heads(x, y, x_h, y_h, h, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy heads ``h`` of one token from x to y, where ``keep``; both pointers are at that token."""
    c = tl.arange(0, BLOCK_D)[None, :]
    mask = keep[:, None] & (c < D)
    h = h.to(tl.int64)[:, None]
    tl.store(y + h * y_h + c, tl.load(x + h * x_h + c, mask=mask), mask=mask)


@jit(do_not_specialize=["H", "S", "L"])
def _kv_append(
    keys, values, k, v, pos, H, S, L, pos_s,
    keys_b, keys_h, keys_l, values_b, values_h, values_l, k_b, k_h, k_s, v_b, v_h, v_s,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, group of heads)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    b = (token // S).to(tl.int64)
    s = (token % S).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    at = tl.load(pos + s * pos_s)
    keep = h < tl.where((at >= 0) & (at < L), H, 0)
    copy_heads(k + b * k_b + s * k_s, keys + b * keys_b + at * keys_l, k_h, keys_h, h, keep, D, BLOCK_D)
    copy_heads(v + b * v_b + s * v_s, values + b * values_b + at * values_l, v_h, values_h, h, keep, DV, BLOCK_DV)


@lru_cache(4096)
def bind(
    k_shape: tuple[int, ...], v_shape: tuple[int, ...], L: int, keys: tuple[int, ...], values: tuple[int, ...],
    k: tuple[int, ...], v: tuple[int, ...], pos: tuple[int, ...], *dtypes_device_ahead: Any,
) -> Launch:  # fmt: skip
    """keys, values, k, v, pos: strides; L: the length of the cache."""
    (B, H, S, D), DV, ahead = k_shape, v_shape[3], dtypes_device_ahead[-1]
    block_h = _rows.heads_per_program(H, max(D, DV), B * S)
    scalars = (
        H, S, L, *pos, *keys[:3], *values[:3], *k[:3], *v[:3],
        D, DV, triton.next_power_of_2(D), triton.next_power_of_2(DV), block_h, ahead,
    )  # fmt: skip
    return Launch(_kv_append, (B * S, triton.cdiv(H, block_h)), scalars, 4, ahead)


def supports_triton(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> str | None:
    if _triton.missing:
        return _triton.missing
    if any(t.dtype not in _rows.FLOATS for t in (k, v)) or keys.dtype != k.dtype or values.dtype != v.dtype:
        return f"cache kernels write {k.dtype} and {v.dtype} to caches of that dtype, not {keys.dtype}, {values.dtype}"
    if any(t.dim() != 4 or t.stride(3) != 1 for t in (keys, values, k, v)):
        return "the cache or its new entries are not [B, H, L, D] with a contiguous last dimension"
    if pos.dtype != torch.int64 or pos.dim() != 1:
        return f"positions are int64 [S], not {pos.dtype} of {pos.dim()} dimensions"
    return None


def run_triton(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> None:
    if k.numel():
        strides = keys.stride(), values.stride(), k.stride(), v.stride(), pos.stride()
        bound = bind(k.shape, v.shape, keys.shape[2], *strides, k.dtype, v.dtype, k.device, pdl(k.device))
        bound(keys, values, k, v, pos)


# --- CPU ---


def supports_native(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> str | None:
    if pos.dtype != torch.int64 or pos.dim() != 1:
        return "the CPU cache kernels take int64 positions [S]"
    return _native.rows_reason(k, v, keys, values)


def run_native(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> None:
    _native.rope(None, k, v, None, None, keys, values, pos, False)


OP = register(
    "kv_append(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, Tensor pos) -> ()",
    reference=reference,
    kernels=[
        Kernel("triton", "cuda", supports_triton, run_triton),
        Kernel("native", "cpu", supports_native, run_native),
    ],
)
