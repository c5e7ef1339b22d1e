"""Every spelling of an anchor is found once, and what only looks like one is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tinyfuse.kernels.linear  # noqa: F401  (defines torch.ops.tinyfuse.linear)
from tinyfuse.anchors import Anchor, find_anchors

X = torch.randn(2, 5, 16)
HEADS = torch.randn(2, 4, 5, 8)


def anchors(function: Callable, *inputs: Tensor) -> list[Anchor]:
    found: list[Anchor] = []

    def backend(gm, _):
        found.extend(find_anchors(gm.graph))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return found


def kinds(function: Callable, *inputs: Tensor) -> list[tuple[str, str]]:
    return [(anchor.kind, anchor.node.name.rstrip("_0123456789")) for anchor in anchors(function, *inputs)]


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)


def centred(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (rms, "rms_norm"),
        (lambda x: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5), "rms_norm"),
        (lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6), "rms_norm"),
        (lambda x: F.rms_norm(x, (16,)), "rms_norm"),
        (lambda x: F.layer_norm(x, (16,)), "layer_norm"),
        (centred, "layer_norm"),
        (lambda x: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6), "layer_norm"),
    ],
)
def test_norms(function: Callable, kind: str) -> None:
    assert [found for found, _ in kinds(function, X)] == [kind]


def test_square_roots_and_powers_that_are_no_norms() -> None:
    assert kinds(lambda x: x.abs().sqrt() * x.pow(2) + torch.pow(x.abs() + 1, 0.5), X) == []


class Linears(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(16, 8)
        self.transposed = nn.Parameter(torch.randn(8, 12))
        self.bias = nn.Parameter(torch.randn(12))
        self.int8 = nn.Parameter(torch.ones(6, 12, dtype=torch.int8), requires_grad=False)
        self.register_buffer("table", torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.bias, self.plain(x).view(-1, 8), self.transposed)
        x = torch.ops.tinyfuse.linear(x, self.int8, torch.ones(6), None, None)
        return x @ self.table


def test_linears_are_products_with_a_parameter() -> None:
    found = anchors(Linears(), X)
    assert [(a.kind, a.detail, a.module) for a in found] == [
        ("linear", "", "plain"), ("linear", "addmm", ""), ("linear", "", ""),
    ]  # fmt: skip


class Falcon(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_modules_are_named_as_named_modules_names_them() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(Falcon()))
    assert [a.module for a in anchors(model, X)] == ["0", "1.0"]
    forward = model.forward
    assert [a.module for a in anchors(lambda x: forward(x), X)] == ["0", "1.0"]


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., 4:], x[..., :4]), -1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def half_by_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (a, b), cos, sin = x.chunk(2, dim=-1), cos[..., :4], sin[..., :4]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def in_complex_numbers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * torch.polar(cos, sin)[..., :4]
    return torch.view_as_real(turned).flatten(3)


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., :4], x[..., 4:]
    half = torch.cat((-turned[..., 2:], turned[..., :2]), -1)
    return torch.cat((turned * cos[..., :4] + half * sin[..., :4], rest), -1)


@pytest.mark.parametrize(
    ("rope", "node"),
    [
        (lambda x, cos, sin: x * cos + rotate_half(x) * sin, "add"),
        (lambda x, cos, sin: rotate_pairs(x) * sin + x * cos, "add"),
        (lambda x, cos, sin: x.float() * cos + rotate_half(x.float()) * sin, "add"),
        (partial, "add"),
        (half_by_half, "cat"),
        (in_complex_numbers, "mul"),
    ],
)
def test_ropes_are_found_once_per_rotated_tensor(rope: Callable, node: str) -> None:
    cos, sin = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    found = anchors(lambda q, k: (rope(q, cos, sin), rope(k, cos, sin)), HEADS, HEADS[:, :2].clone())
    assert [a.kind for a in found] == ["rope", "rope"]
    assert all(node in str(a.node.target) for a in found)


def test_sums_of_products_that_do_not_rotate() -> None:
    y, z = HEADS + 1, HEADS + 2
    assert kinds(lambda x, y, z: x * z + torch.cat((y[..., 4:], -y[..., :4]), -1) * z, HEADS, y, z) == []
    assert kinds(lambda x, y, z: x * z + torch.cat((x[..., 4:], x[..., :4]), -1) * z, HEADS, y, z) == []


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.randn(8, 5, 5)
    scores = bias.baddbmm(q.reshape(8, 5, 8), k.reshape(8, 5, 8).transpose(1, 2), beta=1.0, alpha=0.3)
    return torch.bmm(F.softmax(scores.view(2, 4, 5, 5).float(), -1).to(q.dtype).view(8, 5, 5), v.reshape(8, 5, 8))


def sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT * 0.3, torch.randn(2, 4, 5, 1)], -1)
    return F.softmax(scores - scores.max(-1, keepdim=True).values, -1)[..., :-1] @ v


@pytest.mark.parametrize(
    "function",
    [
        F.scaled_dot_product_attention,
        lambda q, k, v: torch.softmax(torch.tanh(q @ k.mT / 7) * 7, -1) @ v,
        lambda q, k, v: torch.matmul(F.dropout((torch.matmul(q, k.mT) + q[..., :1]).softmax(-1), 0.0), v),
        alibi,
        sinks,
    ],
)
def test_attentions(function: Callable) -> None:
    assert [kind for kind, _ in kinds(function, HEADS, HEADS + 1, HEADS + 2)] == ["attention"]


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.gate(x), -1).mT @ x


def test_a_router_is_no_attention() -> None:
    assert [a.kind for a in anchors(Router(), X)] == ["linear"]


class MLP(nn.Module):
    def __init__(self, act: Callable, gated: bool):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act, self.gated = act, gated

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.gate(x))
        return self.down(self.up(x) * h if self.gated else h)


def gelu_by_hand(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


@pytest.mark.parametrize(
    ("act", "detail"),
    [
        (F.silu, "silu"),
        (F.gelu, "gelu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (F.relu, "relu"),
        (lambda x: F.relu(x).square(), "relu"),
        (gelu_by_hand, "gelu_tanh written out"),
        (lambda x: x * torch.sigmoid(1.702 * x), "silu written out"),
    ],
)
def test_activations_of_an_mlp(act: Callable, detail: str) -> None:
    assert [a.detail for a in anchors(MLP(act, gated=False), X) if a.kind == "activation"] == [detail]
    assert [a.detail for a in anchors(MLP(act, gated=True), X) if a.kind == "activation"] == [f"gated {detail}"]


class Merged(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Linear(16, 48), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(up * F.silu(gate))


def test_halves_of_one_linear_gate_each_other() -> None:
    assert [(a.kind, a.detail) for a in anchors(Merged(), X)] == [
        ("linear", ""), ("activation", "gated silu"), ("linear", ""),
    ]  # fmt: skip


def test_an_activation_away_from_linears_is_none() -> None:
    assert kinds(lambda x: F.silu(x) * x, X) == []
