"""RMS norms of which only the factor is written, in fp32.

The L2 norm ``x / sqrt(sum(x^2) + eps)`` of N channels is ``rms_norm(x)`` with ``eps / N``, divided by ``sqrt(N)``. And
a factor of a whole row goes through a linear layer: ``(x W^T) * rsqrt(mean(x^2) + eps) = rms_norm(x) W^T``.
"""

import torch
import torch.nn.functional as F

from tinyfuse.graph import nodes
from tinyfuse.graph.pattern import Check, Pattern, call, cast, one_of, scalar, tensor
from tinyfuse.patterns.rms_norm import floating, over_last, rms_norm, same_dtype

x, w = tensor("x w")
eps, dim = scalar("eps dim")
single = Check(lambda m: m.dtype("x") is torch.float32, "it is not in fp32")
wide = cast(x, torch.float32)
total = call(torch.sum, one_of(wide * wide, call(torch.pow, wide, 2)), dim, True) + eps
mean = call(torch.mean, one_of(call(torch.square, x), call(torch.pow, x, 2), x * x), dim, True) + eps


def scaled(m):
    """The division is that of a weight, so that it costs no pass over x."""
    channels = m.shape("x")[-1]
    in_fp32 = call(nodes.cast, call(torch.Tensor.new_empty, m.x, (0,)), torch.float32)
    weight = call(torch.Tensor.new_full, in_fp32, (channels,), channels**-0.5)
    return [call(rms_norm, m.x, weight, m.eps / channels, False, False)]


l2_norm = Pattern(
    name="rms_norm_l2",
    stage="lift",
    roots=(cast(one_of(wide * call(torch.rsqrt, total), wide / call(torch.sqrt, total)), "D"),),
    where=(
        over_last,
        same_dtype,
        floating,
        Check(lambda m: isinstance(m.shape("x")[-1], int), "its number of channels changes from call to call"),
        Check(lambda m: isinstance(m.eps, float), "its eps is computed"),
    ),
    to=scaled,
    example=lambda: {"x": torch.randn(2, 3, 24).bfloat16(), "eps": 1e-6, "dim": 2, "D": torch.bfloat16},
)
after_linear = Pattern(
    name="rms_norm_after_linear",
    stage="lift",
    roots=(call(F.linear, x, w, None) * call(torch.rsqrt, mean),),
    where=(over_last, single),
    to=lambda m: [call(F.linear, call(rms_norm, m.x, None, m.eps, False, True), m.w, None)],
    example=lambda: {"x": torch.randn(2, 3, 24), "w": torch.randn(6, 24), "eps": 1e-5, "dim": 2},
)
