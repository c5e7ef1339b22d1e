"""Linear layers that share their input, in one launch (q/k/v, gate/up): y_i = x W_i^T + b_i.

x [..., K]; weights[i] [N_i, K], scales[i], biases[i] as in ``linear``; no weight is copied.
Returns one contiguous [..., N_i] per weight.
"""

from __future__ import annotations

from torch import Tensor

from tinyfuse.kernels import _gemm, _native, linear
from tinyfuse.op import Kernel, register


def reference(
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None]
) -> list[Tensor]:
    return [linear.reference(x, w, s, b, None) for w, s, b in zip(weights, scales, biases, strict=True)]


# --- CPU ---


def supports_native(
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None]
) -> str | None:
    if len(weights) > _native.MOST_PARTS:
        return f"the CPU linears take at most {_native.MOST_PARTS} weights together"
    if any(weight.dtype != weights[0].dtype for weight in weights):
        return "the CPU linears take weights of one dtype together"
    if any(_native.by_columns(weight) != _native.by_columns(weights[0]) for weight in weights):
        return "the CPU linears take weights of one layout together"
    reasons = (_native.linear_reason(x, w, s, b) for w, s, b in zip(weights, scales, biases, strict=True))
    return next(filter(None, reasons), None)


def run_native(
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None]
) -> list[Tensor]:
    if _native.torch_is_faster(x, scales[0] is not None):
        return [linear.by_torch(x, *each) for each in zip(weights, scales, biases, strict=True)]
    x = x if x.is_contiguous() else x.contiguous()
    outputs, fields = [], []
    for weight, scale, bias in zip(weights, scales, biases, strict=True):
        y = _native.empty(x, weight.shape[0])
        outputs.append(y)
        fields += _native.part(weight, scale, bias, None, y)
    _native.linear(x, weights[0], _native.NO_ACTIVATION, len(weights), fields)
    return outputs


# --- GPU ---


def supports_each(
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None]
) -> str | None:
    reasons = (linear.OP.choose(x, w, s, b, None)[1] for w, s, b in zip(weights, scales, biases, strict=True))
    return next(filter(None, reasons), None)


def run_each(
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None]
) -> list[Tensor]:
    return [linear.OP(x, w, s, b, None) for w, s, b in zip(weights, scales, biases, strict=True)]


def fake(x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None]) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


OP = register(
    "linear_group(Tensor x, Tensor[] weights, Tensor?[] scales, Tensor?[] biases) -> Tensor[]",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("native", "cpu", supports_native, run_native),
        Kernel("gemv", "cuda", linear.few_rows_reason, linear.few_rows),
        Kernel("tensor_core", "cuda", _gemm.reason, _gemm.gemm),
        Kernel("each", "cuda", supports_each, run_each),
    ],
    ahead=range(1, 4),
)
