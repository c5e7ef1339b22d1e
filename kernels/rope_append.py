"""Rotate q and k, then write k and v into a static cache: the whole step between the q/k/v linears and attention.

q [B, H, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], any strides; cos, sin, interleaved as in ``rope``;
keys, values, pos as in ``kv_append``. Returns the rotated q, laid out in memory as [B, S, H, D].
"""

from __future__ import annotations

from torch import Tensor

from tinyfuse.kernels import _native, kv_append, rope
from tinyfuse.op import Kernel, register


def reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    kv_append.reference(keys, values, rope.reference(k, cos, sin, interleaved), v, pos)
    return rope.reference(q, cos, sin, interleaved)


# --- CPU ---


def supports_native(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool,
) -> str | None:  # fmt: skip
    return (
        _native.rotary_reason(q, cos, sin)
        or _native.rows_reason(q, k, v, keys, values)
        or kv_append.supports_native(keys, values, k, v, pos)
    )


def run_native(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    return _native.rope(q, k, v, cos, sin, keys, values, pos, interleaved)


OP = register(
    "rope_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values,"
    " Tensor pos, bool interleaved) -> Tensor",
    reference=reference,
    kernels=[Kernel("native", "cpu", supports_native, run_native)],
)
