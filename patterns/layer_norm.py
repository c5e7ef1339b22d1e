"""LayerNorm over the last dimension: ``F.layer_norm`` with or without weight and bias; written out in fp32."""

import torch
import torch.nn.functional as F

import tinyfuse.kernels.layer_norm  # noqa: F401
from tinyfuse.graph import nodes
from tinyfuse.graph.pattern import Check, Pattern, anything, call, cast, one_of, optional, scalar, tensor

norm = torch.ops.tinyfuse.layer_norm.default
x, weight = tensor("x weight")
w, b = optional("w b")
over = anything("over")
eps, dim = scalar("eps dim")
wide = cast(x, torch.float32)
mean = call(torch.mean, wide, dim, True)
spread = one_of(
    call(torch.mean, call(torch.pow, wide - mean, 2), dim, True), call(nodes.variance, wide, dim, False, True)
)
variance = spread + eps

layer_norm = Pattern(
    name="layer_norm",
    stage="lift",
    roots=(call(F.layer_norm, x, over, w, b, eps),),
    where=(Check(lambda m: len(m.over) == 1, "it normalises over more than the last dimension"),),
    to=lambda m: [call(norm, m.x, m.w, m.b, m.eps)],
    example=lambda: {
        "x": torch.randn(2, 3, 24),
        "over": (24,),
        "w": torch.randn(24),
        "b": torch.randn(24),
        "eps": 1e-5,
    },
)
written_out = Pattern(
    name="layer_norm_written_out",
    stage="lift",
    roots=(cast(cast(weight, torch.float32) * ((wide - mean) * call(torch.rsqrt, variance)), "D"),),
    where=(
        Check(lambda m: m.dim == m.value("x").dim() - 1, "it normalises over another dimension than the last"),
        Check(lambda m: m.D is m.dtype("x") is m.dtype("weight"), "its input, weight and result differ in dtype"),
        Check(
            lambda m: m.value("weight").dim() == 1 and m.shape("weight")[0] == m.shape("x")[-1],
            "its weight is not one value per channel",
        ),
    ),
    to=lambda m: [call(norm, m.x, m.weight, None, m.eps)],
    example=lambda: {
        "x": torch.randn(2, 3, 24).bfloat16(),
        "weight": torch.randn(24).bfloat16(),
        "eps": 1e-5,
        "dim": 2,
        "D": torch.bfloat16,
    },
)
