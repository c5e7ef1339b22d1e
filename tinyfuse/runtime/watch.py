"""Whether a model's Python state is what it was: what its forward may read besides its arguments.

That is its modules, the memory of its weights, attributes, hooks, configurations and classes, and whatever their code
names: helpers, globals, closures, defaults, objects and containers in one another. A library's code is known by
identity alone. Objects that no code mentions by the name of their attribute, as a tokenizer, are not looked into.
"""

from __future__ import annotations

import copy
import functools
import os
import random
import sys
import types
from collections import deque
from collections.abc import Iterable, Mapping
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

# nn.Module's own containers that do not bear on its forward: there are many.
UNWATCHED = vars(nn.Module()).keys() - {"_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"}
LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "triton", "tinyfuse"}
MODELS = "transformers.models."  # of transformers' functions those that are looked into
CONTAINERS = (dict, list, set, deque)
PLAIN = {bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size}
REMEMBERING = type(functools.lru_cache(len))
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
INNER = {
    functools.partial: ("func", "args", "keywords"), types.MethodType: ("__func__", "__self__"), property: ("fget",),
    types.BuiltinMethodType: ("__self__",), staticmethod: ("__func__",), classmethod: ("__func__",),
    functools.cached_property: ("func",), REMEMBERING: ("__wrapped__",),
}  # fmt: skip
# What makes an object names all of its attributes. That of nn.Module is replaced by Dynamo.
CONSTRUCTION = {"__init__", "__new__", "__post_init__", "__setstate__"}
ABSENT = object()


class Watch:
    """The state of ``model`` as it is now. ``tensors``, ``generators`` and ``remembering`` (functions that keep
    results): those that its code may reach."""

    def __init__(self, model: nn.Module):
        found = _Found()
        found.look_at(model)
        self.containers = [(container, copy.copy(container)) for container in found.containers]
        self.classes = [(cls, dict(vars(cls))) for cls in found.classes]
        self.names, self.slots = list(found.names.values()), found.slots
        self.tensors, self.generators, self.remembering = found.tensors, found.generators, found.remembering
        self.seeds = "manual_seed" in found.mentioned
        self.weights = [*model.parameters(), *model.buffers()]
        self.met: dict[int, Tensor] | None = None  # tensors that code has used; None: that is not known
        self.memory = self._memory()

    def _memory(self) -> list[Any]:
        return [(t.data_ptr(), t.dtype) for t in self.weights]

    def add(self, tensors: list[Tensor], met: list[Tensor]) -> None:
        """Watch the memory of more tensors, for code has used them. What it has not ``met`` besides may be replaced."""
        for now, then in self.containers:
            if isinstance(now, dict):
                then.update([(name, item) for name, item in now.items() if self._replaced(item, then.get(name))])
        self.met = (self.met or {}) | {id(tensor): tensor for tensor in (*tensors, *met)}
        known = set(map(id, self.weights))
        self.weights += [tensor for tensor in tensors if id(tensor) not in known]
        self.memory = self._memory()

    def changed(self) -> bool:
        return (
            any(_differ(now, then) and not self._unmet(now, then) for now, then in self.containers)
            or any(_differ(vars(cls), then) for cls, then in self.classes)
            or any(owner.get(name, ABSENT) is not value for owner, name, value in self.names)
            or any(_slot(owner, name) is not value for owner, name, value in self.slots)
            or self._memory() != self.memory
        )

    def _unmet(self, now: Any, then: Any) -> bool:
        """Whether they differ only in tensors that no code has used: what prepares a call may leave some behind."""
        if self.met is None or not isinstance(now, dict) or now.keys() != then.keys():
            return False
        others = {name: item for name, item in now.items() if not self._replaced(item, then[name])}
        return not _differ(others, {name: then[name] for name in others})

    def _replaced(self, now: Any, then: Any) -> bool:
        """Whether one tensor stands for another, and no code has used either."""
        return type(now) is type(then) is Tensor and not {id(now), id(then)} & (self.met or {}).keys()

    def restore(self) -> None:
        """Put back all but the memory of weights."""
        for owner, name, value in self.names:
            owner[name] = value
        for owner, name, value in self.slots:
            if value is not ABSENT and _slot(owner, name) is not value:
                setattr(owner, name, value)
        for now, then in self.containers:
            if _differ(now, then):
                _put_back(now, then)
        for cls, then in self.classes:
            for name, value in then.items():
                if vars(cls).get(name, ABSENT) is not value:
                    setattr(cls, name, value)
            for name in vars(cls).keys() - then.keys():
                delattr(cls, name)


def _differ(now: Any, then: Any) -> bool:
    try:
        return now.tobytes() != then.tobytes() if isinstance(now, np.ndarray) else now != then
    except Exception:  # arrays were compared, so one stands where another one stood
        return True


def _put_back(now: Any, then: Any) -> None:
    if isinstance(now, np.ndarray):
        now[...] = then
        return
    now.clear()
    now.extend(then) if isinstance(now, (list, deque)) else now.update(then)


def _slot(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except (AttributeError, ValueError):  # an empty slot, an empty cell
        return ABSENT


class _Found:
    """What is behind an object: ``containers``, those of attributes too, and ``classes``; global ``names`` with their
    dictionaries; ``slots``, attributes outside of a dictionary; ``tensors``, random ``generators``, functions that are
    ``remembering``. What is in ``unnamed`` waits for code that mentions its name."""

    def __init__(self) -> None:
        self.containers: list[Any] = []
        self.classes: list[type] = []
        self.names: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self.slots: list[tuple[Any, str, Any]] = []
        self.tensors: list[Tensor] = []
        self.generators: list[Any] = []
        self.remembering: list[Any] = []
        self.mentioned = {"forward", "_modules", "_parameters", "_buffers"}
        self.unnamed: dict[str, list[Any]] = {}
        self.known: dict[int, Any] = {}  # ids stay unique while their objects live
        self.searched: set[tuple[int, frozenset[str]]] = set()

    def look_at(self, value: Any) -> None:
        left = [value]
        while left:
            value = left.pop()
            if type(value) not in PLAIN and id(value) not in self.known:
                self.known[id(value)] = value
                left += self._behind(value)

    def _behind(self, value: Any) -> Iterable[Any]:
        if isinstance(value, (*CONTAINERS, np.ndarray)):
            self.containers.append(value)
        if isinstance(value, dict):
            return list(value.values())
        if isinstance(value, (*CONTAINERS, tuple)):
            return list(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if type(value) is REMEMBERING:
            self.remembering.append(value)
        if isinstance(value, GENERATORS):
            self.generators.append(value)
        if type(value) in INNER:
            return [getattr(value, name) for name in INNER[type(value)]]
        return self._object(value)

    def _object(self, value: Any) -> list[Any]:
        kind = type(value)
        if isinstance(value, Tensor):
            self.tensors.append(value)
        if value is os.environ:
            self.containers.append(value._data)
        if not isinstance(value, (nn.Module, Tensor, types.SimpleNamespace)) and _of_library(kind.__module__):
            return []
        slots = [(value, name, _slot(value, name)) for name in _members(kind)]
        self.slots += slots
        return [kind, *(item for _, _, item in slots), *self._attributes(value)]

    def _attributes(self, owner: Any) -> list[Any]:
        attributes = getattr(owner, "__dict__", None)
        if not isinstance(attributes, dict):
            return []
        if isinstance(owner, Tensor):  # on which Dynamo leaves marks
            self.names |= {(id(attributes), name): (attributes, name, item) for name, item in attributes.items()}
            return list(attributes.values())
        self.containers.append(attributes)
        if isinstance(owner, PretrainedConfig):
            return list(attributes.values())
        hidden = UNWATCHED if isinstance(owner, nn.Module) else ()
        return self._named({name: item for name, item in attributes.items() if name not in hidden})

    def _class(self, cls: type) -> list[Any]:
        methods = vars(cls).items() if issubclass(cls, nn.Module) else ()  # which code may find by another name
        methods = [(name, m) for name, m in methods if type(m) in (FunctionType, *INNER) and name not in CONSTRUCTION]
        if _of_library(cls.__module__):
            self.slots += [(cls, name, method) for name, method in methods if isinstance(method, FunctionType)]
            return list(cls.__bases__)
        self.classes.append(cls)
        return [*cls.__bases__, *(method for _, method in methods), *self._named(vars(cls))]

    def _named(self, attributes: Mapping[str, Any]) -> list[Any]:
        """The values whose names are mentioned or needed by Python itself, and what is the model's in any case."""
        found = []
        for name, item in attributes.items():
            operator = name.startswith("__") and isinstance(item, FunctionType) and name not in CONSTRUCTION
            if operator or name in self.mentioned or isinstance(item, (nn.Module, Tensor, PretrainedConfig)):
                found.append(item)
            elif type(item) not in PLAIN:
                if isinstance(item, CONTAINERS):
                    self.containers.append(item)
                self.unnamed.setdefault(name, []).append(item)
        return found

    def _function(self, function: FunctionType) -> list[Any]:
        module = str(function.__globals__.get("__name__"))
        if _of_library(module) or (module.startswith("transformers.") and not module.startswith(MODELS)):
            return [vars(function).get("__wrapped__")]
        slots = [(function, name) for name in ("__code__", "__defaults__", "__kwdefaults__")]
        slots += [(cell, "cell_contents") for cell in function.__closure__ or ()]
        slots = [(owner, name, _slot(owner, name)) for owner, name in slots]
        self.slots += slots
        names = _mentions(function.__code__)
        found = [item for _, _, item in slots] + self._attributes(function) + self._globals(function.__globals__, names)
        for name in names - self.mentioned:
            found += self.unnamed.pop(name, ())
        self.mentioned |= names
        return found

    def _globals(self, space: dict[str, Any], names: frozenset[str]) -> list[Any]:
        """What ``names`` mean in a module, and in modules that it names."""
        if (id(space), names) in self.searched:
            return []
        self.searched.add((id(space), names))
        found = [os.environ] if space is vars(os) and "getenv" in names else []
        for name in names & space.keys():
            value = space[name]
            self.names[id(space), name] = space, name, value
            found += [value, *(self._globals(vars(value), names) if isinstance(value, ModuleType) else ())]
        return found


def _of_library(module: Any) -> bool:
    return str(module).partition(".")[0] in LIBRARIES


@functools.lru_cache(maxsize=1 << 14)
def _mentions(code: types.CodeType) -> frozenset[str]:
    """Names of globals and attributes, and texts that may be some."""
    inner = [_mentions(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union({c for c in code.co_consts if isinstance(c, str)}, *inner)


@functools.lru_cache(maxsize=1 << 14)
def _members(kind: type) -> list[str]:
    """The attributes that objects of ``kind`` keep outside of a dictionary."""
    members = [member for cls in kind.__mro__ for member in vars(cls).items() if not member[0].startswith("__")]
    return [name for name, item in members if isinstance(item, types.MemberDescriptorType)]
