"""``generate`` of encoder-decoders: milliseconds to the first token and per token, against stock in the same run.

    PYTHONPATH=. python3 benchmarks/encoder_decoder.py [CASE ...] [--device cuda] [--repeats 5] [--out DIR]

Random weights in bf16, batch 1, greedy, 128 new tokens; the median of interleaved repeats. ``stock`` is ``generate`` as
it is; ``stock-static`` the same with ``cache_implementation="static"``, which transformers compiles with Inductor and
CUDA graphs. Appends to encoder-decoder-<gpu or cpu>.json.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, T5Config, WhisperConfig

import tinyfuse
from tinyfuse.bench import measure, models
from tinyfuse.bench.environment import append, environment

GEN = 128
WARM_UPS = 3  # the third call of a kind is recorded
T5_SMALL = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32128}
TOKENS = {"decoder_start_token_id": 1, "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": None}
CASES = ("whisper-tiny", "whisper-base", "t5-small")


def load(case: str, device: torch.device, count: int) -> tuple[nn.Module, list[Tensor]]:
    """A model with random weights and ``count`` inputs for it: 30 seconds of sound, or 128 tokens."""
    torch.manual_seed(0)
    if case == "t5-small":
        model = AutoModelForSeq2SeqLM.from_config(T5Config(**T5_SMALL), dtype=torch.bfloat16)
        inputs = [torch.randint(2, T5_SMALL["vocab_size"], (1, 128), device=device) for _ in range(count)]
    else:
        _, sizes = models.ENCODERS[case]
        model = AutoModelForSpeechSeq2Seq.from_config(WhisperConfig(**sizes), dtype=torch.bfloat16)
        inputs = [torch.randn(1, 80, 3000, device=device, dtype=torch.bfloat16) for _ in range(count)]
        model.generation_config.update(suppress_tokens=None, begin_suppress_tokens=None, forced_decoder_ids=None)
    model.generation_config.update(**TOKENS)
    return model.to(device).eval(), inputs


def generating(model: nn.Module, **more: Any) -> measure.Run:
    def run(given: Tensor, n: int) -> Tensor:
        return model.generate(given, max_new_tokens=n, min_new_tokens=n, do_sample=False, **more).cpu()

    return run


def measured(case: str, device: torch.device, repeats: int) -> dict[str, Any]:
    model, inputs = load(case, device, WARM_UPS + repeats)
    fast = tinyfuse.optimize(copy.deepcopy(model))
    runs = {
        "stock": generating(model),
        "stock-static": generating(copy.deepcopy(model), cache_implementation="static"),
        "tinyfuse": generating(fast),
    }
    first_call = {}
    for name, run in runs.items():
        began = time.perf_counter()
        for given in inputs[:WARM_UPS]:
            run(given, 1)
            run(given, GEN)
        first_call[name] = time.perf_counter() - began
    samples = measure.interleave(runs, inputs[WARM_UPS:], GEN)
    rows = {}
    for name, sample in samples.items():
        once = measure.median(sample.first) + measure.median(sample.full)
        rows[name] = {
            "ttft_ms": round(measure.median(sample.ttft()), 2), "tpot_ms": round(measure.median(sample.tpot(GEN)), 3),
            "values": sample.tpot(GEN), "first_call_s": round(first_call[name] - WARM_UPS * once, 2),
        }  # fmt: skip
    return {"case": case, "gen": GEN, "rows": rows, "fallbacks": fast._tinyfuse.fallbacks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="all by default")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    device = torch.device(options.device)
    block = environment(device)
    for case in options.cases or CASES:
        record = {"environment": block, **measured(case, device, options.repeats)}
        for variant, row in record["rows"].items():
            print(f"{case:14} {variant:14} first token {row['ttft_ms']:8.2f} ms, {row['tpot_ms']:7.3f} ms a token")
        append(options.out, "encoder-decoder", record)


if __name__ == "__main__":
    main()
