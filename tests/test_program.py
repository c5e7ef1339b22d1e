"""Replayed runs of CPU kernels give what the calls themselves give, and never on stale memory."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule

from tinyfuse.graph.segments import make_segments
from tinyfuse.kernels import add_rms_norm, kv_append, linear, rms_norm
from tinyfuse.kernels._program import NotReplayable, Program, Segment


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


WEIGHT = torch.randn(512, 512) / 16


def step(x, weight, keys, values, pos):
    """Two linears large enough for two threads, norms and a cache write."""
    y = linear.run_native(rms_norm.run_native(x, None, 1e-5, False, True), weight, None, None, x)
    head = y.view(1, 1, 1, -1)
    kv_append.run_native(keys, values, head, head, pos)
    total, y = add_rms_norm.run_native(y, x, None, 1e-5, False, True)
    return total, linear.run_native(y, weight, None, None, None)


def inputs(position):
    return torch.randn(1, 1, 512), torch.tensor([position])


def caches():
    return torch.zeros(1, 1, 8, 512), torch.zeros(1, 1, 8, 512)


def assert_same(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_replay_repeats_the_calls_on_new_contents():
    x, pos = inputs(0)
    cache = caches()
    program = Program(step, (x, WEIGHT, *cache, pos))
    for position in range(1, 5):
        new, at = inputs(position)
        x.copy_(new)
        pos.copy_(at)
        expected = step(x, WEIGHT, *(c.clone() for c in cache), pos)
        assert_same(program.replay(), expected)
        assert cache[0][0, 0, position].any()


def test_segment_follows_moved_inputs_weights_and_caches():
    segment = Segment(step, frozenset({2, 3}))
    weights = [WEIGHT, WEIGHT * 2]
    kept, holder = [], []
    for round in range(12):
        weight, (cache, twin) = weights[round // 4 % 2], (caches(), caches())
        for position in range(3):
            x, pos = inputs(position)
            holder.append(x)  # so that every call sees another address
            out, expected = segment(x, weight, *cache, pos), step(x, weight, *twin, pos)
            assert_same(out, expected)
            kept.append((out, expected))
        assert_same(cache, twin)
    assert segment.reason is None and segment._programs
    for out, expected in kept:
        assert_same(out, expected)


def test_segment_recorded_in_inference_mode_runs_outside_it():
    segment = Segment(rms_norm.run_native)
    for inference in (True, True, True, False, False):
        with torch.inference_mode(inference):
            x = torch.randn(2, 8)
            args = (x, None, 1e-5, False, True)
            assert torch.equal(segment(*args), rms_norm.run_native(*args))


def test_another_shape_at_the_same_address_is_another_place():
    buffer = torch.randn(9, 96)
    segment = Segment(lambda x: rms_norm.run_native(x, None, 1e-5, False, True), dynamic=frozenset({0}))
    for rows in (4, 4, 4, 7, 7, 7, 4, 9):
        x = buffer[:rows]
        assert torch.equal(segment(x), rms_norm.run_native(x, None, 1e-5, False, True))
    assert len(segment._programs) == 2 and not segment._staged


def test_what_computes_is_not_replayed_but_runs():
    def mixed(x):
        return rms_norm.run_native(x + 1, None, 1e-5, False, True)

    x = torch.randn(2, 8)
    with pytest.raises(NotReplayable, match="add"):
        Program(mixed, (x,))
    segment = Segment(mixed)
    for _ in range(4):
        assert torch.equal(segment(x), mixed(x))
    assert "add" in segment.reason


def test_errors_of_a_replay_are_raised():
    cache = caches()
    x, pos = inputs(0)
    program = Program(step, (x, WEIGHT, *cache, pos))
    pos.fill_(8)
    with pytest.raises(IndexError):
        program.replay()


def test_threads_share_a_segment():
    segment = Segment(step, frozenset({2, 3}))
    failures = []

    def work():
        cache, twin = caches(), caches()
        for position in range(8):
            x, pos = inputs(position)
            out, expected = segment(x, WEIGHT, *cache, pos), step(x, WEIGHT, *twin, pos)
            if not all(torch.equal(a, b) for a, b in zip(out, expected, strict=True)):
                failures.append(position)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def norm(x):
    return rms_norm.run_native(x, None, 1e-5, False, True)


def append(cache, pos):
    kv_append.run_native(cache, cache, torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 8), pos)


def run_with(function, *names):
    """Five norms in a row, a cache write among them, and in their midst ``function`` of the inputs, or of the norms'
    result "y", by their names: its result, and the functions that the graph calls once it has its segments."""
    inputs = {"table": torch.arange(32.0).view(4, 8), "ids": torch.tensor([3, 1]), "pos": torch.tensor([2])}
    inputs |= {"x": torch.randn(2, 8), "cache": torch.zeros(1, 1, 4, 8)}
    graph, nodes = Graph(), {}

    def node(made, example):
        made.meta["example_value"] = example
        return made

    def norms(count):
        for _ in range(count):
            nodes["y"] = node(graph.call_function(norm, (nodes["y"],)), torch.empty(2, 8))
            native.append(nodes["y"])

    for name, example in inputs.items():
        nodes[name] = node(graph.placeholder(name), example)
    native, nodes["y"] = [], nodes["x"]
    norms(2)
    native.append(node(graph.call_function(append, (nodes["cache"], nodes["pos"])), None))
    written = {native[-1]: [nodes["cache"]]}
    norms(1)
    made = node(graph.call_function(function, tuple(map(nodes.__getitem__, names))), torch.empty(2, 8))
    norms(2)
    graph.output((made, nodes["y"]))
    make_segments(graph, set(native), written)
    result, _ = GraphModule(torch.nn.Module(), graph)(*inputs.values())
    return result, [n.target.__name__ for n in graph.nodes if n.op == "call_function"]


def test_what_needs_nothing_of_a_run_goes_before_it():
    rows, calls = run_with(F.embedding, "ids", "table")
    assert calls[:2] == ["embedding", "tinyfuse_segment"]
    assert rows[:, 0].tolist() == [24, 8]
    kept, calls = run_with(torch.clone, "cache")  # which the run writes
    assert "tinyfuse_segment" not in calls and kept[0, 0, 2].eq(1).all()
    for function, *names in ((torch.neg, "y"), (torch.relu_, "table")):
        assert "tinyfuse_segment" not in run_with(function, *names)[1]
