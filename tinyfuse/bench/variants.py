"""The ways of running one model that are compared: stock transformers three times, tinyfuse, and int8 rivals."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinyfuse.bench import UsageError


@dataclass(frozen=True)
class Variant:
    """``quantize`` and ``optimize`` change a twin of the model in place (``optimize`` returns the model to use);
    ``arguments`` takes the prompt length and gives what ``generate`` gets on top of the common arguments.
    ``by_default``: it runs without being named."""

    name: str
    quantize: Callable[[nn.Module], Any] | None = None
    optimize: Callable[[nn.Module], nn.Module] | None = None
    arguments: Callable[[int], dict[str, Any]] = lambda prompt: {}
    package: str | None = None
    by_default: bool = True

    @property
    def stock(self) -> bool:
        return self.name.startswith("stock-")

    @property
    def own_forward(self) -> bool:
        """Whether the model's forward differs from stock, so that its quality has to be measured."""
        return self.quantize is not None or self.optimize is not None


def _static(prompt: int) -> dict[str, Any]:
    return {"cache_implementation": "static", "compile_config": _compile_config()}


def _compiled_step(prompt: int) -> dict[str, Any]:
    """Inductor's best for one token at a time: without coordinate descent it picks no fused matrix-vector product."""
    options = {"coordinate_descent_tuning": True, "triton.cudagraphs": torch.cuda.is_available()}
    return {"cache_implementation": "static", "compile_config": _compile_config(mode=None, options=options)}


def _compiled(prompt: int) -> dict[str, Any]:
    """A prefill chunk as long as the prompt makes ``generate`` compile the prefill too."""
    return _compiled_step(prompt) | {"prefill_chunk_size": prompt}


def _compile_config(**settings: Any) -> Any:
    """Static shapes: a run has one prompt length, and Dynamo would make dynamic what another variant had smaller."""
    from transformers import CompileConfig

    config = CompileConfig(dynamic=False, **settings)
    config._compile_all_devices = True  # generate() compiles by itself on a GPU only
    return config


def _torchao(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def _tinyfuse_int8(model: nn.Module, tied_heads: bool = False) -> Any:
    from tinyfuse.quantize import quantize_

    return quantize_(model, "int8", tied_heads=tied_heads)


def _tinyfuse(model: nn.Module) -> nn.Module:
    from tinyfuse.api import optimize

    return optimize(model)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("stock-eager"),
        Variant("stock-static", arguments=_static),
        Variant("stock-compile", arguments=_compiled),
        Variant("tinyfuse", optimize=_tinyfuse),
        Variant("tinyfuse-int8", quantize=_tinyfuse_int8, optimize=_tinyfuse),
        Variant("tinyfuse-int8-tied", partial(_tinyfuse_int8, tied_heads=True), optimize=_tinyfuse, by_default=False),
        # its step alone compiles for 145 s on an H200 (32 layers, torch 2.11)
        Variant("torchao-int8", quantize=_torchao, arguments=_compiled_step, package="torchao"),
    )
}


def choose(names: str | None, table: dict[str, Variant]) -> list[Variant]:
    """The variants of ``table`` named in a comma-separated list; else those ``by_default`` whose package is there."""
    if names is None:
        defaults = [v for v in table.values() if v.by_default]
        return [v for v in defaults if v.package is None or importlib.util.find_spec(v.package)]
    chosen = []
    for name in dict.fromkeys(part.strip() for part in names.split(",")):
        if name not in table:
            raise UsageError(f"unknown variant {name!r}: choose from {', '.join(table)}")
        package = table[name].package
        if package and importlib.util.find_spec(package) is None:
            raise UsageError(f"variant {name} needs {package}: pip install {package}")
        chosen.append(table[name])
    return chosen


def runner(model: nn.Module, arguments: dict[str, Any]) -> Callable[[Tensor, int], Tensor]:
    """``run(ids, n)``: greedily generate exactly ``n`` tokens for ``ids`` [batch, length]; returns them [batch, n]
    once the device is done."""
    pad = model.generation_config.pad_token_id

    def run(ids: Tensor, n: int) -> Tensor:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0 if pad is None else pad,
            **arguments,
        )
        tokens = out[:, ids.shape[1] :].cpu()
        if tokens.shape[1] != n:
            raise RuntimeError(f"generate() gave {tokens.shape[1]} tokens, not {n}")
        return tokens

    return run
