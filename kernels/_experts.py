"""Products of few rows with the weights of their experts: one matrix-vector product per row, as in ``_one_row``.

    y[s] = W[e(s)] x[s] (* scale)        or        act(W_gate x) * (W_up x), the halves of W[e(s)]'s rows

The expert of a row is read on the device, so a CUDA graph holds the launch, and of all experts only those that are
chosen are read. Programs that share weights, the same rows of one expert's for several rows of x, are neighbours.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfuse.kernels import _gemv
from tinyfuse.kernels._gemm import digit_count, split
from tinyfuse.kernels._one_row import digit_sums, lanes, load, steps, tile
from tinyfuse.kernels._triton import Launch, interpreted, jit, pdl, tl, triton
from tinyfuse.kernels.gated_act import activate

MOST_ROWS = 64


@jit
def _expert(offs, ids, s, E, BLOCK_E: tl.constexpr):
    """The expert of row s; E for a row behind the last end or a number out of range."""
    if ids is not None:
        expert = tl.load(ids + s)
        expert = tl.where(expert < 0, expert + E, expert)
        return tl.where((expert < 0) | (expert > E), E, expert).to(tl.int32)
    else:
        e = tl.arange(0, BLOCK_E)
        ends = tl.load(offs + e, mask=e < E, other=0x7FFFFFFF)
        return tl.sum((ends <= s).to(tl.int32), 0)


@jit(do_not_specialize=["E"])
def _pairs(
    x, x_scale, w, scales, offs, ids, y, x_stride, apart, E, N, step, stride, scale_step,
    EACH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_E: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, DIGITS: tl.constexpr, PDL: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Columns program_id(1) * ROWS .. of row program_id(0) of y [S, N]. int8: x is [DIGITS, S, K] digits, ``apart``
    bytes from digit to digit. ``step``, ``scale_step``: from expert to expert. EACH to STEPS: :func:`steps`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    INT: tl.constexpr = tl.int8 == w.dtype.element_ty
    PAIR: tl.constexpr = ACT != ""

    s = tl.program_id(0)
    expert = _expert(offs, ids, s, E, BLOCK_E)
    known = expert < E
    expert = tl.minimum(expert, E - 1).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = row < N
    safe = tl.minimum(row, N - 1).to(tl.int64)[:, None]
    i = tl.arange(0, STEP)[None, :]
    w += expert * step
    at_x = x + s.to(tl.int64) * x_stride
    if INT:
        w, at_x = w.to(tl.pointer_type(tl.int32)), at_x.to(tl.pointer_type(tl.int32))
    at = w + safe * (stride // EACH) + i
    at2 = w + (safe + N) * (stride // EACH) + i
    at_x += i
    tiles, tiles2 = (), ()
    for k in tl.static_range(STEPS):
        tiles += (load(at, i, k, COUNT, STEP, ""),)
        if PAIR:
            tiles2 += (load(at2, i, k, COUNT, STEP, ""),)
    scale, scale2 = 1.0, 1.0
    if INT:
        scales += expert * scale_step + row
        number = tl.load(x_scale + s)
        scale = tl.load(scales, mask=live, other=0.0) * number
        total = digit_sums(at_x, apart // EACH, tiles, i, COUNT, ROWS, STEP, DIGITS, ASM)
        if PAIR:
            scale2 = tl.load(scales + N, mask=live, other=0.0) * number
            total2 = digit_sums(at_x, apart // EACH, tiles2, i, COUNT, ROWS, STEP, DIGITS, ASM)
    else:
        total = tl.zeros([ROWS, STEP // VECTOR], tl.float32)
        total2 = total
        for k in tl.static_range(STEPS):
            value = load(at_x, i, k, COUNT, STEP, "").to(tl.float32)
            total += lanes(tiles[k].to(tl.float32) * value, ROWS, STEP, VECTOR)
            if PAIR:
                total2 += lanes(tiles2[k].to(tl.float32) * value, ROWS, STEP, VECTOR)
    out = tl.sum(total, 1) * scale
    if PAIR:
        out = activate(out, ACT) * (tl.sum(total2, 1) * scale2)
    missing = 0.0
    if ids is not None:
        missing = float("nan")  # where stock torch would stop
    tl.store(y + s.to(tl.int64) * N + row, tl.where(known, out, missing).to(y.dtype.element_ty), mask=live)


def reason(x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None) -> str | None:
    """Why :func:`pairs` cannot run these."""
    if weight.dim() != 3 or weight.stride(0) % 16:
        return "the GPU kernel for experts takes weights [E, N, K], each from a multiple of 16 elements on"
    # It reads a weight again for each of its rows: that is less than a grouped product reads as long as there are no
    # more rows than experts, or four times as many where the product would first write all int8 weights as floats.
    most = min(MOST_ROWS, weight.shape[0] * (1 if scale is None else 4))
    if x.shape[0] > most:
        return f"the GPU kernel for experts takes at most {most} rows here, a token and one of its experts each"
    index = ids if offs is None else offs
    if not index.is_contiguous() or index.dtype != (torch.int64 if offs is None else torch.int32):
        return "the GPU kernel for experts takes contiguous int32 ends or int64 numbers of experts"
    return _gemv.reason(x, [weight[0]], [None if scale is None else scale[0]], [None])


@lru_cache(4096)
def _bind(
    m: int, k: int, n: int, experts: int, strides: tuple[int, ...], act: str, rows: int, warps: int, count: int,
    ahead: bool, int8: bool, *_dtypes_device: Any,
) -> Launch:  # fmt: skip
    """strides: of x, from digit to digit, of the weights from expert to expert and from row to row, of the scales."""
    x_stride, apart, step, stride, scale_step = strides
    scalars = (
        x_stride, apart, experts, n, step, stride, scale_step,
        *steps(k, int8, warps), triton.next_power_of_2(experts), act, rows, count, ahead, not interpreted(),
    )  # fmt: skip
    return Launch(_pairs, (m, triton.cdiv(n, rows)), scalars, warps, ahead)


def pairs(
    x: Tensor, weight: Tensor, scale: Tensor | None, offs: Tensor | None, ids: Tensor | None, act: str = "",
    config: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [S, K] and weights [E, N, K] as :func:`reason` has them; y [S, N], or [S, N / 2] under ``act``. ``config``:
    weight rows of a program, its warps."""
    x = _gemv.rows(x)
    (m, k), int8 = x.shape, scale is not None
    n = weight.shape[1] // 2 if act else weight.shape[1]
    y, count = x.new_empty((m, n)), digit_count(x.dtype)
    config = config or tile(k if int8 else 2 * k, n, int8, act != "")
    strides = (k if int8 else x.stride(0), m * k, *weight.stride()[:2], scale.stride(0) if int8 else 0)
    ahead = pdl(x.device)
    launch = _bind(m, k, n, weight.shape[0], strides, act, *config, count, ahead, int8, offs is None, x.dtype, x.device)
    operand, x_scale = split(x, count, m, 0) if int8 else (x, None)
    launch(operand, x_scale, weight, scale, offs, ids, y)
    return y
