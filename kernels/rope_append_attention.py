"""A token's attention over a static cache, from the q/k/v linears on: rotate q and k, write k and v, attend.

q [B, H, 1, D], k [B, Hkv, 1, D], v [B, Hkv, 1, Dv], cos ... interleaved as in ``rope_append``; mask and scale as in
``attention``, over the whole cache with the new token in it; bounds, if given, are the mask's ``mask_bounds``. Returns
[B, H, 1, Dv], laid out as ``attention``'s.
"""

from __future__ import annotations

from torch import Tensor

from tinyfuse.kernels import attention, rope_append
from tinyfuse.kernels._attention_decode import New
from tinyfuse.op import Kernel, register


def reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool, mask: Tensor | None, scale: float, bounds: Tensor | None = None,
) -> Tensor:  # fmt: skip
    q = rope_append.reference(q, k, v, cos, sin, keys, values, pos, interleaved)
    return attention.reference(q, keys, values, mask, scale, False)


def fake(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool, mask: Tensor | None, scale: float, bounds: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return attention.fake(q, keys, values, mask, scale, False)


def supports_triton(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool, mask: Tensor | None, scale: float, bounds: Tensor | None = None,
) -> str | None:  # fmt: skip
    if q.shape[2] != 1:
        return f"the kernel takes one token, not {q.shape[2]}"
    if cos.dim() != 4 or sin.dim() != 4:
        return "cos and sin do not have 4 dimensions"
    return attention.unsupported(q, keys, values, mask, scale, False) or rope_append.supports_triton(
        q, k, v, cos, sin, keys, values, pos, interleaved
    )


def run_triton(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool, mask: Tensor | None, scale: float, bounds: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return attention.decode(
        q, keys, values, mask, scale, False, new=New(k, v, cos, sin, pos, interleaved), bounds=bounds
    )


def supports_native(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool, mask: Tensor | None, scale: float, bounds: Tensor | None = None,
) -> str | None:  # fmt: skip
    return attention.supports_native(q, keys, values, mask, scale, False) or rope_append.supports_native(
        q, k, v, cos, sin, keys, values, pos, interleaved
    )


def run_native(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, pos: Tensor,
    interleaved: bool, mask: Tensor | None, scale: float, bounds: Tensor | None = None,
) -> Tensor:  # fmt: skip
    q = rope_append.run_native(q, k, v, cos, sin, keys, values, pos, interleaved)
    return attention.run_native(q, keys, values, mask, scale, False)


OP = register(
    "rope_append_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values,"
    " Tensor pos, bool interleaved, Tensor? mask, float scale, Tensor? bounds=None) -> Tensor",
    reference=reference,
    fake=fake,
    kernels=[
        Kernel("triton", "cuda", supports_triton, run_triton),
        Kernel("native", "cpu", supports_native, run_native),
    ],
)
