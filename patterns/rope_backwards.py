"""Rotary embedding that turns the other way, ``x * cos + [b, -a] * sin`` of the halves a and b of a head."""

import torch

from tinyfuse.graph.pattern import call
from tinyfuse.patterns.rope import half, last, layouts, part, tables, turned, two_halves, x


def halves(source):
    return call(torch.cat, [part(source, half, None), -part(source, None, half)], last)


def other_way(m):
    cos, sin = tables(m)
    return cos, call(torch.neg, sin)


WHOLE = layouts("rope_backwards", turned(x, halves), False, two_halves, 8, tables=other_way, half=4, last=3)
