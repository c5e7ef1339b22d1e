"""Twenty families of models: equal results, equal tokens, and the same sites fused as in golden/families.json.

``python -m tests.test_families`` writes the golden file anew, from what is fused now.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

from tests.models import FAMILIES, build, prompt
from tinyfuse.api import optimize
from tinyfuse.report import GraphReport, Report, collect

GOLDEN = Path(__file__).parent / "golden" / "families.json"
LENGTHS = (12, 9, 17)  # longer than the window of sliding layers, 7: shorter prompts are another graph
PADDING = 3
NEW_TOKENS = 12
# Families that between them have every spelling; the others are compared in bfloat16 and at decoding only.
SPELLINGS = ("llama", "gemma2", "olmo2", "gpt2", "gpt_neox", "gptj", "bloom", "mpt", "mixtral")

Triple = tuple[Tensor, Tensor, Tensor]


class Runs:
    """One family, compiled once per kind of graph. The first row of each prompt of two is padded on the left.

    Results are triples: through the backend, eager, and in fp64 from the same weights, each row alone without padding.
    """

    def __init__(self, name: str):
        self.name = name

    def exact(self, dtype: torch.dtype) -> PreTrainedModel:
        model = build(self.name, dtype)[0].double()
        model.set_experts_implementation("eager")  # the grouped product takes no fp64
        return model

    @cached_property
    def narrow(self) -> tuple[list[Triple], Report]:
        return self.prompts(torch.bfloat16)

    @cached_property
    def wide(self) -> tuple[list[Triple], Report]:
        return self.prompts(torch.float32)

    def prompts(self, dtype: torch.dtype) -> tuple[list[Triple], Report]:
        """Logits of prompts of all ``LENGTHS``, without those of the padding."""
        model, _ = build(self.name, dtype)
        with collect() as report:
            fused = logits(model, torch.compile(model, backend="tinyfuse"))
        return list(zip(fused, logits(model), exact_logits(self.exact(dtype)), strict=True)), report

    @cached_property
    def token(self) -> tuple[Triple, Triple, Report]:
        """Greedy tokens and logits of ``generate`` with a static cache in fp32, decode steps through the backend."""
        model, _ = build(self.name)
        static = {"cache_implementation": "static"} if model._can_compile_fullgraph else {}
        config = CompileConfig(backend="tinyfuse", mode=None)
        config._compile_all_devices = True
        with collect() as report:
            fused = generate(model, compile_config=config, **static)
        eager, exact = generate(model, disable_compile=True, **static), exact_generate(self.exact(torch.float32))
        tokens, logits = zip(fused, eager, exact, strict=True)
        return tokens, logits, report

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """Of the first graph of each kind: sliding windows make more of them."""
        graphs = {"prompt, bfloat16": self.narrow[-1].graphs[:1], "token, float32": self.token[-1].graphs[:1]}
        return {name: count(graph) for name, found in graphs.items() for graph in found}


@torch.no_grad()
def logits(model: PreTrainedModel, forward: Callable | None = None) -> list[Tensor]:
    """Of prompts of all ``LENGTHS``, without those of the padding. ``forward``: compiled, for any length at once."""
    made, call = [], model if forward is None else forward
    for number, length in enumerate(LENGTHS):
        inputs = positioned(model, prompt(length, batch=2, padding=PADDING))
        if forward is not None:
            for tensor in inputs.values():
                torch._dynamo.mark_dynamic(tensor, 1)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            made.append(call(**inputs).logits[inputs["attention_mask"].bool()].double())
    return made


@torch.no_grad()
def exact_logits(model: PreTrainedModel) -> list[Tensor]:
    prompts = [rows(prompt(length, batch=2, padding=PADDING)) for length in LENGTHS]
    return [torch.cat([model(**positioned(model, row)).logits[0] for row in two]) for two in prompts]


def positioned(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the positions that ``generate`` would give: counted without the padding."""
    if "position_ids" in inspect.signature(model.forward).parameters:
        return inputs | {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    return inputs


def rows(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every row alone, without its padding."""
    kept = inputs["attention_mask"].bool()
    return [{name: tensor[i : i + 1, kept[i]] for name, tensor in inputs.items()} for i in range(len(kept))]


def generate(model: PreTrainedModel, inputs: dict[str, Tensor] | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens [batch, steps] and their logits [batch, steps, vocabulary]."""
    inputs = prompt(12, batch=2, padding=PADDING) if inputs is None else inputs
    options |= {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True}
    made = model.generate(**inputs, **options, return_dict_in_generate=True)
    return made.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(made.logits, dim=1).double()


def exact_generate(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    alone = [generate(model, row) for row in rows(prompt(12, batch=2, padding=PADDING))]
    return tuple(map(torch.cat, zip(*alone, strict=True)))


def count(graph: GraphReport) -> dict[str, dict[str, int]]:
    """Sites found and fused per kind of anchor, whichever kernel of this machine runs them."""
    found = Counter(site.anchor for site in graph.sites)
    fused = Counter(site.anchor for site in graph.sites if site.kernel)
    return {kind: {"found": n, "fused": fused[kind]} for kind, n in sorted(found.items())}


def error(made: Tensor, exact: Tensor) -> Tensor:
    return (made - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()


@pytest.fixture(scope="module", params=FAMILIES)
def runs(request) -> Iterator[Runs]:
    torch._dynamo.reset()
    yield Runs(request.param)
    torch._dynamo.reset()


def as_exact_as_eager(fused: Tensor, eager: Tensor, exact: Tensor) -> None:
    assert error(fused, exact) <= 4 * error(eager, exact) + 1e-7
    assert (fused - exact).abs().max() <= 4 * (eager - exact).abs().max() + 1e-6 * exact.abs().max()


def test_prompts_in_bfloat16(runs: Runs) -> None:
    for fused, eager, exact in runs.narrow[0]:
        assert error(fused, exact) <= 1.5 * error(eager, exact)


def test_prompts_in_float32(runs: Runs) -> None:
    for triple in runs.wide[0] if runs.name in SPELLINGS else ():
        as_exact_as_eager(*triple)


def test_tokens_with_a_static_cache(runs: Runs) -> None:
    tokens, logits, _ = runs.token
    assert tokens[0].tolist() == tokens[1].tolist() == tokens[2].tolist()
    as_exact_as_eager(*logits)


def test_sites_found_and_fused(runs: Runs) -> None:
    golden = json.loads(GOLDEN.read_text())[runs.name]
    reports = runs.narrow[-1], runs.token[-1]
    assert runs.counts() == golden, "\n".join(map(str, reports))
    assert all(site.reason for report in reports for site in report.sites if site.status != "fused")
    assert not any(report.graph_breaks for report in reports)


CHOICES = (
    (12, 16, {}),
    (9, 4, {}),
    (12, 16, {"top_k": 20, "repetition_penalty": 1.3}),
    (12, 16, {"top_p": 0.9, "temperature": 1.2, "top_k": 0}),
)


def test_generate_of_the_optimised_model(runs: Runs) -> None:
    """Greedy and sampled, the tokens that stock draws from the same seed; the graphs are recorded, one for prompts and
    one for tokens, whatever the lengths of prompts and caches."""
    stock = build(runs.name)[0]
    fast = optimize(copy.deepcopy(stock))
    for length, new, choice in CHOICES:
        tokens = []
        for model in (stock, fast):
            torch.manual_seed(1)
            arguments = prompt(length, batch=2, padding=PADDING) | choice | {"do_sample": bool(choice)}
            tokens.append(model.generate(**arguments, max_new_tokens=new))
        assert torch.equal(*tokens), choice
    if runs.name not in ("bloom", "mpt"):  # whose forwards are not recorded
        fast.generate(**prompt(17, batch=2, padding=PADDING), max_new_tokens=270, max_time=0.01, do_sample=False)
        assert not fast._tinyfuse.fallbacks and not fast._tinyfuse.recordings.declined
        _, token = fast._tinyfuse.report.graphs
        assert count(token) == json.loads(GOLDEN.read_text())[runs.name]["token, float32"]  # what Dynamo's graph gives


def write_golden() -> None:
    counts = {}
    for name in FAMILIES:
        torch._dynamo.reset()
        counts[name] = Runs(name).counts()
    text = json.dumps(counts, indent=1)
    GOLDEN.write_text(re.sub(r"\{\s+(\"found\": \d+),\s+(\"fused\": \d+)\s+\}", r"{\1, \2}", text) + "\n")


if __name__ == "__main__":
    write_golden()
