"""From a rewritten graph to a callable: every semantic op is bound to the kernel that runs it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from tinyfuse.graph.nodes import is_static, is_tensor, value, writes
from tinyfuse.graph.rewrite import op_of, run_fake
from tinyfuse.graph.segments import make_segments
from tinyfuse.graph.share import VIEWS
from tinyfuse.op import Op, metadata

AT_RUN_TIME = "at run time"
_PASSING = {*VIEWS, torch.reshape, operator.getitem}


@dataclass(frozen=True)
class Choice:
    """What runs an op: a kernel or ``"reference"``; ``reason`` says why no kernel does."""

    kernel: str
    reason: str | None


def lower(graph: Graph) -> tuple[Callable[..., Any], dict[Node, Choice]]:
    """Bind kernels where shapes are static and rules choose, else leave the choice to each call; returns the callable
    and what was chosen per op node."""
    _refresh_values(graph)
    choices, written = {}, {}
    for node in graph.nodes:
        op = op_of(node)
        if op is not None:
            written[node] = writes(node)
            early = reads_too_early(op, node, choices)
            choices[node], node.target = _in_order(op) if early else _bind(op, node)
    root = graph.owning_module or torch.nn.Module()
    return GraphModule(root, _executable(graph, choices, written)).forward, choices


def _executable(graph: Graph, choices: dict[Node, Choice], written: dict[Node, list[Node]]) -> Graph:
    """A copy of ``graph`` to run, with its runs of native CPU kernels on small fixed shapes made segments."""
    copy, copies = Graph(), {}
    copy.output(copy.graph_copy(graph, copies))
    native = {copies[node] for node, choice in choices.items() if _replayable(node, choice)}
    make_segments(copy, native, {copies[n]: [copies[w] for w in ws] for n, ws in written.items()})
    return copy


def _replayable(node: Node, choice: Choice) -> bool:
    """Whether ``node`` runs, or may run, a native CPU kernel whose result has a fixed shape: not that of a prompt."""
    if choice.kernel not in ("native", AT_RUN_TIME):
        return False
    results = [v for v in tree_leaves(value(node)) if isinstance(v, torch.Tensor)]
    return all(is_static(v) and v.device.type == "cpu" for v in results)


def _is_fixed(arg: Any) -> bool:
    """Whether an argument, or several, hold static shapes and no symbolic number."""
    values = [v for item in tree_leaves(arg) if isinstance(item, Node) for v in tree_leaves(value(item))]
    return all(is_static(v) if isinstance(v, torch.Tensor) else not isinstance(v, torch.SymInt) for v in values)


def reads_too_early(op: Op, node: Node, ops: Collection[Node], device: str = "cuda") -> bool:
    """Whether one of ``ops`` makes what the kernels of ``op`` read ahead: they may start before it has ended."""
    ahead = tree_leaves(node.args[op.ahead.start : op.ahead.stop])
    found = [n for n in ahead if is_tensor(n) and value(n).device.type == device]
    while found:
        node = found.pop()
        if node in ops:
            return True
        if node.target in _PASSING:
            found.append(node.args[0])
    return False


def _in_order(op: Op) -> tuple[Choice, Callable[..., Any]]:
    return Choice("reference", "a kernel makes its weight, which would be read ahead"), _callable(op, op.reference)


def _bind(op: Op, node: Node) -> tuple[Choice, Callable[..., Any]]:
    if not _is_fixed(node.args) or op.timed(map_arg(node.args, value)):
        return Choice(AT_RUN_TIME, None), _callable(op, _at_run_time(op, node))
    kernel, reason = op.choose(*map_arg(node.args, value))
    if kernel is None:
        return Choice("reference", reason), _callable(op, op.reference)
    return Choice(kernel.name, None), _callable(op, partial(op.run, kernel))


_sites: dict[tuple[Any, ...], object] = {}


def _at_run_time(op: Op, node: Node) -> Callable[..., Any]:
    """Chooses by the arguments that move with the prompt; the rest, weights above all, is looked at once."""
    moving = [i for i, arg in enumerate(node.args) if not _is_fixed(arg)]
    fixed = metadata(map_arg([None if i in moving else arg for i, arg in enumerate(node.args)], value))
    site = _sites.setdefault((op.name, *moving, fixed), object())  # hashes faster than what it stands for

    def call(*args: Any) -> Any:
        return op.dispatch((site, metadata([args[i] for i in moving])), args, moving)

    return call


def _callable(op: Op, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own with a name, as FX code generation needs."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__name__ = call.__qualname__ = f"tinyfuse_{op.name}"
    return call


def _refresh_values(graph: Graph) -> None:
    """Example values of the replacements, where their inputs have static shapes, and of what follows from them:
    a fused op may lay its result out differently."""
    changed: set[Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node.kwargs:
            continue
        if (op_of(node) and _is_fixed(node.args)) or any(n in changed for n in node.all_input_nodes):
            before, after = value(node), run_fake(node)
            node.meta["example_value"] = after
            if not isinstance(before, torch.Tensor) or before.stride() != after.stride():
                changed.add(node)
