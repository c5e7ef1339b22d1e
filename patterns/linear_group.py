"""Linear layers that share their input, in one launch: q/k/v and gate/up, with no weight copied."""

import operator

import torch

import tinyfuse.kernels.linear_group  # noqa: F401
from tinyfuse.graph.pattern import Check, Pattern, call, optional, tensor

x = tensor("x")


def group(count: int) -> Pattern:
    parts = [(tensor(f"w{i}"), optional(f"s{i}"), optional(f"b{i}")) for i in range(count)]

    def to(m):
        weights, scales, biases = ([getattr(m, f"{kind}{i}") for i in range(count)] for kind in "wsb")
        made = call(torch.ops.tinyfuse.linear_group.default, m.x, weights, scales, biases)
        return [call(operator.getitem, made, i) for i in range(count)]

    def example():
        weights = {f"w{i}": torch.randn(5 + i, 8) for i in range(count)}
        return weights | {"x": torch.randn(2, 3, 8)} | {f"{k}{i}": None for k in "sb" for i in range(count)}

    linear = torch.ops.tinyfuse.linear.default
    return Pattern(
        name=f"linear_group_{count}",
        stage="fuse",
        roots=tuple(call(linear, x, w, s, b, None) for w, s, b in parts),
        where=(
            Check(
                lambda m: len({m.captures[f"s{i}"] is None for i in range(count)}) == 1,
                "some of the weights are quantised and some are not",
            ),
        ),
        to=to,
        example=example,
    )


three, two = group(3), group(2)
