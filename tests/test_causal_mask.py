"""Causal, sliding and padded masks are recognised exactly, and prompts make none of them."""

from __future__ import annotations

import copy
import importlib
import operator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import DynamicCache, StaticCache

from tests.graphs import Built
from tests.models import WINDOW, build, prompt
from tests.tolerance import LOGITS
from tinyfuse.api import optimize
from tinyfuse.graph.pattern import call, tensor
from tinyfuse.patterns.causal_mask import kernel_fits, positions
from tinyfuse.runtime.forward import CACHE

ALL = slice(None)
B, S, L = 2, 5, 7


def graph(**changed: Any) -> Built:
    """A sliding, padded mask and attention under it, with parts of the mask ``changed``."""
    part = {
        "rows": call(torch.add, call(torch.arange, S), 2),
        "columns": call(torch.arange, L),
        "batch": call(torch.arange, B),
        "held": tensor("held"),
        "le": operator.le,
        "gt": operator.gt,
        "and": operator.and_,
        "query": (None, None, ALL, None),
        "key": (None, None, None, ALL),
        "window": 3,
        **changed,
    }
    query = call(operator.getitem, part["rows"], part["query"])
    key = call(operator.getitem, part["columns"], part["key"])
    row = call(operator.getitem, part["batch"], (ALL, None, None, None))
    causal = call(part["le"], key, query)
    sliding = call(part["and"], call(part["gt"], key, call(torch.sub, query, part["window"])), causal)
    mask = call(part["and"], sliding, call(operator.getitem, part["held"], (row, part.get("at", key))))
    q, k, v, _ = tensor("q k v held")
    out = call(torch.ops.tinyfuse.attention.default, q, k, v, part.get("mask", lambda m: m)(mask), 0.3, False)
    example = {"q": torch.randn(B, 4, part.get("S", S), 8), "k": torch.randn(B, 2, L, 8), "v": torch.randn(B, 2, L, 8)}
    held = torch.arange(2 * B * (L + 5)).view(2 * B, L + 5) % 5 > 0
    return Built([out], example | {"held": held, "start": torch.tensor(3), "order": torch.arange(L).flip(0)})


start, order = tensor("start order")
MATCHES = {
    "as it is": {},
    "another window": {"window": 4},
    "from a position in a tensor": {"rows": call(torch.add, call(torch.arange, S), start)},
    "from the start": {"rows": call(torch.arange, S)},
    "from a later key": {"columns": call(torch.add, call(torch.arange, L), 2)},
    "a view of the padding": {"held": call(operator.getitem, tensor("held"), slice(1, None))},
}
LEFT = {
    "before": {"le": operator.lt},
    "the window and one": {"gt": operator.ge},
    "the other side": {"le": operator.ge},
    "either": {"and": operator.or_},
    "hidden": {"mask": lambda m: call(torch.logical_not, m)},
    "a window of nothing": {"window": 0},
    "keys in another order": {"columns": order},
    "every other query": {"rows": call(torch.mul, call(torch.arange, S), 2)},
    "the padding of other sequences": {"batch": call(torch.add, call(torch.arange, B), 1)},
    "one sequence's padding": {"batch": call(torch.arange, 1)},
    "keys that wrap around": {"columns": call(torch.add, call(torch.arange, L), -1)},
    "padding of keys from a position in a tensor": {"columns": call(torch.add, call(torch.arange, L), start)},
    "padding of queries": {"at": call(operator.getitem, call(torch.arange, S), (None, None, ALL, None))},
    "one position": {"rows": call(torch.arange, 1)},
    "fractions": {"rows": call(torch.add, call(torch.arange, S), 0.5)},
    "one token": {"S": 1, "rows": call(torch.add, call(torch.arange, 1), 2)},
}


def outputs(built: Built) -> torch.Tensor:
    return built.run()[0][0]


@pytest.mark.parametrize("changed", MATCHES.values(), ids=MATCHES)
def test_masks_of_positions_are_recognised(changed):
    torch.manual_seed(0)
    stock = outputs(graph(**changed))
    torch.manual_seed(0)
    fused = graph(**changed)
    assert fused.rewrite([positions]).hits == {positions.name: 1}
    torch.testing.assert_close(outputs(fused), stock, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("changed", LEFT.values(), ids=LEFT)
def test_other_masks_are_left(changed):
    built = graph(**changed)
    built.run()
    assert not built.rewrite([positions]).hits


def test_a_mask_of_what_is_written_later_is_left():
    """The padding, the counter or the mask itself, between the mask and the attention."""
    for name in ("held", "start", "and_"):
        built = graph(rows=call(torch.add, call(torch.arange, S), start))
        (attention,) = built.graph.find_nodes(op="call_function", target=torch.ops.tinyfuse.attention.default)
        target = attention.args[3] if name == "and_" else next(n for n in built.graph.nodes if n.name == name)
        with built.graph.inserting_before(attention):
            built.graph.call_method("zero_", (target,)).meta["example_value"] = target.meta["example_value"]
        expected = outputs(built)
        assert len(built.rewrite([positions]).hits) == (name == "start"), "positions are computed before"
        torch.testing.assert_close(outputs(built), expected, rtol=1e-6, atol=1e-6)


PROMPT, MORE, HELD = 57, 21, 97
PADDINGS = {"none": slice(0), "left": slice(0, 9), "right": slice(PROMPT - 9, PROMPT), "everything": slice(0, PROMPT)}


@pytest.fixture
def lowered(monkeypatch):
    """The graphs that are lowered."""
    backend, graphs = importlib.import_module("tinyfuse.backend"), []
    lower = backend.lower
    torch._dynamo.reset()
    monkeypatch.setattr(backend, "lower", lambda graph: (graphs.append(graph), lower(graph))[1])
    return graphs


def sizes(node: Any) -> list[list[int]]:
    found = node.meta.get("example_value")
    values = found if isinstance(found, (tuple, list)) else (found,)
    shapes = [v.shape for v in values if isinstance(v, torch.Tensor)]
    return [[d.node.hint if isinstance(d, torch.SymInt) else d for d in shape] for shape in shapes]


def masks(graph: Any, queries: int, keys: int) -> list[str]:
    """The nodes that have a number for each query and key."""

    def covers(shape: list[int]) -> bool:
        return queries in shape and keys in shape and (queries != keys or shape.count(keys) > 1)

    return [node.name for node in graph.nodes if any(map(covers, sizes(node)))]


def chunks(padding: str) -> list[dict[str, torch.Tensor]]:
    inputs = prompt(PROMPT + MORE, batch=2)
    inputs["attention_mask"][0, PADDINGS[padding]] = 0
    return [
        {"input_ids": inputs["input_ids"][:, first:last], "attention_mask": inputs["attention_mask"][:, :last]}
        for first, last in ((0, PROMPT), (PROMPT, PROMPT + MORE))
    ]


def cached(kind: str, model: Any) -> dict[str, Any]:
    if kind == "none":
        return {"use_cache": False}
    made = DynamicCache(config=model.config) if kind == "growing" else StaticCache(model.config, max_cache_len=HELD)
    return {CACHE: made}


@pytest.mark.parametrize("cache", ["none", "growing", "static"])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt2"])
@torch.no_grad()
def test_prompts_make_no_mask_and_equal_stock(name, cache, lowered):
    """A prompt and, where there is a cache, more of it: longer than the window, the cache longer than both."""
    stock, _ = build(name)
    forward = torch.compile(copy.deepcopy(stock), backend="tinyfuse")
    for padding in PADDINGS:
        given, calls = [cached(cache, stock) for _ in range(2)], chunks(padding)
        for inputs in calls[: 1 if cache == "none" else 2]:
            fast, right = (run(**inputs, **held) for run, held in zip((forward, stock), given, strict=True))
            torch.testing.assert_close(fast.logits, right.logits, rtol=LOGITS, atol=LOGITS)
    lengths = {PROMPT, PROMPT + MORE, PROMPT + WINDOW, MORE + WINDOW - 1, HELD}
    assert lowered
    for graph in lowered:
        assert not [name for rows in (PROMPT, MORE) for keys in lengths for name in masks(graph, rows, keys)]


@torch.no_grad()
def test_replayed_kernels_follow_the_positions():
    """On the CPU the kernels of short prompts of one shape are replayed from their recorded arguments."""
    stock, _ = build("llama")
    forward = torch.compile(copy.deepcopy(stock), backend="tinyfuse", dynamic=False)
    given, inputs = [{CACHE: StaticCache(stock.config, max_cache_len=40)} for _ in range(2)], prompt(40)
    inputs["attention_mask"][0, 5:7] = 0
    for first in range(0, 40, 4):
        inputs["input_ids"] = prompt(40)["input_ids"][:, first : first + 4]
        fast, right = (run(**inputs, **held) for run, held in zip((forward, stock), given, strict=True))
        torch.testing.assert_close(fast.logits, right.logits, rtol=LOGITS, atol=LOGITS)


@pytest.mark.parametrize(
    "dtype, queries, keys, width, computed",
    [
        (torch.bfloat16, 50, 50, 64, True),
        (torch.bfloat16, 5, 40, 64, True),
        (torch.bfloat16, 5, 4000, 64, False),
        (torch.float16, 50, 50, 300, False),
        (torch.float32, 50, 50, 64, False),
    ],
)
def test_a_gpu_without_a_kernel_for_it_has_one_mask_for_all_layers(dtype, queries, keys, width, computed):
    with FakeTensorMode():
        sizes = {"q": queries, "k": keys, "v": keys}
        made = {name: torch.empty(1, 4, n, width, dtype=dtype, device="cuda") for name, n in sizes.items()}
    assert kernel_fits(SimpleNamespace(value=made.get)) == computed


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_prompts_of_generate_make_no_mask(name, lowered):
    stock, _ = build(name)
    fast = optimize(copy.deepcopy(stock))
    for padding in ("none", "left"):
        inputs = chunks(padding)[0]
        assert torch.equal(*(m.generate(**inputs, max_new_tokens=9, do_sample=False) for m in (fast, stock)))
    lengths = {slot.length for slot in fast._tinyfuse.pool.slots.values()} | {PROMPT}
    prompts = [graph for graph in lowered if any(PROMPT in shape for node in graph.nodes for shape in sizes(node))]
    assert prompts and not fast._tinyfuse.fallbacks
    assert not [found for graph in prompts for keys in lengths for found in masks(graph, PROMPT, keys)]


@torch.no_grad()
def test_a_mask_with_a_bias_is_made(lowered):
    model, _ = build("bloom")
    torch.compile(model, backend="tinyfuse")(**chunks("none")[0])
    assert [bool(masks(graph, PROMPT, PROMPT)) for graph in lowered] == [True]
