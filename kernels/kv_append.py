"""Write new keys and values into a static cache, in place: keys[:, :, pos] = k, values[:, :, pos] = v.

keys [B, H, L, D], values [B, H, L, Dv]; k [B, H, S, D], v [B, H, S, Dv] with any strides; pos int64 [S], 0 <= pos < L.
"""

from __future__ import annotations

from torch import Tensor

from tinyfuse.op import register


def reference(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> None:
    keys.index_copy_(2, pos, k)
    values.index_copy_(2, pos, v)


OP = register(
    "kv_append(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, Tensor pos) -> ()", reference=reference
)
