"""RMSNorm as models spell it: fp32 statistics, then one of two cast orders.

Most round the normalised value to the model's dtype and then multiply by the weight; others multiply in fp32 and round
once, as ``F.rms_norm`` does. The weight is ``w``, ``1 + w`` or none. ``x * rsqrt(v)`` is also written
``x * pow(v, -0.5)`` and ``x / sqrt(v)``; ``x * rsqrt(v)`` is in fp32 whether x is cast to it or promoted. Without a
weight, the factor may be rounded to the model's dtype too: one rounding more.
"""

import torch
import torch.nn.functional as F

import tinyfuse.kernels.rms_norm  # noqa: F401
from tinyfuse.graph.pattern import Check, Pattern, anything, call, cast, one_of, optional, scalar, tensor

rms_norm = torch.ops.tinyfuse.rms_norm.default

x, w = tensor("x w")
eps, dim = scalar("eps dim")
wide = cast(x, torch.float32)
square = one_of(call(torch.pow, wide, 2), wide * wide, call(torch.square, wide))
variance = call(torch.mean, square, dim, True) + eps
factor = one_of(call(torch.rsqrt, variance), call(torch.pow, variance, -0.5))
normed = one_of(wide * factor, wide / call(torch.sqrt, variance), x * call(torch.rsqrt, variance))

over_last = Check(lambda m: m.dim == m.value("x").dim() - 1, "it normalises over another dimension than the last")
same_dtype = Check(lambda m: m.D is m.dtype("x"), "its result has another dtype than its input")
floating = Check(lambda m: m.dtype("x").is_floating_point and m.dtype("x") is not torch.float64, "the input is fp64")
row_weight = Check(
    lambda m: m.value("w").dim() == 1 and m.shape("w")[0] == m.shape("x")[-1], "its weight is not one value per channel"
)


def example(**more):
    return {"x": torch.randn(2, 3, 24).bfloat16(), "eps": 1e-5, "dim": 2, "D": torch.bfloat16, **more}


def weighted(name, root, unit_offset, cast_first, *where):
    return Pattern(
        name=name,
        stage="lift",
        roots=(root,),
        where=(over_last, same_dtype, floating, row_weight, *where),
        to=lambda m: [call(rms_norm, m.x, m.w, m.eps, unit_offset, cast_first)],
        example=lambda: example(w=torch.randn(24).bfloat16()),
    )


weight_dtype = Check(lambda m: m.dtype("w") is m.D, "its weight has another dtype")
wide_w = cast(w, torch.float32)
WEIGHTED = [
    weighted("rms_norm", w * cast(normed, "D"), False, True, weight_dtype),
    weighted("rms_norm_offset_after_cast", (1.0 + w) * cast(normed, "D"), True, True, weight_dtype),
    weighted("rms_norm_wide_weight", cast(normed * one_of(wide_w, w), "D"), False, False),
    weighted("rms_norm_offset", cast(normed * (1.0 + wide_w), "D"), True, False),
]
plain = Pattern(
    name="rms_norm_no_weight",
    stage="lift",
    roots=(one_of(cast(normed, "D"), x * cast(factor, "D")),),
    where=(over_last, same_dtype, floating),
    to=lambda m: [call(rms_norm, m.x, None, m.eps, False, True)],
    example=example,
)
gain, over = optional("gain"), anything("over")
stock = Pattern(
    name="rms_norm_stock",
    stage="lift",
    roots=(call(F.rms_norm, x, over, gain, eps),),
    where=(
        Check(lambda m: len(m.over) == 1, "it normalises over more than the last dimension"),
        Check(lambda m: m.gain is None or m.dtype("gain") is m.dtype("x"), "its weight has another dtype"),
        floating,
    ),
    to=lambda m: [call(rms_norm, m.x, m.gain, m.eps, False, False)],
    example=lambda: example(gain=torch.randn(24).bfloat16(), over=(24,)),
)
