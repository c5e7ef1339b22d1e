"""Linear layers as matrix products: ``x @ w.T``, ``x @ w``, and of columns ``w @ x.T = (x @ w.T).T``."""

import torch

from tinyfuse.graph.pattern import Check, Pattern, call
from tinyfuse.patterns.linear import linear_op, matrix, w, x

floating = Check(
    lambda m: m.dtype("x") is m.dtype("w") and m.dtype("x").is_floating_point, "input and weight differ in dtype"
)


def turned(t):
    return call(torch.transpose, t, 0, 1)


rows = Pattern(
    name="linear_matmul",
    stage="lift",
    roots=(call(torch.matmul, x, turned(w)),),
    where=(floating, matrix),
    to=lambda m: [call(linear_op, m.x, m.w, None, None, None)],
    example=lambda: {"x": torch.randn(2, 3, 8), "w": torch.randn(6, 8)},
)
columns = Pattern(
    name="linear_matmul_columns",
    stage="lift",
    roots=(call(torch.matmul, x, w),),
    where=(floating, matrix),
    to=lambda m: [call(linear_op, m.x, turned(m.w), None, None, None)],
    example=lambda: {"x": torch.randn(2, 3, 8), "w": torch.randn(8, 6)},
)
weight_first = Pattern(
    name="linear_matmul_weight_first",
    stage="lift",
    roots=(call(torch.matmul, w, call(torch.transpose, x, 1, 2)),),
    where=(
        floating,
        Check(lambda m: m.value("w").dim() == 2 and m.value("x").dim() == 3, "its weight is not a matrix"),
    ),
    to=lambda m: [call(torch.transpose, call(linear_op, m.x, m.w, None, None, None), 1, 2)],
    example=lambda: {"x": torch.randn(2, 3, 8), "w": torch.randn(6, 8)},
)
