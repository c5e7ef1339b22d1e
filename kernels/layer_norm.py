"""Layer normalisation over the last dimension (Ba, Kiros and Hinton, 2016).

    y = (x - mean(x)) * (var(x) + eps)^(-1/2) * w + b

x [..., N]; weight, bias [N] or None; var is the biased variance; y has x's shape and dtype.
Statistics and the affine map run in fp32 with one rounding at the end, as ``F.layer_norm`` does.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tinyfuse.op import register


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


OP = register("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor", reference=reference)
