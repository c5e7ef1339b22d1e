"""The float weights that int8 weights stand for: scale[..., None] * weight, rounded once to ``dtype``.

weight int8 [..., N, K]; scale fp32 [..., N]; the result is contiguous. Fused products read the int8 weights
themselves; this is for the code of a model that runs as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyfuse.kernels import _gemm, _native
from tinyfuse.op import Kernel, register

CHUNK = 1 << 18  # weights converted at a time: 1 MiB in fp32 stays in a core's cache


def reference(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    K = max(weight.shape[-1], 1)
    rows, into, factors = weight.reshape(-1, K), out.view(-1, K), scale.reshape(-1, 1)
    step = max(1, CHUNK // K)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        into[part] = rows[part].float().mul_(factors[part])
    return out


# --- CPU ---


def supports_native(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> str | None:
    if weight.dtype != torch.int8 or scale.dtype != torch.float32 or dtype not in _native.FLOATING:
        return "the CPU expands int8 weights with scales in float32 to a floating dtype"
    if not (weight.is_contiguous() and scale.is_contiguous()):
        return "the CPU expands contiguous weights with contiguous scales"
    return _native.reason(weight, scale)


def run_native(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _native.dequantize(weight.flatten(0, -2), scale.flatten(), dtype).view(weight.shape)


# --- GPU ---


def supports_cast(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or weight.dtype != torch.int8:
        return "int8 weights are expanded to bfloat16, float16 or float32"
    if not (weight.is_contiguous() and scale.is_contiguous()) or weight.numel() == 0:
        return "the GPU takes contiguous weights and scales"
    return None


def run_cast(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    rows, factors = weight.flatten(0, -2), scale.flatten()  # of chosen experts: gathered by the kernel before
    return _gemm.dequantize(rows, factors, dtype, made=True).view(weight.shape)


def fake(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


OP = register(
    "dequantize(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor",
    reference=reference,
    fake=fake,
    kernels=[Kernel("cast", "cuda", supports_cast, run_cast), Kernel("native", "cpu", supports_native, run_native)],
)
