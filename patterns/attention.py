"""Attention: SDPA with every argument, ``repeat_kv`` absorbed."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import tinyfuse.kernels.attention  # noqa: F401
from tinyfuse.graph.nodes import same_ones, same_size, sdpa, value
from tinyfuse.graph.pattern import Check, Expr, Pattern, anything, call, optional, tensor

attention = torch.ops.tinyfuse.attention.default
q, k, v = tensor("q k v")
mask = optional("mask")
is_causal, scale, gqa = anything("is_causal scale gqa")
FULL = slice(None, None, None)


def repeated(source, name):
    """``repeat_kv``: [B, Hkv, L, D] to [B, Hkv * groups, L, D]."""
    spread = call(operator.getitem, source, (FULL, FULL, None, FULL, FULL))
    return call(torch.reshape, call(torch.Tensor.expand, spread, anything(f"{name}_expand")), anything(f"{name}_shape"))


def heads_repeat(m):
    """Both reshapes merge kv heads with their groups and nothing else."""
    result = m.roots[0].meta["example_value"]
    for name, merged in (("k", HEADS[0].keys), ("v", HEADS[0].values)):
        groups = m.captures[f"{name}_expand"][2]
        shape = m.captures[f"{name}_shape"]
        if not isinstance(groups, int) or len(shape) != 4 or not same_size(m.shape(name)[1] * groups, shape[1]):
            return False
        if not same_ones(m.shape(name)[2:], value(m.nodes[merged]).shape[2:]):
            return False
    return same_size(value(m.q).shape[1], result.shape[1])


def equal_heads(m):
    return same_size(m.shape("q")[1], m.shape("k")[1]) and same_size(m.shape("k")[1], m.shape("v")[1])


def heads_fit(m):
    q_heads, k_heads, v_heads = (m.shape(name)[1] for name in ("q", "k", "v"))
    return same_size(k_heads, v_heads) and (m.gqa or k_heads == 1 or same_size(q_heads, k_heads))


def scale_of(m):
    """SDPA's default scale is 1 / sqrt(head_dim)."""
    return 1 / math.sqrt(m.shape("q")[3]) if m.scale is None else m.scale


rank_4 = Check(
    lambda m: all(m.value(name).dim() == 4 for name in ("q", "k", "v")), "its tensors do not have 4 dimensions"
)


def repeats_nothing(m):
    """q, k and v are of as many sequences, k and v of as many tokens, and the mask has no more rows than q."""
    (batch, _, keys, _), result = m.shape("k"), m.roots[0].meta["example_value"].shape
    alike = all(same_ones((batch, keys), (m.shape(n)[0], m.shape(n)[2] if n == "v" else keys)) for n in ("q", "v"))
    return alike and same_ones(m.shape("q")[:3], result[:3])


one_size = Check(repeats_nothing, "a sequence, a head or a row is repeated for those of another tensor")
known_scale = Check(
    lambda m: m.scale is not None or isinstance(m.shape("q")[3], int), "its scale depends on a dynamic head_dim"
)


def example(**more):
    shapes = {"q": (2, 6, 5, 8), "k": (2, 6, 7, 8), "v": (2, 6, 7, 8)}
    made = {name: torch.randn(shape) for name, shape in shapes.items()}
    return made | {"mask": torch.rand(2, 1, 5, 7) < 0.7, "is_causal": False, "scale": 0.3, "gqa": False} | more


def grouped_example():
    sizes = {f"{n}_expand": (2, 3, 2, 7, 8) for n in "kv"} | {f"{n}_shape": (2, 6, 7, 8) for n in "kv"}
    return example(k=torch.randn(2, 3, 7, 8), v=torch.randn(2, 3, 7, 8)) | sizes


@dataclass(frozen=True)
class Heads:
    """Keys and values as the products take them: one head for each of the queries', or repeated to that."""

    suffix: str
    keys: Expr
    values: Expr
    fit: Check
    example: Callable[[], dict[str, Any]]


REPEATED = "its key and value heads are not merely repeated"
HEADS = [
    Heads("_repeat_kv", repeated(k, "k"), repeated(v, "v"), Check(heads_repeat, REPEATED), grouped_example),
    Heads("", k, v, Check(equal_heads, REPEATED), example),
]


def fused(m):
    return [call(attention, m.q, m.k, m.v, m.mask, scale_of(m), m.is_causal)]


def sdpa_pattern(name, keys, values, gqa, fit, example):
    return Pattern(
        name=f"attention_{name}",
        stage="lift",
        roots=(call(sdpa, q, keys, values, mask, 0.0, is_causal, scale, gqa),),
        where=(rank_4, one_size, known_scale, fit),
        to=fused,
        example=example,
    )


direct = sdpa_pattern("sdpa", k, v, gqa, Check(heads_fit, "its heads broadcast"), example)
repeat_kv = sdpa_pattern("repeat_kv", HEADS[0].keys, HEADS[0].values, False, HEADS[0].fit, grouped_example)
