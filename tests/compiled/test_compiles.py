"""Every Triton kernel compiles for Hopper, on a machine without a GPU: through PTX to machine code, not run.

The interpreter runs what a compiler would refuse: a variable that changes its type in a branch, a missing argument of
an inner function in a branch that is not taken.
"""

import importlib
import os
import pkgutil
import re
import subprocess
import tempfile
from functools import partial
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import tinyfuse.kernels
from tinyfuse.kernels import (
    _advance,
    _attention_decode,
    _attention_prefill,
    _experts,
    _experts_gemm,
    _fp16_gemm,
    _gemm,
    _gemv,
    _greedy,
    _one_row,
    add_layer_norm,
    add_rms_norm,
    dequantize,
    gated_act,
    kv_append,
    layer_norm,
    mask_bounds,
    rms_norm,
    rms_norm_gated_linear,
    rms_norm_linear_group,
    rope,
    rope_append,
    rope_append_attention,
    rope_tables,
    softcap,
    step_counters,
)
from tinyfuse.kernels._triton import awakening, rehearsal, rehearsing, side_by_side

BF16 = torch.bfloat16
READ_WEIGHTS = {"_gemm", "_fp16_gemm", "_gemv", "_one_row", "_cast", "_pairs", "_experts_gemm"}
HOPPER = SimpleNamespace(
    get_current_device=lambda: 99,  # no real one's
    get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    launcher_cls=lambda source, metadata: print,
    utils=SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *args: (1, 1, 32, 0, 1024),
    ),
)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """Kernels are compiled for a Hopper GPU, with dependent launch, and nothing is found on disk."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for info in pkgutil.iter_modules(tinyfuse.kernels.__path__):
        module = importlib.import_module(f"tinyfuse.kernels.{info.name}")
        if hasattr(module, "pdl"):
            monkeypatch.setattr(module, "pdl", lambda device: True)
        for name, value in list(vars(module).items()):
            if name.lstrip("_").startswith("bind"):
                value.cache_clear()
    monkeypatch.setattr(driver, "_active", HOPPER)
    monkeypatch.setattr(torch.cuda, "current_device", HOPPER.get_current_device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    awakening(HOPPER.get_current_device()).join()


@pytest.fixture
def compiled(hopper, monkeypatch):
    """The names of the kernels launched: a launch compiles and does nothing else."""
    names = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        if self.__name__ in READ_WEIGHTS:
            assert not re.search(r"ld\.global\S*\.[bus]8\s", kernel.asm["ptx"]), f"{self.__name__} loads single bytes"
        names.append(self.__name__)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return names


def ones(*shape, dtype=BF16):
    return torch.ones(shape, dtype=dtype)


def weight(N, K, int8):
    return (ones(N, K, dtype=torch.int8), ones(N, dtype=torch.float32)) if int8 else (ones(N, K), None)


def stack_bytes(kernel):
    """What a thread of it keeps in memory for want of registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        used = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", used.stdout)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "heads, kv_heads, D", [(32, 32, 128), (32, 8, 128), (20, 20, 64), (32, 8, 64), (8, 4, 256), (8, 8, 256)]
)
def test_attention_of_a_token_has_the_registers_it_needs(hopper, monkeypatch, heads, kv_heads, D, dtype):
    """With its rotation and cache write it once took 1280 bytes of memory for each thread."""
    run, used = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **options):
        used.append((self.__name__, stack_bytes(run(self, *args, grid=grid, warmup=True, **options))))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(_attention_decode, "_multiprocessors", lambda device: 132)
    _attention_decode.plan.cache_clear()
    table, pos = ones(1, 1, 1, D, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    for batch, L in ((1, 256), (1, 640), (1, 8192), (4, 256), (8, 256), (8, 512), (32, 256), (32, 1024)):
        shapes = (batch, heads, 1, D), (batch, kv_heads, L, D), (batch, kv_heads, 1, D)
        q, cache, token = (ones(1, *shape[1:], dtype=dtype).expand(shape) for shape in shapes)
        new = _attention_decode.New(token, token, table, table, pos, False)
        mask, bounds = torch.ones(batch, 1, 1, L, dtype=torch.bool), torch.zeros(batch, 4, dtype=torch.int32)
        _attention_decode.decode(q, cache, cache, mask, 0.1, False, new=new, bounds=bounds)
    assert used and not any(size for _, size in used), used


def test_norms_and_rotation(compiled):
    x, gain = ones(2, 3, 256), ones(256)
    rms_norm.run_triton(x, gain, 1e-5, False, True)
    add_rms_norm.run_triton(x, x, gain, 1e-5, True, False)
    layer_norm.run_triton(x, gain, gain, 1e-5)
    add_layer_norm.run_triton(x, x, gain, gain, 1e-5)
    add_layer_norm.run_triton(ones(2, 256, 3).transpose(1, 2), x, gain, gain, 1e-5)
    for act in gated_act.ACTIVATIONS:
        gated_act.run_triton(x, x, act)
    softcap.run_triton(x, 30.0)
    heads, table, cache, pos = ones(1, 4, 2, 64), ones(1, 1, 2, 64), ones(1, 4, 9, 64), torch.arange(2)
    for interleaved in (False, True):
        rope.run_triton(heads, table, table, interleaved)
        rope_append.run_triton(heads, heads, heads, table, table, cache, cache.clone(), pos, interleaved)
    kv_append.run_triton(cache, cache.clone(), heads, heads, pos)
    rope_tables.run_triton(pos[None], ones(32, dtype=torch.float32), 1.0, BF16)
    assert len(set(compiled)) >= 7


@pytest.mark.parametrize("D, heads, kv_heads, dtype", [(128, 4, 4, BF16), (64, 8, 2, torch.float32)])
def test_attention(compiled, D, heads, kv_heads, dtype):
    L, made = 512, partial(ones, dtype=dtype)
    cache, new = made(2, kv_heads, L, D), made(2, kv_heads, 1, D)
    q, table, pos = made(2, heads, 1, D), made(2, 1, 1, D), torch.tensor([3])
    row, bias = torch.ones(2, 1, 1, L, dtype=torch.bool), made(2, 1, 1, L)
    for mask, bounds in ((row, mask_bounds.run_triton(row)), (row, None), (bias, None), (None, None)):
        rope_append_attention.run_triton(q, new, new, table, table, cache, cache.clone(), pos, False, mask, 0.1, bounds)
    _attention_decode.decode(q, cache, cache, row, 0.1, False)
    prompt = made(2, heads, 40, D)
    _attention_decode.decode(prompt[:, :, :3], cache, cache, row.expand(2, heads, 3, L), 0.1, False, softcap=50.0)
    if dtype is torch.float32:
        return  # prompts stay with SDPA
    batch = [t.repeat(4, 1, 1, 1) for t in (q, new, new, table, table, cache, cache)]
    rope_append_attention.run_triton(*batch, pos, False, row.repeat(4, 1, 1, 1), 0.1)
    _attention_prefill.prefill(prompt, cache, cache, row.expand(2, 1, 40, L), 0.1, False)
    _attention_prefill.prefill(prompt, prompt[:, :kv_heads], prompt[:, :kv_heads], None, 0.1, True, softcap=50.0)
    keys = torch.ones(2, L + 1, dtype=torch.bool)
    for held, window in ((keys, 100), (keys, None), (None, 100), (None, None)):
        reach = _attention_prefill.Reach(torch.arange(40), torch.arange(L), held, window)
        _attention_prefill.prefill(prompt, cache, cache, None, 0.1, True, reach=reach)
    assert {"_decode", "_prefill", "_map", "_mask_bounds"} <= set(compiled)


@pytest.mark.parametrize("int8", [False, True])
def test_linears(compiled, int8):
    K = 1024
    parts = [weight(N, K, int8) for N in (256, 128, 128)]
    weights, scales, none = [w for w, _ in parts], [s for _, s in parts], [None] * 3
    x, norm = ones(1, K), (ones(K), 1e-5, False, True)
    residual = x, weights[:1], scales[:1], [ones(256)], ones(1, 256)
    _one_row.one_row(*residual)
    rms_norm_linear_group.run_one_row(x, *norm, weights, scales, none)
    pair = weights[1], weights[2], scales[1], scales[2], None, None, "silu"
    rms_norm_gated_linear.run_one_row(x, *norm, *pair)
    alone = weights[0], None, scales[0], None, None, None, "relu_squared"
    rms_norm_gated_linear.run_one_row(x, *norm, *alone)
    several = x.expand(4, K)
    if int8:
        _one_row.one_row(several[:3], *residual[1:4], ones(3, 256))
        _one_row.one_row(*residual, own=False)
        for rows in (4, 40, 200):
            _gemm.gemm(x.repeat(rows, 1), weights[:1], scales[:1], [None], ones(rows, 256))
        for config in ((64, 512, 4), (128, 512, 8)):
            _fp16_gemm.fp16_gemm(several, weights[0], scales[0], None, several[:, :256], config)
        rms_norm_linear_group.run_tensor_core(several, *norm, weights, scales, none)
        rms_norm_gated_linear.run_tensor_core(several, *norm, *pair)
        rms_norm_gated_linear.run_tensor_core(several, *norm, *alone)
        _gemm.dequantize(weights[0], scales[0], BF16)
        assert {"_one_row", "_split", "_norm_split", "_gemm", "_fp16_gemm", "_cast"} <= set(compiled)
    else:
        _gemv.gemv(several, weights, none)
        _gemv.gemv(several, weights[:2], none[:2], None, "silu")
        _gemv.gemv(several, weights[:1], none[:1], None, "gelu")
        assert {"_one_row", "_gemv"} <= set(compiled)


@pytest.mark.parametrize("int8", [False, True])
def test_experts(compiled, int8):
    x, ends, ids = ones(6, 1024), torch.full((60,), 6, dtype=torch.int32), torch.zeros(6, dtype=torch.long)
    w, scale = weight(60 * 256, 1024, int8)
    w, scale = w.view(60, 256, 1024), None if scale is None else scale.view(60, 256)
    for given in ((ends, None), (None, ids)):
        assert _experts.reason(x, w, scale, *given) is None
        _experts.pairs(x, w, scale, *given)
        _experts.pairs(x, w, scale, *given, "silu")
    for S, act in ((600, "gelu"), (30000, "")):
        _experts_gemm.experts_gemm(x.repeat(S // 6, 1), w, scale, ends, act)
    assert compiled.count("_pairs") == 4 and compiled.count("_experts_gemm") == 2


def test_what_surrounds_a_step(compiled):
    ids, one = torch.zeros(2, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    for dtype in (BF16, torch.float32):
        _greedy.greedy(
            ones(2, 5000, dtype=dtype), ids, ids[:1], one[0], ids + 1, one, ids[:, None], ids.expand(9, 2).mT
        )
    mask, positions = torch.ones(2, 1, 9, 100, dtype=torch.bool), torch.ones(2, 9, dtype=torch.long)
    buffers = [mask[:, :, :1].contiguous(), positions[:, :1].contiguous()]
    _advance.advance([mask, positions], [2, 1], buffers, one, one.clone())
    step_counters.run_triton(list(torch.zeros(4, dtype=torch.long).unbind()), [0, 6, 6, 0])
    assert {"_peaks", "_choose", "_advance"} <= set(compiled)


def test_what_a_rehearsal_compiles_is_not_compiled_again(hopper, monkeypatch, request):
    """On fake tensors, side by side; what a launch then finds is the same kernels, for tensors with memory."""
    made, loaded, compile_one = [], [], JITFunction._do_compile
    monkeypatch.setattr(HOPPER.utils, "load_binary", lambda name, *_: loaded.append(name) or (1, 1, 32, 0, 1024))

    def counting(self, *args, **kwargs):
        made.append(self.__name__)
        return compile_one(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "_do_compile", counting)

    def launches() -> None:
        K, norm = 512, (ones(512), 1e-5, False, True)
        pair = [weight(256, K, True) for _ in range(2)]
        args = pair[0][0], pair[1][0], pair[0][1], pair[1][1], None, None, "silu"
        rms_norm_gated_linear.run_one_row(ones(1, K), *norm, *args)
        rms_norm_gated_linear.run_tensor_core(ones(4, K), *norm, *args)
        cache, new, row = ones(1, 2, 64, 64), ones(1, 2, 1, 64), ones(1, 1, 1, 64, dtype=torch.bool)
        turn, at = ones(1, 1, 1, 64), torch.tensor([3])
        rope_append_attention.run_triton(new, new, new, turn, turn, cache, cache.clone(), at, False, row, 0.1)
        prompt = ones(1, 2, 32, 64)
        _attention_prefill.prefill(prompt, cache, cache, ones(1, 1, 32, 64, dtype=torch.bool), 0.1, False)

    with FakeTensorMode(), rehearsal():
        launches()
        launches()  # as of a next layer
    rehearsed = set(made)
    assert sorted(loaded) == sorted(rehearsed)
    made.clear()
    assert rehearsed == {"_norm_split", "_one_row", "_gemm", "_decode", "_map", "_prefill"}
    request.getfixturevalue("compiled")
    launches()
    assert not made


def test_weights_that_were_just_gathered_are_not_read_ahead(hopper):
    """A kernel in dependent launch may start before the one in front of it has written them."""
    int8, scale = weight(64, 320, True)
    with side_by_side() as block, FakeTensorMode(allow_non_fake_inputs=True), rehearsal():
        _gemm.dequantize(int8, scale, BF16)
        dequantize.run_cast(int8.view(4, 16, 320), scale.view(4, 16), BF16)
    ahead = [dict(options).get("launch_pdl", False) for _, _, options in block.launches]
    assert ahead == [True, False]


def test_kernels_of_several_rehearsals_compile_at_once(hopper, monkeypatch):
    """All of them start before the first ends, and what two rehearsals launch alike is compiled once."""
    made, loaded, together, make_ir = [], [], Barrier(2, timeout=60), ASTSource.make_ir
    monkeypatch.setattr(HOPPER.utils, "load_binary", lambda name, *_: loaded.append(name) or (1, 1, 32, 0, 1024))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    of = partial(ones, dtype=torch.float16)  # no other test's kernels

    def making(self, *args):
        made.append(self.name)
        together.wait()
        return make_ir(self, *args)

    monkeypatch.setattr(ASTSource, "make_ir", making)
    with side_by_side():
        for _ in range(2):
            with FakeTensorMode(), rehearsal():
                rms_norm.run_triton(of(2, 320), of(320), 1e-5, False, True)
        with FakeTensorMode(), rehearsal():
            softcap.run_triton(of(2, 320), 30.0)
        assert not rehearsing() and not made
    assert sorted(made) == sorted(loaded) == ["_rms_norm", "_softcap"]
