"""The compiled forward of one model instance: one graph for prompts of any length, one for single tokens."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfuse.report import Report, collect

# The dimension that grows with the prompt, by the names transformers uses; the last one where the rank varies.
TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
SEQUENCE_INPUTS = (
    *TOKENS, "attention_mask", "decoder_attention_mask", "position_ids", "decoder_position_ids", "token_type_ids",
    "encoder_outputs",
)  # fmt: skip

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


def _compile(forward: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile(forward)`` with graphs, a recompile limit and a shape history of its own.

    Dynamo keeps all three per code object, and every transformers model enters through the same few decorators.
    """

    def entry(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    entry.__code__ = entry.__code__.replace(co_name=f"forward_{next(_serial)}")
    return torch.compile(entry, backend=backend)


class CompiledForward:
    """Calls ``forward`` through the backend, with one compiled function per kind of call.

    Prompts of all lengths are one kind, single tokens another; so are one row and several (Dynamo never generalises
    from 1), a growing cache that holds nothing, one token or more, other arguments, other autograd modes, and other
    hooks on modules of ``model``, which Dynamo does not look for again. Each kind has few graphs, so none meets the
    recompile limit. ``report`` accounts for all of them.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any], report: Report):
        self.model, self.forward, self.report = model, forward, report
        self.hooks: list[dict[int, Any]] = []
        parameters = inspect.signature(forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # By name, as generate calls it: otherwise model(ids) and model(input_ids=ids) would be two graphs.
        names = self.names[: len(args)]
        if len(names) == len(args) and not kwargs.keys() & set(names):
            args, kwargs = (), dict(zip(names, args, strict=True)) | kwargs
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        kind = (*mark_dynamic(kwargs), *modes, self._hooked(), *kwargs)
        if kind not in self.compiled:
            self.compiled[kind] = _compile(self.forward, self._backend)
        return self.compiled[kind](*args, **kwargs)

    def _backend(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from tinyfuse.backend import backend  # every pattern and kernel; not on the way of `import tinyfuse`

        self.hooks = []  # modules may be others than they were
        with collect(self.report):
            compiled = backend(gm, example_inputs)

        def run(*args: Any) -> Any:
            if getattr(_watch, "intercept", False):
                raise _Intercepted(GraphCall(compiled, args))
            outputs = compiled(*args)
            if (calls := getattr(_watch, "calls", None)) is not None:
                calls.append(GraphCall(compiled, args, outputs))
            return outputs

        return run

    def _hooked(self) -> tuple[int, ...]:
        """The hooks on modules, each by its number."""
        if not self.hooks:
            every = nn.modules.module
            self.hooks = [every._global_forward_hooks, every._global_forward_pre_hooks]
            self.hooks += [h for m in self.model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
        return tuple([number for hooks in filter(None, self.hooks) for number in hooks])


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
    return tokens, rows, _mark_cache(inputs.get("past_key_values"))


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
