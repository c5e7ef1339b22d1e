"""Linear layer, y = x W^T + b (+ residual), with the weight in its own dtype or in int8.

x [..., K]; weight [N, K] in x's dtype, or int8 with scale fp32 [N], meaning W = scale[:, None] * weight;
bias [N] or None; residual [..., N] or None. y [..., N] in x's dtype, contiguous.
Sums run in fp32 or wider and are rounded to x's dtype once (the residual may be added before that).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfuse.kernels import _fp16_gemm, _gemm, _gemv, _native, _one_row
from tinyfuse.op import Kernel, register


def dequantize(weight: Tensor, scale: Tensor | None, dtype) -> Tensor:
    return weight if scale is None else weight.float().mul_(scale.float()[:, None]).to(dtype)


def reference(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if scale is None:
        y = F.linear(x, weight, bias)
    else:
        y = (F.linear(x.float(), weight.float()) * scale.float()).to(x.dtype)
        y = y if bias is None else y + bias
    return y if residual is None else y + residual


# --- CPU ---

EXPANDED = 1 << 21  # elements of an int8 weight at a time, of which the float copies stay in the caches


def by_torch(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """``F.linear``, on an int8 weight expanded to x's dtype piece by piece."""
    if scale is None:
        return F.linear(x, weight, bias)
    step = max(1, EXPANDED // weight.shape[1])
    if len(weight) <= step:
        return F.linear(x, _native.dequantize(weight, scale, x.dtype), bias)
    y = x.new_empty((*x.shape[:-1], len(weight)))
    for start in range(0, len(weight), step):
        some = slice(start, start + step)
        part = None if bias is None else bias[some]
        y[..., some] = F.linear(x, _native.dequantize(weight[some], scale[some], x.dtype), part)
    return y


def supports_native(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> str | None:
    if residual is not None and (residual.dtype != x.dtype or residual.shape != (*x.shape[:-1], weight.shape[0])):
        return "the CPU linears take a residual [..., N] in x's dtype"
    return _native.linear_reason(x, weight, scale, bias) or _native.reason(residual)


def run_native(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if _native.torch_is_faster(x, scale is not None):
        y = by_torch(x, weight, scale, bias)
        return y if residual is None else y.add_(residual)
    x = x if x.is_contiguous() else x.contiguous()
    if residual is not None and not residual.is_contiguous():
        residual = residual.contiguous()
    y = _native.empty(x, weight.shape[0]) if residual is None else torch.empty_like(residual)
    _native.linear(x, weight, _native.NO_ACTIVATION, 1, _native.part(weight, scale, bias, residual, y))
    return y


# --- GPU ---


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def supports_gemv(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> str | None:
    return few_rows_reason(x, [weight], [scale], [bias]) or residual_reason(x, weight, residual)


def few_rows_reason(
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None]
) -> str | None:
    """Why :func:`few_rows` does not run these."""
    if len(weights) > 3:
        return "the GPU matrix-vector products take at most 3 weights together"
    most = _gemv.MOST_ROWS if scales[0] is None else _one_row.most_rows(x, weights)
    if _rows(x) > most:
        return f"the GPU matrix-vector products take at most {most} rows of x with these weights"
    return _gemv.reason(x, weights, scales, biases)


def residual_reason(x: Tensor, weight: Tensor, residual: Tensor | None) -> str | None:
    if residual is not None and (residual.dtype != x.dtype or residual.shape != (*x.shape[:-1], weight.shape[0])):
        return "the GPU linears take a residual [..., N] in x's dtype"
    return None


def few_rows(
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None],
    residual: Tensor | None = None, act: str = "",
) -> list[Tensor]:  # fmt: skip
    """The kernel that measured faster for so few rows."""
    if _rows(x) == 1 or scales[0] is not None:
        return _one_row.one_row(x, weights, scales, biases, residual, act)
    return _gemv.gemv(x, weights, biases, residual, act)


def run_gemv(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return few_rows(x, [weight], [scale], [bias], residual)[0]


def supports_fp16(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> str | None:
    return _fp16_gemm.reason(x, weight, scale, bias) or residual_reason(x, weight, residual)


def supports_tensor_core(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> str | None:
    return _gemm.reason(x, [weight], [scale], [bias]) or residual_reason(x, weight, residual)


def run_tensor_core(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    return _gemm.gemm(x, [weight], [scale], [bias], residual)[0]


def supports_cublas(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> str | None:
    if scale is None:
        return None
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or weight.stride(1) != 1:
        return "int8 weights are expanded to bfloat16, float16 or float32, from contiguous rows"
    return None


def run_cublas(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = F.linear(x, weight if scale is None else _gemm.dequantize(weight, scale, x.dtype), bias)
    return y if residual is None else y.add_(residual)


def fake(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


OP = register(
    "linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual) -> Tensor",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("native", "cpu", supports_native, run_native),
        Kernel("fp16", "cuda", supports_fp16, _fp16_gemm.fp16_gemm),
        Kernel("gemv", "cuda", supports_gemv, run_gemv),
        Kernel("tensor_core", "cuda", supports_tensor_core, run_tensor_core),
        Kernel("cublas", "cuda", supports_cublas, run_cublas),
    ],
    ahead=range(1, 4),
)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, scale, bias, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor):
    """Gradients to x, a float weight, the bias and the residual; an int8 weight and its scale have none."""
    x, weight, scale = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    need_x, need_weight, _, need_bias, need_residual = ctx.needs_input_grad
    return (
        grad @ dequantize(weight, scale, grad.dtype) if need_x else None,
        rows.T @ x.reshape(-1, x.shape[-1]) if need_weight else None,
        None,
        rows.sum(0).to(ctx.bias_dtype) if need_bias else None,
        grad if need_residual else None,
    )


torch.library.register_autograd("tinyfuse::linear", _backward, setup_context=_setup_context)
