"""optimize and restore: what they change, what they leave, and what they refuse."""

import copy
import functools
import gc
import io
import logging
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tinyfuse.api import optimize, restore
from tinyfuse.fallback import FallbackError

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval()


@pytest.fixture(scope="module")
def model():
    return optimize(llama())


IDS = torch.arange(1, 10)[None]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_quantize_leaves_alone_is_logged(caplog):
    with caplog.at_level(logging.INFO, "tinyfuse"):
        model = optimize(LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True)).eval(), quantize="int8")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "left alone: lm_head: its weight is tied to model.embed_tokens" in caplog.text


def test_forward_gives_what_it_gave(model):
    with torch.no_grad():
        for length in (9, 5, 7):
            close(model(IDS[:, :length]).logits, llama()(IDS[:, :length]).logits)


def test_prompt_lengths_share_a_graph(model):
    with torch.no_grad():
        model(IDS)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in range(2, 40):
                model(input_ids=torch.ones((1, length), dtype=torch.long))


def test_one_instance_only(model):
    other = llama()
    assert "forward" not in vars(other) and "generate" not in vars(other)
    assert LlamaForCausalLM.forward.__module__.startswith("transformers")


def test_restore_gives_back_the_same_methods():
    model = llama()
    before = vars(model).copy()
    assert optimize(model) is model
    assert model.forward.__class__.__module__.startswith("tinyfuse")
    assert restore(model) is model
    assert vars(model).keys() == before.keys()
    assert model.forward.__func__ is LlamaForCausalLM.forward
    assert model.generate.__func__ is LlamaForCausalLM.generate
    restore(model)


def test_restore_gives_back_a_forward_of_the_instance():
    model, own = llama(), lambda *args, **kwargs: "own"
    model.forward = own
    restore(optimize(model))
    assert model.forward is own


def test_optimize_twice_wraps_once(model):
    forward, generate = model.forward, model.generate
    optimize(model)
    assert model.forward is forward and model.generate is generate


def test_deep_copy_is_optimised_and_independent(model):
    twin = copy.deepcopy(model)
    assert twin.forward is not model.forward
    with torch.no_grad():
        twin.lm_head.weight.zero_()
        assert twin(IDS).logits.abs().max() == 0
        assert model(IDS).logits.abs().max() > 0
    assert vars(restore(twin)).keys() == vars(llama()).keys()


def test_pickle_round_trip(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        close(loaded(IDS).logits, model(IDS).logits)


def test_save_pretrained(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        close(loaded(IDS).logits, model(IDS).logits)


def test_gradients(model):
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    stock = llama()
    stock(IDS, labels=IDS).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    model.zero_grad()


def test_backward_hooks_put_on_later():
    """Dynamo does not look for them again."""
    models, seen = (optimize(llama()), llama()), []
    for model in models:
        for register in (None, "register_full_backward_hook", "register_full_backward_pre_hook"):
            if register:
                getattr(model.model.layers[0].mlp, register)(lambda _, *grads: seen.append(grads[-1][0]))
            model(IDS, labels=IDS).loss.backward()
    assert len(seen) == 6
    close(seen[:3], seen[3:])


def test_an_optimised_model_can_be_compiled(model):
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        close(compiled(IDS).logits, llama()(IDS).logits)


@torch.no_grad()
def test_an_optimised_module_inside_of_another_is_part_of_its_graph():
    module, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(3, 4)
    expected = module(x)
    optimize(module[0])
    close(optimize(module)(x), expected)
    assert len(module._tinyfuse.compiled.graphs) == 1
    restore(module)
    module[0].forward = functools.partial(nn.Linear.forward, restore(module[0]))  # an own forward
    optimize(module[0])
    close(optimize(module)(x), expected)
    assert len(module._tinyfuse.compiled.graphs) == 1


def test_an_optimised_module_inside_of_another_breaks_the_graph():
    """As the encoder of an encoder-decoder does when it is asked for attentions."""

    class Breaks(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            torch._dynamo.graph_break()
            return super().forward(y)

    module, x = nn.Sequential(Breaks(4, 4), nn.ReLU()).eval(), torch.randn(3, 4)
    with torch.no_grad():
        expected = module(x)
        optimize(module[0])
        close(optimize(module)(x), expected)


def test_any_module():
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = module(x)
        close(optimize(module)(x), expected)
    assert not hasattr(module, "generate")
    restore(module)
    assert "forward" not in vars(module)


def test_a_model_that_cannot_be_quantised_stays_optimised():
    model = optimize(llama(), fallback="error")
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        optimize(model, quantize="int8")
    assert model._tinyfuse.mode == "error"
    restore(model)
    with pytest.raises(ValueError, match="NaN"):
        optimize(model, quantize="int8")
    assert not hasattr(model, "_tinyfuse")


def test_quantize_now_or_later():
    model = llama()
    weights = sum(p.nbytes for p in model.model.layers.parameters())
    optimize(optimize(model), quantize="int8")
    assert sum(p.nbytes for p in model.model.layers.parameters()) < 0.5 * weights
    with torch.no_grad():
        expected, logits = llama()(IDS).logits, model(IDS).logits
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


class Broken(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("cls", [LlamaForCausalLM, Broken])
@torch.no_grad()
def test_nothing_outlives_the_model(cls, call):
    model = optimize(cls(LlamaConfig(**TINY)).eval())
    for _ in range(2):
        model(IDS) if call == "forward" else model.generate(IDS, max_new_tokens=4)
    forward = model._tinyfuse.compiled
    graphs = [weakref.ref(graph) for graph in forward.graphs]
    assert graphs or call == "generate"
    del forward
    restore(model)
    gc.collect()
    assert not any(graph() for graph in graphs)
    optimize(model)
    model(IDS) if call == "forward" else model.generate(IDS, max_new_tokens=4)
    weights = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not any(weight() is not None for weight in weights)


def broken(module, x):
    torch._dynamo.graph_break()
    return module(x)


def double(module, x):
    return 2 * broken(module, x)


class Doubling(nn.Module):
    """Modules of several types go through one function, which compiles anew for each until Dynamo gives up."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4), nn.Identity(), nn.ReLU()])

    def forward(self, x):
        for part in self.parts:
            x = double(part, x)
        return x


@torch.no_grad()
def test_a_forward_beyond_the_limit_of_recompilations_is_said(model):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        model(IDS)
        assert model._tinyfuse.fallbacks == []
        model.config._attn_implementation = "eager"
        expected = llama()
        expected.config._attn_implementation = "eager"
        close(model(IDS).logits, expected(IDS).logits)
    assert any("recompile_limit" in reason for reason in model._tinyfuse.fallbacks)


@torch.no_grad()
def test_optimised_anew_at_the_limit_of_recompilations():
    torch._dynamo.reset()
    model, x = Doubling().eval(), torch.randn(3, 4)
    expected = model(x)
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(3):
            close(optimize(model)(x), expected)
            close(restore(model)(x), expected)
            gc.collect()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("gpt2",), TypeError, ("'gpt2'", "nn.Module", "from_pretrained")),
        ((None,), TypeError, ("None", "nn.Module")),
        ((torch.compile(nn.Linear(2, 2), backend="eager"),), TypeError, ("torch.compile", "_orig_mod")),
        ((nn.Linear(2, 2), "int3"), ValueError, ("'int3'", "'int8'")),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error) as raised:
        optimize(*arguments)
    assert all(word in str(raised.value) for word in words)


def test_bad_fallback():
    with pytest.raises(ValueError, match="'error'"):
        optimize(nn.Linear(2, 2), fallback="ignore")


def test_fallback_error_raises_instead_of_falling_back():
    model = optimize(llama(), fallback="error")
    with pytest.raises(FallbackError, match="beam"):
        model.generate(IDS, num_beams=2, max_new_tokens=2)


def test_disabled_by_environment(monkeypatch, caplog):
    monkeypatch.setenv("TINYFUSE_DISABLE", "1")
    model = llama()
    with caplog.at_level(logging.WARNING, "tinyfuse"):
        assert optimize(model, quantize="int8") is model
    assert "forward" not in vars(model) and type(model.lm_head) is nn.Linear
    assert len([r for r in caplog.records if "TINYFUSE_DISABLE" in r.message]) == 1
