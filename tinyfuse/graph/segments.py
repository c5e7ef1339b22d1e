"""Runs of native CPU kernels, each made one call: recorded once on fixed memory, replayed in one parallel region."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tinyfuse.graph.nodes import is_static, is_tensor, storage, value, writes
from tinyfuse.kernels._program import Segment

LEAST_KERNELS = 6  # shorter runs do not repay the call of a segment, which looks at the address of every input
_VIEWS = {
    torch.reshape, torch.transpose, torch.permute, torch.unsqueeze, torch.squeeze, torch.Tensor.expand,
    operator.getitem,
}  # fmt: skip


def make_segments(graph: Graph, native: Collection[Node], written: dict[Node, list[Node]]) -> None:
    """Replace every run of ``native`` nodes, with the views between them, by one call of a :class:`Segment`.

    ``written``: the inputs that an op's node writes.
    """
    run: list[Node] = []
    for node in [*graph.nodes, None]:
        if node in native or (run and node is not None and node.target in _VIEWS):
            run.append(node)
            continue
        if run and node is not None and _may_go_first(node, run, written):  # the look-up of the token, mostly
            run[0].prepend(node)
            continue
        while run and run[-1] not in native:
            run.pop()
        if sum(n in native for n in run) >= LEAST_KERNELS:
            _replace(graph, run, written)
        run = []


def _may_go_first(node: Node, run: list[Node], written: dict[Node, list[Node]]) -> bool:
    """Whether ``node`` does before ``run`` what it does after it."""
    if node.op != "call_function" or not is_tensor(node) or not set(run).isdisjoint(node.all_input_nodes):
        return False  # what has no result may change how others compute
    if writes(node) or written.get(node):
        return False
    changed = {storage(w) for n in run for w in written.get(n, ())}
    return changed.isdisjoint(map(storage, node.all_input_nodes))


def _replace(graph: Graph, run: list[Node], written: dict[Node, list[Node]]) -> None:
    inside = set(run)
    inputs = list(dict.fromkeys(n for node in run for n in node.all_input_nodes if n not in inside))
    outputs = [node for node in run if any(user not in inside for user in node.users)]
    if _aliases(graph, inside, inputs, outputs):
        return
    part = Graph()
    copies = {node: part.placeholder(node.name) for node in inputs}
    for node in run:
        copies[node] = part.node_copy(node, copies.__getitem__)
    part.output([copies[node] for node in outputs])
    targets = {w for node in run for w in written.get(node, ())}
    indices = frozenset(i for i, node in enumerate(inputs) if node in targets)
    dynamic = frozenset(i for i, node in enumerate(inputs) if not _has_fixed_shape(node))
    constants = frozenset(i for i, node in enumerate(inputs) if node.meta.get("constant"))
    segment = Segment(GraphModule(torch.nn.Module(), part).forward, indices, dynamic, constants)
    with graph.inserting_after(run[-1]):
        call = graph.call_function(_named(segment), tuple(inputs))
    for index, node in reversed(list(enumerate(outputs))):
        with graph.inserting_after(call):
            item = graph.call_function(operator.getitem, (call, index))
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
    for node in reversed(run):
        graph.erase_node(node)


def _aliases(graph: Graph, inside: set[Node], inputs: list[Node], outputs: list[Node]) -> bool:
    """Whether an output shares memory with an input or is written later: a segment hands out copies."""
    later = {storage(w) for node in graph.nodes if node not in inside for w in writes(node)}
    given = {storage(n) for n in inputs} - {None}
    return any(storage(n) in given | later for n in outputs)


def _has_fixed_shape(node: Node) -> bool:
    return isinstance(value(node), torch.Tensor) and is_static(value(node))


def _named(segment: Segment) -> Callable[..., Any]:
    """A function with a name, as FX code generation needs."""

    def tinyfuse_segment(*args: Any) -> Any:
        return segment(*args)

    return tinyfuse_segment
