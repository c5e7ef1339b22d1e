"""Rows of tensors with any strides: leading dimensions are merged where memory allows, to at most three."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tinyfuse.kernels import _triton
from tinyfuse.kernels._triton import jit, pdl, tl, triton

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
MAX_DIMS = 3
MAX_BLOCK = 16384


class Norm(NamedTuple):
    """An RMS norm in front of a product; fields as in ``rms_norm``."""

    weight: Tensor | None
    eps: float
    unit_offset: bool
    cast_first: bool


class Rows(NamedTuple):
    """``count`` rows over ``dims`` dimensions; ``sizes`` of the second and third; strides of each tensor, padded to
    three dimensions, one after the other. Row r is ``(r // (n1 * n2), r // n2 % n1, r % n2)``."""

    count: int
    dims: int
    sizes: tuple[int, int]
    strides: tuple[int, ...]


def merge(shape: tuple[int, ...], *strides: tuple[int, ...]) -> Rows | None:
    """The rows that tensors of one ``shape`` share, in the order of the last one's memory; None if over three dims."""
    order = sorted((d for d, size in enumerate(shape) if size != 1), key=lambda d: -strides[-1][d])
    dims: list[tuple[int, list[int]]] = []
    for d in order:
        size, steps = shape[d], [s[d] for s in strides]
        if dims and all(outer == size * inner for outer, inner in zip(dims[-1][1], steps, strict=True)):
            size *= dims.pop()[0]
        dims.append((size, steps))
    if len(dims) > MAX_DIMS:
        return None
    count = 1
    for size, _ in dims:
        count *= size
    missing = MAX_DIMS - len(dims)
    sizes = [1] * missing + [size for size, _ in dims]
    padded = [0] * missing
    flat = [step for i in range(len(strides)) for step in padded + [steps[i] for _, steps in dims]]
    return Rows(count, len(dims), (sizes[1], sizes[2]), tuple(flat))


def merge_columns(shape: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[int, Rows]:
    """(N, rows) of elementwise work: rows that follow each other in every tensor are one row of N columns."""
    N, d = shape[-1], len(shape) - 1
    while d and all(s[d - 1] == N for s in strides):
        d -= 1
        N *= shape[d]
    return N, merge(shape[:d], *(s[:d] for s in strides))


def unsupported(name: str, *tensors: Tensor, columns: bool = False) -> str | None:
    """Why ``tensors``, of one shape, cannot be read row by row, or None. ``columns``: theirs may lie apart."""
    if _triton.missing:
        return _triton.missing
    first = tensors[0]
    for x in tensors:
        if x.dtype not in FLOATS:
            return f"{name} kernels take bfloat16, float16 and float32, not {x.dtype}"
        if x is not first and (x.dtype is not first.dtype or x.shape != first.shape):
            return f"the inputs of {name} differ in dtype or shape"
        if not x.dim():
            return f"the input of {name} has no dimension"
        if x.is_contiguous() or x.shape[-1] == 1 or (columns and 1 < x.stride(-1) < 2**31 // x.shape[-1]):
            continue
        if x.stride(-1) != 1:
            return f"the last dimension of the input of {name} is not contiguous"
        if any(s == 1 and n != 1 for s, n in zip(x.stride()[:-1], x.shape, strict=False)):
            return f"the rows of the input of {name} overlap in memory"
    if first.dim() - 1 > MAX_DIMS and merge(first.shape[:-1], *(x.stride()[:-1] for x in tensors)) is None:
        return f"the strides of the input of {name} do not merge into {MAX_DIMS} dimensions"
    return None


def unsupported_weight(name: str, x: Tensor, *weights: Tensor | None) -> str | None:
    """Why the per-channel ``weights`` of rows ``x`` cannot be read, or None."""
    for w in weights:
        if w is None:
            continue
        if w.dtype not in FLOATS:
            return f"{name} kernels take bfloat16, float16 and float32 weights, not {w.dtype}"
        if w.dim() != 1 or w.shape[0] != x.shape[-1] or not w.is_contiguous():
            return f"the weight of {name} is not one contiguous value per channel"
    return None


class Tile(NamedTuple):
    """Columns and rows per program, warps."""

    block_n: int
    rows: int
    warps: int


def tile(N: int, many: bool) -> Tile:
    """One row per program for long rows and for few rows (latency counts), else 2048 elements."""
    block = min(triton.next_power_of_2(N), MAX_BLOCK)
    rows = max(1, 2048 // block) if many else 1
    return Tile(block, rows, max(1, min(16, block * rows // 512)))


def heads_per_program(H: int, D: int, tokens: int) -> int:
    """All heads of a token up to 4096 elements, or four while tokens are too few to fill the device."""
    most = max(1, 4096 // triton.next_power_of_2(D)) if tokens >= 128 else 4
    return min(triton.next_power_of_2(H), most)


@lru_cache(4096)
def _sum_strides(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return (torch.empty_strided(shape, a, device="meta") + torch.empty_strided(shape, b, device="meta")).stride()


def empty_sum(x: Tensor, residual: Tensor) -> Tensor:
    """An uninitialised tensor with the layout that ``x + residual`` would have."""
    if x.stride() == residual.stride():
        return torch.empty_like(x)
    return x.new_empty_strided(x.shape, _sum_strides(x.shape, x.stride(), residual.stride()))


class Layout(NamedTuple):
    """What a norm's launch depends on besides its flags: strides of x, residual, total (None: absent) and y."""

    shape: tuple[int, ...]
    x: tuple[int, ...]
    residual: tuple[int, ...] | None
    total: tuple[int, ...] | None
    y: tuple[int, ...]
    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None
    device: torch.device
    ahead: bool


def layout(
    x: Tensor, residual: Tensor | None, total: Tensor | None, y: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Layout:
    return Layout(
        x.shape, x.stride(), None if residual is None else residual.stride(),
        None if total is None else total.stride(), y.stride(),
        x.dtype, None if weight is None else weight.dtype, None if bias is None else bias.dtype,
        x.device, pdl(x.device),
    )  # fmt: skip


def plan(place: Layout) -> tuple[Rows, Tile, tuple[int, ...]]:
    """The rows of x, residual, total and y, where x and y stand in for what is absent, the tile, and how far the
    columns of each lie apart. Where they do, rows lie beside each other: 16 of them are a sector of memory."""
    strides = place.x, place.residual or place.x, place.total or place.y, place.y
    rows = merge(place.shape[:-1], *(s[:-1] for s in strides))
    columns, best = tuple([s[-1] for s in strides]), tile(place.shape[-1], rows.count > 1024)
    if columns != (1, 1, 1, 1):
        best = Tile(best.block_n, max(1, min(16, MAX_BLOCK // best.block_n)), 16)
    return rows, best, columns


@jit
def offset(row, n1, n2, s0, s1, s2, DIMS: tl.constexpr):
    """Where rows begin, int64; the arguments are fields of :class:`Rows`."""
    if DIMS <= 1:
        at = row.to(tl.int64) * s2
    else:
        outer = row // n2
        at = (row % n2).to(tl.int64) * s2
        if DIMS == 2:
            at += outer.to(tl.int64) * s1
        else:
            at += (outer % n1).to(tl.int64) * s1 + (outer // n1).to(tl.int64) * s0
    return at


@jit
def block(per_row, BLOCK_N: tl.constexpr):
    """(row, columns) of program r * per_row + i, which has block i of row r."""
    row = tl.program_id(0) // per_row
    return row, (tl.program_id(0) % per_row).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)


@jit
def prefetch(pointer, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Bring N values into L2 before ``gdc_wait``: unlike a load, safe even if they are not written yet.

    Only the first program does: from thousands of programs, prefetches of the same lines cost half the bandwidth."""
    if tl.program_id(0) == 0:
        at = tl.minimum(tl.arange(0, BLOCK_N // 8) * 8, N - 1) if BLOCK_N >= 8 else tl.arange(0, 1)
        fetch(pointer + at)


@jit
def fetch(pointers):
    """Bring the lines at ``pointers`` into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@jit
def load_sum(x, residual, total, at, inside, x_n=1, r_n=1, t_n=1):
    """Columns ``at`` of x, or of x + residual rounded to x's dtype (then also stored to total, if given), as fp32.
    ``x_n`` ...: how far their columns lie apart."""
    value = tl.load(x + at * x_n, mask=inside, other=0.0)
    if residual is not None:
        more = tl.load(residual + at * r_n, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
        if total is not None:
            tl.store(total + at * t_n, value, mask=inside)
    return value.to(tl.float32)


@jit
def load_gain(weight, col, N: tl.constexpr):
    """Columns ``col`` of a norm's weight, None if it has none."""
    if weight is not None:
        return tl.load(weight + col, mask=col < N, other=0.0)


@jit
def scaled(value, factor, gain, DTYPE: tl.constexpr, UNIT_OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr):
    """value * factor * gain in DTYPE, with the roundings of ``rms_norm.reference``."""
    out = value * factor
    if gain is not None:
        if CAST_FIRST:
            out = out.to(DTYPE).to(tl.float32)
            if UNIT_OFFSET:
                gain = (1.0 + gain.to(tl.float32)).to(gain.dtype)
        elif UNIT_OFFSET:
            gain = 1.0 + gain.to(tl.float32)
        out = gain.to(tl.float32) * out
    return out.to(DTYPE)
