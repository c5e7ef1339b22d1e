"""The graphs of the decode loop: one model's forward, recorded for the kinds of calls that the loop makes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.cache_utils import StaticCache, StaticLayer
from transformers.utils import ModelOutput

from tinyfuse import choices, fallback
from tinyfuse.fallback import FallbackError
from tinyfuse.graph.nodes import autocast_is_on
from tinyfuse.graph.record import Declined, Given, Recording, record
from tinyfuse.report import Report, collect
from tinyfuse.runtime.captured import no_collection
from tinyfuse.runtime.forward import CACHE, GraphCall, hooked, sequence_dims
from tinyfuse.runtime.rehearsal import unchanged
from tinyfuse.runtime.watch import Watch
from tinyfuse.runtime.window import WindowLayer

MOST = 4  # recordings of one kind, which differ in what the code decided by sizes
MOST_CHANGES = 8  # of the model between calls in a row, each recorded anew
STATE = ("keys", "values", "cumulative_length")
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass
class Compiled:
    recording: Recording
    run: Callable[..., Any]
    kind: type[ModelOutput]


@dataclass
class Bound:
    """One call: ``graph`` runs it, ``result`` makes the forward's return value from what the graph returns."""

    graph: GraphCall
    result: Callable[[Any], ModelOutput]


class Recordings:
    """Calls of ``forward`` as recorded graphs, one for all lengths of prompts and caches.

    ``version`` moves on when a change of the model has made all graphs invalid.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., ModelOutput], report: Report):
        self.model, self.forward, self.report = model, forward, report
        self.watch: Watch | None = None
        self.compiled: dict[Any, list[Compiled]] = {}
        self.declined: dict[Any, str] = {}
        self.version = self.changes = 0

    def refresh(self) -> None:
        """Look whether the model has changed; to be called before each use of the graphs in a row."""
        if self.watch is not None and not self.watch.changed():
            self.changes = 0
            return
        self.changes += self.watch is not None
        self.watch = Watch(self.model)
        self.compiled.clear()
        self.declined.clear()
        self.version += 1

    def bind(
        self,
        arguments: dict[str, Any],
        stage: str,
        after: Callable[[ModelOutput], None] | None = None,
        beside: Callable[[Bound], None] | None = None,
    ) -> Bound | str:
        """The graph of ``forward(**arguments)``, or why there is none. Calls of one ``stage`` share graphs. ``after``:
        what follows on it, whose kernels are compiled with those of the graph. ``beside`` binds what else is known to
        be needed, before kernels are compiled: all at once."""
        if autocast_is_on():
            return "autocast is on"
        if self.changes > MOST_CHANGES:
            return f"what the model's code reads changed before each of the last {MOST_CHANGES} calls"
        try:
            given, rest = _split(arguments)
        except Declined as reason:
            return str(reason)
        kind = (stage, *_kind(given), *rest)
        if kind in self.declined:
            return self.declined[kind]
        tensors = {name: item.tensor for name, item in given.items()}
        known = self.compiled.setdefault(kind, [])
        found = next((c for c in known if c.recording.holds(tensors)), None)
        if found is None:
            try:
                with no_collection():
                    found = self._record(arguments, given, len(known))
                    _compile_kernels(_bound(found, arguments, tensors), after, beside)
            except FallbackError:
                raise
            except Exception as error:
                name = "" if isinstance(error, Declined) else f"{type(error).__name__}: "
                self.declined[kind] = name + str(error).partition("\n")[0]
                return self.declined[kind]
            known.append(found)
        return _bound(found, arguments, tensors)

    def _record(self, arguments: dict[str, Any], given: dict[str, Given], known: int) -> Compiled:
        from tinyfuse.backend import compile_graph  # every pattern and kernel; not on the way of `import tinyfuse`

        if known >= MOST:
            raise Declined(f"the sizes of its inputs lead the model's code more than {MOST} ways")
        if hooked(self.model):
            raise Declined("a module has forward hooks")
        kinds: list[type[ModelOutput]] = []

        def call(fakes: dict[str, Tensor]) -> dict[str, Any]:
            mirror = _mirror(arguments, fakes)
            before = _layer_state(mirror)
            outputs = self.forward(**mirror)
            if _layer_state(mirror) != before:
                raise Declined("the cache changes otherwise than in place")
            if not isinstance(outputs, ModelOutput):
                raise Declined(f"the forward returns a {type(outputs).__name__}")
            kinds.append(type(outputs))
            return {name: _leaf(value, mirror.get(CACHE)) for name, value in outputs.items()}

        with unchanged(self.model):
            graph, recording = record(call, given, {id(module): path for path, module in self.model.named_modules()})
        if self.watch is not None:
            self.watch.add(recording.constants, recording.met)
        with collect(self.report):
            return Compiled(recording, compile_graph(graph), kinds[0])


def wake(device: torch.device) -> None:
    """Let the compiler of kernels begin with what takes it long; nothing waits for it."""
    from tinyfuse.kernels import _triton

    if device.type == "cuda" and not _triton.missing:
        _triton.awakening(device.index)


def _compiles_ahead(gpu: torch.device | None) -> bool:
    """Whether kernels are compiled before their first run, side by side, which the run would do one after the other:
    those of a 7B's prompt and token take 10 s of one core. On GPUs whose kernels are chosen by time the run has to come
    first."""
    from tinyfuse.kernels import _triton

    return gpu is not None and not _triton.missing and not choices.measures(gpu)


def _compile_kernels(
    bound: Bound, after: Callable[[ModelOutput], None] | None, beside: Callable[[Bound], None] | None
) -> None:
    """Compile the kernels of a call and of what follows; arguments as in :meth:`Recordings.bind`."""
    from tinyfuse.kernels import _triton

    gpu = next((a.device for a in bound.graph.args if isinstance(a, Tensor) and a.device.type == "cuda"), None)
    if not _compiles_ahead(gpu):
        return
    try:
        with torch.cuda.device(gpu), _triton.side_by_side():
            if beside is not None:
                beside(bound)
            _rehearse(bound, after)
    except Exception as error:
        fallback.record("compile", f"kernels are compiled one by one: {type(error).__name__}: {error}", error)


def _rehearse(bound: Bound, after: Callable[[ModelOutput], None] | None) -> None:
    from tinyfuse.kernels import _triton

    with FakeTensorMode(allow_non_fake_inputs=True), _triton.rehearsal():
        outputs = bound.graph.run(*_fakes(bound.graph.args))
        if after is not None:
            after(bound.result(outputs))


def _fakes(args: Sequence[Any]) -> list[Any]:
    """``args`` with tensors made anew, one for all that look alike: fake ones have no memory to tell them apart."""
    made: dict[Any, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        looks = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        if looks not in made:
            made[looks] = torch.empty_strided(*looks[:2], dtype=tensor.dtype, device=tensor.device)
        return made[looks]

    return [fake(arg) if isinstance(arg, Tensor) else arg for arg in args]


class _Cache:
    """Stands for the cache among a forward's outputs."""


def _leaf(value: Any, cache: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)([_leaf(item, cache) for item in value])
    if isinstance(value, (Tensor, *PLAIN)):
        return value
    if value is not cache:
        raise Declined(f"the forward returns a {type(value).__name__}")
    return _Cache


def _bound(found: Compiled, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> Bound:
    sizes = [tensors[name].shape[dim] for name, dim in found.recording.symbols]
    args = (*sizes, *tensors.values(), *found.recording.constants)
    cache = arguments.get(CACHE)

    def result(outputs: Any) -> ModelOutput:
        fields = found.recording.rebuild(outputs)
        return found.kind(**{name: cache if value is _Cache else value for name, value in fields.items()})

    return Bound(GraphCall(found.run, args), result)


def _split(arguments: dict[str, Any]) -> tuple[dict[str, Given], list[Any]]:
    """The tensors of a call by name, those of dictionaries and of the cache too, and what else it is given."""
    given: dict[str, Given] = {}
    rest: list[Any] = []
    for name, value in arguments.items():
        if name == CACHE and type(value) is StaticCache:
            given |= _cache_tensors(value)
            rest.append((name, "windows", tuple(getattr(layer, "window", None) for layer in value.layers)))
            continue
        for key, item in value.items() if type(value) is dict else [("", value)]:
            if isinstance(item, Tensor):
                given[f"{name}.{key}"] = Given(item.contiguous(), sequence_dims(name, item))
            elif isinstance(item, PLAIN):
                rest.append((name, key, item))
            else:
                raise Declined(f"the argument {name} is a {type(item).__name__}")
    return given, rest


def _cache_tensors(cache: StaticCache) -> dict[str, Given]:
    given = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, StaticLayer):
            for name in STATE:
                tensor = getattr(layer, name)
                dynamic = (2,) if tensor.dim() == 4 and not isinstance(layer, WindowLayer) else ()
                given[f"{CACHE}.{index}.{name}"] = Given(tensor, dynamic, CACHE)
    return given


def _kind(given: dict[str, Given]) -> tuple[Any, ...]:
    """What calls that may share a recording have in common; the layers of a model's caches are all alike."""
    seen = [(name, item) for name, item in given.items() if not name.startswith(CACHE) or name.endswith(".0.keys")]
    return tuple([(name, item.tensor.dtype, item.tensor.device, *_fixed_sizes(item)) for name, item in seen])


def _fixed_sizes(item: Given) -> list[int]:
    return [-1 if dim in item.dynamic else size for dim, size in enumerate(item.tensor.shape)]


def _mirror(arguments: dict[str, Any], fakes: dict[str, Tensor]) -> dict[str, Any]:
    """``arguments`` on the fake tensors."""
    mirror = {}
    for name, value in arguments.items():
        if name == CACHE and type(value) is StaticCache:
            mirror[name] = _mirror_cache(value, fakes)
        elif type(value) is dict:
            mirror[name] = {key: fakes.get(f"{name}.{key}", item) for key, item in value.items()}
        else:
            mirror[name] = fakes.get(f"{name}.", value)
    return mirror


def _mirror_cache(cache: StaticCache, fakes: dict[str, Tensor]) -> StaticCache:
    mirror = copy.copy(cache)
    mirror.layers = [copy.copy(layer) for layer in cache.layers]
    for index, layer in enumerate(mirror.layers):
        if isinstance(layer, StaticLayer):
            for name in STATE:
                setattr(layer, name, fakes[f"{CACHE}.{index}.{name}"])
            if not isinstance(layer, WindowLayer):
                layer.max_cache_len = layer.keys.shape[2]
    return mirror


def _layer_state(arguments: dict[str, Any]) -> list[Any]:
    cache = arguments.get(CACHE)
    return [(name, id(value)) for layer in getattr(cache, "layers", ()) for name, value in vars(layer).items()]
