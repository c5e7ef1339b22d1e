"""Scaled dot-product attention with grouped key/value heads.

    out = softmax(s + mask) v,  s = scale * q k^T, with ``softcap`` c  s = c tanh(scale * q k^T / c)

q [B, H, Sq, D]; k [B, Hkv, Skv, D]; v [B, Hkv, Skv, Dv]; H a multiple of Hkv, query head h reads
kv head h // (H / Hkv). mask: None, bool (True = attend) or floating (added; of q's dtype or wider), broadcastable to
[B, H, Sq, Skv]. ``is_causal``: query i attends keys j <= i, top-left aligned, as in SDPA.
A row whose bool mask is all False gives zeros. out [B, H, Sq, Dv] in q's dtype, laid out in memory
as [B, Sq, H, Dv], so that HF's ``transpose(1, 2).contiguous()`` copies nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfuse.kernels import _native, _triton
from tinyfuse.kernels._attention_decode import MAX_ROWS, decode
from tinyfuse.kernels._attention_prefill import prefill
from tinyfuse.op import Kernel, register


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    if mask is not None and mask.is_floating_point() and mask.dtype != q.dtype:
        return reference(q.float(), k.float(), v.float(), mask.float(), scale, is_causal, softcap).to(q.dtype)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale)
    else:
        out = _capped(q, k, v, mask, scale, is_causal, softcap)
    if mask is not None and mask.dtype == torch.bool:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, softcap: float
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = softcap * torch.tanh(torch.matmul(q.to(wide), k.to(wide).transpose(2, 3)) * (scale / softcap))
    if is_causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(torch.softmax(scores, 3).to(v.dtype), v)


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool,
    softcap: float | None = None,
) -> str | None:  # fmt: skip
    """Why no Triton kernel can run these arguments, or None."""
    if _triton.missing:
        return _triton.missing
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the attention kernels take bfloat16, float16 and float32, not {q.dtype}"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
    if not all(isinstance(x.shape[3], int) and 16 <= x.shape[3] <= 256 for x in (q, v)):
        return f"the attention kernels take a head_dim of 16 to 256, not {q.shape[3]} and {v.shape[3]}"
    if not all(isinstance(x.shape[1], int) for x in (q, k)) or q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key/value heads"
    if any(x.stride(3) != 1 for x in (q, k, v)):
        return "the last dimension of q, k or v is not contiguous"
    if mask is not None and is_causal:
        return "SDPA takes a mask or is_causal, not both"
    if mask is not None and not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        return f"a mask is bool or floating, not {mask.dtype}"
    return None


def decodes(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool,
    softcap: float | None = None,
) -> str | None:  # fmt: skip
    """A symbolic number of query rows is left to the prefill kernel: comparing it would add a guard."""
    if not isinstance(q.shape[2], int) or q.shape[2] > MAX_ROWS:
        return f"the decode kernel takes at most {MAX_ROWS} query rows"
    return unsupported(q, k, v, mask, scale, is_causal)


def prefills(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool,
    softcap: float | None = None,
) -> str | None:  # fmt: skip
    """The limits are where SDPA measured faster on an H200. A symbolic number of query rows is taken as few."""
    rows, width = q.shape[2], q.shape[3]
    if q.dtype == torch.float32:
        return "the prefill kernel computes on 16-bit tensor cores; float32 stays with SDPA"
    if softcap is not None:
        return unsupported(q, k, v, mask, scale, is_causal)  # SDPA has no softcap
    if mask is None:
        limit = 2048 if width <= 64 else 1024 if width <= 128 else 256
        if isinstance(rows, int) and rows > limit:
            return f"without a mask SDPA is faster from {limit} query rows on"
    elif mask.dtype == q.dtype:  # SDPA takes no other floating mask
        aligned = mask.dim() > 1 and isinstance(mask.stride(-2), int) and mask.stride(-2) % 8 == 0
        if not (isinstance(rows, int) and rows <= 512 and width <= 128 and aligned):
            return "with a floating mask SDPA is faster beyond 512 query rows, a head_dim of 128, or unaligned"
    return unsupported(q, k, v, mask, scale, is_causal)


def run_decode(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    return decode(q, k, v, mask, scale, is_causal, softcap=softcap)


def run_prefill(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    return prefill(q, k, v, mask, scale, is_causal, softcap=softcap)


def supports_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool,
    softcap: float | None = None,
) -> str | None:  # fmt: skip
    return None if softcap is None else "SDPA has no softcap"


def flashes(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool,
    softcap: float | None = None,
) -> str | None:  # fmt: skip
    if mask is not None or q.dtype == torch.float32:  # left to the reference, for the reason of the kernel before
        return prefills(q, k, v, mask, scale, is_causal, softcap) or "SDPA's flash kernels take no mask"
    return supports_sdpa(q, k, v, mask, scale, is_causal, softcap)


def flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """SDPA without the copies of keys and values that ``reference`` makes for grouped heads. On a CPU it gives zeros
    for rows that no key is shown to."""
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


# --- CPU ---

_pack_native = _native.packer("36qdd")
# Measured: at 12 x 12 scores per head the kernel takes 0.6 to 0.8 of SDPA's time, at 32 x 32 up to 1.5, at 128 x 128 2.
MOST_SCORES = 256


def supports_native(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool,
    softcap: float | None = None,
) -> str | None:  # fmt: skip
    if q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key/value heads"
    if mask is not None and (mask.dim() != 4 or mask.dtype not in (torch.bool, *_native.FLOATING)):
        return "the CPU attention takes a bool or floating mask of rank 4"
    if softcap is None and q.shape[2] > 1 and q.shape[2] * k.shape[2] > MOST_SCORES:
        return f"SDPA is faster from {MOST_SCORES} scores per head on, but for a single query row"
    return _native.rows_reason(q, k, v) or _native.reason(mask)


def run_native(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool,
    softcap: float | None = None, rows: Tensor | None = None, columns: Tensor | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """With ``rows`` and the rest as in ``causal_attention``, whose keys are ``mask`` [B, 1, 1, P]."""
    batch, heads, queries, width = q.shape
    _, kv_heads, length, value_width = v.shape
    out = q.new_empty(batch, queries, heads, value_width).transpose(1, 2)
    masking = (0, 0, 0, 0, 0, 0)
    if mask is not None:
        strides = (0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
        masking = (mask.data_ptr(), *strides, _native.DTYPES[mask.dtype])
    positions = (0, 0) if rows is None else (rows.data_ptr(), columns.data_ptr())
    held = length if mask is None else mask.shape[3]
    _native.call(
        "tf_attention",
        _pack_native(
            *_native.view(q), *_native.view(k), *_native.view(v), *_native.view(out), *masking, batch, heads, kv_heads,
            queries, length, width, value_width, _native.DTYPES[q.dtype], is_causal, _native.threads(),
            *positions, held, window or 0, scale, softcap or 0.0,
        ),
    )  # fmt: skip
    return out


def fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


OP = register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal, float? softcap=None) -> Tensor",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("decode", "cuda", decodes, run_decode),
        Kernel("prefill", "cuda", prefills, run_prefill),
        Kernel("sdpa", "cuda", flashes, flash),
        Kernel("native", "cpu", supports_native, run_native),
        Kernel("sdpa", "cpu", supports_sdpa, flash),
    ],
)
