"""Residual add, then layer normalisation: s = x + residual (rounded to x's dtype), y = layer_norm(s).

x, residual [..., N] of one dtype; returns (s, y). See ``layer_norm`` for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyfuse.kernels import _native, _rows, layer_norm
from tinyfuse.op import Kernel, register


def reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, layer_norm.reference(total, weight, bias, eps)


# --- GPU ---


def supports_triton(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    name = "add_layer_norm"
    return _rows.unsupported(name, x, residual, columns=True) or _rows.unsupported_weight(name, x, weight, bias)


def run_triton(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = _rows.empty_sum(x, residual)
    y = torch.empty_like(total, memory_format=torch.contiguous_format)
    layer_norm.launch(x, residual, weight, bias, total, y, eps)
    return total, y


# --- CPU ---


def supports_native(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    return _native.norm_reason(x, residual, weight, bias)


def run_native(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _native.norm(x, residual, weight, bias, eps, True, False, False)


OP = register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    reference=reference,
    kernels=[
        Kernel("triton", "cuda", supports_triton, run_triton),
        Kernel("native", "cpu", supports_native, run_native),
    ],
)
