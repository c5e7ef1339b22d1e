"""The result of a run, for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from tinyfuse.bench.quality import WINDOW, WINDOWS

TEXT = 200  # characters of generated text shown per variant


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table, then what the numbers rest on: texts, quality, failures and warnings."""
    rows, block = result["rows"], result["environment"]
    console.print(_table(rows, block), _lines(rows, block), sep="\n")


def _table(rows: list[dict[str, Any]], block: dict[str, Any]) -> Table:
    first = rows[0]
    title = f"{first['model']} · {first['dtype']} · {block['gpu'] or block['cpu']}"
    caption = f"batch {first['batch']}, prompt {first['prompt_len']}, {first['gen_len']} tokens generated; median"
    table = Table(title=escape(title), caption=caption + " (smallest-largest) of interleaved repeats", expand=False)
    table.add_column("variant", no_wrap=True)
    heads = ("first token ms", "ms per token", "decode tok/s", "prefill tok/s", "vs eager", "vs best stock")
    for head in (*heads, "of read bw", "weights GB", "peak GB", "compile s", "quantise s"):
        table.add_column(head, justify="right", no_wrap=head.endswith("ms") or head.startswith("ms"))
    for row in rows:
        table.add_row(row["variant"], *(_failed() if "error" in row else _cells(row)))
    return table


def show_encoders(result: dict[str, Any], console: Console) -> None:
    """Print a table per encoder, then what was fused, failures and warnings."""
    rows, block = result["rows"], result["environment"]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        console.print(_encoder_table(mine, block), Group(*_encoder_lines(mine)), sep="\n")
    console.print(f"{block['threads']} threads")
    for message in dict.fromkeys(block["warnings"]):
        console.print(f"[yellow]warning[/yellow]: {escape(message)}")


def _encoder_table(rows: list[dict[str, Any]], block: dict[str, Any]) -> Table:
    first = rows[0]
    title = f"{first['model']} encoder · {first['dtype']} · {block['gpu'] or block['cpu']}"
    caption = f"input {first['input']}; median (smallest-largest) of interleaved repeats"
    table = Table(title=escape(title), caption=escape(caption), expand=False)
    table.add_column("variant", no_wrap=True)
    heads = ("ms per batch", "sequences/s", "vs eager", "vs best stock", "off fp32", "weights GB", "compile s")
    for head in (*heads, "quantise s"):
        table.add_column(head, justify="right", no_wrap=head.startswith("ms"))
    for row in rows:
        table.add_row(row["variant"], *(["failed"] + ["-"] * 7 if "error" in row else _encoder_cells(row)))
    return table


def _encoder_cells(row: dict[str, Any]) -> list[str]:
    vague = "~" if row["differs_from_best_stock"] is False and row["speedup_vs_best_stock"] != 1 else ""
    return [
        _spread(row["batch_ms"], row["values"]["batch_ms"]),
        f"{row['sequences_s']:.1f}",
        _number(row["speedup_vs_eager"], "{:.2f}"),
        vague + _number(row["speedup_vs_best_stock"], "{:.2f}"),
        f"{row['distance']:.1e}" + ("" if row["agrees"] else " (too far)"),
        f"{row['weights_gb']:.3f}",
        f"{row['compile_s']:.1f}",
        _number(row["quantize_s"], "{:.1f}"),
    ]


def _encoder_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"[red]{row['variant']} failed[/red]: {escape(row['error'])}" for row in rows if "error" in row]
    lines += [f"{row['variant']} fused: {_fused(row)}" for row in rows if row.get("fused")]
    if any(row.get("differs_from_best_stock") is False and row["speedup_vs_best_stock"] != 1 for row in rows):
        lines.insert(0, "~ the repeats overlap with the best stock variant's: no difference shown")
    return lines


def _fused(row: dict[str, Any]) -> str:
    return ", ".join(f"{kind} {n['fused']} of {n['found']}" for kind, n in row["fused"].items())


def _failed() -> list[str]:
    return ["failed"] + ["-"] * 10


def _cells(row: dict[str, Any]) -> list[str]:
    values = row["values"]
    vague = "~" if row["differs_from_best_stock"] is False and row["speedup_vs_best_stock"] != 1 else ""
    return [
        _spread(row["ttft_ms"], values["ttft_ms"]),
        _spread(row["tpot_ms"], values["tpot_ms"]),
        f"{row['decode_tok_s']:.1f}",
        f"{row['prefill_tok_s']:.0f}",
        _number(row["speedup_vs_eager"], "{:.2f}"),
        vague + _number(row["speedup_vs_best_stock"], "{:.2f}"),
        f"{row['mbu']:.0%}",
        f"{row['weights_gb']:.2f}",
        _number(row["peak_mem_gb"], "{:.2f}"),
        f"{row['compile_s']:.1f}",
        _number(row["quantize_s"], "{:.1f}"),
    ]


def _lines(rows: list[dict[str, Any]], block: dict[str, Any]) -> Group:
    lines = []
    if any(row.get("differs_from_best_stock") is False and row["speedup_vs_best_stock"] != 1 for row in rows):
        lines.append("~ the repeats overlap with the best stock variant's: no difference shown")
    lines.append(
        f"load {_load(rows)}; reads measured at {block['read_bandwidth_gb_s']:.0f} GB/s, {block['threads']} threads"
    )
    for row in rows:
        if "error" in row:
            lines.append(f"[red]{row['variant']} failed[/red]: {escape(row['error'])}")
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
    for row in rows:
        if row.get("fused"):
            lines.append(f"{row['variant']} fused: {_fused(row)}")
    lines += [f"[yellow]warning[/yellow]: {escape(message)}" for message in dict.fromkeys(block["warnings"])]
    return Group(*lines)


def _load(rows: list[dict[str, Any]]) -> str:
    return next((f"{row['load_s']:.1f} s" for row in rows if "load_s" in row), "-")


def _same(row: dict[str, Any]) -> str:
    if row["variant"] == "stock-eager" or row["same_text"] is None:
        return ""
    count = len(row["values"]["tpot_ms"])
    return f" (stock-eager's tokens on {round(row['same_text'] * count)} of {count} prompts)"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT else line[:TEXT] + "…"


def _spread(middle: float, values: list[float]) -> str:
    digits = 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
