"""Residual add, then a norm: one kernel that also gives the sum, which the next residual needs."""

import operator

import torch
from torch.fx import Node

import tinyfuse.kernels.add_layer_norm
import tinyfuse.kernels.add_rms_norm  # noqa: F401
from tinyfuse.graph.nodes import is_static, same_shape, value
from tinyfuse.graph.pattern import Check, Pattern, anything, call, optional, scalar, tensor
from tinyfuse.kernels import _gemm, _gemv

ops = torch.ops.tinyfuse
x, residual = tensor("x residual")
w, b = optional("w b")
eps = scalar("eps")
unit_offset, cast_first = anything("unit_offset cast_first")
total = x + residual

alike = Check(
    lambda m: m.dtype("x") is m.dtype("residual") and same_shape(m.value("x"), m.value("residual")),
    "the sum broadcasts or promotes",
)


def takes_residual(node):
    """Whether ``node`` is a linear of few rows, whose kernels add a residual before their one rounding. What is left
    of the norm can then go into the linear layers that follow it."""
    if not isinstance(node, Node) or node.target is not ops.linear.default or len(node.users) > 1:
        return False
    rows, _, scale, _, residual = node.args
    shape = value(rows).shape
    few = _gemv.MOST_ROWS if scale is None else _gemm.most_rows(value(rows).dtype)
    return residual is None and is_static(value(rows)) and shape.numel() <= few * shape[-1]


unclaimed = Check(
    lambda m: not (takes_residual(m.x) or takes_residual(m.residual)), "the linear layer before it adds the residual"
)


def both(made):
    return [call(operator.getitem, made, 1), call(operator.getitem, made, 0)]


def rows(**more):
    return {"x": torch.randn(2, 3, 24), "residual": torch.randn(2, 3, 24), "w": torch.randn(24), "eps": 1e-5, **more}


add_rms_norm = Pattern(
    name="add_rms_norm",
    stage="fuse",
    roots=(call(ops.rms_norm.default, total, w, eps, unit_offset, cast_first), total),
    where=(alike, unclaimed),
    to=lambda m: both(call(ops.add_rms_norm.default, m.x, m.residual, m.w, m.eps, m.unit_offset, m.cast_first)),
    example=lambda: rows(unit_offset=False, cast_first=True),
)
add_layer_norm = Pattern(
    name="add_layer_norm",
    stage="fuse",
    roots=(call(ops.layer_norm.default, total, w, b, eps), total),
    where=(alike,),
    to=lambda m: both(call(ops.add_layer_norm.default, m.x, m.residual, m.w, m.b, m.eps)),
    example=lambda: rows(b=torch.randn(24)),
)
