"""Apply patterns to a normalised graph.

A match becomes a rewrite only if nothing else in the graph can tell the difference: inner values have no
other users, the inputs exist before the first use of the result, and no write moves across a read of the same memory.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from tinyfuse.graph.nodes import cast, is_tensor, storage, value, writes
from tinyfuse.graph.pattern import Binding, Call, Capture, Cast, Expr, Match, Pattern, children, match
from tinyfuse.graph.share import share_common
from tinyfuse.op import OPS, Op


@dataclass
class Outcome:
    """What the patterns did to a graph: ``covered`` maps each node of a match to its pattern and replacement;
    ``declined`` maps nodes to the pattern that nearly matched and why it did not; ``hits`` counts per pattern."""

    covered: dict[Node, tuple[Pattern, Node]] = field(default_factory=dict)
    declined: dict[Node, tuple[Pattern, str]] = field(default_factory=dict)
    hits: Counter[str] = field(default_factory=Counter)

    def final(self, node: Node) -> tuple[list[Pattern], Node]:
        """The patterns that ``node`` went through and the node that computes it now."""
        path = []
        while node in self.covered:
            pattern, node = self.covered[node]
            path.append(pattern)
        return path, node


def rewrite(graph: Graph, patterns: Sequence[Pattern]) -> Outcome:
    """Apply ``patterns`` stage by stage, the largest first, until none of them matches; what rewriting made alike at
    several sites is shared before the next stage looks at it."""
    outcome = Outcome()
    for stage in ("lift", "fuse"):
        for pattern in sorted((p for p in patterns if p.stage == stage), key=lambda p: (-p.size, p.name)):
            _apply(graph, pattern, outcome)
        share_common(graph, copies=True)
    return outcome


def _apply(graph: Graph, pattern: Pattern, outcome: Outcome) -> None:
    heads = pattern.targets()
    found = [graph.find_nodes(op="call_function", target=head, sort=False) for head in heads]
    for node in sorted(itertools.chain.from_iterable(found)):
        if node.target in heads and not node._erased:
            _rewrite_at(graph, node, pattern, outcome)


def _rewrite_at(graph: Graph, node: Node, pattern: Pattern, outcome: Outcome) -> None:
    reason = None
    for binding, roots in _matches(pattern, node):
        found = Match(binding, roots)
        reason = _refusal(found, pattern)
        site = _Site(found, pattern)
        reason = reason or site.refusal()
        if reason is None:
            replacement = pattern.to(found)
            if replacement is not None:
                effects = pattern.effects(found) if pattern.effects else ()
                site.replace(graph, replacement, effects, outcome)
                return
            reason = "the pattern declines it"
    if reason is not None:
        outcome.declined.setdefault(node, (pattern, reason))


def _matches(pattern: Pattern, node: Node) -> Iterator[tuple[Binding, list[Node]]]:
    """Matches of all roots, the first at ``node``, the others among the users of what is bound by then."""

    def extend(binding: Binding, roots: list[Node]) -> Iterator[tuple[Binding, list[Node]]]:
        if len(roots) == len(pattern.roots):
            yield binding, roots
            return
        root = pattern.roots[len(roots)]
        for candidate in _candidates(root, binding):
            if candidate not in roots:
                for extended in match(root, candidate, binding):
                    yield from extend(extended, [*roots, candidate])

    for binding in match(pattern.roots[0], node, {}):
        yield from extend(binding, [node])


def _candidates(expr: Any, binding: Binding) -> list[Node]:
    """Where ``expr`` may match: what is bound to it, else the users of where its first part with a bound one may."""
    known = binding.get(expr.name if isinstance(expr, Capture) else expr) if isinstance(expr, Expr) else None
    if isinstance(known, Node):
        return [known]
    below = next(filter(None, (_candidates(part, binding) for part in children(expr))), [])
    if not isinstance(expr, (Call, Cast)):
        return below
    target = expr.target if isinstance(expr, Call) else cast
    above = list(dict.fromkeys(user for node in below for user in node.users if user.target is target))
    return above if isinstance(expr, Call) else below + above


def _refusal(found: Match, pattern: Pattern) -> str | None:
    return next((check.reason for check in pattern.where if not check.holds(found)), None)


class _Site:
    """One match in the graph: what is inside, what comes in, where the replacement may stand."""

    def __init__(self, found: Match, pattern: Pattern):
        self.found, self.pattern = found, pattern
        self.shared = {n for e, n in found.nodes.items() if isinstance(e, Call) and e.shared}
        self.inside = (set(found.nodes.values()) | set(found.roots)) - self.shared
        self.inputs = {c for c in found.captures.values() if isinstance(c, Node)} | self.shared

    def refusal(self) -> str | None:
        if self.inputs & self.inside:
            return "one of its values is an input of it too"
        for node in self.inside - set(self.found.roots):
            if any(user not in self.inside for user in node.users):
                return f"its inner value '{node.name}' is used elsewhere too"
        outside = [u for root in self.found.roots for u in root.users if u not in self.inside]
        last = max(self.inside)
        self.place = min([last, *(user.prev for user in outside)])
        if any(node > self.place for node in self.inputs):
            return "an input is computed only after the result is first used"
        return self._hazard()

    def _hazard(self) -> str | None:
        """A write of an input, or an access to what the match writes, that the rewrite would move across."""
        node, last, matched = min(self.inside | self.shared), max(self.inside), self.inside | self.shared
        written = {storage(w) for n in self.inside for w in writes(n)}
        while node is not last:
            node = node.next
            if node in matched:
                continue
            touched = {storage(w) for w in writes(node)}
            if touched and self._moves_a_read(node, touched):
                return f"an input is written in place by '{node.name}' in between"
            if touched and self._reads_after(node, touched):
                return f"one of its values is written in place by '{node.name}' in between"
            if written and any(is_tensor(a) and storage(a) in written for a in node.all_input_nodes):
                return f"'{node.name}' uses the memory it writes in between"
        return None

    def _moves_a_read(self, write: Node, touched: set[Any]) -> bool:
        """Whether an input in the memory ``touched`` by ``write`` is read on the other side of it now, or a shared
        value is no longer what it was made as."""
        aliases = [n for n in self.inputs if storage(n) in touched]
        readers = [user for n in aliases for user in n.users if user in self.inside | self.shared]
        before = any(n < write for n in (*readers, *self.shared.intersection(aliases)))
        return bool(aliases) and (self.place < write or before)

    def _reads_after(self, write: Node, touched: set[Any]) -> bool:
        """Whether the match makes a value in the memory ``touched`` by ``write`` and reads it only afterwards."""
        made = [n for n in self.inside if storage(n) in touched]
        return any(user > write for n in made for user in n.users if user in self.inside)

    def replace(self, graph: Graph, values: Sequence[Any], effects: Sequence[Call], outcome: Outcome) -> None:
        known = {id(new): value(root) for root, new in zip(self.found.roots, values, strict=True)}
        build = _Builder(graph, self.place, self.found.roots[0], known)
        news = [build(e) for e in (*effects, *values)]
        main = next(n for n in news if n is not None)
        while main in build.made and main.target is operator.getitem:
            main = main.args[0]
        for root, new in zip(self.found.roots, news[len(effects) :], strict=True):
            if new is not None:
                root.replace_all_uses_with(new, delete_user_cb=lambda user: user not in build.made)
        for node in sorted(self.inside, reverse=True):
            outcome.covered[node] = (self.pattern, main)
            graph.erase_node(node)
        outcome.hits[self.pattern.name] += 1


class _Builder:
    """Emits replacement expressions after ``anchor``, in order. ``known``: example values by expression; those of
    other ops are left to the lowering, which needs them only where shapes are static."""

    def __init__(self, graph: Graph, anchor: Node, origin: Node, known: dict[int, Any]):
        self.graph, self.last, self.origin, self.known = graph, anchor, origin, known
        self.made: set[Node] = set()
        self.done: dict[int, Node] = {}

    def __call__(self, expr: Any) -> Any:
        if isinstance(expr, (tuple, list)):
            return type(expr)(self(e) for e in expr)
        if not isinstance(expr, Call):
            return expr
        if id(expr) not in self.done:
            args = tuple(self(a) for a in expr.args)
            with self.graph.inserting_after(self.last):
                node = self.graph.call_function(expr.target, args)
            self.last = node
            self.made.add(node)
            self.done[id(expr)] = node
            if id(expr) in self.known:
                node.meta["example_value"] = self.known[id(expr)]
            elif op_of(node) is None:
                node.meta["example_value"] = run_fake(node)
            node.meta["nn_module_stack"] = self.origin.meta.get("nn_module_stack")
        return self.done[id(expr)]


def run_fake(node: Node) -> Any:
    """The example value of a call, from those of its arguments."""
    args = map_arg(node.args, value)
    fake = next((v for v in map(value, node.all_input_nodes) if isinstance(v, FakeTensor)), None)
    op = op_of(node)
    with fake.fake_mode if fake is not None else nullcontext():
        return node.target(*args) if op is None else op.fake(*args)


def op_of(node: Node) -> Op | None:
    """The tinyfuse op that ``node`` calls."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "tinyfuse":
        return OPS[node.target._schema.name.partition("::")[2]]
    return None
