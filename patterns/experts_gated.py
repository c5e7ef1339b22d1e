"""Gated activations of experts, act(gate) * up of the halves of one product, fused into that product.

Where rows of no expert are set to zero in between, they are after it: act(0) * 0 = 0.
"""

import operator

import torch

import tinyfuse.kernels.experts_gated_linear  # noqa: F401
from tinyfuse.graph.pattern import Check, Pattern, anything, call, one_of, optional, tensor

ops = torch.ops.tinyfuse
x, w, mask = tensor("x w mask")
s, offs, ids = optional("s offs ids")
act = anything("act")

product = call(ops.experts_linear.default, x, w, s, offs, ids)
halves = call(torch.chunk, one_of(product, call(torch.masked_fill, product, mask, 0.0)), 2, 1)


def to(m):
    made = call(ops.experts_gated_linear.default, m.x, m.w, m.s, m.offs, m.ids, m.act)
    return [call(torch.masked_fill, made, m.mask, 0.0) if "mask" in m.captures else made]


gated = Pattern(
    name="gated_experts",
    stage="fuse",
    roots=(call(ops.gated_act.default, call(operator.getitem, halves, 0), call(operator.getitem, halves, 1), act),),
    where=(
        Check(lambda m: m.shape("w")[1] % 2 == 0, "the projection has an odd number of features"),
        Check(lambda m: "mask" not in m.captures or m.shape("mask")[-1] == 1, "single features are masked"),
    ),
    to=to,
    example=lambda: {
        "x": torch.randn(5, 8), "w": torch.randn(3, 12, 8), "s": None, "ids": None, "act": "silu",
        "offs": torch.tensor([2, 2, 5], dtype=torch.int32), "mask": torch.tensor([[False]] * 4 + [[True]]),
    },
)  # fmt: skip
