"""Graphs replayed on buffers. On a CPU there is no CUDA graph in it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import tinyfuse.backend  # noqa: F401  registers it
from tinyfuse.runtime import replay
from tinyfuse.runtime.replay import MOST, MOST_BYTES, Recorded, Replay


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(replay, "DEVICES", ("cpu",))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x, scale=1):
        return {"y": self.linear(x) * scale + self.shift, "n": x.shape[0]}


def recorded(calls):
    return sum(isinstance(kind, Recorded) for kind in calls.kinds.values())


@pytest.fixture
def made(monkeypatch):
    """What the backend has made, in order."""
    found = []
    init = Replay.__init__
    monkeypatch.setattr(Replay, "__init__", lambda self, *args: (init(self, *args), found.append(self))[0])
    return found


@torch.no_grad()
def test_results_equal_and_earlier_ones_stay(made):
    model = Model().eval()
    compiled = torch.compile(model, backend="tinyfuse")
    kept = []
    for index in range(12):
        x = torch.randn(2 + index % 2, 8)
        kept.append((model(x)["y"], compiled(x)["y"]))
        torch.testing.assert_close(*kept[-1])
    for expected, given in kept:
        torch.testing.assert_close(expected, given)
    assert sum(map(recorded, made)) == 2


@torch.no_grad()
def test_changed_weights_count(made):
    model = Model().eval()
    compiled = torch.compile(model, backend="tinyfuse")
    for change in (
        lambda: None,
        lambda: model.linear.weight.mul_(2),
        lambda: setattr(model.linear.weight, "data", torch.randn(8, 8)),
        lambda: model.load_state_dict(Model().state_dict()),
        lambda: setattr(model.linear, "weight", nn.Parameter(torch.randn(8, 8))),
    ):
        change()
        for _ in range(5):
            x = torch.randn(3, 8)
            torch.testing.assert_close(model(x)["y"], compiled(x)["y"])
        assert recorded(made[-1]) == 1


@torch.no_grad()
def test_the_same_input_again_and_again_is_read_in_place(made):
    model, x = Model().eval(), torch.randn(3, 8)
    compiled = torch.compile(model, backend="tinyfuse")
    for _ in range(5):
        x.add_(1)
        torch.testing.assert_close(model(x)["y"], compiled(x)["y"])
    assert recorded(made[0]) == 1
    for _ in range(5):
        other = torch.randn(3, 8)
        torch.testing.assert_close(model(other)["y"], compiled(other)["y"])
    assert recorded(made[0]) == 1


def test_no_graph_holds_large_arguments_nor_too_many_kinds(monkeypatch):
    calls = Replay(lambda x: (x + 1,), set())
    for size in (MOST_BYTES // 4 + 1, *range(1, MOST + 5)):
        for _ in range(5):
            x = torch.randn(size)
            assert torch.equal(calls(x)[0], x + 1)
    assert recorded(calls) == MOST and len(calls.kinds) == MOST + 5


@torch.no_grad()
def test_what_returns_an_argument_is_not_replayed(made):
    torch.compile(lambda x, y: (x + y, y.view(-1)), backend="tinyfuse")(torch.randn(2, 3), torch.randn(2, 3))
    assert not made


def append(cache, position, x):
    cache.view(-1).index_add_(0, position, x)
    return cache.sum(0) * 2


@torch.no_grad()
def test_what_is_written_is_written_in_place(made):
    """Each cache for 20 calls, as one request after the other has its own."""
    compiled = torch.compile(append, backend="tinyfuse")
    for _ in range(2 * MOST):
        cache, stock = torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)
        for index in range(20):
            position, x = torch.tensor([index % 12]), torch.randn(1)
            assert torch.equal(compiled(cache, position, x), append(stock, position, x))
            assert torch.equal(cache, stock)
        assert recorded(made[-1]) == 1


@torch.no_grad()
def test_recording_ends_where_it_does_not_pay(made):
    compiled = torch.compile(append, backend="tinyfuse")
    for _ in range(2 * MOST):
        cache = torch.zeros(2, 2, 3)
        for index in range(5):
            compiled(cache, torch.tensor([index]), torch.randn(1))
    assert made[-1].left == 0 and not recorded(made[-1])


def test_threads_get_their_own_results():
    calls = Replay(lambda x: (x * 2,), set())

    def work(value):
        x = torch.full((4,), float(value))
        return all(torch.equal(calls(x)[0], x * 2) for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_inference_mode_and_no_grad_by_turns():
    calls = Replay(lambda x: (x * 2,), set())
    for mode in (torch.inference_mode, torch.no_grad) * 4:
        with mode():
            x = torch.randn(4)
            assert torch.equal(calls(x)[0], x * 2)
    assert recorded(calls) == 1


@torch.no_grad()
def test_the_mode_without_cuda_graphs_replays_nothing(made):
    torch.compile(Model().eval(), backend="tinyfuse", mode="max-autotune-no-cudagraphs")(torch.randn(2, 8))
    assert not made
