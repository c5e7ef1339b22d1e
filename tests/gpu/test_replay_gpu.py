"""Forwards as CUDA graphs: equal to eager code, safe, and gone when they are dropped."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import BertConfig, BertModel, CompileConfig, LlamaConfig, LlamaForCausalLM

from tests.tolerance import LOGITS, error
from tests.zoo import encoders
from tinyfuse import fallback
from tinyfuse.api import optimize, restore
from tinyfuse.runtime import replay
from tinyfuse.runtime.captured import Captured
from tinyfuse.runtime.replay import MOST, Recorded, Replay

pytestmark = pytest.mark.gpu

SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


@pytest.fixture
def made(monkeypatch):
    """The CUDA graphs made."""
    found = []
    init = Recorded.__init__

    def noted(self, *args):
        init(self, *args)
        assert isinstance(self.run, Captured)
        found.append(self)

    monkeypatch.setattr(Recorded, "__init__", noted)
    return found


def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZE)).eval().cuda()


def inputs(length, batch=2):
    ids = torch.randint(0, 96, (batch, length), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("how", ["optimize", "backend"])
@torch.no_grad()
def test_an_encoder_replays_each_length(made, how):
    model = bert()
    fast = copy.deepcopy(model)
    fast = optimize(fast) if how == "optimize" else torch.compile(fast, backend="tinyfuse")
    kept = []
    for index in range(15):
        given = inputs((9, 17, 30)[index % 3])
        kept.append((model(**given).last_hidden_state, fast(**given).last_hidden_state))
    for expected, result in kept:  # no later call has changed what an earlier one returned
        assert error(result, expected.double()) < LOGITS
    assert len(made) == 3


@torch.no_grad()
def test_threads_on_streams_of_their_own(made):
    model = bert()
    fast = optimize(copy.deepcopy(model))

    def work(seed):
        torch.manual_seed(seed)
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            worst = 0.0
            for _ in range(20):
                given = inputs(12)
                worst = max(worst, error(fast(**given).last_hidden_state, model(**given).last_hidden_state.double()))
        return worst

    work(0)
    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, range(8))) < LOGITS
    assert made


@torch.no_grad()
def test_memory_returns_with_restore(made):
    model = bert()
    left = []
    for _ in range(2):  # the counters of the first capture's stream stay for the next one
        fast = optimize(model)
        for _ in range(6):
            fast(**inputs(12))
        assert len(made) == 1
        held = torch.cuda.memory_allocated()
        restore(fast)
        made.clear()
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # as making a CUDA graph does
        left.append(torch.cuda.memory_allocated())
        assert left[-1] < held
    assert left[0] == left[1]


@torch.no_grad()
def test_what_waits_for_the_device_is_launched_from_python(made):
    calls = Replay(lambda x: (x * x.sum().item(),), set())
    before = sum(count for (where, _), count in fallback.seen.items() if where == "backend")
    for _ in range(5):
        x = torch.randn(4, device="cuda")
        torch.testing.assert_close(calls(x)[0], x * x.sum())
    assert not made and calls.left == 0
    assert sum(count for (where, _), count in fallback.seen.items() if where == "backend") == before + 1


@torch.no_grad()
def test_a_busy_gpu_needs_no_graph(made, monkeypatch):
    calls = Replay(lambda x, w: (x @ w @ w @ w @ w @ w @ w,), set())
    x, w = torch.randn(512, 8192, device="cuda"), torch.randn(8192, 8192, device="cuda")
    for _ in range(5):
        calls(x + 1, w)
    assert not made and calls.left == MOST
    monkeypatch.setattr(replay, "MOST_BYTES", 1 << 30)
    calls = Replay(lambda x, w: (x @ w,), set())
    for _ in range(4):
        calls(torch.randn(1, 8192, device="cuda"), w)
    assert len(made) == 1


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}], ids=["ours", "transformers'"])
@pytest.mark.parametrize("name", ["t5:Seq2SeqLM", "bart:Seq2SeqLM", "whisper:SpeechSeq2Seq"])
def test_steps_on_a_static_cache(made, name, more):
    model = encoders.make(name).cuda()
    fast = optimize(copy.deepcopy(model))
    for padding in (0, encoders.PADDING, 0):
        given = {n: v for n, v in encoders.inputs(model, padding).items() if n != "decoder_input_ids"}
        settings = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
        expected = model.generate(**given, **settings)
        assert torch.equal(expected, fast.generate(**given, **settings, **more))
    assert any(graph.replays > 20 for graph in made)


def test_a_compile_config_that_names_the_backend(made):
    torch.manual_seed(0)
    size = {**SIZE, "num_key_value_heads": 2, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**size)).eval().cuda()
    ids = inputs(9)["input_ids"]
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    for _ in range(2):
        config = CompileConfig(backend="tinyfuse", mode=None)
        made_now = model.generate(ids, **settings, cache_implementation="static", compile_config=config)
        assert torch.equal(expected, made_now)
    assert any(graph.replays > 20 for graph in made)


def test_garbage_is_not_collected_within_a_capture():
    """A destructor's call that no capture may hold ends it, and the next kernel is told of a previous error."""

    class Garbage:
        def __init__(self):
            self.itself = self

        def __del__(self):
            if torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize()

    x = torch.ones(8, device="cuda")

    def run():
        for _ in range(20000):
            Garbage()
        return x + 1

    gc.collect()
    graph = Captured(run, [], torch.cuda.Stream())
    x.fill_(3)
    assert torch.equal(graph(), torch.full_like(x, 4)) and gc.isenabled()
