"""Static key/value caches, reused across calls of ``generate``.

Layers keep their state in tensors alone, where transformers' ``StaticSlidingWindowLayer`` counts in a Python int.
A sliding-window layer holds its window (``window.py``), or everything where a caller gets the cache, a prompt comes in
chunks, or it cannot be told which mask is the layer's; then the window lives in the mask.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache, StaticLayer, StaticSlidingWindowLayer

from tinyfuse.graph.record import Given, record
from tinyfuse.runtime.forward import CACHE
from tinyfuse.runtime.rehearsal import rehearsal, unchanged
from tinyfuse.runtime.window import MASK, WindowLayer, ring_masks

STEP = 256
KEPT = 4  # caches of different batch or length that stay allocated
KEPT_SHARE = 1 / 8  # of the device's memory, for all but the one in use


def cache_length(tokens: int) -> int:
    """The smallest of 256, 512, 768, 1024, 1536, 2048, 3072, ... that holds ``tokens``."""
    length = STEP
    while length < tokens:
        length += max(STEP, (1 << (length.bit_length() - 1)) // 2)
    return length


def make_room(kept: OrderedDict[Any, Any], nbytes: Callable[[Any], int], device: torch.device) -> None:
    """Drop caches that stand by, least recently used first, until one more may."""
    share = 1 << 30
    if device.type == "cuda":
        share = int(torch.cuda.get_device_properties(device).total_memory * KEPT_SHARE)
    while kept and (len(kept) >= KEPT or sum(map(nbytes, kept.values())) > share):
        kept.popitem(last=False)


def held_bytes(layers: Iterable[StaticLayer]) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@torch.no_grad()
def empty(layers: Sequence[StaticLayer]) -> None:
    """Forget the tokens. Zeroed, because a masked value still meets its zero weight, and 0 * inf is nan."""
    torch._foreach_zero_([tensor for layer in layers for tensor in (layer.keys, layer.values)])
    torch._foreach_zero_([layer.cumulative_length for layer in layers])


def fill(cache: DynamicCache, held: StaticCache, tokens: int) -> None:
    """Copy the first ``tokens`` positions of ``held`` into the empty ``cache``, as if the model had written to it."""
    for index, layer in enumerate(held.layers):
        if isinstance(layer, StaticLayer):
            cache.update(layer.keys[:, :, :tokens].clone(), layer.values[:, :, :tokens].clone(), index)


@dataclass
class Slot:
    """One static cache and what is bound to its memory: decode steps and padded prompts. ``rings``: the masks of
    windowed layers."""

    cache: StaticCache
    batch: int
    length: int
    rings: dict[str, int]
    steps: dict[Any, Any] = field(default_factory=dict)
    prompts: OrderedDict[Any, Any] = field(default_factory=OrderedDict)

    def layers(self) -> list[StaticLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, StaticLayer)]

    def counters(self) -> list[Tensor]:
        """How many tokens each layer holds, on the device."""
        return [layer.cumulative_length for layer in self.layers()]

    def stand_at(self, tokens: int) -> None:
        """Let every layer hold ``tokens``, as its counter says."""
        counters = self.counters()
        torch._foreach_zero_(counters)
        torch._foreach_add_(counters, tokens)

    def fill_with_prompt(self, filling: bool) -> None:
        """Whether what comes next is the prompt, into the empty cache."""
        for layer in self.layers():
            if isinstance(layer, WindowLayer):
                layer.filling = filling

    def nbytes(self) -> int:
        return held_bytes(self.layers())

    def reset(self) -> None:
        empty(self.layers())


class NotPlain(Exception):
    """The model keeps more than keys and values; the message says what."""


def _static_cache(model: torch.nn.Module, length: int, windows: bool = False) -> StaticCache:
    cache = StaticCache(model.config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        if windows and type(layer) is StaticSlidingWindowLayer and layer.max_cache_len < length:
            cache.layers[index] = WindowLayer(length, layer.max_cache_len)
        elif type(layer) in (StaticLayer, StaticSlidingWindowLayer):
            cache.layers[index] = StaticLayer(length)
        elif type(layer).__name__ != "DummyLayer":  # of a layer that shares or needs none
            raise NotPlain(f"the cache has a layer of type {type(layer).__name__}, not a plain key/value layer")
    return cache


class CachePool:
    """The slots of one model, least recently used first."""

    def __init__(self, model: torch.nn.Module, forward: Callable[..., Any]) -> None:
        self.model, self.forward = model, forward
        self.slots: OrderedDict[tuple[int, int, bool], Slot] = OrderedDict()
        self.state: tuple[torch.device, torch.dtype, str] | None = None
        self.unusable: str | None = None
        self.shapes: list[tuple[Tensor, Tensor] | None] = []
        self.masks: list[str] = []

    def learn(self) -> str | None:
        """Find out what the model writes to a static cache; the reason if it cannot use one."""
        config = self.model.config.get_text_config(decoder=True)
        state = (self.model.device, self.model.dtype, repr(vars(config)))
        if state != self.state:
            self.slots.clear()
            self.state, self.unusable = state, None
            try:
                self.shapes, self.masks = _probe(self.model, self.forward)
            except NotPlain as error:
                self.unusable = str(error)
            except Exception as error:
                self.unusable = f"the model does not run with a static cache: {type(error).__name__}: {error}"
        return self.unusable

    def acquire(self, batch: int, tokens: int, whole: bool) -> Slot:
        """An empty slot for ``batch`` sequences of up to ``tokens`` tokens; up to twice as long if one is at hand.
        ``whole``: windowed layers hold everything too."""
        length = cache_length(tokens)
        fitting = [k for k in self.slots if k[::2] == (batch, whole) and length <= k[1] <= 2 * length]
        key = min(fitting, default=(batch, length, whole))
        if key not in self.slots:
            slot = self._slot(batch, length, whole)
            self._evict()
            try:
                self._allocate(slot)
            except torch.OutOfMemoryError:  # once more without what stands by
                self.slots.clear()
                torch.cuda.empty_cache()
                slot = self._slot(batch, length, whole)
                self._allocate(slot)
            self.slots[key] = slot
        self.slots.move_to_end(key)
        return self.slots[key]

    def _slot(self, batch: int, length: int, whole: bool) -> Slot:
        cache = _static_cache(self.model, length, windows=not whole)
        rings = ring_masks(_layer_types(self.model), cache.layers, self.masks)
        if rings is None:
            cache, rings = _static_cache(self.model, length), {}
        return Slot(cache, batch, length, rings)

    def _allocate(self, slot: Slot) -> None:
        """All counters lie in one tensor, so that one kernel advances them."""
        with torch.inference_mode(False):
            counters = torch.zeros(len(slot.cache.layers), dtype=torch.long, device=self.model.device).unbind()
            for layer, shapes, counter in zip(slot.cache.layers, self.shapes, counters, strict=True):
                if shapes is None:
                    continue
                keys, values = (like.new_zeros(slot.batch, like.shape[1], 0, like.shape[3]) for like in shapes)
                layer.lazy_initialization(keys, values)
                layer.cumulative_length = counter.to(layer.device)
                if not isinstance(layer, WindowLayer):
                    for tensor in (layer.keys, layer.values):
                        torch._dynamo.maybe_mark_dynamic(tensor, 2)

    def _evict(self) -> None:
        layers = [shapes for shapes in self.shapes if shapes is not None]
        make_room(self.slots, Slot.nbytes, layers[0][0].device if layers else torch.device("cpu"))


def _layer_types(model: torch.nn.Module) -> list[str]:
    """As ``StaticCache`` reads them."""
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    return types if types is not None else ["every_layer"] * config.num_hidden_layers


def _probe(model: torch.nn.Module, forward: Callable[..., Any]) -> tuple[list[tuple[Tensor, Tensor] | None], list[str]]:
    """Per layer an empty tensor with the heads, head size, dtype and device of its keys, and one of its values; and the
    names of the masks that transformers prepares for a token.

    They come from the stock forward of two tokens on a longer cache, since configurations name them in too many ways
    and some models do not run on a static cache at all. Raises NotPlain, and what the forward raises.
    """
    with torch.inference_mode(False), torch.no_grad():
        ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
        cache = _imagined(model, forward, ids)
        if cache is None:
            cache = _static_cache(model, 4)
            with rehearsal(model):
                forward(input_ids=ids, use_cache=True, **{CACHE: cache})
        written = [(layer.keys, layer.values) if isinstance(layer, StaticLayer) else None for layer in cache.layers]
        shapes = [like and tuple(map(none_of, like)) for like in written]
        cache = _static_cache(model, 4)
        if len(cache.layers) != len(shapes):
            raise NotPlain("the forward adds layers to its cache")
        for layer, like in zip(cache.layers, shapes, strict=True):
            if like is not None:
                layer.lazy_initialization(*like)
                layer.cumulative_length.fill_(2)
        more, mask = ids.new_zeros(1, 3), ids.new_ones(1, 3)
        try:
            prepared = model.prepare_inputs_for_generation(
                more, next_sequence_length=1, attention_mask=mask, use_cache=True, **{CACHE: cache}
            )
        except Exception:  # a model that wants more arguments than these
            prepared = {}
    return shapes, _masks(prepared.get(MASK))


def _imagined(model: torch.nn.Module, forward: Callable[..., Any], ids: Tensor) -> StaticCache | None:
    """The cache after the forward of ``ids`` on fake tensors, which runs no kernel; None where it takes real ones."""
    cache = _static_cache(model, 4)
    counting = {f"counter {i}": layer for i, layer in enumerate(cache.layers) if isinstance(layer, StaticLayer)}
    given = {name: Given(layer.cumulative_length) for name, layer in counting.items()}

    def call(fakes: dict[str, Tensor]) -> None:
        for name, layer in counting.items():
            layer.cumulative_length = fakes[name]
        forward(input_ids=fakes["ids"], use_cache=True, **{CACHE: cache})

    try:
        with unchanged(model):
            record(call, {"ids": Given(ids), **given}, {})
    except Exception:  # the real forward says what is wrong
        return None
    return cache


def none_of(tensor: Tensor) -> Tensor:
    """``tensor`` [B, H, L, D] without batch and length."""
    return torch.empty((1, tensor.shape[1], 0, tensor.shape[3]), dtype=tensor.dtype, device=tensor.device)


def _masks(given: Any) -> list[str]:
    if isinstance(given, dict):
        return [f"{MASK}.{kind}" for kind, mask in given.items() if isinstance(mask, Tensor) and mask.dim() == 4]
    return [MASK] if isinstance(given, Tensor) and given.dim() == 4 else []
