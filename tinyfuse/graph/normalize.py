"""One spelling for everything: the graph that patterns are written against.

Nodes are changed in place, so a node of the original graph and its normal form are one object.

* methods and operators become ``torch`` functions, keyword arguments become positional, defaults are filled in;
* dtype conversions become ``cast(x, dtype)``; ``view`` becomes ``reshape``; dims become non-negative;
* a permutation that swaps two dims becomes ``transpose``; ``x[:, :, a:b]`` of three dims becomes ``x[..., a:b]``;
* a tensor of one number that is compared with, or filled in, is the number;
* conversions to the same dtype, contiguous() of a contiguous tensor, reshapes and expands to the same
  shape, dropout in evaluation, ``and`` with a new True, API logging and items of a tuple that nothing uses vanish.

Everything else stays as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from tinyfuse.graph.nodes import (
    baddbmm,
    cast,
    gelu,
    grouped_mm,
    grouped_mm_fallback,
    is_plain_tensor,
    is_static,
    is_tensor,
    max_along,
    memory,
    same_shape,
    sdpa,
    storage,
    value,
    variance,
)

_METHODS: dict[str, Callable] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "neg": torch.neg, "pow": torch.pow,
    "square": torch.square, "rsqrt": torch.rsqrt, "sqrt": torch.sqrt, "mean": torch.mean, "sum": torch.sum,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "cos": torch.cos, "sin": torch.sin, "matmul": torch.matmul,
    "bmm": torch.bmm, "baddbmm": baddbmm, "max": max_along, "var": variance,
    "softmax": torch.softmax, "view": torch.reshape, "reshape": torch.reshape, "transpose": torch.transpose,
    "permute": torch.permute, "unsqueeze": torch.unsqueeze, "squeeze": torch.squeeze, "flatten": torch.flatten,
    "chunk": torch.chunk, "split": torch.split, "expand": torch.Tensor.expand,
    "contiguous": torch.Tensor.contiguous, "repeat_interleave": torch.repeat_interleave,
    "masked_fill": torch.masked_fill, "clamp": torch.clamp, "index_copy_": torch.Tensor.index_copy_,
    "le": operator.le, "gt": operator.gt,
}  # fmt: skip
_FUNCTIONS: dict[Callable, Callable] = {
    operator.add: torch.add, operator.sub: torch.sub, operator.mul: torch.mul, operator.truediv: torch.div,
    operator.neg: torch.neg, operator.pow: torch.pow, operator.matmul: torch.matmul, operator.eq: torch.eq,
    torch.multiply: torch.mul, torch.divide: torch.div, torch.subtract: torch.sub,
    torch.nn.functional.sigmoid: torch.sigmoid, torch.nn.functional.tanh: torch.tanh,
    torch.nn.functional.softmax: torch.softmax, torch.relu: F.relu, torch.swapaxes: torch.transpose,
    torch.concat: torch.cat, torch.layer_norm: F.layer_norm, F.gelu: gelu,
    F.scaled_dot_product_attention: sdpa, torch.rms_norm: F.rms_norm, torch.baddbmm: baddbmm,
    torch.max: max_along, torch.var: variance, torch._grouped_mm: grouped_mm, F.grouped_mm: grouped_mm,
}  # fmt: skip
_OVERLOADS: dict[str, Callable] = {"transformers::grouped_mm_fallback": grouped_mm_fallback}  # by name: not imported
_REQUIRED = object()
# Parameter names and defaults of the canonical functions; a call with other arguments is left as it is.
_SIGNATURES: dict[Callable, dict[str, Any]] = {
    torch.add: {"input": _REQUIRED, "other": _REQUIRED},
    torch.sub: {"input": _REQUIRED, "other": _REQUIRED},
    torch.mul: {"input": _REQUIRED, "other": _REQUIRED},
    torch.div: {"input": _REQUIRED, "other": _REQUIRED},
    torch.pow: {"input": _REQUIRED, "exponent": _REQUIRED},
    torch.mean: {"input": _REQUIRED, "dim": None, "keepdim": False},
    torch.sum: {"input": _REQUIRED, "dim": None, "keepdim": False},
    torch.softmax: {"input": _REQUIRED, "dim": _REQUIRED, "dtype": None},
    torch.logsumexp: {"input": _REQUIRED, "dim": _REQUIRED, "keepdim": False},
    torch.transpose: {"input": _REQUIRED, "dim0": _REQUIRED, "dim1": _REQUIRED},
    torch.unsqueeze: {"input": _REQUIRED, "dim": _REQUIRED},
    torch.chunk: {"input": _REQUIRED, "chunks": _REQUIRED, "dim": 0},
    torch.split: {"tensor": _REQUIRED, "split_size_or_sections": _REQUIRED, "dim": 0},
    torch.cat: {"tensors": _REQUIRED, "dim": 0},
    torch.stack: {"tensors": _REQUIRED, "dim": 0},
    torch.flatten: {"input": _REQUIRED, "start_dim": 0, "end_dim": -1},
    torch.repeat_interleave: {"input": _REQUIRED, "repeats": _REQUIRED, "dim": None},
    torch.addmm: {"input": _REQUIRED, "mat1": _REQUIRED, "mat2": _REQUIRED},
    baddbmm: {"input": _REQUIRED, "batch1": _REQUIRED, "batch2": _REQUIRED, "beta": 1, "alpha": 1},
    max_along: {"input": _REQUIRED, "dim": _REQUIRED, "keepdim": False},
    variance: {"input": _REQUIRED, "dim": _REQUIRED, "unbiased": True, "keepdim": False},
    grouped_mm: {"input": _REQUIRED, "weight": _REQUIRED, "offs": None, "bias": None, "out_dtype": None},
    grouped_mm_fallback: {"input": _REQUIRED, "weight": _REQUIRED, "offs": _REQUIRED},
    F.linear: {"input": _REQUIRED, "weight": _REQUIRED, "bias": None},
    gelu: {"input": _REQUIRED, "approximate": "none"},
    F.silu: {"input": _REQUIRED, "inplace": False},
    F.relu: {"input": _REQUIRED, "inplace": False},
    F.layer_norm: {"input": _REQUIRED, "normalized_shape": _REQUIRED, "weight": None, "bias": None, "eps": 1e-5},
    F.rms_norm: {"input": _REQUIRED, "normalized_shape": _REQUIRED, "weight": None, "eps": None},
    sdpa: {
        "query": _REQUIRED, "key": _REQUIRED, "value": _REQUIRED, "attn_mask": None, "dropout_p": 0.0,
        "is_causal": False, "scale": None, "enable_gqa": False,
    },
}  # fmt: skip
_DTYPE_METHODS = {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "int": torch.int32,
    "long": torch.int64,
    "bool": torch.bool,
}
_SHAPE_ARGS = {torch.reshape, torch.permute, torch.Tensor.expand}
_DIM_ARGS = {
    torch.mean: (1,), torch.sum: (1,), torch.softmax: (1,), torch.logsumexp: (1,), torch.transpose: (1, 2),
    torch.chunk: (2,), torch.split: (2,), torch.flatten: (1, 2), torch.cat: (1,), max_along: (1,),
    variance: (1,),
}  # fmt: skip


def normalize(graph: Graph) -> None:
    """Bring a Dynamo graph into normal form, in place. Every tensor node must carry ``meta["example_value"]``."""
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        if node.target is torch._C._log_api_usage_once or _is_unused_item(node):
            graph.erase_node(node)
            continue
        _canonical_call(node)
        source = _same_as(node)
        if source is not None:
            if is_tensor(node) and storage(node) != storage(source):
                _lie_in(node, value(source), storage(node))
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _lie_in(node: Node, made: Any, before: int | None) -> None:
    """Let ``node`` have the value ``made``, and what lies in its memory ``before`` be views of that: Dynamo gives the
    result of an idle dropout memory of its own, but it is the input itself."""
    node.meta["example_value"] = made
    for user in node.users:
        if before in map(memory, tree_leaves(value(user))):
            _lie_in(user, _made_again(user), before)


def _made_again(node: Node) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), value)
    fake = next(v for v in tree_leaves(args) if isinstance(v, FakeTensor))
    target = getattr(type(args[0]), node.target) if node.op == "call_method" else node.target
    with fake.fake_mode:
        return target(*args, **kwargs)


def _is_unused_item(node: Node) -> bool:
    """One of several results that nobody asks for, such as where a maximum is."""
    return node.target is operator.getitem and not node.users and isinstance(value(node.args[0]), (tuple, list))


def _canonical_call(node: Node) -> None:
    if not any(map(is_tensor, node.all_input_nodes)):
        return  # arithmetic on sizes
    if node.op == "call_method":
        dtype = _conversion(node)
        if dtype is not None:
            _become(node, cast, (node.args[0], dtype))
            return
        target = _METHODS.get(str(node.target))
        if target is None:
            return
    else:
        target = _FUNCTIONS.get(node.target, node.target)
        if isinstance(target, torch._ops.OpOverloadPacket):
            target = getattr(target, "default", target)
        if isinstance(target, torch._ops.OpOverload):
            target = _OVERLOADS.get(target.name(), target)
        if target is getattr and node.args[1] in ("T", "mT") and value(node).dim() == 2:
            _become(node, torch.transpose, (node.args[0], 0, 1))
            return
        if target is F.softmax:
            target = torch.softmax
    args = _positional(target, node)
    if args is not None:
        _become(node, *_shorter(target, args))
    if node.target in (torch.masked_fill, torch.where, torch.eq) and not node.kwargs:
        node.args = tuple([_number(arg, node) for arg in node.args])


def _number(arg: Any, user: Node) -> Any:
    """The number that ``arg`` makes a tensor of for ``user`` alone, which rounds it to the same."""
    made = is_tensor(arg) and arg.target in (torch.tensor, torch.scalar_tensor) and len(arg.args) == 1
    if not made or len(arg.users) > 1:
        return arg
    number, others = arg.args[0], {value(n).dtype for n in user.all_input_nodes if n is not arg} - {torch.bool}
    filled = type(number) in (int, float) and user.target is not torch.eq and others == {value(arg).dtype}
    return number if filled or type(number) is bool else arg


def _shorter(target: Callable, args: tuple) -> tuple[Callable, tuple]:
    """The shorter of two spellings of one view."""
    if target is torch.permute and all(isinstance(d, int) for d in args[1]):
        order = [_positive_dim(d, args[0]) for d in args[1]]
        moved = [place for place, dim in enumerate(order) if place != dim]
        return (torch.transpose, (args[0], *moved)) if len(moved) == 2 else (target, (args[0], tuple(order)))
    if target is operator.getitem and isinstance(args[1], tuple) and len(args[1]) == value(args[0]).dim():
        *others, last = args[1]
        if isinstance(last, slice) and all(isinstance(i, slice) and i == slice(None) for i in others):
            return target, (args[0], (Ellipsis, last))
    return target, args


def _positional(target: Callable, node: Node) -> tuple | None:
    """``node``'s arguments for ``target`` in order with defaults filled in, or None if they do not fit."""
    args, kwargs = node.args, dict(node.kwargs)
    if target in _SHAPE_ARGS:
        shape = args[1:] or tuple(kwargs.pop("shape", kwargs.pop("size", ())))
        if len(shape) == 1 and isinstance(value(shape[0]), tuple):
            if not isinstance(shape[0], (tuple, list)) and shape[0].target is not torch.Size:
                return None  # the size of another tensor, as one value
            shape = shape[0].args if isinstance(shape[0], Node) else shape
        shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else tuple(shape)
        return None if kwargs or (node.target == "view" and not _is_size(shape)) else (args[0], shape)
    if target is torch.Tensor.contiguous:
        return None if kwargs else args[:1]
    if target is torch.softmax and node.target is F.softmax:
        kwargs.pop("_stacklevel", None)
        args = args[:2] + args[3:]
    signature = _SIGNATURES.get(target)
    if signature is None:
        return None if kwargs else args
    if target is torch.cat and "axis" in kwargs:
        kwargs["dim"] = kwargs.pop("axis")
    names = list(signature)
    bound = {**signature, **dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or len(bound) != len(names) or any(arg is _REQUIRED for arg in bound.values()):
        return None
    if bound.pop("inplace", False):
        return None
    filled = list(bound.values())
    if target in (max_along, variance) and type(bound["dim"]) is not int:
        return None  # of all elements, or of two tensors
    for position in _DIM_ARGS.get(target, ()):
        filled[position] = _positive_dim(filled[position], filled[0])
    if target is torch.transpose and all(isinstance(d, int) for d in filled[1:]):
        filled[1:] = sorted(filled[1:])
    return tuple(filled)


def _is_size(shape: tuple) -> bool:
    return all(not isinstance(s, torch.dtype) for s in shape)  # view(dtype) reinterprets memory


def _positive_dim(dim: Any, tensor: Any) -> Any:
    first = tensor[0] if isinstance(tensor, (tuple, list)) else tensor
    rank = value(first).dim()
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    return dim + rank if isinstance(dim, int) and not isinstance(dim, bool) and dim < 0 else dim


def _conversion(node: Node) -> torch.dtype | None:
    """The dtype a method call converts to, if that is all it does."""
    name = str(node.target)
    if name in _DTYPE_METHODS:
        return _DTYPE_METHODS[name] if len(node.args) == 1 and not node.kwargs else None
    if name not in ("to", "type", "type_as"):
        return None
    source, result = value(node.args[0]), value(node)
    flags = [arg for arg in node.args if isinstance(arg, bool)]  # non_blocking, copy
    copies = node.kwargs.get("copy") or flags[1:] == [True]
    if source.device != result.device or copies or "memory_format" in node.kwargs:
        return None
    return result.dtype


def _become(node: Node, target: Callable, args: tuple) -> None:
    node.op, node.target, node.args, node.kwargs = "call_function", target, args, {}


_COMPARISONS = (operator.le, operator.gt, operator.and_)


def _is_true_and(node: Node) -> bool:
    """Whether ``node`` is the one use of a comparison, whose memory is its own, and of one bool made as True."""
    if node.target is not operator.and_ or not all(is_tensor(a) and len(a.users) == 1 for a in node.args):
        return False
    true, other = node.args
    made = true.target == "new_ones" and value(true).dim() == 0 and value(true).dtype is torch.bool
    return made and other.target in _COMPARISONS and value(other).dtype is torch.bool


def _same_as(node: Node) -> Node | None:
    """The input that ``node`` merely passes on."""
    if node.target in (F.dropout, torch.dropout):
        bound = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
        idle = bound.get("training", True) is False or bound.get("p", 0.5) == 0.0
        known = idle and (storage(node) == storage(bound["input"]) or is_plain_tensor(node))
        return bound["input"] if known else None
    if _is_true_and(node):
        return node.args[1]
    source = node.args[0] if node.args else None
    if not is_tensor(source) or not is_tensor(node):
        return None
    before, after = value(source), value(node)
    if node.target is cast:
        return source if before.dtype == after.dtype else None
    if node.target in (torch.reshape, torch.Tensor.expand):
        return source if same_shape(before, after) else None
    if node.target is torch.Tensor.contiguous:
        return source if is_static(before) and before.is_contiguous() else None
    return None
