"""Attention over [batch * heads, tokens, head_dim] whose scores get a bias there, before they are split by head
(He et al., 2021: the bias is what positions add to the content's scores).

    softmax(fill(q k^T + bias)) v

The keys come transposed, with the scale in them; what is hidden gets a score that no weight is left of.
"""

import torch

from tinyfuse.graph.nodes import same_size
from tinyfuse.graph.pattern import Check, Pattern, anything, call, cast, one_of, scalar, tensor
from tinyfuse.patterns.attention import attention
from tinyfuse.patterns.attention_merged_heads import same, shape
from tinyfuse.patterns.attention_softmax import hides

q, keys, v, bias, hidden = tensor("q keys v bias hidden")
fill, split, merged, out = scalar("fill"), *anything("split merged out")

scores = call(torch.reshape, call(torch.bmm, q, keys) + bias, split)
weights = cast(call(torch.softmax, call(torch.masked_fill, scores, hidden, fill), 3, one_of(None, torch.float32)), "D")
flat = call(torch.reshape, weights, merged)


def splits(m):
    """Heads are a dim of the scores and of the result, and everything else of the products stays as it is."""
    (groups, rows, _), columns = m.shape("q"), m.shape("keys")[2]
    batch, heads, *square = shape(m, scores)
    whole = isinstance(heads, int) and same_size(batch * heads, groups) and same(square, rows, columns)
    alike = same(m.shape("bias"), groups, rows, columns) and same(shape(m, flat), groups, rows, columns)
    return whole and alike and same(m.roots[0].meta["example_value"].shape, batch, heads, rows, m.shape("v")[2])


def by_head(m):
    def parted(x):
        return call(torch.unflatten, x, 0, (-1, shape(m, scores)[1]))

    mask = call(torch.masked_fill, parted(m.bias), m.hidden, m.fill)
    return [call(attention, parted(m.q), parted(call(torch.transpose, m.keys, 1, 2)), parted(m.v), mask, 1.0, False)]


merged_bias = Pattern(
    name="attention_merged_bias",
    stage="lift",
    roots=(call(torch.reshape, call(torch.bmm, flat, v), out),),
    where=(
        Check(lambda m: m.D is m.dtype("q") is m.dtype("keys") is m.dtype("v") is m.dtype("bias"), "its dtypes differ"),
        Check(splits, "its products are not over batch and heads"),
        Check(hides, "what it hides keeps a part of its score"),
    ),
    to=by_head,
    example=lambda: {
        "q": torch.randn(12, 5, 8), "keys": torch.randn(12, 8, 7), "v": torch.randn(12, 7, 8), "fill": -3e38,
        "bias": torch.randn(12, 5, 7), "hidden": torch.rand(2, 1, 5, 7) < 0.3, "D": torch.float32,
        "split": (2, 6, 5, 7), "merged": (12, 5, 7), "out": (2, 6, 5, 8),
    },
)  # fmt: skip
