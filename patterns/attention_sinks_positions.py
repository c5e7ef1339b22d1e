"""Attention with sinks whose scores get a bias of positions before the mask, ``scale q k^T + positions + mask``."""

import torch

from tinyfuse.graph.nodes import same_size
from tinyfuse.graph.pattern import Check, call, tensor
from tinyfuse.patterns.attention import HEADS
from tinyfuse.patterns.attention_sinks import attend_one_more_key, bias, factor, pattern

positions = tensor("positions")


def biased(scores):
    return scores * factor + positions + bias


def with_one_more_key(m):
    """The bias of positions has a row for each head, as the mask for all has not."""
    return attend_one_more_key(m, call(torch.add, m.positions, m.bias), m.sinks)


by_head = Check(
    lambda m: len(m.shape("positions")) == 4 and same_size(m.shape("positions")[1], m.shape("q")[1]),
    "its bias of positions is not that of each head",
)
EXAMPLE = torch.arange(420.0).view(2, 6, 5, 7).sin()
POSITIONS = [
    pattern("sink_positions", lambda s: s, heads, biased, with_one_more_key, (by_head,), positions=EXAMPLE)
    for heads in HEADS
]
