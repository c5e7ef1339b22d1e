"""Speed of the CPU kernels against torch's: python benchmarks/cpu_kernels.py [--json FILE]

Every weight is read from memory (copies are taken in turn, 128 MB of them), as in decode. Columns: µs per call, GB/s of
weight read, and the ratio to the best of torch's own for the same work (F.linear, ``torch._weight_int8pack_mm``).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F

from tinyfuse.bench.environment import environment
from tinyfuse.kernels import (
    add_rms_norm,
    attention,
    causal_attention,
    gated_linear,
    linear,
    linear_group,
    rms_norm,
    rope_append,
)

DTYPE = torch.bfloat16
COLD_BYTES = 128 << 20
SMOLLM2 = [(576, 576), (1536, 576), (576, 1536), (49152, 576)]


def microseconds(call: Callable[[], object], repeats: int = 7, seconds: float = 0.05) -> float:
    """The best mean over ``repeats`` runs of about ``seconds`` each."""
    call()
    start = time.perf_counter()
    call()
    count = max(2, int(seconds / max(1e-7, time.perf_counter() - start)))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - start) / count)
    return best * 1e6


def copies(make: Callable[[], list[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
    """Equal sets of weights, too many for any cache, one after the other."""
    first = make()
    size = sum(tensor.nbytes for tensor in first)
    return cycle([first, *(make() for _ in range(COLD_BYTES // size))]).__next__


def int8(N: int, K: int) -> torch.Tensor:
    return torch.randint(-127, 128, (N, K), dtype=torch.int8)


def bench_linear(N: int, K: int, M: int) -> list[dict]:
    x, scale = torch.randn(M, K).to(DTYPE), torch.rand(N)
    half = scale.to(DTYPE)
    quantised, wide = copies(lambda: [int8(N, K)]), copies(lambda: [torch.randn(N, K).to(DTYPE)])
    torch_int8 = microseconds(lambda: torch._weight_int8pack_mm(x, quantised()[0], half))
    torch_wide = microseconds(lambda: F.linear(x, wide()[0]))
    ours_int8 = microseconds(lambda: linear.OP(x, quantised()[0], scale, None, None))
    ours_wide = microseconds(lambda: linear.OP(x, wide()[0], None, None, None))
    name = f"linear {N}x{K} M={M}"
    return [
        {"op": f"{name} int8", "us": ours_int8, "bytes": N * K, "torch_us": min(torch_int8, torch_wide)},
        {"op": f"{name} bf16", "us": ours_wide, "bytes": 2 * N * K, "torch_us": torch_wide},
    ]


def bench_layer(cached: int, length: int) -> list[dict]:
    """The other ops of a SmolLM2-135M decode step."""
    x, gain = torch.randn(1, 1, 576).to(DTYPE), torch.randn(576).to(DTYPE)
    sizes = (576, 192, 192)
    qkv, scales = copies(lambda: [int8(n, 576) for n in sizes]), [torch.rand(n) for n in sizes]
    pair, scale = copies(lambda: [int8(1536, 576) for _ in range(2)]), torch.rand(1536)
    cache = copies(lambda: [torch.randn(1, 3, length, 64).to(DTYPE) for _ in range(2)])
    q, k = (torch.randn(1, 1, heads, 64).to(DTYPE).transpose(1, 2) for heads in (9, 3))
    cos, pos = torch.randn(1, 1, 1, 64).to(DTYPE), torch.tensor([cached - 1])
    mask = (torch.arange(length) < cached)[None, None, None]
    ops = {
        "rms_norm": (lambda: rms_norm.OP(x, gain, 1e-5, False, True), 0),
        "add_rms_norm": (lambda: add_rms_norm.OP(x, x, gain, 1e-5, False, True), 0),
        "linear_group qkv int8": (lambda: linear_group.OP(x, qkv(), scales, [None] * 3), 960 * 576),
        "gated_linear int8": (lambda: gated_linear.OP(x, *pair(), scale, scale, None, None, "silu"), 3072 * 576),
        "rope_append": (lambda: rope_append.OP(q, k, k, cos, cos, *cache(), pos, False), 0),
        f"attention {cached}/{length}": (lambda: attention.OP(q, *cache(), mask, 0.125, False), cached * 2 * 3 * 128),
    }
    return [{"op": name, "us": microseconds(call), "bytes": size} for name, (call, size) in ops.items()]


def bench_prompt(tokens: int) -> dict:
    """A prompt's attention by positions; torch's: SDPA under the mask, with repeated heads."""
    q, k = (torch.randn(1, heads, tokens, 64).to(DTYPE) for heads in (9, 3))
    at, held = torch.arange(tokens), torch.ones(1, tokens, dtype=torch.bool)
    mask = causal_attention.visible(at, at, held, None, 1)
    ours = microseconds(lambda: causal_attention.OP(q, k, k, at, at, held, None, 0.125))
    stock = microseconds(lambda: F.scaled_dot_product_attention(q, *[k.repeat_interleave(3, 1)] * 2, mask, scale=0.125))
    return {"op": f"attention of {tokens} tokens", "us": ours, "bytes": q.nbytes + 2 * k.nbytes, "torch_us": stock}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = [row for N, K in [*SMOLLM2, (4096, 4096)] for M in (1, 4, 16, 64, 256) for row in bench_linear(N, K, M)]
    rows += [*bench_layer(200, 1024), *map(bench_prompt, (64, 512, 2048))]
    for row in rows:
        row["gb_s"] = row["bytes"] / row["us"] / 1e3
        speedup = f"{row['torch_us'] / row['us']:6.2f}x torch" if "torch_us" in row else ""
        print(f"{row['op']:32s} {row['us']:10.1f} us {row['gb_s']:7.1f} GB/s {speedup}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"environment": environment("cpu"), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
