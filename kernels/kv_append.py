"""Write new keys and values into a static cache, in place: keys[:, :, pos] = k, values[:, :, pos] = v.

keys [B, H, L, D], values [B, H, L, Dv]; k [B, H, S, D], v [B, H, S, Dv] with any strides; pos int64 [S], 0 <= pos < L.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyfuse.kernels import _native
from tinyfuse.op import Kernel, register


def reference(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> None:
    keys.index_copy_(2, pos, k)
    values.index_copy_(2, pos, v)


# --- CPU ---


def supports_native(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> str | None:
    if pos.dtype != torch.int64 or pos.dim() != 1:
        return "the CPU cache kernels take int64 positions [S]"
    return _native.rows_reason(k, v, keys, values)


def run_native(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> None:
    _native.rope(None, k, v, None, None, keys, values, pos, False)


OP = register(
    "kv_append(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, Tensor pos) -> ()",
    reference=reference,
    kernels=[Kernel("native", "cpu", supports_native, run_native)],
)
