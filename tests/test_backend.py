"""The backend by name: every way torch and transformers reach it, its fallbacks, its gradients."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
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


def assert_alike(code, *given) -> None:
    """``code`` gives and leaves what it does without a backend."""
    torch._dynamo.reset()
    mine, theirs = ([x.clone() for x in given] for _ in range(2))
    made, expected = torch.compile(code, backend="tinyfuse")(*mine), code(*theirs)
    torch.testing.assert_close((made, mine), (expected, theirs), rtol=1e-5, atol=1e-5)
    assert not any("failed" in reason for _, reason in fallback.seen)


ATTENTIONS = {
    "sdpa": lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, bias),
    "written out": lambda q, k, v, bias: torch.softmax(q @ k.transpose(-1, -2) * 0.3 + bias, -1) @ v,
    "divided": lambda q, k, v, bias: torch.softmax((q @ k.transpose(-1, -2) + bias) / 3, -1) @ v,
    "without a mask": lambda q, k, v, bias: torch.softmax(q @ k.transpose(-1, -2), -1) @ v,
}


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", ATTENTIONS)
@torch.no_grad()
def test_attention_that_broadcasts(name, dim) -> None:
    """Of size 1 in one dim are some of q, k, v and the mask."""
    for narrow in itertools.product([False, True], repeat=4):
        given = [torch.randn(2, 3, rows, columns) for rows, columns in ((5, 8), (7, 8), (7, 8), (5, 7))]
        given = [x.narrow(dim, 0, 1) if one else x for x, one in zip(given, narrow, strict=True)]
        try:
            ATTENTIONS[name](*given)
        except RuntimeError:
            continue  # it does not broadcast so
        assert_alike(ATTENTIONS[name], *given)


@pytest.mark.parametrize("shape", [(), (7,), (5, 1), (1, 7)])
@torch.no_grad()
def test_masks_of_few_dims(shape) -> None:
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    assert_alike(ATTENTIONS["written out"], q, k, v, torch.randn(shape))


def inplace_functions() -> dict:
    """The functions of torch.nn.functional with an argument ``inplace``, called with it by place."""
    named = {n: f for n, f in vars(F).items() if inspect.isfunction(f) and n[0] != "_" and "dropout" not in n}
    found = {name: f for name, f in named.items() if "inplace" in inspect.signature(f).parameters}
    values = {"threshold": 0.1, "value": 3.0, "training": False}
    calls = {}
    for name, function in found.items():
        parameters = list(inspect.signature(function).parameters.values())[1:]
        arguments = [True if p.name == "inplace" else values.get(p.name, p.default) for p in parameters]
        calls[name] = lambda x, _, f=function, a=arguments: f(x, *a)
    return calls


WRITES = inplace_functions() | {
    "operator as a method": lambda x, _: x.__imul__(3),
    "out": lambda x, _: torch.add(x, 1, out=x),
    "statistics": lambda x, rows: F.batch_norm(rows, x[0], x[1].exp(), training=True),
    "longest rows": lambda x, _: F.embedding(torch.tensor([0, 2]), x, max_norm=0.5),
    "a packet of overloads": lambda x, _: torch.ops.aten.mul_(x, 2),
}


@pytest.mark.parametrize("name", WRITES)
@torch.no_grad()
def test_no_read_moves_across_a_write(name) -> None:
    """Linears of one input run together, equal sums once, and a norm with the sum that it is of, but not around a write
    of what they read."""

    def code(x, rows, w, v):
        first = F.linear(x, w), x + 1
        WRITES[name](x, rows)
        total = x + rows
        WRITES[name](total, rows)
        return *first, F.linear(x, v), (x + 1) * 2, F.layer_norm(total, (40,)), F.rms_norm(total, (40,), eps=1e-5)

    assert_alike(code, torch.randn(5, 40), torch.randn(5, 40), torch.randn(24, 40), torch.randn(24, 40))


@torch.no_grad()
def test_an_idle_dropout_is_its_input() -> None:
    """In the memory of which it lies, as do views of it."""

    def code(x, w, v):
        total = x + 1
        kept = F.dropout(total, 0.1, training=False)
        rows, first = kept.reshape(1, 3, 2, 4), F.linear(total, w)
        kept.chunk(2, -1)[0].mul_(-2)
        return first, F.linear(total, v), F.layer_norm(rows, (4,)) * rows, total

    assert_alike(code, torch.randn(3, 8), torch.randn(6, 8), torch.randn(6, 8))


@pytest.mark.filterwarnings("ignore:Implicit dimension")
@torch.no_grad()
def test_copies_sums_and_dims_by_default() -> None:
    def code(x, w):
        copied = x.to(torch.float32, False, True)
        copied.mul_(2)
        y = F.linear(x, w)
        return copied, y + y, F.softmax(x)

    assert_alike(code, torch.randn(3, 8), torch.randn(6, 8))


def attend(q, k, v) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def write_through_a_view(q, k, v) -> Tensor:
    out = attend(q, k, v)
    out.view(6, 5, 16).mul_(2)
    return out + 1


def write_a_copy(q, k, v) -> tuple[Tensor, Tensor]:
    out = attend(q, k, v)
    copied = out.transpose(1, 2).contiguous()
    copied.mul_(2)
    return out + 1, copied


def view_after_a_break(q, k, v) -> Tensor:
    out = attend(q, k, v)
    torch._dynamo.graph_break()
    return out.view(6, 5, 16)


def view_after_a_break_both(q, k, v) -> tuple[Tensor, Tensor]:
    out = attend(q, k, v)
    copied = out.transpose(1, 2).contiguous()
    torch._dynamo.graph_break()
    return copied.mul_(2), out


def write_rows_that_lie_otherwise(q, k, v) -> Tensor:
    x = q[0].transpose(0, 1)
    out = x + F.linear(x, k[0, 0, 0].outer(k[0, 0, 1]))
    out.transpose(0, 1).view(-1).mul_(2)
    return out


def view_rows_that_lie_otherwise(q, k, v) -> tuple[Tensor, Tensor]:
    x, w = q[0].transpose(0, 1), k[0, 0, 0].outer(k[0, 0, 1])
    out, columns = x + F.linear(x, w), torch.matmul(w, q[0].transpose(1, 2))
    torch._dynamo.graph_break()
    return out.transpose(0, 1).view(-1), columns.view(-1)


def write_columns(q, k, v) -> Tensor:
    columns = torch.matmul(k[0, 0, 0].outer(k[0, 0, 1]), q[0].transpose(1, 2))
    columns.view(-1).mul_(2)
    return columns


@pytest.mark.parametrize(
    "code",
    [
        write_through_a_view,
        write_a_copy,
        view_after_a_break,
        view_after_a_break_both,
        view_rows_that_lie_otherwise,
        write_rows_that_lie_otherwise,
        write_columns,
    ],
)
@torch.no_grad()
def test_the_memory_of_a_result_lies_as_traced(code) -> None:
    """Values as wide as these are no case of torch's fused attention, whose results lie otherwise too."""
    assert_alike(code, torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 16))


def norm_and_linears(x, w) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:]) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return F.silu(F.linear(x, w)) * F.linear(x, w + 1) + attend(*(x[None],) * 3)[0]


@pytest.mark.parametrize("which", [0, 1])
@torch.no_grad()
def test_tensor_subclasses_are_left_to_themselves(which) -> None:
    """No kernel reads their memory: they have none."""
    torch._dynamo.reset()
    given = [torch.randn(3, 5, 16), torch.randn(16, 16)]
    pairs = [TwoTensor(x, 2 * x) if i == which else x for i, x in enumerate(given)]
    made, expected = torch.compile(norm_and_linears, backend="tinyfuse")(*pairs), norm_and_linears(*pairs)
    for half in ("a", "b"):
        torch.testing.assert_close(getattr(made, half), getattr(expected, half), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
def test_vmap_and_conditions() -> None:
    def code(x, w):
        each = torch.vmap(lambda one: norm_and_linears(one[None], w))(x)
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (each,)) + norm_and_linears(x, w)

    assert_alike(code, torch.randn(3, 5, 16), 0.1 * torch.randn(16, 16))


@torch.no_grad()
def test_gradients_that_the_code_asks_for() -> None:
    def code(x, w):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = norm_and_linears(x, w)
        return y

    x, w = torch.randn(3, 5, 16), 0.1 * torch.randn(16, 16)
    torch._dynamo.reset()
    assert torch.compile(code, backend="tinyfuse")(x, w).requires_grad and code(x, w).requires_grad


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
