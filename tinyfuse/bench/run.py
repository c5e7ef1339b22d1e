"""One benchmark run: load, prepare every variant, time them interleaved, judge their output, and tabulate."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from tinyfuse.bench import UsageError, measure, models, variants
from tinyfuse.bench.environment import environment
from tinyfuse.bench.measure import Samples, median
from tinyfuse.bench.quality import WINDOW, WINDOWS, quality
from tinyfuse.bench.variants import Variant
from tinyfuse.report import report_of

WARM_UPS = 2  # the first pass compiles (and records CUDA graphs), the second one shows that nothing is left to compile


@dataclass
class Settings:
    """``prompt`` and ``gen`` count tokens; ``variants`` is a comma-separated list or None for all."""

    model: str | None = None
    preset: str | None = None
    batch: int = 1
    prompt: int = 64
    gen: int = 32
    dtype: str = "bfloat16"
    device: str = "cpu"
    repeats: int = 5
    variants: str | None = None
    seed: int = 0


@dataclass
class Prepared:
    """A variant ready to be timed. Seconds; bytes ``held`` on the GPU beyond the weights shared between variants;
    ``fused`` is the report's summary, empty for a stock variant."""

    variant: Variant
    model: nn.Module
    run: measure.Run
    quantize_s: float | None
    warm_up_s: float
    held: int
    fused: dict[str, dict[str, int]]


def bench(settings: Settings, step: Callable[[str, int], None] = lambda text, total: None) -> dict[str, Any]:
    """Run the benchmark and return what ``--json`` writes: ``{"environment": {...}, "rows": [{...}, ...]}``.

    ``step(what happens next, number of steps)`` is called before every step. Raises UsageError for settings that
    cannot be served; a variant that fails is a row with an ``error``.
    """
    chosen = variants.choose(settings.variants, variants.VARIANTS)
    device = torch.device(settings.device)
    steps = 2 + len(chosen) * (1 + settings.repeats) + WINDOWS
    step("loading the model", steps)
    start = time.perf_counter()
    loaded = models.load(settings.model, settings.preset, models.DTYPES[settings.dtype], device, settings.seed)
    measure.synchronize(device)
    load_s = time.perf_counter() - start
    if getattr(loaded.model, "hf_quantizer", None) is not None:
        raise UsageError(f"{loaded.name} is quantised already: give the unquantised model, the bench quantises it")
    # the compilers key graphs by code, which all variants share: room for everybody's
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

    prompts = models.prompts(loaded, settings.batch, settings.prompt, settings.repeats + WARM_UPS, settings.seed)
    windows = models.windows(loaded, WINDOWS, WINDOW, settings.seed)
    with Warnings() as warnings:
        prepared: dict[str, Prepared] = {}
        errors: dict[str, str] = {}
        with fresh_cache():  # compilers start with empty caches, and a later variant finds what an earlier one compiled
            for variant in chosen:
                step(f"preparing {variant.name}", steps)
                try:
                    prepared[variant.name] = prepare(variant, loaded.model, prompts[:WARM_UPS], settings.gen)
                except Exception as error:  # one variant that fails is a row of the result, not the end of the run
                    errors[variant.name] = in_short(error)
        steps -= settings.repeats * len(errors)
        samples = measure.interleave(
            {name: ready.run for name, ready in prepared.items()},
            prompts[WARM_UPS:],
            settings.gen,
            step=lambda name: step(f"timing {name}", steps),
        )
        judged = {name: ready.model for name, ready in prepared.items() if ready.variant.own_forward}
        judged |= {name: loaded.model for name in prepared.keys() & {"stock-eager"}}
        scores = quality(judged, loaded.model, windows, step=lambda: step("judging quality", steps))
    step("measuring the read bandwidth", steps)
    bandwidth = measure.read_bandwidth(device)

    unknown = {"ppl": None, "kl": None, "top1": None}
    rows = []
    for variant in chosen:
        row = {"variant": variant.name, "model": loaded.name, "dtype": settings.dtype, "device": device.type}
        row |= {"batch": settings.batch, "prompt_len": settings.prompt, "gen_len": settings.gen}
        if variant.name in errors:
            row["error"] = errors[variant.name]
        else:
            row |= _row(prepared[variant.name], samples[variant.name], settings, loaded, load_s, bandwidth)
            row |= scores.get(variant.name, unknown)
            if loaded.tokenizer is None:
                row["ppl"] = None  # random weights on random tokens
        rows.append(row)
    compare(rows, "tpot_ms")
    same_text(rows, samples)
    block = environment(device) | {"read_bandwidth_gb_s": round(bandwidth / 1e9, 1), "warnings": warnings.messages}
    return {"environment": block, "rows": rows}


def prepare(variant: Variant, model: nn.Module, prompts: list[Tensor], gen: int) -> Prepared:
    """Build the variant on a twin of ``model`` and warm it up."""
    device = model.device
    before = measure.allocated(device)
    mine = models.twin(model)
    quantize_s = None
    if variant.quantize is not None:
        start = time.perf_counter()
        variant.quantize(mine)
        measure.synchronize(device)
        quantize_s = time.perf_counter() - start
    start = time.perf_counter()
    if variant.optimize is not None:
        mine = variant.optimize(mine)
    run = variants.runner(mine, variant.arguments(prompts[0].shape[1]))
    for prompt in prompts:
        run(prompt, 1)
        run(prompt, gen)
    warm_up_s = time.perf_counter() - start
    fused = report_of(mine).summary if variant.optimize is not None else {}
    return Prepared(variant, mine, run, quantize_s, warm_up_s, measure.allocated(device) - before, fused)


def _row(ready: Prepared, samples: Samples, settings: Settings, loaded: models.Loaded, load_s: float, bandwidth: float):
    ttft, tpot = samples.ttft(), samples.tpot(settings.gen)
    ttft_ms, tpot_ms = median(ttft), median(tpot)
    steady = WARM_UPS * (median(samples.first) + median(samples.full))
    weights, shared = measure.storages(ready.model), measure.storages(loaded.model)
    context = settings.prompt + settings.gen / 2
    kv = measure.kv_bytes_read(ready.model.config, settings.batch, context, loaded.model.dtype.itemsize)
    read = measure.weight_bytes_read(ready.model) + kv
    peak = None
    if samples.transient:
        peak = sum(weights[at] for at in weights.keys() & shared.keys()) + ready.held + max(samples.transient)
    text = None
    if loaded.tokenizer is not None:
        text = loaded.tokenizer.decode(samples.tokens[0][0], skip_special_tokens=True)
    return {
        "ttft_ms": round(ttft_ms, 3),
        "tpot_ms": round(tpot_ms, 4),
        "prefill_tok_s": round(settings.batch * settings.prompt / ttft_ms * 1e3, 1),
        "decode_tok_s": round(settings.batch / tpot_ms * 1e3, 2),
        "peak_mem_gb": None if peak is None else round(peak / 1e9, 3),
        "weights_gb": round(sum(weights.values()) / 1e9, 4),
        "mbu": round(read / (tpot_ms / 1e3) / bandwidth, 4),
        "compile_s": round(max(0.0, ready.warm_up_s - steady), 2),
        "load_s": round(load_s, 2),
        "quantize_s": None if ready.quantize_s is None else round(ready.quantize_s, 2),
        "text": text,
        "fused": ready.fused or None,
        "values": {"ttft_ms": ttft, "tpot_ms": tpot, "total_ms": [1e3 * seconds for seconds in samples.full]},
    }


def in_short(error: Exception) -> str:
    """What a row says of the error: its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def compare(rows: list[dict[str, Any]], time: str) -> None:
    """Add to each row that has a ``time`` its speed-up over stock-eager and over the fastest stock variant, and whether
    the repeats tell it apart from that one; None where there is nothing to compare with."""
    timed = [row for row in rows if time in row]
    eager = next((row for row in timed if row["variant"] == "stock-eager"), None)
    stock = [row for row in timed if row["variant"].startswith("stock-")]
    best = min(stock, key=lambda row: row[time], default=None)
    for row in timed:
        row["speedup_vs_eager"] = eager and round(eager[time] / row[time], 3)
        row["speedup_vs_best_stock"] = best and round(best[time] / row[time], 3)
        row["differs_from_best_stock"] = best and measure.differ(row["values"][time], best["values"][time])


def same_text(rows: list[dict[str, Any]], samples: dict[str, Samples]) -> None:
    """Add to each row the share of prompts for which it wrote stock-eager's tokens; None if that did not run."""
    eager = samples.get("stock-eager")
    for row in [row for row in rows if row["variant"] in samples]:
        row["same_text"] = None
        if eager:
            pairs = zip(samples[row["variant"]].tokens, eager.tokens, strict=True)
            same = [torch.equal(mine, theirs) for mine, theirs in pairs]
            row["same_text"] = sum(same) / len(same)


class Warnings(logging.Handler):
    """Keeps what the library's logger warns about, instead of letting it run into the progress bar."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> Warnings:
        logging.getLogger("tinyfuse").addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger("tinyfuse").removeHandler(self)
