"""Attention whose sink is a factor: ``softmax(s) v * sigmoid(logsumexp(s) - sink)`` with ``s = scale q k^T + bias``.

The factor is what the sink leaves to the keys in a softmax over both, so this is the attention of ``attention_sinks``.
"""

import operator

import torch

from tinyfuse.graph.nodes import same_ones, same_size
from tinyfuse.graph.pattern import Check, Pattern, anything, call, cast, one_of, scalar, tensor
from tinyfuse.patterns.attention import HEADS, one_size, q, rank_4
from tinyfuse.patterns.attention_sinks import attend_one_more_key
from tinyfuse.patterns.attention_softmax import alike

bias, sinks = tensor("bias sinks")
factor, spread = scalar("factor"), anything("spread")


def with_one_more_key(m):
    heads = m.shape("q")[1]
    mask = call(torch.Tensor.expand, m.bias, (-1, heads, -1, -1))
    none = call(torch.zeros_like, call(operator.getitem, mask, (Ellipsis, slice(None, 1, None))))
    return attend_one_more_key(m, mask, none + call(torch.reshape, m.sinks, (1, heads, 1, 1)))


def fits(m):
    mask, (batch, heads) = m.shape("bias"), m.shape("q")[:2]
    one_sink = tuple(m.spread) == (1, -1, 1) and isinstance(heads, int) and m.shape("sinks") == (heads,)
    whole = len(mask) == 4 and same_ones(mask[3:], m.shape("k")[2:3])
    return whole and same_size(mask[0], batch) and same_size(mask[1], 1) and one_sink


def pattern(heads):
    scores = call(torch.matmul, q, call(torch.transpose, heads.keys, 2, 3)) * factor + bias
    left = call(torch.logsumexp, scores, 3, False) - call(torch.reshape, sinks, spread)
    weights = cast(call(torch.softmax, scores, 3, one_of(None, torch.float32)), "D")
    share = call(torch.unsqueeze, call(torch.sigmoid, cast(left, torch.float32)), -1)
    return Pattern(
        name=f"attention_sink_factor{heads.suffix}",
        stage="lift",
        roots=(call(torch.matmul, weights, heads.values) * cast(share, "D"),),
        where=(
            rank_4,
            one_size,
            Check(lambda m: alike(m, "q", "k", "v", "bias", "sinks"), "q, k, v, mask and sink differ in dtype"),
            heads.fit,
            Check(fits, "its mask is not [batch, 1, queries, keys], or its sink not [heads]"),
        ),
        to=with_one_more_key,
        example=lambda: (
            heads.example()
            | {"bias": torch.randn(2, 1, 5, 7), "sinks": torch.randn(6), "spread": (1, -1, 1)}
            | {"factor": 0.3, "D": torch.float32}
        ),
    )


FACTORS = [pattern(heads) for heads in HEADS]
