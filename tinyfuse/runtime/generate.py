"""The decode loop: transformers' ``_sample`` on static memory, with one graph per token and no wait per token.

Covers greedy decoding and sampling of one sequence per prompt. Same semantics as ``GenerationMixin._sample``:
processors and criteria are called as given, finished rows are padded, and the same random numbers are drawn in the same
order.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerationMixin
from transformers.utils import ModelOutput

from tinyfuse.graph.nodes import autocast_is_on
from tinyfuse.runtime import encoder_decoder
from tinyfuse.runtime.cache import Slot, fill
from tinyfuse.runtime.forward import CACHE, CACHES
from tinyfuse.runtime.prompt import prefill
from tinyfuse.runtime.recorded import Bound, wake
from tinyfuse.runtime.step import Inputs, NotAdvanceable, Step, bind, block_rows, kind
from tinyfuse.runtime.tail import Choice, Tail, choice
from tinyfuse.runtime.window import MASK, in_rings

LAG = 2  # tokens that the device may be ahead of the host's check for the end


def generate(runtime, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``model.generate(*args, **kwargs)``, through the loop if it covers the call, else the stock way.

    Raises ValueError for a prompt without sequences or without tokens.
    """
    model, stock = runtime.model, runtime.stock("generate")
    if "generate" in runtime.own:
        runtime.fall_back("model.generate was replaced before optimize")
        return stock(*args, **kwargs)
    call = _named(inspect.signature(stock).bind(*args, **kwargs))
    if call.get("cache_implementation") is not None and call.get("compile_config") is None:
        kwargs["disable_compile"] = True  # transformers would compile the compiled forward once more
    streamer = call.get("streamer")
    if reason := model_reason(model):
        runtime.fall_back(reason)
        encodes = isinstance(model, GenerationMixin) and model.config.is_encoder_decoder
        if not encodes or encoder_decoder.unfit(model) or call_reason(model, call):
            return stock(*args, **kwargs)
        loop = encoder_decoder.loop(runtime, streamer)
    else:
        _check_prompt(call)
        if reason := call_reason(model, call):
            runtime.fall_back(reason, asked=True)
            return stock(*args, **kwargs)

        def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
            return generate_tokens(
                runtime, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
            )

    with runtime.lock:
        if runtime.depth:
            runtime.fall_back("generate was called inside of generate", asked=True)
            return stock(*args, **kwargs)
        runtime.depth += 1
        try:
            return stock(*args, **kwargs | {"custom_generate": loop})
        finally:
            runtime.depth -= 1


def _named(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of a call by name, those of ``**kwargs``, whatever it is called, among them."""
    named = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


def _check_prompt(call: dict[str, Any]) -> None:
    name = "inputs_embeds" if call.get("inputs_embeds") is not None else "input_ids"
    prompt = call.get(name, call.get("inputs"))
    if isinstance(prompt, Tensor) and prompt.numel() == 0:
        raise ValueError(f"generate: {name} is empty, of shape {list(prompt.shape)}; pass sequences of 1 token or more")


def model_reason(model: torch.nn.Module) -> str | None:
    """Why the loop does not cover a model; None if it does."""
    cls = type(model)
    if not isinstance(model, GenerationMixin):
        return f"{cls.__name__} is not a transformers GenerationMixin"
    if model.config.is_encoder_decoder:
        return "the decode loop is for decoder-only models: this encoder-decoder takes transformers' loop, compiled"
    for name in ("generate", "_sample", "_prefill"):
        if getattr(cls, name) is not getattr(GenerationMixin, name):
            return f"{cls.__name__} has its own {name}"
    if not model._can_compile_fullgraph:  # some attend to what a static cache does not hold yet
        return f"transformers does not say that {cls.__name__} runs on a static cache (_can_compile_fullgraph)"
    if model.training:
        return "the model is in training mode; call model.eval()"
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"attention implementation {attention!r}; use 'sdpa' or 'eager'"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model is spread over several devices"
    return None


def call_reason(model: torch.nn.Module, call: dict[str, Any]) -> str | None:
    """Why the loop does not cover a call of ``generate`` with the arguments ``call``; None if it does."""
    for name in (*CACHES, "cache_params", "custom_generate", "assistant_model", "negative_prompt_ids"):
        if call.get(name) is not None:
            return f"generate was called with {name}"
    if call.get("synced_gpus"):
        return "generate was called with synced_gpus"
    if autocast_is_on():  # which chooses the dtypes of keys and values too
        return "autocast is on"
    config, _ = model._prepare_generation_config(call.get("generation_config"), **_generation_arguments(call))
    if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"generation mode {config.get_generation_mode().value}"
    for name in ("cache_implementation", "compile_config", "stop_strings"):
        if getattr(config, name) is not None:
            return f"{name} is set"
    for name in ("output_attentions", "output_hidden_states", "is_assistant", "token_healing"):
        if getattr(config, name):
            return f"{name} is set"
    if config.use_cache is False:
        return "use_cache is False"
    return None


def _generation_arguments(call: dict[str, Any]) -> dict[str, Any]:
    named = inspect.signature(GenerationMixin.generate).parameters
    return {name: value for name, value in call.items() if name not in named}


class Decoder:
    """Feeds one token after the other to the model, for one call of ``generate``.

    ``ids(n)`` gives the prompt, which takes ``prompt`` positions, and the first n generated tokens. The buffers of a
    step are checked against transformers' own inputs at the second token, once per kind of call; where they differ, and
    where no buffers can follow, transformers prepares every token.
    """

    def __init__(
        self, runtime, slot: Slot, outputs: Any, kwargs: dict[str, Any], ids: Callable[[int], Tensor], prompt: int
    ):
        self.runtime, self.model, self.slot, self.ids, self.prompt = runtime, runtime.model, slot, ids, prompt
        self.outputs, self.kwargs = outputs, kwargs
        self.fed, self.kwargs_at, self.loaded_at = 0, 1, 1
        self.step: Step | None = None
        self.kind: Any = None

    def foresee(self) -> None:
        """Have the graph of a token recorded before there is one."""
        self.fed = 1
        with self.model._optimize_model_for_decode():
            bind(self.runtime, self.slot, Inputs(*self._inputs()))

    @property
    def verified(self) -> bool:
        return self.step is not None and self.kind in self.runtime.verified

    def arrive(self, token: Tensor | None = None) -> None:
        """Make ready to feed the next token: ``token`` [batch], unless the step's buffer holds it already."""
        self.fed += 1
        if self.step is not None and token is not None:
            self.step.inputs.token.copy_(token[:, None])
        if self.fed == 1:
            self._begin()
        elif self.step is not None and self.fed == 2 and not self.verified:
            self._verify()
        elif self.step is not None and self.fed - self.loaded_at == self.step.inputs.rows:
            self.step.inputs.load(*self._inputs())
            self.loaded_at = self.fed

    def logits(self) -> Tensor:
        """Feed the token arrived at; the logits of the next one [batch, vocabulary], valid until the next call."""
        if self.step is None:
            return self.model(**self._prepare(), return_dict=True).logits[:, -1]
        run = self.step.runner() if self.verified else self.step.logits
        return run()

    def _begin(self) -> None:
        first, block = self._inputs()
        self.kind = kind(first)
        if self.kind in self.runtime.unfollowed:
            return
        step = self.slot.steps.get(self.kind)
        if step is not None:
            step.inputs.load(first, block)
            if step.refresh():
                self.step = step
                return
        try:
            inputs = Inputs(first, block)
        except NotAdvanceable as reason:
            self._unfollowed(str(reason))
            return
        step = Step(self.runtime, self.slot, inputs)
        if step.unbound:
            self.runtime.fall_back(f"no step is captured, each runs the compiled forward: {step.unbound}")
        self.step = self.slot.steps[self.kind] = step

    def _verify(self) -> None:
        if reason := self.step.inputs.differs(self._prepare()):
            self.step = None
            self._unfollowed(reason)
        else:
            self.runtime.verified.add(self.kind)

    def _unfollowed(self, reason: str) -> None:
        self.runtime.unfollowed.add(self.kind)
        self.runtime.fall_back(f"transformers prepares every token: {reason}")

    def _inputs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._prepare(), self._prepare(block_rows(self.slot))

    def _prepare(self, more: int = 0) -> dict[str, Any]:
        """transformers' inputs for the token that is fed next, and for ``more`` tokens (any) after it."""
        self.kwargs = self._follow(self.kwargs, self.fed - self.kwargs_at)
        self.kwargs_at = self.fed
        ids = self.ids(self.fed)
        if more:
            ids = torch.cat([ids, ids.new_zeros(len(ids), more)], dim=1)
        kwargs = self._follow(self.kwargs, more)
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=1 + more, **kwargs)
        return in_rings(inputs, self.slot.rings, self.prompt + self.fed - 1)

    def _follow(self, kwargs: dict[str, Any], tokens: int) -> dict[str, Any]:
        """The model's keyword arguments ``tokens`` tokens later."""
        kwargs, update = dict(kwargs), self.model._update_model_kwargs_for_generation
        if tokens == 0:
            return kwargs
        own = type(self.model)._update_model_kwargs_for_generation
        # For several tokens at once transformers would repeat the end of the prompt's token types.
        if own is GenerationMixin._update_model_kwargs_for_generation and kwargs.get("token_type_ids") is None:
            return update(self.outputs, kwargs, num_new_tokens=tokens)
        for _ in range(tokens):
            kwargs = update(self.outputs, kwargs)
        return kwargs


class Check:
    """Brings the chosen tokens to the host for the streamer and the end, ``lag`` tokens late so that nothing waits.

    ``kept`` is the number of tokens up to the one that finished the last row, or that came after ``deadline`` (seconds
    since the epoch); None while some row goes on.
    """

    def __init__(self, batch: int, eos: list[int], streamer: Any, lag: int, deadline: float | None):
        self.eos, self.streamer, self.lag, self.deadline = frozenset(eos), streamer, lag, deadline
        self.running = set(range(batch))
        self.pending: deque[tuple[Tensor, Any]] = deque()
        self.seen, self.kept = 0, None

    def push(self, token: Tensor) -> bool:
        """Note the next token [batch]; whether every row is known to have ended."""
        if not self.eos and self.streamer is None and self.deadline is None:
            return False
        if self.lag:
            host = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
            host.copy_(token, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self.pending.append((host, arrived))
        else:
            self._look(token.to("cpu", copy=True))
        return self.drain(self.lag)

    def drain(self, left: int = 0) -> bool:
        """Look at all but the last ``left`` tokens."""
        while len(self.pending) > left and self.kept is None:
            host, arrived = self.pending.popleft()
            arrived.synchronize()
            self._look(host)
        return self.kept is not None

    def _look(self, token: Tensor) -> None:
        self.seen += 1
        if self.streamer is not None:
            self.streamer.put(token)
        if self.eos:
            values = token.tolist()
            self.running = {row for row in self.running if values[row] not in self.eos}
        if not self.running or (self.deadline is not None and time.time() > self.deadline):
            self.kept = self.seen


def generate_tokens(
    runtime,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any,
    kwargs: dict[str, Any],
) -> Tensor | GenerateDecoderOnlyOutput:
    """What ``_sample`` does with these arguments, which ``generate`` has prepared; ``kwargs`` go to the model."""
    model = runtime.model
    limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
    prepared = kwargs.get(CACHE)
    reason = None
    if type(prepared) is not DynamicCache or prepared.offloading:
        reason = f"the cache is a {type(prepared).__name__}, not a plain key/value cache"
    elif not limits:
        reason = "no maximum length is set"
    elif input_ids.device != model.device:
        reason = f"the prompt is on {input_ids.device}, the model on {model.device}"
    wake(input_ids.device)
    reason = reason or runtime.hooked() or runtime.pool.learn()

    def stock(reason: str) -> Tensor | GenerateDecoderOnlyOutput:
        runtime.fall_back(reason)
        generation_config.disable_compile = True
        return model._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **kwargs
        )

    if reason is not None:
        return stock(reason)
    embeds = kwargs.get("inputs_embeds")
    prompt = (input_ids if embeds is None else embeds).shape[1]
    limit = max(1, min(limits) - input_ids.shape[1])  # criteria of the caller's may be met from the start
    # Buffers outlive the call: under the caller's inference mode they could not be written to outside of it.
    with torch.inference_mode(False), torch.no_grad():
        runtime.recordings.refresh()
        whole = generation_config.return_dict_in_generate or generation_config.prefill_chunk_size is not None
        whole = whole or getattr(kwargs.get("attention_mask"), "ndim", 2) != 2  # a mask of 4 dimensions stays as it is
        try:
            slot = runtime.pool.acquire(len(input_ids), prompt + limit, bool(whole))
        except RuntimeError as error:  # the CPU's allocator raises no OutOfMemoryError
            return stock(f"no static cache of {prompt + limit} tokens: {str(error).partition(chr(10))[0]}")
        loop = Loop(runtime, slot, input_ids, logits_processor, stopping_criteria, generation_config, streamer, limit)
        with runtime.in_order(input_ids.device):
            try:
                return loop.run(dict(kwargs), prompt)
            except NotPrepared as error:
                return stock(str(error))
            finally:
                slot.reset()


class NotPrepared(Exception):
    """transformers cannot prepare a prompt for a static cache."""


def _prefill(
    runtime,
    slot: Slot,
    input_ids: Tensor,
    config: GenerationConfig,
    kwargs: dict[str, Any],
    beside: Callable[[Bound], None],
) -> Any:
    """The forward of the prompt; ``beside`` as in ``Recordings.bind``."""
    model = runtime.model
    if config.prefill_chunk_size is not None:
        config.disable_compile = True  # it is compiled already
        return model._prefill(input_ids, config, kwargs)
    mask = kwargs.get(MASK)
    plain = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
    if plain and not hasattr(model, "create_masks_for_generate"):
        if runtime.prepares is None:
            runtime.prepares = _prepares(model, input_ids, kwargs)
        if runtime.prepares:
            outputs = _recorded(runtime, slot, _prepared(model, input_ids, kwargs, Unmasked), beside)
            if not isinstance(outputs, str):
                return outputs
    inputs = _prepared(model, input_ids, kwargs, StaticCache)
    outputs = _recorded(runtime, slot, inputs, beside)
    if isinstance(outputs, str):
        runtime.unrecorded(outputs)
        return model(**inputs)
    return outputs


class Unmasked(StaticCache):
    """A static cache for which transformers prepares no mask [B, 1, S, L]: the forward makes its own of [B, S]."""

    is_compileable = False


def _prepares(model: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether transformers prepares a token for a static cache, as it will after the prompt, when it is too late."""
    try:
        _prepared(model, input_ids[:, :1], kwargs, StaticCache)
    except NotPrepared:
        return False
    return True


def _keeps_cache(model: Any, input_ids: Tensor, more: int, kwargs: dict[str, Any]) -> bool:
    """Whether the model feeds the prompt and ``more`` tokens to one cache: some begin another one where longer texts
    are rotated otherwise."""
    if type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
        return True
    last = torch.cat([input_ids, input_ids.new_zeros(len(input_ids), more)], dim=1)
    cache = _stand_in(kwargs[CACHE], Unmasked)
    with suppress(Exception):  # of the empty cache, or a mask of other length: neither is what the loop will ask for
        inputs = model.prepare_inputs_for_generation(last, next_sequence_length=1, **kwargs | {CACHE: cache})
        return any(value is cache for value in inputs.values())
    return True


def _stand_in(cache: StaticCache, kind: type[StaticCache]) -> StaticCache:
    stand_in = copy.copy(cache)
    stand_in.__class__ = kind
    return stand_in


def _prepared(model: Any, input_ids: Tensor, kwargs: dict[str, Any], kind: type[StaticCache]) -> dict[str, Any]:
    """transformers' inputs for the prompt, as it would prepare them for a cache of that ``kind``."""
    cache = kwargs[CACHE]
    stand_in = _stand_in(cache, kind)
    try:
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs | {CACHE: stand_in})
    except Exception as error:
        raise NotPrepared(f"no inputs for a static cache: {type(error).__name__}: {error}") from error
    inputs = {name: cache if value is stand_in else value for name, value in inputs.items()}
    return inputs | {"return_dict": True}


def _recorded(runtime, slot: Slot, inputs: dict[str, Any], beside: Callable[[Bound], None]) -> Any:
    """What the recorded forward of the prompt returns, or why it is not recorded."""
    outputs = prefill(runtime, slot, inputs, beside)
    if outputs is not None:
        return outputs
    bound = runtime.recordings.bind(inputs, "prompt", beside=beside)
    return bound if isinstance(bound, str) else bound.result(bound.graph.run(*bound.graph.args))


def _without_logits(outputs: ModelOutput) -> ModelOutput:
    return type(outputs)(**{name: value for name, value in outputs.items() if name != "logits"})


class Loop:
    """One call of ``generate``: chooses tokens until the criteria say so."""

    def __init__(
        self,
        runtime,
        slot: Slot,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: Any,
        limit: int,
    ):
        self.runtime, self.slot, self.input_ids, self.limit = runtime, slot, input_ids, limit
        self.processors, self.criteria, self.config, self.streamer = processors, criteria, config, streamer
        self.sampled, records = config.do_sample, config.return_dict_in_generate
        self.keeps_scores, self.keeps_logits = records and config.output_scores, records and config.output_logits
        # Other criteria may look at anything, so they are called at every token.
        self.plain = all(type(c) in (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria) for c in criteria)
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)
        eos = [c.eos_token_id.to(input_ids.device) for c in criteria if type(c) is EosTokenCriteria]
        self.eos = torch.cat(eos).unique() if eos else input_ids.new_zeros(0)
        self.pad = config._pad_token_tensor.to(input_ids.device) if self.pads else None
        self.unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        late = [c.initial_timestamp + c.max_time for c in criteria if type(c) is MaxTimeCriteria]
        deadline = min(late) if late and self.plain else None
        self.check = Check(len(input_ids), self.eos.tolist() if self.plain else [], streamer, self._lag(), deadline)
        self.tokens: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.offsets: list[int] = []
        self.tail: Tail | None = None
        self.picked = 0  # tokens chosen on the device

    def _lag(self) -> int:
        """No token may be chosen after the end that anyone could notice: not even by a user's processor."""
        ours = all(type(p).__module__.startswith("transformers.") for p in self.processors)
        return LAG if self.input_ids.device.type == "cuda" and self.plain and ours else 0

    def ids(self, count: int) -> Tensor:
        """The prompt and the first ``count`` tokens."""
        if self.tail is not None:
            return self.tail.ids[:, : self.input_ids.shape[1] + count].clone()
        return torch.cat([self.input_ids, *(token[:, None] for token in self.tokens[:count])], dim=1)

    def run(self, kwargs: dict[str, Any], prompt: int) -> Tensor | GenerateDecoderOnlyOutput:
        """``kwargs`` of the model for a prompt of that many positions."""
        model, prepared = self.runtime.model, kwargs[CACHE]
        kwargs[CACHE] = self.slot.cache
        if not _keeps_cache(model, self.input_ids, self.limit - 1 + block_rows(self.slot), kwargs):
            raise NotPrepared("the model begins another cache within so many tokens")
        self.slot.fill_with_prompt(True)
        foresee = partial(self._foresee, kwargs, prompt)
        outputs = _prefill(self.runtime, self.slot, self.input_ids, self.config, kwargs, foresee)
        self.slot.fill_with_prompt(False)
        logits = outputs.logits[:, -1]
        outputs = _without_logits(outputs)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        decoder = Decoder(self.runtime, self.slot, outputs, kwargs, self.ids, prompt)
        asked = False
        with model._optimize_model_for_decode():
            while not self._choose(logits):
                decoder.arrive(self.tokens[-1])
                if decoder.verified and not asked:
                    asked = True
                    if chosen := self._on_device():
                        self._rest(decoder, chosen)
                        break
                logits = decoder.logits()
        return self._finish(prepared, prompt)

    def _foresee(self, kwargs: dict[str, Any], prompt: int, bound: Bound) -> None:
        """Record the graph of a token before the prompt's, ``bound``, has run: as if it had given no logits, and some
        token were the next. What goes wrong here goes wrong where the loop gets there, which says so."""
        model, stock = self.runtime.model, GenerationMixin
        outputs = _without_logits(bound.result(itertools.count()))
        for name in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation"):
            if getattr(type(model), name) is not getattr(stock, name):
                return
        if self.limit == 1 or outputs.keys() != {CACHE}:
            return
        ids = torch.cat([self.input_ids, self.input_ids.new_zeros(len(self.input_ids), 1)], dim=1)
        self.slot.fill_with_prompt(False)
        self.slot.stand_at(prompt)
        with suppress(Exception):
            kwargs = model._update_model_kwargs_for_generation(outputs, dict(kwargs))
            Decoder(self.runtime, self.slot, outputs, kwargs, lambda _: ids, prompt).foresee()
        self.slot.stand_at(0)
        self.slot.fill_with_prompt(True)

    def _choose(self, logits: Tensor) -> bool:
        """Append the next token, from ``logits`` [batch, vocabulary]; whether it was the last."""
        ids = self.ids(len(self.tokens)) if self.processors or not self.plain else None
        logits = logits.to(copy=True, dtype=torch.float32)
        scores = self.processors(ids, logits)
        if self.keeps_scores:
            self.scores.append(scores)
        if self.keeps_logits:
            self.logits.append(logits)
        if self.sampled:
            token = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
            self._note_offset()
        else:
            token = scores.argmax(-1)
        if self.pads:
            token = token * self.unfinished + self.pad * (1 - self.unfinished)
        self.tokens.append(token)
        if not self.plain:
            return self._stopped(torch.cat([ids, token[:, None]], dim=1))
        if self.pads:
            self.unfinished = self.unfinished * (token[:, None] != self.eos).all(-1)
        return self.check.push(token) or len(self.tokens) == self.limit

    def _stopped(self, ids: Tensor) -> bool:
        scores = tuple(self.scores) if self.keeps_scores else None
        self.unfinished = self.unfinished & ~self.criteria(ids, scores)
        self.check.push(self.tokens[-1])
        return bool(self.unfinished.max() == 0)

    def _note_offset(self) -> None:
        if self.check.lag:
            self.offsets.append(_generator(self.input_ids).get_offset())

    def _on_device(self) -> Choice | None:
        """How the device chooses the tokens from now on; None if that needs the host."""
        ids, left = self.ids(len(self.tokens)), self.limit - len(self.tokens)
        if not self.plain or ids.shape[1] + left > self.slot.length:
            return None
        return choice(self.processors, ids, left, self.sampled, self.keeps_scores or self.keeps_logits)

    def _rest(self, decoder: Decoder, chosen: Choice) -> None:
        """All tokens after the first, chosen on the device."""
        ids, left = self.ids(len(self.tokens)), self.limit - len(self.tokens)
        tail = decoder.step.tail(chosen, len(self.eos))
        tail.begin(chosen, ids, self.eos, self.pad, self.unfinished)
        run, token, self.tail = decoder.step.runner(tail), tail.token[:, 0], tail
        for index in range(left):
            if index:
                decoder.arrive()
            run()
            self.picked += 1
            if self.sampled:
                self._note_offset()
            if self.keeps_scores:
                self.scores.append(tail.scores.clone())
            if self.keeps_logits:
                self.logits.append(tail.raw.clone())
            if self.check.push(token):
                break

    def _finish(self, prepared: DynamicCache, prompt: int) -> Tensor | GenerateDecoderOnlyOutput:
        self.check.drain()
        if self.tail is not None:
            self.tail.check()
        made = len(self.tokens) + self.picked
        count = made if self.check.kept is None else self.check.kept
        if count < len(self.offsets):  # as if the tokens after the end had never been drawn
            _generator(self.input_ids).set_offset(self.offsets[count - 1])
        if self.streamer is not None:
            self.streamer.end()
        sequences = self.ids(count)
        if not self.config.return_dict_in_generate:
            return sequences
        fill(prepared, self.slot.cache, prompt + count - 1)
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=tuple(self.scores[:count]) if self.keeps_scores else None,
            logits=tuple(self.logits[:count]) if self.keeps_logits else None,
            **{CACHE: prepared},
        )


def _generator(tensor: Tensor) -> torch.Generator:
    return torch.cuda.default_generators[tensor.device.index]
