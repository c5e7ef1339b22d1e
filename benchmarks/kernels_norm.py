"""Norm, rope, cache-write and gated-activation kernels against the code of Hugging Face, eager and through Inductor.

    PYTHONPATH=. python3 benchmarks/kernels_norm.py [--out DIR] [--sweep] [--only NAME] [--shard I N]

Times are medians of CUDA-graph replays in microseconds per call. Each graph walks through copies of all tensors
that together exceed the L2 cache twice, up to 64 of them: smaller cases find their inputs in L2, as a decode step
does. Every output is first compared with eager code's. ``host`` is the Python time of one call.
``floor`` is the bytes of every input and output once, over the bandwidth of a large copy in the same run.
Writes norm-<gpu>.json. ``--shard I N`` compiles every N-th case, untimed: N such processes fill the disk caches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfuse.bench.environment import environment
from tinyfuse.kernels import (
    _rows,
    _triton,
    add_layer_norm,
    add_rms_norm,
    gated_act,
    layer_norm,
    rms_norm,
    rope,
    rope_append,
)

EPS = 1e-6


def hf_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def hf_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return total, hf_rms_norm(total, weight)


def hf_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def hf_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return total, hf_layer_norm(total, weight, bias)


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def hf_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def hf_rope_append(q, k, v, cos, sin, keys, values, pos) -> Tensor:
    q, k = hf_rope(q, k, cos, sin)
    keys.index_copy_(2, pos, k)
    values.index_copy_(2, pos, v)
    return q


def hf_gated_act(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def our_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rope.OP(q, cos, sin, False), rope.OP(k, cos, sin, False)


def our_rope_append(q, k, v, cos, sin, keys, values, pos) -> Tensor:
    return rope_append.OP(q, k, v, cos.unsqueeze(1), sin.unsqueeze(1), keys, values, pos, False)


@dataclass
class Case:
    """``make`` draws one set of inputs; ``stock`` is Hugging Face's code, ``ours`` the kernels."""

    name: str
    make: Callable[[], tuple[Tensor, ...]]
    stock: Callable
    ours: Callable
    nbytes: int


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def norm_cases(rows: int, N: int) -> list[Case]:
    shape, size = f"{rows}x{N}", rows * N * 2

    def x_and_weights(tensors: int, weights: int):
        return lambda: (*(random(rows, N) for _ in range(tensors)), *(random(N) for _ in range(weights)))

    def rms(x, w):
        return rms_norm.OP(x, w, EPS, False, True)

    def add_rms(x, r, w):
        return add_rms_norm.OP(x, r, w, EPS, False, True)

    def layer(x, w, b):
        return layer_norm.OP(x, w, b, EPS)

    def add_layer(x, r, w, b):
        return add_layer_norm.OP(x, r, w, b, EPS)

    return [
        Case(f"rms_norm {shape}", x_and_weights(1, 1), hf_rms_norm, rms, 2 * size),
        Case(f"add_rms_norm {shape}", x_and_weights(2, 1), hf_add_rms_norm, add_rms, 4 * size),
        Case(f"layer_norm {shape}", x_and_weights(1, 2), hf_layer_norm, layer, 2 * size),
        Case(f"add_layer_norm {shape}", x_and_weights(2, 2), hf_add_layer_norm, add_layer, 4 * size),
    ]


def head_cases(S: int, H: int = 32, kv_heads: int = 8, D: int = 128, L: int = 4096) -> list[Case]:
    """q, k and v as views of a merged projection."""

    def heads() -> tuple[Tensor, ...]:
        split = random(1, S, (H + 2 * kv_heads) * D).split((H * D, kv_heads * D, kv_heads * D), -1)
        return tuple(x.view(1, S, -1, D).transpose(1, 2) for x in split)

    def q_and_weight():
        return heads()[0], random(D)

    def q_k_tables():
        return *heads()[:2], random(1, S, D), random(1, S, D)

    def all_of_it():
        cache = (random(1, kv_heads, L, D) for _ in range(2))
        return *heads(), random(1, S, D), random(1, S, D), *cache, torch.arange(S, device="cuda") + L - S

    def q_norm(x, w):
        return rms_norm.OP(x, w, EPS, False, True)

    token = D * 2 * S
    return [
        Case(f"q norm {S}x{H}x{D}", q_and_weight, hf_rms_norm, q_norm, 2 * H * token),
        Case(f"rope q k {S}x{H}+{kv_heads}x{D}", q_k_tables, hf_rope, our_rope, (2 * (H + kv_heads) + 2) * token),
        Case(
            f"rope_append {S}x{H}+{kv_heads}x{D}", all_of_it, hf_rope_append, our_rope_append,
            (2 * (H + 2 * kv_heads) + 2) * token,
        ),
    ]  # fmt: skip


def act_case(rows: int, N: int = 11008) -> Case:
    def make():
        return random(rows, 2 * N).chunk(2, -1)

    return Case(f"gated_act {rows}x{N}", make, hf_gated_act, lambda g, u: gated_act.OP(g, u, "silu"), 3 * rows * N * 2)


def all_cases() -> list[Case]:
    found = [case for rows in (1, 32, 2048, 16384) for case in norm_cases(rows, 4096)]
    found += [case for S in (1, 2048) for case in head_cases(S)]
    return found + [act_case(rows) for rows in (1, 2048)]


def input_sets(case: Case) -> list[tuple[Tensor, ...]]:
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [case.make() for _ in range(min(64, max(3, 2 * l2 // case.nbytes + 1)))]


def replay_time(call: Callable, sets: list[tuple[Tensor, ...]], seconds: float = 0.06) -> float:
    call(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for args in sets:
            call(*args)
    graph.replay()
    times, began = [], time.perf_counter()
    while len(times) < 7 or (len(times) < 60 and time.perf_counter() - began < seconds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(sets))
    return statistics.median(times)


def host_time(call: Callable, args: tuple[Tensor, ...]) -> float:
    """Microseconds of Python per call, of 20 in a row."""
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            call(*args)
        times.append((time.perf_counter() - began) * 5e4)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a negation of 1 GiB."""
    x = random(2**29)
    y = torch.empty_like(x)
    return 2 * x.nbytes / (replay_time(lambda a, b: torch.neg(a, out=b), [(x, y)]) * 1e-6)


def check(case: Case, args: tuple[Tensor, ...]) -> None:
    """The same result as eager code, up to its roundings."""
    kept = [x.clone() for x in args]
    outs, wants = case.ours(*args), case.stock(*kept)
    pairs = list(zip(args, kept, strict=True))
    pairs += zip(outs, wants, strict=True) if isinstance(outs, tuple) else [(outs, wants)]
    for out, want in pairs:
        error = (out.float() - want.float()).norm() / want.float().norm().clamp_min(1e-9)
        assert error < 5e-3, f"{case.name}: {error:.3g} from eager code"


@contextmanager
def plain_launch():
    """Kernels launched without programmatic dependent launch."""
    modules = [_rows, rope, rope_append, gated_act]
    for module in modules:
        module.pdl = lambda device: False
    yield
    for module in modules:
        module.pdl = _triton.pdl


def forget() -> None:
    """Bind all kernels anew."""
    for module in (rms_norm, layer_norm, rope, rope_append):
        module.bind.cache_clear()


def measure(case: Case, sweep: bool) -> dict:
    torch._dynamo.reset()
    sets = input_sets(case)
    compiled = torch.compile(case.stock, dynamic=False)
    check(case, sets[0])
    row = {"case": case.name, "bytes": case.nbytes, "sets": len(sets)}
    row["eager"] = replay_time(case.stock, sets)
    row["inductor"] = replay_time(compiled, sets)
    row["tinyfuse"] = replay_time(case.ours, sets)
    with plain_launch():
        row["tinyfuse, plain launch"] = replay_time(case.ours, sets)
    row["host"] = {"eager": host_time(case.stock, sets[0]), "inductor": host_time(compiled, sets[0])}
    row["host"]["tinyfuse"] = host_time(case.ours, sets[0])
    if sweep:
        row["sweep"] = sweep_tiles(case, sets)
    return row


def sweep_tiles(case: Case, sets: list[tuple[Tensor, ...]]) -> dict[str, float]:
    """Other tiles of the norms and other head groups of rope."""
    found = {}
    if "norm" in case.name:
        chosen, block = _rows.tile, 128 if case.name.startswith("q ") else 4096
        rows = (1, 4, 8, 16, 32, 64) if block == 128 else (1, 2)
        for n, warps in [(n, warps) for n in rows for warps in (1, 2, 4, 8, 16)]:
            if 4 <= n * block // (32 * warps) <= 64:
                _rows.tile = lambda N, many, n=n, warps=warps: _rows.Tile(block, n, warps)
                forget()
                found[f"rows {n} warps {warps}"] = replay_time(case.ours, sets, 0.02)
        _rows.tile = chosen
    if "rope" in case.name:
        chosen = _rows.heads_per_program
        for n, warps in [(n, warps) for n in (1, 2, 4, 8, 16, 32) for warps in (1, 2, 4, 8)]:
            _rows.heads_per_program = lambda H, D, tokens, n=n: min(n, H)
            rope.Launch = rope_append.Launch = lambda *args, warps=warps: _triton.Launch(*args[:3], warps, args[4])
            forget()
            found[f"heads {n} warps {warps}"] = replay_time(case.ours, sets, 0.02)
        _rows.heads_per_program, rope.Launch, rope_append.Launch = chosen, _triton.Launch, _triton.Launch
    forget()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--shard", type=int, nargs=2, metavar=("I", "N"))
    args = parser.parse_args()
    torch.manual_seed(0)
    cases = [case for case in all_cases() if args.only in case.name]
    if args.shard:
        for case in cases[args.shard[0] :: args.shard[1]]:
            inputs = case.make()
            check(case, inputs)
            torch.compile(case.stock, dynamic=False)(*inputs)
            if args.sweep:
                sweep_tiles(case, [inputs])
        return
    bandwidth = copy_bandwidth()
    result = {"environment": environment("cuda"), "copy_bytes_per_s": bandwidth, "rows": []}
    print(f"copy {bandwidth / 1e12:.2f} TB/s\n{'us per call':32s} floor  eager inductor  ours  plain   host e/i/o")
    for case in cases:
        row = measure(case, args.sweep) | {"floor": case.nbytes / bandwidth * 1e6}
        result["rows"].append(row)
        names = ("floor", "eager", "inductor", "tinyfuse", "tinyfuse, plain launch")
        host = "/".join(f"{row['host'][name]:.0f}" for name in ("eager", "inductor", "tinyfuse"))
        print(f"{case.name:32s}" + " ".join(f"{row[name]:6.2f}" for name in names), host, flush=True)
        if args.sweep and row["sweep"]:
            best = sorted(row["sweep"].items(), key=lambda item: item[1])[:4]
            print("      ", "; ".join(f"{name}: {value:.2f}" for name, value in best), flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        gpu = torch.cuda.get_device_name().lower().replace("nvidia ", "").split()[0]
        (args.out / f"norm-{gpu}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
