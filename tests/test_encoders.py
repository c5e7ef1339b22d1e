"""Encoders and encoder-decoders: a sample of the zoo's, and what only they do."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.graphs import Built
from tests.tolerance import LOGITS, error
from tests.zoo import encoders
from tests.zoo.check import check
from tests.zoo.encoders import outputs, tokens
from tinyfuse import cli
from tinyfuse.api import optimize, restore
from tinyfuse.bench import models
from tinyfuse.graph.library import all_patterns
from tinyfuse.graph.pattern import call, tensor
from tinyfuse.report import report_of
from tinyfuse.runtime import encoder_decoder, replay


def test_sample() -> None:
    """A bias of attention that is summed up in place."""
    result = check("deberta-v2:Model", ("forward", "bfloat16"))
    assert not result.wrong and not result.stock and not result.reasons
    assert result.sites["attention", "fused"] == result.sites["attention", "found"] > 0


def test_generate_of_an_encoder_decoder() -> None:
    """The stock loop over compiled parts: as many graphs for two lengths as for one, and no trace left of it."""
    torch._dynamo.reset()
    stock = encoders.make("bart:Seq2SeqLM")
    fast = optimize(copy.deepcopy(stock), quantize="int8")
    plain = restore(copy.deepcopy(fast))
    made = []
    for length in (12, 17):
        assert torch.equal(tokens(1, length)(fast, 3), tokens(1, length)(plain, 3))
        made.append(len(report_of(fast).graphs))
    assert made == [4, 4]  # the encoder; the decoder on no token, on one, on more
    report = report_of(fast)
    assert all(site.status == "fused" for site in report.sites)
    assert {site.module.partition(".layer")[0] for site in report.sites} == {
        "model.encoder",
        "model.decoder",
        "lm_head",
    }
    assert any("decoder-only" in reason for reason in fast._tinyfuse.fallbacks)
    restore(fast)
    assert not any(vars(module).keys() & {"_tinyfuse", "forward"} for module in fast.modules())
    for made, expected in zip(outputs(fast, 0), outputs(plain, 0), strict=True):
        assert torch.equal(made, expected)


x, w, b = tensor("x w b")
NORM = call(F.layer_norm, x, (24,), None, None, 1e-5)
WRITTEN = call(torch.Tensor.add_, w, 1.0)


@pytest.mark.parametrize("root, fused", [(NORM * WRITTEN + b, True), (NORM * w + WRITTEN, False)])
def test_an_input_written_in_place_is_read_on_the_same_side_of_it(root, fused: bool) -> None:
    example = {"x": torch.randn(2, 24), "w": torch.randn(24), "b": torch.randn(24)}
    built = Built([root], example)
    expected, _ = Built([root], example).run()
    outcome = built.rewrite(all_patterns())
    assert ("layer_norm_affine" in outcome.hits) is fused
    torch.testing.assert_close(built.run()[0], expected)


ROW = {
    "variant", "task", "model", "dtype", "device", "batch", "input", "compile_s", "quantize_s", "weights_gb",
    "distance", "fused", "agrees", "values", "batch_ms", "sequences_s", "speedup_vs_eager", "speedup_vs_best_stock",
    "differs_from_best_stock",
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}


def test_bench_of_an_encoder(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(models.ENCODERS, "tiny", ("bert", TINY))
    file = tmp_path / "out.json"
    line = "bench --task encode --preset tiny --device cpu --batch 2 --prompt 6 --repeats 2 --variants"
    assert cli.main([*line.split(), "stock-eager,tinyfuse-int8", "--json", str(file)]) == 0
    eager, int8 = json.loads(file.read_text())["rows"]
    assert eager.keys() == int8.keys() == ROW
    assert eager["input"] == [2, 6] and len(int8["values"]["batch_ms"]) == 2
    assert int8["agrees"] and int8["distance"] > 0 and int8["fused"]["linear"]["fused"] == 7
    assert "tinyfuse-int8 fused: linear 7 of 7" in capsys.readouterr().out


@pytest.fixture
def on_static_caches(monkeypatch):
    """As on a GPU, but for the CUDA graphs."""
    for module in (replay, encoder_decoder):
        monkeypatch.setattr(module, "DEVICES", ("cpu",))
    made = []
    init = replay.Replay.__init__
    monkeypatch.setattr(replay.Replay, "__init__", lambda self, *args: (init(self, *args), made.append(self))[0])
    return made


@pytest.mark.parametrize("name", ["t5:Seq2SeqLM", "bart:Seq2SeqLM", "whisper:SpeechSeq2Seq"])
def test_generate_on_static_caches(on_static_caches, name):
    """Prompts one after the other, of other lengths, padded, sampled, with what only growing caches serve in between:
    two graphs for all, and steps that are replayed from prompt to prompt."""
    model = encoders.make(name)
    fast = optimize(copy.deepcopy(model))
    settings = {"max_new_tokens": 30, "min_new_tokens": 30}
    for padding, length, more in (
        (0, 12, {}),
        (encoders.PADDING, 12, {}),
        (0, 17, {}),
        (0, 12, {"num_beams": 3}),
        (0, 12, {"do_sample": True, "top_k": 20}),
        (0, 12, {"return_dict_in_generate": True}),
        (0, 12, {}),
    ):
        given = {n: v for n, v in encoders.inputs(model, padding, length).items() if n != "decoder_input_ids"}
        results = []
        for one in (model, fast):
            torch.manual_seed(0)
            result = one.generate(**given, **{"do_sample": False} | settings | more)
            results.append(getattr(result, "sequences", result))
        assert torch.equal(*results), more
    steps = [kind for calls in on_static_caches for kind in calls.kinds.values() if isinstance(kind, replay.Recorded)]
    assert max(step.replays for step in steps) > 20
    assert len(fast._tinyfuse.caches.kept) == (1 if "whisper" in name else 2)


def test_a_result_with_parts_holds_the_cache_that_stock_makes(on_static_caches):
    model = encoders.make("t5:Seq2SeqLM")
    fast = optimize(copy.deepcopy(model))
    given = {n: v for n, v in encoders.inputs(model, 0).items() if n != "decoder_input_ids"}
    settings = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True}
    expected, made = (one.generate(**given, **settings) for one in (model, fast))
    fast.generate(**encoders.inputs(model, encoders.PADDING), max_new_tokens=4)  # on the same memory
    assert error(torch.stack(made.scores), torch.stack(expected.scores).double()) < LOGITS
    for name in ("self_attention_cache", "cross_attention_cache"):
        ours, theirs = (getattr(one.past_key_values, name) for one in (made, expected))
        assert type(ours) is type(theirs)
        for mine, stocks in zip(ours.layers, theirs.layers, strict=True):
            for part in ("keys", "values"):
                assert error(getattr(mine, part), getattr(stocks, part).double()) < LOGITS
    assert made.past_key_values.is_updated == expected.past_key_values.is_updated


def test_attentions_are_as_long_as_stocks(on_static_caches):
    model = encoders.make("t5:Seq2SeqLM")
    model.set_attn_implementation("eager")
    fast = optimize(copy.deepcopy(model))
    given = {n: v for n, v in encoders.inputs(model, 0).items() if n != "decoder_input_ids"}
    settings = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_attentions": True}
    expected, made = (one.generate(**given, **settings).decoder_attentions for one in (model, fast))
    assert [step[0].shape for step in made] == [step[0].shape for step in expected]


def test_a_model_that_does_not_run_on_a_static_cache_grows_its_own(on_static_caches, monkeypatch):
    model = encoders.make("t5:Seq2SeqLM")
    fast = optimize(copy.deepcopy(model))
    monkeypatch.setattr(encoder_decoder, "StaticCache", lambda **_: 1 / 0)
    given = {n: v for n, v in encoders.inputs(model, 0).items() if n != "decoder_input_ids"}
    expected, made = (one.generate(**given, max_new_tokens=4, do_sample=False) for one in (model, fast))
    assert torch.equal(expected, made)
    assert any("a cache that grows: ZeroDivisionError" in reason for reason in fast._tinyfuse.fallbacks)
