"""``save_pretrained`` and ``from_pretrained`` of int8 models: the format "tinyfuse" in transformers' registry.

The tensors are saved by their names in ``state_dict``; ``config.json`` says which modules are int8. A model that is
loaded gets its int8 modules before its weights, so no float weight is ever in memory. ``import tinyfuse`` makes the
format known as soon as transformers' registry is imported.
"""

from __future__ import annotations

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tinyfuse import __version__
from tinyfuse.quantize import finish_int8_, int8_modules, prepare_int8_, quantize_

METHOD = "tinyfuse"
FORMAT = 1


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """``from_pretrained(path, quantization_config=Int8Config())`` loads a float model and quantises it to int8.

    The arguments are those that ``save_pretrained`` writes: the names of the int8 modules, and of those of them that
    are embeddings the factors other than 1. Raises ``ValueError`` for a format that this version does not read.
    """

    def __init__(
        self,
        modules: list[str] | None = None,
        embed_scales: dict[str, float] | None = None,
        format_version: int = FORMAT,
        quant_method: str = METHOD,
    ):
        if format_version != FORMAT:
            raise ValueError(
                f"the int8 weights have format {format_version}, tinyfuse {__version__} reads format {FORMAT}: "
                "install the tinyfuse that wrote them, or quantise the original model again"
            )
        self.quant_method, self.format_version = quant_method, format_version
        self.modules, self.embed_scales = modules or [], embed_scales or {}


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """What ``from_pretrained`` and ``save_pretrained`` ask about an int8 model."""

    quantization_config: Int8Config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        if self.pre_quantized:
            config, prefix = self.quantization_config, f"{model.base_model_prefix}."
            scales = {name: config.embed_scales.get(name, 1.0) for name in config.modules}
            for name, scale in list(scales.items()):  # the model may be the saved one's inside, or have it inside
                scales |= {prefix + name: scale, name.removeprefix(prefix): scale}
            prepare_int8_(model, scales)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        if self.pre_quantized:
            finish_int8_(model)
        else:
            quantize_(model)

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module | None = None) -> list:
        """int8 tensors have the names and shapes of the state dict already."""
        return [] if self.pre_quantized else weight_conversions

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """``save_pretrained`` comes here before it writes the configuration: it describes the model as it is now."""
        parts = int8_modules(model)
        scales = {name: part.embed_scale for name, part in parts.items() if getattr(part, "embed_scale", 1.0) != 1.0}
        model.config.quantization_config = Int8Config(list(parts), scales)
        model._weight_conversions = []  # they would rename float weights and cut them up
        return None, {"quantized_by": f"tinyfuse {__version__}"}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True
