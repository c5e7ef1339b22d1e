"""Attention kernels against scaled_dot_product_attention as Hugging Face calls it.

    PYTHONPATH=. python3 benchmarks/kernels_attention.py [--sweep] [--out DIR] [--only decode|decode-fp32|prefill]

Every time is the median of CUDA-graph replays in microseconds per call, each graph walking through enough
copies of the keys and values to exceed the L2 cache twice. Every variant is checked first against float64 on
its first and last head. Writes attention-decode-<gpu>.json and one file more for each other kind. ``--shard I N`` runs
every N-th case once, untimed: N such processes side by side fill Triton's disk cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

from tinyfuse.bench.environment import environment
from tinyfuse.kernels import _attention_decode as decoding
from tinyfuse.kernels import _attention_prefill as prefilling
from tinyfuse.kernels import mask_bounds

HEADS = [(32, 32, 128), (32, 8, 128), (32, 8, 64)]
DEVICE = torch.device("cuda")
CALLS = 16  # at least, in a graph: its launch takes the time of one


@dataclass
class Case:
    """q [1, H, Sq, D] over a cache [1, Hkv, Skv, D] of ``dtype``; ``live`` positions of it are written."""

    H: int
    Hkv: int
    D: int
    Sq: int
    Skv: int
    live: int
    dtype: str = "bfloat16"

    def inputs(self) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        dtype = getattr(torch, self.dtype)
        nbytes = 2 * self.Hkv * self.Skv * self.D * dtype.itemsize * 2
        l2 = torch.cuda.get_device_properties(DEVICE).L2_cache_size
        sets = min(32, max(3, 2 * l2 // nbytes + 1)) if self.Skv * self.Sq < 2**22 else 2
        g = torch.Generator(DEVICE).manual_seed(0)

        def random(heads: int, length: int) -> Tensor:
            return torch.randn(1, heads, length, self.D, generator=g, device=DEVICE, dtype=dtype)

        made = [(random(self.H, self.Sq), random(self.Hkv, self.Skv), random(self.Hkv, self.Skv)) for _ in range(sets)]
        j = torch.arange(self.Skv, device=DEVICE)
        i = torch.arange(self.live - self.Sq, self.live, device=DEVICE)[:, None]
        return made, (j <= i)[None, None]


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    """As in transformers: a copy of the cache."""
    if groups == 1:
        return x
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, groups, s, d).reshape(b, h * groups, s, d)


def sdpa(q, k, v, mask, is_causal=False, backend=None, gqa=False):
    if not gqa:
        k, v = repeat_kv(k, q.shape[1] // k.shape[1]), repeat_kv(v, q.shape[1] // v.shape[1])

    def call():
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, enable_gqa=gqa)

    if backend is None:
        return call().transpose(1, 2).contiguous()
    with sdpa_kernel(backend):
        return call().transpose(1, 2).contiguous()


def ours(run, plan=None, is_causal=False, masked=True):
    def call(q, k, v, mask):
        return run(q, k, v, mask if masked else None, q.shape[-1] ** -0.5, is_causal, plan).transpose(1, 2)

    return call


@cache
def additive(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, torch.finfo(torch.bfloat16).min).to(torch.bfloat16)


def in_step(plan=None):
    """The decode kernel with the bounds of the mask, which a step finds once for all its layers."""
    return lambda q, k, v, mask: ours(partial(decoding.decode, bounds=bounds(mask)), plan)(q, k, v, mask)


@cache
def bounds(mask: Tensor) -> Tensor:
    return mask_bounds.OP(mask)


def next_layer(case: Case):
    """The prefill kernel where an earlier layer has mapped the mask; a captured graph would map it each time."""

    def call(q, k, v, mask):
        plan = prefilling.plan(case.Sq, case.D)
        made = known(mask, (1, case.H, case.Sq, case.Skv), plan)
        with patch.object(prefilling, "block_map", return_value=made):
            return ours(prefilling.prefill)(q, k, v, mask)

    return call


@cache
def known(mask: Tensor, size: tuple, plan: prefilling.Plan) -> prefilling.BlockMap:
    return prefilling.block_map(mask, size, plan)


def decode_variants(case: Case, sweep: bool) -> dict[str, Callable]:
    variants = {
        "stock": lambda q, k, v, mask: sdpa(q, k, v, mask),
        "tinyfuse": in_step(),
        "tinyfuse, mask read": ours(decoding.decode),
    }
    if case.live == case.Skv:
        variants["sdpa no mask"] = lambda q, k, v, mask: sdpa(q, k, v, None, gqa=case.Hkv != case.H)
        variants["tinyfuse no mask"] = ours(decoding.decode, masked=False)
    if sweep and case.live in (2048, 32768) and case.live == case.Skv:
        n = max(1, 128 // case.D)
        for block_n, warps, registers in [(64, 8, 128), (32, 4, 128), (32, 2, None), (16, 2, 128), (16, 1, None)]:
            for per_sm in (2, 4, 8):
                splits = max(1, min(per_sm * 132 // case.Hkv, case.Skv // (block_n * n), decoding.MAX_SPLITS))
                plan = decoding.Plan(16, block_n * n, splits, warps, registers)
                variants[str(tuple(plan))] = in_step(plan)
    return variants


def prefill_variants(case: Case, sweep: bool) -> dict[str, Callable]:
    variants = {
        "stock": lambda q, k, v, mask: sdpa(q, k, v, mask),
        "efficient": lambda q, k, v, mask: sdpa(q, k, v, mask, backend=SDPBackend.EFFICIENT_ATTENTION),
        "cudnn": lambda q, k, v, mask: sdpa(q, k, v, mask, backend=SDPBackend.CUDNN_ATTENTION),
        "tinyfuse": ours(prefilling.prefill),
        "next layer": next_layer(case),
        "float: stock": lambda q, k, v, mask: sdpa(q, k, v, additive(mask)),
        "float: tinyfuse": lambda q, k, v, mask: ours(prefilling.prefill)(q, k, v, additive(mask)),
    }
    if case.Sq == case.Skv:
        gqa = case.Hkv != case.H
        variants["flag: sdpa"] = lambda q, k, v, mask: sdpa(q, k, v, None, True, gqa=gqa)
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            backend = getattr(SDPBackend, name)
            variants[f"flag: {name.split('_')[0].lower()}"] = lambda q, k, v, mask, backend=backend: sdpa(
                q, k, v, None, True, backend, gqa
            )
        variants["flag: tinyfuse"] = ours(prefilling.prefill, is_causal=True, masked=False)
    if sweep and case.Sq in (512, 8192):
        shapes = [(64, 64, 4, 3, 1), (64, 64, 4, 3, 2), (64, 64, 4, 2, 2), (128, 64, 8, 3, 1), (128, 64, 8, 3, 2)]
        for shape in [*shapes, (128, 128, 8, 2, 1), (64, 128, 4, 2, 1), (128, 64, 4, 3, 1)]:
            plan = prefilling.Plan(*shape)
            variants[str(shape)] = ours(prefilling.prefill, plan)
    return variants


def error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> float:
    """Relative error of the first and last head; out [1, Sq, H, D]."""
    group = q.shape[1] // k.shape[1]
    worst = 0.0
    for h in (0, q.shape[1] - 1):
        score = q[0, h].double() @ k[0, h // group].double().T * q.shape[-1] ** -0.5
        exact = score.masked_fill_(~mask[0, 0], -torch.inf).softmax(-1) @ v[0, h // group].double()
        worst = max(worst, ((out[0, :, h].double() - exact).norm() / exact.norm()).item())
    return worst


def time_graph(call: Callable, sets: list, mask: Tensor, seconds: float = 0.05) -> float:
    for q, k, v in sets[:2]:
        call(q, k, v, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls = sets * -(-CALLS // len(sets))
        kept = [call(q, k, v, mask) for q, k, v in calls]
    times = []
    graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    while len(times) < 5 or (len(times) < 40 and time.perf_counter() - began < seconds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    del kept
    return statistics.median(times)


def host_time(call: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> float:
    """Microseconds of Python per call, the device idle."""
    times = []
    for _ in range(30):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call(q, k, v, mask)
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes per second of a 2 GiB sum."""
    x = torch.ones(2**30, dtype=torch.bfloat16, device=DEVICE).view(torch.int32)
    times = []
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        x.max()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2**31 / (statistics.median(times) * 1e-3)


def cases(only: str | None) -> list[tuple[str, Case]]:
    found = []
    for H, Hkv, D in HEADS:
        for live in (128, 512, 2048, 8192, 32768):
            found.append(("decode", Case(H, Hkv, D, 1, live, live)))
        for live, size in ((128, 1024), (512, 4096), (2048, 32768)):
            found.append(("decode", Case(H, Hkv, D, 1, size, live)))
        for live, size in ((128, 128), (128, 1024), (512, 512), (509, 509), (2048, 2048), (2041, 4096), (8192, 8192)):
            found.append(("prefill", Case(H, Hkv, D, live, size, live)))
    for H, Hkv, D in [*HEADS, (12, 12, 64)]:
        found += [("decode-fp32", Case(H, Hkv, D, 1, n, n, "float32")) for n in (128, 1024, 8192)]
    for H, Hkv, D in [(8, 8, 256), (32, 8, 80), (12, 12, 96)]:
        found += [("decode", Case(H, Hkv, D, 1, n, n)) for n in (512, 8192)]
        found += [("prefill", Case(H, Hkv, D, n, n, n)) for n in (128, 512, 2048)]
    return [(kind, case) for kind, case in found if only in (None, kind)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", choices=("decode", "decode-fp32", "prefill"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--shard", type=int, nargs=2)
    args = parser.parse_args()
    if args.shard:
        todo = [(case, kind, name) for kind, case in cases(args.only)
                for name in VARIANTS[kind](case, args.sweep)]  # fmt: skip
        for case, kind, name in todo[args.shard[0] :: args.shard[1]]:
            if case.Skv <= 8192 and "sdpa" not in name and name not in ("stock", "efficient", "cudnn"):
                sets, mask = case.inputs()
                VARIANTS[kind](case, args.sweep)[name](*sets[0], mask)
        return
    found = environment("cuda") | {"read_bytes_per_s": read_bandwidth()}
    rows: dict[str, list[dict]] = {}
    print(found, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name().lower().replace("nvidia", "").split()[0]
    for kind, case in cases(args.only):
        sets, mask = case.inputs()
        row = {"kind": kind, **vars(case), "sets": len(sets), "us": {}, "error": {}, "host_us": {}, "failed": {}}
        for name, call in VARIANTS[kind](case, args.sweep).items():
            try:
                row["error"][name] = error(call(*sets[0], mask), *sets[0], mask)
                row["us"][name] = time_graph(call, sets, mask)
                if name in ("stock", "tinyfuse"):
                    row["host_us"][name] = host_time(call, *sets[0], mask)
            except (RuntimeError, OutOfResources) as failure:
                row["failed"][name] = str(failure).splitlines()[0]
        additive.cache_clear()
        bounds.cache_clear()
        known.cache_clear()
        rows.setdefault(kind, []).append(row)
        show(row, found["read_bytes_per_s"])
        path = args.out / f"attention-{kind}-{gpu}.json"
        path.write_text(json.dumps({"environment": found, "rows": rows[kind]}, indent=1) + "\n")
        del sets


def show(row: dict, bandwidth: float) -> None:
    us = row["us"]
    heads, itemsize = f"{row['H']}/{row['Hkv']}x{row['D']}", getattr(torch, row["dtype"]).itemsize
    floor = 2 * row["Hkv"] * row["live"] * row["D"] * itemsize / bandwidth * 1e6
    wrong = [n for n, e in row["error"].items() if not e <= 2 * row["error"]["stock"]]
    fastest = sorted((t, n) for n, t in us.items() if n.startswith("("))[:3]
    print(
        f"{row['kind']} {heads} Sq {row['Sq']} live {row['live']}/{row['Skv']}"
        f" floor {floor:.1f}: " + ", ".join(f"{n} {t:.1f}" for n, t in us.items() if not n.startswith("(")),
        f"| stock/ours {us['stock'] / us['tinyfuse']:.2f} | host {[round(t) for t in row['host_us'].values()]}"
        f" | best {[(round(t, 1), n) for t, n in fastest]} | wrong {wrong} {row['failed'] or ''}",
        flush=True,
    )


VARIANTS = {"decode": decode_variants, "decode-fp32": decode_variants, "prefill": prefill_variants}

if __name__ == "__main__":
    main()
