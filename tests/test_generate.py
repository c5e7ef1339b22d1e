"""generate of an optimised model: the tokens of the stock one, whatever the model and the arguments."""

import copy
import functools
import itertools
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    Gemma3TextConfig,
    GenerationMixin,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from tinyfuse.api import optimize, restore
from tinyfuse.kernels import _triton
from tinyfuse.runtime import cache, recorded
from tinyfuse.runtime import prompt as padded
from tinyfuse.runtime.cache import CachePool
from tinyfuse.runtime.forward import CACHE
from tinyfuse.runtime.tail import Tail
from tinyfuse.runtime.window import in_ring

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 2048,
}
GEMMA3 = SIZE | {"head_dim": 8, "sliding_window": 6, "num_hidden_layers": 2}
FAMILIES = {
    "mistral": MistralConfig(**SIZE, sliding_window=6),
    "qwen2": Qwen2Config(**SIZE),
    "gemma3": Gemma3TextConfig(  # untied: a tied head of random weights repeats its input
        **GEMMA3, layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=False
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96, n_positions=2048),
    "mixtral": MixtralConfig(**SIZE, num_local_experts=4, sliding_window=None),
}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
ONE = {"input_ids": torch.tensor([[5, 17, 33, 2, 8, 61, 7, 7, 90]])}
PADDED = {
    "input_ids": torch.tensor(
        [[0, 0, 0, 5, 17, 33, 2, 8, 61], [9, 8, 7, 6, 5, 4, 3, 2, 1], [0, 11, 4, 7, 12, 9, 1, 3, 3]]
    ),
    "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0] + [1] * 8]),
}


def build(config, seed=0):
    """A random model whose tokens vary: weights as large as those that training leaves."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = 1
    model.generation_config.pad_token_id = 0
    return model


class Pair:
    """A stock model and its optimised twin."""

    def __init__(self, config, seed=0):
        self.stock = build(config, seed)
        self.fast = optimize(copy.deepcopy(self.stock))

    @property
    def fallbacks(self):
        return self.fast._tinyfuse.fallbacks

    def same(self, seed=None, **arguments):
        """Both generate the same; what the optimised one returned."""
        results = []
        for model in (self.stock, self.fast):
            torch.manual_seed(seed or 0)
            results.append(model.generate(**{"max_new_tokens": 12, "do_sample": seed is not None} | arguments))
            results.append(torch.rand(1))
        expected, drawn, result, drawn_too = results
        assert torch.equal(getattr(expected, "sequences", expected), getattr(result, "sequences", result))
        assert torch.equal(drawn, drawn_too), "the random numbers that follow differ"
        return result


@pytest.fixture(scope="module")
def llama():
    return Pair(LlamaConfig(**SIZE))


@pytest.fixture
def covered(llama):
    """The test's calls are all covered by the loop."""
    del llama.fallbacks[:]
    yield llama
    assert llama.fallbacks == []


@pytest.mark.parametrize("prompt", [ONE, PADDED], ids=["one", "padded"])
def test_greedy(covered, prompt):
    covered.same(**prompt, max_new_tokens=20)
    covered.same(**prompt, max_new_tokens=1)
    covered.same(**prompt, max_new_tokens=2)


def test_beyond_a_block_of_masks(covered):
    covered.same(**PADDED, max_new_tokens=300)


SAMPLING = [
    {"temperature": 0.7},
    {"top_k": 5, "temperature": 1.3},
    {"top_p": 0.6, "top_k": 0},
    {"min_p": 0.1},
    {"typical_p": 0.8, "epsilon_cutoff": 0.001},
    {"repetition_penalty": 1.5, "renormalize_logits": True},
    {"repetition_penalty": 1.5, "min_new_tokens": 8, "eos_token_id": list(range(48))},
    {"remove_invalid_values": True, "max_time": 1000.0},
    {"num_return_sequences": 3},
]
HOST_SAMPLING = [
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    {"eta_cutoff": 0.01},
    {"forced_eos_token_id": 7},
]


@pytest.mark.parametrize("arguments", [*SAMPLING, *HOST_SAMPLING], ids="-".join)
def test_sampling(covered, arguments, monkeypatch):
    """The tokens that stock draws, chosen on the device where nothing that chooses them needs the host."""
    pick, picked = Tail.pick, []
    monkeypatch.setattr(Tail, "pick", lambda self, logits: picked.append(pick(self, logits)))
    prompt = ONE if "num_return_sequences" in arguments else PADDED
    for seed in (1, 2):
        covered.same(**prompt, seed=seed, **arguments)
    assert (len(picked) > 0) == (arguments in SAMPLING)


def test_a_set_of_tokens_may_leave_out_the_prompt(covered):
    for ignored in (0, 4, 9, 11, 40):
        own = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.5, prompt_ignore_length=ignored)])
        covered.same(**PADDED, logits_processor=own)


def test_nothing_to_draw_from(llama):
    """An error as in stock, if some tokens later, and a model that goes on."""
    head = llama.fast.lm_head.weight
    before = llama.same(**ONE)
    held = head.detach().clone()
    head.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="probability tensor contains either"):
        llama.fast.generate(**ONE, max_new_tokens=6, do_sample=True)
    head.data.copy_(held)
    assert torch.equal(llama.same(**ONE), before)


@pytest.mark.parametrize("prompt", [ONE, PADDED], ids=["one", "padded"])
def test_end_of_sequence(covered, prompt):
    tokens = covered.same(**prompt, max_new_tokens=20)[:, 9:]
    for eos in (tokens[0, 4].item(), tokens[:, 5].tolist(), [tokens[0, 0].item()], tokens.flatten().tolist()):
        covered.same(**prompt, max_new_tokens=20, eos_token_id=eos)
        covered.same(**prompt, max_new_tokens=20, eos_token_id=eos, seed=4)
    covered.same(**prompt, max_new_tokens=20, min_new_tokens=6, eos_token_id=tokens[:, 2].tolist())
    ends = tokens[:, prompt["input_ids"].shape[1] + 1].tolist()
    result = covered.same(**prompt, max_new_tokens=12, min_new_tokens=12, eos_token_id=ends)
    assert not torch.isin(result[:, prompt["input_ids"].shape[1] :], torch.tensor(ends)).any()


def test_dictionary_output(covered):
    names = {"output_scores": True, "output_logits": True}
    for options in ({}, names, names | {"seed": 5, "top_k": 4}, {"eos_token_id": 7}):
        result = covered.same(**PADDED, return_dict_in_generate=True, **options)
        expected = covered.stock.generate(**PADDED, do_sample=False, max_new_tokens=12, return_dict_in_generate=True)
        assert type(result) is type(expected) and type(result.past_key_values) is DynamicCache
        for name in ("scores", "logits"):
            assert (getattr(result, name) is not None) == (f"output_{name}" in options)
    expected = covered.stock.generate(
        **PADDED, do_sample=False, max_new_tokens=12, return_dict_in_generate=True, **names
    )
    result = covered.fast.generate(**PADDED, do_sample=False, max_new_tokens=12, return_dict_in_generate=True, **names)
    torch.testing.assert_close(result.scores, expected.scores)
    torch.testing.assert_close(result.logits, expected.logits)


@pytest.mark.parametrize("family", ["gemma3", "qwen2", "gpt2", "mixtral"])
def test_padded_prompts(family, monkeypatch):
    """As on a GPU, where one graph takes prompts of similar lengths."""
    monkeypatch.setattr(padded, "DEVICES", ("cpu",))
    monkeypatch.setattr(padded, "LENGTHS", (4, 12, 32))
    pair = Pair(FAMILIES[family])
    prompts = [{"input_ids": ONE["input_ids"].repeat(1, 4)[:, :length]} for length in (3, 9, 12, 7, 1, 32, 36)]
    for prompt in (*prompts, PADDED, {name: value[:, :7] for name, value in PADDED.items()}):
        pair.same(**prompt, seed=2)
        result = pair.same(**prompt, return_dict_in_generate=True)
        stock = pair.stock.generate(**prompt, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
        for layer, ours in zip(stock.past_key_values.layers, result.past_key_values.layers, strict=True):
            torch.testing.assert_close(ours.keys, layer.keys)
    prompts = [prompt for slot in pair.fast._tinyfuse.pool.slots.values() for prompt in slot.prompts.values()]
    assert 4 <= len(prompts) <= 10 and all(prompt.usable for prompt in prompts)
    assert pair.fallbacks == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_cache_holds_is_learnt_without_a_run(family, monkeypatch):
    pair, learnt = Pair(FAMILIES[family]), []
    imagined = cache._imagined
    monkeypatch.setattr(cache, "_imagined", lambda *args: learnt.append(imagined(*args)) or learnt[-1])
    pair.same(**ONE)
    assert learnt and None not in learnt


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(), (12,)], ids=["as it is", "padded"])
def test_prompt_and_token_are_recorded_before_their_kernels_compile(family, lengths, monkeypatch):
    """As on a GPU: in one block, before anything has run. The loop then asks for the same graphs."""
    monkeypatch.setattr(padded, "DEVICES", ("cpu",))
    monkeypatch.setattr(padded, "LENGTHS", lengths)
    monkeypatch.setattr(recorded, "_compiles_ahead", lambda gpu: True)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    rehearsed = []

    def rehearse(bound, after):
        calls = [graph.calls for graph in pair.fast._tinyfuse.report.graphs]
        rehearsed.append((_triton._block.get(), after is not None, sum(calls)))

    monkeypatch.setattr(recorded, "_rehearse", rehearse)
    pair = Pair(FAMILIES[family])
    pair.same(**ONE)
    (block, _, _), _ = rehearsed
    assert rehearsed == [(block, True, 0), (block, False, 0)] and block is not None
    pair.same(**ONE, seed=2)
    assert len(rehearsed) == 2 and _triton._block.get() is None
    pair.same(**PADDED)
    assert pair.fallbacks == []
    assert [len(known) for known in pair.fast._tinyfuse.recordings.compiled.values()] == [1] * len(rehearsed)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_sliding_layers_hold_their_window(family):
    """Prompts shorter and longer than it, whatever chooses the tokens, past a block of masks."""
    pair = Pair(FAMILIES[family])
    for prompt in ({"input_ids": ONE["input_ids"][:, :3]}, ONE, PADDED, {"input_ids": PADDED["input_ids"][:, -4:]}):
        pair.same(**prompt, max_new_tokens=30)
        pair.same(**prompt, seed=2, repetition_penalty=1.2, no_repeat_ngram_size=3)
    pair.same(**PADDED, max_new_tokens=160)
    pair.same(**ONE, attention_mask=None)
    for slot in pair.fast._tinyfuse.pool.slots.values():
        lengths = [layer.keys.shape[2] for layer in slot.layers()]
        sliding = slot.cache.is_sliding
        assert any(sliding) and lengths == [6 if slides else slot.length for slides in sliding]
    assert pair.fallbacks == [] and not pair.fast._tinyfuse.recordings.declined


def test_a_returned_cache_of_sliding_layers_is_stocks():
    pair = Pair(FAMILIES["gemma3"])
    for prompt in (ONE, PADDED):
        arguments = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
        stock, fast = (model.generate(**prompt, **arguments).past_key_values for model in (pair.stock, pair.fast))
        for layer, ours in zip(stock.layers, fast.layers, strict=True):
            assert type(layer) is type(ours) and layer.get_seq_length() == ours.get_seq_length()
            torch.testing.assert_close(ours.keys, layer.keys)
            torch.testing.assert_close(ours.values, layer.values)
    pair.same(**ONE, prefill_chunk_size=4)
    assert pair.fallbacks == []


def test_a_mask_in_the_order_of_a_ring():
    whole = torch.rand(2, 1, 5, 40) < 0.5
    for first in (0, 2, 7, 30):
        for mask in (whole, torch.where(whole, 0.0, -5.0)):
            ring = in_ring(mask, 7, first)
            for row, slot in itertools.product(range(5), range(7)):
                held = max((p for p in range(first + row + 1) if p % 7 == slot), default=None)
                want = mask[:, :, row, held] if held is not None else torch.full((2, 1), ring.min().item())
                assert torch.equal(ring[:, :, row, slot], want)


def test_caches_that_stand_by_go_when_memory_is_short(covered, monkeypatch):
    covered.same(**ONE)
    covered.same(**PADDED)
    pool, allocate, failures = covered.fast._tinyfuse.pool, CachePool._allocate, []

    def short(self, slot):
        if self.slots:
            failures.append(len(self.slots))
            raise torch.OutOfMemoryError("CUDA out of memory")
        allocate(self, slot)

    monkeypatch.setattr(CachePool, "_allocate", short)
    covered.same(input_ids=ONE["input_ids"].repeat(5, 1))
    assert failures and list(pool.slots) == [(5, 256, False)]
    monkeypatch.undo()
    covered.same(**ONE)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_no_memory_for_so_many_tokens(error, monkeypatch):
    """Which stock only allocates as it writes them."""

    def fail(self, slot):
        raise error(f"can't allocate memory\nfor {slot.length}")

    pair = Pair(LlamaConfig(**SIZE))
    monkeypatch.setattr(CachePool, "_allocate", fail)
    pair.same(**PADDED, max_new_tokens=30)
    monkeypatch.undo()
    pair.same(**PADDED)
    assert pair.fallbacks == ["no static cache of 39 tokens: can't allocate memory"]


def test_returned_cache_is_the_callers(covered):
    first = covered.fast.generate(**ONE, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    keys = first.past_key_values.layers[0].keys.clone()
    assert keys.shape[2] == first.sequences.shape[1] - 1
    covered.fast.generate(**ONE, max_new_tokens=9, do_sample=False)
    assert torch.equal(first.past_key_values.layers[0].keys, keys)
    assert first.past_key_values.get_seq_length() == keys.shape[2]


class Seen(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("seed", [None, 6])
def test_streamer(covered, seed):
    eos = covered.same(**ONE, max_new_tokens=20, seed=seed)[0, 15].item()
    for options in ({}, {"eos_token_id": eos}):
        streams = []
        for model in (covered.stock, covered.fast):
            torch.manual_seed(seed or 0)
            streams.append(Seen())
            model.generate(**ONE, max_new_tokens=12, do_sample=seed is not None, streamer=streams[-1], **options)
        stock, fast = streams
        assert [t.tolist() for t in stock.tokens] == [t.tolist() for t in fast.tokens]
        assert stock.ended == fast.ended == 1


class StopsAt(StoppingCriteria):
    def __init__(self, length):
        self.length, self.calls = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append((input_ids.clone(), scores and len(scores)))
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class Favours(LogitsProcessor):
    def __init__(self, token):
        self.token, self.calls = token, []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids.clone())
        scores[:, self.token] += 2.0
        return scores


def test_own_criteria_and_processors(covered):
    calls = []
    for model in (covered.stock, covered.fast):
        criterion, processor = StopsAt(15), Favours(40)
        tokens = model.generate(
            **PADDED, do_sample=False, max_new_tokens=12, stopping_criteria=[criterion], logits_processor=[processor]
        )
        calls.append((tokens, criterion.calls, processor.calls))
    (stock, stock_criterion, stock_processor), (fast, fast_criterion, fast_processor) = calls
    assert torch.equal(stock, fast) and stock.shape[1] == 15
    assert all(torch.equal(a, b) and m == n for (a, m), (b, n) in zip(stock_criterion, fast_criterion, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(stock_processor, fast_processor, strict=True))


@pytest.mark.parametrize("length", [9, 300])
def test_a_length_that_the_prompt_has_already(length):
    """One token, as in stock: of a first call, and of one whose tokens the device could choose."""
    pair, prompt = Pair(LlamaConfig(**SIZE)), torch.randint(2, 96, (1, length))
    for _ in range(2):
        result = pair.same(input_ids=prompt, max_new_tokens=None, stopping_criteria=[MaxLengthCriteria(5)])
        assert result.shape == (1, length + 1)
        pair.same(input_ids=prompt)
    assert pair.fallbacks == []


def test_max_time(covered):
    covered.same(**ONE, max_time=1000.0)
    started = time.time()
    tokens = covered.fast.generate(**ONE, do_sample=False, max_new_tokens=1500, max_time=0.05)
    assert 9 < tokens.shape[1] < 1500 and time.time() - started < 30
    late = [MaxTimeCriteria(10.0, initial_timestamp=time.time() - 20)]
    assert covered.same(**ONE, stopping_criteria=late).shape[1] == 10


def test_embeddings_as_prompt(covered):
    embeds = covered.stock.get_input_embeddings()(ONE["input_ids"]).detach()
    covered.same(inputs_embeds=embeds)
    covered.same(inputs_embeds=embeds, input_ids=ONE["input_ids"])


def test_chunked_prefill(covered):
    covered.same(**ONE, prefill_chunk_size=4)


def test_prompt_of_one_token(covered):
    covered.same(input_ids=ONE["input_ids"][:, :1])


def test_inference_mode_from_the_first_call_on():
    pair = Pair(LlamaConfig(**SIZE))
    with torch.inference_mode():
        pair.same(**ONE)
    pair.same(**ONE)
    assert pair.fallbacks == []


def test_inference_mode(covered):
    for arguments in ({}, {"seed": 1, "repetition_penalty": 1.3}):
        with torch.inference_mode():
            covered.same(**ONE, **arguments)
        covered.same(**ONE, **arguments)


STOCK = [
    ({"num_beams": 2}, "beam"),
    ({"use_cache": False}, "use_cache"),
    ({"cache_implementation": "static"}, "cache_implementation"),
    ({CACHE: "new"}, CACHE),
    ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
    ({"prompt_lookup_num_tokens": 2}, "assisted"),
]


@pytest.mark.parametrize(("arguments", "reason"), STOCK, ids=[reason for _, reason in STOCK])
def test_the_stock_way_and_its_reason(llama, arguments, reason):
    del llama.fallbacks[:]
    tokens = []
    for model in (llama.stock, llama.fast):
        own = {CACHE: DynamicCache(config=model.config)} if CACHE in arguments else {}
        result = model.generate(**ONE, **{"do_sample": False, "max_new_tokens": 4} | arguments | own)
        tokens.append(getattr(result, "sequences", result))
    assert torch.equal(*tokens)
    assert len(llama.fallbacks) == 1 and reason in llama.fallbacks[0]


def test_no_recompile(covered):
    """Prompts of any length, of one or several rows, with any number of new tokens."""
    prompts = [torch.randint(1, 96, (rows, length)) for length in range(3, 43, 2) for rows in (1, 3)]
    for rows in (1, 3):
        covered.same(input_ids=prompts[rows // 2])
    stats = torch._dynamo.utils.counters["stats"]
    graphs = stats["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prompt in prompts:
            for count in (3, 17):
                covered.fast.generate(prompt, do_sample=False, max_new_tokens=count)
    assert stats["unique_graphs"] == graphs


def test_over_the_recompile_limit():
    """Dynamo then runs the forward without a graph; the tokens stay right."""
    pair = Pair(LlamaConfig(**SIZE))
    pair.same(**ONE)
    with torch._dynamo.config.patch(recompile_limit=1):
        pair.same(**ONE, max_new_tokens=600)
        pair.fast.config._attn_implementation = "eager"
        pair.same(**ONE, max_new_tokens=5)
        pair.same(**ONE, max_new_tokens=5)


def test_batch_and_length_change(covered):
    for _ in range(2):
        covered.same(**ONE)
        covered.same(**PADDED, max_new_tokens=270)
        covered.same(**ONE, max_new_tokens=260)
        covered.same(input_ids=ONE["input_ids"].repeat(4, 1))


def test_two_models_interleaved(covered):
    other = Pair(LlamaConfig(**SIZE), seed=1)
    for _ in range(2):
        ours, theirs = covered.same(**ONE), other.same(**ONE)
        assert not torch.equal(ours, theirs)


def test_threads(covered):
    prompts = [torch.randint(1, 96, (1, 5 + n)) for n in range(8)]
    expected = [covered.stock.generate(p, do_sample=False, max_new_tokens=15) for p in prompts]
    results = [None] * 8

    def work(n):
        results[n] = covered.fast.generate(prompts[n], do_sample=False, max_new_tokens=15)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


def test_generate_inside_of_generate(llama):
    class Asks(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            inner.append(llama.fast.generate(**ONE, do_sample=False, max_new_tokens=3))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    inner = []
    llama.same(**ONE, max_new_tokens=4, stopping_criteria=[Asks()])
    expected = llama.stock.generate(**ONE, do_sample=False, max_new_tokens=3)
    assert len(inner) == 8 and all(torch.equal(expected, tokens) for tokens in inner)


def test_usable_after_an_error(llama):
    class Breaks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == 11:
                raise KeyError("from the processor")
            return scores

    with pytest.raises(KeyError, match="from the processor"):
        llama.fast.generate(**ONE, do_sample=False, max_new_tokens=9, logits_processor=[Breaks()])
    llama.same(**ONE)


@pytest.mark.parametrize("shape", [(0, 5), (1, 0)])
def test_empty_prompt(llama, shape):
    with pytest.raises(ValueError, match="empty"):
        llama.fast.generate(torch.zeros(shape, dtype=torch.long), max_new_tokens=3)
    llama.same(**ONE)


def test_weights_changed_in_place_and_replaced(llama):
    """Neither a captured step nor a recorded call may go on with weights of the past."""
    pair = Pair(LlamaConfig(**SIZE), seed=2)
    before = pair.same(**ONE)
    for model in (pair.stock, pair.fast):
        model.lm_head.weight.data = llama.stock.lm_head.weight.detach().clone()
    after = pair.same(**ONE)
    assert not torch.equal(before, after)
    for model in (pair.stock, pair.fast):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
    assert not torch.equal(after, pair.same(**ONE))
    pair.stock.double(), pair.fast.double()
    pair.same(**ONE)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_a_call_that_asked_for_more_leaves_no_trace(asked):
    pair = Pair(LlamaConfig(**SIZE))
    with torch.no_grad():
        pair.fast(**ONE, **{asked: True})
    del pair.fallbacks[:]
    pair.same(**ONE)
    assert pair.fallbacks == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("path", ["", "model.layers.0.mlp"])
def test_hooks_see_every_token(path, when):
    """And nothing else, put on before the first call or after it."""
    pair, seen = Pair(LlamaConfig(**SIZE)), []
    if when == "after":
        pair.same(**PADDED, max_new_tokens=5)
    handle = pair.fast.get_submodule(path).register_forward_hook(lambda *_: seen.append(1))
    pair.same(**PADDED, max_new_tokens=5)
    handle.remove()
    assert len(seen) == 5 and "hooks" in pair.fallbacks.pop()
    pair.same(**PADDED, max_new_tokens=5)
    assert len(seen) == 5 and pair.fallbacks == []


def test_a_forward_put_over_that_of_optimize():
    pair, seen = Pair(LlamaConfig(**SIZE)), []
    before = pair.same(**ONE)
    for model in (pair.stock, pair.fast):

        def forward(*args, inner=model.forward, fast=model is pair.fast, **kwargs):
            seen.append(fast)
            outputs = inner(*args, **kwargs)
            outputs.logits = outputs.logits.flip(-1)
            return outputs

        model.forward = forward
    assert not torch.equal(pair.same(**ONE), before)
    assert seen == [False] * 12 + [True] * 12 and "replaced" in pair.fallbacks.pop()


class Takes(LlamaForCausalLM):
    def generate(self, prompt, *more, **generate_arguments):
        return super().generate(prompt, *more, **generate_arguments)


def _wrapped(model, wrapper):
    model.generate = functools.partial(wrapper, model.generate)
    return model


OWN = {
    "a class's": lambda: Takes(LlamaConfig(**SIZE)).eval(),
    "all positions": lambda: _wrapped(build(LlamaConfig(**SIZE)), lambda inner, *args, **more: inner(*args, **more)),
    "other names": lambda: _wrapped(build(LlamaConfig(**SIZE)), lambda inner, prompt, **more: inner(prompt, **more)),
    "no names": lambda: _wrapped(build(LlamaConfig(**SIZE)), lambda inner, prompt, max_new_tokens: inner(prompt)),
}


@pytest.mark.parametrize("own", OWN)
def test_a_generate_with_other_parameters(own):
    """Gets what the caller gave, and the caller hears why there is no loop."""
    model = OWN[own]()
    fast = optimize(copy.deepcopy(model))
    tokens = [m.generate(ONE["input_ids"], max_new_tokens=4) for m in (model, fast)]
    assert torch.equal(*tokens) and len(fast._tinyfuse.fallbacks) == 1
    assert ("own generate" if own == "a class's" else "replaced before") in fast._tinyfuse.fallbacks[0]


def test_inputs_prepared_by_another_method():
    """Put on the instance, as PEFT does for virtual tokens: it may look at one token at a time."""
    pair = Pair(LlamaConfig(**SIZE))
    plain = pair.same(**PADDED)
    for model in (pair.stock, pair.fast):

        @functools.wraps(inner := model.prepare_inputs_for_generation)
        def prepare(ids, inner=inner, **more):
            return inner(ids if ids.shape[1] < 12 else ids.clamp(max=50), **more)

        model.prepare_inputs_for_generation = prepare
    assert not torch.equal(pair.same(**PADDED), plain)
    assert "prepare_inputs_for_generation was replaced" in pair.fallbacks.pop()
    for model in (pair.stock, pair.fast):  # as PEFT leaves it
        model.prepare_inputs_for_generation = type(model).prepare_inputs_for_generation.__get__(model)
    assert torch.equal(pair.same(**PADDED), plain) and pair.fallbacks == []


class Counts(nn.Module):
    """Notes each call, in a number or in a list."""

    def __init__(self, inner, kind):
        super().__init__()
        self.inner, self.calls = inner, kind()

    def forward(self, x):
        self.calls += [x.shape[1]] if isinstance(self.calls, list) else 1
        return self.inner(x)


@pytest.mark.parametrize("kind", [int, list])
def test_a_module_that_counts_its_calls(kind):
    pair = Pair(LlamaConfig(**SIZE))
    for model in (pair.stock, pair.fast):
        model.model.layers[0].mlp = Counts(model.model.layers[0].mlp, kind)
    for _ in range(2):
        pair.same(**ONE, max_new_tokens=5)
        assert pair.fast.model.layers[0].mlp.calls == pair.stock.model.layers[0].mlp.calls


def test_autocast_by_turns():
    """It chooses the dtypes of keys and values too, which no cache of other calls holds."""
    pair = Pair(LlamaConfig(**SIZE))
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            pair.same(**ONE)
            pair.same(**PADDED, seed=3)
    assert pair.fallbacks == ["autocast is on"]


def test_layers_come_and_go():
    pair = Pair(LlamaConfig(**SIZE | {"num_hidden_layers": 3}))
    for count in (3, 2, 4):
        for model in (pair.stock, pair.fast):
            layers = model.model.layers
            while len(layers) < count:
                layers.append(copy.deepcopy(layers[0]))
                layers[-1].self_attn.layer_idx = len(layers) - 1
            del layers[count:]
            model.config.num_hidden_layers = count
        pair.same(**PADDED)
        assert len(pair.same(**ONE, return_dict_in_generate=True).past_key_values.layers) == count
    assert pair.fallbacks == []


def test_the_window_changes():
    pair, seen = Pair(FAMILIES["mistral"]), []
    for window in (6, 3, 9, None, 6):
        for model in (pair.stock, pair.fast):
            model.config.sliding_window = window
        seen.append(pair.same(**PADDED, max_new_tokens=20))
    assert not torch.equal(seen[0], seen[1]) and pair.fallbacks == []


def test_token_types():
    """Those of the prompt's last token go on, for more tokens than the prompt has."""
    pair = Pair(FAMILIES["gpt2"])
    for types in ([7] * 9, [7] * 3 + [3] * 6):
        pair.same(**ONE, token_type_ids=torch.tensor([types]), max_new_tokens=160)
    assert pair.fallbacks == []


def test_tokens_that_see_each_other():
    """An image's, by their types. Those that follow on the prompt are none of them."""
    pair = Pair(Gemma3Config(text_config=FAMILIES["gemma3"], vision_config=VISION, mm_tokens_per_image=4))
    types = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0]])
    options = {"return_dict_in_generate": True, "output_logits": True, "token_type_ids": types}
    mine, stock = (m.generate(**ONE, **options, max_new_tokens=12, do_sample=False) for m in (pair.fast, pair.stock))
    torch.testing.assert_close(mine.logits, stock.logits)
    assert pair.fallbacks == []


def test_no_plain_cache_goes_the_stock_way():
    from transformers import Lfm2Config

    pair = Pair(Lfm2Config(**SIZE | {"num_hidden_layers": 2}, layer_types=["conv", "full_attention"]))
    pair.same(**ONE, max_new_tokens=4)
    assert len(pair.fallbacks) == 1 and "LinearAttentionLayer" in pair.fallbacks[0]


def test_inputs_that_transformers_prepares_for_no_static_cache(llama, monkeypatch):
    """Llama 4 in transformers 5.17."""
    prepare = type(llama.fast).prepare_inputs_for_generation

    @functools.wraps(prepare)
    def fail(self, ids, **more):
        if not isinstance(more[CACHE], DynamicCache):
            raise TypeError("no such mask")
        return prepare(self, ids, **more)

    monkeypatch.setattr(type(llama.fast), "prepare_inputs_for_generation", fail)
    llama.same(**PADDED, max_new_tokens=4)
    assert "TypeError: no such mask" in llama.fallbacks.pop()


def test_inputs_that_buffers_cannot_follow():
    from transformers import BloomConfig

    pair = Pair(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=96))
    pair.same(**PADDED)
    assert len(pair.fallbacks) == 1 and ("attention_mask" in pair.fallbacks[0] or "static cache" in pair.fallbacks[0])


def test_a_cache_begun_anew_on_the_way():
    """Phi-3, where its rotation becomes the one of long texts: in the prompt, among the tokens or ahead of them."""
    rotation = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.5, 2, 3, 4]}
    long = {"original_max_position_embeddings": 200, "rope_parameters": rotation}
    pair = Pair(Phi3Config(**SIZE, **long, sliding_window=None, pad_token_id=0))
    for length, count in ((9, 20), (9, 20), (100, 30), (190, 20), (210, 9), (9, 20)):
        ids = torch.randint(2, 96, (2, length), generator=torch.Generator().manual_seed(0))
        options = {"max_new_tokens": count, "do_sample": False, "return_dict_in_generate": True}
        stock, fast = (model.generate(ids, **options) for model in (pair.stock, pair.fast))
        assert torch.equal(stock.sequences, fast.sequences)
        for layer, ours in zip(stock.past_key_values.layers, fast.past_key_values.layers, strict=True):
            torch.testing.assert_close(ours.keys, layer.keys, rtol=1e-4, atol=1e-4)
    assert pair.fallbacks.pop() == "the model begins another cache within so many tokens"


def test_restore_in_between(covered):
    model = copy.deepcopy(covered.fast)
    tokens = model.generate(**ONE, do_sample=False, max_new_tokens=12)
    assert torch.equal(restore(model).generate(**ONE, do_sample=False, max_new_tokens=12), tokens)
    assert torch.equal(optimize(model).generate(**ONE, do_sample=False, max_new_tokens=12), tokens)


def test_token_healing(llama, monkeypatch):
    """With the tokenizer that the caller gave."""
    given = []
    monkeypatch.setattr(GenerationMixin, "heal_tokens", lambda self, ids, with_=None: given.append(with_) or ids + 1)
    del llama.fallbacks[:]
    llama.same(**ONE, token_healing=True, tokenizer="a tokenizer")
    assert given == ["a tokenizer"] * 2 and llama.fallbacks == ["token_healing is set"]


def test_pipeline(covered):
    words = {f"w{i}": i for i in range(96)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w95"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    texts = []
    for model in (covered.stock, covered.fast):
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        one = write("w5 w17 w33", max_new_tokens=6, do_sample=False)
        many = write(["w5 w17", "w9 w8 w7 w6", "w3"], max_new_tokens=6, do_sample=False, batch_size=3)
        texts.append((one, many))
    assert texts[0] == texts[1]


def test_adapters():
    from peft import LoraConfig, get_peft_model

    pair = Pair(LlamaConfig(**SIZE), seed=3)
    restore(pair.fast)
    plain = pair.stock.generate(**ONE, do_sample=False, max_new_tokens=12)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    for name in ("stock", "fast"):
        torch.manual_seed(0)
        setattr(pair, name, get_peft_model(getattr(pair, name), config).eval())
    optimize(pair.fast)
    assert not torch.equal(pair.same(**ONE), plain)
    assert pair.fast.get_base_model()._tinyfuse.fallbacks == []
    for change in ("merge_adapter", "unmerge_adapter"):
        for model in (pair.stock, pair.fast):
            getattr(model, change)()
        assert not torch.equal(pair.same(**ONE), plain)
    with pair.fast.disable_adapter():
        assert torch.equal(pair.fast.generate(**ONE, do_sample=False, max_new_tokens=12), plain)
    restore(pair.fast)
    assert "generate" not in vars(pair.fast.get_base_model()) and "forward" not in vars(pair.fast)
