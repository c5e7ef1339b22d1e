"""The command line: ``tinyfuse bench | explain | quantize | doctor``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tinyfuse
from tinyfuse.bench import ENCODERS, PRESETS, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 done but something is wrong, 2 a request it cannot serve."""
    arguments = _parser().parse_args(argv)
    _quiet()
    try:
        return arguments.command(arguments)
    except UsageError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch is not imported for a command that never got that far
            raise
        return _fail("out of GPU memory: give a smaller model, --batch or --prompt")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SystemExit(_fail(f"{message} (see {self.prog} --help)"))


def _fail(message: str) -> int:
    print(f"tinyfuse: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tinyfuse", description="Unmodified Hugging Face models at the speed of the hardware.")
    parser.add_argument("--version", action="version", version=f"tinyfuse {tinyfuse.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    bench = _command(commands, "bench", _bench, "time stock variants and tinyfuse side by side")
    _add_model(bench)
    tasks = f"generate tokens, or encode: an encoder's forward (presets {ENCODERS})"
    bench.add_argument("--task", choices=("generate", "encode"), default="generate", help=tasks)
    bench.add_argument("--batch", type=_count, default=1, help="prompts at once (default 1)")
    bench.add_argument("--prompt", type=_count, help="tokens (default 64 on the CPU, 128 on a GPU or to encode)")
    bench.add_argument("--gen", type=_at_least(2), help="tokens to generate (default 32 on the CPU, 128 on a GPU)")
    bench.add_argument("--repeats", type=_count, default=5, help="timed repeats, each with its own prompt (default 5)")
    bench.add_argument("--variants", help="comma-separated list (default: all that run here but tinyfuse-int8-tied)")

    explain = _command(commands, "explain", _explain, "say what is fused in a model, what is not, and why")
    _add_model(explain)
    explain.add_argument("--prompt", type=_count, default=16, help="prompt tokens (default 16)")

    quantize = _command(commands, "quantize", _quantize, "write an int8 copy of a model")
    quantize.add_argument("model", metavar="MODEL", help="a folder, a .gguf file or a Hub id")
    quantize.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    quantize.add_argument("--tied-heads", action="store_true", help="also a head and the embedding it is tied to")
    _add_place(quantize)

    _command(commands, "doctor", _doctor, "check this machine and the installation")
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(command=run)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder, a .gguf file or a Hub id (default: a demo)"
    )
    parser.add_argument("--preset", help=f"random weights of a published shape instead: {PRESETS}")
    parser.add_argument("--seed", type=int, default=0, help="for random weights and prompts (default 0)")
    _add_place(parser)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} up, not {text!r}")
        return int(text)

    return parse


_count = _at_least(1)


def _quiet() -> None:
    """Only the commands speak: no progress bars, warnings or logs of the libraries underneath."""
    os.environ["TQDM_DISABLE"] = "1"  # the GGUF reader's bar obeys nothing else
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")


def _torch_device(name: str | None) -> str:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)  # after the import, which sets its own level
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA GPU is visible to PyTorch: use --device cpu, or see `tinyfuse doctor`")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _bench(arguments: argparse.Namespace) -> int:
    from tinyfuse.bench import encode, run, table

    _check_json(arguments.json)
    device = _torch_device(arguments.device)
    encodes = arguments.task == "encode"
    settings = run.Settings(
        model=arguments.model,
        preset=arguments.preset,
        batch=arguments.batch,
        prompt=arguments.prompt or (64 if device == "cpu" and not encodes else 128),
        gen=arguments.gen or (32 if device == "cpu" else 128),
        dtype=arguments.dtype,
        device=device,
        repeats=arguments.repeats,
        variants=arguments.variants,
        seed=arguments.seed,
    )
    with _Progress() as progress:
        result = (encode if encodes else run).bench(settings, progress.step)
    (table.show_encoders if encodes else table.show)(result, _console())
    _write_json(arguments.json, result)
    return 1 if any("error" in row or row.get("agrees") is False for row in result["rows"]) else 0


def _explain(arguments: argparse.Namespace) -> int:
    import torch

    from tinyfuse.bench import models
    from tinyfuse.report import explain

    _check_json(arguments.json)
    device = torch.device(_torch_device(arguments.device))
    with _Progress() as progress:
        progress.step("loading the model", 2)
        loaded = models.load(arguments.model, arguments.preset, models.DTYPES[arguments.dtype], device, arguments.seed)
        progress.step("tracing it", 2)
        ids = torch.arange(arguments.prompt, device=device).expand(1, -1)
        report = explain(loaded.model, input_ids=ids % loaded.model.config.get_text_config().vocab_size)
    print(report)
    _write_json(arguments.json, report.to_dict())
    return 0


def _quantize(arguments: argparse.Namespace) -> int:
    import torch

    from tinyfuse.bench import models
    from tinyfuse.quantize import quantize_

    _check_json(arguments.json)
    out = arguments.out
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out} exists already: give a new or empty folder as OUT")
    device = torch.device(_torch_device(arguments.device))
    with _Progress() as progress:
        progress.step("loading the model", 3)
        loaded = models.load(arguments.model, None, models.DTYPES[arguments.dtype], device)
        progress.step("quantising it", 3)
        report = quantize_(loaded.model, "int8", tied_heads=arguments.tied_heads)
        progress.step("writing it", 3)
        loaded.model.save_pretrained(out)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(out)
    print(report)
    print(f"written to {out}")
    _write_json(arguments.json, report.to_dict())
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from tinyfuse.bench.environment import environment
    from tinyfuse.doctor import checks

    _check_json(arguments.json)
    console, results = _console(), checks()
    marks = {"ok": "[green]ok[/green]     ", "warning": "[yellow]warning[/yellow]", "problem": "[red]problem[/red]"}
    for check in results:
        console.print(f"{marks[check.status]} {check.name}: {check.found}", highlight=False)
        if check.fix:
            console.print(f"        {check.fix}", highlight=False, markup=False)
    _write_json(arguments.json, {"environment": environment(), "checks": [vars(check) for check in results]})
    return 1 if any(check.status == "problem" for check in results) else 0


def _console():
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)


class _Progress:
    """A bar on stderr where that is a terminal, gone when the work is done; elsewhere a line for each step
    after the first, which is when a bad request shows."""

    def __enter__(self) -> _Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("starting", total=None, completed=-1)
        self.bar.start()
        self.began, self.text = time.monotonic(), ""
        return self

    def step(self, text: str, total: int) -> None:
        self.bar.update(self.task, description=text, total=total, advance=1)
        if self.bar.disable and self.text not in ("", text):
            print(f"{time.monotonic() - self.began:6.1f} s  {text}", file=sys.stderr, flush=True)
        self.text = text

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()


def _check_json(path: Path | None) -> None:
    """Before the work, not after it."""
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"--json {path}: there is no folder {path.parent}; create it first")


def _write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
