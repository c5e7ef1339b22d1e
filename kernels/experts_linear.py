"""Products of rows with the weights of their experts, y[s] = x[s] W[e(s)]^T, in the two forms that models have.

x [S, K]; weight [E, N, K] in x's dtype, or int8 with scale fp32 [E, N]; y [S, N] in x's dtype, contiguous.
Either ``ids`` int64 [S] are the experts of the rows, or the rows are sorted by expert and ``offs`` int32 [E] says where
those of each end; rows behind the last end are zeros on a CPU, and anything on a GPU. Sums run in fp32 or wider and are
rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyfuse.kernels import _experts, _experts_gemm, _native, dequantize
from tinyfuse.op import Kernel, register


def whole(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight if scale is None else dequantize.OP(weight, scale, dtype)


def reference(x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None) -> Tensor:
    if offs is None:
        weight = whole(weight[ids], None if scale is None else scale[ids], x.dtype)
        return torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1)
    y, start = x.new_zeros((x.shape[0], weight.shape[1])), 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            one = whole(weight[expert], None if scale is None else scale[expert], x.dtype)
            torch.mm(x[start:end], one.T, out=y[start:end])
        start = end
    return y


# --- CPU ---


def torch_is_faster(x: Tensor, scale: Tensor | None, offs: Tensor | None) -> bool:
    """Whether torch's products are, for as many rows as an expert that has any has on average."""
    if scale is not None or offs is None or not _native.torch_is_faster(x):
        return False
    hit = len({0, *offs.tolist()}) - 1
    return hit > 0 and _native.torch_is_faster(x[: x.shape[0] // hit])


def supports_native(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None
) -> str | None:
    return _native.experts_reason(x, weight, scale, offs, ids)


def run_native(x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None) -> Tensor:
    if torch_is_faster(x, scale, offs):
        return reference(x, weight, scale, offs, ids)
    return _native.experts(x if x.is_contiguous() else x.contiguous(), weight, scale, offs, ids, _native.NO_ACTIVATION)


# --- GPU ---


def supports_pairs(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None
) -> str | None:
    return _experts.reason(x, weight, scale, offs, ids)


def run_pairs(x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None) -> Tensor:
    return _experts.pairs(x, weight, scale, offs, ids)


def supports_tensor_core(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None
) -> str | None:
    if scale is None and x.dtype == torch.bfloat16:
        return "torch's grouped product multiplies bfloat16 weights"
    return _experts_gemm.reason(x, weight, scale, offs)


def run_tensor_core(x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor, ids: Tensor | None) -> Tensor:
    return _experts_gemm.experts_gemm(x, weight, scale, offs)


def supports_grouped(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None
) -> str | None:
    if offs is None:
        return "rows that are not sorted by expert are multiplied by stock torch"
    if x.dtype != torch.bfloat16 or weight.dtype not in (torch.bfloat16, torch.int8):
        return "torch's grouped product, which takes prompts, multiplies bfloat16 alone"
    if weight.stride(2) != 1 or any(size % 8 for size in (*weight.shape[1:], *weight.stride()[:2], x.stride(0))):
        return "torch's grouped product takes rows that begin at multiples of 16 bytes"
    return None


def run_grouped(x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None) -> Tensor:
    return torch._grouped_mm(x, whole(weight, scale, x.dtype).transpose(1, 2), offs=offs)


def fake(x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


OP = register(
    "experts_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? offs, Tensor? ids) -> Tensor",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("native", "cpu", supports_native, run_native),
        Kernel("pairs", "cuda", supports_pairs, run_pairs),
        Kernel("tensor_core", "cuda", supports_tensor_core, run_tensor_core),
        Kernel("grouped", "cuda", supports_grouped, run_grouped),
    ],
)
