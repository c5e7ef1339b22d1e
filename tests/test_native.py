"""The CPU kernels against float64, with what eager code errs as the measure."""

import ctypes
import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from tests import row_ops
from tests.tolerance import assert_as_exact_as_eager
from tinyfuse.kernels import (
    _native,
    add_layer_norm,
    add_rms_norm,
    attention,
    causal_attention,
    dequantize,
    experts_gated_linear,
    experts_linear,
    gated_act,
    gated_linear,
    kv_append,
    layer_norm,
    linear,
    linear_group,
    rms_norm,
    rope,
    rope_append,
    rope_tables,
    step_counters,
)

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def run(op, *args):
    """The native kernel's result, after its ``supports`` agreed."""
    assert op.supports_native(*args) is None
    return op.run_native(*args)


def activations(M, K, dtype, outlier=300.0):
    x = torch.randn(M, K)
    x[:, K // 3] *= outlier
    return x.to(dtype)


def int8_weight(N, K):
    """Random int8 rows, the last of a wider buffer, and their scales."""
    return torch.randint(-127, 128, (N, K + 7), dtype=torch.int8)[:, 7:], torch.rand(N) / K**0.5 / 60


def float_weight(N, K, dtype):
    """A view with a row stride and an offset that is not aligned."""
    return (torch.randn(N, K + 3) / K**0.5).to(dtype)[:, 3:]


def exact_linear(x, weight, scale, bias, residual):
    wide = weight.double() if scale is None else weight.double() * scale.double()[:, None]
    y = F.linear(x.double(), wide, None if bias is None else bias.double())
    return y if residual is None else y + residual.double()


def expanded(x, int8):
    """Whether torch multiplies bf16 by an int8 weight's products with its scales."""
    return int8 and x.dtype is torch.bfloat16 and _native.torch_is_faster(x, int8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize(
    "M, N, K", [(1, 576, 576), (1, 37, 341), (2, 5, 1), (3, 192, 64), (8, 67, 1537), (19, 130, 300), (128, 1030, 64)]
)
def test_linear(M, N, K, dtype, int8, threads):
    x = activations(M, K, dtype)
    weight, scale = int8_weight(N, K) if int8 else (float_weight(N, K, dtype), None)
    bias, residual = torch.randn(N).to(dtype), torch.randn(M, N).to(dtype)
    for b, r in itertools.product((None, bias), (None, residual)):
        args = (x, weight, scale, b, r)
        exact, eager = exact_linear(*args), linear.reference(*args)
        name = "linear on digits" if int8 and dtype is torch.float16 else "linear"
        name = "linear expanded" if expanded(x, int8) else name
        assert_as_exact_as_eager(name, run(linear, *args), eager, exact)


def test_by_torch_piece_by_piece(monkeypatch):
    x, (weight, scale), bias = activations(5, 40, torch.float32), int8_weight(70, 40), torch.randn(70)
    whole = linear.by_torch(x, weight, scale, bias)
    monkeypatch.setattr(linear, "EXPANDED", 40 * 17)
    torch.testing.assert_close(linear.by_torch(x, weight, scale, bias), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(576, 576), (3, 37, 341), (5, 1), (2, 0, 8)])
def test_dequantize(shape, dtype, threads):
    weight, scale = torch.randint(-128, 128, shape, dtype=torch.int8), torch.rand(shape[:-1])
    extremes = torch.tensor([1e-39, 2.0**-126, 1e-38, 1e35, 0.0])[: scale.numel()]
    scale.view(-1)[: len(extremes)] = extremes
    assert not weight.numel() or dequantize.OP.choose(weight, scale, dtype)[0].name == "native"
    assert torch.equal(dequantize.OP(weight, scale, dtype), dequantize.reference(weight, scale, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "M, N, K", [(1, 576, 576), (1, 4801, 23), (1, 37, 341), (2, 5, 1), (3, 192, 64), (8, 67, 1537), (19, 530, 300)]
)
def test_linear_by_columns(M, N, K, dtype, threads):
    """The weight of a Conv1D, a view of a wider one; what surrounds it is not read."""
    x, whole = activations(M, K, dtype), torch.full((K + 2, N + 3), float("nan"), dtype=dtype)
    whole[1:-1, 2:-1] = float_weight(N, K, dtype).T
    weight = whole[1:-1, 2:-1].T
    bias, residual = torch.randn(N).to(dtype), torch.randn(M, N).to(dtype)
    for b, r in itertools.product((None, bias), (None, residual)):
        args = (x, weight, None, b, r)
        assert_as_exact_as_eager("linear", run(linear, *args), linear.reference(*args), exact_linear(*args))
    args = (x, weight, None, None, None, bias, None, "gelu_tanh")
    exact = gated_act.ACTIVATIONS["gelu_tanh"](exact_linear(x, weight, None, bias, None))
    assert_as_exact_as_eager("gated_linear", run(gated_linear, *args), gated_linear.reference(*args), exact)


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("M, dtype", [(3, torch.bfloat16), (130, torch.float32), (130, torch.bfloat16)])
def test_linear_group_and_gated_linear(M, dtype, int8, threads):
    x = activations(M, 576, dtype)[None]
    made = [int8_weight(n, 576) if int8 else (float_weight(n, 576, x.dtype), None) for n in (576, 192, 1, 192)]
    weights, scales = [list(column) for column in zip(*made, strict=True)]
    biases = [None, torch.randn(192).to(dtype), None, None]
    outs = run(linear_group, x, weights, scales, biases)
    for out, *args in zip(outs, weights, scales, biases, strict=True):
        eager = linear.reference(x, *args, None)
        assert out.stride() == eager.stride()
        name = "linear expanded" if expanded(x, int8) else "linear_group"
        assert_as_exact_as_eager(name, out, eager, exact_linear(x, *args, None))
    args = (x, weights[1], weights[3], scales[1], scales[3], biases[1], None)
    gate = exact_linear(x, weights[1], scales[1], biases[1], None)
    up = exact_linear(x, weights[3], scales[3], None, None)
    for act, function in gated_act.ACTIVATIONS.items():
        out, eager = run(gated_linear, *args, act), gated_linear.reference(*args, act)
        name = "linear expanded" if expanded(x, int8) else "gated_linear"
        assert_as_exact_as_eager(name, out, eager, function(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("M, N, K", [(1, 576, 576), (5, 67, 341)])
def test_linear_with_its_activation(M, N, K, int8, dtype, threads):
    x = activations(2 * M, K, dtype)[::2]
    weight, scale = int8_weight(N, K) if int8 else (float_weight(N, K, dtype), None)
    bias = torch.randn(N).to(dtype)
    for act, function in gated_act.ACTIVATIONS.items():
        args = (x, weight, None, scale, None, bias, None, act)
        exact, eager = function(exact_linear(x, weight, scale, bias, None)), gated_linear.reference(*args)
        assert_as_exact_as_eager("gated_linear", run(gated_linear, *args), eager, exact)


def test_gelu_far_below_zero_does_not_cancel():
    gate = torch.linspace(-12, 12, 2401)
    out, exact = run(gated_act, gate, torch.ones(2401), "gelu"), F.gelu(gate.double())
    near = gate.abs() < 5
    assert ((out - exact)[near].abs() <= 5e-6 * exact[near].abs()).all()
    assert ((out - exact).abs() <= (F.gelu(gate) - exact).abs() + 4e-7).all()


def experts_weight(E, N, K, dtype, int8):
    """Of int8 or ``dtype``, between other rows and columns of a larger buffer; scales with gaps between the experts."""
    if not int8:
        return (torch.randn(E, N + 2, K + 3) / K**0.5).to(dtype)[:, 2:, 3:], None
    weight = torch.randint(-127, 128, (E, N + 2, K + 7), dtype=torch.int8)[:, 2:, 7:]
    return weight, (torch.rand(E, N + 1) / K**0.5 / 60)[:, 1:]


def experts_of(counts):
    """Rows sorted by expert, ``counts`` of each: (offs, None) and, in another order of the rows, (None, ids)."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return torch.tensor(counts).cumsum(0).int(), ids


def exact_experts(x, weight, scale, ids):
    wide = weight.double() if scale is None else weight.double() * scale.double()[..., None]
    return torch.einsum("sk,snk->sn", x.double(), wide[ids])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize(
    "counts, N, K",
    [([0, 1, 0, 1], 578, 320), ([1], 6, 1), ([3, 0, 9, 1, 0], 66, 341), ([0, 21, 0], 34, 65), ([40, 1], 10, 33)],
)
def test_experts(counts, N, K, dtype, int8, threads):
    x = activations(sum(counts), K, dtype)
    weight, scale = experts_weight(len(counts), N, K, dtype, int8)
    offs, ids = experts_of(counts)
    mixed = ids[torch.randperm(len(ids))]
    mixed[0] -= len(counts)  # counted from the end, as indexing has it
    name = "linear on digits" if int8 and dtype is torch.float16 else "linear"
    for experts, given in ((ids, (offs, None)), (mixed, (None, mixed))):
        exact, args = exact_experts(x, weight, scale, experts), (x, weight, scale, *given)
        eager = experts_linear.reference(*args)
        assert_as_exact_as_eager(name, run(experts_linear, *args), eager, exact)
        for act, function in gated_act.ACTIVATIONS.items() if N < 100 else ():
            gate, up = exact.chunk(2, -1)
            out, eager = run(experts_gated_linear, *args, act), experts_gated_linear.reference(*args, act)
            assert_as_exact_as_eager("gated_linear", out, eager, function(gate) * up)


def test_rows_of_no_expert():
    x, (weight, scale) = torch.randn(5, 40), experts_weight(3, 8, 40, torch.float32, True)
    out = run(experts_linear, x, weight, scale, torch.tensor([1, 1, 3], dtype=torch.int32), None)
    assert out[:3].all() and not out[3:].any()
    assert run(experts_linear, x[:0], weight, scale, torch.zeros(3, dtype=torch.int32), None).shape == (0, 8)
    for bad in (3, -4):
        with pytest.raises(IndexError, match="expert"):
            run(experts_linear, x, weight, scale, None, torch.tensor([0, 1, bad, 0, 0]))


@pytest.mark.parametrize("value", [1.0, -3.0])
def test_int8_sums_do_not_overflow(value):
    """Largest weights and constant activations: every product has the same sign."""
    K = 20000
    x = torch.full((1, K), value, dtype=torch.bfloat16)
    weight = torch.full((8, K), 127, dtype=torch.int8)
    weight[4:] = -128
    out = run(linear, x, weight, torch.ones(8), None, None)
    assert torch.equal(out, (x.double() @ weight.double().T).to(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_propagate_like_eager(bad, dtype):
    x = torch.randn(3, 96).to(dtype)
    x[1, 70] = bad
    for weight, scale in (int8_weight(33, 96), (float_weight(33, 96, dtype), None)):
        out, eager = run(linear, x, weight, scale, None, None), linear.reference(x, weight, scale, None, None)
        assert torch.equal(out.isnan(), eager.isnan()) and torch.equal(out.isinf(), eager.isinf())
        assert out[[0, 2]].isfinite().all()
    for op, args in ((rms_norm, (None, 1e-5, False, True)), (layer_norm, (None, None, 1e-5))):
        out = run(op, x, *args)
        assert torch.equal(out.isnan(), op.reference(x, *args).isnan())
    assert torch.equal(run(gated_act, x, x, "silu").isnan(), gated_act.reference(x, x, "silu").isnan())
    q = x[None, None].clone()
    keys = torch.randn(1, 1, 9, 96).to(dtype)
    out = run(attention, q, keys, keys, None, 0.1, False)
    assert out[0, 0, 1].isnan().all() and out[0, 0, 0].isfinite().all()


def test_zero_and_tiny_activations():
    weight, scale = int8_weight(5, 40)
    x = torch.zeros(2, 40, dtype=torch.bfloat16)
    x[1] = 1e-38
    out = run(linear, x, weight, scale, None, None)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert_as_exact_as_eager(
        "linear", out, linear.reference(x, weight, scale, None, None), exact_linear(x, weight, scale, None, None)
    )


@pytest.mark.parametrize("layout", row_ops.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 24, 341])
def test_norms(layout, N, dtype):
    x = row_ops.rows(layout, N, dtype, "cpu")
    residual = torch.randn(x.shape).to(dtype)
    for weight, bias in row_ops.norm_weights(N, dtype, "cpu"):
        wide_w, wide_b = (None if t is None else t.double() for t in (weight, bias))
        for given in ((x,), (x, residual)):
            total = sum(t.double() for t in given)
            for unit, cast in itertools.product((False, True), repeat=2):
                op = rms_norm if len(given) == 1 else add_rms_norm
                exact = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)
                exact = exact if weight is None else exact * (wide_w + unit)
                check_norm(op, (*given, weight, 1e-5, unit, cast), exact)
            op = layer_norm if len(given) == 1 else add_layer_norm
            exact = F.layer_norm(total, (N,), wide_w, wide_b, 1e-5)
            check_norm(op, (*given, weight, bias, 1e-5), exact)


def check_norm(op, args, exact):
    out, eager = run(op, *args), op.reference(*args)
    if isinstance(out, tuple):
        assert torch.equal(out[0], eager[0]) and out[0].stride() == eager[0].stride()
        out, eager = out[1], eager[1]
    assert out.stride() == eager.stride() and out.dtype is eager.dtype
    assert_as_exact_as_eager(op.__name__.rpartition(".")[2], out, eager, exact)


def test_long_inputs_use_all_threads(threads):
    x = torch.randn(301, 576).bfloat16()
    exact = F.layer_norm(x.double(), (576,), None, None, 1e-5)
    check_norm(layer_norm, (x, None, None, 1e-5), exact)
    gate, up = x.chunk(2, -1)
    exact = F.gelu(gate.double(), approximate="tanh") * up.double()
    assert_as_exact_as_eager(
        "gated_act", run(gated_act, gate, up, "gelu_tanh"), gated_act.reference(gate, up, "gelu_tanh"), exact
    )


@pytest.mark.parametrize("capability, silu", [("AVX512", "torch"), ("AVX2", "native")])
def test_prompts_leave_activations_to_wider_vectors(monkeypatch, capability, silu):
    """Fused on both machines alike: which kernel runs is the op's choice."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    few, many = torch.ones(32, 1024), torch.ones(33, 1024)
    chosen = [gated_act.OP.choose(x, x, act)[0] for x, act in ((few, "silu"), (many, "relu"), (many, "silu"))]
    assert [kernel.name for kernel in chosen] == ["native", "native", silu]
    assert gated_act.OP.choose(many, many.double(), "silu")[0] is None
    assert torch.equal(chosen[2].run(many, many, "relu"), many)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", gated_act.ACTIVATIONS)
def test_gated_act(act, dtype):
    for layout in row_ops.LAYOUTS:
        gate, up = (row_ops.rows(layout, 37, dtype, "cpu") * 4 for _ in range(2))
        out, eager = run(gated_act, gate, up, act), gated_act.reference(gate, up, act)
        assert out.stride() == eager.stride()
        exact = gated_act.ACTIVATIONS[act](gate.double()) * up.double()
        assert_as_exact_as_eager("gated_act", out, eager, exact)


@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved, dtype, table_dtype):
    if torch.float32 not in (dtype, table_dtype) and dtype is not table_dtype:
        assert rope.supports_native(
            torch.zeros(1, 1, 1, 2, dtype=dtype), *torch.zeros(2, 1, 2, dtype=table_dtype), False
        )
        return
    for kind, R in (("batched", 48), ("shared", 6), ("expanded", 24), ("flat", 48)):
        x = row_ops.heads(2, 3, 5, 48, dtype, "cpu", extra=7)
        cos, sin = row_ops.tables(kind, 2, 5, R, table_dtype, "cpu")
        out, eager = run(rope, x, cos, sin, interleaved), rope.reference(x, cos, sin, interleaved)
        assert out.stride() == eager.stride()
        assert torch.equal(out[..., R:], x[..., R:])
        exact = rope.reference(x.double(), cos.double(), sin.double(), interleaved)
        assert_as_exact_as_eager("rope", out, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [1, 5])
def test_rope_append_writes_only_its_positions(S, dtype):
    q = row_ops.heads(2, 6, S, 40, dtype, "cpu", extra=9)
    k, v = row_ops.heads(2, 3, S, 40, dtype, "cpu"), row_ops.heads(2, 3, S, 24, dtype, "cpu")
    cos, sin = row_ops.tables("shared", 2, S, 40, dtype, "cpu")
    pos = torch.tensor([8, 1, 0, 5, 3])[:S]
    caches = [torch.randn(2, 4, 11, 48).to(dtype) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    views, expected_views = ((c[:, 1:, 1:10, :40], d[:, 1:, 1:10, 3:27]) for c, d in (caches, expected))
    out = run(rope_append, q, k, v, cos, sin, *views, pos, False)
    assert torch.equal(out, run(rope, q, cos, sin, False))
    kv_append.reference(*expected_views, run(rope, k, cos, sin, False), v, pos)
    assert torch.equal(caches[0], expected[0]) and torch.equal(caches[1], expected[1])
    run(kv_append, *views, k, v, pos)
    kv_append.reference(*expected_views, k, v, pos)
    assert torch.equal(caches[0], expected[0]) and torch.equal(caches[1], expected[1])


@pytest.mark.parametrize("position", [-1, 9, 2**40])
def test_positions_outside_the_cache_raise_and_write_nothing(position):
    keys, values = torch.zeros(2, 1, 1, 9, 8)
    k = torch.ones(1, 1, 2, 8)
    with pytest.raises(IndexError):
        kv_append.run_native(keys, values, k, k, torch.tensor([0, position]))
    assert not keys.any() and not values.any()


def attention_inputs(B, H, Hkv, Sq, Skv, D, Dv, dtype):
    """q and k as merged projections give them, v with gaps between its rows."""
    q = torch.randn(B, Sq, H, D + 3).to(dtype)[..., 3:].transpose(1, 2)
    k = torch.randn(B, Hkv, Skv, D).to(dtype)
    return q, k, torch.randn(B, Hkv, Skv + 1, Dv + 5).to(dtype)[:, :, 1:, :Dv]


def check_attention(q, k, v, mask, is_causal, scale=0.2, softcap=None):
    """The kernel and, where that one loses, SDPA."""
    ways = (attention.run_native, attention.flash) if softcap is None else (attention.run_native,)
    made = [way(q, k, v, mask, scale, is_causal, softcap) for way in ways]
    eager = attention.reference(q, k, v, mask, scale, is_causal, softcap)
    wide = mask if mask is None or mask.dtype is torch.bool else mask.double()
    exact = attention.reference(q.double(), k.double(), v.double(), wide, scale, is_causal, softcap)
    for out in made:
        assert out.transpose(1, 2).is_contiguous()
        assert_as_exact_as_eager("attention", out, eager, exact)
    return torch.stack(made)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B, H, Hkv, Sq, Skv, D, Dv",
    [(1, 9, 3, 1, 300, 64, 64), (2, 4, 2, 3, 77, 40, 24), (1, 2, 2, 1, 1, 8, 1), (1, 6, 1, 23, 130, 33, 20)],
)
def test_attention(B, H, Hkv, Sq, Skv, D, Dv, dtype, threads):
    q, k, v = attention_inputs(B, H, Hkv, Sq, Skv, D, Dv, dtype)
    check_attention(q, k, v, None, False)
    check_attention(q, k, v, None, True)
    mask = torch.rand(B, 1, Sq, Skv) > 0.4
    mask[..., : Skv // 3] = False
    mask[..., -1] = True
    check_attention(q, k, v, mask, False)
    check_attention(q, k, v, mask, False, softcap=1.5)
    check_attention(q, k, v, None, True, softcap=50.0)
    check_attention(q, k, v, (torch.rand(B, H, Sq, Skv) > 0.4) | mask, False)
    check_attention(q, k, v, torch.randn(1, H, 1, Skv).to(dtype), False)
    check_attention(q, k, v, torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype), False)


def test_left_padding_and_fully_masked_rows():
    q, k, v = attention_inputs(3, 4, 2, 2, 200, 64, 64, torch.bfloat16)
    mask = torch.zeros(3, 1, 2, 200, dtype=torch.bool)
    mask[0, ..., 150:170] = True
    mask[1, :, 1, 3] = True
    out = check_attention(q, k, v, mask, False)
    assert not out[:, 2].any() and not out[:, 1, :, 0].any()
    alone = attention.run_native(q[:1], k[:1, :, 150:170], v[:1, :, 150:170], None, 0.2, False)
    assert_as_exact_as_eager("attention", out[0, :1], alone, alone.double())


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("starts", [(0, 0), (60, 0), (90, 70), (0, 40)])
@pytest.mark.parametrize("Sq, Skv", [(5, 77), (150, 150), (300, 70)])
def test_attention_by_positions(Sq, Skv, starts, window, threads):
    """In blocks of rows and in the kernel; from the third sequence on everything is padding."""
    q, k, v = attention_inputs(3, 4, 2, Sq, Skv, 24, 16, torch.float32)
    rows, columns = (torch.arange(n) + start for n, start in zip((Sq, Skv), starts, strict=True))
    held = torch.ones(Skv + 75, 4, dtype=torch.bool).t()
    held[1, : starts[1] + 9], held[1, starts[1] + 60 :], held[2:] = False, False, False
    for keys in (held, None):
        wanted = rows, columns, keys, window
        seen = causal_attention.visible(*wanted, 3).any(-1)[..., None].expand(3, 4, Sq, 16)
        ways = (causal_attention.run_native, causal_attention.run_blocks)
        for run, softcap in ((ways[0], None), (ways[0], 1.5), (ways[1], None)):
            out = run(q, k, v, *wanted, 0.2, softcap)
            eager = causal_attention.reference(q, k, v, *wanted, 0.2, softcap)
            exact = causal_attention.reference(q.double(), k.double(), v.double(), *wanted, 0.2, softcap)
            assert out.transpose(1, 2).is_contiguous() and not out[~seen].any()
            assert_as_exact_as_eager("attention", out, eager, exact)


def test_many_rows_go_to_what_is_faster():
    q, k, v = attention_inputs(1, 2, 2, 32, 32, 16, 16, torch.float32)
    args = (q, k, v, None, 0.2, False)
    assert attention.OP.choose(*args)[0].name == "sdpa"
    assert attention.OP.choose(q[:, :, :1], *args[1:])[0].name == "native"


def test_a_thread_may_begin_with_nothing():
    """Such as the rows of an expert that no token chose: an empty result, and no kernel is given up for it."""
    none = torch.empty(0, 64, dtype=torch.bfloat16)
    q, k, v = attention_inputs(0, 4, 2, 1, 8, 16, 16, torch.bfloat16)
    calls = [
        (linear.OP, none, torch.ones(32, 64, dtype=torch.bfloat16), None, None, None),
        (linear.OP, none, torch.ones(32, 64, dtype=torch.int8), torch.ones(32), None, None),
        (attention.OP, q, k, v, None, 0.25, False),
        (attention.OP, *attention_inputs(1, 4, 2, 0, 8, 16, 16, torch.bfloat16), None, 0.25, False),
    ]
    for op, *args in calls:
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(op, *args).result().numel() == 0
        assert not op.broken


def test_unsupported_arguments_are_declined_with_a_reason():
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    assert "are contiguous" in linear.supports_native(x, torch.randn(4, 16)[:, ::2], None, None, None)
    columns = torch.ones(8, 4, dtype=torch.int8).T
    assert "unless in int8" in linear.supports_native(x, columns, torch.ones(4), None, None)
    assert "x's dtype" in linear.supports_native(x, weight.bfloat16(), None, None, None)
    assert "floating" in linear.supports_native(x.double(), weight.double(), None, None, None)
    assert "scale" in linear.supports_native(x, weight.to(torch.int8), torch.ones(4, 1), None, None)
    assert "relu6" in gated_act.supports_native(x, x, "relu6")
    assert "dtype" in rms_norm.supports_native(x.to(torch.float64), None, 1e-5, False, False)


def test_one_thread_pool():
    """The kernels run on the pool that torch has: no second OpenMP library is loaded."""
    code = """
import torch
from tinyfuse.kernels import _native, linear
pools = lambda: {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line}
before = pools()
linear.run_native(torch.randn(4, 512), torch.randn(512, 512), None, None, None)
assert pools() == before, pools()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def tiny_source(tmp_path, monkeypatch):
    """A library that compiles at once, so that the cache can be tested."""
    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" int tf_version() { return 1; }')
    monkeypatch.setattr(_native, "SOURCE", source)
    return source


def test_cache_is_used_and_a_damaged_file_is_rebuilt(tiny_source, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    _native.build(folder)
    (target,) = folder.glob("*.so")
    monkeypatch.setattr(_native, "_compile", None)
    _native.build(folder)
    monkeypatch.undo()
    monkeypatch.setattr(_native, "SOURCE", tiny_source)
    target.unlink()  # a library that is mapped must not change under its process
    target.write_bytes(b"not a library")
    assert isinstance(_native.build(folder), ctypes.CDLL)


def test_a_change_of_the_source_builds_anew(tiny_source, tmp_path):
    _native.build(tmp_path / "cache")
    tiny_source.write_text(tiny_source.read_text() + "\n// changed")
    _native.build(tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.so"))) == 2


def test_concurrent_builds_leave_one_library(tiny_source, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(_native.build, [tmp_path / "cache"] * 4))
    assert all(library.tf_version() == 1 for library in libraries)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_unusable_cache_falls_back_to_a_temporary_folder(tiny_source, tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TINYFUSE_CACHE", str(blocked / "cache"))
    monkeypatch.setattr(_native.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(_native, "_torch_pool", list)
    tiny_source.write_text(tiny_source.read_text() + ' extern "C" void tf_init() {}')
    _native.library.__wrapped__()
    assert list((tmp_path / "tmp").glob("*/native-*.so"))
    assert [record.message for record in caplog.records if "TINYFUSE_CACHE" in record.message]


def test_a_folder_that_others_can_write_is_not_trusted(tiny_source, tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError):
        _native.build(folder)


def test_without_a_compiler_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(_native.shutil, "which", lambda name: None)
    with pytest.raises(_native.BuildError, match=r"install g\+\+"):
        _native.compiler()


def test_a_compiler_that_fails_is_reported(tiny_source, tmp_path):
    tiny_source.write_text("this is not C++")
    with pytest.raises(_native.BuildError, match="cannot compile"):
        _native.build(tmp_path / "cache")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_tables(dtype):
    for B, S, half, scale in [(1, 1, 64, 1.0), (2, 5, 12, 1.25), (3, 1, 5, 0.5), (16, 1, 32, 1.0)]:
        row_ops.check_rope_tables(B, S, half, scale, dtype, "cpu", "native")
    positions, frequencies = torch.tensor([[3, 70000]], dtype=torch.int32), torch.rand(8)
    for narrow, wide in zip(
        run(rope_tables, positions, frequencies, 1.0, dtype),
        run(rope_tables, positions.long(), frequencies, 1.0, dtype),
        strict=True,
    ):
        assert torch.equal(narrow, wide)
    assert "16 tokens" in rope_tables.supports_native(torch.zeros(1, 17, dtype=torch.long), frequencies, 1.0, dtype)


def test_step_counters():
    row_ops.check_step_counters(lambda *args: run(step_counters, *args))
