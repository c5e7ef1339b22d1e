"""Prompts of similar lengths through one CUDA graph, padded on the right.

On a GPU a short prompt is bound by Python, which launches some ten kernels a layer. The padding repeats the last token
after the prompt, where causal attention does not look; its keys and values lie where later tokens write theirs before
anyone reads them; the logits are those of the prompt's last token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinyfuse.runtime.cache import Slot
from tinyfuse.runtime.captured import Captured, NotCapturable
from tinyfuse.runtime.forward import CACHE
from tinyfuse.runtime.recorded import Bound
from tinyfuse.runtime.step import fixed, on_buffers, tensors
from tinyfuse.runtime.window import MASK

LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512)
BUSY = 1024  # tokens that keep a GPU busy for longer than Python takes
DEVICES = ("cuda",)
MOST = 16  # kinds of prompts that one slot keeps
ARGUMENTS = {"input_ids", "position_ids", "attention_mask", CACHE, "logits_to_keep", "use_cache", "return_dict"}


def prefill(runtime, slot: Slot, inputs: dict[str, Any], beside: Callable[[Bound], None] | None = None) -> Any | None:
    """The forward of a prompt into the empty ``slot``, its logits those of the last token; None if it cannot be
    padded. ``beside`` as in ``Recordings.bind``."""
    dims = _sequence_dims(inputs)
    ids = inputs.get("input_ids")
    if dims is None or slot.rings or ids.device.type not in DEVICES:
        return None
    length = ids.shape[1]
    padded = next((n for n in LENGTHS if length <= n <= slot.length), None)
    if padded is None or len(ids) * padded > BUSY:
        return None
    shapes = {name: _padded(value, dims[name], padded) for name, value in tensors(inputs)}
    key = tuple((name, shapes[name], value.dtype) for name, value in tensors(inputs)), fixed(inputs)
    prompt = slot.prompts.get(key)
    if prompt is None or prompt.version != runtime.recordings.version:
        while len(slot.prompts) >= MOST:
            slot.prompts.popitem(last=False)
        prompt = slot.prompts[key] = Prompt(runtime, slot, inputs, shapes, dims, beside)
    slot.prompts.move_to_end(key)
    return prompt(inputs, length) if prompt.usable else None


def _sequence_dims(inputs: dict[str, Any]) -> dict[str, int] | None:
    """The dimension of the prompt in each tensor of a forward's arguments; None if some argument has no known one."""
    ids, keep = inputs.get("input_ids"), inputs.get("logits_to_keep")
    if inputs.keys() - ARGUMENTS or not isinstance(ids, Tensor) or type(keep) is not int or keep != 1:
        return None
    found = {}
    for name, value in tensors(inputs):
        dim = 2 if name.partition(".")[0] == MASK and value.dim() != 2 else value.dim() - 1
        if (dim == 2 and value.dim() != 4) or value.shape[dim] != ids.shape[1]:
            return None
        found[name] = dim
    return found


def _padded(value: Tensor, dim: int, length: int) -> tuple[int, ...]:
    return (*value.shape[:dim], length, *value.shape[dim + 1 :])


class Prompt:
    """The recorded forward on buffers of one padded length: Python runs it the first time, then a CUDA graph."""

    def __init__(
        self,
        runtime,
        slot: Slot,
        inputs: dict[str, Any],
        shapes: dict[str, tuple[int, ...]],
        dims: dict[str, int],
        beside: Callable[[Bound], None] | None,
    ):
        self.runtime, self.slot, self.dims = runtime, slot, dims
        self.version = runtime.recordings.version
        self.buffers = {name: value.new_zeros(shapes[name]) for name, value in tensors(inputs)}
        self.last = torch.zeros(1, dtype=torch.long, device=inputs["input_ids"].device)
        arguments = on_buffers(inputs, self.buffers) | {"logits_to_keep": self.last}
        bound = runtime.recordings.bind(arguments, "padded prompt", beside=beside)
        self.bound, self.usable = bound, not isinstance(bound, str)
        self.run: Callable[[], Any] | None = None

    def __call__(self, inputs: dict[str, Any], length: int) -> Any:
        for name, value in tensors(inputs):
            dim, buffer = self.dims[name], self.buffers[name]
            buffer.narrow(dim, 0, length).copy_(value)
            buffer.narrow(dim, length, buffer.shape[dim] - length).copy_(value.narrow(dim, length - 1, 1))
        self.last.fill_(length - 1)
        if self.run is None:
            self.run = self._run
        elif self.run == self._run and self.last.device.type == "cuda":
            self.run = self._captured()
        outputs = self.run()
        self.slot.stand_at(length)
        return self.bound.result(outputs)

    def _captured(self) -> Callable[[], Any]:
        captured = [prompt.run for prompt in self.slot.prompts.values() if isinstance(prompt.run, Captured)]
        stream = self.runtime.streams.on(self.last.device)
        try:  # the result of one prompt is read before another one runs
            return Captured(self._run, self.slot.counters(), stream, next(iter(captured), None))
        except NotCapturable as error:
            self.runtime.uncaptured(str(error))
            self.usable = False
            return self._run

    def _run(self) -> Any:
        return self.bound.graph.run(*self.bound.graph.args)
