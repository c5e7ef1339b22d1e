"""Rotary embedding, ``x * cos + rotate(x) * sin``: on halves (Llama), part of the head (NeoX, Phi) or pairs (GPT-J).

Matched when cos and sin have x's dtype and one entry per position for all heads.
"""

import operator

import torch

import tinyfuse.kernels.rope  # noqa: F401
from tinyfuse.graph.nodes import same_size
from tinyfuse.graph.pattern import Check, Pattern, call, one_of, scalar, tensor

rope = torch.ops.tinyfuse.rope.default
x, cos, sin = tensor("x cos sin")
half, width, last = scalar("half width last")


def part(source, start, stop):
    return call(operator.getitem, source, (Ellipsis, slice(start, stop, None)))


def turned(source, rotated):
    return source * cos + rotated * sin


def halves(source):
    return call(torch.cat, [-part(source, half, None), part(source, None, half)], last)


one_dtype = Check(
    lambda m: m.dtype("x") is m.dtype("cos") and m.dtype("x") is m.dtype("sin"), "cos and sin have another dtype than x"
)
rank_4 = Check(
    lambda m: all(m.value(name).dim() == 4 for name in ("x", "cos", "sin")), "its tensors do not have 4 dimensions"
)


def positions(heads_dim):
    return Check(
        lambda m: same_size(m.shape("cos")[heads_dim], 1) and same_size(m.shape("sin")[heads_dim], 1),
        "cos and sin differ between heads",
    )


def split_in_middle(m):
    return m.last == 3 and 2 * m.half == m.shape("cos")[3] == m.shape("sin")[3]


def tables(*shape):
    return {"cos": torch.randn(shape), "sin": torch.randn(shape)}


rotate_half = Pattern(
    name="rope",
    stage="lift",
    roots=(turned(x, halves(x)),),
    where=(
        rank_4,
        one_dtype,
        positions(1),
        Check(lambda m: split_in_middle(m) and m.shape("x")[3] == m.shape("cos")[3], "it does not turn two halves"),
    ),
    to=lambda m: [call(rope, m.x, m.cos, m.sin, False)],
    example=lambda: {"x": torch.randn(2, 3, 5, 8), "half": 4, "last": 3} | tables(2, 1, 5, 8),
)

front = part(x, None, width)
partial = Pattern(
    name="rope_partial",
    stage="lift",
    roots=(call(torch.cat, [turned(front, halves(front)), part(x, width, None)], last),),
    where=(
        rank_4,
        one_dtype,
        positions(1),
        Check(lambda m: split_in_middle(m) and m.width == m.shape("cos")[3], "it does not turn two halves"),
    ),
    to=lambda m: [call(rope, m.x, m.cos, m.sin, False)],
    example=lambda: {"x": torch.randn(2, 3, 5, 8), "half": 2, "width": 4, "last": 3} | tables(2, 1, 5, 4),
)


def pairs(source):
    def every_second(start):
        full = slice(None, None, None)
        return call(operator.getitem, source, (full, full, full, slice(start, None, 2)))

    stacked = call(torch.stack, [-every_second(1), one_of(every_second(None), every_second(0))], scalar("stack_dim"))
    return call(torch.flatten, stacked, scalar("flat_dim"), scalar("end_dim"))


def interleaved_parts(m):
    return m.stack_dim in (-1, 4) and m.flat_dim == 3 and m.end_dim == 4


def swap(tensor):
    return call(torch.transpose, tensor, 1, 2)


interleaved = Pattern(
    name="rope_interleaved",
    stage="lift",
    roots=(turned(x, pairs(x)),),
    where=(
        rank_4,
        one_dtype,
        positions(2),
        Check(
            lambda m: interleaved_parts(m) and m.shape("x")[3] == m.shape("cos")[3] == m.shape("sin")[3],
            "it does not turn pairs",
        ),
    ),
    to=lambda m: [swap(call(rope, swap(m.x), swap(m.cos), swap(m.sin), True))],
    example=lambda: {"x": torch.randn(2, 5, 3, 8), "stack_dim": -1, "flat_dim": 3, "end_dim": 4} | tables(2, 5, 1, 8),
)
