"""Norms, rope, cache writes and gated activations on the GPU."""

import itertools

import pytest
import torch

from tests import row_ops
from tinyfuse.kernels import (
    _rows,
    _triton,
    add_layer_norm,
    add_rms_norm,
    gated_act,
    kv_append,
    layer_norm,
    rms_norm,
    rope,
    rope_append,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("strict")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def of(op):
    return op.__name__.rpartition(".")[2]


@pytest.mark.parametrize("op", row_ops.NORMS, ids=of)
@pytest.mark.parametrize("N", [1, 64, 341, 4096, 16385])
def test_norm_errors(op, N):
    for dtype, lead in itertools.product(DTYPES, [(1, 1, 1), (1, 7, 191) if N < 5000 else (1, 1, 33)]):
        for layout in row_ops.LAYOUTS if N in (64, 341) and dtype is torch.bfloat16 else ["outliers"]:
            x = row_ops.rows(layout, N, dtype, "cuda", lead)
            weight, bias = row_ops.norm_weights(N, dtype, "cuda")[0]
            row_ops.check_norm(op, x, row_ops.residual_like(op, x), weight, bias)


@pytest.mark.parametrize("op", [layer_norm, add_layer_norm], ids=of)
@pytest.mark.parametrize("N", [64, 341, 1152, 16385])
@pytest.mark.parametrize("b, s", [(1, 196), (3, 197)])
def test_the_columns_of_patches(op, N, b, s):
    for dtype in DTYPES:
        row_ops.check_norm_of_patches(op, N, dtype, "cuda", b, s)


@pytest.mark.parametrize("dtype, weight_dtype", list(itertools.product(DTYPES, DTYPES)))
def test_rms_roundings(dtype, weight_dtype):
    x, weight = row_ops.rows("outliers", 4096, dtype, "cuda"), torch.randn(4096, device="cuda").to(weight_dtype)
    for unit_offset, cast_first in itertools.product([False, True], repeat=2):
        row_ops.check_rms_casts(x, weight, unit_offset, cast_first)


def test_rms_norm_equals_the_modules_of_the_models():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    x = row_ops.rows("outliers", 2048, torch.bfloat16, "cuda")
    for kind, flags in ((LlamaRMSNorm, (False, True)), (Olmo2RMSNorm, (False, False)), (GemmaRMSNorm, (True, False))):
        module = kind(2048, 1e-6).to("cuda", torch.bfloat16)
        with torch.no_grad():
            module.weight.copy_(torch.randn(2048))
            want, out = module(x), rms_norm.run_triton(x, module.weight, 1e-6, *flags)
        apart = (out.view(torch.int16).int() - want.view(torch.int16).int()).abs()
        assert apart.max() <= 1, kind.__name__


@pytest.mark.parametrize("kind", row_ops.TABLES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(kind, interleaved):
    shapes = [(1, 32, 1, 128, 128), (3, 5, 7, 96, 96), (2, 8, 300, 128, 64), (1, 71, 130, 80, 20)]
    for (B, H, S, D, R), dtype in itertools.product(shapes, DTYPES):
        x = row_ops.heads(B, H, S, D, dtype, "cuda", 2 * D)
        for table_dtype in {dtype, torch.float32}:
            row_ops.check_rope(x, *row_ops.tables(kind, B, S, R, table_dtype, "cuda"), interleaved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_tables(dtype):
    for B, S, half, scale in [(1, 1, 64, 1.0), (8, 1, 32, 1.0), (2, 517, 48, 1.25), (3, 7, 5, 0.5)]:
        row_ops.check_rope_tables(B, S, half, scale, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_writes(dtype):
    for B, H, kv_heads, S, L, D, Dv in [
        (1, 32, 8, 1, 100, 128, 128),
        (2, 9, 3, 7, 7, 64, 96),
        (3, 6, 2, 90, 200, 96, 64),
    ]:
        row_ops.check_append(B, kv_heads, S, L, D, Dv, dtype, "cuda")
        for R, kind, interleaved in itertools.product([D, D // 2], ["shared", "batched"], [False, True]):
            row_ops.check_rope_append(B, H, kv_heads, S, L, D, Dv, R, kind, interleaved, dtype, "cuda")


@pytest.mark.parametrize("act", gated_act.ACTIVATIONS)
def test_gated_act(act):
    for N, dtype, layout in itertools.product([1, 341, 4096], DTYPES, row_ops.LAYOUTS):
        gate, up = (row_ops.rows(kind, N, dtype, "cuda", (1, 3, 5)) for kind in (layout, "contiguous"))
        row_ops.check_gated_act(gate, up, act)
        row_ops.check_gated_act(*row_ops.rows("outliers", 2 * N, dtype, "cuda", (1, 2, 9)).chunk(2, -1), act)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap(dtype):
    torch.manual_seed(0)
    for layout in row_ops.LAYOUTS:
        row_ops.check_softcap(row_ops.rows(layout, 341, dtype, "cuda"), 30.0)
    row_ops.check_softcap(8 * torch.randn(3, 256_000, device="cuda").to(dtype), 30.0)


def test_offsets_past_2_31():
    width = 2**16
    x = torch.empty(2**15 + 3, width, dtype=torch.bfloat16, device="cuda")
    x[-2:] = torch.randn(2, width, device="cuda")
    last = x[:, :128]
    out = rms_norm.run_triton(last, None, 1e-5, False, True)
    assert torch.equal(out[-2:], rms_norm.run_triton(last[-2:].clone(), None, 1e-5, False, True))
    y = gated_act.run_triton(last, last, "silu")
    assert torch.equal(y[-2:], gated_act.run_triton(last[-2:].clone(), last[-2:].clone(), "silu"))
    cache = x.view(1, 1, -1, width)[..., 64:128]
    k = torch.randn(1, 1, 1, 64, device="cuda").bfloat16()
    kv_append.run_triton(cache, cache, k, k, torch.tensor([2**15 + 2], device="cuda"))
    assert torch.equal(cache[:, :, -1:], k)


def chain(x, residual, weight, cos, sin, keys, values, pos):
    """Two layers' worth of dependent launches."""
    B, S, N = x.shape
    for _ in range(2):
        residual, x = add_rms_norm.OP(x, residual, weight, 1e-6, False, True)
        heads = x.view(B, S, -1, 64).transpose(1, 2)
        q, k = rms_norm.OP(heads, weight[:64], 1e-6, True, False), rope.OP(heads[:, :4], cos, sin, True)
        kv_append.OP(keys, values, k, heads[:, -4:], pos)
        q = rope_append.OP(q, heads[:, 1:5], k, cos, sin, keys, values, pos, False)
        x = layer_norm.OP(gated_act.OP(x, q.transpose(1, 2).reshape(B, S, N), "silu"), weight, None, 1e-5)
    return x, residual, keys, values


@pytest.mark.parametrize("S", [1, 300])
def test_dependent_launch_changes_no_bit(monkeypatch, S):
    x, residual = torch.randn(2, 1, S, 2048, device="cuda").bfloat16()
    weight = torch.randn(2048, device="cuda").bfloat16()
    cos, sin = row_ops.tables("batched", 1, S, 64, torch.bfloat16, "cuda")
    pos = torch.arange(S, device="cuda")
    found = []
    for enabled in ("1", "0"):
        monkeypatch.setenv("TINYFUSE_PDL", enabled)
        _triton.pdl.cache_clear()
        caches = torch.zeros(2, 1, 4, S + 1, 64, device="cuda").bfloat16()
        args = (x, residual, weight, cos, sin, *caches, pos)
        chain(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain(*args)
        for _ in range(20):
            graph.replay()
        found.append([t.clone() for t in out])
    monkeypatch.delenv("TINYFUSE_PDL")
    _triton.pdl.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def calls():
    x, weight = torch.randn(2, 3, 5, 64, device="cuda").bfloat16(), torch.randn(64, device="cuda").bfloat16()
    heads, residual = x.transpose(1, 2), torch.randn_like(x)
    cos, sin = row_ops.tables("batched", 2, 3, 64, torch.bfloat16, "cuda")
    keys, values = torch.zeros(2, 2, 5, 9, 64, device="cuda").bfloat16()
    pos = torch.tensor([4, 2, 7], device="cuda")
    yield "rms_norm", (heads, weight, 1e-6, False, True)
    yield "add_rms_norm", (x, residual, weight, 1e-6, True, False)
    yield "layer_norm", (heads, weight, weight, 1e-5)
    yield "add_layer_norm", (x, residual, weight, None, 1e-5)
    yield "rope", (heads, cos, sin, False)
    yield "kv_append", (keys, values, heads, heads, pos)
    yield "rope_append", (heads, heads, heads, cos, sin, keys, values, pos, True)
    yield "rope_tables", (torch.arange(3, device="cuda")[None], torch.rand(8, device="cuda"), 1.0, torch.float16)
    yield "mask_bounds", (torch.rand(3, 1, 1, 70, device="cuda") < 0.5,)
    yield "gated_act", (*x.chunk(2, -1), "gelu_tanh")


def test_ops_choose_these_kernels_and_pass_opcheck():
    from tinyfuse.op import OPS

    torch.use_deterministic_algorithms(False)
    for name, args in calls():
        assert OPS[name].choose(*args)[0].name == "triton"
        torch.library.opcheck(getattr(torch.ops.tinyfuse, name).default, args)


def test_one_program_per_row_for_few_rows():
    assert _rows.tile(4096, False).rows == 1 and _rows.tile(128, False).rows == 1
