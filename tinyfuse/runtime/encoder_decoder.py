"""``generate`` of encoder-decoders: transformers' own loop over the compiled forward.

On a GPU greedy decoding and sampling get caches of fixed length, which stay for the next prompt, so that a step is one
CUDA graph to replay. With caches that grow, Python would launch every kernel of every step.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache, StaticLayer
from transformers.generation.stopping_criteria import MaxLengthCriteria

from tinyfuse.runtime.cache import cache_length

DEVICES = ("cuda",)
KEPT = 4  # caches of different sizes that stay allocated


class Caches:
    """The caches of one encoder-decoder, least recently used first."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[Any, ...], EncoderDecoderCache] = OrderedDict()
        self.shapes: list[list[tuple[Tensor, Tensor]]] = []

    def acquire(self, runtime, ids: Tensor, encoded: Any, length: int) -> EncoderDecoderCache | None:
        """An empty cache for ``ids`` [batch, tokens] to grow to ``length`` tokens, and the states [batch, positions,
        width] ``encoded``; None for a model with other layers than plain ones."""
        if not self.shapes:
            self.shapes = _shapes(runtime, ids, encoded)
        sizes = cache_length(length), encoded[0].shape[1]
        key = len(ids), *sizes, encoded[0].device, encoded[0].dtype
        if key not in self.kept:
            while len(self.kept) >= KEPT:
                self.kept.popitem(last=False)
            config = runtime.model.config.get_text_config(decoder=True)
            parts = [StaticCache(config=config, max_cache_len=size) for size in sizes]
            if any(type(layer) is not StaticLayer for part in parts for layer in part.layers):
                return None
            for part, shapes in zip(parts, self.shapes, strict=True):
                _allocate(part, shapes, len(ids))
            self.kept[key] = EncoderDecoderCache(*parts)
        self.kept.move_to_end(key)
        cache = self.kept[key]
        _empty(cache)
        return cache


def loop(runtime, streamer: Any) -> Any:
    """What ``generate`` calls as ``custom_generate``: ``_sample``, on a static cache where the prepared one would
    grow."""

    def run(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        generation_config.disable_compile = True  # it is compiled already
        limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        prepared, encoded = kwargs.get("past_key_values"), kwargs.get("encoder_outputs")
        grows = isinstance(prepared, EncoderDecoderCache) and type(prepared.self_attention_cache) is DynamicCache
        if grows and limits and encoded is not None and not prepared.get_seq_length():
            cache = runtime.caches.acquire(runtime, input_ids, encoded, min(limits))
            kwargs["past_key_values"] = prepared if cache is None else cache
        with runtime.in_order(input_ids.device):
            return model._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **kwargs
            )

    return run


def unfit(model: torch.nn.Module, call: dict[str, Any]) -> bool:
    """Whether a call of ``generate`` that transformers would decode token by token needs caches that grow."""
    configs = [config for config in (model.generation_config, call.get("generation_config")) if config is not None]
    # A result with its parts holds the cache, of the kind asked for.
    parts = call.get("return_dict_in_generate") or any(config.return_dict_in_generate for config in configs)
    return bool(parts) or model.device.type not in DEVICES or not model._can_compile_fullgraph


@torch.no_grad()
def _shapes(runtime, ids: Tensor, encoded: Any) -> list[list[tuple[Tensor, Tensor]]]:
    """Keys and values of one position, per layer of the decoder's and of the encoder's part, from a stock forward."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    states = type(encoded)(last_hidden_state=encoded[0][:1, :1])
    runtime.stock("forward")(
        decoder_input_ids=ids[:1, :1], encoder_outputs=states, past_key_values=cache, use_cache=True
    )
    parts = cache.self_attention_cache, cache.cross_attention_cache
    return [[(layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in part.layers] for part in parts]


def _allocate(part: StaticCache, shapes: list[tuple[Tensor, Tensor]], batch: int) -> None:
    with torch.inference_mode(False):
        for layer, like in zip(part.layers, shapes, strict=True):
            layer.lazy_initialization(*(x.new_empty(batch, x.shape[1], 0, x.shape[3]) for x in like))
            # Anew: of those that transformers makes, Dynamo compiles a graph for each.
            layer.keys, layer.values = torch.zeros_like(layer.keys), torch.zeros_like(layer.values)
            layer.cumulative_length = layer.cumulative_length.clone()
            for tensor in (layer.keys, layer.values):
                torch._dynamo.maybe_mark_dynamic(tensor, 2)


@torch.no_grad()
def _empty(cache: EncoderDecoderCache) -> None:
    """Zeroed, because a masked value still meets its zero weight, and 0 * inf is nan."""
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        for layer in part.layers:
            torch._foreach_zero_([layer.keys, layer.values, layer.cumulative_length])
    cache.is_updated = dict.fromkeys(cache.is_updated, False)
