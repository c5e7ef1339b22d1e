"""RMS norm, then the linear layers that share its result: y_i = rms_norm(x) W_i^T + b_i.

x [..., K]; weight, eps, unit_offset and cast_first as in ``rms_norm``; weights, scales and biases as in
``linear_group``. Returns one contiguous [..., N_i] per weight. Eager code rounds the normalised row to x's dtype; a
kernel may keep it wider.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tinyfuse.kernels import _gemm, _norm_digits, _one_row, linear, linear_group, rms_norm
from tinyfuse.kernels._rows import Norm
from tinyfuse.op import Kernel, register


def reference(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool,
    weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None],
) -> list[Tensor]:  # fmt: skip
    normed = rms_norm.reference(x, weight, eps, unit_offset, cast_first)
    return linear_group.reference(normed, weights, scales, biases)


# --- CPU ---


def supports_native(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool,
    weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None],
) -> str | None:  # fmt: skip
    reason = rms_norm.supports_native(x, weight, eps, unit_offset, cast_first)
    return reason or linear_group.supports_native(x, weights, scales, biases)


def run_native(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool,
    weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None],
) -> list[Tensor]:  # fmt: skip
    normed = rms_norm.run_native(x, weight, eps, unit_offset, cast_first)
    return linear_group.run_native(normed, weights, scales, biases)


# --- GPU ---


def supports_one_row(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool,
    weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None],
) -> str | None:  # fmt: skip
    if scales[0] is None and x.numel() != x.shape[-1]:
        return "the norm goes into matrix-vector products of 16-bit weights for one row of x"
    return _norm_digits.reason(x, weight) or linear.few_rows_reason(x, weights, scales, biases)


def run_one_row(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool,
    weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None], act: str = "",
) -> list[Tensor]:  # fmt: skip
    norm = Norm(weight, eps, unit_offset, cast_first)
    return _one_row.one_row(x, weights, scales, biases, None, act, norm=norm)


def supports_tensor_core(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool,
    weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None],
) -> str | None:  # fmt: skip
    return _norm_digits.reason(x, weight) or _gemm.reason(x, weights, scales, biases)


def run_tensor_core(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool,
    weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None], act: str = "",
) -> list[Tensor]:  # fmt: skip
    digits = partial(_norm_digits.split, Norm(weight, eps, unit_offset, cast_first))
    return _gemm.gemm(x, weights, scales, biases, None, act, digits=digits)


def supports_each(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool,
    weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None],
) -> str | None:  # fmt: skip
    reason = rms_norm.OP.choose(x, weight, eps, unit_offset, cast_first)[1]
    return reason or linear_group.OP.choose(x, weights, scales, biases)[1]


def run_each(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool,
    weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None],
) -> list[Tensor]:  # fmt: skip
    return linear_group.OP(rms_norm.OP(x, weight, eps, unit_offset, cast_first), weights, scales, biases)


def fake(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool,
    weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None],
) -> list[Tensor]:  # fmt: skip
    return linear_group.fake(x, weights, scales, biases)


OP = register(
    "rms_norm_linear_group(Tensor x, Tensor? weight, float eps, bool unit_offset, bool cast_first, Tensor[] weights,"
    " Tensor?[] scales, Tensor?[] biases) -> Tensor[]",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("native", "cpu", supports_native, run_native),
        Kernel("one_row", "cuda", supports_one_row, run_one_row),
        Kernel("tensor_core", "cuda", supports_tensor_core, run_tensor_core),
        Kernel("each", "cuda", supports_each, run_each),
    ],
    ahead=range(1, 8),
)
