"""Milliseconds per generated token: stock generate, the decode loop, and its step alone, on a random Llama.

    python benchmarks/generate_smoke.py [--size tiny|1b|7b] [--device cpu|cuda] [--tokens 64]

Per token: the difference between a long and a short call, so the prompt does not count. Median of 5, order rotated.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tinyfuse.api import optimize

SIZES = {  # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "tiny": (64, 96, 2, 4, 2, 128),
    "small": (576, 1536, 30, 9, 3, 49152),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}


def build(size: str, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    stock = build(options.size, options.device, dtype)
    fast = optimize(copy.copy(stock))
    prompt = torch.randint(1, 100, (1, options.prompt), device=options.device)

    def per_token(model: LlamaForCausalLM, **arguments: object) -> float:
        def call(tokens: int) -> float:
            return seconds(lambda: model.generate(prompt, max_new_tokens=tokens, **arguments))

        return (call(options.tokens + 4) - call(4)) / options.tokens

    def step_alone() -> float:
        (slot,) = list(fast._tinyfuse.pool.slots.values())[-1:]
        step = next(iter(slot.steps.values()))
        step.inputs.row.zero_()
        run = step.runner(next(iter(step.greedy.values()), None))

        def steps() -> None:
            for _ in range(options.tokens):
                step.inputs.row.zero_()
                run()

        with torch.no_grad():
            elapsed = seconds(steps) / options.tokens
        slot.reset()
        for greedy in step.greedy.values():
            greedy.written.zero_()
        return elapsed

    def forward_alone() -> float:
        (slot,) = list(fast._tinyfuse.pool.slots.values())[-1:]
        step = next(iter(slot.steps.values()))

        def steps() -> None:
            for _ in range(options.tokens):
                step._forward()

        with torch.no_grad():
            elapsed = seconds(steps) / options.tokens
        slot.reset()
        return elapsed

    def prompt_alone(model: LlamaForCausalLM) -> float:
        return seconds(lambda: model.generate(prompt, max_new_tokens=1, do_sample=False))

    cases: dict[str, Callable[[], float]] = {
        "stock greedy": lambda: per_token(stock, do_sample=False),
        "loop greedy": lambda: per_token(fast, do_sample=False),
        "loop greedy, eos checked": lambda: per_token(fast, do_sample=False, eos_token_id=10**6),
        "stock sampling, top_k 50": lambda: per_token(stock, do_sample=True),
        "loop sampling, top_k 50": lambda: per_token(fast, do_sample=True),
        "stock first token": lambda: prompt_alone(stock),
        "loop first token": lambda: prompt_alone(fast),
        "step alone": step_alone,
        "compiled forward alone, guards checked": forward_alone,
    }
    print(f"{options.size}, {options.device}, {dtype}, prompt {options.prompt}")
    print(f"first call {seconds(lambda: fast.generate(prompt, max_new_tokens=4, do_sample=False)):.1f} s")
    times: dict[str, list[float]] = {name: [] for name in cases}
    for run in cases.values():
        run()
    for _ in range(5):
        for name, run in cases.items():
            times[name].append(1e3 * run())
    for name, values in times.items():
        print(f"{name:40} {statistics.median(values):9.4f} ms  ({min(values):.4f} to {max(values):.4f})")
    print("fallbacks:", fast._tinyfuse.fallbacks)


if __name__ == "__main__":
    main()
