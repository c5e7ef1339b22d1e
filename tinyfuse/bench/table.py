"""The result of a run, for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from tinyfuse.bench.quality import WINDOW, WINDOWS

TEXT = 200  # characters of generated text shown per variant
HEADS = (
    "first token ms", "ms per token", "decode tok/s", "prefill tok/s", "vs eager", "vs best stock", "of read bw",
    "weights GB", "peak GB", "compile s", "quantise s",
)  # fmt: skip
ENCODER_HEADS = (
    "ms per batch", "sequences/s", "vs eager", "vs best stock", "off fp32", "weights GB", "compile s", "quantise s",
)  # fmt: skip

Row = dict[str, Any]


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table, then what the numbers rest on: texts, quality, failures and warnings."""
    rows, block, first = result["rows"], result["environment"], result["rows"][0]
    title = f"{first['model']} · {first['dtype']} · {block['gpu'] or block['cpu']}"
    caption = f"batch {first['batch']}, prompt {first['prompt_len']}, {first['gen_len']} tokens generated"
    console.print(_table(rows, title, caption, HEADS, _cells), Group(*_lines(rows, block)), sep="\n")


def show_encoders(result: dict[str, Any], console: Console) -> None:
    """Print a table per encoder, then what was fused, failures and warnings."""
    rows, block = result["rows"], result["environment"]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        title = f"{model} encoder · {mine[0]['dtype']} · {block['gpu'] or block['cpu']}"
        lines = _overlap(mine) + _failures(mine) + _fused(mine)
        table = _table(mine, title, f"input {mine[0]['input']}", ENCODER_HEADS, _encoder_cells)
        console.print(table, Group(*lines), sep="\n")
    for line in (f"{block['threads']} threads", *_warnings(block)):
        console.print(line)


def _table(
    rows: list[Row], title: str, caption: str, heads: tuple[str, ...], cells: Callable[[Row], list[str]]
) -> Table:
    caption += "; median (smallest-largest) of interleaved repeats"
    table = Table(title=escape(title), caption=escape(caption), expand=False)
    table.add_column("variant", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap="ms" in head.split())
    failed = ["failed"] + ["-"] * (len(heads) - 1)
    for row in rows:
        table.add_row(row["variant"], *(failed if "error" in row else cells(row)))
    return table


def _cells(row: Row) -> list[str]:
    return [
        _spread(row, "ttft_ms"),
        _spread(row, "tpot_ms"),
        f"{row['decode_tok_s']:.1f}",
        f"{row['prefill_tok_s']:.0f}",
        *_speedups(row),
        f"{row['mbu']:.0%}",
        f"{row['weights_gb']:.2f}",
        _number(row["peak_mem_gb"], "{:.2f}"),
        f"{row['compile_s']:.1f}",
        _number(row["quantize_s"], "{:.1f}"),
    ]


def _encoder_cells(row: Row) -> list[str]:
    return [
        _spread(row, "batch_ms"),
        f"{row['sequences_s']:.1f}",
        *_speedups(row),
        f"{row['distance']:.1e}" + ("" if row["agrees"] else " (too far)"),
        f"{row['weights_gb']:.3f}",
        f"{row['compile_s']:.1f}",
        _number(row["quantize_s"], "{:.1f}"),
    ]


def _speedups(row: Row) -> list[str]:
    vague = "~" if _overlaps(row) else ""
    return [_number(row["speedup_vs_eager"], "{:.2f}"), vague + _number(row["speedup_vs_best_stock"], "{:.2f}")]


def _overlaps(row: Row) -> bool:
    return row.get("differs_from_best_stock") is False and row["speedup_vs_best_stock"] != 1


def _overlap(rows: list[Row]) -> list[str]:
    said = "~ the repeats overlap with the best stock variant's: no difference shown"
    return [said] if any(map(_overlaps, rows)) else []


def _failures(rows: list[Row]) -> list[str]:
    return [f"[red]{row['variant']} failed[/red]: {escape(row['error'])}" for row in rows if "error" in row]


def _fused(rows: list[Row]) -> list[str]:
    def counts(row: Row) -> str:
        return ", ".join(f"{kind} {n['fused']} of {n['found']}" for kind, n in row["fused"].items())

    return [f"{row['variant']} fused: {counts(row)}" for row in rows if row.get("fused")]


def _warnings(block: dict[str, Any]) -> list[str]:
    return [f"[yellow]warning[/yellow]: {escape(message)}" for message in dict.fromkeys(block["warnings"])]


def _lines(rows: list[Row], block: dict[str, Any]) -> list[str]:
    lines = _overlap(rows)
    lines.append(
        f"load {_load(rows)}; reads measured at {block['read_bandwidth_gb_s']:.0f} GB/s, {block['threads']} threads"
    )
    lines += _failures(rows)
    for row in rows:
        if row.get("text") is not None:
            lines.append(f"[bold]{row['variant']}[/bold]{_same(row)}: {escape(_one_line(row['text']))}")
        elif row.get("same_text") is not None:
            lines.append(f"[bold]{row['variant']}[/bold]{_same(row)}")
    judged = [row for row in rows if row.get("kl") is not None]
    if judged:
        lines.append(f"quality over {WINDOWS} windows of {WINDOW} tokens, teacher-forced, against stock-eager:")
    for row in judged:
        ppl = "" if row["ppl"] is None else f"perplexity {row['ppl']:.3f}, "
        lines.append(f"  {row['variant']}: {ppl}mean KL {row['kl']:.2e} nats, same top token {row['top1']:.2%}")
    return lines + _fused(rows) + _warnings(block)


def _load(rows: list[Row]) -> str:
    return next((f"{row['load_s']:.1f} s" for row in rows if "load_s" in row), "-")


def _same(row: Row) -> str:
    if row["variant"] == "stock-eager" or row["same_text"] is None:
        return ""
    count = len(row["values"]["tpot_ms"])
    return f" (stock-eager's tokens on {round(row['same_text'] * count)} of {count} prompts)"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT else line[:TEXT] + "…"


def _spread(row: Row, time: str) -> str:
    middle, values = row[time], row["values"][time]
    digits = 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
