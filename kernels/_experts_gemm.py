"""Products of rows sorted by expert with the weights of their experts, on the tensor cores: prompts.

    y[s] = W[e(s)] x[s] (* scale)        or        act(W_gate x) * (W_up x), the halves of W[e(s)]'s rows

Weights are the first operand of ``tl.dot``, widened from int8 in its registers, so int8 experts are never written out
as floats: a tile of y holds rows of one expert, and which one its program finds from the ends of all. |q| <= 127 is
exact in bf16 and fp16, sums are in fp32, the scale comes last.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels import _gemv
from tinyfuse.kernels._gemm import limits, store, tile_of
from tinyfuse.kernels._triton import Launch, jit, pdl, tl, triton
from tinyfuse.kernels.gated_act import activate

Config = tuple[int, int, int, int, int]  # rows, columns and depth of a tile, stages, warps


@jit(do_not_specialize=["E"])
def _experts_gemm(
    x, w, scales, offs, y, x_stride, E, N, step, stride, scale_step,
    K: tl.constexpr, BLOCK_E: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tile program_id(0) over the rows of all experts, each of which begins a tile, by columns of y [S, N]. Under ACT
    gate and up are rows [0, N) and [N, 2 N) of a weight. ``step``, ``scale_step``: from expert to expert."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    e = tl.arange(0, BLOCK_E)
    starts = tl.load(offs + e - 1, mask=(e > 0) & (e < E), other=0)
    ends = tl.load(offs + e, mask=e < E, other=0)
    tiles = tl.where(e < E, tl.cdiv(ends - starts, BLOCK_M), 0)
    upto = tl.cumsum(tiles, 0)
    pid = tl.program_id(0)
    expert = tl.sum(((upto <= pid) & (e < E)).to(tl.int32), 0)
    if expert < E:
        mine = e == expert
        first = tl.sum(tl.where(mine, starts + (pid - upto + tiles) * BLOCK_M, 0), 0)
        end = tl.sum(tl.where(mine, ends, 0), 0)
        m = first + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        safe = tl.minimum(n, N - 1).to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        matrix = w + expert.to(tl.int64) * step
        at = matrix + safe[:, None] * stride + k[None, :]
        at_up = matrix + (safe + N)[:, None] * stride + k[None, :]
        at_x = x + tl.minimum(m, end - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        total_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            rows = tl.trans(tile_of(at_x, k, start, K, BLOCK_K))
            total = tl.dot(tile_of(at, k, start, K, BLOCK_K).to(x.dtype.element_ty), rows, total)
            if ACT != "":
                total_up = tl.dot(tile_of(at_up, k, start, K, BLOCK_K).to(x.dtype.element_ty), rows, total_up)
        if scales is not None:
            scale = scales + expert.to(tl.int64) * scale_step + safe
            total *= tl.load(scale)[:, None]
            if ACT != "":
                total_up *= tl.load(scale + N)[:, None]
        if ACT != "":
            total = activate(total, ACT) * total_up
        store(total, None, 0, y, m, tl.program_id(1) * BLOCK_N, end, N)


def reason(x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None) -> str | None:
    """Why :func:`experts_gemm` cannot run these."""
    if offs is None:
        return "the GPU kernel for the experts of prompts takes rows sorted by expert"
    if weight.dim() != 3 or weight.stride(0) % 16:
        return "the GPU kernels for experts take weights [E, N, K], each from a multiple of 16 elements on"
    if offs.dtype != torch.int32 or not offs.is_contiguous():
        return "the GPU kernels for experts take contiguous int32 ends"
    return _gemv.reason(x, [weight[0]], [None if scale is None else scale[0]], [None])


def choose(s: int, experts: int, pair: bool, each: int, device: torch.device) -> Config:
    """Tiles of about the rows that an expert has on average. ``each``: bytes of a weight. Not measured yet."""
    rows = 16
    while rows < 128 and rows * experts < s:
        rows *= 2
    stage = 128 * (128 * each + 2 * rows)
    stages = min(max(limits(device)[1] // stage, 2), 3 if rows == 128 else 4)
    return rows, 64 if pair else 128, 128, stages, 8 if rows == 128 and not pair else 4


@lru_cache(4096)
def _bind(
    s: int, k: int, n: int, experts: int, strides: tuple[int, ...], act: str, config: Config, ahead: bool,
    *_dtypes_device: Any,
) -> Launch:  # fmt: skip
    x_stride, *others = strides
    rows, columns, depth, stages, warps = config
    tiles = s // rows + min(experts, s)  # each expert's last may be a part
    scalars = (
        x_stride, experts, n, *others,
        k, triton.next_power_of_2(experts), act, rows, columns, depth, stages, ahead,
    )  # fmt: skip
    return Launch(_experts_gemm, (tiles, triton.cdiv(n, columns)), scalars, warps, ahead)


def experts_gemm(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor, act: str = "", config: Config | None = None
) -> Tensor:
    """x [S, K] sorted by expert, weights [E, N, K] as :func:`reason` has them; y [S, N], or [S, N / 2] under ``act``.
    Rows behind the last end are not written."""
    x = _gemv.rows(x)
    s, k = x.shape
    n = weight.shape[1] // 2 if act else weight.shape[1]
    y = x.new_empty((s, n))
    strides = (x.stride(0), *weight.stride()[:2], 0 if scale is None else scale.stride(0))
    config = config or choose(s, weight.shape[0], act != "", weight.element_size(), x.device)
    launch = _bind(
        s, k, n, weight.shape[0], strides, act, config, pdl(x.device), scale is None, x.dtype, x.device
    )  # fmt: skip
    launch(x, weight, scale, offs, y)
    return y
