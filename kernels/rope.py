"""Rotary position embedding of one tensor (Su et al., 2021).

    y[..., :R] = x[..., :R] * cos + rot(x[..., :R]) * sin,    y[..., R:] = x[..., R:]

x [B, H, S, D] with any strides; cos, sin of one dtype, broadcastable to [B, 1, S, R], R <= D even,
used exactly as given (no assumption that their halves repeat). ``interleaved=False``:
rot([a, b]) = [-b, a] on halves (Llama, NeoX); ``True``: on pairs, rot(a0, b0, a1, b1, ...) =
(-b0, a0, -b1, a1, ...) (GPT-J). Products and sum in x's dtype when cos has x's dtype; the
result is rounded to x's dtype. y is laid out in memory as [B, S, H, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyfuse.kernels import _native
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


# --- CPU ---


def supports_native(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    return _native.rotary_reason(x, cos, sin) or _native.rows_reason(x)


def run_native(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _native.rope(x, None, None, cos, sin, None, None, None, interleaved)


OP = register(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    reference=reference,
    kernels=[Kernel("native", "cpu", supports_native, run_native)],
)
