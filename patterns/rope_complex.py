"""Rotary embedding as a complex product: neighbouring channels a + bi times cos + i sin."""

import operator

import torch

from tinyfuse.graph.nodes import same_ones, same_size, value
from tinyfuse.graph.pattern import Check, Pattern, anything, call, cast, scalar, tensor
from tinyfuse.patterns.rope import rope, swap, x

turns, shape, flat_dim, end_dim = tensor("turns"), anything("shape"), *scalar("flat_dim end_dim")
FULL = slice(None, None, None)
grouped = call(torch.reshape, cast(x, torch.float32), shape)


def turned(by):
    product = call(torch.view_as_complex, grouped) * by
    return cast(call(torch.flatten, call(torch.view_as_real, product), flat_dim, end_dim), "D")


def in_pairs(m):
    """Only the last dim is cut, and put together again."""
    before, after = m.shape("x"), value(m.nodes[grouped]).shape
    same = len(before) == 4 and len(after) == 5 and after[4] == 2 and all(map(same_size, before[:3], after[:3]))
    return same and m.flat_dim == 3 and m.end_dim == 4 and same_size(before[3], 2 * m.shape("turns")[2])


def tables(m):
    by = call(torch.unsqueeze, m.turns, 1)
    return [call(torch.repeat_interleave, call(part, by), 2, 3) for part in (torch.real, torch.imag)]


where = (
    Check(
        lambda m: m.value("turns").dim() == 3 and m.dtype("turns") is torch.complex64,
        "its turns are not one complex64 number per position and pair",
    ),
    Check(in_pairs, "it does not turn pairs"),
    Check(
        lambda m: same_ones(m.shape("x"), m.roots[0].meta["example_value"].shape),
        "its input is repeated for the rows of its turns",
    ),
    Check(lambda m: m.D is m.dtype("x") and m.D is not torch.float64, "its result has another dtype than its input"),
)


def example(*shape):
    turns = torch.polar(torch.ones(2, 5, 4), torch.randn(2, 5, 4))
    dims = {"shape": (*shape[:3], 4, 2), "flat_dim": 3, "end_dim": 4, "D": torch.bfloat16}
    return {"x": torch.randn(shape).bfloat16(), "turns": turns} | dims


heads_second = Pattern(
    name="rope_complex",
    stage="lift",
    roots=(turned(call(torch.unsqueeze, turns, 1, shared=True)),),
    where=where,
    to=lambda m: [call(rope, m.x, *tables(m), True)],
    example=lambda: example(2, 3, 5, 8),
)
heads_third = Pattern(
    name="rope_complex_bshd",
    stage="lift",
    roots=(turned(call(operator.getitem, turns, (FULL, FULL, None, FULL))),),
    where=where,
    to=lambda m: [swap(call(rope, swap(m.x), *tables(m), True))],
    example=lambda: example(2, 5, 3, 8),
)
