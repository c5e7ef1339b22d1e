"""Residual add, then RMS normalisation: s = x + residual (rounded to x's dtype), y = rms_norm(s).

x, residual [..., N] of one dtype; returns (s, y). See ``rms_norm`` for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyfuse.kernels import _native, _rows, rms_norm
from tinyfuse.op import Kernel, register


def reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, rms_norm.reference(total, weight, eps, unit_offset, cast_first)


# --- GPU ---


def supports_triton(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool
) -> str | None:
    return _rows.unsupported("add_rms_norm", x, residual) or _rows.unsupported_weight("add_rms_norm", x, weight)


def run_triton(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool
) -> tuple[Tensor, Tensor]:
    total = _rows.empty_sum(x, residual)
    y = torch.empty_like(total)
    rms_norm.launch(x, residual, weight, total, y, eps, unit_offset, cast_first)
    return total, y


# --- CPU ---


def supports_native(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool
) -> str | None:
    return _native.norm_reason(x, residual, weight, None)


def run_native(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool
) -> tuple[Tensor, Tensor]:
    return _native.norm(x, residual, weight, None, eps, False, unit_offset, cast_first)


OP = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, bool unit_offset, bool cast_first)"
    " -> (Tensor, Tensor)",
    reference=reference,
    kernels=[
        Kernel("triton", "cuda", supports_triton, run_triton),
        Kernel("native", "cpu", supports_native, run_native),
    ],
)
