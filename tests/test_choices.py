"""Kernels chosen by time, and the file that remembers it."""

import json
import logging
import os

import pytest
import torch
from torch import nn

from tinyfuse import choices, fallback
from tinyfuse.backend import backend
from tinyfuse.choices import Choices, describe
from tinyfuse.kernels import kv_append, rms_norm
from tinyfuse.op import Kernel, Op


class Clock:
    """A timer that reads milliseconds off the calls; ``calls`` counts them."""

    def __init__(self):
        self.calls = 0

    def __call__(self, call):
        self.calls += 1
        return call()


FAST_KERNEL = {"triton": lambda: 1.0, "reference": lambda: 2.0}
FAST_STOCK = {"triton": lambda: 2.0, "reference": lambda: 1.0}


def test_the_fastest_is_measured_once_and_kept(tmp_path):
    path, clock = tmp_path / "new" / "choices.json", Clock()
    first = Choices(path, clock)
    assert first.fastest("a", FAST_KERNEL) == "triton" and first.fastest("b", FAST_STOCK) == "reference"
    assert first.fastest("a", FAST_KERNEL) == "triton" and clock.calls == 4
    assert Choices(path, clock).fastest("b", FAST_KERNEL) == "reference" and clock.calls == 4
    assert Choices(path, clock).fastest("b", {"other": lambda: 1.0}) == "other", "the kept one exists no more"
    assert [file.name for file in path.parent.iterdir()] == ["choices.json"]


def test_a_tie_goes_to_the_kernel(tmp_path):
    assert Choices(tmp_path / "c.json", lambda call: 1.0).fastest("a", FAST_STOCK) == "triton"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 3}', '"a"', "\0\1"])
def test_a_damaged_file_is_ignored_with_one_warning(tmp_path, caplog, text):
    path = tmp_path / "choices.json"
    path.write_text(text)
    kept = Choices(path, Clock())
    assert kept.fastest("a", FAST_KERNEL) == "triton" and kept.fastest("b", FAST_STOCK) == "reference"
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and str(path) in warnings[0].message
    assert json.loads(path.read_text()) == {"a": "triton", "b": "reference"}


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    kept = Choices(tmp_path / "file" / "choices.json", Clock())
    assert [kept.fastest(name, FAST_STOCK) for name in "aab"] == ["reference"] * 3
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("TINYFUSE_CACHE" in message for message in warnings) == 1


def test_a_disk_that_is_full_is_not_littered(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert Choices(tmp_path / "choices.json", Clock()).fastest("a", FAST_STOCK) == "reference"
    assert not list(tmp_path.iterdir())


def test_what_is_finished_survives_a_kill(tmp_path):
    path = tmp_path / "choices.json"
    kept = Choices(path, Clock())
    kept.fastest("a", FAST_STOCK)

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.fastest("b", {"triton": lambda: 1.0, "reference": killed})
    assert json.loads(path.read_text()) == {"a": "reference"}


def test_two_processes_keep_each_others_results(tmp_path):
    path = tmp_path / "choices.json"
    one, other = Choices(path, Clock()), Choices(path, Clock())
    one.fastest("a", FAST_STOCK)
    other.fastest("b", FAST_STOCK)
    assert json.loads(path.read_text()).keys() == {"a", "b"}


def test_names_tell_shapes_dtypes_and_orders_apart():
    x, w = torch.ones(3, 100), torch.ones(7, 100)
    names = {
        describe("f", args, ()) for args in ((x, w), (x.half(), w), (x.mT, w), (w, x), (x, [w]), (x, None), (x, 2))
    }
    assert len(names) == 7
    lengths = [describe("f", (torch.ones(1, n, 100), w), (0,)) for n in (65, 100, 128, 129)]
    assert len(set(lengths)) == 2 and lengths[0] == lengths[2]


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Kernels are chosen by time, and every candidate's is what ``times`` holds for it."""
    times = {}
    kept = Choices(tmp_path / "choices.json", None)
    monkeypatch.setattr(choices, "measures", lambda device: True)
    monkeypatch.setattr(choices, "of", lambda device: kept)
    kept.timer = lambda call: times.get(call.args[0].name if isinstance(call.args[0], Kernel) else "stock", 1.0)
    kept.times = times
    return kept


def make(pure=True):
    kernels = [Kernel(name, "cpu", lambda x: None, lambda x, name=name: (name, x)) for name in ("first", "second")]
    return Op("double", lambda x: ("reference", x), lambda x: x, kernels, pure)


@pytest.mark.parametrize(("fast", "runs"), [("first", "first"), ("second", "second"), ("stock", "reference")])
def test_an_op_runs_what_is_fastest(timed, fast, runs):
    timed.times[fast] = 0.5
    op, x = make(), torch.ones(2)
    assert [op(x)[0], op(x)[0]] == [runs, runs] and len(timed.known) == 1


def test_an_op_that_writes_its_arguments_is_not_tried_out(timed):
    timed.times["second"] = 0.5
    assert make(pure=False)(torch.ones(2))[0] == "first" and not timed.known
    assert not kv_append.OP.pure and rms_norm.OP.pure


def test_a_kernel_that_fails_while_it_is_timed_is_not_chosen(timed, monkeypatch):
    monkeypatch.setattr(fallback, "mode", "warn")
    op = make()

    def broken(x):
        raise RuntimeError("no such instruction")

    op.kernels = [Kernel("first", "cpu", lambda x: None, broken)]
    timed.timer = lambda call: (call(), 1.0)[1]
    assert op(torch.ones(2))[0] == "reference"


def test_choices_may_be_cleared_by_another_thread():
    class Cleared(dict):
        """As if one came between any two looks."""

        def __contains__(self, key):
            found = super().__contains__(key)
            self.clear()
            return found

    op, x = make(), torch.ones(2)
    op.chosen = Cleared()
    assert [op(x)[0], op(x)[0]] == ["first", "first"]


def test_no_kernel_is_given_up_for_an_empty_tensor():
    """Of a batch of none, which divides by its programs, or of rows of no width."""
    op = make()
    op.kernels = [Kernel("first", "cpu", lambda x: None, lambda x: 1 // x.numel())]
    assert op(torch.ones(0, 4))[0] == "reference" and not op.broken


def test_a_choice_is_not_that_of_other_alignment():
    """Weights that are parts of one buffer, as sharding lays them out."""
    op, buffer = make(), torch.ones(64)
    op.kernels = [Kernel("first", "cpu", lambda x: "unaligned" if x.storage_offset() % 16 else None, op.kernels[0].run)]
    assert [op(buffer[start : start + 8])[0] for start in (0, 3, 16)] == ["first", "reference", "first"]


def test_a_graph_of_fixed_shapes_leaves_the_choice_to_its_first_call(timed):
    timed.times["stock"] = 0.5
    model = nn.Sequential(nn.RMSNorm(16), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4)).eval()
    x = torch.randn(3, 16)
    with torch.no_grad():
        out = torch.compile(model, backend=backend)(x)
        torch.testing.assert_close(out, model(x))
    assert timed.known and set(timed.known.values()) == {"reference"}
