"""Where a model's work is: every linear, attention, norm, rope and activation of a Dynamo graph.

The detector reads the graph as Dynamo traced it, by the names of operations and the flow of values alone. It shares
nothing with the patterns, so what the patterns miss is still found, and reported as not fused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Graph, Node

WRITTEN_OUT = " written out"
KINDS = ("linear", "attention", "rms_norm", "layer_norm", "rope", "activation")

_PRODUCTS = {"matmul", "mm", "bmm", "baddbmm", "addmm"}
_GROUPED = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
_CASTS = {"to", "float", "half", "bfloat16", "type", "type_as", "dequantize"}
_SHAPES = {
    "view", "reshape", "transpose", "permute", "contiguous", "expand", "unsqueeze", "squeeze", "flatten", "getitem",
    "chunk", "split", "unbind", "t", "getattr", "repeat", "clone", "swapaxes",
}  # fmt: skip
_PASSIVE = _CASTS | _SHAPES | {"dropout", "clamp", "masked_fill"}
_SUMS = {"add", "iadd", "add_"}
_SCORES = _PASSIVE | _SUMS | {
    "mul", "imul", "truediv", "itruediv", "div", "sub", "where", "masked_fill", "masked_fill_", "tanh", "cat", "amax",
    "maximum",
}  # fmt: skip
_ROTATIONS = _SHAPES | _CASTS | {"cat", "stack", "neg"}
_ACTIVATIONS = {"silu", "gelu", "relu", "relu6", "mish", "leaky_relu", "elu", "hardswish", "softplus"}
_AFTER = _CASTS | {"dropout", "pow", "square"}  # what may follow an activation: relu squared is one
_STATISTICS = {"mean", "var", "sum", "var_mean"}


@dataclass(frozen=True)
class Anchor:
    """One site: ``node`` is the one that a rewriting replaces or covers, ``module`` the path of the module it came
    from, as in ``named_modules()``, ``detail`` the spelling where a kind has several."""

    kind: str
    node: Node
    module: str
    detail: str = ""


def find_anchors(graph: Graph) -> list[Anchor]:
    """All anchors of a Dynamo graph, in its order."""
    found = [anchor for node in graph.nodes for anchor in _anchors_at(node)]
    return [Anchor(kind, node, module_path(node), detail) for kind, node, detail in found]


def module_path(node: Node) -> str:
    """The module that ``node`` was traced in; empty for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    path = path.replace(".forward.runtime.model", "")  # a part that was optimised by itself
    return re.sub(r"^[GL]\['\w+'\](\.(__self__|_orig_mod))*\.?", "", path)


def _anchors_at(node: Node) -> Iterator[tuple[str, Node, str]]:
    if node.op not in ("call_function", "call_method"):
        return
    for kind, detail in (
        ("linear", _linear(node)),
        ("attention", _attention(node)),
        (_norm_kind(node), _norm(node)),
        ("rope", _rope(node)),
        ("activation", _activation(node)),
    ):
        if detail is not None:
            yield kind, node, detail


def _name(node: Node) -> str:
    """What a node does, whether it is spelled as a method, an operator or a function."""
    return _called(node.target) if node.op in ("call_function", "call_method") else node.op


@lru_cache(4096)
def _called(target: Any) -> str:
    name = target if isinstance(target, str) else getattr(target, "__name__", None) or str(target)
    return name.partition(".")[0]


def _upstream(node: Node, through: Collection[str]) -> list[Node]:
    """``node`` if it is not in ``through``, else the first nodes above it that are not."""
    return _first([node], through, lambda n: n.all_input_nodes)


def _downstream(node: Node, through: Collection[str]) -> list[Node]:
    """The first users below ``node`` that are not in ``through``."""
    return _first(list(node.users), through, lambda n: n.users)


def _first(frontier: list[Node], through: Collection[str], beyond: Callable[[Node], Iterable[Node]]) -> list[Node]:
    found, seen = [], set(frontier)
    while frontier:
        node = frontier.pop()
        if _name(node) not in through:
            found.append(node)
            continue
        more = [n for n in beyond(node) if n not in seen]
        seen.update(more)
        frontier += more
    return found


def _is_parameter(node: Node) -> bool:
    return node.op in ("placeholder", "get_attr") and isinstance(node.meta.get("example_value"), torch.nn.Parameter)


def _linear(node: Node) -> str | None:
    name = _name(node)
    if name == "linear":
        return ""
    if name in _GROUPED:
        return "experts"
    if name in _PRODUCTS and any(_is_parameter(n) for a in node.all_input_nodes for n in _upstream(a, _PASSIVE)):
        return name
    return None


def _scores(node: Node) -> bool:
    return _name(node) in _PRODUCTS and _linear(node) is None


def _attention(node: Node) -> str | None:
    if _name(node) == "scaled_dot_product_attention":
        return "sdpa"
    if _name(node) not in ("softmax", "_softmax"):
        return None
    before = any(map(_scores, _upstream(node.all_input_nodes[0], _SCORES)))
    after = any(map(_scores, _downstream(node, _PASSIVE | {"mul"})))
    if not (before and after):
        return None
    capped = any(_name(n) == "tanh" for n in _upstream(node.all_input_nodes[0], _SCORES - {"tanh"}))
    return "softmax, softcap" if capped else "softmax"


def _norm(node: Node) -> str | None:
    name = _name(node)
    if name in ("layer_norm", "rms_norm", "rsqrt"):
        return name
    if name == "pow" and node.args[1:] == (-0.5,):
        return "pow"
    if name == "sqrt" and any(_name(n) in _STATISTICS for n in _upstream(node.all_input_nodes[0], _SUMS | _CASTS)):
        return "sqrt"
    return None


def _norm_kind(node: Node) -> str:
    """LayerNorm takes the mean off before it squares."""
    if _name(node) == "layer_norm":
        return "layer_norm"
    squares = _SUMS | _CASTS | {"pow", "square", "mean", "rsqrt", "sqrt"}
    squared = list(_upstream(node, squares)) if _name(node) in squares else []
    centred = any(_name(n) == "sub" and any(_name(s) == "mean" for s in n.all_input_nodes) for n in squared)
    return "layer_norm" if centred or any(_name(n) in ("var", "var_mean") for n in squared) else "rms_norm"


def _rope(node: Node) -> str | None:
    if _name(node) in _SUMS:
        first, second = _two_products(node)
        for x_side, r_side in ((first, second), (second, first)):
            if any(_rotates(r, x) for x in x_side for r in r_side):
                return "rotate"
    elif _name(node) in ("cat", "stack"):
        return "halves" if _turns_halves(node) else None
    elif _name(node) in ("mul", "multiply"):
        complex_in = any(_name(n) == "view_as_complex" for a in node.all_input_nodes for n in _upstream(a, _SHAPES))
        complex_out = any(_name(n) == "view_as_real" for n in _downstream(node, _SHAPES))
        return "complex" if complex_in and complex_out else None
    return None


def _two_products(node: Node) -> tuple[list[Node], list[Node]]:
    """The factors of both terms of a sum or difference of two products."""
    terms = [a for a in node.args if isinstance(a, Node) and _name(a) in ("mul", "imul")]
    if len(terms) != 2 or any(len(t.all_input_nodes) != 2 for t in terms):
        return [], []
    return terms[0].all_input_nodes, terms[1].all_input_nodes


def _rotates(r: Node, x: Node) -> bool:
    """Whether ``r`` holds the entries of ``x`` in another order, some with the other sign."""
    source = _upstream(x, _CASTS)[0]
    negated = False

    def only_source(node: Node, depth: int = 8) -> bool:
        nonlocal negated
        if node in (x, source):
            return True
        if _name(node) not in _ROTATIONS or depth == 0:
            return False
        negated |= _name(node) == "neg"
        return all(only_source(n, depth - 1) for n in node.all_input_nodes)

    return _name(r) in _ROTATIONS and r not in (x, source) and only_source(r) and negated


def _turns_halves(node: Node) -> bool:
    """``[a * cos - b * sin, b * cos + a * sin]``."""
    parts = node.args[0] if node.args and isinstance(node.args[0], (tuple, list)) else ()
    if [_name(p) for p in parts if isinstance(p, Node)] != ["sub", "add"]:
        return False
    minus, plus = (_two_products(p) for p in parts)
    factors = [frozenset((*terms[0], *terms[1])) for terms in (minus, plus)]
    return factors[0] == factors[1] and len(factors[0]) == 4


def _activation(node: Node) -> str | None:
    """The name of the activation whose gated result ``node`` is, or which ``node`` applies between two linears."""
    if _name(node) in ("mul", "imul") and len(node.all_input_nodes) == 2:
        for act, gated in (node.all_input_nodes, node.all_input_nodes[::-1]):
            named = [(_plain(n), n) for n in _upstream(act, _AFTER)]
            if any(name and _comes_from_linear(n) for name, n in named) and _is_linear_output(gated):
                return f"gated {named[0][0]}"
    name = _plain(node)
    if name is None or any(_is_gate(node, user) for user in _downstream(node, _AFTER)):
        return None
    feeds = any(map(_is_linear, _downstream(node, _PASSIVE | {"pow", "square", "mul"})))
    return name if feeds and _comes_from_linear(node) else None


def _is_gate(act: Node, user: Node) -> bool:
    return (
        _name(user) in ("mul", "imul")
        and len(user.all_input_nodes) == 2
        and any(_is_linear_output(n) for n in user.all_input_nodes if act not in _upstream(n, _AFTER))
    )


def _is_linear(node: Node) -> bool:
    return _linear(node) is not None


def _is_linear_output(node: Node) -> bool:
    return any(map(_is_linear, _upstream(node, _PASSIVE | _SUMS)))


def _comes_from_linear(act: Node) -> bool:
    return any(
        _is_linear_output(n) for n in _upstream(act, _ACTIVATIONS | {"mul", "add", "pow", "tanh", "erf", "sigmoid"})
    )


def _plain(node: Node) -> str | None:
    """The activation that ``node`` is the result of: a function, or written out."""
    name = _name(node)
    if name in _ACTIVATIONS:
        return "gelu_tanh" if name == "gelu" and "tanh" in (*node.args, *node.kwargs.values()) else name
    if name != "mul" or len(node.all_input_nodes) != 2:
        return None
    for left, right in (node.all_input_nodes, node.all_input_nodes[::-1]):
        if _name(right) == "sigmoid" and left in _upstream(right, {"sigmoid", "mul"}):
            return "silu" + WRITTEN_OUT
        if _name(right) == "add" and len(right.all_input_nodes) == 1:
            (inner,) = right.all_input_nodes
            sources = set(_upstream(left, {"mul", "truediv"}))
            if _name(inner) in ("tanh", "erf") and sources & set(
                _upstream(inner, {"tanh", "erf", "mul", "add", "pow", "truediv"})
            ):
                return ("gelu_tanh" if _name(inner) == "tanh" else "gelu") + WRITTEN_OUT
    return None
