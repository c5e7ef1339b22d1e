"""The code names no model, in comments and docstrings neither: it says what a spelling is, docs/ who spells it so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "tinyfuse" / "bench"  # of published models' shapes
# Types of models that are words of another meaning.
WORDS = {
    "aim": "the verb",
    "beam": "beam search",
    "bit": "what 16 of make a bfloat16",
    "cvt": "the conversion in PTX",
    "encoder-decoder": "the kind of model, and is_encoder_decoder of its configuration",
}


def stem(model_type: str) -> str:
    """Without the version: ``qwen`` of ``qwen3_next``, but ``t5``."""
    name = re.sub(r"[_-]?v?\d+([_-].*)?$", "", model_type)
    return name if len(name) > 2 else model_type


STEMS = {stem(model_type) for model_type in CONFIG_MAPPING_NAMES.keys() | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()}
SPELLED = "|".join(re.sub("[_-]", "[ _-]?", name) for name in sorted(STEMS - WORDS.keys(), key=len, reverse=True))
NAME = re.compile(rf"(?<![a-z0-9])({SPELLED})(?![a-z])")


def names(text: str) -> list[str]:
    """The models named in a text, by whole words, or by words in CamelCase."""
    words = re.sub("(?<=[a-z0-9])(?=[A-Z])", " ", text)
    return sorted({*NAME.findall(text.lower()), *NAME.findall(words.lower())})


@pytest.mark.parametrize("text", ["(Qwen3-Next)", "DeepSeek V4's", "gpt_oss", "a LlamaRMSNorm", "T5", "# as BART does"])
def test_a_name_is_found(text: str) -> None:
    assert names(text)


def test_no_model_is_named() -> None:
    files = [path for folder in ("tinyfuse", "patterns", "kernels") for path in (ROOT / folder).rglob("*.*")]
    files = [path for path in files if path.suffix in (".py", ".cpp") and PRESETS not in path.parents]
    assert files
    found = [
        f"{path.relative_to(ROOT)}:{number}: {', '.join(named)}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (named := names(line))
    ]
    assert not found, "\n".join(found)
