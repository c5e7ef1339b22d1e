"""Cosines and sines of a rotary embedding: cos(p f) * scale and sin(p f) * scale, once for each half of the head.

positions [B, S] int32 or int64, frequencies [R / 2] fp32; two contiguous [B, S, R] in ``dtype``. The angle, its cosine
and the product with ``scale`` are rounded to fp32, as in eager code.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels import _native, _triton
from tinyfuse.kernels._triton import Launch, interpreted, jit, pdl, tl, triton
from tinyfuse.op import Kernel, register

MAX_HALF = 1024
FEW = 16  # tokens up to which one core makes the tables as fast as torch, whose vectors then take over


def reference(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> list[Tensor]:
    angle = positions[..., None].float() * frequencies
    angle = torch.cat((angle, angle), -1)
    return [(angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)]


def fake(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> list[Tensor]:
    shape = *positions.shape, 2 * frequencies.shape[0]
    return [frequencies.new_empty(shape, dtype=dtype) for _ in range(2)]


def _not_tables(positions: Tensor, frequencies: Tensor) -> str | None:
    if positions.dim() != 2 or positions.dtype not in (torch.int32, torch.int64) or positions.numel() == 0:
        return "the rotary positions are not integers [batch, tokens]"
    if frequencies.dtype is not torch.float32 or frequencies.dim() != 1 or frequencies.stride(0) != 1:
        return "the rotary frequencies are not one fp32 row"
    if frequencies.shape[0] > MAX_HALF:
        return f"the rotary kernel takes at most {MAX_HALF} frequencies"
    return None


# --- CPU ---


def supports_native(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> str | None:
    if reason := _not_tables(positions, frequencies):
        return reason
    if positions.numel() > FEW or dtype not in _native.FLOATING:
        return f"the CPU makes rotary tables of up to {FEW} tokens in floating dtypes"
    return _native.reason(frequencies)


def run_native(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> list[Tensor]:
    cos, sin = fake(positions, frequencies, scale, dtype)
    _native.rope_tables(positions, frequencies, scale, cos, sin)
    return [cos, sin]


# --- GPU ---


@jit(do_not_specialize=["S", "stride_b", "stride_s"])
def _rope_tables(
    positions, frequencies, cos, sin, S, stride_b, stride_s, scale,
    HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, LIBDEVICE: tl.constexpr,
):  # fmt: skip
    """Program: a token. ``LIBDEVICE``: the functions that eager code calls, which the interpreter lacks."""
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token // S * stride_b + token % S * stride_s)
    angle = position.to(tl.float32) * tl.load(frequencies + i, mask=inside, other=0.0)
    if LIBDEVICE:
        c, s = tl.extra.cuda.libdevice.cos(angle), tl.extra.cuda.libdevice.sin(angle)
    else:
        c, s = tl.cos(angle), tl.sin(angle)
    at = token * (2 * HALF) + i
    c, s = (c * scale).to(cos.dtype.element_ty), (s * scale).to(sin.dtype.element_ty)
    tl.store(cos + at, c, mask=inside)
    tl.store(cos + at + HALF, c, mask=inside)
    tl.store(sin + at, s, mask=inside)
    tl.store(sin + at + HALF, s, mask=inside)


@lru_cache(4096)
def _bind(
    batch: int, length: int, strides: tuple[int, ...], half: int, scale: float, ahead: bool, *_dtypes_device: Any
) -> Launch:
    scalars = length, *strides, scale, half, triton.next_power_of_2(half), ahead, not interpreted()
    return Launch(_rope_tables, (batch * length,), scalars, 1, ahead)


def supports_triton(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> str | None:
    return _not_tables(positions, frequencies) or _triton.missing


def run_triton(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> list[Tensor]:
    half = frequencies.shape[0]
    cos, sin = fake(positions, frequencies, scale, dtype)
    launch = _bind(
        *positions.shape, positions.stride(), half, scale, pdl(cos.device), dtype, positions.dtype, cos.device
    )
    launch(positions, frequencies, cos, sin)
    return [cos, sin]


OP = register(
    "rope_tables(Tensor positions, Tensor frequencies, float scale, ScalarType dtype) -> Tensor[]",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("triton", "cuda", supports_triton, run_triton),
        Kernel("native", "cpu", supports_native, run_native),
    ],
)
