"""Residual add, then RMS normalisation: s = x + residual (rounded to x's dtype), y = rms_norm(s).

x, residual [..., N] of one dtype; returns (s, y). See ``rms_norm`` for the rest.
"""

from __future__ import annotations

from torch import Tensor

from tinyfuse.kernels import _native, rms_norm
from tinyfuse.op import Kernel, register


def reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, rms_norm.reference(total, weight, eps, unit_offset, cast_first)


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
    kernels=[Kernel("native", "cpu", supports_native, run_native)],
)
