"""Scaled dot-product attention with grouped key/value heads.

    out = softmax(scale * q k^T + mask) v

q [B, H, Sq, D]; k [B, Hkv, Skv, D]; v [B, Hkv, Skv, Dv]; H a multiple of Hkv, query head h reads
kv head h // (H / Hkv). mask: None, bool (True = attend) or floating (added), broadcastable to
[B, H, Sq, Skv]. ``is_causal``: query i attends keys j <= i, top-left aligned, as in SDPA.
A row whose bool mask is all False gives zeros. out [B, H, Sq, Dv] in q's dtype, laid out in memory
as [B, Sq, H, Dv], so that HF's ``transpose(1, 2).contiguous()`` copies nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfuse.op import register


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale)
    if mask is not None and mask.dtype == torch.bool:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


OP = register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal) -> Tensor",
    reference=reference,
)
