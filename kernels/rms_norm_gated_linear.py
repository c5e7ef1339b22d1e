"""RMS norm, then the gate and up projections with their activation: y = act(h Wg^T + bg) * (h Wu^T + bu),
h = rms_norm(x); without an up projection, y = act(h Wg^T + bg).

x [..., K]; weight, eps, unit_offset and cast_first as in ``rms_norm``; the rest as in ``gated_linear``; y [..., N]
contiguous, in x's dtype.
"""

from __future__ import annotations

from torch import Tensor

from tinyfuse.kernels import gated_linear, rms_norm, rms_norm_linear_group
from tinyfuse.op import Kernel, register


def reference(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool, w_gate: Tensor,
    w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None,
    act: str,
) -> Tensor:  # fmt: skip
    normed = rms_norm.reference(x, weight, eps, unit_offset, cast_first)
    return gated_linear.reference(normed, w_gate, w_up, s_gate, s_up, b_gate, b_up, act)


# --- CPU ---


def supports_native(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool, w_gate: Tensor,
    w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None,
    act: str,
) -> str | None:  # fmt: skip
    reason = rms_norm.supports_native(x, weight, eps, unit_offset, cast_first)
    return reason or gated_linear.supports_native(x, w_gate, w_up, s_gate, s_up, b_gate, b_up, act)


def run_native(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool, w_gate: Tensor,
    w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None,
    act: str,
) -> Tensor:  # fmt: skip
    normed = rms_norm.run_native(x, weight, eps, unit_offset, cast_first)
    return gated_linear.run_native(normed, w_gate, w_up, s_gate, s_up, b_gate, b_up, act)


# --- GPU ---


def supports_one_row(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool, w_gate: Tensor,
    w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None,
    act: str,
) -> str | None:  # fmt: skip
    args = gated_linear.members(w_gate, w_up, s_gate, s_up, b_gate, b_up)
    reason = rms_norm_linear_group.supports_one_row(x, weight, eps, unit_offset, cast_first, *args)
    return gated_linear.misfit(w_gate, w_up, act) or reason


def run_one_row(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool, w_gate: Tensor,
    w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None,
    act: str,
) -> Tensor:  # fmt: skip
    args = gated_linear.members(w_gate, w_up, s_gate, s_up, b_gate, b_up)
    return rms_norm_linear_group.run_one_row(x, weight, eps, unit_offset, cast_first, *args, act)[0]


def supports_tensor_core(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool, w_gate: Tensor,
    w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None,
    act: str,
) -> str | None:  # fmt: skip
    args = gated_linear.members(w_gate, w_up, s_gate, s_up, b_gate, b_up)
    reason = rms_norm_linear_group.supports_tensor_core(x, weight, eps, unit_offset, cast_first, *args)
    return gated_linear.misfit(w_gate, w_up, act) or reason


def run_tensor_core(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool, w_gate: Tensor,
    w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None,
    act: str,
) -> Tensor:  # fmt: skip
    args = gated_linear.members(w_gate, w_up, s_gate, s_up, b_gate, b_up)
    return rms_norm_linear_group.run_tensor_core(x, weight, eps, unit_offset, cast_first, *args, act)[0]


def supports_each(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool, w_gate: Tensor,
    w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None,
    act: str,
) -> str | None:  # fmt: skip
    args = gated_linear.members(w_gate, w_up, s_gate, s_up, b_gate, b_up)
    return rms_norm_linear_group.OP.choose(x, weight, eps, unit_offset, cast_first, *args)[1]


def run_each(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool, w_gate: Tensor,
    w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None,
    act: str,
) -> Tensor:  # fmt: skip
    if s_gate is None:  # cuBLAS or a matrix-vector product, of which one applies the activation too
        normed = rms_norm.OP(x, weight, eps, unit_offset, cast_first)
        return gated_linear.OP(normed, w_gate, w_up, s_gate, s_up, b_gate, b_up, act)
    args = gated_linear.members(w_gate, w_up, s_gate, s_up, b_gate, b_up)
    return gated_linear.activated(act, *rms_norm_linear_group.OP(x, weight, eps, unit_offset, cast_first, *args))


def fake(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, cast_first: bool, w_gate: Tensor,
    w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None,
    act: str,
) -> Tensor:  # fmt: skip
    return gated_linear.fake(x, w_gate, w_up, s_gate, s_up, b_gate, b_up, act)


OP = register(
    "rms_norm_gated_linear(Tensor x, Tensor? weight, float eps, bool unit_offset, bool cast_first, Tensor w_gate,"
    " Tensor? w_up, Tensor? s_gate, Tensor? s_up, Tensor? b_gate, Tensor? b_up, str act) -> Tensor",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("native", "cpu", supports_native, run_native),
        Kernel("one_row", "cuda", supports_one_row, run_one_row),
        Kernel("tensor_core", "cuda", supports_tensor_core, run_tensor_core),
        Kernel("each", "cuda", supports_each, run_each),
    ],
    ahead=range(1, 11),
)
