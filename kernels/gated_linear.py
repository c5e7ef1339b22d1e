"""Gate and up projections with their activation in one launch: y = act(x Wg^T + bg) * (x Wu^T + bu).

x [..., K]; weights [N, K], scales and biases as in ``linear`` (the halves of a merged weight are views);
act as in ``gated_act``; y [..., N] contiguous, in x's dtype. Eager code rounds both projections and the
activation to x's dtype on the way; a kernel may keep them wider.
"""

from __future__ import annotations

from torch import Tensor

from tinyfuse.kernels import gated_act, linear
from tinyfuse.op import register


def reference(
    x: Tensor, w_gate: Tensor, w_up: Tensor, s_gate: Tensor | None, s_up: Tensor | None,
    b_gate: Tensor | None, b_up: Tensor | None, act: str,
) -> Tensor:  # fmt: skip
    gate = linear.reference(x, w_gate, s_gate, b_gate, None)
    return gated_act.reference(gate, linear.reference(x, w_up, s_up, b_up, None), act)


OP = register(
    "gated_linear(Tensor x, Tensor w_gate, Tensor w_up, Tensor? s_gate, Tensor? s_up, Tensor? b_gate,"
    " Tensor? b_up, str act) -> Tensor",
    reference=reference,
)
