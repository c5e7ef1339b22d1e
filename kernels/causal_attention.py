"""Attention under a causal mask that is computed where it is needed, from positions.

    query m, at position rows[m], attends key n, at columns[n], where
    columns[n] <= rows[m],  columns[n] > rows[m] - window,  keys[b, columns[n]]

q [B, H, S, D]; k [B, Hkv, L, D]; v [B, Hkv, L, Dv]; rows int64 [S] and columns int64 [L]: each counts up by one.
keys bool [at least B, P], False for padding, or None; P exceeds every column, and no kernel reads further. window: an
int above 0, or None for all. scale, softcap and out [B, H, S, Dv] as in ``attention``; a row that attends nothing gives
zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyfuse.kernels import _native, attention
from tinyfuse.kernels._attention_decode import MAX_ROWS
from tinyfuse.kernels._attention_prefill import Reach, prefill
from tinyfuse.op import Kernel, register

# Query rows for which the CPU makes a mask at a time. Measured on two cores: at 2048 causal tokens blocks of 64 to 512
# rows take 0.6 of the time of one call under the whole mask, at 256 tokens those of 256 rows 1.1 times as long as 128.
BLOCK = 128
# Up to so many keys the few rows of a decode kernel are not worth a mask.
FEW_KEYS = 1024


def visible(rows: Tensor, columns: Tensor, keys: Tensor | None, window: int | None, batch: int) -> Tensor:
    """The mask, bool [1 or batch, 1, S, L]."""
    mask = columns <= rows[:, None]
    if window is not None:
        mask = mask & (columns > rows[:, None] - window)
    mask = mask[None, None]
    return mask if keys is None else mask & keys[:batch, columns][:, None, None]


def reference(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, keys: Tensor | None, window: int | None,
    scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    mask = visible(rows, columns, keys, window, len(q))
    return attention.reference(q, k, v, mask, scale, False, softcap)


def fake(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, keys: Tensor | None, window: int | None,
    scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    return attention.fake(q, k, v, None, scale, False, softcap)


def prefills(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, keys: Tensor | None, window: int | None,
    scale: float, softcap: float | None = None,
) -> str | None:  # fmt: skip
    if q.dtype == torch.float32:
        return "the prefill kernel computes on 16-bit tensor cores"
    sizes = q.shape[2], k.shape[2]
    if all(isinstance(size, int) for size in sizes) and sizes[0] <= MAX_ROWS and sizes[1] > FEW_KEYS:
        return "a few rows over many keys are split along the keys"
    return attention.unsupported(q, k, v, None, scale, True)


def run_prefill(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, keys: Tensor | None, window: int | None,
    scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    return prefill(q, k, v, None, scale, True, softcap=softcap, reach=Reach(rows, columns, keys, window))


def supports_masked(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, keys: Tensor | None, window: int | None,
    scale: float, softcap: float | None = None,
) -> str | None:  # fmt: skip
    return attention.decodes(q, k, v, None, scale, False, softcap)


def run_masked(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, keys: Tensor | None, window: int | None,
    scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    return attention.OP(q, k, v, visible(rows, columns, keys, window, len(q)), scale, False, softcap)


# --- CPU ---


def supports_native(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, keys: Tensor | None, window: int | None,
    scale: float, softcap: float | None = None,
) -> str | None:  # fmt: skip
    return attention.supports_native(q, k, v, None, scale, True, softcap) or _native.reason(keys)


def run_native(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, keys: Tensor | None, window: int | None,
    scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    padding = None if keys is None else keys[:, None, None]
    return attention.run_native(q, k, v, padding, scale, True, softcap, rows, columns, window)


def supports_blocks(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, keys: Tensor | None, window: int | None,
    scale: float, softcap: float | None = None,
) -> str | None:  # fmt: skip
    return attention.supports_sdpa(q, k, v, None, scale, True, softcap)


def run_blocks(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, keys: Tensor | None, window: int | None,
    scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """SDPA of a block of rows at a time over the keys in its reach."""
    first, blocks = int(rows[0] - columns[0]), []
    for start in range(0, q.shape[2], BLOCK):
        some = slice(start, min(start + BLOCK, q.shape[2]))
        low = 0 if window is None else max(start + first + 1 - window, 0)
        near = slice(low, max(min(some.stop + first, k.shape[2]), low))
        mask = visible(rows[some], columns[near], keys, window, len(q))
        blocks.append(attention.flash(q[:, :, some], k[:, :, near], v[:, :, near], mask, scale, False))
    return blocks[0] if len(blocks) == 1 else torch.cat([block.transpose(1, 2) for block in blocks], 1).transpose(1, 2)


OP = register(
    "causal_attention(Tensor q, Tensor k, Tensor v, Tensor rows, Tensor columns, Tensor? keys, int? window, "
    "float scale, float? softcap=None) -> Tensor",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("prefill", "cuda", prefills, run_prefill),
        Kernel("masked", "cuda", supports_masked, run_masked),
        Kernel("native", "cpu", supports_native, run_native),
        Kernel("blocks", "cpu", supports_blocks, run_blocks),
    ],
)
