"""Rotary embedding written as its two halves, ``[a cos - b sin, b cos + a sin]``, with tables of half a head.

a and b are the halves of a head, or its even and odd channels, which leave as halves.
"""

import operator

import torch

from tinyfuse.graph.nodes import same_size
from tinyfuse.graph.pattern import Check, Pattern, call, cast, scalar
from tinyfuse.patterns.rope import as_result, cos, positions, rank_4, repeats_nothing, rope, rounded_once, sin, swap, x
from tinyfuse.patterns.rope_pairs import every_second

last, parts, dim = scalar("last parts dim")


def half(number):
    return call(operator.getitem, chunks, number)


def twice(table):
    return call(torch.cat, (table, table), 3)


def written_out(a, b):
    return cast(call(torch.cat, [a * cos - b * sin, b * cos + a * sin], last), "D")


whole = Check(
    lambda m: m.last == 3 and all(same_size(m.shape("x")[3], 2 * m.shape(name)[3]) for name in ("cos", "sin")),
    "its halves are not those of a head",
)
in_two = Check(lambda m: m.parts == 2 and m.dim == 3, "it is not cut into halves")
chunks = call(torch.chunk, x, parts, dim)


def of(name, a, b, where, source):
    """``source``: x with a in its first half and b in its second, given the match."""

    def plain(m):
        return [call(rope, as_result(m, source(m)), twice(m.cos), twice(m.sin), False)]

    def swapped(m):
        return [swap(call(rope, swap(as_result(m, source(m))), twice(swap(m.cos)), twice(swap(m.sin)), False))]

    def pattern(suffix, heads_dim, to):
        order = (0, heads_dim, 3 - heads_dim, 3)
        shapes = {"x": (2, 3, 5, 8), "cos": (2, 1, 5, 4), "sin": (2, 1, 5, 4)}
        return Pattern(
            name=name + suffix,
            stage="lift",
            roots=(written_out(a, b),),
            where=(rank_4, rounded_once, positions(heads_dim), repeats_nothing, whole, *where),
            to=to,
            example=lambda: (
                {n: torch.randn([s[i] for i in order]) for n, s in shapes.items()}
                | {"last": 3, "parts": 2, "dim": 3, "D": torch.float32}
            ),
        )

    return [pattern("", 1, plain), pattern("_bshd", 2, swapped)]


def gathered(m):
    return call(torch.cat, (every_second(m.x, 0), every_second(m.x, 1)), 3)


HALVES = of("rope_halves", half(0), half(1), (in_two,), lambda m: m.x)
PAIRS = of("rope_halves_of_pairs", every_second(x, 0), every_second(x, 1), (), gathered)
