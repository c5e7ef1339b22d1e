"""Linears on the GPU: against float64 and the error of bf16 ``F.linear``."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests import row_ops
from tests.tolerance import assert_as_exact_as_eager
from tinyfuse.kernels import (
    _gemm,
    _gemv,
    _norm_digits,
    _one_row,
    experts_gated_linear,
    experts_linear,
    gated_act,
    gated_linear,
    linear,
    linear_group,
    rms_norm,
    rms_norm_gated_linear,
    rms_norm_linear_group,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("strict")]

SHAPES = [(341, 576), (1, 64), (257, 2048), (512, 11008), (96, 14336), (4099, 208), (8196, 4112), (5000, 4112)]


def weights(N, K, dtype):
    return row_ops.weights((N, K), dtype, "cuda")


def rows(M, K, dtype, outliers=True):
    x = torch.randn(M, K, device="cuda")
    if outliers:
        x[:, K // 3] *= 300
    return x.to(dtype)


def check(out, x, w, scale, bias=None, residual=None, op="linear"):
    wide = w.double() if scale is None else w.double() * scale.double()[:, None]
    exact = F.linear(x.double(), wide, None if bias is None else bias.double())
    exact = exact if residual is None else exact + residual.double()
    eager = linear.reference(x, linear.dequantize(w, scale, x.dtype), None, bias, residual)
    assert out.shape == eager.shape and out.is_contiguous() and out.dtype is x.dtype
    assert_as_exact_as_eager(op, out, eager, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 8, 9, 16, 17, 32, 33, 64, 257, 520, 1100])
def test_error(shape, M):
    N, K = shape
    for dtype, int8 in itertools.product([torch.bfloat16, torch.float16], [False, True]):
        x = rows(M, K, dtype, dtype is torch.bfloat16)
        w, scale = weights(N, K, torch.int8 if int8 else dtype)
        bias, residual = torch.randn(N, device="cuda").to(dtype), torch.randn(M, N, device="cuda").to(dtype)
        check(linear.OP(x, w, scale, None, None), x, w, scale)
        check(linear.OP(x, w, scale, bias, residual), x, w, scale, bias, residual)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_streaming_kernel_for_one_row(shape):
    """It stays right where it is not the fastest."""
    for dtype in (torch.bfloat16, torch.float16):
        x, (w, _) = rows(1, shape[1], dtype, dtype is torch.bfloat16), weights(*shape, dtype)
        check(_gemv.gemv(x, [w], [None])[0], x, w, None)


@pytest.mark.parametrize("M", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_group_and_gated(M, dtype):
    x = rows(M, 576, torch.bfloat16, False)[None]
    pairs = [weights(N, 576, dtype) for N in (576, 192, 191)]
    outs = linear_group.OP(x, [w for w, _ in pairs], [s for _, s in pairs], [None] * 3)
    for out, (w, scale) in zip(outs, pairs, strict=True):
        check(out, x, w, scale, op="linear_group")
    (merged, scale), act = weights(2 * 333, 576, dtype), "silu"
    (gate, up), (s_gate, s_up) = merged.chunk(2), (None, None) if scale is None else scale.chunk(2)
    out = gated_linear.OP(x, gate, up, s_gate, s_up, None, None, act)
    given = [linear.dequantize(gate, s_gate, x.dtype), linear.dequantize(up, s_up, x.dtype)]
    wide = [w.double() if s is None else w.double() * s.double()[:, None] for w, s in ((gate, s_gate), (up, s_up))]
    eager = gated_linear.reference(x, *given, None, None, None, None, act)
    exact = gated_linear.reference(x.double(), *wide, None, None, None, None, act)
    assert_as_exact_as_eager("gated_linear", out, eager, exact)
    bias = torch.randn(333, device="cuda").bfloat16()
    for act in gated_act.ACTIVATIONS:
        out = gated_linear.OP(x, gate, None, s_gate, None, bias, None, act)
        eager = gated_linear.reference(x, given[0], None, None, None, bias, None, act)
        exact = gated_linear.reference(x.double(), wide[0], None, None, None, bias.double(), None, act)
        assert_as_exact_as_eager("gated_linear", out, eager, exact)


@pytest.mark.parametrize("M", [1, 2, 7, 40, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("K", [576, 4096, 11008])
def test_norm_in_front(M, dtype, K):
    x = rows(M, K, torch.bfloat16, False)[None]
    for gain, unit_offset, cast_first in ((torch.randn(K, device="cuda").bfloat16(), True, False), (None, False, True)):
        norm = gain, 1e-6, unit_offset, cast_first
        normed = rms_norm.reference(x, *norm)
        exact_norm = rms_norm.reference(x.double(), None if gain is None else gain.double(), *norm[1:])
        pairs = [weights(N, K, dtype) for N in (576, 500, 333)]
        args = [list(part) for part in zip(*pairs, strict=True)]
        outs = rms_norm_linear_group.OP(x, *norm, *args, [None] * 3)
        given = [linear.dequantize(w, s, x.dtype) for w, s in pairs]
        full = [w.double() if s is None else w.double() * s.double()[:, None] for w, s in pairs]
        near, true = ([F.linear(h, w) for w in ws] for h, ws in ((normed, given), (exact_norm, full)))
        assert_as_exact_as_eager("linear_group", *(torch.cat(parts, -1) for parts in (outs, near, true)))
        (gate, up), (s_gate, s_up) = ([part[i][:500] if part[i] is not None else None for i in (0, 1)] for part in args)
        out = rms_norm_gated_linear.OP(x, *norm, gate, up, s_gate, s_up, None, None, "silu")
        near = F.silu(F.linear(normed, given[0][:500])) * F.linear(normed, given[1])
        true = F.silu(F.linear(exact_norm, full[0][:500])) * F.linear(exact_norm, full[1])
        assert_as_exact_as_eager("gated_linear", out, near, true)


@pytest.mark.parametrize("M", [1, 8, 24, 300])
def test_layouts(M):
    w, scale = weights(200, 640, torch.int8)
    for x in (
        rows(M, 1280, torch.bfloat16)[:, 320:960],
        rows(640, M, torch.bfloat16, False).T,
        rows(1, 640, torch.bfloat16).expand(M, 640),
        rows(1, M * 640 + 3, torch.bfloat16)[0, 3:].view(M, 640),
    ):
        check(linear.OP(x, w[16:144], scale[16:144], None, None), x, w[16:144], scale[16:144])
        wide = torch.randn(200, 1280, device="cuda").bfloat16()[:, 320:960]
        check(linear.OP(x, wide, None, None, None), x, wide, None)


def test_rows_that_do_not_end_at_16_elements():
    x, (w, scale) = rows(1, 341, torch.bfloat16), weights(77, 341, torch.int8)
    check(linear.OP(x, w, scale, None, None), x, w, scale)


@pytest.mark.parametrize("M", [1, 4, 12, 50, 300])
def test_not_finite_stays_so(M):
    x, (w, scale) = rows(M, 512, torch.bfloat16), weights(99, 512, torch.int8)
    x[0, 3], x[-1, 9] = float("inf"), float("nan")
    out = linear.OP(x, w, scale, None, None)
    assert not out[0].isfinite().any() and out[-1].isnan().all()
    assert M < 3 or out[1:-1].isfinite().all()


@pytest.mark.parametrize("int8", [False, True])
def test_weight_of_more_than_2_31_elements(int8):
    N, K = 2**31 // 16384 + 40, 16384
    w = torch.zeros(N, K, dtype=torch.int8 if int8 else torch.bfloat16, device="cuda")
    w[-1], w[0] = 1, 2
    x, scale = torch.ones(1, K, dtype=torch.bfloat16, device="cuda"), torch.ones(N, device="cuda")
    out = linear.OP(x, w, scale if int8 else None, None, None)[0]
    assert out[-1] == K and out[0] == 2 * K and not out[1:-1].any()


def chain(x, layers):
    for w, scale, w2, scale2 in layers:
        (y,) = rms_norm_linear_group.OP(x, None, 1e-6, False, True, [w], [scale], [None])
        x = linear.OP(y, w2, scale2, None, x)
    return x


@pytest.mark.parametrize("M", [1, 6, 20])
def test_dependent_launch_changes_no_bit_and_graphs_replay(M, monkeypatch):
    """A chain in which every kernel reads what the one before it wrote, in memory that is used again and again."""
    layers = [(*weights(1024, 512, torch.int8), *weights(512, 1024, torch.int8)) for _ in range(12)]
    x = rows(M, 512, torch.bfloat16, False)
    ahead = chain(x, layers)
    for module in (_gemv, _gemm, _one_row, _norm_digits):
        monkeypatch.setattr(module, "pdl", lambda device: False)
    assert torch.equal(ahead, chain(x, layers))
    monkeypatch.undo()
    graph, given = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        captured = chain(given, layers)
    for _ in range(3):
        given.copy_(rows(M, 512, torch.bfloat16, False))
        graph.replay()
        assert torch.equal(captured, chain(given, layers))


def test_opcheck():
    x, (w, scale) = rows(2, 128, torch.bfloat16), weights(24, 128, torch.int8)
    torch.library.opcheck(torch.ops.tinyfuse.linear.default, (x, w, scale, None, None))
    torch.library.opcheck(torch.ops.tinyfuse.linear_group.default, (x, [w, w], [scale, scale], [None, None]))
    torch.library.opcheck(torch.ops.tinyfuse.gated_linear.default, (x, w, w, scale, scale, None, None, "silu"))


@pytest.mark.parametrize("S", [1, 6, 32, 64, 300])
@pytest.mark.parametrize("E, N, K", [(8, 1000, 2048), (60, 1536, 704), (16, 34, 14336)])
def test_experts(E, N, K, S):
    """Few rows and prompts, sorted and not; some experts have no row, one has a quarter of them."""
    ids = torch.randint(0, E, (S,), device="cuda")
    ids[: S // 4] = E // 2
    offs = torch.bincount(ids, minlength=E).cumsum(0).int()
    for dtype, int8 in itertools.product([torch.bfloat16, torch.float16], [False, True]):
        x = rows(S, K, dtype, dtype is torch.bfloat16)
        w, scale = weights(E * N, K, torch.int8 if int8 else dtype)
        w, scale = w.view(E, N, K), None if scale is None else scale.view(E, N)
        wide = w.double() if scale is None else w.double() * scale.double()[..., None]
        for given, chosen in (((offs, None), ids.sort()[0]), ((None, ids), ids)):
            args = x, w, scale, *given
            exact = torch.stack([row.double() @ wide[e].T for row, e in zip(x, chosen.tolist(), strict=True)])
            assert_as_exact_as_eager("linear", experts_linear.OP(*args), experts_linear.reference(*args), exact)
            out, eager = experts_gated_linear.OP(*args, "silu"), experts_gated_linear.reference(*args, "silu")
            assert_as_exact_as_eager("gated_linear", out, eager, gated_act.reference(*exact.chunk(2, -1), "silu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_graph_holds_experts(dtype):
    """Replayed for other experts than it was captured with."""
    x, (w, scale) = rows(4, 512, torch.bfloat16, False), weights(8 * 96, 512, dtype)
    w, scale = w.view(8, 96, 512), None if scale is None else scale.view(8, 96)
    offs = torch.arange(1, 9, device="cuda", dtype=torch.int32).clamp(max=4)
    experts_linear.OP(x, w, scale, offs, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts_linear.OP(x, w, scale, offs, None)
    for ends in ([0, 0, 4, 4, 4, 4, 4, 4], [1, 2, 2, 2, 2, 2, 3, 4]):
        offs.copy_(torch.tensor(ends))
        graph.replay()
        torch.testing.assert_close(out, experts_linear.OP(x, w, scale, offs, None))
