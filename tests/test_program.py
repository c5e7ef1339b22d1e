"""Replayed runs of CPU kernels give what the calls themselves give, and never on stale memory."""

import threading

import pytest
import torch

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
