"""Gated activations, ``act(gate) * up``, and their fusion into the gate and up projections."""

import operator

import torch

import tinyfuse.kernels.gated_act
import tinyfuse.kernels.gated_linear  # noqa: F401
from tinyfuse.graph.nodes import same_shape, value
from tinyfuse.graph.pattern import Check, Pattern, anything, call, optional, scalar, tensor
from tinyfuse.patterns.linear_act import CONSTANTS, constants, spellings

ops = torch.ops.tinyfuse
gate, up, x, w, w_gate, w_up = tensor("gate up x w w_gate w_up")
s, b, s_gate, s_up, b_gate, b_up = optional("s b s_gate s_up b_gate b_up")
act, first, second = anything("act first second")

alike = Check(
    lambda m: m.dtype("gate") is m.dtype("up") and same_shape(m.value("gate"), m.value("up")),
    "gate and up differ in shape or dtype",
)


def lift(name, activation):
    return Pattern(
        name=f"gated_{name}",
        stage="lift",
        roots=(activation * up,),
        where=(alike, *constants),
        to=lambda m: [call(ops.gated_act.default, m.gate, m.up, name)],
        example=lambda: {"gate": torch.randn(2, 3, 8), "up": torch.randn(2, 3, 8), **CONSTANTS},
    )


GATED = [lift(name, activation) for name, activation in spellings(gate).items()]

gated_linear = Pattern(
    name="gated_linear",
    stage="fuse",
    roots=(
        call(
            ops.gated_act.default,
            call(ops.linear.default, x, w_gate, s_gate, b_gate, None),
            call(ops.linear.default, x, w_up, s_up, b_up, None),
            act,
        ),
    ),
    where=(Check(lambda m: (m.s_gate is None) == (m.s_up is None), "one of the weights is quantised, the other not"),),
    to=lambda m: [call(ops.gated_linear.default, m.x, m.w_gate, m.w_up, m.s_gate, m.s_up, m.b_gate, m.b_up, m.act)],
    example=lambda: {
        "x": torch.randn(2, 3, 8), "w_gate": torch.randn(6, 8), "w_up": torch.randn(6, 8), "act": "silu",
        "s_gate": None, "s_up": None, "b_gate": None, "b_up": None,
    },
)  # fmt: skip

halves = call(torch.chunk, call(ops.linear.default, x, w, s, b, None), 2, scalar("dim"))


def split_rows(m):
    """The two halves of a merged projection are two projections by the halves of its weight."""
    middle = m.shape("w")[0] // 2
    parts = [slice(None, middle), slice(middle, None)]

    def pick(tensor, half):
        return tensor if tensor is None else call(operator.getitem, tensor, parts[half])

    picked = [pick(tensor, half) for tensor in (m.w, m.s, m.b) for half in (m.first, m.second)]
    return [call(ops.gated_linear.default, m.x, *picked, m.act)]


merged = Pattern(
    name="gated_linear_merged",
    stage="fuse",
    roots=(
        call(
            ops.gated_act.default,
            call(operator.getitem, halves, first),
            call(operator.getitem, halves, second),
            act,
        ),
    ),
    where=(
        Check(lambda m: m.dim == m.value("x").dim() - 1, "the projection is not split along its features"),
        Check(lambda m: {m.first, m.second} == {0, 1}, "gate and up are the same half"),
        Check(lambda m: value(m.w).shape[0] % 2 == 0, "the projection has an odd number of features"),
    ),
    to=split_rows,
    example=lambda: {
        "x": torch.randn(2, 3, 8), "w": torch.randn(12, 8), "s": None, "b": torch.randn(12), "dim": 2,
        "first": 0, "second": 1, "act": "silu",
    },
)  # fmt: skip
