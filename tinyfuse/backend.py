"""The ``torch.compile`` backend: normalize, lift, fuse, lower, run; the stock graph whenever anything fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule
from torch.fx import Graph, GraphModule, Node

from tinyfuse import fallback
from tinyfuse.graph.library import all_patterns
from tinyfuse.graph.lower import lower
from tinyfuse.graph.nodes import autocast_is_on
from tinyfuse.graph.normalize import normalize
from tinyfuse.graph.rewrite import rewrite
from tinyfuse.graph.share import share_common
from tinyfuse.graph.tidy import batch_counters, bound_masks, drop_dead
from tinyfuse.report import account

MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile a Dynamo graph. ``mode`` takes the names ``torch.compile`` documents; ``options``: none yet.

    Raises ValueError for an unknown mode or option. Any other failure returns the stock graph, with a warning.
    """
    _check(mode, options or {})
    _hint_generate()
    if os.environ.get("TINYFUSE_DISABLE") == "1":
        return gm.forward
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        fallback.record("backend", "gradients are needed, so the stock graph runs: call it under torch.no_grad()")
        return gm.forward
    if _autocasts(gm.graph):
        fallback.record("backend", "autocast is on, so the stock graph runs: load the model in that dtype instead")
        return gm.forward
    try:
        return compile_graph(gm.graph)
    except fallback.FallbackError:
        raise
    except Exception as error:
        fallback.record("backend", f"compilation failed, the stock graph runs: {type(error).__name__}: {error}", error)
        return gm.forward


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
        wrapper = frame.f_locals.get("self")
        if isinstance(wrapper, OptimizedModule):
            if callable(getattr(wrapper._orig_mod, "generate", None)):
                fallback.hint(
                    "backend",
                    "torch.compile(model) covers model(...) but not model.generate(...), which calls the original "
                    "forward: use tinyfuse.optimize(model), or model.compile(backend='tinyfuse')",
                )
            return
        frame = frame.f_back


def compile_graph(traced: Graph) -> Callable[..., Any]:
    """Rewrite a copy of ``traced``, put it into the current report and return what runs it."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(traced, copies))
    normalize(graph)
    share_common(graph)
    outcome = rewrite(graph, all_patterns())
    batch_counters(graph)
    bound_masks(graph)
    drop_dead(graph)
    run, choices = lower(graph)
    return account(run, traced, copies, outcome, choices)
