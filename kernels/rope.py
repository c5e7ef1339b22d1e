"""Rotary position embedding of one tensor (Su et al., 2021).

    y[..., :R] = x[..., :R] * cos + rot(x[..., :R]) * sin,    y[..., R:] = x[..., R:]

x [B, H, S, D] with any strides; cos, sin of one dtype, broadcastable to [B, 1, S, R], R <= D even,
used exactly as given (no assumption that their halves repeat). ``interleaved=False``:
rot([a, b]) = [-b, a] on halves; ``True``: on pairs, rot(a0, b0, a1, b1, ...) = (-b0, a0, -b1, a1, ...).
Products and sum in x's dtype when cos has x's dtype; the result is rounded to x's dtype. y is laid out in
memory as [B, S, H, D].
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels import _native, _rows, _triton
from tinyfuse.kernels._triton import Launch, jit, pdl, tl, triton
from tinyfuse.op import Kernel, register


def rotate(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = cos.shape[-1]
    turned = x[..., :width]
    turned = (turned * cos + rotate(turned, interleaved) * sin).to(x.dtype)
    out = x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
    out[..., :width] = turned
    out[..., width:] = x[..., width:]
    return out


# --- GPU ---


@jit
def _pairs(x, at, mask):
    """The even and the odd columns of the load, fp32."""
    value = tl.load(x + at, mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(value, [value.shape[0], value.shape[1] // 2, 2]))
    return even.to(tl.float32), odd.to(tl.float32)


@jit
def _halves(x, a, b, mask):
    """Columns a and b of x, fp32."""
    return tl.load(x + a, mask=mask, other=0.0).to(tl.float32), tl.load(x + b, mask=mask, other=0.0).to(tl.float32)


@jit
def turn(
    x, y, x_h, y_h, h, keep, cos, sin, cos_r, sin_r,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """Rotate heads ``h`` of one token from x to y, where ``keep``; all pointers are at that token.

    BLOCK_R and BLOCK_TAIL: powers of two that cover R / 2 and D - R (0 if none)."""
    x += (h.to(tl.int64) * x_h)[:, None]
    y += (h.to(tl.int64) * y_h)[:, None]
    if INTERLEAVED:
        c = tl.arange(0, 2 * BLOCK_R)[None, :]
        mask = keep[:, None] & (c < R)
        cos_a, cos_b = _pairs(cos, c * cos_r, c < R)
        sin_a, sin_b = _pairs(sin, c * sin_r, c < R)
        x_a, x_b = _pairs(x, c, mask)
        y_a = (x_a * cos_a - x_b * sin_a).to(y.dtype.element_ty)
        y_b = (x_b * cos_b + x_a * sin_b).to(y.dtype.element_ty)
        tl.store(y + c, tl.reshape(tl.join(y_a, y_b), [y_a.shape[0], 2 * BLOCK_R]), mask=mask)
    else:
        a = tl.arange(0, BLOCK_R)[None, :]
        b = a + R // 2
        mask = keep[:, None] & (a < R // 2)
        cos_a, cos_b = _halves(cos, a * cos_r, b * cos_r, a < R // 2)
        sin_a, sin_b = _halves(sin, a * sin_r, b * sin_r, a < R // 2)
        x_a, x_b = _halves(x, a, b, mask)
        tl.store(y + a, x_a * cos_a - x_b * sin_a, mask=mask)
        tl.store(y + b, x_b * cos_b + x_a * sin_b, mask=mask)
    if BLOCK_TAIL:
        c = R + tl.arange(0, BLOCK_TAIL)[None, :]
        mask = keep[:, None] & (c < D)
        tl.store(y + c, tl.load(x + c, mask=mask), mask=mask)


@jit(do_not_specialize=["H", "S"])
def _rope(
    x, y, cos, sin, H, S, x_b, x_h, x_s, cos_b, cos_s, cos_r, sin_b, sin_s, sin_r,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_TAIL: tl.constexpr,
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
    turn(
        x + b * x_b + s * x_s, y + token.to(tl.int64) * (H * D), x_h, D, h, h < H,
        cos + b * cos_b + s * cos_s, sin + b * sin_b + s * sin_s, cos_r, sin_r,
        D, R, INTERLEAVED, BLOCK_R, BLOCK_TAIL,
    )  # fmt: skip


def blocks(D: int, R: int) -> tuple[int, int]:
    """BLOCK_R and BLOCK_TAIL of :func:`turn`."""
    return triton.next_power_of_2(R // 2), triton.next_power_of_2(D - R) if D > R else 0


def table_strides(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int, int]:
    """Strides of a cos or sin along B, S and R; 0 where it is broadcast."""
    steps = [0 if n == 1 else step for n, step in zip(shape, stride, strict=True)]
    steps = [0] * (4 - len(steps)) + steps
    return steps[0], steps[2], steps[3]


def unsupported(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why x cannot be rotated by cos and sin, or None."""
    if _triton.missing:
        return _triton.missing
    if x.dtype not in _rows.FLOATS or cos.dtype not in _rows.FLOATS or sin.dtype not in _rows.FLOATS:
        return f"rope kernels take bfloat16, float16 and float32, not {x.dtype} with {cos.dtype} and {sin.dtype}"
    if x.dim() != 4 or x.stride(3) != 1:
        return "the input of rope is not [B, H, S, D] with a contiguous last dimension"
    table, (B, _, S, D) = cos.shape, x.shape
    width, rank = table[-1], len(table)
    if width % 2 or not 0 < width <= D or sin.shape != table:
        return f"{width} is no even number of rotated channels up to head_dim {D} in both cos and sin"
    if rank > 4 or (rank > 2 and table[-3] != 1):
        return "cos and sin differ between heads"
    if rank < 2 or table[-2] not in (1, S) or (rank == 4 and table[0] not in (1, B)):
        return "cos and sin are not [B, 1, S, R]"
    return None


@lru_cache(4096)
def bind(
    shape: tuple[int, ...], x: tuple[int, ...], table: tuple[int, ...], cos: tuple[int, ...], sin: tuple[int, ...],
    interleaved: bool, *dtypes_device_ahead: Any,
) -> Launch:  # fmt: skip
    """x, cos, sin: strides; table: the shape of cos and sin."""
    (B, H, S, D), R, ahead = shape, table[-1], dtypes_device_ahead[-1]
    block_h = _rows.heads_per_program(H, D, B * S)
    scalars = (
        H, S, *x[:3], *table_strides(table, cos), *table_strides(table, sin),
        D, R, interleaved, *blocks(D, R), block_h, ahead,
    )  # fmt: skip
    return Launch(_rope, (B * S, triton.cdiv(H, block_h)), scalars, 4, ahead)


def supports_triton(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    return unsupported(x, cos, sin)


def run_triton(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    y = torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format)
    if y.numel():
        where = x.stride(), cos.shape, cos.stride(), sin.stride()
        bind(x.shape, *where, interleaved, x.dtype, cos.dtype, sin.dtype, x.device, pdl(x.device))(x, y, cos, sin)
    return y.transpose(1, 2)


# --- CPU ---


def supports_native(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    return _native.rotary_reason(x, cos, sin) or _native.rows_reason(x)


def run_native(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _native.rope(x, None, None, cos, sin, None, None, None, interleaved)


def fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


OP = register(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("triton", "cuda", supports_triton, run_triton),
        Kernel("native", "cpu", supports_native, run_native),
    ],
)
