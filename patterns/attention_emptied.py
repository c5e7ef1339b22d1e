"""Attention whose weights are set to zero where its scores were hidden: a query that sees no key gives zeros.

    fill(softmax(fill(q k^T / c + bias, -inf)), 0) v

Elsewhere the second fill changes nothing, since the softmax has given those keys no weight.
"""

import math

import torch

from tinyfuse.graph.nodes import same_shape, value
from tinyfuse.graph.pattern import Check, Pattern, anything, call, cast, scalar, tensor
from tinyfuse.patterns.attention import HEADS, attention, one_size, q, rank_4
from tinyfuse.patterns.attention_softmax import DTYPES, in_fp32, inverse

bias, shown = tensor("bias shown")
factor, inside = scalar("factor"), anything("inside")
sizes, sizes_again = anything("sizes sizes_again")


def hidden(shown, sizes):
    return call(torch.eq, call(torch.reshape, shown, sizes), False)


once, again = hidden(shown, sizes), hidden(shown, sizes_again)


def with_zeros(m):
    where = hidden(m.shown, m.sizes)
    mask = call(torch.masked_fill, m.bias, where, -math.inf)
    made = call(attention, m.q, m.k, m.v, mask, inverse(m), False)
    return [call(torch.masked_fill, made, call(torch.all, where, 3, True), 0.0)]


def pattern(heads):
    scores = call(torch.matmul, q, call(torch.transpose, heads.keys, 2, 3)) / factor + bias
    weights = cast(call(torch.softmax, call(torch.masked_fill, scores, once, -math.inf), 3, inside), "D")
    return Pattern(
        name=f"attention_emptied{heads.suffix}",
        stage="lift",
        roots=(call(torch.matmul, call(torch.masked_fill, weights, again, 0), heads.values),),
        where=(
            rank_4,
            one_size,
            Check(lambda m: in_fp32(m, m.inside, m.dtype("bias")), DTYPES),
            heads.fit,
            Check(lambda m: same_shape(value(m.nodes[once]), value(m.nodes[again])), "it hides and empties others"),
            Check(lambda m: len(m.shape("bias")) == 4, "its mask does not have 4 dimensions"),
        ),
        to=with_zeros,
        example=lambda: (
            heads.example()
            | {"bias": torch.randn(2, 6, 5, 7), "shown": (torch.rand(2, 5, 7) < 0.7).int(), "factor": 3.0}
            | {"inside": torch.float32, "D": torch.float32, "sizes": (2, 1, 5, 7), "sizes_again": (2, 1, 5, 7)}
        ),
    )


EMPTIED = [pattern(heads) for heads in HEADS]
