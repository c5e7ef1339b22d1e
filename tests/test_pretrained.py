"""int8 models through transformers' ``save_pretrained`` and ``from_pretrained``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM

import tinyfuse
from tests.test_quantize import CONFIGS, IDS, assert_tied, logits
from tinyfuse.quantize import Int8Linear, int8_modules, quantize_


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).eval()


def load(folder: Path, kind=AutoModelForCausalLM, **arguments) -> transformers.PreTrainedModel:
    """What ``from_pretrained`` gives where every tensor has found its place."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(info.values()), info
    return model


def assert_same(loaded, model):
    expected, found = model.state_dict(), loaded.state_dict()
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert str(loaded) == str(model)  # the same modules


@pytest.fixture
def saved(tmp_path):
    """An int8 model with a tied head, and the folder that it was saved in."""
    model = build("llama-tied")
    quantize_(model, tied_heads=True, filter_fn=lambda module, name: "o_proj" not in name)
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("tied_heads", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "llama", "gpt2", "gemma3", "mixtral", "gpt-oss"])
def test_a_saved_model_comes_back_bit_for_bit(name, tied_heads, tmp_path):
    model = build(name)
    before = model.get_memory_footprint()
    quantize_(model, tied_heads=tied_heads)
    model.save_pretrained(tmp_path / "a", max_shard_size="50KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert sum(file.stat().st_size for file in (tmp_path / "a").glob("*.safetensors")) < 0.8 * before
    loaded = load(tmp_path / "a")
    assert_same(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "b")
    assert_same(load(tmp_path / "b"), model)


def test_another_process_needs_nothing_but_the_import(saved):
    model, folder = saved
    code = f"""
import tinyfuse, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})
with torch.no_grad():
    torch.save(model(torch.tensor({IDS.tolist()})).logits, {str(folder / "logits")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert torch.equal(torch.load(folder / "logits"), logits(model))


def test_no_float_weight_is_made(saved, monkeypatch):
    _, folder = saved
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point() and out.device.type != "meta":
                largest = max(largest, out.numel())
            return out

    with Watch():
        loaded = load(folder)
    assert 131 <= largest <= loaded.model.layers[0].self_attn.o_proj.weight.numel()  # the one that was left out
    assert_tied(loaded)


def test_dtype_and_device_map(saved, tmp_path):
    model, folder = saved
    loaded = load(folder, dtype=torch.float32)
    assert loaded.dtype == loaded.model.embed_tokens.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.lm_head.weight_scale, model.lm_head.weight_scale)
    parts = dict.fromkeys(["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    for device_map in ("auto", {"": "cpu"}, parts | {"model.layers.0": "disk"}):
        placed = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
        assert torch.equal(logits(placed), logits(model))


def test_the_model_inside_and_the_model_around(saved, tmp_path):
    model, folder = saved
    inside = load(folder, AutoModel)
    assert_same(inside, model.model)
    model.model.save_pretrained(tmp_path / "inside")
    assert_same(load(tmp_path / "inside", AutoModel), model.model)
    around = AutoModelForCausalLM.from_pretrained(tmp_path / "inside")
    assert int8_modules(around).keys() == int8_modules(model).keys() and torch.equal(logits(around), logits(model))


def test_a_float_model_is_quantised_as_it_is_loaded(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "float")
    quantize_(model)
    loaded = load(tmp_path / "float", quantization_config=tinyfuse.Int8Config())
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "int8")
    assert_same(load(tmp_path / "int8"), model)


def rewrite(folder: Path, **changes) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


def test_what_cannot_be_read_is_refused(saved):
    _, folder = saved
    rewrite(folder, format_version=2)
    with pytest.raises(ValueError, match=r"format 2, tinyfuse .* reads format 1: install the tinyfuse that wrote"):
        load(folder)
    rewrite(folder, format_version=1, modules=["model.layers.0.input_layernorm"])
    with pytest.raises(ValueError, match=r"layers\.0\.input_layernorm is int8 in the saved model and belongs to a "):
        load(folder)
    rewrite(folder, modules=["model.norm.weight"])
    with pytest.raises(ValueError, match=r"model\.norm\.weight is int8 in the saved model"):
        load(folder)


def test_a_float_model_has_no_part_in_it(tmp_path):
    model = build("llama")
    quantize_(model, filter_fn=lambda module, name: False)
    model.save_pretrained(tmp_path)
    assert not hasattr(model, "hf_quantizer") and "quantization_config" not in (tmp_path / "config.json").read_text()
    assert not any(isinstance(module, Int8Linear) for module in load(tmp_path).modules())
