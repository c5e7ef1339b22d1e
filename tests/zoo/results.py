"""What is noted of one model: what differed from stock, and what was fused."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinyfuse.report import Report, collect

NEW_TOKENS = 10
LENGTH, PADDING = 12, 3  # of prompts, longer than a sliding window


@dataclass
class Result:
    """``wrong``: what differed from stock, by check; ``stock``: what stock raised, where nothing could be compared;
    ``narrow``: the ``sites`` of the model in bf16; ``breaks``: why Dynamo cut a forward into several graphs."""

    model_type: str
    wrong: dict[str, str] = field(default_factory=dict)
    stock: dict[str, str] = field(default_factory=dict)
    sites: Counter = field(default_factory=Counter)
    narrow: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    fallbacks: list[str] = field(default_factory=list)
    graphs: int = 0
    breaks: list[str] = field(default_factory=list)

    def note(self, report: Report, narrow: bool = False) -> None:
        sites = Counter()
        self.graphs += len(report.graphs)
        self.breaks += [reason for reason in report.graph_breaks if reason not in self.breaks]
        for graph in report.graphs:
            for site in graph.sites:
                sites[site.anchor, "found"] += 1
                sites[site.anchor, "fused"] += site.status == "fused"
                if site.status != "fused":
                    self.reasons[site.anchor, site.reason] += 1
        self.sites.update(sites)
        if narrow:
            self.narrow.update(sites)


Differ = Callable[[Any, Any], str | None]


def same(
    result: Result, name: str, run: Callable[[Any, int], Any], stock: Any, ours: Any, padding: int, differ: Differ
) -> None:
    """Whether ``run`` gives the same with both models, or raises with both."""
    try:
        expected = run(stock, padding)
    except Exception as failure:
        result.stock[name] = said(failure)
        expected = None
    try:
        made = run(ours, padding)
    except Exception as failure:
        if expected is not None:
            result.wrong[name] = said(failure)
        return
    if expected is None or (difference := differ(expected, made)) is None:
        return
    if name != "restore" and differ(run(_traced(stock), padding), made) is None:
        result.stock[name] = f"compiled by any backend {difference}"
    else:
        result.wrong[name] = difference


def same_compiled(
    result: Result, name: str, run: Callable[[Any, int], Any], model: Any, paddings: Iterable[int],
    differ: Callable[[int], Differ],
) -> None:  # fmt: skip
    """The same of ``torch.compile(model)``, under each padding; notes what is fused in its graphs."""
    torch._dynamo.reset()
    with collect() as report:
        compiled = torch.compile(model, backend="tinyfuse")
        for padding in paddings:
            same(result, f"{name}, padding {padding}", run, model, compiled, padding, differ(padding))
    result.note(report, narrow=name == "bfloat16")


def _traced(model: PreTrainedModel) -> PreTrainedModel:
    """Some code of transformers computes something else under ``torch.compile``, whatever the backend: then the graph
    run as it is counts."""
    twin = copy.deepcopy(model)
    twin.forward = torch.compile(twin.forward, backend="eager")
    return twin


def said(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0][:200]}"


def tokens_differ(expected: Tensor, made: Tensor) -> str | None:
    if expected.shape != made.shape:
        return f"{list(made.shape)} tokens, not {list(expected.shape)}"
    return None if torch.equal(expected, made) else f"{int((expected != made).sum())} of {made.numel()} tokens differ"


def bits_differ(expected: Tensor, made: Tensor) -> str | None:
    return None if torch.equal(expected, made) else "not the same bits"
