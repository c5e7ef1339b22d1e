"""``tinyfuse bench --task encode``: an encoder's forward pass, stock and tinyfuse side by side.

Every call is one batch of whole sequences: token ids, a spectrogram or pixels. All variants run the same batches in
rotating order, and each output is held to the same weights in fp32: it may be ``TOLERANCE`` times as far from that as
stock in the run's dtype, or ``FLOAT32`` away.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from tinyfuse.bench import measure, models
from tinyfuse.bench.environment import environment
from tinyfuse.bench.measure import median
from tinyfuse.bench.run import Settings, Warnings, compare, in_short
from tinyfuse.bench.variants import VARIANTS, Variant, choose
from tinyfuse.report import report_of

TOLERANCE, FLOAT32 = 1.5, 1e-4
SECONDS = 0.2  # that the calls of one repeat take together, or one call where it takes longer
DEFAULT = ("minilm", "whisper-base")

Batch = dict[str, Tensor]


def _inductor(model: nn.Module) -> nn.Module:
    return torch.compile(model, dynamic=False)


CHOICES = {
    variant.name: variant
    for variant in (
        VARIANTS["stock-eager"],
        Variant("stock-compile", optimize=_inductor),
        VARIANTS["tinyfuse"],
        VARIANTS["tinyfuse-int8"],
    )
}


def bench(settings: Settings, step: Callable[[str, int], None] = lambda text, total: None) -> dict[str, Any]:
    """What ``--json`` writes: ``{"environment": {...}, "rows": [{...}, ...]}``, a row per encoder and variant.

    ``step(what happens next, number of steps)`` is called before every step. Raises UsageError for settings that
    cannot be served; a variant that fails is a row with an ``error``.
    """
    chosen = choose(settings.variants, CHOICES)
    presets = DEFAULT if settings.model is None and settings.preset is None else (settings.preset,)
    steps = len(presets) * (1 + len(chosen) * (1 + settings.repeats))
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    device, rows = torch.device(settings.device), []
    with Warnings() as warnings, torch.no_grad(), fresh_cache():
        for preset in presets:
            step("loading the model", steps)
            dtype = models.DTYPES[settings.dtype]
            loaded = models.load_encoder(settings.model, preset, dtype, device, settings.seed)
            rows += _rows(loaded, chosen, settings, lambda text: step(text, steps))
    return {"environment": environment(device) | {"warnings": warnings.messages}, "rows": rows}


def _rows(
    loaded: models.Loaded, chosen: list[Variant], settings: Settings, step: Callable[[str], None]
) -> list[dict[str, Any]]:
    batches = models.encoder_batches(loaded.model, settings.batch, settings.prompt, settings.repeats + 1, settings.seed)
    rounding = distance(encode(loaded.model, batches[0]), in_fp32(loaded.model, batches[0]))
    rows: list[dict[str, Any]] = []
    prepared: dict[str, nn.Module] = {}
    for variant in chosen:
        step(f"preparing {variant.name}")
        row = {"variant": variant.name, "task": "encode", "model": loaded.name, "dtype": settings.dtype}
        row |= {"device": settings.device, "batch": settings.batch}
        row["input"] = list(batches[0][loaded.model.main_input_name].shape)
        try:
            prepared[variant.name], more = prepare(variant, loaded.model, batches[0])
            rows.append(row | more | {"agrees": more["distance"] <= max(TOLERANCE * rounding, FLOAT32)})
        except Exception as error:  # one variant that fails is a row of the result, not the end of the run
            rows.append(row | {"error": in_short(error)})
    for model in prepared.values():  # preparing others can make a compiled one compile again
        encode(model, batches[0])
    times = interleave(prepared, batches[1:], step)
    for row in rows:
        if row["variant"] in times:
            row["values"] = {"batch_ms": times[row["variant"]]}
            row["batch_ms"] = round(median(times[row["variant"]]), 4)
            row["sequences_s"] = round(settings.batch / row["batch_ms"] * 1e3, 2)
    compare(rows, "batch_ms")
    return rows


def encode(model: nn.Module, batch: Batch) -> Tensor:
    """The last hidden states [B, S, H], once the device is done."""
    output = model(**batch)[0]
    measure.synchronize(output.device)
    return output


def in_fp32(model: nn.Module, batch: Batch) -> Tensor:
    wide = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    return encode(copy.deepcopy(model).float(), wide)


def distance(output: Tensor, exact: Tensor) -> float:
    """Relative, in the 2-norm."""
    return ((output.double() - exact.double()).norm() / exact.double().norm()).item()


def prepare(variant: Variant, stock: nn.Module, batch: Batch) -> tuple[nn.Module, dict[str, Any]]:
    """The variant of ``stock``, warm, and what is known of it before it is timed."""
    twin, quantize_s = models.twin(stock), None
    if variant.quantize is not None:
        start = time.perf_counter()
        variant.quantize(twin)
        quantize_s = round(time.perf_counter() - start, 2)
    exact = in_fp32(twin, batch)
    start = time.perf_counter()
    model = twin if variant.optimize is None else variant.optimize(twin)
    output = encode(model, batch)
    middle = time.perf_counter()
    encode(model, batch)
    again = time.perf_counter() - middle
    return model, {
        "compile_s": round(max(0.0, middle - start - again), 2),
        "quantize_s": quantize_s,
        "weights_gb": round(sum(measure.storages(twin).values()) / 1e9, 4),
        "distance": distance(output, exact),
        "fused": report_of(twin).summary if "_tinyfuse" in vars(twin) else None,
    }


def interleave(
    prepared: dict[str, nn.Module], batches: list[Batch], step: Callable[[str], None]
) -> dict[str, list[float]]:
    """Milliseconds per call, one entry per batch, in rotating order."""
    times: dict[str, list[float]] = {name: [] for name in prepared}
    for repeat, batch in enumerate(batches):
        for name in measure.order(list(prepared), repeat):
            step(f"timing {name}")
            calls, start = 0, time.perf_counter()
            while calls == 0 or time.perf_counter() - start < SECONDS:
                encode(prepared[name], batch)
                calls += 1
            times[name].append(1e3 * (time.perf_counter() - start) / calls)
    return times
