"""Uses off the beaten path of an optimised model: what stock gives, each time."""

import copy
import random
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.utils import is_kernels_available

from tests.models import build, prompt
from tests.tolerance import LOGITS, error
from tinyfuse.api import optimize
from tinyfuse.quantize import quantize_
from tinyfuse.runtime import forward

INPUTS = prompt(12, batch=2, padding=3)


@pytest.fixture
def pair():
    fast, _ = build("llama")
    stock = copy.deepcopy(fast)
    return optimize(fast), stock


@torch.no_grad()
def assert_same_logits(pair, inputs=INPUTS, **arguments):
    fast, stock = (model(**inputs, **arguments) for model in pair)
    torch.testing.assert_close(fast.logits, stock.logits, rtol=LOGITS, atol=LOGITS, equal_nan=True)
    return fast, stock


@pytest.mark.parametrize("name", ["hidden_states", "attentions"])
def test_what_a_forward_returns_besides_logits(pair, name):
    assert_same_logits(pair)
    if name == "attentions":
        for model in pair:
            model.set_attn_implementation("eager")
    fast, stock = assert_same_logits(pair, **{f"output_{name}": True})
    assert len(fast[name]) == len(stock[name]) >= 2
    for mine, theirs in zip(fast[name], stock[name], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=LOGITS, atol=LOGITS)


@pytest.mark.parametrize("path", ["model.layers.0.self_attn", "model.layers.1.input_layernorm"])
def test_hooks_on_what_is_fused(pair, path):
    """Put on after the first call: each sees its module's result and may replace it, until it is taken off."""
    before, _ = assert_same_logits(pair)
    seen, handles = [], []

    def double(module, args, out):
        seen.append((out[0] if isinstance(out, tuple) else out).sum())
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    handles = [model.get_submodule(path).register_forward_hook(double) for model in pair]
    hooked, _ = assert_same_logits(pair)
    assert len(seen) == 2 and torch.allclose(*seen, rtol=LOGITS, atol=LOGITS)
    assert not torch.allclose(hooked.logits, before.logits, atol=1e-2)
    for handle in handles:
        handle.remove()
    after, _ = assert_same_logits(pair)
    assert torch.allclose(after.logits, before.logits, atol=LOGITS)


def test_hooks_that_come_and_go(pair, monkeypatch):
    """Each is one that was not there before: none is missed, and graphs do not become ever more."""
    monkeypatch.setattr(forward, "MOST_HOOKED", 2)
    fast, seen = pair[0], []
    for _ in range(4):
        handle = fast.model.norm.register_forward_hook(lambda module, args, out: seen.append(out.sum()))
        assert_same_logits(pair)
        handle.remove()
    assert len(seen) == 4 and any("hooks" in reason for reason in fast._tinyfuse.fallbacks)
    assert len(fast._tinyfuse.compiled.compiled) == 2


def test_the_way_of_attention_changes(pair):
    """By transformers' method and behind its back, for the forward and for the loop."""
    assert_same_logits(pair)
    for implementation, by_method in (("eager", False), ("sdpa", True)):
        for model in pair:
            if by_method:
                model.set_attn_implementation(implementation)
            else:
                model.config._attn_implementation = implementation
        assert_same_logits(pair)
        tokens = [model.generate(**INPUTS, max_new_tokens=3, do_sample=False) for model in pair]
        assert torch.equal(*tokens)
    assert not pair[0]._tinyfuse.fallbacks


def test_scale_and_softcap_change():
    fast, _ = build("gemma2")
    stock = copy.deepcopy(fast)
    pair, draw, seen = (optimize(fast), stock), random.Random(0), []
    for cap in (draw.uniform(0.5, 5), None, draw.uniform(5, 50)):
        scale = draw.uniform(0.1, 2)
        for model in pair:
            for layer in model.model.layers:
                layer.self_attn.scaling, layer.self_attn.attn_logit_softcapping = scale, cap
        seen.append(assert_same_logits(pair)[0].logits)
        assert not any(torch.allclose(seen[-1], before, atol=1e-2) for before in seen[:-1])


@pytest.mark.parametrize("hidden", [slice(0, 4), slice(8, 12), slice(0, 12)], ids=["left", "right", "everything"])
def test_padding(pair, hidden):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, hidden] = 0
    assert_same_logits(pair, {"input_ids": INPUTS["input_ids"], "attention_mask": mask})


def test_autocast(pair):
    with torch.no_grad():
        exact = pair[1].double()(**INPUTS).logits
        pair[1].float()
        with torch.autocast("cpu", torch.bfloat16):
            fast, stock = (model(**INPUTS).logits for model in pair)
    assert fast.dtype is stock.dtype
    assert error(fast, exact) <= 1.5 * error(stock, exact)


def test_autocast_of_a_part():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.inner(x)
            return y, self.inner(x)

    model, x = Part().eval(), torch.randn(3, 16)
    with torch.no_grad():
        for mine, theirs in zip(torch.compile(model, backend="tinyfuse")(x), model(x), strict=True):
            assert mine.dtype is theirs.dtype and torch.allclose(mine, theirs)


def test_a_model_that_breaks_the_graph(pair):
    class Breaking(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, []

        def forward(self, x):
            torch._dynamo.graph_break()
            self.calls.append(x.shape)
            return self.inner(x)

    for model in pair:
        model.model.layers[0].mlp = Breaking(model.model.layers[0].mlp)
    for _ in range(2):
        assert_same_logits(pair)
    assert pair[0].model.layers[0].mlp.calls == pair[1].model.layers[0].mlp.calls


class Cache:
    def __init__(self):
        self.held = torch.zeros(4)

    def mean(self):
        return 0


class Binding(nn.Module):
    """Gives its cache a method, as some models do."""

    def __init__(self, method, breaks):
        super().__init__()
        self.inner, self.method, self.breaks = nn.Linear(4, 4), method, breaks

    def forward(self, x, cache):
        cache.held += self.inner(x)
        if self.breaks:
            torch._dynamo.graph_break()
        cache.mean = self.method.__get__(cache)
        return self.inner(cache.held)


def mean(self):
    return self.held.mean().item()


def average(self):
    return mean(self)


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("method", [mean, average, Cache.mean], ids=["another", "by another name", "its own"])
@pytest.mark.parametrize("way", ["optimize", "compile"])
@torch.no_grad()
def test_a_model_that_gives_its_cache_a_method(way, method, breaks):
    torch._dynamo.reset()  # it never looks again at code that it was told to skip
    stock = Binding(method, breaks).eval()
    fast = copy.deepcopy(stock)
    fast = optimize(fast) if way == "optimize" else torch.compile(fast, backend="tinyfuse")
    caches = Cache(), Cache()
    for x in torch.randn(3, 4):
        mine, theirs = (model(x, cache) for model, cache in zip((fast, stock), caches, strict=True))
        torch.testing.assert_close(mine, theirs)
        assert caches[0].mean() == pytest.approx(caches[1].mean())
    if way == "optimize" and torch.__version__ >= (2, 13):  # before, Dynamo left such code alone
        assert ["types.MethodType" in reason for reason in fast._tinyfuse.fallbacks] == [True] * (method != Cache.mean)


@torch.library.custom_op("hard_cases::norm", mutates_args={"out"})
def norm_into(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    out.copy_(1.25 * F.rms_norm(x, weight.shape, weight, eps))  # not what the module computes: nobody may pass it by


@torch.library.custom_op("hard_cases::rotate", mutates_args={"x"})
def rotate_in_place(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    a, b = x.chunk(2, -1)
    x.copy_(x * cos + torch.cat((-b, a), -1) * sin)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        out = torch.empty_like(x)
        norm_into(x.contiguous(), weight, eps, out)
        ctx.save_for_backward(x, weight)
        return out


class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        q, k = (x.transpose(1, 2).contiguous() for x in (q, k))
        for x in (q, k):
            rotate_in_place(x, cos[:, :, None], sin[:, :, None])
        return q.transpose(1, 2), k.transpose(1, 2)


def kernelise(model):
    """What Liger and Hugging Face's kernels do to an instance: other forwards, of opaque operations that write."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(lambda self, x: Norm.apply(x, self.weight, self.variance_epsilon), module)


@pytest.mark.parametrize("when", ["before", "after"])
def test_kernels_of_another_library(when, monkeypatch):
    fast, _ = build("llama")
    stock = copy.deepcopy(fast)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: Rotate.apply(q, k, cos, sin))
    kernelise(stock)
    if when == "before":
        kernelise(fast)
        optimize(fast)
    else:
        optimize(fast).generate(**INPUTS, max_new_tokens=2)
        kernelise(fast)
    assert_same_logits((fast, stock))
    tokens = [model.generate(**INPUTS, max_new_tokens=6, do_sample=False) for model in (fast, stock)]
    assert torch.equal(*tokens)
    assert not fast._tinyfuse.fallbacks and fast._tinyfuse.report.summary["linear"]["fused"]


LAYER = """
import torch
class layers:
    class Norm(torch.nn.Module):
        can_torch_compile, has_backward = True, False
        def forward(self, x):
            out = torch.empty_like(x)
            torch.ops.hard_cases.norm(x.contiguous(), self.weight, self.variance_epsilon, out)
            return out
"""
METADATA = """{"name": "norms", "id": "norms_1", "version": 1, "license": "Apache-2.0", "python-depends": [],
"backend": {"type": "cpu"}}"""


@pytest.mark.skipif(
    not is_kernels_available(), reason="needs the package kernels, of the version that transformers takes"
)
def test_use_kernels(pair, tmp_path):
    """A model whose norms transformers itself replaces, after the first call too."""
    import kernels

    build_dir = tmp_path / "build" / "torch-cpu"
    build_dir.mkdir(parents=True)
    (build_dir / "__init__.py").write_text(LAYER)
    (build_dir / "metadata.json").write_text(METADATA)
    before, _ = assert_same_logits(pair)
    with kernels.use_kernel_mapping({"RMSNorm": {"cpu": kernels.LocalLayerRepository(tmp_path, layer_name="Norm")}}):
        for model in pair:
            model.use_kernels = True
    after, _ = assert_same_logits(pair)
    assert not torch.allclose(after.logits, before.logits, atol=1e-2)
    tokens = [model.generate(**INPUTS, max_new_tokens=6, do_sample=False) for model in pair]
    assert torch.equal(*tokens) and not pair[0]._tinyfuse.fallbacks


def test_sixty_layers_with_outlier_channels():
    """Of a residual stream whose few channels are a hundred times larger than the others."""
    stock, _ = build("llama", num_hidden_layers=60, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    with torch.no_grad():
        stock.model.embed_tokens.weight[:, [3, 40]] *= 100
    ids = INPUTS["input_ids"][:1]
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    quantize_(stock)
    fast = optimize(copy.deepcopy(stock))
    mine, theirs = (model.generate(ids, **options) for model in (fast, stock))
    assert torch.equal(mine.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(mine.logits), torch.stack(theirs.logits), rtol=1e-3, atol=1e-3)
    assert not fast._tinyfuse.fallbacks
