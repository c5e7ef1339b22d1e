"""A softcap of logits, ``c tanh(x / c)``. That of attention's scores is part of attention, which is larger and comes
first."""

import torch

import tinyfuse.kernels.softcap  # noqa: F401
from tinyfuse.graph.pattern import Check, Pattern, call, scalar, tensor

x, cap = tensor("x"), scalar("cap")

SOFTCAP = Pattern(
    name="softcap",
    stage="lift",
    roots=(call(torch.tanh, x / cap) * cap,),
    where=(Check(lambda m: isinstance(m.cap, (int, float)) and m.cap > 0, "its bound is no positive number"),),
    to=lambda m: [call(torch.ops.tinyfuse.softcap.default, m.x, float(m.cap))],
    example=lambda: {"x": 3 * torch.randn(2, 3, 8), "cap": 1.5},
)
