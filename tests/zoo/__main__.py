"""Every causal type, and the encoders of ``encoders.py``, against stock transformers, and what of them is fused.

    python -m tests.zoo [causal|encoders|TYPE ...] [--checks generate,int8,forward,bfloat16] [--jobs 2] [--json FILE]
        [--device cuda] [--replays] [--write]

A line per type: ok, or what differed, or why stock itself does not run it; its graphs, and the reasons for which Dynamo
cut a forward into several; then the sites fused of those found, summed over the types that run, and the reasons for the
others. Exit status 1 if anything differed, or, where all checks run, if fewer sites of a type are fused than in
tests/golden/zoo.json or encoders.json; on another version of transformers and on a GPU, if a smaller share. ``--write``
writes those files, docs/models.md and docs/encoders.md anew, for whichever group ran as a whole; on an older version
docs/models-oldest.md and encoders-oldest.md, on a GPU models-gpu.md and encoders-gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from packaging.version import Version

from tests.zoo.build import TYPES
from tests.zoo.check import CHECKS, run
from tests.zoo.encoders import NAMES
from tests.zoo.results import Result

ROOT = Path(__file__).parents[2]
HEAD = """# Models

Every causal language model of transformers {transformers} as a tiny random model in fp32, torch {torch} on {device}:
logits through `torch.compile(model, backend="tinyfuse")`, greedy tokens through `tinyfuse.optimize`, both with and
without padding, int8 against the quantised model run plainly, and `restore` to the bit. Loaded in bf16, its logits err
by at most 1.5 times what stock's err: those of all tokens, of a model that chooses (experts, keys) those of the median
token. Numbers are sites fused of those found in the graphs of both `forward`s and of `generate`; breaks are the reasons
for which Dynamo cut a `forward` into several graphs. Made by `python -m tests.zoo --write`.
"""
ENCODERS = """# Encoders and encoder-decoders

Tiny random models of transformers {transformers}, torch {torch} on {device}, with the class that each is built
with (`bert:MaskedLM` by `AutoModelForMaskedLM`): every output in fp32 through
`torch.compile(model, backend="tinyfuse")` and through `tinyfuse.optimize`, with and without padding, and in bf16 no
further from fp32 than 1.5 times stock; int8 against the quantised model run plainly; `generate`, greedy and with beams;
`restore` to the bit. Numbers are sites fused of those found in all of these graphs; breaks are the reasons for which
Dynamo cut a `forward` into several graphs. Made by `python -m tests.zoo encoders --write`.

`generate` of an encoder-decoder is transformers' own loop; the encoder and each step of the decoder are compiled, at
most three graphs for all lengths. DeBERTa v1 reads a size from a tensor between the products of its attention: Dynamo
breaks the graph there, so that no graph holds a whole attention.
"""
TEXT = """
{fine} of {all} types equal stock. Beside the others stands what stock itself raises.

{totals}

{reasons}

{types}
"""
LEFT_OUT = "Not listed are types that equal stock, with no smaller share fused than by the newest version on a CPU.\n\n"
GROUPS = {
    "causal": ("zoo.json", "models.md", HEAD, TYPES),
    "encoders": ("encoders.json", "encoders.md", ENCODERS, NAMES),
}
ANCHORS = ("linear", "rms_norm", "layer_norm", "attention", "rope", "activation")


def results(
    types: list[str], names: list[str], jobs: int, device: str, replays: bool
) -> Iterator[tuple[Result, float]]:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        submitted = [pool.submit(run, model_type, names, device, replays) for model_type in longest_first(types)]
        for future in as_completed(submitted):
            yield future.result()


def longest_first(types: list[str]) -> list[str]:
    """By the sites they had; new ones, of which nothing is known, before all: one that takes minutes ends last."""
    known: dict[str, int] = {}
    for golden, *_ in GROUPS.values():
        for model_type, kinds in held(golden)["types"].items():
            known[model_type] = sum(found for _, found in kinds.values())
    return sorted(types, key=lambda model_type: -known.get(model_type, sys.maxsize))


def held(golden: str) -> dict:
    """A file of golden counts."""
    path = ROOT / "tests" / "golden" / golden
    return json.loads(path.read_text()) if path.exists() else {"transformers": "0", "types": {}}


def line(result: Result, seconds: float) -> str:
    state = "WRONG" if result.wrong else "stock fails" if result.stock else "ok"
    kinds = sorted({kind for kind, _ in result.sites})
    sites = " ".join(f"{kind} {result.sites[kind, 'fused']}/{result.sites[kind, 'found']}" for kind in kinds)
    noted = [f"{name}: {text}" for name, text in (result.wrong | result.stock).items()]
    cut = f"graphs {result.graphs} breaks {len(result.breaks)}"
    return " | ".join([f"{state:11} {result.model_type:26} {seconds:5.1f} s", cut, sites, *noted, *result.fallbacks])


def totals(made: list[Result]) -> tuple[Counter, Counter, Counter]:
    """The sites of all types, those in bf16, and the reasons."""
    sites, narrow, reasons = Counter(), Counter(), Counter()
    for result in made:
        sites += result.sites
        narrow += result.narrow
        reasons += result.reasons
    return sites, narrow, reasons


def share(sites: Counter, kind: str) -> str:
    found, fused = sites[kind, "found"], sites[kind, "fused"]
    return f"{fused} of {found} ({fused / found:.1%})" if found else ""


def summary(made: list[Result]) -> str:
    sites, narrow, reasons = totals(made)
    kinds = sorted({kind for kind, _ in sites})
    lines = [f"{sum(not r.wrong and not r.stock for r in made)} of {len(made)} types equal stock"]
    for kind in kinds:
        lines.append(f"  {kind}: {share(sites, kind)} sites fused, in bf16 {share(narrow, kind)}")
    lines += [f"  {count} {kind}: {reason}" for (kind, reason), count in reasons.most_common(15)]
    return "\n".join(lines)


def as_json(result: Result) -> dict:
    fields = dict(vars(result))
    for name in ("sites", "narrow", "reasons"):
        fields[name] = {" | ".join(key): count for key, count in sorted(fields[name].items())}
    return fields


def counts(result: Result) -> dict[str, list[int]]:
    """Sites of each anchor, [fused, found]."""
    kinds = sorted({kind for kind, _ in result.sites})
    return {kind: [result.sites[kind, "fused"], result.sites[kind, "found"]] for kind in kinds}


def dropped(result: Result, golden: dict, same: bool) -> list[str]:
    """The kinds of sites of which fewer are fused than were; where the graphs are not the ``same``, a smaller share."""
    lost, now = [], counts(result)
    for kind, (fused, found) in golden["types"].get(result.model_type, {}).items():
        now_fused, now_found = now.get(kind, [0, 0])
        if now_fused < fused if same else now_fused * found < fused * now_found:
            lost.append(f"{result.model_type}: {kind} {now_fused} of {now_found} fused, not {fused} of {found}")
    return lost


def page(head: str, made: list[Result], listed: Collection[str], device: str) -> str:
    """docs/models.md, or encoders.md, with the types ``listed`` in its table."""
    sites, narrow, reasons = totals(made)
    kinds = [kind for kind in ANCHORS if sites[kind, "found"]]
    shares = [[name, *(share(of, kind) for kind in kinds)] for name, of in (("all", sites), ("in bf16", narrow))]
    rows = []
    for result in (result for result in made if result.model_type in listed):
        noted = "; ".join(f"{name}: {text}" for name, text in (result.wrong | result.stock).items()).replace("|", " ")
        state = f"**wrong**: {noted}" if result.wrong else f"stock: {noted}" if result.stock else "equal"
        found = counts(result)
        cut = [str(result.graphs), str(len(result.breaks) or "")] if result.graphs else ["", ""]
        rows.append([result.model_type, state, *cut, *("/".join(map(str, found.get(kind, ""))) for kind in kinds)])
    return (head + TEXT).format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        device="a CPU" if device == "cpu" else torch.cuda.get_device_name(),
        fine=sum(not r.wrong and not r.stock for r in made),
        all=len(made),
        totals=table(["", *kinds], shares),
        reasons=most_frequent(reasons),
        types=(LEFT_OUT if len(rows) < len(made) else "") + table(["type", "result", "graphs", "breaks", *kinds], rows),
    )


def most_frequent(reasons: Counter) -> str:
    if not reasons:
        return "No site that was found is left as it was."
    lines = [f"- {count} {kind}: {reason}" for (kind, reason), count in reasons.most_common(10)]
    return "\n".join(["The ten most frequent reasons why a site is left as it was:", "", *lines])


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def golden_text(made: list[Result]) -> str:
    types = ",\n".join(f"  {json.dumps(r.model_type)}: {json.dumps(counts(r))}" for r in made)
    return f'{{"transformers": "{transformers.__version__}", "types": {{\n{types}\n}}}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="all by default")
    parser.add_argument("--checks", default=",".join(CHECKS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--replays", action="store_true", help="on a CPU as on a GPU: graphs replayed on their buffers")
    parser.add_argument("--write", action="store_true", help="golden counts and pages of whole groups anew")
    options = parser.parse_args()
    wanted = [name for given in options.types or GROUPS for name in (GROUPS[given][3] if given in GROUPS else [given])]
    made = []
    names = options.checks.split(",")
    for result, seconds in results(wanted, names, options.jobs, options.device, options.replays):
        made.append(result)
        print(line(result, seconds), flush=True)
    made.sort(key=lambda result: result.model_type)
    whole, lost = options.checks == ",".join(CHECKS), []
    for golden, text, head, types in GROUPS.values():
        mine = [result for result in made if result.model_type in types]
        if not mine:
            continue
        print(summary(mine))
        before = held(golden)
        same = transformers.__version__ == before["transformers"] and options.device == "cpu"
        fewer = {result.model_type: dropped(result, before, same) for result in mine if whole}
        lost += [line for lines in fewer.values() for line in lines]
        if not (options.write and whole and len(mine) == len(types)):
            continue
        older = Version(transformers.__version__) < Version(before["transformers"])
        kind = "-gpu" if options.device != "cpu" else "-oldest" if older else ""
        apart = [r.model_type for r in mine if r.wrong or r.stock or fewer[r.model_type]]
        page_file = ROOT / "docs" / text
        page_file = page_file.with_stem(page_file.stem + kind)
        page_file.write_text(page(head, mine, apart if kind else types, options.device))
        if not kind:
            (ROOT / "tests" / "golden" / golden).write_text(golden_text(mine))
    print("\n".join(lost))
    if options.json:
        options.json.write_text(json.dumps([as_json(result) for result in made], indent=1) + "\n")
    return int(any(result.wrong for result in made) or bool(lost))


if __name__ == "__main__":
    sys.exit(main())
