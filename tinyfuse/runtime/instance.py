"""What :func:`tinyfuse.optimize` attaches to a model instance."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from tinyfuse import fallback
from tinyfuse.report import Report
from tinyfuse.runtime.forward import CompiledForward, hooked

ATTRIBUTE = "_tinyfuse"


class Runtime:
    """The compiled forward, the caches and the decode steps of ``model``; everything is made at first use.

    A deep copy and a pickle hold the model alone, so the copy compiles for itself. ``fallbacks`` lists, once each, the
    reasons why calls were not accelerated in full. ``own`` are the attributes that the instance had before.
    """

    def __init__(self, model: nn.Module, mode: str = "warn", own: dict[str, Any] | None = None):
        self.model, self.mode, self.own = model, mode, own or {}
        self.fallbacks: list[str] = []
        self.verified: set[Any] = set()
        self.unfollowed: set[Any] = set()
        self.prepares: bool | None = None  # transformers prepares tokens for a static cache; None: not known yet
        self.lock = threading.RLock()
        self.depth = 0

    def __reduce__(self):
        return Runtime, (self.model, self.mode, self.own)

    def stock(self, name: str) -> Callable[..., Any]:
        """The method ``name`` as it is without tinyfuse."""
        return self.own[name] if name in self.own else getattr(type(self.model), name).__get__(self.model)

    @cached_property
    def compiled(self) -> CompiledForward:
        return CompiledForward(self.model, self.stock("forward"), self.report, self.fall_back)

    @cached_property
    def recordings(self):
        from tinyfuse.runtime.recorded import Recordings

        return Recordings(self.model, self.stock("forward"), self.report)

    @cached_property
    def report(self) -> Report:
        """What was compiled since :func:`tinyfuse.optimize`, in all graphs."""
        device = next((str(p.device) for p in self.model.parameters()), "")
        return Report(type(self.model).__name__, device)

    @cached_property
    def pool(self):
        from tinyfuse.runtime.cache import CachePool

        return CachePool(self.model, self.stock("forward"))

    @cached_property
    def caches(self):
        from tinyfuse.runtime.encoder_decoder import Caches

        return Caches()

    @cached_property
    def streams(self):
        from tinyfuse.runtime.captured import CaptureStreams

        return CaptureStreams()

    def release(self) -> None:
        """Drop graphs and caches; the next use makes them anew."""
        if "streams" in self.__dict__:
            self.streams.release()
        for name in ("compiled", "recordings", "report", "pool", "caches", "last"):
            self.__dict__.pop(name, None)

    def fall_back(self, reason: str, asked: bool = False) -> None:
        """Note why a call takes the slower way. ``asked``: the caller chose it, so there is nothing to warn about."""
        self._list(reason)
        if self.mode == "error":
            raise fallback.FallbackError(f"generate: {reason}")
        (fallback.note if asked else fallback.record)("generate", reason)

    def _list(self, reason: str) -> None:
        if reason not in self.fallbacks:
            self.fallbacks.append(reason)

    def unrecorded(self, reason: str) -> None:
        """Note why Dynamo traces a call of the decode loop: first calls are slower for it, and a prompt is no graph."""
        self._note(f"traced by Dynamo: {reason}")

    def uncaptured(self, reason: str) -> None:
        """Note why prompts of some length are launched from Python each time."""
        self._note(f"a prompt is no CUDA graph: {reason}")

    def _note(self, reason: str) -> None:
        self._list(reason)
        fallback.note("generate", reason)

    def hooked(self) -> str | None:
        """A replayed step does not pass through ``model.__call__``."""
        every = nn.modules.module
        if not isinstance(vars(self.model).get("forward"), Forward):
            return "model.forward was replaced, so every token goes through the new one"
        prepare = self.model.prepare_inputs_for_generation  # the loop asks for many tokens at once, PEFT's knows one
        if getattr(prepare, "__func__", None) is not type(self.model).prepare_inputs_for_generation:
            return "model.prepare_inputs_for_generation was replaced, so every token goes through the new one"
        if every._global_forward_hooks or every._global_forward_pre_hooks or hooked(self.model):
            return "the model has forward hooks, so every token goes through model.__call__"
        return None

    @contextmanager
    def in_order(self, device: torch.device) -> Iterator[None]:
        """Kernels of the block start after those of the last such block, whatever stream either is on."""
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if (last := self.__dict__.get("last")) is not None:
            stream.wait_event(last)
        try:
            yield
        finally:
            self.last = stream.record_event()


class Forward:
    """``model.forward`` of an optimised model."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.runtime.stock("forward"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runtime = self.runtime
        if not torch.compiler.is_compiling():
            return runtime.compiled(*args, **kwargs)
        if "forward" in runtime.own:
            return runtime.own["forward"](*args, **kwargs)
        # No bound method: after a graph break Dynamo takes function.__get__(model) for model.forward, which is this
        # object, and types.MethodType breaks the graph.
        return type(runtime.model).forward(runtime.model, *args, **kwargs)


class Generate:
    """``model.generate`` of an optimised model."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.runtime.stock("generate"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from tinyfuse.runtime import generate

        return generate.generate(self.runtime, args, kwargs)
