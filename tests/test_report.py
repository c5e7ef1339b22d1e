"""The report accounts for every anchor, says why, survives JSON, and explaining a model leaves it alone."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.fx import Graph

import tinyfuse
from tests.models import build
from tests.zoo.build import build as zoo
from tinyfuse import fallback
from tinyfuse.anchors import Anchor
from tinyfuse.report import Fate, Report, collect, current, explain, report_of

KEYS = ["model", "device", "graphs", "graph_breaks", "sites", "summary", "fallbacks", "executed"]
SITE_KEYS = ["module", "anchor", "status", "pattern", "kernel", "reason"]


@pytest.fixture(scope="module")
def llama() -> Report:
    """Also checks that the model is left as it was."""
    model, inputs = build("llama")
    weights, attributes = {k: v.clone() for k, v in model.state_dict().items()}, dict(vars(model))
    config = model.generation_config.to_dict()
    report = explain(model, inputs)
    assert vars(model) == attributes and model.generation_config.to_dict() == config
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert current() is None
    return report


@pytest.fixture(scope="module")
def gpt2() -> Report:
    return explain(build("gpt2", n_layer=1)[0])  # inputs made up


@pytest.fixture(scope="module")
def openai_gpt() -> Report:
    return explain(zoo("openai-gpt"))


def test_every_site_of_a_llama_is_fused(llama: Report) -> None:
    counts = {"linear": 15, "attention": 2, "rms_norm": 5, "rope": 4, "activation": 2}
    assert llama.summary == {kind: {"found": n, "fused": n} for kind, n in counts.items()}
    assert [graph.name for graph in llama.graphs] == ["prompt", "token"]
    assert llama.graph_breaks == []


def test_int8_linears_count_as_fused() -> None:
    model, inputs = build("llama", num_hidden_layers=1)
    tinyfuse.quantize_(model, "int8")
    summary = explain(model, inputs).summary
    assert summary["linear"] == {"found": 8, "fused": 8}


def test_sites_name_modules_of_the_model(llama: Report) -> None:
    names = {name for name, _ in build("llama")[0].named_modules()}
    assert {site.module for site in llama.sites} <= names
    assert [s.module for s in llama.sites if s.anchor == "rms_norm"] == [
        "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm",
    ]  # fmt: skip


def test_to_dict_is_plain_json(llama: Report) -> None:
    plain = llama.to_dict()
    assert list(plain) == KEYS
    assert all(list(site) == SITE_KEYS for site in plain["sites"])
    assert json.loads(json.dumps(plain)) == plain
    assert plain["model"] == "LlamaForCausalLM" and plain["graphs"] == 2


def test_ops_are_counted_as_executed(llama: Report) -> None:
    # two layers, one prompt and one token
    assert llama.executed["causal_attention"] == llama.executed["rope_append_attention"] == 2
    assert llama.executed["linear_group"] + llama.executed["rms_norm_linear_group"] == 4


def test_the_text_names_kinds_kernels_and_reasons(llama: Report, openai_gpt: Report) -> None:
    text = str(llama)
    assert text.startswith("LlamaForCausalLM on cpu: 2 graphs (prompt, token), no graph break")
    assert "rms_norm_gated_linear/native x2" in text and "not fused" not in text
    assert "attention x2 kept: it is written as products around a softmax in a form" in str(openai_gpt)
    assert "transformer.h.*.attn" in str(openai_gpt)


def test_what_is_not_fused_has_a_reason(openai_gpt: Report) -> None:
    missed = [site for site in openai_gpt.sites if site.status != "fused"]
    assert missed and all(site.reason for site in missed)


def test_a_module_that_is_no_language_model() -> None:
    report = explain(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), torch.randn(3, 8))
    assert report.summary["linear"]["found"] == 2
    assert [site.module for site in report.sites if site.anchor == "linear"] == ["0", "2"]
    with pytest.raises(ValueError, match="pass its inputs"):
        explain(nn.Linear(8, 8))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        explain("llama")


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_graph_breaks_are_listed_with_their_reason() -> None:
    report = explain(Broken(), torch.randn(3, 8))
    assert len(report.graphs) == 2 and report.summary["linear"]["found"] == 2
    assert len(report.graph_breaks) == 1 and "graph_break" in report.graph_breaks[0]
    assert "1 graph break" in str(report)


def test_an_optimized_model_is_explained_like_the_stock_one(gpt2: Report) -> None:
    model = tinyfuse.optimize(build("gpt2", n_layer=1)[0])
    assert explain(model).summary == gpt2.summary


def test_report_of_needs_an_optimized_model() -> None:
    with pytest.raises(ValueError, match=r"tinyfuse\.optimize"):
        report_of(nn.Linear(2, 2))


def graph_of(*statuses: str) -> Report:
    """A report on a graph of norms in one module."""
    fx, report = Graph(), Report("m", "cpu")
    nodes = [fx.placeholder(f"x{i}") for i in range(len(statuses))]
    fates = {
        node: Fate(status, "rms_norm", "rms_norm/native", None if status == "fused" else f"because {status}")
        for node, status in zip(nodes, statuses, strict=True)
    }
    report.add_graph([Anchor("rms_norm", node, "layers.0.norm") for node in nodes], fates, {"rms_norm": 2})
    return report


def test_a_site_counts_once_and_as_fused_only_if_it_is_in_every_graph() -> None:
    report = graph_of("fused", "fused", "kept").merge(graph_of("fused", "declined", "kept"))
    assert report.summary == {"rms_norm": {"found": 3, "fused": 1}}
    assert [site.reason for site in report.sites] == [None, "because declined", "because kept"]
    assert report.to_dict()["graphs"] == 2


def test_executed_counts_calls() -> None:
    report = graph_of("fused")
    report.graphs[0].calls = 5
    assert report.executed == {"rms_norm": 10}
    assert report.merge(graph_of("fused")).executed == {"rms_norm": 10}


def test_fallbacks_met_while_collecting_are_reported_and_summed() -> None:
    with collect() as report:
        fallback.note("here", "a reason")
        fallback.note("here", "a reason")
    with collect(report):
        fallback.note("here", "a reason")
    fallback.note("here", "a reason")
    assert report.fallbacks == [{"where": "here", "reason": "a reason", "count": 3}]
    assert current() is None
