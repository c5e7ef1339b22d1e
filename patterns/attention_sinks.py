"""Attention with a sink: a learned score per head that takes part in the softmax and brings no value.

    softmax([scale q k^T + bias, sink]) without its last column, times v

The sink is one more key, of zeros, whose bias is the sink and whose value is zero. The largest score may be taken off
before the softmax, which changes nothing but the range.
"""

import operator

import torch
import torch.nn.functional as F

from tinyfuse.graph.nodes import same_ones, same_size
from tinyfuse.graph.pattern import Check, Pattern, anything, call, cast, one_of, scalar, tensor
from tinyfuse.patterns.attention import HEADS, attention, one_size, q, rank_4
from tinyfuse.patterns.attention_softmax import DTYPES, in_fp32, shifted

bias, sinks = tensor("bias sinks")
factor, inside = scalar("factor"), anything("inside")


def attend_one_more_key(m, mask, sink):
    padding = (0, 0, 0, 1)
    mask = call(torch.cat, (mask, sink), 3)
    return [call(attention, m.q, call(F.pad, m.k, padding), call(F.pad, m.v, padding), mask, m.factor, False)]


def with_one_more_key(m):
    return attend_one_more_key(m, call(torch.Tensor.expand, m.bias, (-1, m.shape("q")[1], -1, -1)), m.sinks)


def fits(m):
    """The mask is that of each sequence for all heads, the sink one score per row."""
    mask, sink, (batch, heads) = m.shape("bias"), m.shape("sinks"), m.shape("q")[:2]
    one_sink = len(sink) == 4 and same_size(sink[3], 1) and same_size(sink[0], batch) and isinstance(heads, int)
    whole = len(mask) == 4 and same_ones(mask[2:], (m.shape("q")[2], m.shape("k")[2]))
    return one_sink and whole and same_size(mask[0], batch) and same_size(mask[1], 1)


def without_last(weights):
    return call(operator.getitem, weights, (Ellipsis, slice(None, -1, None)))


def masked(scores):
    return scores * factor + bias


def pattern(name, of_scores, heads, biased=masked, to=with_one_more_key, where=(), **more):
    """``more``: of the example."""
    scores = biased(call(torch.matmul, cast(q, "S"), call(torch.transpose, cast(heads.keys, "S"), 2, 3)))
    weights = call(torch.softmax, of_scores(call(torch.cat, (scores, sinks), 3)), 3, inside)
    kept = one_of(without_last(cast(weights, "D")), cast(without_last(weights), "D"))
    return Pattern(
        name=f"attention_{name}{heads.suffix}",
        stage="lift",
        roots=(call(torch.matmul, kept, heads.values),),
        where=(
            rank_4,
            one_size,
            Check(lambda m: in_fp32(m, m.S, m.inside, *(m.dtype(n) for n in ("bias", "sinks", *more))), DTYPES),
            heads.fit,
            Check(fits, "its mask is not [batch, 1, queries, keys], or its sink not [batch, heads, queries, 1]"),
            *where,
        ),
        to=to,
        example=lambda: (
            heads.example()
            | {"bias": torch.randn(2, 1, 5, 7), "sinks": torch.randn(1, 6, 1, 1).expand(2, 6, 5, 1)}
            | {"factor": 0.3, "inside": torch.float32, "S": torch.float32, "D": torch.float32, **more}
        ),
    )


FORMS = {"sink": lambda scores: scores, "sink_shifted": shifted}
SINKS = [pattern(name, of_scores, heads) for name, of_scores in FORMS.items() for heads in HEADS]
