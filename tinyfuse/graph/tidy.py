"""Small rewrites that are no pattern: dead nodes, what all layers compute alike."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

import tinyfuse.kernels.mask_bounds
import tinyfuse.kernels.rope_append_attention
import tinyfuse.kernels.step_counters  # noqa: F401
from tinyfuse.graph.nodes import is_tensor, storage, value
from tinyfuse.graph.rewrite import run_fake
from tinyfuse.graph.share import VIEWS, written

_OF_MASKS = (operator.and_, operator.le, operator.gt, torch.sub, torch.add, "new_ones")


def drop_dead(graph: Graph) -> None:
    """Erase views, ``arange`` calls, masks and tuple items without users, which rewriting leaves behind."""
    dropped = (*VIEWS, torch.reshape, torch.arange, operator.getitem, *_OF_MASKS)
    for node in reversed(graph.nodes):
        if not node.users and node.target in dropped:
            graph.erase_node(node)


def bound_masks(graph: Graph, device: str = "cuda") -> None:
    """Find out once where a decode step's bool mask begins and ends, not in every layer's attention; CPU kernels have
    no use for it."""
    attention, bounds, unstable = torch.ops.tinyfuse.rope_append_attention.default, {}, written(graph)
    for node in list(graph.nodes):
        mask = node.args[9] if node.target is attention else None
        if mask is None or not _one_row_each(value(mask), value(node.args[0]), device):
            continue
        if storage(mask) in unstable:
            continue
        if mask not in bounds:
            with graph.inserting_before(node):
                bounds[mask] = _emit(graph, torch.ops.tinyfuse.mask_bounds.default, (mask,))
        node.args = (*node.args[:11], bounds[mask])


def _one_row_each(mask: torch.Tensor, q: torch.Tensor, device: str) -> bool:
    """Whether a mask is bool, with one row for all heads of each sequence."""
    rows = mask.dim() == 4 and tuple(mask.shape[:3]) == (q.shape[0], 1, 1)
    return rows and mask.dtype == torch.bool and mask.device.type == device


def batch_counters(graph: Graph) -> None:
    """In a decode step every layer of a static cache computes ``pos = arange(1) + counter; counter.add_(1)``, and one
    whose cache is a ring ``pos % ring``: give all layers one launch.

    Applies to counters (0-dim inputs) that are read and written nowhere else.
    """
    sites = [site for node in graph.nodes if (site := _counter_site(node)) is not None]
    if len(sites) < 2:
        return
    counters = [site[0] for site in sites]
    wraps = [_wrap(position) for _, position, _ in sites]
    rings = [wrap.args[1] if wrap else 0 for wrap in wraps]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        positions = _emit(graph, torch.ops.tinyfuse.step_counters.default, (counters, rings))
        for index, ((_, position, _), wrap) in enumerate(zip(sites, wraps, strict=True)):
            (wrap or position).replace_all_uses_with(_emit(graph, operator.getitem, (positions, index)))
    for (_, position, increment), wrap in zip(sites, wraps, strict=True):
        for node in (wrap, position, increment):
            if node is not None:
                graph.erase_node(node)


def _wrap(position: Node) -> Node | None:
    """The one user of a position, where it takes it modulo a constant."""
    users = list(position.users)
    if len(users) != 1 or users[0].target is not torch.remainder or users[0].args[0] is not position:
        return None
    ring = users[0].args[1]
    return users[0] if isinstance(ring, int) and ring > 0 and not users[0].kwargs else None


def _counter_site(node: Node) -> tuple[Node, Node, Node] | None:
    """(counter, position, increment) where ``node`` is an input used as a counter of single steps."""
    if node.op != "placeholder" or not is_tensor(node) or value(node).dim() != 0 or len(node.users) != 2:
        return None
    position, increment = sorted(node.users, key=lambda n: n.target == "add_")
    if increment.target != "add_" or increment.args != (node, 1) or increment.kwargs or increment.users:
        return None
    if position.target is not torch.add or value(position).dtype is not value(node).dtype:
        return None
    steps = next((a for a in position.args if a is not node), None)
    single = isinstance(steps, Node) and steps.target is torch.arange and steps.args == (1,)
    return (node, position, increment) if single and position < increment else None


def _emit(graph: Graph, target: Any, args: tuple) -> Node:
    node = graph.call_function(target, args)
    node.meta["example_value"] = run_fake(node)
    return node
