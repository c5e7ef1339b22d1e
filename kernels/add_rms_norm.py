"""Residual add, then RMS normalisation: s = x + residual (rounded to x's dtype), y = rms_norm(s).

x, residual [..., N] of one dtype; returns (s, y). See ``rms_norm`` for the rest.
"""

from __future__ import annotations

from torch import Tensor

from tinyfuse.kernels import rms_norm
from tinyfuse.op import register


def reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, rms_norm.reference(total, weight, eps, unit_offset, cast_first)


OP = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, bool unit_offset, bool cast_first)"
    " -> (Tensor, Tensor)",
    reference=reference,
)
