"""LayerNorm that rounds to the model's dtype before its weight and bias: ``w * norm(x) + b``.

The norm is recognised by itself. In fp32, where nothing is rounded in between, weight and bias become part of it.
"""

import torch

import tinyfuse.kernels.layer_norm  # noqa: F401
from tinyfuse.graph.pattern import Check, Pattern, call, cast, one_of, scalar, tensor
from tinyfuse.patterns.layer_norm import mean, norm, variance, wide

x, w, b = tensor("x w b")
eps = scalar("eps")
centred = wide - mean

unscaled = Pattern(
    name="layer_norm_no_weight",
    stage="lift",
    roots=(cast(one_of(centred / call(torch.sqrt, variance), centred * call(torch.rsqrt, variance)), "D"),),
    where=(
        Check(lambda m: m.dim == m.value("x").dim() - 1, "it normalises over another dimension than the last"),
        Check(lambda m: m.D is m.dtype("x"), "its result has another dtype than its input"),
        Check(lambda m: m.dtype("x").is_floating_point and m.dtype("x") is not torch.float64, "the input is fp64"),
    ),
    to=lambda m: [call(norm, m.x, None, None, m.eps)],
    example=lambda: {"x": torch.randn(2, 3, 24).bfloat16(), "eps": 1e-5, "dim": 2, "D": torch.bfloat16},
)
affine = Pattern(
    name="layer_norm_affine",
    stage="fuse",
    roots=(call(norm, x, None, None, eps) * w + b,),
    where=(
        Check(
            lambda m: m.dtype("x") is m.dtype("w") is m.dtype("b") is torch.float32,
            "its result is rounded before the weight",
        ),
        Check(
            lambda m: m.shape("w") == m.shape("b") == m.shape("x")[-1:],
            "its weight or bias is not one value per channel",
        ),
    ),
    to=lambda m: [call(norm, m.x, m.w, m.b, m.eps)],
    example=lambda: {"x": torch.randn(2, 3, 24), "w": torch.randn(24), "b": torch.randn(24), "eps": 1e-5},
)
