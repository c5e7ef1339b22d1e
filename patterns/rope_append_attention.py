"""A decode step's attention with the rotation of q and k and the cache write in front of it, in one launch."""

import torch

import tinyfuse.kernels.rope_append_attention  # noqa: F401
from tinyfuse.graph.pattern import Check, Pattern, anything, call, optional, scalar, tensor

ops = torch.ops.tinyfuse
q, k, v, cos, sin, keys, values, pos = tensor("q k v cos sin keys values pos")
interleaved, mask, scale = anything("interleaved"), optional("mask"), scalar("scale")
turned = call(ops.rope_append.default, q, k, v, cos, sin, keys, values, pos, interleaved)

step = Pattern(
    name="rope_append_attention",
    stage="fuse",
    roots=(call(ops.attention.default, turned, keys, values, mask, scale, False),),
    where=(Check(lambda m: isinstance(m.shape("q")[2], int) and m.shape("q")[2] == 1, "it is not of one token"),),
    to=lambda m: [
        call(
            ops.rope_append_attention.default,
            *(m.q, m.k, m.v, m.cos, m.sin, m.keys, m.values, m.pos, m.interleaved, m.mask, m.scale),
        )
    ],
    example=lambda: {
        "q": torch.randn(2, 6, 1, 8), "k": torch.randn(2, 3, 1, 8), "v": torch.randn(2, 3, 1, 8),
        "cos": torch.randn(2, 1, 1, 8), "sin": torch.randn(2, 1, 1, 8), "interleaved": False,
        "keys": torch.randn(2, 3, 7, 8), "values": torch.randn(2, 3, 7, 8), "pos": torch.tensor([4]),
        "mask": torch.rand(2, 1, 1, 7) < 0.7, "scale": 0.3,
    },
)  # fmt: skip
