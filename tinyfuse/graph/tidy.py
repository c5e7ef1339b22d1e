"""Small rewrites that are no pattern: dead nodes, what all layers compute alike."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

import tinyfuse.kernels.mask_bounds
import tinyfuse.kernels.rope_append_attention
import tinyfuse.kernels.step_counters  # noqa: F401
from tinyfuse.graph.nodes import is_tensor, same_size, storage, value, writes
from tinyfuse.graph.rewrite import op_of, run_fake
from tinyfuse.graph.share import VIEWS, written

_OF_MASKS = (operator.and_, operator.le, operator.gt, torch.sub, torch.add, "new_ones")


def drop_dead(graph: Graph) -> None:
    """Erase views, ``arange`` calls, masks and tuple items without users, which rewriting leaves behind."""
    dropped = (*VIEWS, torch.reshape, torch.arange, operator.getitem, *_OF_MASKS)
    for node in reversed(graph.nodes):
        if not node.users and node.target in dropped and not writes(node):
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


def keep_layouts(graph: Graph) -> None:
    """Results whose memory leaves the graph, or is written later, lie as the traced ones do: what follows may be a
    ``view``, which another layout has no room for, and a write through what is then a copy is lost."""
    changed = written(graph)
    seen = changed | {storage(n) for n in graph.output_node().all_input_nodes}
    for node in list(graph.nodes):
        copies = node.target in (torch.reshape, torch.Tensor.contiguous) and storage(node) != storage(node.args[0])
        if copies and storage(node) in changed:
            _follow(graph, node, torch.clone)
        elif is_tensor(node) and storage(node) in seen and _lies_otherwise(node):
            _follow(graph, node, _in_order, _order(value(node)))


def _lies_otherwise(node: Node) -> bool:
    """Whether the result of an op, or the part or view of it that a replacement takes, lies otherwise than traced."""
    op = node if op_of(node) is not None else _op_inside(node)
    if op is None or any(value(n) is None for n in op.all_input_nodes):
        return False
    if op is not node:
        op.meta["example_value"] = run_fake(op)
    traced, made = value(node), run_fake(node)
    sizes = zip(traced.shape, traced.stride(), made.stride(), strict=True)
    return any(not same_size(there, here) for size, there, here in sizes if not same_size(size, 1))


def _op_inside(node: Node) -> Node | None:
    """The op inside a replacement that ``node`` gives a part or a view of."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    inside = isinstance(source, Node) and op_of(source) is not None and not is_tensor(source)
    return source if inside and node.target in (*VIEWS, operator.getitem) else None


def _order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dims of dense memory from the outermost on; as they are where strides are known to the data alone."""
    strides = [s.node.hint if isinstance(s, torch.SymInt) else s for s in tensor.stride()]
    dims = range(tensor.dim())
    return tuple(dims if None in strides else sorted(dims, key=lambda dim: -strides[dim]))


def _in_order(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """``x`` in memory that has its dims in this order."""
    inverse = [order.index(dim) for dim in range(x.dim())]
    return x.permute(order).contiguous().permute(inverse)


def _follow(graph: Graph, node: Node, target: Any, *args: Any) -> None:
    """Let ``target`` of ``node`` take its place."""
    with graph.inserting_after(node):
        after = graph.call_function(target, (node, *args))
    after.meta["example_value"] = value(node)
    node.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)


def _emit(graph: Graph, target: Any, args: tuple) -> Node:
    node = graph.call_function(target, args)
    node.meta["example_value"] = run_fake(node)
    return node
