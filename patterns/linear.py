"""Linear layers: ``F.linear``, and transformers' ``Conv1D`` (``addmm`` with a transposed weight)."""

import torch
import torch.nn.functional as F

import tinyfuse.kernels.linear  # noqa: F401
from tinyfuse.graph.nodes import same_shape, same_size
from tinyfuse.graph.pattern import Check, Pattern, anything, call, optional, tensor

linear_op = torch.ops.tinyfuse.linear.default
x, w, bias = tensor("x w bias")
b = optional("b")
rows, shape = anything("rows shape")

one_dtype = Check(lambda m: m.dtype("x") is m.dtype("w"), "input and weight differ in dtype")
matrix = Check(lambda m: m.value("w").dim() == 2 and m.value("x").dim() > 1, "its weight is not a matrix")

linear = Pattern(
    name="linear",
    stage="lift",
    roots=(call(F.linear, x, w, b),),
    where=(one_dtype, matrix),
    to=lambda m: [call(linear_op, m.x, m.w, None, m.b, None)],
    example=lambda: {"x": torch.randn(2, 3, 8), "w": torch.randn(6, 8), "b": torch.randn(6)},
)


def keeps_rows(m):
    """The product of all rows is given the input's leading shape back."""
    result, source = m.roots[0].meta["example_value"], m.value("x")
    return (
        result.dim() == source.dim()
        and all(map(same_size, result.shape[:-1], source.shape[:-1]))
        and same_size(result.shape[-1], m.shape("w")[1])
        and same_size(source.shape[-1], m.shape("w")[0])
        and m.value("bias").dim() == 1
    )


conv1d = Pattern(
    name="linear_conv1d",
    stage="lift",
    roots=(call(torch.reshape, call(torch.addmm, bias, call(torch.reshape, x, rows), w), shape),),
    where=(one_dtype, matrix, Check(keeps_rows, "its reshapes mix rows")),
    to=lambda m: [call(linear_op, m.x, call(torch.transpose, m.w, 0, 1), None, m.bias, None)],
    example=lambda: {
        "x": torch.randn(2, 3, 8), "w": torch.randn(8, 6), "bias": torch.randn(6), "rows": (-1, 8), "shape": (2, 3, 6),
    },
)  # fmt: skip
linear_residual = Pattern(
    name="linear_residual",
    stage="fuse",
    roots=(call(linear_op, x, w, optional("scale"), b, None) + tensor("residual"),),
    where=(
        Check(
            lambda m: (
                m.dtype("x") is m.dtype("residual")
                and same_shape(m.value("residual"), m.roots[0].meta["example_value"])
            ),
            "the sum broadcasts or promotes",
        ),
    ),
    to=lambda m: [call(linear_op, m.x, m.w, m.scale, m.b, m.residual)],
    example=lambda: linear.example() | {"residual": torch.randn(2, 3, 6), "scale": None},
)
