"""Sliding-window layers of a static cache that hold their window and no more.

Position p lies in slot p % W of a ring of W slots, so a token overwrites the one that has just left its window. The
loop's tokens attend the ring with a mask in its order; a prompt, for which the cache is empty, attends its own keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

MASK = "attention_mask"


class WindowLayer(StaticLayer):
    """``window`` slots for a cache of ``max_cache_len`` positions. ``filling``: the cache takes a prompt."""

    is_sliding = True  # so that transformers sizes each mask by a layer of its own type

    def __init__(self, max_cache_len: int, window: int):
        super().__init__(max_cache_len)
        self.window, self.filling = window, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        length, self.max_cache_len = self.max_cache_len, self.window
        super().lazy_initialization(key_states, value_states)
        self.max_cache_len = length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        count = key_states.shape[2]
        positions = torch.arange(count, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(count)
        kept = positions if count <= self.window else positions[-self.window :]
        slots = torch.remainder(kept, self.window)
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held.index_copy_(2, slots, new if count <= self.window else new[:, :, -self.window :])
        return (key_states, value_states) if self.filling else (self.keys, self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the keys of a prompt, or of the whole sequence: :func:`in_ring` brings that mask into the ring's order."""
        return (query_length if self.filling else self.max_cache_len), 0


def ring_masks(layer_types: Sequence[str], layers: Sequence[Any], names: Sequence[str]) -> dict[str, int] | None:
    """Which of a forward's masks belong to windowed layers, with their windows; None if that cannot be told.

    ``names``: those of the masks that transformers prepares: one, or one per type of layer.
    """
    windows: dict[str, set[int | None]] = {}
    for kind, layer in zip(layer_types, layers, strict=False):  # layers that share a cache come last and have none
        windows.setdefault(kind, set()).add(layer.window if isinstance(layer, WindowLayer) else None)
    if MASK in names:
        windows = {"": set().union(*windows.values())}
    found = {}
    for kind, each in windows.items():
        name = f"{MASK}.{kind}" if kind else MASK
        if name not in names or len(each) != 1:
            return None
        (window,) = each
        if window is not None:
            found[name] = window
    return found


def in_ring(mask: Tensor, window: int, first: int) -> Tensor:
    """A mask [B, H, rows, L] over all positions, of the tokens from ``first`` on, as one over the ring."""
    token = first + torch.arange(mask.shape[2], device=mask.device)[:, None]
    held = token - torch.remainder(token - torch.arange(window, device=mask.device), window)
    at = held.clamp(0, mask.shape[3] - 1).expand(*mask.shape[:3], window)
    return mask.gather(3, at).masked_fill(held < 0, 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def in_rings(inputs: dict[str, Any], rings: dict[str, int], first: int) -> dict[str, Any]:
    """A forward's arguments with the masks named in ``rings`` as :func:`in_ring` makes them."""
    if not rings:
        return inputs
    changed = dict(inputs)
    for name, window in rings.items():
        argument, _, kind = name.partition(".")
        if kind:
            changed[argument] = {**changed[argument], kind: in_ring(changed[argument][kind], window, first)}
        else:
            changed[argument] = in_ring(changed[argument], window, first)
    return changed
