"""The backend by name: every way torch and transformers reach it, its fallbacks, its gradients."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys

import pytest
import torch
from transformers.generation import CompileConfig

from tests.models import build
from tinyfuse import backend as backend_module
from tinyfuse import fallback
from tinyfuse.backend import backend


@pytest.fixture
def llama():
    torch._dynamo.reset()
    return build("llama")


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(fallback, "seen", type(fallback.seen)())


def assert_forward_equals(compiled, model, inputs) -> None:
    with torch.no_grad():
        expected, got = model(**inputs).logits, compiled(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_by_name_without_an_import() -> None:
    code = (
        "import torch; m = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).eval()\n"
        "x = torch.randn(2, 4)\n"
        "with torch.no_grad(): torch.testing.assert_close(torch.compile(m, backend='tinyfuse')(x), m(x))\n"
        "import sys; assert 'tinyfuse.backend' in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_first_use_draws_no_random_number() -> None:
    """Every pattern and kernel is imported at the first graph, between a user's seed and the tokens sampled."""
    code = (
        "import torch; torch.manual_seed(0); before = torch.get_rng_state()\n"
        "import tinyfuse.backend; tinyfuse.backend.all_patterns()\n"
        "assert torch.equal(torch.get_rng_state(), before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@torch.no_grad()
def test_variances_and_tensors_of_one_number() -> None:
    def code(x, seen):
        low, tenth = torch.tensor(-7.0), torch.tensor(0.1, dtype=torch.bfloat16)  # which is another number than 0.1
        filled = torch.where(seen, x, low).masked_fill(seen == torch.tensor(False), torch.tensor(2.0))
        spreads = x.var(), x.var(-1), x.var(1, False), torch.var(x, dim=(0, 1)), x.var(0, correction=0, keepdim=True)
        return filled, torch.where(seen, x, tenth), seen.float().eq(tenth), *spreads

    given = torch.randn(3, 5), torch.rand(3, 5) < 0.5
    for made, expected in zip(torch.compile(code, backend="tinyfuse")(*given), code(*given), strict=True):
        torch.testing.assert_close(made, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_torch_compile_accepts_modes(llama, mode) -> None:
    model, inputs = llama
    assert_forward_equals(torch.compile(model, backend=backend, mode=mode), model, inputs)


def test_module_compile_covers_generate(llama) -> None:
    model, inputs = llama
    stock = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="tinyfuse")
    assert torch.equal(compiled.generate(**inputs, max_new_tokens=4, do_sample=False), stock)


def test_compile_config_reaches_the_backend(llama, monkeypatch) -> None:
    model, inputs = llama
    kwargs = dict(max_new_tokens=5, do_sample=False, cache_implementation="static")
    stock = model.generate(**inputs, **kwargs, disable_compile=True)
    graphs = []
    compile_graph = backend_module.compile_graph
    monkeypatch.setattr(backend_module, "compile_graph", lambda *args: graphs.append(args) or compile_graph(*args))
    config = CompileConfig(backend="tinyfuse")
    config._compile_all_devices = True
    assert torch.equal(model.generate(**inputs, **kwargs, compile_config=config), stock)
    assert len(graphs) == 1


def test_whoever_wraps_a_generating_model_is_told_once(llama, caplog) -> None:
    model, inputs = llama
    with caplog.at_level(logging.WARNING, "tinyfuse"), torch.no_grad():
        for length in (5, 7):
            torch.compile(model, backend="tinyfuse", dynamic=False)(inputs["input_ids"][:, :length])
    told = [r.getMessage() for r in caplog.records if "model.generate" in r.getMessage()]
    assert len(told) == 1 and "tinyfuse.optimize(model)" in told[0]


def test_gradients_are_those_of_the_stock_graph(llama, caplog) -> None:
    model, inputs = llama
    ids = inputs["input_ids"]

    def gradients(call) -> list[torch.Tensor]:
        model.zero_grad()
        call(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(model)
    with caplog.at_level(logging.WARNING, "tinyfuse"):
        got = gradients(torch.compile(model, backend="tinyfuse"))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert any("torch.no_grad()" in r.getMessage() for r in caplog.records)


def test_a_failing_compilation_runs_the_stock_graph(llama, monkeypatch, caplog) -> None:
    model, inputs = llama
    monkeypatch.setattr(backend_module, "normalize", lambda graph: 1 / 0)
    with caplog.at_level(logging.WARNING, "tinyfuse"):
        assert_forward_equals(torch.compile(model, backend="tinyfuse"), model, inputs)
    assert any("the stock graph runs: ZeroDivisionError" in r.getMessage() for r in caplog.records)


def test_a_failing_kernel_is_replaced_by_its_reference(llama, monkeypatch, caplog) -> None:
    from tinyfuse.op import OPS, Kernel

    def fail(*args):
        raise RuntimeError("no such instruction")

    model, inputs = llama
    op = OPS["gated_linear"]
    monkeypatch.setattr(op, "kernels", (Kernel("broken", "cpu", lambda *args: None, fail),))
    monkeypatch.setattr(op, "broken", {})
    with caplog.at_level(logging.WARNING, "tinyfuse"):
        assert_forward_equals(torch.compile(model, backend="tinyfuse"), model, inputs)
    assert any("gated_linear/broken" in r.getMessage() for r in caplog.records)


def test_a_failure_that_the_reference_shares_is_not_the_kernels(monkeypatch) -> None:
    """A capture that something else had ended once left its next kernel out of use for the rest of the process."""
    from tinyfuse.op import OPS, Kernel

    def fail(*args):
        raise RuntimeError("operation failed due to a previous error during capture")

    op = OPS["rms_norm"]
    broken = dict(op.broken)
    monkeypatch.setattr(op, "kernels", (Kernel("innocent", "cpu", lambda *args: None, fail),))
    monkeypatch.setattr(op, "chosen", {})
    monkeypatch.setattr(op, "reference", fail)
    with pytest.raises(RuntimeError, match="previous error"):
        op(torch.ones(2, 8), torch.ones(8), 1e-6, False, False)
    assert op.broken == broken and not any("innocent" in where for where, _ in fallback.seen)


def test_an_unknown_mode_in_the_environment_is_an_error() -> None:
    command = [sys.executable, "-c", "from tinyfuse import optimize"]
    done = subprocess.run(command, env=os.environ | {"TINYFUSE_FALLBACK": "eror"}, capture_output=True, text=True)
    assert done.returncode == 1 and "TINYFUSE_FALLBACK is 'eror': set it to warn or error" in done.stderr


def test_error_mode_raises_instead_of_falling_back(llama, monkeypatch) -> None:
    model, inputs = llama
    monkeypatch.setattr(fallback, "mode", "error")
    monkeypatch.setattr(backend_module, "normalize", lambda graph: 1 / 0)
    with torch.no_grad(), pytest.raises(Exception, match="the stock graph runs"):
        torch.compile(model, backend="tinyfuse")(**inputs)


def test_disabled_by_the_environment(llama, monkeypatch) -> None:
    model, inputs = llama
    monkeypatch.setenv("TINYFUSE_DISABLE", "1")
    monkeypatch.setattr(backend_module, "compile_graph", lambda *_: 1 / 0)
    assert_forward_equals(torch.compile(model, backend="tinyfuse"), model, inputs)


@pytest.mark.parametrize(
    ("given", "named"), [({"mode": "fastest"}, "reduce-overhead"), ({"options": {"nope": 1}}, "unknown options")]
)
def test_unknown_modes_and_options_are_named(given, named) -> None:
    with pytest.raises(ValueError, match=named):
        backend(torch.fx.symbolic_trace(torch.nn.Identity()), [], **given)


def test_survives_a_deep_copy() -> None:
    assert copy.deepcopy(CompileConfig(backend=backend)).backend is backend
