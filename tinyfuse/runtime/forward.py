"""The compiled forward of one model instance: one graph for prompts of any length, one for single tokens."""

from __future__ import annotations

import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import reset_code
from transformers.generation.utils import GenerationMixin

from tinyfuse.report import Report, collect

# The name of the cache among a forward's arguments and results; up to transformers 5.23 the second.
CACHES = ("cache", "past_key_values")
CACHE = next(n for n in CACHES if n in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters)
# The dimension that grows with the prompt, by the names transformers uses; the last one where the rank varies.
TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
SEQUENCE_INPUTS = (
    *TOKENS, "attention_mask", "decoder_attention_mask", "position_ids", "decoder_position_ids", "token_type_ids",
    "encoder_outputs",
)  # fmt: skip

# Hooks of this module stay after a call that asked for hidden states, and do nothing in others.
CAPTURES = "transformers.utils.output_capturing"
MOST_HOOKED = 8  # sets of hooks on modules that are compiled with
COME_AND_GO = f"its modules had {MOST_HOOKED} sets of hooks, each compiled anew: register those that stay once"
NO_GRAPH = (
    "the forward ran as it is, no part of it as a graph: Dynamo is off, or at its limit of graphs for code that models "
    "share, which torch._dynamo.config.recompile_limit sets"
)

_serial = itertools.count()
_watch = threading.local()


@dataclass
class GraphCall:
    """One call of a compiled graph: ``run(*args)`` repeats it on the same tensors, with no guard checked."""

    run: Callable[..., Sequence[Any]]
    args: tuple[Any, ...]
    outputs: Sequence[Any] | None = None


class _Intercepted(BaseException):  # not an Exception: nothing on the way up may swallow it
    def __init__(self, call: GraphCall):
        super().__init__()
        self.call = call


class _Uncompiled(BaseException):  # not an Exception either
    """A call cannot be compiled, and nothing of it has run; the message says why."""


@contextmanager
def record_graphs() -> Iterator[list[GraphCall]]:
    """Collects the graph calls that this thread makes inside the block."""
    _watch.calls = calls = []
    try:
        yield calls
    finally:
        _watch.calls = None


def intercept(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> GraphCall | None:
    """Check Dynamo's guards for a call of ``forward`` and return the graph call it leads to, without running it.

    None if no graph was reached; then ``forward`` has run.
    """
    _watch.intercept = True
    try:
        forward(*args, **kwargs)
    except _Intercepted as reached:
        return reached.call
    finally:
        _watch.intercept = False
    return None


def hooked(model: nn.Module) -> bool:
    """Whether a module of ``model`` has forward hooks, which may do what no graph repeats."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return any(getattr(hook, "__module__", None) != CAPTURES for hook in hooks)


def _entry(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` for ``torch.compile``, with graphs, a recompile limit and a shape history of its own.

    Dynamo keeps all three per code object, and every transformers model enters through the same few decorators.
    """

    def entry(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    entry.__code__ = entry.__code__.replace(co_name=f"forward_{next(_serial)}")
    return entry


def _forget(entries: set[CodeType]) -> None:
    """Drop what Dynamo compiled for ``entries``, which would keep them alive: its table of compiled code holds them."""
    for code in entries:
        reset_code(code)


class CompiledForward:
    """Calls ``forward`` through the backend, with one compiled function per kind of call.

    Prompts of all lengths are one kind, single tokens another; so are one row and several (Dynamo never generalises
    from 1), a growing cache that holds nothing, one token or more, other arguments, other autograd modes, and other
    hooks on modules of ``model``, which Dynamo does not look for again. Each kind has few graphs, so none meets the
    recompile limit. ``report`` accounts for all of them. A kind that cannot be compiled runs as it is, as does one
    with yet other hooks where they come and go; ``fall_back`` is told why.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any], report: Report, fall_back: Callable[[str], None]):
        self.model, self.forward, self.report, self.fall_back = model, forward, report, fall_back
        self.hooks: list[dict[int, Any]] = []
        self.hook_sets: set[tuple[int, ...]] = set()
        parameters = inspect.signature(forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.entries: set[CodeType] = set()
        self.graphs: list[Callable[..., Any]] = []
        weakref.finalize(self, _forget, self.entries).atexit = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # By name, as generate calls it: otherwise model(ids) and model(input_ids=ids) would be two graphs.
        names = self.names[: len(args)]
        if len(names) == len(args) and not kwargs.keys() & set(names):
            args, kwargs = (), dict(zip(names, args, strict=True)) | kwargs
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        tokens, rows, held = mark_dynamic(kwargs)
        hooked = self._hooked()
        kind = (tokens, rows, held, *modes, hooked, *kwargs)
        if kind not in self.compiled:
            if hooked and len(self.hook_sets | {hooked}) > MOST_HOOKED:
                return self._eagerly(COME_AND_GO, *args, **kwargs)
            self.hook_sets.add(hooked)
            entry = _entry(self.forward)
            self.entries.add(entry.__code__)
            self.compiled[kind] = torch.compile(entry, backend=partial(_backend, weakref.ref(self), bool(held)))
        before = getattr(_watch, "graphs", 0)
        try:
            outputs = self.compiled[kind](*args, **kwargs)
        except _Uncompiled as reason:
            self.compiled[kind] = partial(self._eagerly, str(reason))
            return self.compiled[kind](*args, **kwargs)
        if getattr(_watch, "graphs", 0) == before and not isinstance(self.compiled[kind], partial):
            self.fall_back(NO_GRAPH)
        return outputs

    def _eagerly(self, reason: str, /, *args: Any, **kwargs: Any) -> Any:
        self.fall_back(reason)
        return self.forward(*args, **kwargs)

    def _hooked(self) -> tuple[int, ...]:
        """The hooks on modules, each by its number."""
        if not self.hooks:
            every = nn.modules.module
            self.hooks = [every._global_forward_hooks, every._global_forward_pre_hooks]
            self.hooks += [every._global_backward_hooks, every._global_backward_pre_hooks]
            for m in self.model.modules():
                self.hooks += [m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks]
        return tuple([number for hooks in filter(None, self.hooks) for number in hooks])


def _backend(
    owner: weakref.ref[CompiledForward], grows: bool, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """``owner``, which holds the graphs: Dynamo keeps every backend for good and what it returned for as long as the
    code lives. ``grows``: the cache does, so that no two calls in a row are of one length."""
    from tinyfuse.backend import NO_REPLAY, backend, lost_method  # every pattern and kernel: not at import

    forward = owner()
    if reason := lost_method():
        if torch._dynamo.symbolic_convert.tls.current_tx.f_code in forward.entries:
            raise _Uncompiled(reason)
        forward.fall_back(reason)
        raise torch._dynamo.exc.SkipFrame(reason)  # after a graph break: a part of the call may have run
    forward.hooks = []  # modules may be others than they were
    with collect(forward.report):
        forward.graphs.append(backend(gm, example_inputs, mode=NO_REPLAY if grows else None))
    graph = weakref.ref(forward.graphs[-1])

    def run(*args: Any) -> Any:
        compiled = graph() or gm.forward  # at its limit of recompilations Dynamo runs whatever graph has the guards
        if getattr(_watch, "intercept", False):
            raise _Intercepted(GraphCall(compiled, args))
        outputs = compiled(*args)
        _watch.graphs = getattr(_watch, "graphs", 0) + 1
        if (calls := getattr(_watch, "calls", None)) is not None:
            calls.append(GraphCall(compiled, args, outputs))
        return outputs

    return run


def mark_dynamic(inputs: dict[str, Any]) -> tuple[bool, bool, int]:
    """Mark what grows with the prompt or the cache as dynamic; whether there are several tokens, several rows, and how
    many tokens a cache that grows holds, 2 standing for more."""
    tokens = rows = False
    for name in SEQUENCE_INPUTS:
        value = inputs.get(name)
        for tensor in value.values() if isinstance(value, dict) else (value,):
            if isinstance(tensor, Tensor) and tensor.ndim:
                dims = sequence_dims(name, tensor)
                torch._dynamo.maybe_mark_dynamic(tensor, dims)
                if name in TOKENS:
                    tokens, rows = tokens or bool(dims), rows or tensor.shape[0] > 1
    return tokens, rows, max(_mark_cache(inputs.get(name)) for name in CACHES)


def _mark_cache(cache: Any) -> int:
    """Mark the lengths of the keys and values [B, H, L, D] of a cache that grows by concatenation, and of the encoder's
    beside it; how many tokens it holds."""
    if hasattr(cache, "cross_attention_cache"):
        _mark_layers(cache.cross_attention_cache)
        cache = cache.self_attention_cache
    return _mark_layers(cache)


def _mark_layers(cache: Any) -> int:
    held = 0
    for layer in getattr(cache, "layers", ()):
        if type(layer).__name__ == "DynamicLayer" and layer.is_initialized and layer.keys.ndim == 4:
            held = min(2, layer.keys.shape[2])
            if held == 2:
                torch._dynamo.maybe_mark_dynamic(layer.keys, 2)
                torch._dynamo.maybe_mark_dynamic(layer.values, 2)
    return held


def sequence_dims(name: str, tensor: Tensor) -> list[int]:
    """The dimensions of the input ``name`` that grow with the prompt or the cache and are longer than 1."""
    if name not in SEQUENCE_INPUTS:
        return []
    if name.endswith("attention_mask"):
        dims = (1,) if tensor.ndim == 2 else (tensor.ndim - 2, tensor.ndim - 1)
    else:
        dims = (1,) if name in (*TOKENS, "encoder_outputs") else (tensor.ndim - 1,)
    return [dim for dim in dims if 0 <= dim < tensor.ndim and tensor.shape[dim] > 1]
