"""Equal views are shared, counters advance together, and nothing that writes in place is mistaken for either."""

from __future__ import annotations

import operator

import torch
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

import tinyfuse.kernels.linear
import tinyfuse.kernels.rms_norm  # noqa: F401
from tests.graphs import Built
from tinyfuse.graph.lower import reads_too_early
from tinyfuse.graph.nodes import writes
from tinyfuse.graph.normalize import normalize
from tinyfuse.graph.pattern import call, tensor
from tinyfuse.graph.rewrite import op_of
from tinyfuse.graph.share import share_common
from tinyfuse.graph.tidy import batch_counters, bound_masks, drop_dead

x, y = tensor("x y")


def targets(built: Built) -> list:
    return [n.target for n in built.graph.nodes if n.op in ("call_function", "call_method")]


def test_equal_views_become_one() -> None:
    first, second = call(torch.transpose, x, 0, 1), call(torch.transpose, x, 0, 1)
    built = Built([first + y, second * y], {"x": torch.randn(3, 3), "y": torch.randn(3, 3)})
    expected, _ = built.run()
    share_common(built.graph)
    assert targets(built).count(torch.transpose) == 1
    torch.testing.assert_close(built.run()[0], expected)


def test_an_arange_that_is_written_in_place_is_not_shared() -> None:
    first, second = call(torch.arange, 3), call(torch.arange, 3)
    written = call(torch.Tensor.add_, first, 1)
    built = Built([written, second + x], {"x": torch.randn(3)})
    expected, _ = built.run()
    share_common(built.graph)
    assert targets(built).count(torch.arange) == 2
    torch.testing.assert_close(built.run()[0], expected)


def test_equal_copies_become_one_unless_one_is_written() -> None:
    for write in (False, True):
        first, second = (call(torch.cat, (x, x), 0) for _ in range(2))
        roots = [call(torch.Tensor.add_, first, 1) if write else first + y, second * y]
        built = Built(roots, {"x": torch.randn(3, 3), "y": torch.randn(6, 3)})
        expected, _ = built.run()
        share_common(built.graph)
        assert targets(built).count(torch.cat) == 2
        share_common(built.graph, copies=True)
        assert targets(built).count(torch.cat) == (2 if write else 1)
        torch.testing.assert_close(built.run()[0], expected)


def test_what_a_triton_kernel_of_the_model_takes_counts_as_written() -> None:
    """Liger's kernels write their results into what they are given."""
    built = Built([call(torch.cat, (x, x), 0), call(torch.cat, (x, x), 0)], {"x": torch.randn(3, 3)})
    first, second = (node for node in built.graph.nodes if node.target is torch.cat)
    with built.graph.inserting_after(second):
        arguments = {"kernel_idx": 0, "grid": [(1, 1, 1)], "kwargs": {"read": second, "written": first, "size": 3}}
        launch = built.graph.call_function(triton_kernel_wrapper_mutation, (), arguments)
    assert writes(launch) == [second, first]
    normalize(built.graph)
    share_common(built.graph, copies=True)
    drop_dead(built.graph)
    assert targets(built) == [torch.cat, torch.cat, triton_kernel_wrapper_mutation]


def counting(step: int, layers: int = 3) -> Built:
    names = [f"c{i}" for i in range(layers)]
    built = Built(
        [call(torch.arange, 1) + tensor(n) for n in names], {n: torch.tensor(5 + i) for i, n in enumerate(names)}
    )
    output = next(n for n in built.graph.nodes if n.op == "output")
    for node in built.graph.find_nodes(op="placeholder"):
        with built.graph.inserting_before(output):
            built.graph.call_method("add_", (node, step))
    return built


def test_counters_advance_in_one_launch() -> None:
    built = counting(step=1)
    expected = built.run()
    share_common(built.graph)
    batch_counters(built.graph)
    drop_dead(built.graph)
    built.graph.lint()
    assert targets(built).count(torch.ops.tinyfuse.step_counters.default) == 1
    assert torch.arange not in targets(built) and "add_" not in targets(built)
    got = built.run()
    assert [t.tolist() for t in got[0]] == [t.tolist() for t in expected[0]] == [[5], [6], [7]]
    assert [t.item() for t in got[1]] == [t.item() for t in expected[1]] == [6, 7, 8]


def test_positions_in_rings_come_from_the_same_launch() -> None:
    names = ["c0", "c1", "c2"]
    position = [call(torch.arange, 1) + tensor(n) for n in names]
    wrapped = [call(torch.remainder, position[0], 4), position[1], call(torch.remainder, position[2], 7)]
    built = Built(wrapped, {n: torch.tensor(5 + i) for i, n in enumerate(names)})
    output = next(n for n in built.graph.nodes if n.op == "output")
    for node in built.graph.find_nodes(op="placeholder"):
        with built.graph.inserting_before(output):
            built.graph.call_method("add_", (node, 1))
    batch_counters(built.graph)
    drop_dead(built.graph)
    built.graph.lint()
    assert torch.remainder not in targets(built) and "add_" not in targets(built)
    got = built.run()
    assert [t.tolist() for t in got[0]] == [[1], [6], [0]]
    assert [t.item() for t in got[1]] == [6, 7, 8]


def test_counters_that_step_further_are_left_alone() -> None:
    built = counting(step=2)
    share_common(built.graph)
    batch_counters(built.graph)
    assert targets(built).count("add_") == 3


def test_the_bounds_of_a_mask_are_found_once() -> None:
    captures = {name: tensor(name) for name in ("q", "k", "v", "cos", "keys", "more", "values", "pos", "mask")}
    q, k, v, cos, keys, more, values, pos, mask = captures.values()

    def attended(keys: object) -> object:
        args = q, k, v, cos, cos, keys, values, pos, False, mask, 0.5
        return call(torch.ops.tinyfuse.rope_append_attention.default, *args)

    example = {"q": torch.randn(2, 4, 1, 8), "k": torch.randn(2, 2, 1, 8), "v": torch.randn(2, 2, 1, 8)}
    example |= {name: torch.randn(2, 2, 9, 8) for name in ("keys", "more", "values")}
    example |= {"cos": torch.randn(2, 1, 1, 8), "pos": torch.tensor([3]), "mask": torch.rand(2, 1, 1, 9) < 0.7}
    built = Built([attended(keys), attended(more)], example)
    expected = built.run()
    bound_masks(built.graph)
    assert torch.ops.tinyfuse.mask_bounds.default not in targets(built), "the CPU has no use for them"
    bound_masks(built.graph, "cpu")
    built.graph.lint()
    assert targets(built).count(torch.ops.tinyfuse.mask_bounds.default) == 1
    for got, want in zip(built.run()[0], expected[0], strict=True):
        assert torch.equal(got, want)


def test_a_product_does_not_read_ahead_what_a_kernel_makes() -> None:
    """Of two results of kernels, and by a view of one; a parameter and what stock torch makes are there in time."""
    linear, norm, w = torch.ops.tinyfuse.linear.default, torch.ops.tinyfuse.rms_norm.default, tensor("w")
    example = {"x": torch.randn(4, 4), "w": torch.randn(4, 4)}
    made = call(norm, w, None, 1e-6, False, True)
    view = call(torch.transpose, call(torch.transpose, made, 0, 1), 0, 1)
    weights = [w, made, view, w * 2.0]
    products = [call(linear, x, weight, None, None, None) for weight in weights]
    built = Built([*products, call(linear, made, w, None, None, made)], example)
    ops = {node: op for node in built.graph.nodes if (op := op_of(node)) is not None}
    found = [reads_too_early(op, node, ops, "cpu") for node, op in ops.items() if op.name == "linear"]
    assert found == [False, True, True, False, False]
    assert not any(reads_too_early(op, node, ops) for node, op in ops.items()), "the CPU runs one after the other"


def test_views_have_one_spelling() -> None:
    full = slice(None)
    views = [
        call(torch.permute, x, (0, 2, 1, 3)),
        call(operator.getitem, x, (full, full, full, slice(2))),
        call(torch.permute, x, (0, 2, 3, 1)),
        call(operator.getitem, x, (full, full, slice(2))),
    ]
    built = Built([v + 1 for v in views], {"x": torch.randn(2, 3, 5, 4)})
    expected, _ = built.run()
    normalize(built.graph)
    made = [n for n in built.graph.nodes if n.target in (torch.transpose, torch.permute, operator.getitem)]
    assert [n.args[1:] for n in made] == [(1, 2), ((..., slice(2)),), ((0, 2, 3, 1),), ((full, full, slice(2)),)]
    for got, right in zip(built.run()[0], expected, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=0)


def test_an_unused_result_of_several_vanishes() -> None:
    best = call(torch.max, x, 1, True)
    values, where = (call(operator.getitem, best, i) for i in range(2))
    for outputs, items in ([values + 1], 1), ([values + 1, where + 1], 2):
        built = Built(outputs, {"x": torch.randn(2, 3)}, [where])
        output = next(n for n in built.graph.nodes if n.op == "output")
        output.args = (output.args[0][: len(outputs)],)
        expected, _ = built.run()
        normalize(built.graph)
        assert targets(built).count(operator.getitem) == items
        for got, right in zip(built.run()[0], expected, strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=0)
