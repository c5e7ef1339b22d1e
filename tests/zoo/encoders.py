"""Encoders and encoder-decoders that people serve, tiny and random, and what is checked of them.

A name is a model type and the class that it is built with: ``bert:MaskedLM`` is what ``AutoModelForMaskedLM`` makes.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any
from zlib import crc32

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.models import prompt, randomise
from tests.tolerance import LOGITS, NARROW_LOGITS, error
from tests.zoo import build
from tests.zoo.results import LENGTH, NEW_TOKENS, PADDING, Result, bits_differ, same, same_compiled, tokens_differ
from tinyfuse.api import optimize, restore
from tinyfuse.quantize import quantize_
from tinyfuse.report import report_of

IMAGE, PATCH, MELS, FRAMES = 32, 8, 8, 60

_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
SIZES = {
    "image_size": IMAGE, "patch_size": PATCH, "num_mel_bins": MELS, "max_source_positions": FRAMES // 2,
    "projection_dim": 24, "eos_token_id": 2,
}  # fmt: skip
FIXES: dict[str, dict[str, Any]] = {
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA | {"position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2},
    "t5": {"decoder_start_token_id": 1},
    "bart": {"decoder_start_token_id": 1, "forced_eos_token_id": None},
    "whisper": {"decoder_start_token_id": 1},
}
NAMES = [
    f"{model_type}:{head}"
    for heads, types in {
        "Model MaskedLM SequenceClassification": "bert roberta distilbert modernbert deberta deberta-v2",
        "Seq2SeqLM": "t5 bart",
        "SpeechSeq2Seq": "whisper",
        "Model ImageClassification": "vit clip siglip",
        "Model": "clip_text_model clip_vision_model siglip_vision_model",
    }.items()
    for model_type in types.split()
    for head in heads.split()
]


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """In evaluation mode; the same name gives the same weights."""
    model_type, head = name.split(":")
    config = build.config(model_type, SIZES, FIXES.get(model_type, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(crc32(name.encode()))
        auto = getattr(transformers, "AutoModel" if head == "Model" else f"AutoModelFor{head}")
        model = auto.from_config(config, dtype=torch.float32)
        randomise(model)
    if model.can_generate():
        settings = dict.fromkeys(("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"))
        model.generation_config.update(**settings, pad_token_id=0)
    return model.to(dtype).eval()


def inputs(model: PreTrainedModel, padding: int, length: int = LENGTH) -> dict[str, Tensor]:
    """What ``forward`` takes, of two rows, the first with ``padding`` masked tokens at its end."""
    parameters = inspect.signature(type(model).forward).parameters
    draw = torch.Generator().manual_seed(length)
    given = prompt(length, batch=2)
    if padding:
        given["attention_mask"][0, -padding:] = 0
    given["input_ids"][:, -1] = 2  # where a text tower looks
    given["decoder_input_ids"] = given["input_ids"][:, :5]
    given["pixel_values"] = torch.randn(2, 3, IMAGE, IMAGE, generator=draw).to(model.dtype)
    given["input_features"] = torch.randn(2, MELS, FRAMES, generator=draw).to(model.dtype)
    if "input_ids" not in parameters:  # a vision model's or a spectrogram's mask has other sizes
        del given["attention_mask"]
    return {name: value.to(model.device) for name, value in given.items() if name in parameters}


@torch.no_grad()
def outputs(model: Any, padding: int) -> list[Tensor]:
    """Every tensor of the result, in the order of its names."""
    stock = getattr(model, "_orig_mod", model)
    return [value for value in model(**inputs(stock, padding)).values() if isinstance(value, Tensor)]


def outputs_differ(expected: list[Tensor], made: list[Tensor]) -> str | None:
    worst = max(error(ours, theirs.double()) for ours, theirs in zip(made, expected, strict=True))
    return None if worst < LOGITS else f"outputs differ by {worst:.2g}"


def same_bits(expected: list[Tensor], made: list[Tensor]) -> str | None:
    return next(filter(None, map(bits_differ, expected, made)), None)


def tokens(beams: int, length: int = LENGTH) -> Any:
    def run(model: PreTrainedModel, padding: int) -> Tensor:
        given = {n: v for n, v in inputs(model, padding, length).items() if n != "decoder_input_ids"}
        return model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=beams)

    return run


def check_generate(model: PreTrainedModel, result: Result) -> None:
    """``optimize``, ``generate`` of what generates, and ``restore``."""
    fast = optimize(copy.deepcopy(model))
    for padding in (0, PADDING):
        same(result, f"optimized, padding {padding}", outputs, model, fast, padding, outputs_differ)
    if model.can_generate():
        for padding, beams in ((0, 1), (PADDING, 1), (0, 3)):
            name = f"generate, padding {padding}, beams {beams}"
            same(result, name, tokens(beams), model, fast, padding, tokens_differ)
        made = len(report_of(fast).graphs)
        same(result, "generate, longer", tokens(1, LENGTH + 5), model, fast, 0, tokens_differ)
        if len(report_of(fast).graphs) > made:
            result.wrong["graphs"] = "another length made another graph"
    result.note(report_of(fast))
    result.fallbacks = list(fast._tinyfuse.fallbacks)
    same(result, "restore", outputs, model, restore(fast), PADDING, same_bits)


def check_int8(model: PreTrainedModel, result: Result) -> None:
    plain = copy.deepcopy(model)
    quantize_(plain, "int8")
    fast = optimize(copy.deepcopy(plain))
    same(result, "int8", outputs, plain, fast, PADDING, outputs_differ)
    if model.can_generate():
        same(result, "int8 generate", tokens(1), plain, fast, PADDING, tokens_differ)


def check_forward(model: PreTrainedModel, result: Result) -> None:
    same_compiled(result, "forward", outputs, model, (0, PADDING), lambda padding: outputs_differ)


def check_bfloat16(model: PreTrainedModel, result: Result) -> None:
    """Held to fp32 of the same weights, as stock is."""
    narrow = copy.deepcopy(model).bfloat16()
    same_compiled(result, "bfloat16", _error(narrow), narrow, (PADDING,), lambda padding: _worse)


def _error(narrow: PreTrainedModel) -> Any:
    exact = outputs(copy.deepcopy(narrow).float(), PADDING)

    def run(model: Any, padding: int) -> list[float]:
        made = zip(outputs(model, padding), exact, strict=True)
        return [error(ours, right.double()) for ours, right in made if right.numel() >= 64]

    return run


def _worse(stock: list[float], ours: list[float]) -> str | None:
    pairs = zip(stock, ours, strict=True)
    worse = [(theirs, made) for theirs, made in pairs if not made <= NARROW_LOGITS * theirs + 1e-6]
    return "; ".join(f"error {made:.2g}, stock's {theirs:.2g}" for theirs, made in worse) or None


CHECKS = {
    "generate": check_generate,
    "int8": check_int8,
    "forward": check_forward,
    "bfloat16": check_bfloat16,
}
