"""One decode step on fixed memory: every input is a buffer that the step itself moves on to the next token.

What the model needs per token comes from transformers' own ``prepare_inputs_for_generation``, asked once for a block
of ``ROWS`` future tokens instead of once per token: row i of its masks and positions is what token i would have got.
A counter on the device selects the row. So a step reads and writes the same addresses every time: on CUDA it is one
graph to replay, elsewhere one call of the compiled graph.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tinyfuse.kernels import _advance
from tinyfuse.runtime.cache import Slot
from tinyfuse.runtime.captured import Captured, NotCapturable
from tinyfuse.runtime.forward import CACHE, GraphCall, intercept, record_graphs
from tinyfuse.runtime.recorded import Bound
from tinyfuse.runtime.rehearsal import rehearsal
from tinyfuse.runtime.tail import Choice, Tail

ROWS = 128
TABLE_BYTES = 1 << 25  # a block has fewer rows if its masks would take more
TAILS = 8  # ways of choosing a token that stay captured


class NotAdvanceable(Exception):
    """The step's inputs change in a way that buffers cannot follow; the message says how."""


def block_rows(slot: Slot) -> int:
    """Rows of a block of masks, [batch, 1, rows, length] of up to 4 bytes each. Never 1, never ``slot.length``."""
    return max(8, min(ROWS, TABLE_BYTES // (4 * slot.batch * slot.length)))


def tensors(inputs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among a forward's keyword arguments, those in dictionaries (masks per layer type) too."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", item) for key, item in value.items() if isinstance(item, Tensor))


def on_buffers(inputs: dict[str, Any], buffers: dict[str, Tensor]) -> dict[str, Any]:
    """A forward's keyword arguments with the tensors that :func:`tensors` names replaced."""
    return {
        name: {key: buffers.get(f"{name}.{key}", item) for key, item in value.items()}
        if isinstance(value, dict)
        else buffers.get(name, value)
        for name, value in inputs.items()
    }


def constants(inputs: dict[str, Any]) -> dict[str, Any]:
    """What is no tensor, to be compared from one token to the next."""
    return {
        name: {key: None if isinstance(item, Tensor) else item for key, item in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in inputs.items()
        if not isinstance(value, Tensor)
    }


class Inputs:
    """The buffers of one kind of call: ``arguments`` are a forward's keyword arguments on fixed memory.

    ``first``: transformers' inputs for the next token; ``block``: the same for ``rows + 1`` tokens at once.
    """

    def __init__(self, first: dict[str, Any], block: dict[str, Any]):
        self.dims: list[int] = []
        self.tables: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        rows = dict(tensors(block))
        for name, value in tensors(first):
            dim = self._row_dim(name, value, rows.get(name))
            self.buffers[name] = value.clone(memory_format=torch.contiguous_format)
            if dim is not None:
                self.dims.append(dim)
                self.tables[name] = rows[name].clone(memory_format=torch.contiguous_format)
        self.rows = block["input_ids"].shape[1] - 1
        self.token = self.buffers["input_ids"]
        self.row = torch.zeros(1, dtype=torch.long, device=self.token.device)
        self.done = torch.zeros_like(self.row)
        self.arguments = on_buffers(first, self.buffers)

    @staticmethod
    def _row_dim(name: str, first: Tensor, block: Tensor | None) -> int | None:
        """The dimension along which ``block`` holds what successive tokens get; None if it is the same for all."""
        if block is None or block.dim() != first.dim():
            raise NotAdvanceable(f"the model's input {name} changes its kind between tokens")
        grown = [dim for dim, (a, b) in enumerate(zip(first.shape, block.shape, strict=True)) if a != b]
        if name == "input_ids" or not grown:
            return None
        if len(grown) > 1 or first.shape[grown[0]] != 1:
            raise NotAdvanceable(f"the model's input {name} changes its shape from token to token")
        return grown[0]

    def load(self, first: dict[str, Any], block: dict[str, Any]) -> None:
        """Start over at another token: the same kind of call, new contents."""
        for name, value in tensors(first):
            self.buffers[name].copy_(value)
        for name, value in tensors(block):
            if name in self.tables:
                self.tables[name].copy_(value)
        self.row.zero_()

    def advance(self) -> None:
        """Move every buffer but the token to the next row. At most ``rows`` times after ``load``."""
        buffers = [self.buffers[name] for name in self.tables]
        _advance.OP(list(self.tables.values()), self.dims, buffers, self.row, self.done)

    def differs(self, expected: dict[str, Any]) -> str | None:
        """How the buffers differ from transformers' inputs for the token they stand at."""
        wanted = dict(tensors(expected))
        if constants(expected) != constants(self.arguments) or wanted.keys() != self.buffers.keys():
            return "the model takes other arguments for the second token than for the first"
        for name, value in wanted.items():
            if value.shape != self.buffers[name].shape or not torch.equal(value, self.buffers[name]):
                return f"the model's input {name} does not follow from the one before"
        return None


def kind(first: dict[str, Any]) -> tuple[Any, ...]:
    """What calls that may share buffers have in common."""
    return tuple((name, tuple(value.shape), value.dtype) for name, value in tensors(first)), fixed(first)


def fixed(inputs: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """What is neither a tensor nor the cache, to be told apart by."""
    return tuple((name, repr(value)) for name, value in constants(inputs).items() if name != CACHE)


def bind(runtime, slot: Slot, inputs: Inputs) -> Bound | str:
    """The graph of the forward on ``inputs``, compiled with the kernels of what most calls of ``generate`` do next."""

    def go_on(outputs: Any) -> None:
        inputs.advance()
        greedy = Choice(("greedy", 0), inputs.token.new_zeros(0), None, False)
        Tail(greedy, inputs.token, slot.length, 0).pick(outputs.logits[:, -1])

    return runtime.recordings.bind(_arguments(inputs), "token", go_on)


def _arguments(inputs: Inputs) -> dict[str, Any]:
    return {**inputs.arguments, "return_dict": True}


class Step:
    """A decode step bound to the memory of ``slot`` and ``inputs``: a graph of the model's forward on them."""

    def __init__(self, runtime, slot: Slot, inputs: Inputs):
        self.runtime, self.slot, self.inputs = runtime, slot, inputs
        self.tails: OrderedDict[Any, Tail] = OrderedDict()
        self.runners: dict[Any, Callable[[], Tensor]] = {}
        self.call: GraphCall | None = None
        self.version: int | None = None  # of the recordings, if the graph is one
        self.unbound: str | None = None
        bound = bind(runtime, slot, inputs)
        if isinstance(bound, str):
            runtime.unrecorded(bound)
            self.unbound = self._bind(runtime.model)
        else:
            self.call, self.version = bound.graph, runtime.recordings.version
            self.index = bound.result(itertools.count()).logits

    def _forward(self) -> Any:
        return self.runtime.compiled(**_arguments(self.inputs))

    def _bind(self, model: nn.Module) -> str | None:
        """Find the one graph call that the forward amounts to under Dynamo; the reason if it amounts to more."""
        counters = self.slot.counters()
        held = torch.stack(counters)
        before = cache_state(self.slot)
        with rehearsal(model) as left, record_graphs() as calls:
            logits = self._forward().logits
        if cache_state(self.slot) != before:
            left.append("the forward changes attributes of the cache")
        torch._foreach_copy_(counters, list(held))
        if len(calls) != 1:
            return f"the model's forward runs as {len(calls)} graphs, not as one"
        if left:
            return f"{left[0]} at every token"
        outputs = calls[0].outputs
        calls[0].outputs = None
        self.index = next((i for i, output in enumerate(outputs) if output is logits), None)
        if self.index is None:
            return "the logits are computed outside the graph"
        self.call = calls[0]
        self.addresses = _addresses(self.call)
        return None

    def refresh(self) -> bool:
        """Whether the step is still valid, for the model may have changed since."""
        if self.version is not None:
            return self.version == self.runtime.recordings.version
        if self.call is None:
            return True
        counters = self.slot.counters()
        held = torch.stack(counters)
        call = intercept(self._forward)
        if call is None:  # the forward ran
            torch._foreach_copy_(counters, list(held))
            return False
        return call.run is self.call.run and _addresses(call) == self.addresses

    def logits(self) -> Tensor:
        """Run the forward on the buffers and move them on; the logits of the next token [batch, vocabulary]."""
        call = self.call
        logits = self._forward().logits if call is None else call.run(*call.args)[self.index]
        self.inputs.advance()
        return logits[:, -1]

    def tail(self, choice: Choice, eos: int) -> Tail:
        """The tail for a choice, with ``eos`` ids that end a sequence; of at most ``TAILS`` at a time."""
        key = choice.key, eos
        if key not in self.tails:
            while len(self.tails) >= TAILS:
                _, unused = self.tails.popitem(last=False)
                self.runners.pop(unused, None)
            self.tails[key] = Tail(choice, self.inputs.token, self.slot.length, eos)
        self.tails.move_to_end(key)
        return self.tails[key]

    def runner(self, tail: Tail | None = None) -> Callable[[], Tensor]:
        """What runs :meth:`logits`, and with ``tail`` picks the token; its result is valid until it runs again."""
        if tail not in self.runners:

            def run() -> Tensor:
                logits = self.logits()
                if tail is not None:
                    tail.pick(logits)
                return logits

            self.runners[tail] = run
            if self.inputs.token.device.type == "cuda" and self.call is not None:
                state = [*self.slot.counters(), *self.inputs.buffers.values(), self.inputs.row]
                state += tail.state if tail is not None else []
                try:
                    self.runners[tail] = Captured(run, state, self.runtime.streams.on(state[0].device))
                except NotCapturable as error:
                    self.runtime.fall_back(f"a token is no CUDA graph, since one cannot hold its operations: {error}")
        return self.runners[tail]


def cache_state(slot: Slot) -> list[Any]:
    """The plain attributes of the cache's layers, and which tensors they hold."""
    plain = (bool, int, float, str, type(None))
    held = [(name, value) for layer in slot.cache.layers for name, value in vars(layer).items()]
    return [(name, value if isinstance(value, plain) else id(value)) for name, value in held]


def _addresses(call: GraphCall) -> list[Any]:
    return [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in call.args]
