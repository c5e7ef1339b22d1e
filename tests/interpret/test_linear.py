import itertools

import pytest
import torch

from tests import row_ops
from tests.tolerance import assert_as_exact_as_eager
from tinyfuse.kernels import (
    _counters,
    _fp16_gemm,
    _gemm,
    _gemv,
    _one_row,
    gated_act,
    gated_linear,
    linear,
    rms_norm_gated_linear,
    rms_norm_linear_group,
)

K = 112  # of int8: one whole step of 64 bytes and a part; of halves: three and a half


def weights(N, dtype, K=K):
    return row_ops.weights((N, K), dtype, "cpu")


def rows(*shape, dtype=torch.bfloat16):
    x = torch.randn(*shape, K).to(dtype)
    x[..., 7] = 300 if dtype is torch.bfloat16 else 30
    return x


def wide(t):
    return None if t is None else t.double()


def exact(x, w, scale, bias=None, residual=None):
    w = wide(w) if scale is None else w.double() * wide(scale)[:, None]
    return linear.reference(x.double(), w, None, wide(bias), wide(residual))


def eager(x, w, scale, bias=None, residual=None):
    return linear.reference(x, linear.dequantize(w, scale, x.dtype), None, bias, residual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("M, own", [(1, True), (1, False), (3, False)])
@pytest.mark.parametrize("config", [(4, 1), (2, 2)])
def test_one_row_or_some_of_int8(config, M, own, int8, dtype):
    torch.manual_seed(0)
    M = M if int8 else 1
    x = rows(M, dtype=dtype)
    args = [x, *weights(7, torch.int8 if int8 else dtype), torch.randn(7).to(dtype), torch.randn(M, 7).to(dtype)]
    (out,) = _one_row.one_row(x, [args[1]], [args[2]], [args[3]], args[4], config=config, own=own)
    assert_as_exact_as_eager("linear", out, eager(*args), exact(*args))
    pairs = [weights(N, torch.int8 if int8 else dtype) for N in (5, 8, 1)]
    outs = _one_row.one_row(x, [w for w, _ in pairs], [s for _, s in pairs], [None] * 3, config=config, own=own)
    for out, (w, scale) in zip(outs, pairs, strict=True):
        assert_as_exact_as_eager("linear_group", out, eager(x, w, scale), exact(x, w, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [(1, 1, 1, 2, 1), (2, 1, 2, 1, 8), (1, 2, 1, 8, 8)])
def test_few_rows(config, dtype):
    torch.manual_seed(0)
    x = rows(5, dtype=dtype)
    w, bias, residual = weights(11, dtype)[0], torch.randn(11).to(dtype), torch.randn(5, 11).to(dtype)
    (out,) = _gemv.gemv(x, [w], [bias], residual, config=config)
    args = w, None, bias, residual
    assert_as_exact_as_eager("linear", out, eager(x, *args), exact(x, *args))


def test_group_writes_each_output():
    torch.manual_seed(0)
    x = rows(1, 2)
    sizes = [weights(N, x.dtype)[0] for N in (9, 16, 3)]
    for out, w in zip(_gemv.gemv(x, sizes, [None] * 3), sizes, strict=True):
        assert out.shape == (1, 2, len(w)) and out.is_contiguous()
        assert_as_exact_as_eager("linear_group", out, eager(x, w, None), exact(x, w, None))


@pytest.mark.parametrize("act", gated_act.ACTIVATIONS)
@pytest.mark.parametrize("int8, M", [(False, 1), (True, 1), (True, 5)])
def test_gated(act, int8, M):
    torch.manual_seed(0)
    x = torch.randn(M, K).bfloat16()
    merged, scale = weights(22, torch.int8 if int8 else x.dtype)
    gate, up = merged.chunk(2)
    s_gate, s_up = (None, None) if scale is None else scale.chunk(2)
    biases = torch.randn(11).bfloat16(), torch.randn(11).bfloat16()
    run = gated_linear.run_gemv if M == 1 else gated_linear.run_tensor_core
    out = run(x, gate, up, s_gate, s_up, *biases, act)
    given = [linear.dequantize(w, s, x.dtype) for w, s in ((gate, s_gate), (up, s_up))]
    full = [w.double() if s is None else w.double() * s.double()[:, None] for w, s in ((gate, s_gate), (up, s_up))]
    near = gated_linear.reference(x, *given, None, None, *biases, act)
    true = gated_linear.reference(x.double(), *full, None, None, *map(wide, biases), act)
    assert_as_exact_as_eager("gated_linear", out, near, true)


@pytest.mark.parametrize("int8, M", [(False, 1), (True, 1), (False, 5), (True, 5)])
def test_activation_of_one_weight(int8, M):
    torch.manual_seed(0)
    x = rows(M)
    w, scale = weights(27, torch.int8 if int8 else x.dtype)
    bias = torch.randn(27).bfloat16()
    run = gated_linear.run_tensor_core if int8 and M > 1 else gated_linear.run_gemv
    out = run(x, w, None, scale, None, bias, None, "gelu")
    near, true = torch.nn.functional.gelu(eager(x, w, scale, bias)), torch.nn.functional.gelu(exact(x, w, scale, bias))
    assert out.shape == (M, 27)
    assert_as_exact_as_eager("gated_linear", out, near, true)


@pytest.mark.parametrize("config", [(2, 16, 16, 64, 2, 4, 1), (3, 16, 16, 64, 2, 4, 2), (2, 8, 16, 64, 2, 4, 2)])
def test_tensor_core(config):
    torch.manual_seed(0)
    x = rows(1, 19)
    w, scale, bias, residual = *weights(21, torch.int8), torch.randn(21).bfloat16(), torch.randn(1, 19, 21).bfloat16()
    (out,) = _gemm.gemm(x, [w], [scale], [bias], residual, config=config)
    assert_as_exact_as_eager("linear", out, *(f(x, w, scale, bias, residual) for f in (eager, exact)))


@pytest.mark.parametrize("sizes", [(9, 40), (33, 5, 17)])
@pytest.mark.parametrize("parts", [1, 2])
def test_tensor_core_group_writes_each_output(sizes, parts):
    torch.manual_seed(0)
    x = rows(2, 9)
    pairs = [weights(N, torch.int8) for N in sizes]
    biases = [torch.randn(N).bfloat16() for N in sizes]
    config = 3, 16, 16, 64, 2, 4, parts
    outs = _gemm.gemm(x, [w for w, _ in pairs], [s for _, s in pairs], biases, config=config)
    for out, (w, scale), bias in zip(outs, pairs, biases, strict=True):
        assert out.shape == (2, 9, len(w)) and out.is_contiguous()
        assert_as_exact_as_eager("linear_group", out, eager(x, w, scale, bias), exact(x, w, scale, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [(16, 32, 4), (32, 128, 2), (16, 64, 2)])
@pytest.mark.parametrize("M", [5, 19])
def test_fp16_products(config, dtype, M):
    torch.manual_seed(0)
    x = rows(1, M, dtype=dtype)
    w, scale, bias, residual = *weights(21, torch.int8), torch.randn(21).to(dtype), torch.randn(1, M, 21).to(dtype)
    out = _fp16_gemm.fp16_gemm(x, w, scale, bias, residual, config)
    assert_as_exact_as_eager("linear", out, *(f(x, w, scale, bias, residual) for f in (eager, exact)))
    for _ in range(2):  # the counters of shares start again
        assert torch.equal(_fp16_gemm.fp16_gemm(x, w, scale, bias, residual, config), out)


@pytest.mark.parametrize("parts", [1, 4])
def test_fp16_products_of_rows_of_any_magnitude(parts):
    torch.manual_seed(0)
    x = torch.randn(8, K) * torch.tensor([1e-38, 1e-34, 1e-20, 1e-6, 1.0, 1e6, 1e20, 1e37])[:, None]
    x[:, :32] *= 1e-9  # other tiles have other magnitudes
    w, scale = weights(16, torch.int8)
    out = _fp16_gemm.fp16_gemm(x.bfloat16(), w, scale, None, config=(16, 128 // parts, 4))
    for row, given in zip(out, x.bfloat16(), strict=True):
        assert_as_exact_as_eager("linear", row, eager(given, w, scale), exact(given, w, scale))
    assert not _fp16_gemm.fp16_gemm(torch.zeros(3, K).bfloat16(), w, scale, None, config=(16, 64, 4)).any()


@pytest.mark.parametrize("digits", [2, 3])
def test_digits_of_long_rows(digits):
    """By several programs a row, then by one: the same bits, of which the digits are worth x."""
    few = row_ops.rows("outliers", 2 * _gemm.PIECE + 5, torch.bfloat16, "cpu", (1, 1, 3))[0, 0]
    many = few.repeat(20, 1)
    made, scale = _gemm.split(few, digits, 3, 7)
    alike, scale_alike = _gemm.split(many, digits, 60, 0)
    assert torch.equal(made, alike[:, :3]) and torch.equal(scale[:3], scale_alike[:3]) and not scale[3:].any()
    worth = sum(d.double() * 256**i for i, d in enumerate(made.flip(0))) * scale[:3, None].double()
    # One rounding to integers, and three in fp32 of what is scaled to 256^digits / 2.
    off = 0.5 + 3 * 2**-24 * 256**digits / 2
    assert ((worth - few.double()).abs() <= off * scale[:3, None]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 31, 32, 33, 48, 64, 65, 200, 1024])
def test_tiles_fit_a_multiprocessor_of_hopper(m, dtype):
    """A tile too large would leave the product to the reference."""
    processors, shared = _gemm.limits(torch.device("cpu"))
    for n, k in itertools.product(
        [1, 64, 1000, 2048, 3072, 4096, 6144, 8192, 28672], [16, 1024, 2048, 3072, 4096, 11008]
    ):
        digits, block_m, block_n, block_k, stages, _, parts = _gemm.tile(m, n, k, dtype, torch.device("cpu"))
        rows = (4 if digits == 3 else digits) * block_m
        assert (block_n + rows) * block_k * stages <= shared - 1024, (n, k)
        assert parts == 1 or -(-n // block_n) * -(-m // block_m) * parts <= 2 * processors, (n, k)


def test_dequantize_is_the_reference():
    w, scale = weights(5, torch.int8)
    assert torch.equal(_gemm.dequantize(w, scale, torch.bfloat16), linear.dequantize(w, scale, torch.bfloat16))


def test_not_finite_stays_so():
    x = rows(2)
    x[0, 3] = float("inf")
    x[1, 9] = float("nan")
    w, scale = weights(8, torch.int8)
    assert not linear.run_gemv(x[:1], w, scale, None, None).isfinite().any()
    assert not _gemm.gemm(x, [w], [scale], [None], config=(2, 16, 16, 64, 2, 4, 1))[0].isfinite().any()
    assert not _fp16_gemm.fp16_gemm(x, w, scale, None, config=(16, 32, 4)).isfinite().any()


def test_views_of_a_merged_weight_and_strided_rows():
    torch.manual_seed(0)
    merged, scale = weights(24, torch.int8, 2 * K)
    w, scale = merged[8:17, :K], scale[8:17]
    x = rows(2, 3).transpose(0, 1)
    out = linear.run_tensor_core(x, w, scale, None, None)
    assert_as_exact_as_eager("linear", out, eager(x, w, scale), exact(x, w, scale))
    w = weights(24, x.dtype, 2 * K)[0][8:17, :K]
    out = linear.run_gemv(x, w, None, None, None)
    assert_as_exact_as_eager("linear", out, eager(x, w, None), exact(x, w, None))


def test_declines():
    x = torch.randn(1, 72, dtype=torch.bfloat16)
    w, scale = weights(8, torch.int8, 72)
    assert "16 elements" in linear.supports_gemv(x, w, scale, None, None)
    assert "nothing" in linear.supports_gemv(x[:0], w, scale, None, None)
    assert "float32" in linear.supports_gemv(x.float(), w, scale, None, None)
    assert "rows" in linear.supports_gemv(torch.randn(99, 64).bfloat16(), w[:, :64], scale, None, None)
    assert "at most 3" in linear.few_rows_reason(x, [w] * 4, [scale] * 4, [None] * 4)
    x, w = x[:, :64].contiguous(), w[:, :64].contiguous()
    assert "scales" in linear.supports_gemv(x, w, None, None, None)
    assert "one dtype" in linear.few_rows_reason(x, [w] * 2, [scale] * 2, [torch.ones(8), torch.ones(8).bfloat16()])


@pytest.mark.parametrize("unit_offset, cast_first", [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("M", [1, 2, 11])
def test_norm_in_front(M, int8, unit_offset, cast_first):
    torch.manual_seed(0)
    x = torch.randn(1, M, K).bfloat16()
    gain = torch.randn(K).bfloat16() if cast_first or unit_offset else None
    norm = gain, 1e-6, unit_offset, cast_first
    wide_norm = wide(gain), *norm[1:]
    pairs = [weights(N, torch.int8 if int8 else x.dtype) for N in (65, 48, 3)]
    given = [linear.dequantize(w, s, x.dtype) for w, s in pairs]
    full = [w.double() if s is None else w.double() * s.double()[:, None] for w, s in pairs]
    args = [list(part) for part in zip(*pairs, strict=True)]
    op, few = rms_norm_linear_group, M == 1 or (int8 and M == 2)
    outs = (op.run_one_row if few else op.run_tensor_core if int8 else op.run_each)(x, *norm, *args, [None] * 3)
    near = op.reference(x, *norm, given, [None] * 3, [None] * 3)
    true = op.reference(x.double(), *wide_norm, full, [None] * 3, [None] * 3)
    assert [out.shape for out in outs] == [(1, M, len(w)) for w, _ in pairs]
    assert_as_exact_as_eager("linear_group", *(torch.cat(parts, -1) for parts in (outs, near, true)))
    gate, up = pairs[0], weights(65, torch.int8 if int8 else x.dtype)
    operands = gate[0], up[0], gate[1], up[1], None, None, "silu"
    run = rms_norm_gated_linear.run_one_row if few else rms_norm_gated_linear.run_each
    out = run(x, *norm, *operands)
    up16 = linear.dequantize(*up, x.dtype)
    up64 = up[0].double() if up[1] is None else up[0].double() * up[1].double()[:, None]
    near = rms_norm_gated_linear.reference(x, *norm, given[0], up16, None, None, None, None, "silu")
    true = rms_norm_gated_linear.reference(x.double(), *wide_norm, full[0], up64, None, None, None, None, "silu")
    assert_as_exact_as_eager("gated_linear", out, near, true)
    alone = gate[0], None, gate[1], None, None, None, "relu_squared"
    near = rms_norm_gated_linear.reference(x, *norm, given[0], None, None, None, None, None, "relu_squared")
    true = rms_norm_gated_linear.reference(x.double(), *wide_norm, full[0], *[None] * 5, "relu_squared")
    assert_as_exact_as_eager("gated_linear", run(x, *norm, *alone), near, true)


def test_counters_are_kept_per_number_of_splits_and_when_more_are_needed(monkeypatch):
    monkeypatch.setattr(_counters, "_counters", {})
    cpu = torch.device("cpu")
    few = _counters.counters(cpu, 3, 5)
    assert _counters.counters(cpu, 3, few.numel()) is few
    many = _counters.counters(cpu, 3, few.numel() + 1)
    assert many.numel() > few.numel() and not many.any()
    assert _counters.counters(cpu, 3, 5) is many
    assert _counters.counters(cpu, 4, 5) is not many
    assert _counters._counters[cpu, 0, 3][0] is few
