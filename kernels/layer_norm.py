"""Layer normalisation over the last dimension (Ba, Kiros and Hinton, 2016).

    y = (x - mean(x)) * (var(x) + eps)^(-1/2) * w + b

x [..., N]; weight, bias [N] or None; var is the biased variance; y has x's shape and dtype.
Statistics and the affine map run in fp32 with one rounding at the end, as ``F.layer_norm`` does.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tinyfuse.kernels import _native
from tinyfuse.op import Kernel, register


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


# --- CPU ---


def supports_native(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    return _native.norm_reason(x, None, weight, bias)


def run_native(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _native.norm(x, None, weight, bias, eps, True, False, False)[1]


OP = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=reference,
    kernels=[Kernel("native", "cpu", supports_native, run_native)],
)
