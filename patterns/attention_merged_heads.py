"""Attention as batched products over [batch * heads, tokens, head_dim], alone or added to ALiBi."""

import torch

from tinyfuse.graph import nodes
from tinyfuse.graph.nodes import same_ones, same_size, value
from tinyfuse.graph.pattern import Check, Pattern, anything, call, cast, one_of, scalar, tensor
from tinyfuse.patterns.attention import attention, example, k, q, rank_4, v
from tinyfuse.patterns.attention_softmax import two_dims

bias, added, alpha = *tensor("bias added"), scalar("alpha")


def reshaped(source, name):
    return call(torch.reshape, source, anything(f"{name}_shape"))


queries, keys, values = reshaped(q, "queries"), reshaped(k, "keys"), reshaped(v, "values")
transposed = call(torch.transpose, keys, 1, 2)
IN_FP32 = one_of(None, torch.float32)


def shape(m, expr):
    return value(m.nodes[expr]).shape


def same(found, *expected):
    return len(found) == len(expected) and all(map(same_size, found, expected))


def merged(m):
    """Batch and heads are one dim of the products, and two of q, k, v."""
    tensors = {name: m.shape(name) for name in "qkv"}
    flat = [(shape(m, e), tensors[n]) for n, e in (("q", queries), ("k", keys), ("v", values)) if e in m.nodes]
    heads = all(same(t[:2], *m.shape("q")[:2]) for t in tensors.values()) and isinstance(m.shape("q")[1], int)
    return heads and all(same(s, t[0] * t[1], *t[2:]) for s, t in flat)


def pattern(name, root, scores, to, where=(), rows=1):
    """``scores``: those in four dims; ``rows`` of the example's 5 that its added bias has."""

    def split(m):
        batch, heads, rows, _ = m.shape("q")
        whole = same(m.roots[0].meta["example_value"].shape, batch, heads, rows, m.shape("v")[3])
        return whole and same(shape(m, scores), batch, heads, rows, m.shape("k")[2])

    shapes = {"queries": (12, 5, 8), "keys": (12, 7, 8), "values": (12, 7, 8), "scores": (2, 6, 5, 7)}
    shapes |= {"flat": (12, 5, 7), "out": (2, 6, 5, 8)}
    return Pattern(
        name=f"attention_{name}",
        stage="lift",
        roots=(root,),
        where=(
            rank_4,
            two_dims,
            Check(lambda m: m.dtype("q") is m.dtype("bias") is m.dtype("v"), "its mask has another dtype"),
            Check(lambda m: merged(m) and split(m), "its products are not over batch and heads"),
            *where,
        ),
        to=to,
        example=lambda: (
            example(bias=torch.randn(2, 1, 5, 7), added=torch.randn(12, rows, 7), alpha=0.3, D=torch.float32)
            | {f"{name}_shape": sizes for name, sizes in shapes.items()}
        ),
    )


of_bmm = reshaped(call(torch.bmm, queries, transposed), "scores")
flat = reshaped(of_bmm + bias, "flat")
plain = pattern(
    "merged_heads",
    reshaped(call(torch.bmm, cast(call(torch.softmax, flat, 2, IN_FP32), "D"), values), "out"),
    of_bmm,
    lambda m: [call(attention, m.q, m.k, m.v, m.bias, 1.0, False)],
)
of_baddbmm = reshaped(call(nodes.baddbmm, added, queries, transposed, 1.0, alpha), "scores")
weights = cast(call(torch.softmax, of_baddbmm + bias, 3, IN_FP32), "D")


def positioned(m):
    """The mask with what is added to the products, which for ALiBi is one row for each head."""
    return call(torch.add, call(torch.unflatten, m.added, 0, (-1, m.shape("q")[1])), m.bias)


where = (
    Check(lambda m: m.dtype("added") is m.dtype("q"), "its bias has another dtype"),
    Check(lambda m: same_ones(m.shape("added")[:-2], shape(m, queries)[:1]), "its bias is not that of each head"),
)


def biased(m):
    return [call(attention, m.q, m.k, m.v, positioned(m), m.alpha, False)]


merged_again = reshaped(call(torch.bmm, reshaped(weights, "flat"), values), "out")
alibi = pattern("baddbmm", merged_again, of_baddbmm, biased, where)
scores_only = pattern("baddbmm_scores", call(torch.matmul, weights, v), of_baddbmm, biased, where, rows=5)
