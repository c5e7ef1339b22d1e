"""Gated activation: y = act(gate) * up (Shazeer, 2020).

gate, up [..., N] of one shape and dtype, any strides (the halves of a merged projection are views);
y contiguous, in their dtype; act(gate) is rounded to the dtype before the product, as eager code does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfuse.kernels import _native, _rows
from tinyfuse.kernels._triton import Launch, jit, pdl, tl, triton
from tinyfuse.op import Kernel, register

BLOCK_N = 1024
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),  # So et al., 2021
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # Hendrycks and Gimpel, 2016
}


def reference(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return (ACTIVATIONS[act](gate) * up).contiguous()


# --- GPU ---


@jit
def activate(x, ACT: tl.constexpr):
    """The activation named ACT of fp32 x."""
    if ACT == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 1 + tanh(u) = 2 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
        return x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    elif ACT == "quick_gelu":
        return x / (1.0 + tl.exp(-1.702 * x))
    elif ACT == "relu":
        return tl.where(x < 0.0, 0.0, x)
    else:
        tl.static_assert(ACT == "relu_squared")
        y = tl.where(x < 0.0, 0.0, x)
        return y * y


@jit(do_not_specialize=["per_row", "n1", "n2"])
def _gated_act(
    gate, up, y, N, per_row, n1, n2, g_0, g_1, g_2, u_0, u_1, u_2, y_0, y_1, y_2,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr, DIMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, col = _rows.block(per_row, BLOCK_N)
    g = tl.load(gate + _rows.offset(row, n1, n2, g_0, g_1, g_2, DIMS) + col, mask=col < N, other=0.0)
    u = tl.load(up + _rows.offset(row, n1, n2, u_0, u_1, u_2, DIMS) + col, mask=col < N, other=0.0)
    out = activate(g.to(tl.float32), ACT).to(g.dtype).to(tl.float32) * u.to(tl.float32)
    tl.store(y + _rows.offset(row, n1, n2, y_0, y_1, y_2, DIMS) + col, out, mask=col < N)


@lru_cache(4096)
def bind(
    shape: tuple[int, ...], gate: tuple[int, ...], up: tuple[int, ...], y: tuple[int, ...], act: str,
    *dtype_device_ahead: Any,
) -> Launch:  # fmt: skip
    """gate, up, y: strides."""
    N, rows = _rows.merge_columns(shape, gate, up, y)
    per_row, ahead = triton.cdiv(N, BLOCK_N), dtype_device_ahead[-1]
    scalars = (N, per_row, *rows.sizes, *rows.strides, act, BLOCK_N, rows.dims, ahead)
    return Launch(_gated_act, (rows.count * per_row,), scalars, 4, ahead)


def supports_triton(gate: Tensor, up: Tensor, act: str) -> str | None:
    if act not in ACTIVATIONS:
        return f"gated_act kernels know {', '.join(ACTIVATIONS)}, not {act}"
    return _rows.unsupported("gated_act", gate, up)


def run_triton(gate: Tensor, up: Tensor, act: str) -> Tensor:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel():
        bound = bind(gate.shape, gate.stride(), up.stride(), y.stride(), act, y.dtype, y.device, pdl(y.device))
        bound(gate, up, y)
    return y


# --- CPU ---


_pack = _native.packer("10q")
# Elements from which torch takes 0.2 to 0.7 of the kernel's time for SiLU and GELU where its vectors have 512 bits; up
# to there, in a decode step, a run of kernels that is replayed as one call is worth more.
MANY = 1 << 15


def supports_native(gate: Tensor, up: Tensor, act: str) -> str | None:
    if _torch_is_faster(gate, act):
        return f"torch's vectors of 512 bits are faster for more than {MANY} elements"
    return _unfit(gate, up, act)


def supports_torch(gate: Tensor, up: Tensor, act: str) -> str | None:
    return _unfit(gate, up, act) if _torch_is_faster(gate, act) else "the CPU kernel is faster"


def _torch_is_faster(gate: Tensor, act: str) -> bool:
    return act in ("silu", "gelu") and gate.numel() > MANY and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _unfit(gate: Tensor, up: Tensor, act: str) -> str | None:
    if act not in _native.ACTIVATIONS:
        return f"the CPU kernels know {', '.join(_native.ACTIVATIONS)}, not {act}"
    if gate.dtype not in _native.FLOATING or up.dtype != gate.dtype or up.shape != gate.shape:
        return "the CPU gated activation takes gate and up of one floating dtype and shape"
    return _native.reason(gate, up)


def run_native(gate: Tensor, up: Tensor, act: str) -> Tensor:
    width, shape = gate.shape[-1], gate.shape
    y = gate.new_empty(*shape)
    gate, up = _native.rows(gate), _native.rows(up)
    _native.call(
        "tf_gated_act",
        _pack(
            gate.data_ptr(), up.data_ptr(), y.data_ptr(), y.numel() // width, width, gate.stride(-2), up.stride(-2),
            _native.DTYPES[y.dtype], _native.ACTIVATIONS[act], _native.threads(),
        ),
    )  # fmt: skip
    return y


def fake(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return gate.new_empty(gate.shape)


OP = register(
    "gated_act(Tensor gate, Tensor up, str act) -> Tensor",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("triton", "cuda", supports_triton, run_triton),
        Kernel("native", "cpu", supports_native, run_native),
        Kernel("torch", "cpu", supports_torch, reference),
    ],
)
