"""Every causal type against stock transformers, and what of it is fused.

    python -m tests.zoo [TYPE ...] [--checks generate,int8,forward] [--jobs 2] [--json FILE]

A line per type: ok, or what differed, or why stock itself does not run it; then the sites fused of those found, summed
over the types that run, and the reasons for the others. Exit status 1 if anything differed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tests.zoo.build import TYPES
from tests.zoo.check import CHECKS, Result, run


def results(types: list[str], names: list[str], jobs: int) -> Iterator[tuple[Result, float]]:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, model_type, names) for model_type in types]):
            yield future.result()


def line(result: Result, seconds: float) -> str:
    state = "WRONG" if result.wrong else "stock fails" if result.stock else "ok"
    kinds = sorted({kind for kind, _ in result.sites})
    sites = " ".join(f"{kind} {result.sites[kind, 'fused']}/{result.sites[kind, 'found']}" for kind in kinds)
    noted = [f"{name}: {text}" for name, text in (result.wrong | result.stock).items()]
    return " | ".join([f"{state:11} {result.model_type:26} {seconds:5.1f} s", sites, *noted, *result.fallbacks])


def summary(made: list[Result]) -> str:
    sites, reasons = Counter(), Counter()
    for result in made:
        sites += result.sites
        reasons += result.reasons
    kinds = sorted({kind for kind, _ in sites})
    lines = [f"{sum(not r.wrong and not r.stock for r in made)} of {len(made)} types equal stock"]
    for kind in kinds:
        found, fused = sites[kind, "found"], sites[kind, "fused"]
        lines.append(f"  {kind}: {fused} of {found} sites fused, {fused / found:.1%}")
    lines += [f"  {count} {kind}: {reason}" for (kind, reason), count in reasons.most_common(15)]
    return "\n".join(lines)


def as_json(result: Result) -> dict:
    fields = dict(vars(result))
    for name in ("sites", "reasons"):
        fields[name] = {" | ".join(key): count for key, count in sorted(fields[name].items())}
    return fields


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="all by default")
    parser.add_argument("--checks", default=",".join(CHECKS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    made = []
    for result, seconds in results(options.types or TYPES, options.checks.split(","), options.jobs):
        made.append(result)
        print(line(result, seconds), flush=True)
    print(summary(made))
    if options.json:
        made.sort(key=lambda result: result.model_type)
        options.json.write_text(json.dumps([as_json(result) for result in made], indent=1) + "\n")
    return int(any(result.wrong for result in made))


if __name__ == "__main__":
    sys.exit(main())
