"""What a first call takes: trace, rewrite, compile kernels, capture CUDA graphs.

    PYTHONPATH=. python3 benchmarks/first_call.py [--preset NAME] [--repeats 1] [--out DIR]

Random weights in int8, batch 1, prompt 128, 128 new tokens. Each time is of a process of its own that has imported
tinyfuse and loaded the model: ``optimize`` with its quantisation, the first ``generate``, and what it takes longer than
the next one, which is the first call. Cold: nothing on disk; warm: the process after it, with the kernels on disk.
Appends to first-call-<gpu>.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import tinyfuse
from tinyfuse.bench import models
from tinyfuse.bench.environment import append, environment

PROMPT = GEN = 128
CACHES = ("TRITON_CACHE_DIR", "TINYFUSE_CACHE")


def measured(preset: str) -> dict[str, float]:
    """Seconds in this process."""
    device = torch.device("cuda")
    loaded = models.load(None, preset, torch.bfloat16, device)
    (prompt,) = models.prompts(loaded, 1, PROMPT, 1, 0)
    marks = [time.perf_counter()]
    tinyfuse.optimize(loaded.model, quantize="int8")
    torch.cuda.synchronize()
    marks.append(time.perf_counter())
    for _ in range(2):
        loaded.model.generate(prompt, max_new_tokens=GEN, min_new_tokens=GEN, do_sample=False)
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
    optimize, first, again = (end - start for start, end in itertools.pairwise(marks))
    return {"optimize_s": optimize, "generate_s": first, "again_s": again, "first_call_s": first - again}


def in_its_own_process(preset: str, caches: str) -> dict[str, float]:
    env = os.environ | {name: str(Path(caches, name)) for name in CACHES} | {"TINYFUSE_FALLBACK": "error"}
    command = [sys.executable, __file__, "--preset", preset, "--in-this-process"]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-2-7b")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--in-this-process", action="store_true", help="measure once and print JSON")
    options = parser.parse_args()
    if options.in_this_process:
        print(json.dumps(measured(options.preset)))
        return
    record = {"preset": options.preset, "environment": environment("cuda"), "cold": [], "warm": []}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as caches:
            for kind in ("cold", "warm"):
                seconds = in_its_own_process(options.preset, caches)
                record[kind].append(seconds)
                print(kind, {name: round(value, 2) for name, value in seconds.items()}, flush=True)
    append(options.out, "first-call", record)


if __name__ == "__main__":
    main()
