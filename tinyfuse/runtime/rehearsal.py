"""Runs of a model's forward that only look: what they leave behind is put back."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyfuse.graph.record import Declined
from tinyfuse.runtime.watch import Watch

# Elements of a tensor that is copied, since the forward may write to it: fake tensors write to real ones of one
# element, and a real forward to no weight; larger buffers are some.
ONE, MANY = 1, 1 << 18
SEED = 0x7469_6E79  # that no forward sets


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """For a forward on fake tensors. Raises Declined if it does what no graph of it would repeat, which is undone."""
    before = _Before(model, ONE)
    try:
        yield
    finally:
        left = before.restore()
    if left:
        raise Declined(left)


@contextmanager
def rehearsal(model: nn.Module) -> Iterator[list[str]]:
    """For a real forward, which draws from torch's random numbers too. Afterwards the list says what of that which has
    been undone no graph would repeat."""
    left: list[str] = []
    gpus = {t.device.index for t in model.parameters() if t.device.type == "cuda"}
    with torch.random.fork_rng(sorted(gpus)):
        before = _Before(model, MANY)
        try:
            yield left
        finally:
            left += filter(None, [before.restore()])


class _Before:
    """What a forward of ``model`` may change: attributes and tensors of up to ``most`` elements, random numbers outside
    of torch, the seed of torch's, results that functions remember."""

    def __init__(self, model: nn.Module, most: int):
        self.watch = watch = Watch(model)
        self.tensors = [(t, t.detach().clone(), t._version) for t in watch.tensors if _may_be_written(t, most)]
        self.generators = [(generator, _state(generator)) for generator in watch.generators]
        self.remembering = [(function, function.cache_info().misses) for function in watch.remembering]
        self.torch = torch.get_rng_state() if watch.seeds else None
        if self.torch is not None:
            torch.default_generator.manual_seed(SEED)

    def restore(self) -> str | None:
        """Put all back; what of it a graph would not do again."""
        left = None
        if self.torch is not None:
            left = None if torch.initial_seed() == SEED else "the forward seeds random numbers"
            torch.set_rng_state(self.torch)
        for generator, state in self.generators:
            if pickle.dumps(_state(generator)) != pickle.dumps(state):
                left = "the forward draws random numbers outside of torch"
                _set_state(generator, state)
        for function, misses in self.remembering:
            if function.cache_info().misses != misses:  # some may be fake tensors
                function.cache_clear()
        if self.watch.changed():
            left = "the forward changes the model's attributes"
            self.watch.restore()
        with torch.no_grad():
            for tensor, then, version in self.tensors:
                if tensor._version != version:
                    tensor.copy_(then)
        return left


def _may_be_written(tensor: Tensor, most: int) -> bool:
    plain = not (isinstance(tensor, nn.Parameter) or tensor.requires_grad or tensor.is_inference() or tensor.is_meta)
    return plain and tensor.numel() <= most


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
