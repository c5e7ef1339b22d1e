"""A sample of the zoo: spellings that no family of ``tests/models.py`` has, through everything that the zoo checks."""

from __future__ import annotations

import pytest
import torch

from tests.zoo.build import TYPES, build, config
from tests.zoo.check import Exact, check, logits
from tinyfuse.report import collect

SAMPLE = ("gemma3n_text", "deepseek_v2")  # powers of tensors, keys shared by layers; latent attention, experts


@pytest.mark.parametrize("model_type", SAMPLE)
def test_sample(model_type: str) -> None:
    result = check(model_type, ("generate", "int8", "bfloat16"))
    assert not result.wrong and not result.stock
    assert all(reason for _, reason in result.reasons)


@pytest.mark.parametrize("model_type", ["bert", "gpt_neo"])
def test_what_looks_beyond_its_tokens_has_no_static_cache(model_type: str) -> None:
    """Attention in both directions, and a window counted from the end of the cache."""
    result = check(model_type, ("generate",))
    assert not result.wrong
    assert any("static cache" in reason for reason in result.fallbacks)


def test_the_softcap_of_logits_is_one_op() -> None:
    torch._dynamo.reset()
    with collect() as report:
        logits(torch.compile(build("vaultgemma", torch.bfloat16), backend="tinyfuse"), 0)
    assert [graph.ops["softcap"] for graph in report.graphs] == [1]


def test_every_type_has_a_configuration() -> None:
    failed = set()
    for model_type in TYPES:
        try:
            config(model_type)
        except Exception:
            failed.add(model_type)
    # Whose own defaults transformers refuses, or that hold a model of text with layers of its own.
    assert failed <= {"gemma4_assistant", "dots3_note", "musicgen", "musicgen_melody"}


@pytest.mark.parametrize(("model_type", "turned", "equal"), [("llama", 1, False), ("mixtral", 5, True)])
def test_errors_in_16_bits_are_those_of_eager_code(model_type: str, turned: int, equal: bool) -> None:
    """Of all tokens, and where a rounding may turn the choice of experts of a few, of most."""
    exact, right = Exact(build(model_type)), logits(build(model_type), 0)
    noise = 0.01 * torch.randn(2, *right.shape, generator=torch.Generator().manual_seed(0))
    eager, fused = right + noise
    assert exact.differ(0, eager, fused) is None
    assert "2.00 times" in exact.differ(0, eager, right + 2 * noise[0])
    fused[:turned] = -right[:turned]
    assert (exact.differ(0, eager, fused) is None) is equal
