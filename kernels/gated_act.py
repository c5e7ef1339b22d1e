"""Gated activation: y = act(gate) * up (Shazeer, 2020).

gate, up [..., N] of one shape and dtype, any strides (the halves of a merged projection are views);
y contiguous, in their dtype; act(gate) is rounded to the dtype before the product, as eager code does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from tinyfuse.op import register

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def reference(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return (ACTIVATIONS[act](gate) * up).contiguous()


OP = register("gated_act(Tensor gate, Tensor up, str act) -> Tensor", reference=reference)
