"""Attention under a mask of positions, computed where it is needed instead of from [B, 1, S, L] booleans.

    key <= query  [and key > query - window]  [and held[row, key]],  expanded to all rows or not

Queries and keys are ``arange`` from a position on. A single token's mask is a row, which the decode kernels read.
"""

import operator

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tinyfuse.graph.nodes import same_size, value
from tinyfuse.graph.pattern import Check, Pattern, anything, call, one_of, scalar, tensor
from tinyfuse.kernels.causal_attention import prefills

ops = torch.ops.tinyfuse
ALL = slice(None, None, None)
q, k, v, rows, columns, batch, held = tensor("q k v rows columns batch held")
scale, softcap, window, spread = *scalar("scale softcap window"), anything("spread")


def shared(target, *args):
    """Other layers attend under the same mask."""
    return call(target, *args, shared=True)


query = shared(operator.getitem, rows, (None, None, ALL, None))
key = shared(operator.getitem, columns, (None, None, None, ALL))
causal = shared(operator.le, key, query)
recent = shared(operator.gt, key, shared(torch.sub, query, window))
sliding = shared(operator.and_, recent, causal)
row = shared(operator.getitem, batch, (ALL, None, None, None))
present = shared(operator.getitem, held, (row, key))
masks = [*(shared(operator.and_, seen, present) for seen in (sliding, causal)), sliding, causal]
mask = one_of(*masks, *(shared(torch.Tensor.expand, seen, spread) for seen in masks))
attends = [call(ops.attention.default, q, k, v, mask, scale, False, *cap) for cap in ((), (softcap,))]


def counting(node):
    """(start, count) of an int64 ``arange`` that is moved to a start, a number or a tensor of one; None for others."""
    start = 0
    if node.target is torch.add and len(node.args) == 2:
        node, start = node.args
    plain = isinstance(node, Node) and node.target is torch.arange and len(node.args) == 1
    if not plain or node.kwargs.keys() - {"device", "dtype"} or value(node).dtype != torch.int64:
        return None
    start = value(start)
    one = start.dim() == 0 and start.dtype == torch.int64 if isinstance(start, torch.Tensor) else is_integer(start)
    return (start, value(node.args[0])) if one else None


def is_integer(number):
    return isinstance(number, (int, torch.SymInt))


def counts(m, name, size):
    found = counting(m.captures[name])
    return found is not None and statically_known_true(found[1] == size)


def positions_fit(m):
    return counts(m, "rows", m.shape("q")[2]) and counts(m, "columns", m.shape("k")[2])


def padding_fits(m):
    """Indices from 0 on do not wrap around."""
    if "held" not in m.captures:
        return True
    start, sequences = counting(m.columns)[0], counts(m, "batch", m.shape("q")[0])
    flags = m.value("held").dim() == 2 and m.dtype("held") is torch.bool
    return flags and sequences and counting(m.batch)[0] == 0 and is_integer(start) and statically_known_true(start >= 0)


def kernel_fits(m):
    """Where each layer would make the mask, one for all is better. The CPU makes it in pieces."""
    q, k, v = (m.value(name) for name in "qkv")
    device = q.device.type
    return device == "cpu" or (device == "cuda" and prefills(q, k, v, None, None, None, None, 1.0) is None)


def fused(m):
    optional = [m.captures.get(name) for name in ("held", "window", "softcap")]
    return [call(ops.causal_attention.default, m.q, m.k, m.v, m.rows, m.columns, *optional[:2], m.scale, optional[2])]


positions = Pattern(
    name="causal_attention",
    stage="fuse",
    roots=(one_of(*attends),),
    where=(
        Check(lambda m: not same_size(m.shape("q")[2], 1), "it is of one token"),
        Check(positions_fit, "the positions of its mask do not count on, one for each query and each key"),
        Check(padding_fits, "its padding is not a bool for each key of each sequence"),
        Check(lambda m: type(window := m.captures.get("window", 1)) is int and window > 0, "its window is no number"),
        Check(kernel_fits, "no kernel computes its mask: that takes 16-bit inputs with a head_dim of 16 to 256"),
    ),
    to=fused,
    example=lambda: {
        "q": torch.randn(2, 6, 5, 8), "k": torch.randn(2, 3, 7, 8), "v": torch.randn(2, 3, 7, 8),
        "rows": call(torch.add, call(torch.arange, 5), 2), "columns": call(torch.arange, 7),
        "batch": call(torch.arange, 2), "held": torch.arange(16).view(2, 8) % 5 > 0,
        "window": 3, "spread": (2, -1, 5, 7), "scale": 0.3, "softcap": 1.5,
    },
)  # fmt: skip
