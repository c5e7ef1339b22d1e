"""One token at a time on a GPU: tokens per second against peers timed in the same run, and where a step's time goes.

    PYTHONPATH=. python3 benchmarks/decode.py [CASE ...] [--torchao] [--repeats 5] [--out DIR]

Random weights, greedy, through ``tinyfuse.optimize`` and ``model.generate``; the median of interleaved repeats.
``stock-static`` is ``generate`` with a static cache. ``stock-step`` is transformers' forward under ``torch.compile``
(Inductor, CUDA graphs) on a static cache, called in a bare loop; ``torchao-step`` the same after torchao's int8
weight-only quantisation, with coordinate descent tuning. Their cache is as long as the tokens need, in the cases
b8-1k and b32-1k as long as a service would allocate it that does not compile for each length. The kernels of a step
come from the profiler: ``us`` is the time by which a kernel moved the end of the step, so that overlapping launches add
up to the step. Appends to decode-<gpu>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import StaticCache

from tinyfuse.bench import measure, models
from tinyfuse.bench.environment import append, environment
from tinyfuse.bench.run import WARM_UPS, Prepared, prepare
from tinyfuse.bench.variants import VARIANTS, Variant
from tinyfuse.runtime.forward import CACHE

DEVICE = torch.device("cuda")
GEN = 128
PROFILED = 24  # tokens
LINEAR = ("_one_row", "_gemm", "_gemv", "nvjet", "gemm", "cutlass", "gemv")


@dataclass(frozen=True)
class Case:
    """``must``: (variant, peer, least ratio of their speeds, least share of the read bandwidth or 0). ``cache``: the
    length of the cache of stock-step and torchao-step, or 0 for what prompt and new tokens need."""

    preset: str
    batch: int
    prompt: int
    variants: tuple[str, ...]
    must: tuple[tuple[str, str, float, float], ...]
    cache: int = 0


INT8 = "tinyfuse-int8"
BOTH = ("tinyfuse", INT8)
CASES = {
    "7b": Case(
        "llama-2-7b", 1, 128, ("stock-static", *BOTH),
        ((INT8, "stock-static", 2.8, 0.72), ("tinyfuse", "stock-static", 1.45, 0.78)),
    ),
    "7b-b8": Case("llama-2-7b", 8, 128, ("stock-step", *BOTH), ((INT8, "stock-step", 2.2, 0),)),
    "7b-b32": Case("llama-2-7b", 32, 128, ("stock-step", *BOTH), ((INT8, "stock-step", 2.2, 0),)),
    "7b-b8-1k": Case("llama-2-7b", 8, 128, ("stock-step", INT8), ((INT8, "stock-step", 2.2, 0),), 1024),
    "7b-b32-1k": Case("llama-2-7b", 32, 128, ("stock-step", INT8), ((INT8, "stock-step", 2.2, 0),), 1024),
    "1b": Case(
        "llama-3.2-1b", 1, 128, ("stock-static", *BOTH),
        ((INT8, "stock-static", 2.2, 0), ("tinyfuse", "stock-static", 1.7, 0)),
    ),
    "qwen": Case("qwen3-0.6b", 1, 128, ("stock-static", *BOTH), ((INT8, "stock-static", 2.5, 0),)),
    "8b-1k": Case("llama-3.1-8b", 1, 1024 - GEN, ("stock-static", *BOTH), ()),
    "8b-8k": Case(
        "llama-3.1-8b", 1, 8192 - GEN, ("stock-static", *BOTH), ((INT8, "stock-static", 2.5, 0),)
    ),
}  # fmt: skip


class CompiledStep:
    """``run(ids, n)`` over transformers' own forward: an eager prompt, then one compiled call a token."""

    def __init__(self, model: nn.Module, batch: int, length: int, tune: bool):
        self.model, self.cache = model, StaticCache(model.config, max_cache_len=length)
        options = {"triton.cudagraphs": True, "coordinate_descent_tuning": tune}
        self.step = torch.compile(model.forward, dynamic=False, fullgraph=True, options=options)

    @torch.no_grad()
    def __call__(self, ids: Tensor, n: int) -> Tensor:
        self.cache.reset()
        token = self._pick(self.model(input_ids=ids, **{CACHE: self.cache}))
        tokens, position = [token], torch.full_like(token, ids.shape[1])
        for _ in range(n - 1):
            torch.compiler.cudagraph_mark_step_begin()
            token = self._pick(self.step(input_ids=token, position_ids=position, **{CACHE: self.cache}))
            tokens.append(token)
            position = position + 1
        return torch.cat(tokens, 1).cpu()

    def _pick(self, out: Any) -> Tensor:
        return out.logits[:, -1].argmax(-1, keepdim=True)


def ready(name: str, case: Case, model: nn.Module, prompts: list[Tensor]) -> Prepared:
    torchao = name == "torchao-step"
    if not (torchao or name == "stock-step"):
        return prepare(VARIANTS[name], model, prompts, GEN)
    if torchao:
        model = models.twin(model)
        VARIANTS["torchao-int8"].quantize(model)
    run, began = CompiledStep(model, case.batch, case.cache or case.prompt + GEN, torchao), time.perf_counter()
    for prompt in prompts:
        run(prompt, 1)
        run(prompt, GEN)
    return Prepared(Variant(name), model, run, None, time.perf_counter() - began, 0, {})


def kernels(run: measure.Run, prompt: Tensor) -> list[list[tuple[str, float, float]]]:
    """(name, start, end) in microseconds of the kernels of each step but the first few, which are no graph yet."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run(prompt, PROFILED)
        torch.cuda.synchronize()
    found = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events = sorted((e.time_range.start, e.time_range.end, e.name) for e in found)
    steps: list[list[tuple[str, float, float]]] = [[]]
    for start, end, name in events:
        steps[-1].append((name, start, end))
        if name == "_choose":  # the last kernel of a greedy step
            steps.append([])
    return steps[4:-1]


def breakdown(steps: list[list[tuple[str, float, float]]]) -> list[dict[str, Any]]:
    """Per kernel of the steps' median: launches, the microseconds it adds to the step, those it runs, and those
    in which nothing ran before it."""
    seen: dict[str, list[dict[str, float]]] = {}
    for before, step in itertools.pairwise(steps):
        sums: dict[str, dict[str, float]] = {}
        last = before[-1][2]
        for name, start, end in step:
            entry = sums.setdefault(name, {"launches": 0, "us": 0.0, "running_us": 0.0, "gap_us": 0.0})
            entry["launches"] += 1
            entry["us"] += max(0.0, end - last)
            entry["running_us"] += end - start
            entry["gap_us"] += max(0.0, start - last)
            last = max(last, end)
        for name, entry in sums.items():
            seen.setdefault(name, []).append(entry)
    table = [
        {"kernel": name, **{key: round(statistics.median(e[key] for e in entries), 2) for key in entries[0]}}
        for name, entries in seen.items()
    ]
    return sorted(table, key=lambda row: -row["us"])


def share(table: list[dict[str, Any]], names: tuple[str, ...], nbytes: float, bandwidth: float) -> dict[str, float]:
    """Microseconds of the kernels whose names contain one of ``names``, and the share of the bandwidth they reach."""
    us = sum(row["us"] for row in table if any(name in row["kernel"] for name in names))
    return {"us": round(us, 1), "bytes": nbytes, "share": round(nbytes / (us * 1e-6) / bandwidth, 3) if us else 0.0}


def measured(case: Case, torchao: bool, repeats: int) -> dict[str, Any]:
    loaded = models.load(None, case.preset, torch.bfloat16, DEVICE)
    prompts = models.prompts(loaded, case.batch, case.prompt, repeats + WARM_UPS, 0)
    names = [*case.variants, *(("torchao-step",) if torchao else ())]
    prepared = {}
    for name in names:
        prepared[name] = ready(name, case, loaded.model, prompts[:WARM_UPS])
        print(f"  {name} ready", flush=True)
    samples = measure.interleave({name: each.run for name, each in prepared.items()}, prompts[WARM_UPS:], GEN)
    bandwidth = measure.read_bandwidth(DEVICE)
    config = loaded.model.config
    kv = measure.kv_bytes_read(config, case.batch, case.prompt + GEN / 2, 2)
    rows = {}
    for name, each in prepared.items():
        tpot = samples[name].tpot(GEN)
        ms, weights = measure.median(tpot), measure.weight_bytes_read(each.model)
        rows[name] = {
            "tok_s": round(case.batch / ms * 1e3, 1), "tpot_ms": round(ms, 4), "values": tpot,
            "ttft_ms": round(measure.median(samples[name].ttft()), 2),
            "us_per_layer": round(ms * 1e3 / config.num_hidden_layers, 2),
            "share_of_bandwidth": round((weights + kv) / (ms * 1e-3) / bandwidth, 4),
            "first_call_s": round(each.warm_up_s - WARM_UPS * sum(map(measure.median, (
                samples[name].first, samples[name].full))), 2),
        }  # fmt: skip
        if name in BOTH:
            rows[name]["fallbacks"] = each.model._tinyfuse.fallbacks
            table = breakdown(kernels(each.run, prompts[0]))
            context = case.prompt + PROFILED / 2
            rows[name] |= {
                "launches_per_layer": round(sum(row["launches"] for row in table) / config.num_hidden_layers, 2),
                "step_us": round(sum(row["us"] for row in table), 1),
                "linears": share(table, LINEAR, weights, bandwidth),
                "attention": share(
                    table, ("_decode",), measure.kv_bytes_read(config, case.batch, context, 2), bandwidth
                ),
                "kernels": table,
            }
    return {"read_bytes_per_s": bandwidth, "gen": GEN, **dataclasses.asdict(case), "rows": rows}


def show(name: str, result: dict[str, Any]) -> None:
    rows = result["rows"]
    print(f"{name}: {result['preset']}, batch {result['batch']}, prompt {result['prompt']}")
    for variant, row in rows.items():
        line = f"  {variant:14} {row['tok_s']:8.1f} tok/s  {row['us_per_layer']:6.1f} us/layer"
        line += f"  {row['share_of_bandwidth']:.0%} of bandwidth  first token {row['ttft_ms']} ms"
        if "kernels" in row:
            line += f"  {row['launches_per_layer']} launches/layer  first call {row['first_call_s']} s"
            line += "".join(f"\n     {reason}" for reason in row["fallbacks"])
            line += f"\n     linears {row['linears']}, attention {row['attention']}, step {row['step_us']} us"
            for kernel in row["kernels"][:14]:
                line += f"\n     {kernel['kernel'][:44]:44} {kernel['launches']:5.0f} launches {kernel['us']:8.1f} us"
                line += f" running {kernel['running_us']:8.1f} gap {kernel['gap_us']:7.1f}"
        print(line)
    for variant, peer, ratio, least in result["must"]:
        reached = rows[variant]["tok_s"] / rows[peer]["tok_s"]
        fine = reached >= ratio and rows[variant]["share_of_bandwidth"] >= least
        print(f"  {variant} {reached:.2f} x {peer}, must {ratio}: {'holds' if fine else 'MISSED'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="all by default")
    parser.add_argument("--torchao", action="store_true", help="time torchao-step too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for name in options.cases or CASES:
        torch.cuda.empty_cache()
        result = measured(CASES[name], options.torchao, options.repeats)
        show(name, result)
        append(options.out, "decode", {"case": name, "environment": environment(DEVICE), **result})


if __name__ == "__main__":
    main()
