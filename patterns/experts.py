"""Products with the weights of experts: of rows sorted by expert (``_grouped_mm``), or with gathered weights (``bmm``).

Weights are [E, N, K]; those stored [E, K, N] stay with stock torch. What reads int8 weights is their dequantised form.
"""

import operator

import torch

import tinyfuse.kernels.experts_linear  # noqa: F401
from tinyfuse.graph.nodes import grouped_mm, grouped_mm_fallback
from tinyfuse.graph.pattern import Check, Pattern, anything, call, one_of, tensor

x, w, s, offs, ids = tensor("x w s offs ids")
form = anything("form")
ops = torch.ops.tinyfuse

stacked = Check(lambda m: m.value("x").dim() == 2 and m.value("w").dim() == 3, "it is no product of rows and matrices")
one_dtype = Check(lambda m: m.captures.get("form", m.dtype("w")) is m.dtype("x"), "input and weight differ in dtype")
numbered = Check(
    lambda m: "ids" not in m.captures or (m.value("ids").dim() == 1 and m.dtype("ids") is torch.int64),
    "its weights are not gathered by number",
)


def lift(name, product, index, int8=False):
    def to(m):
        found = m.captures.get
        return [call(ops.experts_linear.default, m.x, m.w, found("s"), found("offs"), found("ids"))]

    def example():
        floats = {"w": torch.randn(3, 12, 8).bfloat16()}
        weight = torch.randint(-127, 128, (3, 12, 8), dtype=torch.int8)
        quantised = {"w": weight, "s": torch.rand(3, 12), "form": torch.bfloat16}
        return {"x": torch.randn(5, 8).bfloat16(), **(quantised if int8 else floats), **index}

    return Pattern(f"linear_experts_{name}", "lift", (product,), to, example, (stacked, one_dtype, numbered))


def grouped(weight):
    weight = call(torch.transpose, weight, 1, 2)
    return one_of(call(grouped_mm, x, weight, offs, None, None), call(grouped_mm_fallback, x, weight, offs))


def gathered(weight):
    return call(torch.squeeze, call(torch.bmm, weight, call(torch.unsqueeze, x, -1)), -1)


def pick(stack):
    return call(operator.getitem, stack, ids)


ends, picks = {"offs": torch.tensor([2, 2, 5], dtype=torch.int32)}, {"ids": torch.tensor([2, 0, 0, 2, 1])}
of_floats = [lift("grouped", grouped(w), ends), lift("gathered", gathered(pick(w)), picks)]
dequantised = call(ops.dequantize.default, w, s, form), call(ops.dequantize.default, pick(w), pick(s), form)
of_int8 = [
    lift("grouped_int8", grouped(dequantised[0]), ends, int8=True),
    lift("gathered_int8", gathered(dequantised[1]), picks, int8=True),
]
