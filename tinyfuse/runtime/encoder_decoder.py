"""``generate`` of encoder-decoders: transformers' own loop over the compiled forward.

On a GPU greedy decoding and sampling get caches of fixed length, which stay for the next prompt, so that a step is one
CUDA graph to replay. With caches that grow, Python would launch every kernel of every step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache, StaticLayer
from transformers.generation.stopping_criteria import MaxLengthCriteria

from tinyfuse.runtime.cache import cache_length, empty, fill, held_bytes, make_room, none_of
from tinyfuse.runtime.forward import CACHE

DEVICES = ("cuda",)


class Caches:
    """The caches of one encoder-decoder, least recently used first."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[Any, ...], EncoderDecoderCache] = OrderedDict()
        self.shapes: dict[Any, list[list[tuple[Tensor, Tensor]]]] = {}

    def acquire(self, runtime, ids: Tensor, encoded: Any, length: int) -> EncoderDecoderCache | None:
        """An empty cache for ``ids`` [batch, tokens] to grow to ``length`` tokens, and the states [batch, positions,
        width] ``encoded``; None, with a reason noted, for a model that does not run on one."""
        states = encoded[0]
        sizes = cache_length(length), states.shape[1]
        place = states.device, states.dtype
        key = len(ids), *sizes, *place
        if key not in self.kept:
            try:
                if place not in self.shapes:
                    self.shapes[place] = _shapes(runtime, ids, encoded)
                make_room(self.kept, lambda cache: held_bytes(_layers(cache)), states.device)
                self.kept[key] = _allocated(runtime.model, self.shapes[place], len(ids), sizes)
            except Exception as error:
                self.kept.clear()
                runtime.fall_back(f"decoded on a cache that grows: {type(error).__name__}: {error}", asked=True)
                return None
        self.kept.move_to_end(key)
        cache = self.kept[key]
        empty(_layers(cache))
        cache.is_updated = dict.fromkeys(cache.is_updated, False)
        return cache


def loop(runtime, streamer: Any) -> Callable[..., Any]:
    """What ``generate`` calls as ``custom_generate``: ``_sample``, on a static cache where the prepared one would
    grow."""

    def run(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        generation_config.disable_compile = True  # it is compiled already
        limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        prepared, encoded, cache = kwargs.get(CACHE), kwargs.get("encoder_outputs"), None
        grows = isinstance(prepared, EncoderDecoderCache) and type(prepared.self_attention_cache) is DynamicCache
        wide = generation_config.output_attentions  # which would show how long the cache is
        if grows and limits and encoded is not None and not wide and not prepared.get_seq_length():
            cache = runtime.caches.acquire(runtime, input_ids, encoded, min(limits))
        with runtime.in_order(input_ids.device):
            kwargs[CACHE] = prepared if cache is None else cache
            made = model._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **kwargs
            )
            if cache is not None and not isinstance(made, Tensor):
                made[CACHE] = _filled(prepared, cache)
            return made

    return run


def unfit(model: torch.nn.Module) -> bool:
    """Whether a model's caches have to grow."""
    return model.device.type not in DEVICES or not model._can_compile_fullgraph


def _parts(cache: EncoderDecoderCache) -> tuple[Any, Any]:
    return cache.self_attention_cache, cache.cross_attention_cache


def _layers(cache: EncoderDecoderCache) -> list[StaticLayer]:
    return [layer for part in _parts(cache) for layer in part.layers]


@torch.no_grad()
def _shapes(runtime, ids: Tensor, encoded: Any) -> list[list[tuple[Tensor, Tensor]]]:
    """Keys and values of no position, per layer of the decoder's and of the encoder's part, from a stock forward."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    states = type(encoded)(last_hidden_state=encoded[0][:1, :1])
    runtime.stock("forward")(decoder_input_ids=ids[:1, :1], encoder_outputs=states, use_cache=True, **{CACHE: cache})
    return [[(none_of(layer.keys), none_of(layer.values)) for layer in part.layers] for part in _parts(cache)]


def _allocated(
    model: torch.nn.Module, shapes: list[list[tuple[Tensor, Tensor]]], batch: int, sizes: tuple[int, int]
) -> EncoderDecoderCache:
    config = model.config.get_text_config(decoder=True)
    cache = EncoderDecoderCache(*(StaticCache(config=config, max_cache_len=size) for size in sizes))
    others = {type(layer).__name__ for layer in _layers(cache)} - {StaticLayer.__name__}
    if others:
        raise TypeError(f"the cache has layers of type {others.pop()}")
    for part, like in zip(_parts(cache), shapes, strict=True):
        _allocate(part, like, batch)
    return cache


def _allocate(part: StaticCache, shapes: list[tuple[Tensor, Tensor]], batch: int) -> None:
    with torch.inference_mode(False):
        for layer, like in zip(part.layers, shapes, strict=True):
            layer.lazy_initialization(*(x.new_empty(batch, x.shape[1], 0, x.shape[3]) for x in like))
            # Anew: of those that transformers makes, Dynamo compiles a graph for each.
            layer.keys, layer.values = torch.zeros_like(layer.keys), torch.zeros_like(layer.values)
            layer.cumulative_length = layer.cumulative_length.clone()
            for tensor in (layer.keys, layer.values):
                torch._dynamo.maybe_mark_dynamic(tensor, 2)


def _filled(prepared: EncoderDecoderCache, cache: EncoderDecoderCache) -> EncoderDecoderCache:
    """The empty cache ``prepared`` with what ``cache`` holds, as if the model had written to it."""
    for grown, part in zip(_parts(prepared), _parts(cache), strict=True):
        fill(grown, part, int(part.layers[0].cumulative_length))
    prepared.is_updated = dict(cache.is_updated)
    return prepared
