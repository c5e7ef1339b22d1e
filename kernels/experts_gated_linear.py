"""Gate and up projections of experts with their activation: y[s] = act(x[s] G[e(s)]^T) * (x[s] U[e(s)]^T).

The weight [E, 2 I, K] holds the rows of each expert's gate, then those of its up projection; act as in ``gated_act``;
y [S, I] contiguous; the rest as in ``experts_linear``. Eager code rounds both projections and the activation to x's
dtype on the way; a kernel may keep them wider.
"""

from __future__ import annotations

from torch import Tensor

from tinyfuse.kernels import _experts, _experts_gemm, _native, experts_linear, gated_act
from tinyfuse.op import Kernel, register


def reference(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None, act: str
) -> Tensor:
    return gated_act.reference(*experts_linear.reference(x, weight, scale, offs, ids).chunk(2, -1), act)


# --- CPU ---


def supports_native(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None, act: str
) -> str | None:
    if act not in _native.ACTIVATIONS:
        return f"the CPU kernels know {', '.join(_native.ACTIVATIONS)}, not {act}"
    return _native.experts_reason(x, weight, scale, offs, ids)


def run_native(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None, act: str
) -> Tensor:
    if experts_linear.torch_is_faster(x, scale, offs):
        return reference(x, weight, scale, offs, ids, act)
    x = x if x.is_contiguous() else x.contiguous()
    return _native.experts(x, weight, scale, offs, ids, _native.ACTIVATIONS[act])


# --- GPU ---


def misfit(act: str) -> str | None:
    """Why no GPU kernel applies ``act``."""
    known = ", ".join(gated_act.ACTIVATIONS)
    return None if act in gated_act.ACTIVATIONS else f"the GPU kernels for experts know {known}, not {act}"


def supports_pairs(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None, act: str
) -> str | None:
    return misfit(act) or _experts.reason(x, weight, scale, offs, ids)


def run_pairs(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None, act: str
) -> Tensor:
    return _experts.pairs(x, weight, scale, offs, ids, act)


def supports_tensor_core(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None, act: str
) -> str | None:
    return misfit(act) or experts_linear.supports_tensor_core(x, weight, scale, offs, ids)


def run_tensor_core(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor, ids: Tensor | None, act: str
) -> Tensor:
    return _experts_gemm.experts_gemm(x, weight, scale, offs, act)


def supports_each(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None, act: str
) -> str | None:
    return experts_linear.OP.choose(x, weight, scale, offs, ids)[1]


def run_each(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None, act: str
) -> Tensor:
    return gated_act.OP(*experts_linear.OP(x, weight, scale, offs, ids).chunk(2, -1), act)


def fake(x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None, act: str) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1] // 2))


OP = register(
    "experts_gated_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? offs, Tensor? ids, str act) -> Tensor",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("native", "cpu", supports_native, run_native),
        Kernel("pairs", "cuda", supports_pairs, run_pairs),
        Kernel("tensor_core", "cuda", supports_tensor_core, run_tensor_core),
        Kernel("each", "cuda", supports_each, run_each),
    ],
)
