"""Gate and up projections with their activation in one launch: y = act(x Wg^T + bg) * (x Wu^T + bu), or, where there
is no up projection (w_up is None), a linear with its activation: y = act(x Wg^T + bg).

x [..., K]; weights [N, K], scales and biases as in ``linear`` (the halves of a merged weight are views);
act as in ``gated_act``; y [..., N] contiguous, in x's dtype. Eager code rounds both projections and the
activation to x's dtype on the way; a kernel may keep them wider.
"""

from __future__ import annotations

from torch import Tensor

from tinyfuse.kernels import _gemm, _native, gated_act, linear, linear_group
from tinyfuse.op import Kernel, register


def reference(
    x: Tensor, w_gate: Tensor, w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None,
    b_gate: Tensor | None, b_up: Tensor | None, act: str,
) -> Tensor:  # fmt: skip
    gate = linear.reference(x, w_gate, s_gate, b_gate, None)
    if w_up is None:
        return gated_act.ACTIVATIONS[act](gate)
    return gated_act.reference(gate, linear.reference(x, w_up, s_up, b_up, None), act)


def members(
    w_gate: Tensor, w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None,
    b_gate: Tensor | None, b_up: Tensor | None,
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """The weights, scales and biases that there are."""
    if w_up is None:
        return [w_gate], [s_gate], [b_gate]
    return [w_gate, w_up], [s_gate, s_up], [b_gate, b_up]


# --- CPU ---


def supports_native(
    x: Tensor, w_gate: Tensor, w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None,
    b_gate: Tensor | None, b_up: Tensor | None, act: str,
) -> str | None:  # fmt: skip
    if act not in _native.ACTIVATIONS:
        return f"the CPU kernels know {', '.join(_native.ACTIVATIONS)}, not {act}"
    if w_up is not None and (
        w_gate.dtype != w_up.dtype
        or w_gate.shape != w_up.shape
        or _native.by_columns(w_gate) != _native.by_columns(w_up)
    ):
        return "the CPU gated linear takes gate and up weights of one dtype, shape and layout"
    parts = zip(*members(w_gate, w_up, s_gate, s_up, b_gate, b_up), strict=True)
    return next(filter(None, (_native.linear_reason(x, *part) for part in parts)), None)


def run_native(
    x: Tensor, w_gate: Tensor, w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None,
    b_gate: Tensor | None, b_up: Tensor | None, act: str,
) -> Tensor:  # fmt: skip
    if _native.torch_is_faster(x, s_gate is not None):
        gate = linear.by_torch(x, w_gate, s_gate, b_gate)
        up = None if w_up is None else linear.by_torch(x, w_up, s_up, b_up)
        return gated_act.ACTIVATIONS[act](gate) if up is None else gated_act.reference(gate, up, act)
    x = x if x.is_contiguous() else x.contiguous()
    y = _native.empty(x, w_gate.shape[0])
    fields = _native.part(w_gate, s_gate, b_gate, None, y)
    if w_up is not None:
        fields += _native.part(w_up, s_up, b_up, None, None)
    _native.linear(x, w_gate, _native.ACTIVATIONS[act], 1 if w_up is None else 2, fields)
    return y


# --- GPU ---


def misfit(w_gate: Tensor, w_up: Tensor | None, act: str) -> str | None:
    """Why no GPU kernel applies ``act`` to these weights."""
    if act not in gated_act.ACTIVATIONS or (w_up is not None and w_gate.shape != w_up.shape):
        return "the GPU gated linear takes gate and up weights of one shape and a known activation"
    return None


def supports_gemv(
    x: Tensor, w_gate: Tensor, w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None,
    b_gate: Tensor | None, b_up: Tensor | None, act: str,
) -> str | None:  # fmt: skip
    return misfit(w_gate, w_up, act) or linear.few_rows_reason(x, *members(w_gate, w_up, s_gate, s_up, b_gate, b_up))


def run_gemv(
    x: Tensor, w_gate: Tensor, w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None,
    b_gate: Tensor | None, b_up: Tensor | None, act: str,
) -> Tensor:  # fmt: skip
    return linear.few_rows(x, *members(w_gate, w_up, s_gate, s_up, b_gate, b_up), None, act)[0]


def supports_tensor_core(
    x: Tensor, w_gate: Tensor, w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None,
    b_gate: Tensor | None, b_up: Tensor | None, act: str,
) -> str | None:  # fmt: skip
    return misfit(w_gate, w_up, act) or _gemm.reason(x, *members(w_gate, w_up, s_gate, s_up, b_gate, b_up))


def run_tensor_core(
    x: Tensor, w_gate: Tensor, w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None,
    b_gate: Tensor | None, b_up: Tensor | None, act: str,
) -> Tensor:  # fmt: skip
    return _gemm.gemm(x, *members(w_gate, w_up, s_gate, s_up, b_gate, b_up), None, act)[0]


def supports_each(
    x: Tensor, w_gate: Tensor, w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None,
    b_gate: Tensor | None, b_up: Tensor | None, act: str,
) -> str | None:  # fmt: skip
    return linear_group.OP.choose(x, *members(w_gate, w_up, s_gate, s_up, b_gate, b_up))[1]


def run_each(
    x: Tensor, w_gate: Tensor, w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None,
    b_gate: Tensor | None, b_up: Tensor | None, act: str,
) -> Tensor:  # fmt: skip
    return activated(act, *linear_group.OP(x, *members(w_gate, w_up, s_gate, s_up, b_gate, b_up)))


def activated(act: str, gate: Tensor, up: Tensor | None = None) -> Tensor:
    return gated_act.ACTIVATIONS[act](gate) if up is None else gated_act.OP(gate, up, act)


def fake(
    x: Tensor, w_gate: Tensor, w_up: Tensor | None, s_gate: Tensor | None, s_up: Tensor | None,
    b_gate: Tensor | None, b_up: Tensor | None, act: str,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], w_gate.shape[0]))


OP = register(
    "gated_linear(Tensor x, Tensor w_gate, Tensor? w_up, Tensor? s_gate, Tensor? s_up, Tensor? b_gate,"
    " Tensor? b_up, str act) -> Tensor",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("native", "cpu", supports_native, run_native),
        Kernel("gemv", "cuda", supports_gemv, run_gemv),
        Kernel("tensor_core", "cuda", supports_tensor_core, run_tensor_core),
        Kernel("each", "cuda", supports_each, run_each),
    ],
    ahead=range(1, 7),
)
