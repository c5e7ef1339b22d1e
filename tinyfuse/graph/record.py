"""A graph of one call of a model, at the level of torch functions, recorded by running the call on fake tensors.

The decode loop knows every tensor of a call and repeats the call on the same memory, so it needs none of Dynamo's
bytecode analysis: one run of the Python code under a ``TorchFunctionMode`` gives the same graph several times sooner.
What a run cannot show (a value of a tensor that decides what the code does) ends the recording with the reason.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.fx import Graph, Node, Proxy
from torch.fx.experimental.symbolic_shapes import (
    SYMPY_INTERP,
    DimDynamic,
    ShapeEnv,
    SLoc,
    StatelessSymbolicContext,
    free_unbacked_symbols,
)
from torch.fx.node import _get_qualified_name, map_aggregate
from torch.fx.proxy import GraphAppendingTracer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis


class Declined(Exception):
    """The call cannot be recorded; the message says why."""


@dataclass
class Given:
    """A tensor that a call is given: its sizes in ``dynamic`` dimensions, which must exceed 1, may differ next time.

    Tensors of one ``group`` that agree in their sizes now always will.
    """

    tensor: Tensor
    dynamic: Sequence[int] = ()
    group: str = ""


@dataclass
class Recording:
    """What belongs to a recorded graph. It takes ``symbols`` (sizes, as (name of a given tensor, dimension)), then the
    given tensors in their order, then ``constants``, and returns the tensors among what the call returned. Of all
    other tensors the code saw those that it ``met``, if only their sizes.
    """

    symbols: list[tuple[str, int]]
    constants: list[Tensor]
    met: list[Tensor]
    result: Callable[[Iterator[Any]], Any]
    guard: CodeType | None
    guarded: list[str]

    def rebuild(self, outputs: Sequence[Any]) -> Any:
        """What the call returns, with the graph's ``outputs`` in it."""
        return self.result(iter(outputs))

    def holds(self, given: Mapping[str, Tensor]) -> bool:
        """Whether the sizes of ``given`` tensors lead to the same graph."""
        if self.guard is None:
            return True
        tensors = {f"t{i}": given[name] for i, name in enumerate(self.guarded)}
        return bool(eval(self.guard, SYMPY_INTERP, {"L": tensors}))


class _Shapes(ShapeEnv):
    """Notes no line of code beside a guard: to find the user's it would import Inductor, half a second or more."""

    def _get_stack_summary(self, is_debug: bool = False, framework_loc: str | None = None) -> tuple[SLoc, str]:
        return SLoc(framework_loc or "", None), ""  # torch 2.11 cannot print a place that is None


def record(
    call: Callable[[dict[str, FakeTensor]], Any], given: Mapping[str, Given], modules: Mapping[int, str]
) -> tuple[Graph, Recording]:
    """Record ``call(fakes)``, where ``fakes`` stand for the ``given`` tensors, which are not touched.

    ``modules``: the paths of the modules it may enter, by ``id``. Raises Declined, and what the call raises.
    """
    mode = FakeTensorMode(shape_env=_Shapes(), allow_non_fake_inputs=True, static_shapes=True)
    recorder = _Recorder(mode, modules)
    fakes = {name: recorder.stand_in(name, item) for name, item in given.items()}
    symbols = recorder.take(fakes)
    with _compiling(), enable_python_dispatcher(), mode, recorder:
        result = call(fakes)
    if recorder.declined is not None:  # and the call went on
        raise recorder.declined
    leaves, spec = tree_flatten(result)
    recorder.graph.output([recorder.operand(leaf) for leaf in leaves if isinstance(leaf, Tensor)])
    leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def rebuild(outputs: Iterator[Any]) -> Any:
        return tree_unflatten([next(outputs) if leaf is _TENSOR else leaf for leaf in leaves], spec)

    guarded: dict[Any, str] = {}
    for name, fake in fakes.items():
        guarded.setdefault((given[name].group or name, str(fake.shape)), name)
    guarded = list(guarded.values())
    expression = mode.shape_env.produce_guards_expression([fakes[name] for name in guarded])
    guard = compile(expression, "<guards>", "eval") if expression else None
    return recorder.graph, Recording(symbols, recorder.constants, recorder.met, rebuild, guard, guarded)


_TENSOR = object()


@contextmanager
def _compiling() -> Iterator[None]:
    """Models take the way that they take under Dynamo: no look at the values of masks."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


_OPERATORS = {
    f"__{name}__": (getattr(operator, f"__{name}__"), False)
    for name in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift",
        "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "neg", "invert",
        "abs", "lt", "le", "gt", "ge", "eq", "ne", "getitem", "setitem",
    )
} | {
    f"__r{name}__": (getattr(operator, f"__{name}__"), True)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
} | {"__rdiv__": (operator.truediv, True), "__div__": (operator.truediv, False)}  # fmt: skip
# By the function, for some have another name: Tensor.__pow__ is called pow.
_FUNCTIONS = {getattr(Tensor, name): entry for name, entry in _OPERATORS.items() if hasattr(Tensor, name)}
_CONSTANTS = (
    int, float, complex, bool, str, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_READS = {
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "data_ptr",
    "equal", "allclose", "is_nonzero", "__contains__", "__reduce_ex__", "__deepcopy__", "untyped_storage", "storage",
}  # fmt: skip


def _declared_to_write(func: Any, name: str) -> bool:
    """By schema or by name: custom operators and data-less writes may leave a tensor's version as it is."""
    if isinstance(func, OpOverloadPacket):
        return any(getattr(func, overload)._schema.is_mutable for overload in func.overloads())
    if isinstance(func, OpOverload):
        return func._schema.is_mutable
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _version(tensor: Tensor) -> int | None:
    """How often it was written; what inference mode made does not count."""
    return None if tensor.is_inference() else tensor._version


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """What ``F.linear`` gives, in a tenth of the time that symbolic shapes take through its decomposition."""
    fits = isinstance(x.shape[-1], int) and weight.dim() == 2 and weight.shape[1] == x.shape[-1]
    fits = fits and x.dtype == weight.dtype
    if not fits or (bias is not None and (bias.dtype, bias.shape) != (x.dtype, weight.shape[:1])):
        return None
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def _described(value: Any) -> Any:
    """What a function's result can look like by: the metadata of tensors, other arguments themselves."""
    if isinstance(value, Tensor):
        sizes = *value.shape, *value.stride()
        return value.dtype, value.device, *[s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes]
    if isinstance(value, (tuple, list)):
        return type(value), *map(_described, value)
    if isinstance(value, dict):
        return tuple([(name, _described(item)) for name, item in value.items()])
    if isinstance(value, slice):
        return slice, *map(_described, (value.start, value.stop, value.step))
    if isinstance(value, torch.SymInt):
        return value.node.expr
    return (type(value), value) if type(value) in _CONSTANTS else object()  # which equals nothing


def _importable(func: Any) -> bool:
    """Whether the code of a graph can name ``func``."""
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        return True
    *path, name = _get_qualified_name(func).split(".")
    found = sys.modules.get(path[0])
    for part in (*path[1:], name):
        found = getattr(found, part, None)
    return found is func


class _Recorder(TorchFunctionMode):
    """Appends a node to ``graph`` for every torch function that gives or changes a tensor."""

    def __init__(self, mode: FakeTensorMode, modules: Mapping[int, str]):
        super().__init__()
        self.mode, self.modules = mode, modules
        self.graph = Graph()
        self.constants: list[Tensor] = []
        self.met: list[Tensor] = []
        self.nodes: dict[int, Node] = {}
        self.given: set[int] = set()
        self.alive: list[Any] = []  # ids stay unique while their objects live
        self.sizes: dict[Any, Node] = {}
        self.known: dict[Any, Any] = {}  # what a call gave, by what it looked like
        self.last: Node | None = None
        self.declined: Declined | None = None

    def stand_in(self, name: str, item: Given) -> FakeTensor:
        looks = item.group or name, tuple(item.dynamic), _described(item.tensor)
        if looks not in self.known:
            kinds = [DimDynamic.DUCK if d in item.dynamic else DimDynamic.STATIC for d in range(item.tensor.dim())]
            strides = [DimDynamic.INFER_STRIDE] * len(kinds)
            context = StatelessSymbolicContext(dynamic_sizes=kinds, dynamic_strides=strides)
            self.known[looks] = self.mode.from_tensor(
                item.tensor, static_shapes=False, symbolic_context=context, source=ConstantSource(name)
            )
            return self.known[looks]
        return self._twin(self.known[looks])

    def take(self, fakes: Mapping[str, FakeTensor]) -> list[tuple[str, int]]:
        """Placeholders for the sizes that may change and for ``fakes``; where the sizes are found."""
        found: dict[Any, tuple[str, int]] = {}
        for name, fake in fakes.items():
            for dim, size in enumerate(fake.shape):
                if isinstance(size, torch.SymInt) and size.node.expr not in found:
                    found[size.node.expr] = name, dim
                    self.sizes[size.node.expr] = self._placeholder(f"s{len(self.sizes)}", size)
        for name, fake in fakes.items():
            self._know(fake, self._placeholder(name.replace(".", "_"), fake))
            self.given.add(id(fake))
        return list(found.values())

    def _placeholder(self, name: str, value: Any) -> Node:
        if self.last is None:
            self.last = self.graph.placeholder(name)
        else:
            with self.graph.inserting_after(self.last):
                self.last = self.graph.placeholder(name)
        self.last.meta["example_value"] = value
        return self.last

    def _know(self, tensor: Tensor, node: Node) -> None:
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        try:
            return self._call(func, args, kwargs or {})
        except Declined as reason:
            self.declined = reason
            raise

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if func is Tensor.__iter__:
            with self:
                return iter(torch.unbind(args[0]))
        if name in _READS:
            raise Declined(f"the model looks at the value of a tensor ({name})")
        if name == "__set__":
            raise Declined("the model sets an attribute of a tensor")
        if name == "_enter_autocast" and True in args[2:3]:
            raise Declined("the model enters autocast")
        call = func, _described(args), _described(kwargs)
        if call in self.known:
            result = tree_map(self._twin, self.known[call])
            self._append(func, name, args, kwargs, result, tree_leaves(result))
            return result
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.met += [tensor for tensor in given if not isinstance(tensor, FakeTensor)]
        before = list(map(_version, given))
        result = _linear(*args) if func is F.linear and not kwargs else None
        result = func(*args, **kwargs) if result is None else result
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        changes = before != list(map(_version, given)) or _declared_to_write(func, name)
        passed_on = args[0] if args else None  # as by a conversion to the dtype that it has
        if changes or any(tensor is not passed_on for tensor in tensors):
            self._append(func, name, args, kwargs, result, tensors)
            if not changes and self._repeats(result, tensors, given):
                self.known[call] = tree_map(self._twin, result)
        return result

    def _repeats(self, result: Any, tensors: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
        """Whether a call with arguments that look the same would give new tensors that look like these."""
        new = not {id(tensor) for tensor in tensors} & {id(tensor) for tensor in given}
        return new and type(result) in (FakeTensor, tuple, list) and not any(map(free_unbacked_symbols, tensors))

    def _twin(self, tensor: FakeTensor) -> FakeTensor:
        """A tensor of the same looks, in a tenth of the time that symbolic sizes take through an operation. That they
        share their memory, which is none, and its version is not seen: writes are looked for call by call."""
        device = tensor.device
        with in_kernel_invocation_manager(self.mode):
            return FakeTensor(self.mode, tensor, device)

    def _append(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor) or tensor.fake_mode is not self.mode:
                raise Declined(f"{name} gives a tensor that is not of this recording")
        args, kwargs = self.operand(tuple(args)), self.operand(dict(kwargs))
        if name == "__get__":
            node = self.graph.call_function(getattr, (args[0], func.__self__.__name__))
        elif written_as := _FUNCTIONS.get(func, _OPERATORS.get(name)):
            target, swapped = written_as
            node = self.graph.call_function(target, args[::-1] if swapped else args)
        elif getattr(Tensor, name, None) is func:
            node = self.graph.call_method(name, args, kwargs)
        elif _importable(func):
            node = self.graph.call_function(func, args, kwargs)
        else:
            raise Declined(f"the model calls a function that cannot be imported by its name ({name})")
        path, kind = self._module()
        node.meta |= {"example_value": result, "nn_module_stack": {path: (path, kind)}}
        self._results(node, result)

    def _results(self, node: Node, result: Any) -> None:
        if isinstance(result, Tensor):
            if id(result) not in self.given:  # an input that is written in place stays the input
                self._know(result, node)
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                part = self.graph.call_function(operator.getitem, (node, index))
                part.meta |= {"example_value": item, "nn_module_stack": node.meta["nn_module_stack"]}
                self._results(part, item)
        elif result is not None:
            raise Declined(f"a function gives a {type(result).__name__}")

    def operand(self, value: Any) -> Any:
        """``value`` with the nodes of its tensors and sizes."""
        return map_aggregate(value, self._operand)

    def _operand(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.nodes[id(value)] if id(value) in self.nodes else self._constant(value)
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise Declined("a number is computed from a size")
        if type(value) in _CONSTANTS:
            return value
        if isinstance(value, np.generic):  # a number that code cannot spell; an array would lose its shape
            return value.item()
        if isinstance(value, int):  # of an enumeration
            return int(value)
        raise Declined(f"a torch function is given a {type(value).__name__}")

    def _constant(self, tensor: Tensor) -> Node:
        if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise Declined(f"the model holds a {type(tensor).__name__}, or makes tensors outside of torch functions")
        looks = _described(tensor)
        if looks not in self.known:
            self.known[looks] = self.mode.from_tensor(tensor, static_shapes=True)
        fake = self._twin(self.known[looks])
        fake._is_param = isinstance(tensor, torch.nn.Parameter)
        node = self._placeholder(f"constant{len(self.constants)}", fake)
        node.meta["constant"] = True
        self.constants.append(tensor)
        self._know(tensor, node)
        return node

    def _size(self, size: torch.SymInt) -> Any:
        expr = size.node.expr
        if expr.is_number:
            return int(expr)
        if expr not in self.sizes:
            tracer = GraphAppendingTracer(self.graph)
            known = {symbol: Proxy(node, tracer) for symbol, node in self.sizes.items() if symbol.is_symbol}
            before = len(self.graph.nodes)
            made = sympy_interp(PythonReferenceAnalysis, known, expr).node
            for node in list(self.graph.nodes)[before:]:
                values = [a.meta["example_value"] if isinstance(a, Node) else a for a in node.args]
                node.meta["example_value"] = node.target(*values)
            self.sizes[expr] = made
        return self.sizes[expr]

    def _module(self) -> tuple[str, type | None]:
        """The module whose code runs: the nearest ``self`` that is one."""
        frame = sys._getframe(4)
        while frame is not None:
            code = frame.f_code
            if code.co_argcount and code.co_varnames[0] == "self":
                owner = frame.f_locals.get("self")
                if id(owner) in self.modules:
                    return self.modules[id(owner)], type(owner)
            frame = frame.f_back
        return "", None
