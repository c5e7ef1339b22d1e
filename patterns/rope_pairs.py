"""Rotary embedding of neighbouring channels, ``x * cos + rotate(x) * sin`` with rotate(a, b, ...) = (-b, a, ...): the
whole head or its front."""

import operator

import torch

from tinyfuse.graph.pattern import Check, call, one_of, scalar
from tinyfuse.patterns.rope import last, layouts, part, turned, width, x

stack_dim, flat_dim, end_dim = scalar("stack_dim flat_dim end_dim")


def every_second(source, start):
    return call(operator.getitem, source, (Ellipsis, slice(start, None, 2)))


def pairs(source):
    even = one_of(every_second(source, None), every_second(source, 0))
    stacked = call(torch.stack, [-every_second(source, 1), even], stack_dim)
    return call(torch.flatten, stacked, flat_dim, end_dim)


def neighbours(m):
    in_pairs = m.stack_dim in (-1, 4) and m.flat_dim == 3 and m.end_dim == 4
    return in_pairs and m.shape("cos")[3] == m.shape("sin")[3]


whole = Check(lambda m: neighbours(m) and m.shape("x")[3] == m.shape("cos")[3], "it does not turn pairs")
front = Check(
    lambda m: neighbours(m) and m.last == 3 and m.width == m.shape("cos")[3], "it does not turn pairs of the front"
)
DIMS = {"stack_dim": -1, "flat_dim": 3, "end_dim": 4}

WHOLE = layouts("rope_pairs", turned(x, pairs), True, whole, 8, torch.bfloat16, **DIMS)
PARTIAL = layouts(
    "rope_pairs_partial",
    call(torch.cat, [turned(part(x, None, width), pairs), part(x, width, None)], last),
    True,
    front,
    4,
    width=4,
    last=3,
    **DIMS,
)
