"""The tables of a rotary embedding, cos(p f) and sin(p f), of which a model makes one pair for all of its layers.

The angle is the outer product of positions and frequencies, as a product or as a matrix product over one element.
"""

import operator

import torch

import tinyfuse.kernels.rope_tables  # noqa: F401
from tinyfuse.graph import nodes
from tinyfuse.graph.pattern import Check, Pattern, anything, call, cast, one_of, scalar, tensor

positions, frequencies = tensor("positions frequencies")
scale = scalar("scale")
full = slice(None, None, None)

column = cast(call(operator.getitem, positions, (Ellipsis, None)), torch.float32)
row = cast(call(operator.getitem, positions, (full, None, full)), torch.float32)
factors = call(operator.getitem, frequencies, (None, full, None))
per_batch = call(torch.Tensor.expand, factors, (anything("batch"), -1, 1))


def outer(factors):
    return call(torch.transpose, call(torch.matmul, factors, row), 1, 2)


angle = one_of(column * frequencies, outer(factors), outer(per_batch))
angles = call(torch.cat, [angle, angle], 2)


def to(m):
    made = call(torch.ops.tinyfuse.rope_tables.default, m.positions, m.frequencies, m.scale, m.D)
    return [call(operator.getitem, made, i) for i in range(2)]


rope_tables = Pattern(
    name="rope_tables",
    stage="lift",
    roots=(cast(call(torch.cos, angles) * scale, "D"), cast(call(torch.sin, angles) * scale, "D")),
    where=(
        Check(
            lambda m: m.value("positions").dim() == 2 and m.value("frequencies").dim() == 1,
            "its positions are not [batch, tokens], or its frequencies not a row",
        ),
        Check(
            lambda m: not m.dtype("positions").is_floating_point and m.dtype("frequencies") is torch.float32,
            "its positions are no integers or its frequencies not in fp32",
        ),
        Check(
            lambda m: m.D is not torch.float32 or not any(u.target is nodes.cast for r in m.roots for u in r.users),
            "the rounding of its result is part of it",
        ),
    ),
    to=to,
    example=lambda: {
        "positions": torch.randint(0, 5000, (2, 3)), "frequencies": torch.rand(8), "scale": 1.25, "batch": 2,
        "D": torch.bfloat16,
    },
)  # fmt: skip
