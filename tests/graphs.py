"""Build and run FX graphs from pattern expressions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401  (defines torch.ops.transformers)
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from tinyfuse.graph import nodes
from tinyfuse.graph.normalize import normalize
from tinyfuse.graph.pattern import Call, Capture, Cast
from tinyfuse.graph.rewrite import Outcome, rewrite, run_fake


class Built:
    """A graph whose outputs are ``roots``, with the example's tensors as placeholders."""

    def __init__(self, roots: Sequence[Any], example: dict[str, Any], extra_outputs: Sequence[Any] = ()):
        self.graph, self.mode = Graph(), FakeTensorMode()
        self.inputs: list[torch.Tensor] = []
        self.captured: dict[str, Any] = {}
        for name, given in example.items():
            self.captured[name] = self._placeholder(name, given) if isinstance(given, torch.Tensor) else given
        self.made: dict[int, Node] = {}
        outputs = [self._emit(e) for e in (*roots, *extra_outputs)]
        self.graph.output(tuple(n for n in outputs if nodes.is_tensor(n)))

    def _placeholder(self, name: str, given: torch.Tensor) -> Node:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = self.mode.from_tensor(given)
        self.inputs.append(given)
        return node

    def _emit(self, expr: Any) -> Any:
        if isinstance(expr, slice):
            return slice(*(self._emit(e) for e in (expr.start, expr.stop, expr.step)))
        if isinstance(expr, (tuple, list)):
            return type(expr)(self._emit(e) for e in expr)
        if isinstance(expr, Capture):
            return self._emit(self.captured[expr.name])
        if not isinstance(expr, (Call, Cast)):
            return expr
        if id(expr) not in self.made:
            if isinstance(expr, Cast):
                dtype = self.captured[expr.dtype] if isinstance(expr.dtype, str) else expr.dtype
                node = self.graph.call_function(nodes.cast, (self._emit(expr.arg), dtype))
            else:
                node = self.graph.call_function(expr.target, tuple(self._emit(a) for a in expr.args))
            with self.mode:
                node.meta["example_value"] = run_fake(node)
            self.made[id(expr)] = node
        return self.made[id(expr)]

    def run(self) -> tuple[list[Any], list[torch.Tensor]]:
        """The outputs, and the inputs as the run left them (patterns may write them)."""
        inputs = [x.clone() for x in self.inputs]
        outputs = GraphModule(torch.nn.Module(), self.graph)(*inputs)
        return list(outputs), inputs

    def rewrite(self, patterns: Sequence[Any]) -> Outcome:
        normalize(self.graph)
        outcome = rewrite(self.graph, patterns)
        self.graph.lint()
        return outcome
