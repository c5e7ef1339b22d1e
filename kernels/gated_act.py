"""Gated activation: y = act(gate) * up (Shazeer, 2020).

gate, up [..., N] of one shape and dtype, any strides (the halves of a merged projection are views);
y contiguous, in their dtype; act(gate) is rounded to the dtype before the product, as eager code does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfuse.kernels import _native
from tinyfuse.op import Kernel, register

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def reference(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return (ACTIVATIONS[act](gate) * up).contiguous()


# --- CPU ---


_pack = _native.packer("10q")


def supports_native(gate: Tensor, up: Tensor, act: str) -> str | None:
    if act not in _native.ACTIVATIONS:
        return f"the CPU kernels know {', '.join(_native.ACTIVATIONS)}, not {act}"
    if gate.dtype not in _native.FLOATING or up.dtype != gate.dtype or up.shape != gate.shape:
        return "the CPU gated activation takes gate and up of one floating dtype and shape"
    return _native.reason(gate, up)


def run_native(gate: Tensor, up: Tensor, act: str) -> Tensor:
    width, shape = gate.shape[-1], gate.shape
    y = torch.empty(shape, dtype=gate.dtype)
    gate, up = _native.rows(gate), _native.rows(up)
    code = _native.function("tf_gated_act")(
        _pack(
            gate.data_ptr(), up.data_ptr(), y.data_ptr(), y.numel() // width, width, gate.stride(-2), up.stride(-2),
            _native.DTYPES[y.dtype], _native.ACTIVATIONS[act], _native.threads(),
        )
    )  # fmt: skip
    if code:
        _native.fail(code)
    return y


OP = register(
    "gated_act(Tensor gate, Tensor up, str act) -> Tensor",
    reference=reference,
    kernels=[Kernel("native", "cpu", supports_native, run_native)],
)
