"""RMS normalisation over the last dimension (Zhang and Sennrich, 2019).

    y = x * (mean(x^2) + eps)^(-1/2) * g,    g = w, 1 + w or 1

x [..., N]; weight [N] or None; y has x's shape and dtype. The mean and the product run in fp32.
``cast_first``: the normalised value is rounded to x's dtype before the weight multiplies it (Llama);
otherwise the product is fp32 and is rounded once (Gemma, OLMo 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyfuse.kernels import _native
from tinyfuse.op import Kernel, register


def reference(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast_first:
        gain = 1.0 + weight if unit_offset else weight
        return (gain * normed.to(x.dtype)).to(x.dtype)
    gain = 1.0 + weight.float() if unit_offset else weight.float()
    return (gain * normed).to(x.dtype)


# --- CPU ---


def supports_native(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool) -> str | None:
    return _native.norm_reason(x, None, weight, None)


def run_native(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool) -> Tensor:
    return _native.norm(x, None, weight, None, eps, False, unit_offset, cast_first)[1]


OP = register(
    "rms_norm(Tensor x, Tensor? weight, float eps, bool unit_offset, bool cast_first) -> Tensor",
    reference=reference,
    kernels=[Kernel("native", "cpu", supports_native, run_native)],
)
