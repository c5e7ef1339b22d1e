"""int8 weight-only quantisation: symmetric, one scale per output channel.

    scale[n] = max_k |W[n, k]| / 127        q[n, k] = round_half_even(W[n, k] / scale[n])        W ≈ scale[:, None] * q

Everything is computed in fp32, so |q| ≤ 127 without clamping, and the bytes depend on the weights alone.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tinyfuse.kernels.dequantize
import tinyfuse.kernels.linear  # noqa: F401  (defines torch.ops.tinyfuse.linear)
from tinyfuse.runtime.instance import ATTRIBUTE

SCHEMES = ("int8",)
SMALLEST = 32  # a layer with N or K below this is left alone: nothing to win
CHUNK = 1 << 18  # weights converted at a time: 1 MiB in fp32 stays in a core's cache


class _Int8(nn.Module):
    """``weight`` int8 [..., N, K] and ``weight_scale`` fp32 [..., N] that follow the device but never the dtype.

    The weight is a parameter, because ties, sharding, offloading and PEFT look for parameters; it takes no
    gradient. The scale is a buffer, because a model's dtype is the dtype of its first floating-point parameter.
    """

    weight: nn.Parameter
    weight_scale: Tensor

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            fixed = tensor is self.weight or tensor is self.weight_scale
            return tensor.to(moved.device) if fixed and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        given = state_dict.get(f"{prefix}weight")
        if given is not None and given.dtype != torch.int8:
            errors.append(f"{prefix}weight is {given.dtype}, the module is int8: load it before quantize_()")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class Int8Linear(_Int8, nn.Linear):
    """``y = x (weight_scale[:, None] * weight)^T + bias``: x [..., K] of any floating dtype, y [..., N] in x's dtype.

    It is an ``nn.Linear`` to those who look for linears (PEFT), except that the weight cannot be trained;
    gradients reach ``x`` and ``bias``. Under autocast it computes in the autocast dtype, like ``nn.Linear``.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        nn.Module.__init__(self)  # nn.Linear's would allocate and draw a float weight
        self.in_features, self.out_features = in_features, out_features
        weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # or the sums inside the op would be autocast too
                return self._linear(x.to(torch.get_autocast_dtype(device)))
        return self._linear(x)

    def _linear(self, x: Tensor) -> Tensor:
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return torch.ops.tinyfuse.linear(x, self.weight, self.weight_scale, bias, None)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight=int8"


class _Int8Values(_Int8):
    """A table that gives floats: ``dtype`` is what the float table had and follows ``model.to(dtype)``."""

    def __init__(self, shape: tuple[int, ...], device=None, dtype=None):
        super().__init__()
        self.dtype = dtype or torch.get_default_dtype()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.int8, device=device), requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(shape[:-1], dtype=torch.float32, device=device))

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)


class Int8Embedding(_Int8Values):
    """Rows of an int8 table: ``weight_scale[ids] * weight[ids]``, rounded to ``dtype``, times ``embed_scale``.

    ids [...] integer; returns [..., K]. The table and the scales may be those of a tied ``Int8Linear``.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, device=None, dtype=None):
        super().__init__((num_embeddings, embedding_dim), device, dtype)
        self.num_embeddings, self.embedding_dim, self.embed_scale = num_embeddings, embedding_dim, 1.0

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight).float() * F.embedding(ids, self.weight_scale[:, None])
        rows = rows.to(self.dtype)
        return rows if self.embed_scale == 1.0 else rows * self.embed_scale

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype}, weight=int8"


class Int8Experts(_Int8Values):
    """In place of a parameter [E, N, K] of a module of experts: what its code reads of it comes out dequantised.

    ``weights[ids]`` [S, N, K] for ids [S] integer, ``weights[e]`` [N, K] for one expert, ``weights.transpose`` of all;
    in ``dtype``. ``by_columns``: the parameter was [E, K, N], and the code that takes one expert expects [K, N].
    """

    def __init__(self, experts: int, N: int, K: int, by_columns: bool = False, device=None, dtype=None):
        super().__init__((experts, N, K), device, dtype)
        self.by_columns = by_columns

    def __getitem__(self, index: Tensor | int) -> Tensor:
        weight = torch.ops.tinyfuse.dequantize(self.weight[index], self.weight_scale[index], self.dtype)
        return weight.T if self.by_columns and weight.dim() == 2 else weight

    def transpose(self, dim0: int, dim1: int) -> Tensor:
        return torch.ops.tinyfuse.dequantize(self.weight, self.weight_scale, self.dtype).transpose(dim0, dim1)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, by_columns={self.by_columns}, dtype={self.dtype}, weight=int8"


class QuantizedModule(NamedTuple):
    """One converted module. Bytes are those of weight and scale; a tied weight counts where it comes first."""

    name: str
    kind: str
    N: int
    K: int
    bytes_before: int
    bytes_after: int


@dataclass
class QuantizeReport:
    """What :func:`quantize_` converted, what it left alone and why, and the bytes of the whole model."""

    scheme: str
    modules: list[QuantizedModule] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def to_dict(self) -> dict:
        return {**asdict(self), "modules": [module._asdict() for module in self.modules]}

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(m.kind for m in self.modules).items())
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        lines = [f"{self.scheme}: {kinds}; {before:.1f} MB -> {after:.1f} MB" if kinds else "nothing to quantise"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped:
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"left alone: {names[0] or 'the model'}{more}: {reason}")
        return "\n".join(lines)


@torch.no_grad()
def quantize_(
    model: nn.Module,
    scheme: str = "int8",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    tied_heads: bool = False,
) -> QuantizeReport:
    """Convert the linear weights of ``model`` to int8 in place, on whatever device each of them is.

    Taken are ``nn.Linear`` and transformers' ``Conv1D``, an output head of its own included, and the 3-D weights of
    experts that follow transformers' experts interface. Left in high precision are heads tied to the embedding,
    mixture-of-experts routers, adapters, layers narrower than 32, subclasses of ``nn.Linear`` and layers whose weight
    other code reads; the report gives the reason for each. ``tied_heads`` converts tied heads and their embeddings too,
    which stay tied. ``filter_fn(module, name)`` narrows the choice: only linears and modules of experts for which it is
    true are converted.

    Run plainly, without ``optimize`` or the backend, a model's own code is given its experts dequantised: the chosen
    ones under the experts implementations "eager" and "batched_mm", all of a layer, which is slow, under "grouped_mm".

    The modules keep their identity (hooks, references to them, training flag); each float weight is released before
    the next layer is converted, and no fp32 copy of a whole weight is made. A second call changes nothing.

    Raises ``TypeError`` if ``model`` is not a module and ``ValueError`` for an unknown scheme, or if a chosen weight
    is on the meta device or holds NaN or Inf; the model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_ takes a torch.nn.Module, not {type(model).__name__}")
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; valid schemes: {', '.join(SCHEMES)}")
    report = QuantizeReport(scheme, bytes_before=_bytes(model))
    groups = _choose(model, filter_fn, tied_heads, report.skipped)
    stacks = _choose_experts(model, filter_fn, report.skipped)
    scales = [_scale(f"{name}.weight", module.weight, 0 if _is_conv1d(module) else 1) for (name, module), *_ in groups]
    stack_scales = [_experts_scales(*stack) for stack in stacks]
    for module in model.modules():  # graphs of an optimised model hold the float weights
        if ATTRIBUTE in vars(module):
            vars(module)[ATTRIBUTE].release()
    for group, scale in zip(groups, scales, strict=True):
        report.modules += _convert(group, scale)
    for stack, stack_scale in zip(stacks, stack_scales, strict=True):
        report.modules += _convert_experts(*stack, stack_scale)
    _tie_scales(model, {f"{name}.weight" for group in groups if len(group) > 1 for name, _ in group})
    _be_saved_as_int8(model)
    report.bytes_after = _bytes(model)
    return report


def int8_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The int8 modules of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Int8)}


def prepare_int8_(model: nn.Module, embed_scales: dict[str, float]) -> None:
    """Give a transformers ``model`` on the meta device its int8 modules, in place, before it is given their values.

    ``embed_scales`` holds the names of all of them, and the factor of those that are embeddings; names that ``model``
    lacks are passed over. Raises ``ValueError`` for a name of what is no linear, embedding or weight of experts.
    """
    keys = [(head.removesuffix(".weight"), table) for head, table in model.all_tied_weights_keys.items()]
    tied = [head for head, table in keys if table.removesuffix(".weight") in embed_scales]
    embed_scales = dict.fromkeys(tied, 1.0) | embed_scales  # the saved model may have had no head
    for name, module in list(model.named_modules()):
        listed = [key for key in module._parameters if f"{name}.{key}" in embed_scales]
        if listed and not hasattr(module, "is_transposed"):
            raise _other_code(f"{name}.{listed[0]}", module)
        if listed:
            along = 1 if module.is_transposed else 2
            _convert_experts(name, module, {key: module._parameters[key].amax(along).float() for key in listed})
        if name not in embed_scales:
            continue
        if not isinstance(module, (nn.Linear, nn.Embedding)) and not _is_conv1d(module):
            raise _other_code(name, module)
        if isinstance(module, nn.Embedding):
            module._buffers.pop("embed_scale", None)
            module.embed_scale = embed_scales[name]
        _convert([(name, module)], module.weight.amax(0 if _is_conv1d(module) else 1).float())
    model.tie_weights(recompute_mapping=False)
    for module in int8_modules(model).values():
        module.weight._is_hf_initialized = True  # or transformers draws float values for what lies on a disk
    for head in tied:
        model.get_submodule(head).weight_scale = None  # not to be looked for in the file: finish_int8_ ties it


def finish_int8_(model: nn.Module) -> None:
    """Tie the scales of a model that :func:`prepare_int8_` prepared, once it has its values."""
    _tie_scales(model, {f"{name}.weight" for name in int8_modules(model)})
    model.tie_weights(recompute_mapping=False)
    _be_saved_as_int8(model)


def _other_code(name: str, module: nn.Module) -> ValueError:
    return ValueError(
        f"{name} is int8 in the saved model and belongs to a {type(module).__name__} here, which cannot hold it: load "
        "it with the transformers that it was saved with, or quantise the original model again"
    )


def _be_saved_as_int8(model: nn.Module) -> None:
    """What ``save_pretrained`` of a transformers model writes is then what ``from_pretrained`` reads."""
    library = sys.modules.get("transformers.modeling_utils")
    for module in model.modules() if library is not None else ():
        if isinstance(module, library.PreTrainedModel) and int8_modules(module):
            from tinyfuse.pretrained import Int8Config, Int8Quantizer

            if getattr(module, "hf_quantizer", None) is None:
                module.hf_quantizer = Int8Quantizer(Int8Config())


Group = list[tuple[str, nn.Module]]  # the modules that share one weight, by name


def _choose(model: nn.Module, filter_fn, tied_heads: bool, skipped: list[tuple[str, str]]) -> list[Group]:
    """Group the modules to convert by weight; ``skipped`` receives (name, reason) of the linears that are not."""
    owners: dict[int, Group] = {}
    reasons: dict[nn.Module, str | None] = {}
    for name, module in model.named_modules():
        for weight in module._parameters.values():
            if weight is not None:
                owners.setdefault(id(weight), []).append((name, module))
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            reason = _why_not(model, name, module)
            if reason is None and filter_fn is not None and not filter_fn(module, name):
                reason = "filter_fn leaves it out"
            reasons[module] = reason
    chosen: dict[int, Group] = {}
    for name, module in model.named_modules():
        if module not in reasons:
            continue
        weight = module._parameters.get("weight")
        reason = reasons[module] or _why_not_shared(model, owners[id(weight)], reasons, tied_heads)
        if reason is None:
            chosen[id(weight)] = owners[id(weight)]
        else:
            skipped.append((name, reason))
    return list(chosen.values())


def _why_not_shared(
    model: nn.Module, group: Group, reasons: dict[nn.Module, str | None], tied_heads: bool
) -> str | None:
    """All modules that share a weight are converted, or none."""
    for name, module in group:
        if isinstance(module, nn.Embedding):
            reason = _why_not_embedding(model, name, module)
        else:
            reason = reasons.get(module, f"it is a {type(module).__name__}")
        if reason is not None:
            return f"its weight is tied to {name}, which stays as it is: {reason}"
    if len({_is_conv1d(module) for _, module in group}) > 1:
        return "its weight is shared between layouts"
    tables = [name for name, module in group if isinstance(module, nn.Embedding)]
    return f"its weight is tied to {tables[0]}: tied_heads=True converts both" if tables and not tied_heads else None


def _why_not(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why this linear stays as it is, or None."""
    weight = module._parameters.get("weight")
    parts = name.split(".")
    if isinstance(module, Int8Linear):
        return "it is int8 already"
    if parametrize.is_parametrized(module) or weight is None:
        return "its weight is parametrised: remove the parametrisation first"
    if type(module) is not nn.Linear and not _is_conv1d(module):
        return f"it is a {type(module).__name__}, which may use its weight in its own way"
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.element_size() < 2:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, not a plain float tensor"
    if _has_own_forward(module):
        return "its forward is replaced on the instance"
    if _in_adapter(model, parts):
        return "it is part of an adapter that is trained"
    if "router" in name or (parts[-1] in ("gate", "gating", "wg") and weight.shape[0] <= 1024):
        return "routers stay in high precision"
    if min(weight.shape) < SMALLEST:
        return f"N or K is below {SMALLEST}"
    return _why_read(model, name)


def _why_not_embedding(model: nn.Module, name: str, module: nn.Embedding) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None or module.max_norm is not None or _has_own_forward(module):
        return "its table or its forward is not the plain one"
    if type(module) is not nn.Embedding and weight.device.type != "meta":
        ids = torch.tensor([0, module.num_embeddings // 2, module.num_embeddings - 1], device=weight.device)
        rows, scale = F.embedding(ids, weight), _embed_scale(module)
        try:
            found = type(module).forward(module, ids)
        except Exception as error:
            return f"it is a {type(module).__name__}, which does not take ids alone: {error}"
        if not torch.equal(found, rows if scale == 1.0 else rows * scale):
            return f"it is a {type(module).__name__}, which does more than look up rows"
    return _why_read(model, name)


def _why_read(model: nn.Module, name: str) -> str | None:
    """Whether the code around a module reads its weight itself: int8 values, or their dtype, would mislead it."""
    parts = [part for part in name.split(".") if part != "base_layer"]  # PEFT's wrapper passes attributes through
    for depth in range(len(parts) if name else 0):
        parent = model.get_submodule(".".join(parts[:depth]))
        access = ".".join(parts[max(depth, len(parts) - 2) :])  # `self.proj`, and from further up `attn.proj`
        if _reads_weight(type(parent), access):
            return f"{type(parent).__name__} reads its weight directly"
    return None


@cache
def _reads_weight(cls: type, access: str) -> bool:
    """Whether the forward of ``cls`` uses the values of ``access.weight`` and does not look for int8 first."""
    source = _forward_source(cls)
    if f"{access}.weight.dtype != torch.int8" in source:
        return False
    return bool(re.search(rf"\b{re.escape(access)}\.weight\b(?!\.(?:device|shape|size|ndim)\b)", source))


def _why_experts_read(model: nn.Module, parts: list[str]) -> str | None:
    """Whether code uses the expert weights at the path ``parts`` in a way that ``Int8Experts`` does not know."""
    for depth in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        access = ".".join(parts[max(depth, len(parts) - 2) :])
        # followed by a quote it is a name, not a use
        if re.search(rf"\.{re.escape(access)}\b(?![\['\"]|\.(?:device|dtype)\b)", _forward_source(type(parent))):
            return f"{type(parent).__name__} reads {parts[-1]} in another way than one expert at a time"
    return None


@cache
def _forward_source(cls: type) -> str:
    """The source of the methods of ``cls`` that run in a forward pass; empty where there is none to read."""
    sources = []
    for base in cls.__mro__:
        if base is nn.Module or base.__name__ == "PreTrainedModel":
            continue
        for name, method in vars(base).items():
            if inspect.isfunction(method) and name not in ("__init__", "_init_weights", "reset_parameters"):
                try:
                    sources.append(inspect.getsource(method))
                except OSError:  # defined in a shell
                    continue
    return "\n".join(sources)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether the instance runs something else than its class's forward; accelerate's hooks keep that one."""
    forward = vars(module).get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _in_adapter(model: nn.Module, parts: list[str]) -> bool:
    """Whether the path leads into the trained part of a PEFT layer."""
    if "modules_to_save" in parts:
        return True
    for depth in range(1, len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        if parts[depth] in getattr(parent, "adapter_layer_names", ()):
            return True
    return False


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear with the weight as [K, N]; transformers is not imported for it."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(module) is library.Conv1D


def _choose_experts(model: nn.Module, filter_fn, skipped: list[tuple[str, str]]) -> list[tuple[str, nn.Module]]:
    """(name, module) of the experts to convert; ``skipped`` receives (name, reason) of the weights of the others."""
    chosen = []
    for name, module in model.named_modules():
        if isinstance(module, Int8Experts):
            skipped.append((name, "it is int8 already"))
        keys = _expert_weights(module)
        reasons = [_why_not_experts(model, f"{name}.{key}".removeprefix("."), module) for key in keys]
        reason = next(filter(None, reasons), None)  # all weights of a module, or none
        if keys and reason is None and filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn leaves it out"
        if reason is not None:
            skipped += [(f"{name}.{key}".removeprefix("."), reason) for key in keys]
        elif keys:
            chosen.append((name, module))
    return chosen


def _expert_weights(module: nn.Module) -> list[str]:
    if isinstance(module, nn.modules.conv._ConvNd):
        return []
    return [
        key
        for key, weight in module._parameters.items()
        if weight is not None and weight.ndim == 3 and weight.is_floating_point() and min(weight.shape) > 1
    ]


def _why_not_experts(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why these expert weights stay as they are, or None."""
    parts = name.split(".")
    weight = module._parameters[parts[-1]]
    if parts[-1] not in ("gate_up_proj", "up_proj", "down_proj") or not hasattr(module, "is_transposed"):
        return f"{type(module).__name__} does not follow the experts interface, so how it multiplies is not known"
    if type(weight) is not nn.Parameter or weight.element_size() < 2:
        return f"it is a {type(weight).__name__} of {weight.dtype}, not a plain float tensor"
    if sum(weight is p for m in model.modules() for p in m._parameters.values()) > 1:
        return "several modules share it"
    if _has_own_forward(module):
        return "the forward of its module is replaced on the instance"
    if _in_adapter(model, parts):
        return "it is part of an adapter that is trained"
    if min(weight.shape[1:]) < SMALLEST:
        return f"N or K is below {SMALLEST}"
    return _why_experts_read(model, parts)


def _embed_scale(module: nn.Module) -> float:
    """The factor of a scaled embedding as its forward applies it: a tensor is first rounded to the table's dtype."""
    scale = getattr(module, "embed_scale", 1.0)
    return scale.to(module.weight.dtype).item() if isinstance(scale, Tensor) else float(scale)


def _scale(name: str, weight: Tensor, along: int) -> Tensor:
    """fp32, without the dimension of K that it goes ``along``; 1 for rows of zeros and for rows too small for fp32 to
    divide by their scale."""
    if weight.device.type == "meta":
        raise ValueError(f"{name} is on the meta device: load or materialise the weights before quantising")
    absmax = torch.maximum(weight.amax(along), weight.amin(along).neg()).float()
    if not absmax.isfinite().all():
        raise ValueError(f"{name} contains NaN or Inf; nothing was quantised")
    scale = absmax / absmax.new_full((), 127.0)  # CUDA multiplies by 1/127 for a Python divisor: other bytes
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def _quantize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """weight [N, K] of any strides to contiguous int8 [N, K], a few rows at a time."""
    out = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    if weight.device.type == "meta":
        return out
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        out[rows] = weight[rows].float().div_(scale[rows, None]).round_()
    return out


def _convert(group: Group, scale: Tensor) -> list[QuantizedModule]:
    """Replace the weight that ``group`` shares; nothing here keeps the float weight once it returns."""
    transposed = _is_conv1d(group[0][1])
    weight = group[0][1].weight
    before, after = weight.nbytes, weight.numel() + scale.nbytes
    N, K, dtype = len(scale), weight.numel() // len(scale), weight.dtype
    quantized = nn.Parameter(_quantize_weight(weight.t() if transposed else weight, scale), requires_grad=False)
    done = []
    for name, module in group:
        kind = "Conv1D" if transposed else "Embedding" if isinstance(module, nn.Embedding) else "Linear"
        hook = _detach_accelerate_hook(module)
        if kind == "Embedding":
            embed_scale = _embed_scale(module)
            module._buffers.pop("embed_scale", None)
            module.dtype, module.embed_scale = dtype, embed_scale
            module.__class__ = Int8Embedding
        else:
            module.in_features, module.out_features = K, N
            module.__class__ = Int8Linear
        module.weight = quantized
        module.register_buffer("weight_scale", scale)
        if hook is not None:
            sys.modules["accelerate.hooks"].add_hook_to_module(module, hook)
        done.append(QuantizedModule(name, kind, N, K, before, after))
        before = after = 0
    return done


def _experts_scales(name: str, module: nn.Module) -> dict[str, Tensor]:
    along = 1 if module.is_transposed else 2
    return {
        key: _scale(f"{name}.{key}".removeprefix("."), module._parameters[key], along)
        for key in _expert_weights(module)
    }


def _convert_experts(name: str, module: nn.Module, scales: dict[str, Tensor]) -> list[QuantizedModule]:
    """Replace the weights of a module of experts, each expert's rows now contiguous: all of them, or none if memory
    runs out."""
    made = {key: _int8_experts(module._parameters[key], scale, module.is_transposed) for key, scale in scales.items()}
    done = []
    for key, experts in made.items():
        weight = module._parameters.pop(key)
        module.add_module(key, experts.train(module.training))
        sizes = weight.nbytes, experts.weight.nbytes + experts.weight_scale.nbytes
        done.append(QuantizedModule(f"{name}.{key}".removeprefix("."), "Experts", *experts.weight.shape[1:], *sizes))
    module.is_transposed = False  # what several experts at once are read for
    return done


def _int8_experts(weight: Tensor, scale: Tensor, by_columns: bool) -> Int8Experts:
    rows = weight.mT if by_columns else weight
    quantized = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    for into, part, factor in zip(quantized, rows, scale, strict=True):
        into.copy_(_quantize_weight(part, factor))
    made = Int8Experts(*rows.shape, by_columns, "meta", weight.dtype)
    made.weight, made.weight_scale = nn.Parameter(quantized, requires_grad=False), scale
    return made


def _detach_accelerate_hook(module: nn.Module):
    """accelerate wraps the bound forward of the old class; its hook is to be put back around the new one."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        sys.modules["accelerate.hooks"].remove_hook_from_module(module)
    vars(module).pop("forward", None)
    return hook


def _tie_scales(model: nn.Module, tied: set[str]) -> None:
    """Where a transformers model declares a tie between two converted weights, declare it for their scales too."""
    for prefix, module in model.named_modules():
        full = f"{prefix}." if prefix else ""
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            keys = getattr(module, attribute, None)
            if isinstance(keys, dict):
                scales = {f"{a}_scale": f"{b}_scale" for a, b in keys.items() if {full + a, full + b} <= tied}
                if scales:
                    setattr(module, attribute, {**keys, **scales})


def _bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared storages once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.untyped_storage()._cdata: tensor.nbytes for tensor in tensors}.values())
