"""Rotary embedding, ``x * cos + rotate(x) * sin``, of the halves of a head or of its front.

Matched when cos and sin have one entry per position for all heads, x being [B, H, S, D] or [B, S, H, D], and when the
products are computed in x's dtype or in fp32 and rounded to x's dtype at the end, or left in fp32.
"""

import operator

import torch
from torch.fx import Node

import tinyfuse.kernels.rope  # noqa: F401
from tinyfuse.graph import nodes
from tinyfuse.graph.nodes import same_size
from tinyfuse.graph.pattern import Check, Pattern, call, cast, one_of, scalar, tensor

rope = torch.ops.tinyfuse.rope.default
x, cos, sin = tensor("x cos sin")
half, width, last = scalar("half width last")


def part(source, start, stop):
    return call(operator.getitem, source, (Ellipsis, slice(start, stop, None)))


def halves(source):
    return call(torch.cat, [-part(source, half, None), part(source, None, half)], last)


def turned(source, rotated):
    """In the dtype W of the products, to which both copies of x are cast, or promoted by cos; rounded to D."""
    other = one_of(rotated(cast(source, "W")), cast(rotated(source), "W"))
    return cast(cast(source, "W") * cos + other * sin, "D")


def swap(tensor):
    return call(torch.transpose, tensor, 1, 2)


def factor(m):
    """The dtype in which x is multiplied, where the spelling has a place for a cast."""
    return m.captures.get("W", m.dtype("x"))


def products(m):
    return torch.promote_types(factor(m), m.dtype("cos"))


def one_rounding(m):
    """To x's dtype, or none: then the result has that of the products."""
    wide = torch.promote_types(m.dtype("x"), factor(m)) is factor(m) and products(m) in (m.dtype("x"), torch.float32)
    return wide and m.D in (m.dtype("x"), products(m)) and m.dtype("cos") is m.dtype("sin")


def as_result(m, source):
    return source if m.dtype("x") is m.D else call(nodes.cast, source, m.D)


rank_4 = Check(
    lambda m: all(m.value(name).dim() == 4 for name in ("x", "cos", "sin")), "its tensors do not have 4 dimensions"
)
rounded_once = Check(one_rounding, "it computes in another dtype than x's or fp32, or its result has yet another")


def positions(heads_dim):
    return Check(
        lambda m: same_size(m.shape("cos")[heads_dim], 1) and same_size(m.shape("sin")[heads_dim], 1),
        "cos and sin differ between heads",
    )


def more_rows(m):
    """Whether cos or sin have several rows where x has one, which is then repeated."""
    ones = [dim for dim, size in enumerate(m.shape("x")) if same_size(size, 1)]
    return not all(same_size(m.shape(name)[dim], 1) for name in ("cos", "sin") for dim in ones)


repeats_nothing = Check(lambda m: not more_rows(m), "its input is repeated for the rows of cos and sin")


def tables(m):
    """In the dtype of the products."""
    kept = m.dtype("cos") is products(m)
    return [table if kept else call(nodes.cast, table, products(m)) for table in (m.cos, m.sin)]


def layouts(name, root, interleaved, where, rotated, dtype=torch.float32, tables=tables, **example):
    """Patterns for ``root`` of x as [B, H, S, D], of x as [B, S, H, D], and with a transposition after the latter;
    ``rotated``: how many channels of the example's 8 are turned; ``dtype``: that of the example; ``tables``: those that
    the rotation takes, given the match."""

    def plain(m):
        return call(rope, as_result(m, m.x), *tables(m), interleaved)

    def swapped(m):
        return call(rope, swap(as_result(m, m.x)), *map(swap, tables(m)), interleaved)

    def of(suffix, root, heads_dim, to):
        sizes = {"x": (2, 3, 5, 8), "cos": (2, 1, 5, rotated), "sin": (2, 1, 5, rotated)}
        order = (0, heads_dim, 3 - heads_dim, 3)
        return Pattern(
            name=name + suffix,
            stage="lift",
            roots=(root,),
            where=(rank_4, rounded_once, positions(heads_dim), repeats_nothing, where),
            to=lambda m: [to(m)],
            example=lambda: (
                {n: torch.randn([s[i] for i in order]).to(dtype) for n, s in sizes.items()}
                | {"W": torch.float32, "D": dtype}
                | example
            ),
        )

    return [
        of("", root, 1, plain),
        of("_bshd", root, 2, lambda m: swap(swapped(m))),
        of("_bshd_transposed", swap(root), 2, swapped),
    ]


def split_in_middle(m):
    if isinstance(m.half, Node):
        return False
    return m.last == 3 and 2 * m.half == m.shape("cos")[3] == m.shape("sin")[3]


two_halves = Check(lambda m: split_in_middle(m) and m.shape("x")[3] == 2 * m.half, "it does not turn two halves")
front_halves = Check(lambda m: split_in_middle(m) and m.width == 2 * m.half, "it does not turn two halves")

WHOLE = layouts("rope", turned(x, halves), False, two_halves, 8, half=4, last=3)
PARTIAL = layouts(
    "rope_partial",
    call(torch.cat, [turned(part(x, None, width), halves), part(x, width, None)], last),
    False,
    front_halves,
    4,
    half=2,
    width=4,
    last=3,
)
