"""Attention as products around a softmax in fp32 or in the model's dtype, ``softmax(scale q k^T + bias) v``.

The scores may be computed in fp32, divided after the bias is added, filled where hidden, or lowered by the largest,
which changes nothing but their range.
"""

import operator

import torch
from torch.fx import Node

from tinyfuse.graph import nodes
from tinyfuse.graph.pattern import Check, Pattern, anything, call, cast, scalar, tensor
from tinyfuse.patterns.attention import HEADS, attention, one_size, q, rank_4

bias, hidden, factor, fill, inside = *tensor("bias hidden"), *scalar("factor fill"), anything("inside")
DTYPES = "q, k, v and weights differ in dtype, or what is between them is neither in it nor in fp32"
NEVER = -1e30  # added to a score in fp32, nothing of the score is left


def filled(scores):
    return call(torch.masked_fill, scores * factor + bias, hidden, fill)


def shifted(scores):
    return scores - call(operator.getitem, call(nodes.max_along, scores, 3, True), 0)


def inverse(m):
    return call(operator.truediv, 1.0, m.factor) if isinstance(m.factor, Node) else 1.0 / m.factor


def hides(m):
    fill = m.captures.get("fill", NEVER)
    return not isinstance(fill, Node) and fill <= NEVER


# What becomes of the scores; the scale and the bias of the attention that it is.
FORMS = {
    "plain": (lambda scores: scores, lambda m: 1.0, lambda m: None),
    "times": (lambda scores: scores * factor, lambda m: m.factor, lambda m: None),
    "over": (lambda scores: scores / factor, inverse, lambda m: None),
    "plain_masked": (lambda scores: scores + bias, lambda m: 1.0, lambda m: m.bias),
    "times_masked": (lambda scores: scores * factor + bias, lambda m: m.factor, lambda m: m.bias),
    "over_masked": (lambda scores: scores / factor + bias, inverse, lambda m: m.bias),
    "times_masked_shifted": (
        lambda scores: shifted(scores * factor + bias),
        lambda m: m.factor,
        lambda m: m.bias,
    ),
    "masked_over": (
        lambda scores: (scores + bias) / factor,
        inverse,
        lambda m: call(torch.div, m.bias, m.factor),
    ),
    "times_masked_filled": (filled, lambda m: m.factor, lambda m: call(torch.masked_fill, m.bias, m.hidden, m.fill)),
}


def alike(m, *names):
    """Whether those of the tensors that are bound have the dtype D."""
    return all(m.dtype(name) is m.D for name in names if name in m.captures)


def in_fp32(m, *between):
    """Whether q, k, v and the weights have the dtype D, and those of ``between`` D or fp32."""
    return alike(m, "q", "k", "v") and all(dtype in (None, m.D, torch.float32) for dtype in between)


def dtypes_fit(m):
    return in_fp32(m, m.S, m.inside, m.dtype("bias") if "bias" in m.captures else None)


two_dims = Check(lambda m: "bias" not in m.captures or m.value("bias").dim() > 1, "its mask has one dimension")


def between_matmuls(name, form, heads, **more):
    """``more``: of the example."""
    of_scores, scale, mask = form
    scores = call(torch.matmul, cast(q, "S"), call(torch.transpose, cast(heads.keys, "S"), 2, 3))
    weights = cast(call(torch.softmax, of_scores(scores), 3, inside), "D")

    def fused(m):
        cap = [m.cap] if "cap" in m.captures else []
        return [call(attention, m.q, m.k, m.v, mask(m), scale(m), False, *cap)]

    return Pattern(
        name=f"attention_{name}{heads.suffix}",
        stage="lift",
        roots=(call(torch.matmul, weights, heads.values),),
        where=(
            rank_4,
            one_size,
            two_dims,
            Check(dtypes_fit, DTYPES),
            heads.fit,
            Check(hides, "what it hides keeps a part of its score"),
        ),
        to=fused,
        example=lambda: (
            heads.example()
            | {"bias": torch.randn(2, 1, 5, 7), "hidden": torch.rand(2, 1, 5, 7) < 0.3, "fill": -3e38}
            | {"factor": 0.3, "inside": torch.float32, "S": torch.float32, "D": torch.float32, **more}
        ),
    )


SOFTMAX = [between_matmuls(f"softmax_{name}", form, heads) for name, form in FORMS.items() for heads in HEADS]
