"""RMS norm into the linear layers that alone take its result: q/k/v, gate and up, the head."""

import operator

import torch

import tinyfuse.kernels.rms_norm_gated_linear
import tinyfuse.kernels.rms_norm_linear_group  # noqa: F401
from tinyfuse.graph.pattern import Pattern, anything, call, optional, scalar, tensor

ops = torch.ops.tinyfuse
x, w_gate = tensor("x w_gate")
weight, w_up, s_gate, s_up, b_gate, b_up = optional("weight w_up s_gate s_up b_gate b_up")
eps = scalar("eps")
unit_offset, cast_first, act = anything("unit_offset cast_first act")
normed = call(ops.rms_norm.default, x, weight, eps, unit_offset, cast_first)


def norm(m):
    return m.x, m.weight, m.eps, m.unit_offset, m.cast_first


def rows(**more):
    args = {"x": torch.randn(2, 3, 8), "weight": torch.randn(8), "eps": 1e-5, "unit_offset": False, "cast_first": True}
    return args | more


def members(count):
    return [(tensor(f"w{i}"), optional(f"s{i}"), optional(f"b{i}")) for i in range(count)]


def group(count):
    def to(m):
        parts = [[getattr(m, f"{kind}{i}") for i in range(count)] for kind in "wsb"]
        return [call(ops.rms_norm_linear_group.default, *norm(m), *parts)]

    def example():
        weights = {f"w{i}": torch.randn(5 + i, 8) for i in range(count)}
        return rows(**weights, **{f"{kind}{i}": None for kind in "sb" for i in range(count)})

    parts = [list(part) for part in zip(*members(count), strict=True)]
    root = call(ops.linear_group.default, normed, *parts)
    return Pattern(name=f"rms_norm_linear_group_{count}", stage="fuse", roots=(root,), to=to, example=example)


def one(m):
    made = call(ops.rms_norm_linear_group.default, *norm(m), [m.w0], [m.s0], [m.b0])
    return [call(operator.getitem, made, 0)]


three, two = group(3), group(2)
single = Pattern(
    name="rms_norm_linear",
    stage="fuse",
    roots=(call(ops.linear.default, normed, *members(1)[0], None),),
    to=one,
    example=lambda: rows(w0=torch.randn(5, 8), s0=None, b0=torch.randn(5)),
)
gated = Pattern(
    name="rms_norm_gated_linear",
    stage="fuse",
    roots=(call(ops.gated_linear.default, normed, w_gate, w_up, s_gate, s_up, b_gate, b_up, act),),
    to=lambda m: [
        call(ops.rms_norm_gated_linear.default, *norm(m), m.w_gate, m.w_up, m.s_gate, m.s_up, m.b_gate, m.b_up, m.act)
    ],
    example=lambda: rows(
        w_gate=torch.randn(6, 8), w_up=torch.randn(6, 8), s_gate=None, s_up=None, b_gate=None, b_up=None, act="silu"
    ),
)
