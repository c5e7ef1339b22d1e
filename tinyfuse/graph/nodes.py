"""Facts about FX nodes: their values, what they write, what they alias; and whether autocast is on around them."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.fx import Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

_INPLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.ipow,
    operator.imod, operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.setitem,
}  # fmt: skip
_INPLACE_METHODS = {f"__{operation.__name__}__" for operation in _INPLACE_OPERATORS}


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The one spelling of a dtype conversion in a normalised graph."""
    return x.to(dtype)


def gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """``F.gelu`` with its keyword argument in place."""
    return F.gelu(x, approximate=approximate)


def sdpa(q, k, v, mask, dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool) -> torch.Tensor:
    """``F.scaled_dot_product_attention`` with its keyword arguments in place."""
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def baddbmm(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float, alpha: float) -> torch.Tensor:
    """``torch.baddbmm`` with its keyword arguments in place."""
    return torch.baddbmm(x, a, b, beta=beta, alpha=alpha)


def grouped_mm(x, weight, offs, bias, out_dtype) -> torch.Tensor:
    """``torch._grouped_mm`` with its keyword arguments in place: rows of x [S, K], sorted by expert, of which those of
    e end at offs[e], by the weights [E, K, N] of their experts."""
    return torch._grouped_mm(x, weight, offs=offs, bias=bias, out_dtype=out_dtype)


def grouped_mm_fallback(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """The same product as transformers makes it expert by expert, where ``torch._grouped_mm`` does not serve."""
    return torch.ops.transformers.grouped_mm_fallback(x, weight, offs)


def max_along(x: torch.Tensor, dim: int, keepdim: bool) -> torch.Tensor:
    """``torch.max`` along a dim, values and indices."""
    return torch.max(x, dim, keepdim)


def variance(x: torch.Tensor, dim: int, unbiased: bool, keepdim: bool) -> torch.Tensor:
    """``torch.var`` along a dim with its keyword arguments in place."""
    return torch.var(x, dim, unbiased=unbiased, keepdim=keepdim)


def autocast_is_on() -> bool:
    """Whether autocast chooses the dtypes of products on a device that has kernels."""
    return torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")


def value(node: Any) -> Any:
    """The example value of a node: a fake tensor, a (Sym)int/float, a tuple of them; constants stand for themselves."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(value(node), torch.Tensor)


def is_plain_tensor(node: Any) -> bool:
    """Whether kernels may read the memory of ``node``: not that of a subclass's tensor or of one under ``vmap``."""
    if not is_tensor(node):
        return False
    return not (is_traceable_wrapper_subclass(value(node)) or is_functorch_wrapped_tensor(value(node)))


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are provably equal, without adding a guard."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return type(a) is type(b) and a == b


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dim() == b.dim() and all(map(same_size, a.shape, b.shape))


def same_ones(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are 1 in the same dims. Where only one of them is, it is repeated for the other."""
    return len(a) == len(b) and all(same_size(x, 1) == same_size(y, 1) for x, y in zip(a, b, strict=True))


def is_static(tensor: torch.Tensor) -> bool:
    return all(isinstance(s, int) for s in (*tensor.shape, *tensor.stride(), tensor.storage_offset()))


def writes(node: Node) -> list[Node]:
    """The argument nodes that ``node`` writes in place."""
    written: Iterable[Any] = ()
    if node.op == "call_method":
        name = str(node.target)
        if (name.endswith("_") and not name.endswith("__")) or name in _INPLACE_METHODS:
            written = node.args[:1]
    elif isinstance(node.target, torch._ops.HigherOrderOperator):  # a user's Triton kernel may write all that it takes
        written = (node.args, node.kwargs)
    elif getattr(node.target, "__module__", None) == operator.add.__module__:  # some of which end in "_"
        written = node.args[:1] if node.target in _INPLACE_OPERATORS else ()
    elif (overload := _overload(node.target)) is not None:
        schema = overload._schema
        if schema.is_mutable:
            written = [a for a, s in zip(node.args, schema.arguments, strict=False) if s.is_write]
    elif getattr(node.target, "__name__", "").endswith("_") and not node.target.__name__.endswith("__"):
        written = node.args[:1]
    elif names := _parameters(node.target):
        written = _written_by_name(dict(zip(names, node.args, strict=False)) | node.kwargs)
    if node.kwargs.get("out") is not None:
        written = (written, node.kwargs["out"])
    return [w for w in tree_leaves(written) if is_tensor(w)] if written else []


@cache
def _parameters(target: Any) -> tuple[str, ...]:
    """The parameters of a function of ``torch.nn.functional``."""
    given = getattr(target, "__module__", "") == F.__name__ and inspect.isfunction(target)
    return tuple(inspect.signature(target).parameters) if given else ()


def _written_by_name(given: dict[str, Any]) -> list[Any]:
    """What a function of ``torch.nn.functional`` writes when it is ``given`` these arguments."""
    written = [given["input"]] if given.get("inplace") else []
    if given.get("max_norm") is not None:
        written.append(given["weight"])
    return [*written, given.get("running_mean"), given.get("running_var")]


def _overload(target: Any) -> torch._ops.OpOverload | None:
    """The operator that ``target`` is; of a packet, the overload without a name."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, "default", None)
    return target if isinstance(target, torch._ops.OpOverload) else None


def storage(node: Node) -> int | None:
    """An identity that nodes which may share memory share."""
    return memory(value(node))


def memory(tensor: Any) -> int | None:
    while isinstance(tensor, torch.Tensor) and is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return StorageWeakRef(tensor.untyped_storage()).cdata if isinstance(tensor, torch.Tensor) else None
