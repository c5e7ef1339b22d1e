"""Patterns as values: expressions over captures, matched against a normalised graph.

An expression is built from captures (:func:`tensor`, :func:`optional`, :func:`scalar`, :func:`anything`), calls
(operators, or :func:`call`), :func:`cast` and :func:`one_of`. The same expression object used twice must match the
same node; so must a capture name. ``+`` and ``*`` match in either order. A cast to the dtype a value already
has vanished in the normal form, so :func:`cast` also matches its absence there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch.fx import Node

from tinyfuse.graph import nodes
from tinyfuse.graph.nodes import value

COMMUTATIVE = {torch.add, torch.mul}
Binding = dict[Any, Any]


class Expr:
    """Base of all expressions; operators build calls."""

    def __add__(self, other: Any) -> Call:
        return Call(torch.add, (self, other))

    __radd__ = __add__

    def __mul__(self, other: Any) -> Call:
        return Call(torch.mul, (self, other))

    __rmul__ = __mul__

    def __sub__(self, other: Any) -> Call:
        return Call(torch.sub, (self, other))

    def __truediv__(self, other: Any) -> Call:
        return Call(torch.div, (self, other))

    def __neg__(self) -> Call:
        return Call(torch.neg, (self,))


@dataclass(frozen=True, eq=False)
class Capture(Expr):
    """Binds a name to a tensor node (``kind="tensor"``), a tensor node or None (``"optional"``), a number or
    a node that computes one (``"scalar"``), or anything (``"any"``)."""

    name: str
    kind: str

    def accepts(self, found: Any) -> bool:
        if self.kind == "tensor":
            return nodes.is_plain_tensor(found)
        if self.kind == "optional":
            return found is None or nodes.is_plain_tensor(found)
        if self.kind == "scalar":
            return isinstance(value(found), (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(found, bool)
        return True


@dataclass(frozen=True, eq=False)
class Call(Expr):
    """A ``call_function`` node. ``shared``: it may have users outside the match, and stays for them."""

    target: Callable
    args: tuple
    shared: bool = False


@dataclass(frozen=True, eq=False)
class Cast(Expr):
    """A dtype conversion; ``dtype`` is a dtype or the name under which the dtype found is bound."""

    arg: Any
    dtype: torch.dtype | str


@dataclass(frozen=True, eq=False)
class OneOf(Expr):
    """Alternate spellings."""

    choices: tuple


def tensor(names: str) -> Any:
    """Captures of tensors: ``x, w = tensor("x w")``."""
    return _captures(names, "tensor")


def optional(names: str) -> Any:
    return _captures(names, "optional")


def scalar(names: str) -> Any:
    return _captures(names, "scalar")


def anything(names: str) -> Any:
    return _captures(names, "any")


def _captures(names: str, kind: str) -> Any:
    made = tuple(Capture(name, kind) for name in names.split())
    return made if len(made) > 1 else made[0]


def call(target: Callable, *args: Any, shared: bool = False) -> Call:
    return Call(target, args, shared)


def cast(arg: Any, dtype: torch.dtype | str) -> Cast:
    return Cast(arg, dtype)


def one_of(*choices: Any) -> OneOf:
    return OneOf(choices)


@dataclass(frozen=True)
class Check:
    """A predicate over a match and the sentence a user reads when it does not hold."""

    holds: Callable[[Match], bool]
    reason: str


class Match:
    """What a pattern found: captures as attributes (nodes or constants), ``dtype(name)``, ``shape(name)``."""

    def __init__(self, binding: Binding, roots: Sequence[Node]):
        self.roots = tuple(roots)
        self.captures = {k: v for k, v in binding.items() if isinstance(k, str)}
        self.nodes = {k: v for k, v in binding.items() if isinstance(k, Expr)}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.captures[name]
        except KeyError:
            raise AttributeError(name) from None

    def value(self, name: str) -> Any:
        return value(self.captures[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.value(name).dtype

    def shape(self, name: str) -> torch.Size:
        return self.value(name).shape


@dataclass(frozen=True)
class Pattern:
    """``roots`` is matched, ``where`` must hold, ``to(match)`` gives one expression per root (or None: declines).

    Expressions in a replacement may hold nodes and constants as they are. ``effects``: calls to emit although no root
    is their value. ``example()`` gives a value per capture, from which tests build, run and mutate every alternate.
    """

    name: str
    stage: str  # "lift": a spelling to a semantic op; "fuse": semantic ops to a fused one
    roots: tuple[Expr, ...]
    to: Callable[[Match], Sequence[Any] | None]
    example: Callable[[], dict[str, Any]]
    where: tuple[Check, ...] = ()
    effects: Callable[[Match], Sequence[Call]] | None = None
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.source:
            frame = sys._getframe(2)
            object.__setattr__(self, "source", f"{frame.f_code.co_filename}:{frame.f_lineno}")

    @property
    def size(self) -> int:
        """The number of calls, by which patterns are ordered: larger first."""
        return len({e for root in self.roots for e in walk(root) if isinstance(e, Call)})

    def targets(self) -> set[Callable]:
        """The targets a node must have for the first root to match there."""
        return _heads(self.roots[0])

    def alternates(self) -> list[tuple[Expr, ...]]:
        """The roots with every choice of ``one_of`` made."""
        choices = [e for root in self.roots for e in walk(root) if isinstance(e, OneOf)]
        choices = list(dict.fromkeys(choices))
        picks = product(*(range(len(c.choices)) for c in choices))
        return [_substitute(self.roots, dict(zip(choices, pick, strict=True)), {}) for pick in picks]


def _heads(expr: Any) -> set[Callable]:
    if isinstance(expr, Call):
        return {expr.target}
    if isinstance(expr, Cast):
        return {nodes.cast} | _heads(expr.arg)
    return set().union(*map(_heads, expr.choices)) if isinstance(expr, OneOf) else set()


def children(expr: Any) -> tuple:
    if isinstance(expr, Call):
        return expr.args
    if isinstance(expr, Cast):
        return (expr.arg,)
    if isinstance(expr, OneOf):
        return expr.choices
    if isinstance(expr, slice):
        return (expr.start, expr.stop, expr.step)
    return tuple(expr) if isinstance(expr, (tuple, list)) else ()


def walk(expr: Any) -> Iterator[Any]:
    """``expr`` and everything in it, parents first."""
    yield expr
    for child in children(expr):
        yield from walk(child)


def _substitute(expr: Any, picks: dict[OneOf, int], done: dict[int, Any]) -> Any:
    if isinstance(expr, OneOf):
        return _substitute(expr.choices[picks[expr]], picks, done)
    return rebuild(expr, lambda e: _substitute(e, picks, done), done)


def rebuild(expr: Any, visit: Callable[[Any], Any], done: dict[int, Any]) -> Any:
    """``expr`` with its children visited; one result per expression object, so sharing is kept."""
    if isinstance(expr, slice):
        return slice(visit(expr.start), visit(expr.stop), visit(expr.step))
    if isinstance(expr, (tuple, list)):
        return type(expr)(visit(e) for e in expr)
    if not isinstance(expr, (Call, Cast)):
        return expr
    if id(expr) not in done:
        if isinstance(expr, Call):
            done[id(expr)] = Call(expr.target, tuple(visit(a) for a in expr.args), expr.shared)
        else:
            done[id(expr)] = Cast(visit(expr.arg), expr.dtype)
    return done[id(expr)]


def match(expr: Any, found: Any, bound: Binding) -> Iterator[Binding]:
    """Every way in which ``expr`` matches ``found`` given ``bound`` (captures by name, nodes by expression)."""
    if isinstance(expr, Capture):
        if expr.name in bound:
            if _same(bound[expr.name], found):
                yield bound
        elif expr.accepts(found):
            yield {**bound, expr.name: found}
    elif isinstance(expr, Call):
        yield from _match_call(expr, found, bound)
    elif isinstance(expr, Cast):
        yield from _match_cast(expr, found, bound)
    elif isinstance(expr, OneOf):
        for choice in expr.choices:
            yield from match(choice, found, bound)
    elif isinstance(expr, slice):
        if isinstance(found, slice):
            yield from _match_all(children(expr), children(found), bound)
    elif isinstance(expr, (tuple, list)):
        if isinstance(found, (tuple, list)):
            yield from _match_all(expr, found, bound)
    elif _same(expr, found):
        yield bound


def _match_call(expr: Call, found: Any, bound: Binding) -> Iterator[Binding]:
    if expr in bound:
        if bound[expr] is found:
            yield bound
        return
    if not isinstance(found, Node) or found.target is not expr.target or found.kwargs:
        return
    bound = {**bound, expr: found}
    yield from _match_all(expr.args, found.args, bound)
    if expr.target in COMMUTATIVE:
        yield from _match_all(expr.args[::-1], found.args, bound)


def _match_cast(expr: Cast, found: Any, bound: Binding) -> Iterator[Binding]:
    if expr in bound:
        if bound[expr] is found:
            yield bound
        return
    if not nodes.is_tensor(found):
        return
    dtype = value(found).dtype
    if isinstance(expr.dtype, str):
        if bound.get(expr.dtype, dtype) is not dtype:
            return
        bound = {**bound, expr.dtype: dtype}
    elif expr.dtype is not dtype:
        return
    if found.target is nodes.cast:
        yield from match(expr.arg, found.args[0], {**bound, expr: found})
    yield from match(expr.arg, found, bound)


def _match_all(exprs: Sequence[Any], found: Sequence[Any], bound: Binding) -> Iterator[Binding]:
    if len(exprs) != len(found):
        return
    if not exprs:
        yield bound
        return
    for first in match(exprs[0], found[0], bound):
        yield from _match_all(exprs[1:], found[1:], first)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Node) or isinstance(b, Node):
        return a is b
    return (isinstance(a, bool) == isinstance(b, bool)) and a == b
