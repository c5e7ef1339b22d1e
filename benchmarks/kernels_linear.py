"""Linears against ``F.linear`` in bf16 (cuBLAS), weights colder than the L2 cache.

    PYTHONPATH=. python3 benchmarks/kernels_linear.py [--sweep] [--out DIR]

Every time is the median of CUDA-graph replays in microseconds per call, each graph walking through enough copies of the
weights to exceed the L2 cache several times; int8 times include the split of x into digits. Every call is checked
against float64 first. ``chain`` is a 7B decode step's linears: 32 layers of q/k/v, o with residual, gate/up with SiLU
and down with residual. Writes linear-<gpu>.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tinyfuse.bench.environment import environment
from tinyfuse.kernels import _gemv, _one_row, linear

SINGLE = [
    (12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096), (6144, 4096), (28672, 4096),
    (4096, 14336), (128256, 4096), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048), (151936, 1024),
]  # fmt: skip
MANY = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]  # Llama-2-7B
OTHERS = [
    (3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192),  # 1B
    (6144, 4096), (28672, 4096), (4096, 14336),  # 8B
    (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672),  # 70B
]  # fmt: skip
FEW = [1, 2, 3, 4, 8, 9, 16, 17, 32, 64]
ROWS = [*FEW[:9], 33, 64, 65, 128, 256, 512, 1024, 2048]
LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
LAYERS = 32
ONE_ROW = [(rows, warps) for warps in (2, 4, 8) for rows in (1, 2, 4, 8)]
STREAM = [(1, 4, 1, 16, 16), (1, 4, 1, 16, 4), (1, 4, 2, 8, 8), (1, 8, 1, 16, 8), (1, 8, 1, 21, 7), (1, 8, 1, 8, 8)]

Weight = tuple[Tensor, Tensor | None]


def make(N: int, K: int, int8: bool) -> Weight:
    if int8:
        return torch.randint(-127, 128, (N, K), dtype=torch.int8, device="cuda"), torch.rand(N, device="cuda") / 100
    return torch.randn(N, K, dtype=torch.bfloat16, device="cuda") / K**0.5, None


def copies(N: int, K: int, int8: bool) -> list[Weight]:
    return [make(N, K, int8) for _ in range(max(2, int(300e6 / (N * K * (1 if int8 else 2))) + 1))]


def rows(M: int, K: int) -> Tensor:
    x = torch.randn(M, K, dtype=torch.bfloat16, device="cuda")
    x[:, 7] = 300
    return x


def timed(calls: list[Callable[[], object]], replays: int = 7) -> float:
    """Microseconds per call, in a graph on a stream that has seen one, as the decode loop records its own."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    for _ in range(10):  # fresh allocations are slow at first
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1e3 / len(calls)


def over(weights: list[Weight], call: Callable[[Tensor, Tensor | None], object]) -> float:
    return timed([lambda w=w, s=s: call(w, s) for w, s in weights] * 2)


def error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


@triton.jit
def _read(x, y, BLOCK: tl.constexpr):
    tl.extra.cuda.gdc_launch_dependents()
    total = tl.sum(tl.load(x + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)), 0)
    tl.extra.cuda.gdc_wait()
    tl.store(y + tl.program_id(0), total)


def read(w: Tensor, y: Tensor) -> None:
    """Sums the words of w."""
    words = w.view(-1).view(torch.int32)
    _read[(words.numel() // 8192,)](words, y, 8192, num_warps=4, launch_pdl=True)


def streamed(
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None],
    residual: Tensor | None = None, act: str = "", config: tuple | None = None,
) -> list[Tensor]:  # fmt: skip
    """``_gemv.gemv`` under the signature of ``_one_row.one_row``."""
    return _gemv.gemv(x, weights, biases, residual, act, config)


def run_chain(x: Tensor, layers: list[list[Weight]], one_row: bool) -> Tensor:
    run = _one_row.one_row if one_row else streamed
    for q, k, v, o, gate, up, down in layers:
        attended = run(x, [q[0], k[0], v[0]], [q[1], k[1], v[1]], [None] * 3)[0]
        (x,) = run(attended, [o[0]], [o[1]], [None], x)
        (inner,) = run(x, [gate[0], up[0]], [gate[1], up[1]], [None] * 2, None, "silu")
        (x,) = run(inner, [down[0]], [down[1]], [None], x)
    return x


def stock_chain(x: Tensor, layers: list[list[Weight]]) -> Tensor:
    for (q, _), (k, _), (v, _), (o, _), (gate, _), (up, _), (down, _) in layers:
        attended = F.linear(x, q)
        F.linear(x, k), F.linear(x, v)
        x = F.linear(attended, o) + x
        x = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) + x
    return x


def chain_times(int8: bool) -> dict[str, float]:
    layers = [[make(N, K, int8) for N, K in LAYER] for _ in range(LAYERS)]
    x, y, name = rows(1, 4096), torch.empty(1 << 20, dtype=torch.int32, device="cuda"), "int8" if int8 else "bf16"
    calls = {
        f"{name} read": lambda: [read(w, y) for layer in layers for w, _ in layer],
        f"{name} one_row": lambda: run_chain(x, layers, True),
        **({} if int8 else {f"{name} gemv": lambda: run_chain(x, layers, False)}),
    }
    if not int8:
        calls["stock bf16"] = lambda: stock_chain(x, layers)
    return {name: timed([call]) for name, call in calls.items()}


def single(N: int, K: int, sweep: bool) -> dict[str, object]:
    x = rows(1, K)
    case: dict[str, object] = {"N": N, "K": K, "M": 1}
    for int8 in (False, True):
        name = "int8" if int8 else "bf16"
        weights = copies(N, K, int8)
        w, s = weights[0]
        wide = w.double() if s is None else w.double() * s.double()[:, None] if N * K < 1e8 else None
        exact = None if wide is None else F.linear(x.double(), wide)
        if not int8:
            case["cublas"] = over(weights, lambda w, s: F.linear(x, w))
        case[name] = over(weights, lambda w, s: linear.OP(x, w, s, None, None))
        if exact is not None:
            case[f"{name} error"] = error(linear.OP(x, w, s, None, None), exact)
            case[f"{name} eager error"] = error(F.linear(x, linear.dequantize(w, s, x.dtype)), exact)
        if sweep:
            case[f"{name} sweep"] = {}
            for run, config in variants(K, int8):
                took = over(weights, lambda w, s, run=run, config=config: run(x, [w], [s], [None], config=config))
                case[f"{name} sweep"][f"{run.__name__} {config}"] = took
        del weights
    return case


def variants(K: int, int8: bool) -> list[tuple[Callable, tuple]]:
    """Every tile with at most 128 registers of weights to a thread."""
    size = K * (1 if int8 else 2)
    fits = [c for c in ONE_ROW if 16 <= c[0] * size / (c[1] * 32) <= 512]
    return [(_one_row.one_row, c) for c in fits] + [(streamed, c) for c in STREAM if not int8]


def several(N: int, K: int, M: int) -> dict[str, object]:
    x, weights = rows(M, K), copies(N, K, False)
    case: dict[str, object] = {"N": N, "K": K, "M": M, "cublas": over(weights, lambda w, s: F.linear(x, w))}
    case["bf16"] = over(weights, lambda w, s: linear.OP(x, w, s, None, None))
    if M in (2, 4, 8):
        case["bf16 gemv"] = over(weights, lambda w, s: _gemv.gemv(x, [w], [None]))
    weights = copies(N, K, True)
    case["int8"] = over(weights, lambda w, s: linear.OP(x, w, s, None, None))
    case["kernel"] = linear.OP.choose(x, *weights[0], None, None)[0].name
    w, s = weights[0]
    exact = F.linear(x.double(), w.double() * s.double()[:, None])
    case["int8 error"] = error(linear.OP(x, w, s, None, None), exact)
    case["int8 eager error"] = error(F.linear(x, linear.dequantize(w, s, x.dtype)), exact)
    return case


def warm(job: tuple) -> str | None:
    """Compile one kernel into Triton's disk cache."""
    kind, M, K, int8, config = job
    w, s = make(128, K, int8)
    x = rows(M, K)
    if kind == "op":
        linear.OP(x, w, s, None, None)
    elif kind == "chain":
        for run in (_one_row.one_row,) if int8 else (_one_row.one_row, streamed):
            if K == 4096:
                run(x, [w] * 3, [s] * 3, [None] * 3)
                run(x, [w] * 2, [s] * 2, [None] * 2, None, "silu")
            run(x, [w], [s], [None], torch.zeros(1, 128, dtype=x.dtype, device="cuda"))
    else:
        (_one_row.one_row if kind == "one_row" else streamed)(x, [w], [s], [None], config=config)
    torch.cuda.synchronize()
    return f"{job}: fell back" if linear.OP.broken else None


def compile_all(sweep: bool) -> None:
    jobs = [("op", 1, K, int8, None) for K in sorted({K for _, K in SINGLE}) for int8 in (False, True)]
    jobs += [("op", M, K, True, None) for K in sorted({K for _, K in MANY}) for M in ROWS]
    jobs += [("op", M, K, True, None) for K in sorted({K for _, K in OTHERS}) for M in FEW]
    jobs += [("gemv", M, K, False, None) for K in sorted({K for _, K in MANY}) for M in (2, 4, 8)]
    jobs += [("chain", 1, K, int8, None) for K in (4096, 11008) for int8 in (False, True)]
    if sweep:
        for K in sorted({K for _, K in SINGLE}):
            for int8 in (False, True):
                jobs += [(run.__name__, 1, K, int8, config) for run, config in variants(K, int8)]
    with concurrent.futures.ProcessPoolExecutor(14, multiprocessing.get_context("spawn")) as pool:
        for problem in filter(None, pool.map(warm, jobs)):
            print(problem)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true", help="time other tiles for one row too")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    compile_all(options.sweep)
    name = torch.cuda.get_device_name()
    big, y = make(1 << 16, 1 << 14, True)[0], torch.empty(1 << 20, dtype=torch.int32, device="cuda")
    bandwidth = big.nbytes / timed([lambda: read(big, y)] * 4) * 1e6
    results: dict[str, object] = {
        "environment": environment("cuda") | {"read_bytes_per_s": bandwidth},
        "chain_us": chain_times(True) | chain_times(False),
    }
    print(name, f"read {bandwidth / 1e12:.2f} TB/s", {k: round(v) for k, v in results["chain_us"].items()}, flush=True)
    results["one_row"] = []
    for N, K in SINGLE:
        case = single(N, K, options.sweep and N * K < 1.3e8)
        results["one_row"].append(case)
        for kind, size in (("bf16", 2), ("int8", 1)):
            best = sorted(case.get(f"{kind} sweep", {}).items(), key=lambda item: item[1])[:4]
            errors = f"{case.get(f'{kind} error', 0):.1e} {case.get(f'{kind} eager error', 0):.1e}"
            print(
                f"{N}x{K} {kind}: {case[kind]:.2f} us, read {N * K * size / bandwidth * 1e6:.2f},",
                f"cuBLAS bf16 {case['cublas']:.2f}, ratio {case[kind] / case['cublas']:.2f}, errors {errors}",
                *(f"| {name} {took:.2f}" for name, took in best),
                flush=True,
            )
    results["rows"] = []
    for N, K in MANY + OTHERS:
        line = f"{N}x{K} int8 / cuBLAS bf16:"
        for M in ROWS if (N, K) in MANY else FEW:
            case = several(N, K, M)
            results["rows"].append(case)
            bad = "" if case["int8 error"] <= 1.1 * case["int8 eager error"] else "!"
            line += f" {M}:{case['int8'] / case['cublas']:.2f}{bad}"
            line += f"({case['bf16 gemv'] / case['cublas']:.2f})" if "bf16 gemv" in case else ""
        print(line, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"linear-{name.split()[-1].lower()}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
