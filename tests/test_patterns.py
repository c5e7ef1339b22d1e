"""Generated from the patterns themselves: every alternate matches and equals its replacement, and every mutation of one
(a moved cast, another constant, a dropped op, an extra user) either fails to match or still equals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from tests.graphs import Built
from tinyfuse.graph.library import all_patterns
from tinyfuse.graph.nodes import value
from tinyfuse.graph.pattern import Call, Capture, Cast, Expr, Pattern, children, rebuild, walk

PATTERNS = all_patterns()


def targets_of(pattern: Pattern) -> list[Any]:
    return [e.target for root in pattern.roots for e in walk(root) if isinstance(e, Call)]


# In torch functions alone: what an op of ours is given has the shapes that it says.
SPELLED = [p for p in PATTERNS if p.stage == "lift" and not any("tinyfuse" in str(t) for t in targets_of(p))]
ALTERNATES = [pytest.param(p, roots, id=f"{p.name}-{i}") for p in PATTERNS for i, roots in enumerate(p.alternates())]


def example_of(pattern: Pattern) -> dict[str, Any]:
    torch.manual_seed(0)
    return pattern.example()


def assert_equal(before: Built, after: Built) -> None:
    """Outputs and inputs left behind agree to a few roundings of their dtype."""
    for expected, got in zip(_flat(before.run()), _flat(after.run()), strict=True):
        assert expected.dtype == got.dtype and expected.shape == got.shape
        bound = 4 * torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0
        torch.testing.assert_close(got, expected, rtol=bound, atol=bound * float(expected.double().abs().max()))


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _flat(v)]
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.parametrize(("pattern", "roots"), ALTERNATES)
def test_every_alternate_matches_and_equals_its_replacement(pattern: Pattern, roots: tuple[Expr, ...]) -> None:
    example = example_of(pattern)
    stock, fused = Built(roots, example), Built(roots, example)
    outcome = fused.rewrite([pattern])
    assert outcome.hits == {pattern.name: 1}, outcome.declined
    assert_equal(stock, fused)


def mutations(roots: tuple[Expr, ...]) -> Iterator[tuple[str, tuple[Expr, ...]]]:
    """Every graph that differs from ``roots`` by one dropped op, one constant or one added rounding."""
    inner = list(dict.fromkeys(e for r in roots for e in walk(r) if isinstance(e, (Call, Cast))))
    for number, target in enumerate(inner):
        for position, child in enumerate(children(target)):
            if isinstance(child, Expr):
                yield f"drop-{number}-{position}", _edit(roots, target, lambda e, c=child: c)
                if isinstance(target, Call):
                    rounded = Cast(child, torch.float16)
                    yield f"round-{number}-{position}", _edit(roots, target, _with_arg(position, rounded))
            elif isinstance(child, (int, float)) and isinstance(target, Call):
                for other in (child + 1, -child):
                    yield f"constant-{number}-{position}-{other}", _edit(roots, target, _with_arg(position, other))


def _with_arg(position: int, value: Any):
    return lambda e: Call(e.target, (*e.args[:position], value, *e.args[position + 1 :]), e.shared)


def _edit(roots: tuple[Expr, ...], target: Expr, change) -> tuple[Expr, ...]:
    done: dict[int, Any] = {}

    def visit(expr: Any) -> Any:
        if expr is target and id(expr) not in done:
            done[id(expr)] = change(expr)
        return rebuild(expr, visit, done)

    return tuple(visit(r) for r in roots)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_no_mutation_is_rewritten_into_something_else(pattern: Pattern) -> None:
    example, tried = example_of(pattern), 0
    for roots in pattern.alternates()[:2]:
        for name, mutant in mutations(roots):
            try:
                stock = Built(mutant, example)
                stock.run()
            except Exception:
                continue  # not a program: the shapes no longer fit
            tried += 1
            fused = Built(mutant, example)
            if fused.rewrite([pattern]).hits:
                try:
                    assert_equal(stock, fused)
                except AssertionError as error:
                    raise AssertionError(f"{pattern.name}: mutation {name} matches but differs") from error
    assert tried


def broadcasts(example: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every example that differs in one tensor, or in all but one, by having one entry along a dim or no such dim."""
    tensors = {name: given for name, given in example.items() if isinstance(given, torch.Tensor)}
    for name, given in tensors.items():
        others = [other for other in tensors if other != name and tensors[other].dim() == given.dim()]
        for dim in range(given.dim()):
            yield f"{name} of one along {dim}", {name: given.narrow(dim, 0, 1)}
            yield f"all but {name} of one along {dim}", {other: tensors[other].narrow(dim, 0, 1) for other in others}
        if given.dim() > 1:
            yield f"{name} without its first dim", {name: given[0]}
            yield f"{name} of its last dim alone", {name: given.reshape(-1, given.shape[-1])[0]}


@pytest.mark.parametrize("pattern", SPELLED, ids=lambda p: p.name)
def test_what_broadcasts_is_left_alone_or_equal(pattern: Pattern) -> None:
    roots, example = pattern.alternates()[0], example_of(pattern)
    for name, other in broadcasts(example):
        try:
            fused, stock = Built(roots, example | other), Built(roots, example | other)
        except Exception:
            continue  # not a program: the shapes do not fit
        if not fused.rewrite([pattern]).hits:
            continue
        try:
            expected = _flat(stock.run())
        except Exception:
            continue  # nor is this, which fake tensors let pass
        shapes = [value(node).shape for node in fused.graph.output_node().all_input_nodes]
        assert shapes == [value(node).shape for node in stock.graph.output_node().all_input_nodes], name
        for mine, theirs in zip(_flat(fused.run()), expected, strict=True):
            torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.size > len(p.roots)], ids=lambda p: p.name)
def test_an_inner_value_that_is_used_elsewhere_is_kept(pattern: Pattern) -> None:
    roots, example = pattern.alternates()[0], example_of(pattern)
    inner = list(dict.fromkeys(e for r in roots for e in walk(r) if isinstance(e, Call) and e not in roots))
    for extra in inner:
        stock, fused = Built(roots, example, [extra]), Built(roots, example, [extra])
        fused.rewrite([pattern])
        assert_equal(stock, fused)


@pytest.mark.parametrize("other", [{"slope": 0.8}, {"cubic": 0.0447}])
@pytest.mark.parametrize("name", ["linear_gelu_tanh", "gated_gelu_tanh"])
def test_a_cubic_that_is_not_that_of_gelu_is_left_alone(name: str, other: dict[str, float]) -> None:
    pattern = next(p for p in PATTERNS if p.name == name)
    for roots in pattern.alternates()[-2:]:  # the two written out
        assert not Built(roots, example_of(pattern) | other).rewrite([pattern]).hits


class Computed(Built):
    """One number of the example is computed, as sizes that move from call to call are."""

    def __init__(self, roots, example: dict[str, Any], name: str):
        self.name = name
        super().__init__(roots, example)

    def _emit(self, expr: Any) -> Any:
        if not isinstance(expr, Capture) or expr.name != self.name:
            return super()._emit(expr)
        if self.name not in self.made:
            node = self.graph.placeholder(self.name)
            node.meta["example_value"] = symbol(self.captured[self.name])
            self.made[self.name] = node
        return self.made[self.name]


def symbol(number: float) -> torch.SymInt | torch.SymFloat:
    shape_env, source = ShapeEnv(), ConstantSource("number")
    made = shape_env.create_unspecified_symbol(number, source, DimDynamic.DYNAMIC)
    node = shape_env.create_symintnode if isinstance(number, int) else shape_env.create_symfloatnode
    return node(made, hint=number, source=source)


NUMBERS = [
    pytest.param(pattern, name, id=f"{pattern.name}-{name}")
    for pattern in PATTERNS
    for root in pattern.roots
    for name in {e.name: e for e in walk(root) if isinstance(e, Capture) and e.kind == "scalar"}
]


@pytest.mark.parametrize(("pattern", "name"), NUMBERS)
def test_a_number_that_is_computed(pattern: Pattern, name: str) -> None:
    """It matches or it does not, but the rest of the graph is rewritten."""
    for roots in pattern.alternates()[:2]:
        Computed(roots, example_of(pattern), name).rewrite([pattern])
