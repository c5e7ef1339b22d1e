"""Writing new keys and values into a static cache, and the rotation of q and k before it, in one launch."""

import torch

import tinyfuse.kernels.kv_append
import tinyfuse.kernels.rope_append  # noqa: F401
from tinyfuse.graph.pattern import Check, Pattern, anything, call, tensor

ops = torch.ops.tinyfuse
keys, values, k, v, pos, q, cos, sin = tensor("keys values k v pos q cos sin")
interleaved = anything("interleaved")

rank_4 = Check(lambda m: m.value("keys").dim() == 4 and m.value("values").dim() == 4, "the cache does not have 4 dims")
one_dtype = Check(
    lambda m: m.dtype("keys") is m.dtype("k") and m.dtype("values") is m.dtype("v"), "the cache has another dtype"
)

append = Pattern(
    name="kv_append",
    stage="lift",
    roots=(call(torch.Tensor.index_copy_, keys, 2, pos, k), call(torch.Tensor.index_copy_, values, 2, pos, v)),
    where=(rank_4, one_dtype, Check(lambda m: m.keys is not m.values, "both writes go to one tensor")),
    effects=lambda m: [call(ops.kv_append.default, m.keys, m.values, m.k, m.v, m.pos)],
    to=lambda m: [m.keys, m.values],
    example=lambda: {
        "keys": torch.randn(2, 3, 7, 8), "values": torch.randn(2, 3, 7, 8), "pos": torch.tensor([2, 5]),
        "k": torch.randn(2, 3, 2, 8), "v": torch.randn(2, 3, 2, 8),
    },
)  # fmt: skip


def fused(m):
    return call(ops.rope_append.default, m.q, m.k, m.v, m.cos, m.sin, m.keys, m.values, m.pos, m.interleaved)


rope_append = Pattern(
    name="rope_append",
    stage="fuse",
    roots=(
        call(ops.kv_append.default, keys, values, call(ops.rope.default, k, cos, sin, interleaved), v, pos),
        call(ops.rope.default, q, cos, sin, interleaved),
    ),
    to=lambda m: [None, fused(m)],
    example=lambda: append.example() | {
        "q": torch.randn(2, 6, 2, 8), "cos": torch.randn(2, 1, 2, 8), "sin": torch.randn(2, 1, 2, 8),
        "interleaved": False,
    },
)  # fmt: skip
