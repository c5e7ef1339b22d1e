"""From a rewritten graph to a callable: every semantic op is bound to the kernel that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from tinyfuse.graph.nodes import is_static, value
from tinyfuse.graph.rewrite import op_of, run_fake
from tinyfuse.op import Op


@dataclass(frozen=True)
class Choice:
    """What runs an op: a kernel or ``"reference"``; ``reason`` says why no kernel does."""

    kernel: str
    reason: str | None


def lower(graph: Graph) -> tuple[Callable[..., Any], dict[Node, Choice]]:
    """Bind kernels where all shapes are static, else leave the choice to each call; returns the callable
    and what was chosen per op node."""
    static = all(is_static(v) for v in map(value, graph.nodes) if isinstance(v, torch.Tensor))
    if static:
        _refresh_values(graph)
    choices = {}
    for node in graph.nodes:
        op = op_of(node)
        if op is not None:
            choices[node], node.target = _bind(op, node, static)
    return GraphModule(torch.nn.Module(), graph).forward, choices


def _bind(op: Op, node: Node, static: bool) -> tuple[Choice, Callable[..., Any]]:
    if not static:
        return Choice("at run time", None), _callable(op, op.__call__)
    kernel, reason = op.choose(*map_arg(node.args, value))
    if kernel is None:
        return Choice("reference", reason), _callable(op, op.reference)
    return Choice(kernel.name, None), _callable(op, partial(op.run, kernel))


def _callable(op: Op, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own with a name, as FX code generation needs."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__name__ = call.__qualname__ = f"tinyfuse_{op.name}"
    return call


def _refresh_values(graph: Graph) -> None:
    """Example values downstream of the replacements: a fused op may lay its result out differently."""
    changed: set[Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node.kwargs:
            continue
        if op_of(node) or any(n in changed for n in node.all_input_nodes):
            before, after = value(node), run_fake(node)
            node.meta["example_value"] = after
            if not isinstance(before, torch.Tensor) or before.stride() != after.stride():
                changed.add(node)
