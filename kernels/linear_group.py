"""Linear layers that share their input, in one launch (q/k/v, gate/up): y_i = x W_i^T + b_i.

x [..., K]; weights[i] [N_i, K], scales[i], biases[i] as in ``linear``; no weight is copied.
Returns one contiguous [..., N_i] per weight.
"""

from __future__ import annotations

from torch import Tensor

from tinyfuse.kernels import linear
from tinyfuse.op import register


def reference(
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None]
) -> list[Tensor]:
    return [linear.reference(x, w, s, b, None) for w, s, b in zip(weights, scales, biases, strict=True)]


OP = register(
    "linear_group(Tensor x, Tensor[] weights, Tensor?[] scales, Tensor?[] biases) -> Tensor[]", reference=reference
)
