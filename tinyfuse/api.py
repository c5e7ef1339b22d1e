"""``optimize`` and ``restore``: one model instance, forward and generate."""

from __future__ import annotations

import os

from torch import nn

from tinyfuse.fallback import MODES, log
from tinyfuse.runtime.instance import ATTRIBUTE, Forward, Generate, Runtime


def optimize(model: nn.Module, quantize: str | None = None, *, fallback: str = "warn") -> nn.Module:
    """Make ``model`` fast, in place, and return it. Its class and all other instances stay as they are.

    ``model.forward`` then runs through the tinyfuse backend: one graph for prompts of every length, one for single
    tokens; so does the forward of an encoder that ``generate`` calls. ``model.generate``, where there is one, runs
    greedy decoding and sampling on static memory, on CUDA as one graph per token, with the tokens that transformers
    would choose; what that loop does not cover (beam search, encoder-decoders, a cache of your own, ...) runs as
    before, over the compiled forward. :func:`restore` undoes it.

    ``quantize="int8"`` converts the weights first, see :func:`tinyfuse.quantize.quantize_`; it may also be passed in a
    later call. ``fallback="error"`` raises :class:`tinyfuse.fallback.FallbackError` where ``generate`` would otherwise
    take a slower way. With ``TINYFUSE_DISABLE=1`` in the environment nothing happens.

    Raises TypeError if ``model`` is no ``nn.Module``, or what ``torch.compile`` made of one, and ValueError for an
    unknown ``quantize`` or ``fallback``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"optimize: model is {_describe(model)}, pass a torch.nn.Module, "
            "for example AutoModelForCausalLM.from_pretrained(...)"
        )
    if "_orig_mod" in model._modules:
        raise TypeError(
            "optimize: model is what torch.compile(...) returned, pass the module that it was given: model._orig_mod"
        )
    if fallback not in MODES:
        raise ValueError(f"optimize: fallback={fallback!r}, use one of {', '.join(map(repr, MODES))}")
    if quantize is not None:
        from tinyfuse.quantize import SCHEMES, quantize_

        if quantize not in SCHEMES:
            raise ValueError(f"optimize: quantize={quantize!r}, use None or one of {', '.join(map(repr, SCHEMES))}")
    if os.environ.get("TINYFUSE_DISABLE") == "1":
        log.warning("optimize: TINYFUSE_DISABLE=1 is set, the model stays as it is")
        return model
    if quantize is not None:
        before = vars(model).get(ATTRIBUTE)
        restore(model)  # what was compiled for the float weights
        try:
            report = quantize_(model, quantize)
        except Exception:
            if before is not None:
                optimize(model, fallback=before.mode)
            raise
        log.info("%s", report)
    runtime = vars(model).get(ATTRIBUTE)
    if runtime is None:
        own = {name: vars(model)[name] for name in ("forward", "generate") if name in vars(model)}
        runtime = Runtime(model, fallback, own)
        setattr(model, ATTRIBUTE, runtime)
        model.forward = Forward(runtime)
        if callable(getattr(model, "generate", None)) and _adapted(model) is None:
            model.generate = Generate(runtime)
    runtime.mode = fallback
    for inner in _called_by_generate(model):
        optimize(inner, fallback=fallback)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`optimize`, in place, and return ``model``: its ``forward`` and ``generate`` are what they were.

    Compiled graphs and caches are dropped and their memory is free again. Quantised weights stay quantised.
    """
    runtime = vars(model).get(ATTRIBUTE)
    if runtime is not None:
        for name in (ATTRIBUTE, "forward", "generate"):
            vars(model).pop(name, None)
        vars(model).update(runtime.own)
        runtime.release()
        for inner in _called_by_generate(model):
            restore(inner)
    return model


def _adapted(model: nn.Module) -> nn.Module | None:
    """The model inside of a PEFT wrapper, whose ``generate`` the wrapper's calls."""
    return model.get_base_model() if hasattr(model, "get_base_model") else None


def _called_by_generate(model: nn.Module) -> list[nn.Module]:
    """The models inside of ``model`` whose forward or ``generate`` runs without that of ``model``."""
    if (inner := _adapted(model)) is not None:
        return [inner]
    config, get = getattr(model, "config", None), getattr(model, "get_encoder", None)
    if getattr(config, "is_encoder_decoder", False) and callable(getattr(model, "generate", None)) and callable(get):
        encoder = get()
        return [encoder] if isinstance(encoder, nn.Module) and encoder is not model else []
    return []


def _describe(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
