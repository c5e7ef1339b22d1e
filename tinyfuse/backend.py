"""The ``torch.compile`` backend: normalize, lift, fuse, lower, run; the stock graph whenever anything fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo import symbolic_convert
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import SkipFrame
from torch._dynamo.source import AttrSource
from torch._dynamo.variables import UserDefinedObjectVariable, UserMethodVariable
from torch.fx import Graph, GraphModule, Node

from tinyfuse import fallback
from tinyfuse.graph.library import all_patterns
from tinyfuse.graph.lower import lower
from tinyfuse.graph.nodes import autocast_is_on
from tinyfuse.graph.normalize import normalize
from tinyfuse.graph.rewrite import rewrite
from tinyfuse.graph.share import share_common
from tinyfuse.graph.tidy import batch_counters, bound_masks, drop_dead, keep_layouts
from tinyfuse.report import account
from tinyfuse.runtime import replay

NO_REPLAY = "max-autotune-no-cudagraphs"
MODES = (None, "default", "reduce-overhead", "max-autotune", NO_REPLAY)


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile a Dynamo graph. ``mode`` takes the names ``torch.compile`` documents, of which
    ``"max-autotune-no-cudagraphs"`` launches every call from Python; ``options``: none yet.

    Raises ValueError for an unknown mode or option, and SkipFrame, upon which Dynamo runs the code as it is, where
    :func:`lost_method` has a reason. Any other failure returns the stock graph, with a warning.
    """
    _check(mode, options or {})
    _hint_generate()
    if os.environ.get("TINYFUSE_DISABLE") == "1":
        return gm.forward
    if reason := lost_method():
        fallback.record("backend", reason)
        raise SkipFrame(reason)
    if _needs_gradients(gm.graph, example_inputs):
        fallback.record("backend", "gradients are needed, so the stock graph runs: call it under torch.no_grad()")
        return gm.forward
    if _autocasts(gm.graph):
        fallback.record("backend", "autocast is on, so the stock graph runs: load the model in that dtype instead")
        return gm.forward
    try:
        on = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)} & set(replay.DEVICES)
        return compile_graph(gm.graph, bool(on) and mode != NO_REPLAY)
    except fallback.FallbackError:
        raise
    except Exception as error:
        fallback.record("backend", f"compilation failed, the stock graph runs: {type(error).__name__}: {error}", error)
        return gm.forward


def lost_method() -> str | None:
    """Why the code that Dynamo compiles now has to run as it is: it sets an attribute to ``function.__get__(object)``.

    Dynamo (torch 2.13) takes that for the attribute of ``object`` with the function's name. After the graph has run it
    would fail for want of one, or set another method without a word.
    """
    tracer = getattr(symbolic_convert.tls, "current_tx", None)
    changed = tracer.output.side_effects.store_attr_mutations.values() if tracer is not None else ()
    for name, value in (item for attributes in changed for item in attributes.items()):
        # isinstance of a lazy variable would build it, with guards.
        if type(value) is not UserMethodVariable or not isinstance(value.source, AttrSource):
            continue
        if not isinstance(value.obj, UserDefinedObjectVariable):
            continue
        cls = type(value.obj.value)
        if getattr(cls, value.source.member, None) is not value.fn:
            return (
                f"the model's code sets {name} to {value.fn.__name__}.__get__ of a {cls.__name__}, which Dynamo would "
                "lose, so that code runs eagerly: a newer version may do without, or put types.MethodType in its place"
            )
    return None


def _needs_gradients(graph: Graph, example_inputs: Sequence[Any]) -> bool:
    """Whether gradients flow through the graph, or through a part of it that turns them on."""
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        return True
    made = (node.meta.get("example_value") for node in graph.nodes if node.op.startswith("call_"))
    return any(isinstance(x, torch.Tensor) and x.grad_fn is not None for x in made)


def _autocasts(graph: Graph) -> bool:
    """Whether autocast chooses the dtypes of products, around the graph or inside it."""
    entered = [node.args[2] for node in graph.nodes if node.target is torch.amp.autocast_mode._enter_autocast]
    return autocast_is_on() or any(entered)


def _check(mode: str | None, options: dict[str, Any]) -> None:
    if mode not in MODES:
        raise ValueError(f"tinyfuse: unknown mode {mode!r}; use one of {', '.join(map(repr, MODES))}")
    if options:
        raise ValueError(f"tinyfuse: unknown options {sorted(options)}; there are none yet")


def _hint_generate() -> None:
    """``generate`` of what ``torch.compile(model)`` returns calls the model inside the wrapper: say so, once."""
    frame = sys._getframe()
    while frame is not None:
        # Up to Python 3.12 f_locals keeps what it shows alive, also after the caller's `del model`: no other frame's.
        if frame.f_code is OptimizedModule.__call__.__code__:
            if callable(getattr(frame.f_locals["self"]._orig_mod, "generate", None)):
                fallback.hint(
                    "backend",
                    "torch.compile(model) covers model(...) but not model.generate(...), which calls the original "
                    "forward: use tinyfuse.optimize(model), or model.compile(backend='tinyfuse')",
                )
            return
        frame = frame.f_back


def compile_graph(traced: Graph, replays: bool = False) -> Callable[..., Any]:
    """Rewrite a copy of ``traced``, put it into the current report and return what runs it, with ``replays`` through
    CUDA graphs."""
    graph = Graph(traced.owning_module)  # which has the modules that it takes, such as those of a condition
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(traced, copies))
    normalize(graph)
    share_common(graph)
    outcome = rewrite(graph, all_patterns())
    batch_counters(graph)
    bound_masks(graph)
    drop_dead(graph)
    keep_layouts(graph)
    run, choices = lower(graph)
    if replays and (written := replay.written_arguments(traced)) is not None:
        run = replay.Replay(run, written)
    return account(run, traced, copies, outcome, choices)
