"""LayerNorm over the last dimension: ``F.layer_norm`` with or without weight and bias."""

import torch
import torch.nn.functional as F

import tinyfuse.kernels.layer_norm  # noqa: F401
from tinyfuse.graph.pattern import Check, Pattern, anything, call, optional, scalar, tensor

x = tensor("x")
w, b = optional("w b")
over = anything("over")
eps = scalar("eps")

layer_norm = Pattern(
    name="layer_norm",
    stage="lift",
    roots=(call(F.layer_norm, x, over, w, b, eps),),
    where=(Check(lambda m: len(m.over) == 1, "it normalises over more than the last dimension"),),
    to=lambda m: [call(torch.ops.tinyfuse.layer_norm.default, m.x, m.w, m.b, m.eps)],
    example=lambda: {
        "x": torch.randn(2, 3, 24),
        "over": (24,),
        "w": torch.randn(24),
        "b": torch.randn(24),
        "eps": 1e-5,
    },
)
