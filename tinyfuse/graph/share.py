"""What is computed twice alike is computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from tinyfuse.graph.nodes import cast, is_tensor, storage, writes

VIEWS = {torch.transpose, torch.unsqueeze, torch.permute, torch.Tensor.expand, torch.unflatten, torch.real, torch.imag}
_COPIES = {torch.add, torch.cat, torch.repeat_interleave, cast}


def share_common(graph: Graph, copies: bool = False) -> None:
    """Let equal views, and equal ``arange`` results that nothing writes, be one node; with ``copies`` also what is
    computed alike for every layer, as rotary tables and masks with a bias are, where nothing writes the source or
    the result and the graph does not return it."""
    unstable = written(graph)
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _shareable(node, unstable, copies):
            continue
        first = seen.setdefault((node.target, node.args, tuple(node.kwargs.items())), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _shareable(node: Node, unstable: set[Any], copies: bool) -> bool:
    if node.target in VIEWS:
        return is_tensor(node.args[0])
    if node.target is torch.arange or (copies and node.target in _COPIES):
        returned = any(user.op == "output" for user in node.users)
        return not returned and not any(storage(n) in unstable for n in (node, *node.all_input_nodes))
    return False


def written(graph: Graph) -> set[Any]:
    """The storages that a node of ``graph`` writes in place."""
    return {storage(w) for node in graph.nodes for w in writes(node)}
