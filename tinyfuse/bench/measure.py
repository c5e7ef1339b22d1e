"""Clocks and bytes: interleaved timing, what a variant holds in memory, how fast the device reads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Tensor, int], Tensor]


@dataclass
class Samples:
    """One entry per repeat: seconds of generating one token and of generating all of them, the tokens, and the bytes
    allocated on top of what was held before the call (GPU only)."""

    first: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    transient: list[int] = field(default_factory=list)

    def ttft(self) -> list[float]:
        """Milliseconds to the first token."""
        return [1e3 * seconds for seconds in self.first]

    def tpot(self, gen: int) -> list[float]:
        """Milliseconds per token after the first, which belongs to prefill: (T(gen) - T(1)) / (gen - 1)."""
        return [1e3 * (full - first) / (gen - 1) for first, full in zip(self.first, self.full, strict=True)]


def order(names: Sequence[str], repeat: int) -> list[str]:
    """Who runs when in a repeat: each variant is first, second, ... equally often."""
    start = repeat % max(1, len(names))
    return [*names[start:], *names[:start]]


def interleave(
    runs: dict[str, Run],
    prompts: Sequence[Tensor],
    gen: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    step: Callable[[str], None] = lambda name: None,
) -> dict[str, Samples]:
    """Time every run once per prompt, in rotating order; a run returns after its device is done."""
    samples = {name: Samples() for name in runs}
    for repeat, prompt in enumerate(prompts):
        for name in order(list(runs), repeat):
            held = reset_peak(prompt.device)
            start = clock()
            runs[name](prompt, 1)
            middle = clock()
            tokens = runs[name](prompt, gen)
            end = clock()
            sample = samples[name]
            sample.first.append(middle - start)
            sample.full.append(end - middle)
            sample.tokens.append(tokens)
            if held is not None:
                sample.transient.append(torch.cuda.max_memory_allocated(prompt.device) - held)
            step(name)
    return samples


def differ(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two sets of repeats are told apart: their ranges do not overlap. Two equal variants pass for different
    once in 126 runs of five repeats."""
    return max(a) < min(b) or max(b) < min(a)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def allocated(device: torch.device) -> int:
    """Bytes of tensors on a GPU; 0 on the CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the data: those inside a tensor subclass, else the tensor."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in plain_tensors(getattr(tensor, name))]


def storages(model: nn.Module) -> dict[int, int]:
    """Address and bytes of everything ``model`` holds; a tied weight is there once."""
    held = [*model.parameters(), *model.buffers()]
    return {plain.data_ptr(): plain.nbytes for tensor in held for plain in plain_tensors(tensor)}


def weight_bytes_read(model: nn.Module) -> int:
    """Bytes of weights that one decode step of a dense model reads: all but an embedding table of its own, of which
    it reads a row."""
    held = storages(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table is not None and (head is None or storages(table).keys().isdisjoint(storages(head))):
        return sum(held.values()) - sum(storages(table).values())
    return sum(held.values())


def kv_bytes_read(config: Any, batch: int, context: float, element_size: int) -> float:
    """Bytes of keys and values that attention reads for one token at a context of ``context`` tokens."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * element_size * context * batch


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of summing a tensor far larger than the caches (2 GB on a GPU, 512 MB on the CPU): the best of
    eight."""
    size = 2**31 if device.type == "cuda" else 2**29
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        data.sum()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return size / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
