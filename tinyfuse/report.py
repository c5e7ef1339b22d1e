"""The account of what was fused: every linear, attention, norm, rope and activation of every compiled graph."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from tinyfuse import fallback
from tinyfuse.anchors import KINDS, WRITTEN_OUT, Anchor, find_anchors

_serial = itertools.count()
_STATUS = ("fused", "declined", "kept")  # from best to worst


@dataclass(frozen=True)
class Fate:
    """What became of an anchor.

    ``"fused"``: a fused kernel runs it. ``"declined"``: a pattern or kernel knows it but not in this form.
    ``"kept"``: nothing knows it, it runs as it was. ``reason`` is a sentence for all but the first.
    """

    status: str
    pattern: str | None = None
    kernel: str | None = None
    reason: str | None = None


@dataclass
class Site:
    """An anchor of the model: in ``module``, of kind ``anchor``, and its fate."""

    module: str
    anchor: str
    status: str
    pattern: str | None = None
    kernel: str | None = None
    reason: str | None = None


@dataclass
class GraphReport:
    """One compiled graph: its sites, how often each op runs per call (``ops``), and the calls so far."""

    name: str
    sites: list[Site]
    ops: Counter[str] = field(default_factory=Counter)
    calls: int = 0


@dataclass
class Report:
    """What was fused in a model, what was not, and why. ``graphs`` are those compiled while it was collected."""

    model: str = ""
    device: str = ""
    graphs: list[GraphReport] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)
    fallbacks: list[dict[str, Any]] = field(default_factory=list)

    def add_graph(
        self, anchors: Sequence[Anchor], outcome: Mapping[Node, Fate], ops: Mapping[str, int] | None = None
    ) -> GraphReport:
        """Account for one compiled graph; ``ops`` counts the ops it runs per call, by name."""
        sites = []
        for anchor in anchors:
            sites.append(Site(anchor.module, anchor.kind, **asdict(outcome[anchor.node])))
        graph = GraphReport(f"graph {len(self.graphs) + 1}", sites, Counter(ops or {}))
        self.graphs.append(graph)
        return graph

    def merge(self, other: Report) -> Report:
        """Add another report of the same model, and return self."""
        self.model, self.device = self.model or other.model, self.device or other.device
        self.graphs += other.graphs
        self.graph_breaks += other.graph_breaks
        self.fallbacks = _sum_fallbacks(self.fallbacks + other.fallbacks)
        return self

    def under(self, path: str) -> Report:
        """The report as that of a model which holds this one at ``path``."""
        made = Report(graph_breaks=[*self.graph_breaks], fallbacks=[*self.fallbacks])
        for graph in self.graphs:
            sites = [replace(site, module=f"{path}.{site.module}".rstrip(".")) for site in graph.sites]
            made.graphs.append(replace(graph, name=f"{path} {graph.name}", sites=sites))
        return made

    @property
    def sites(self) -> list[Site]:
        """The sites of the model. One that is in several graphs has the worst of its fates and all of its kernels."""
        merged: dict[tuple[str, str, int], Site] = {}
        for graph in self.graphs:
            met: Counter[tuple[str, str]] = Counter()
            for site in graph.sites:
                key = (site.module, site.anchor)
                known = merged.get((*key, met[key]))
                merged[*key, met[key]] = site if known is None else _worse(known, site)
                met[key] += 1
        return list(merged.values())

    @property
    def summary(self) -> dict[str, dict[str, int]]:
        """Per kind of anchor that the model has: how many were found, how many are fused in every graph."""
        counts = {kind: {"found": 0, "fused": 0} for kind in KINDS}
        for site in self.sites:
            counts[site.anchor]["found"] += 1
            counts[site.anchor]["fused"] += site.status == "fused"
        return {kind: count for kind, count in counts.items() if count["found"]}

    @property
    def executed(self) -> dict[str, int]:
        """How often each op ran, as counted at the calls of the compiled graphs from Python."""
        total: Counter[str] = Counter()
        for graph in self.graphs:
            for op, count in graph.ops.items():
                total[op] += count * graph.calls
        return dict(sorted((+total).items()))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "model": self.model,
            "device": self.device,
            "graphs": len(self.graphs),
            "graph_breaks": list(self.graph_breaks),
            "sites": [asdict(site) for site in self.sites],
            "summary": self.summary,
            "fallbacks": self.fallbacks,
            "executed": self.executed,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _worse(first: Site, second: Site) -> Site:
    worst = max(first, second, key=lambda site: _STATUS.index(site.status))
    kernels = dict.fromkeys(k for site in (first, second) for k in (site.kernel or "").split(", ") if k)
    return Site(**{**asdict(worst), "kernel": ", ".join(kernels) or None})


def _sum_fallbacks(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    total: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        total[entry["where"], entry["reason"]] += entry["count"]
    return [{"where": where, "reason": reason, "count": count} for (where, reason), count in total.items()]


def _lines(report: Report) -> Iterator[str]:
    count, breaks = len(report.graphs), len(report.graph_breaks)
    graphs = f"{count} graph{'s' * (count != 1)} ({', '.join(g.name for g in report.graphs)})" if count else "no graph"
    yield f"{report.model or 'model'} on {report.device or 'unknown device'}: {graphs}, " + (
        f"{breaks} graph break{'s' * (breaks != 1)}" if breaks else "no graph break"
    )
    yield f"{'':12}{'found':>6}{'fused':>6}  kernels"
    sites = report.sites
    for kind, counts in report.summary.items():
        kernels = Counter(s.kernel for s in sites if s.anchor == kind and s.kernel)
        used = ", ".join(f"{kernel} x{n}" for kernel, n in kernels.most_common())
        yield f"{kind:12}{counts['found']:>6}{counts['fused']:>6}  {used}".rstrip()
    missed: dict[tuple[str, str, str], Counter[str]] = {}
    for site in sites:
        if site.status != "fused":
            group = missed.setdefault((site.anchor, site.status, site.reason or ""), Counter())
            group[_anonymous(site.module) or "the model itself"] += 1
    if missed:
        yield "not fused:"
    for (anchor, status, reason), modules in missed.items():
        yield f"  {anchor} x{modules.total()} {status}: {_short(reason)}"
        yield f"    {', '.join(modules)}"
    for title, entries in (
        ("graph breaks:", report.graph_breaks),
        ("fallbacks:", [f"{f['where']} x{f['count']}: {_short(f['reason'])}" for f in report.fallbacks]),
    ):
        if entries:
            yield title
            yield from (f"  {entry}" for entry in entries)


def _short(reason: str) -> str:
    """The first line; compilers are verbose."""
    line = reason.partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:197]}..."


def _anonymous(module: str) -> str:
    """The path with every layer number as ``*``."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module)


_current: ContextVar[Report | None] = ContextVar("tinyfuse_report", default=None)


def current() -> Report | None:
    """The report that is being collected."""
    return _current.get()


@contextmanager
def collect(into: Report | None = None) -> Iterator[Report]:
    """Collects what the backend compiles inside the block, and the fallbacks and reasons for graph breaks met there."""
    report = Report() if into is None else into
    before, breaks = Counter(fallback.seen), Counter(torch._dynamo.utils.counters["graph_break"])
    token = _current.set(report)
    try:
        yield report
    finally:
        _current.reset(token)
        met_breaks = torch._dynamo.utils.counters["graph_break"] - breaks
        report.graph_breaks += dict.fromkeys(map(_first_lines, met_breaks))
        met = [{"where": w, "reason": r, "count": n} for (w, r), n in (fallback.seen - before).items()]
        report.fallbacks = _sum_fallbacks([*report.fallbacks, *met])


def _first_lines(reason: str) -> str:
    """Dynamo's title and explanation of a graph break, without its hints for debugging."""
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return " ".join(lines[:2])


def account(
    run: Callable[..., Any], traced: Graph, copies: Mapping[Node, Node], outcome: Any, choices: Mapping[Node, Any]
) -> Callable[..., Any]:
    """Put a compiled graph into the current report, if there is one; returns what to call in place of ``run``.

    ``traced``: Dynamo's graph. ``copies``: its nodes to those that were rewritten. ``outcome``: of the rewriting.
    ``choices``: the kernel per op node. The call is counted, so that the report can say what was executed.
    """
    report = _current.get()
    if report is None:
        return run
    anchors = find_anchors(traced)
    fates = {anchor.node: _fate(anchor, copies, outcome, choices) for anchor in anchors}
    graph = report.add_graph(anchors, fates, Counter(map(_op, choices)))

    def counted(*args: Any) -> Any:
        graph.calls += 1
        return run(*args)

    return counted


def _fate(anchor: Anchor, copies: Mapping[Node, Node], outcome: Any, choices: Mapping[Node, Any]) -> Fate:
    path, final = outcome.final(copies[anchor.node])
    if anchor.kind == "rope" and not any("rope" in pattern.name for pattern in path):
        path, final = [], copies[anchor.node]  # its sum is that of another pattern, such as an add and norm
    if path or final in choices:  # an int8 linear is an op before any pattern sees it
        node = _op_node(final, choices)
        kernel, reason = choices[node].kernel, choices[node].reason
        pattern = path[-1].name if path else None
        return Fate("declined" if reason else "fused", pattern, f"{_op(node)}/{kernel}", reason)
    near = _declined(anchor, copies, outcome)
    if near is not None:
        pattern, reason = near
        return Fate("declined", pattern.name, None, f"{pattern.name}: {reason}")
    return Fate("kept", reason=_unknown(anchor))


def _op_node(node: Node, choices: Mapping[Node, Any]) -> Node:
    """The op that ``node`` is, or whose result it is a view of."""
    while node not in choices:
        node = node.all_input_nodes[0]
    return node


def _op(node: Node) -> str:
    return node.target.__name__.removeprefix("tinyfuse_")


def _declined(anchor: Anchor, copies: Mapping[Node, Node], outcome: Any, depth: int = 6) -> Any:
    """The pattern of the anchor's kind that nearly matched it: its last node is the anchor or below it."""
    prefixes = {"activation": ("gated_",)}.get(anchor.kind, (anchor.kind,))
    level = [anchor.node]
    for _ in range(depth):
        for node in level:
            pattern, reason = outcome.declined.get(copies.get(node), (None, None))
            if pattern is not None and pattern.stage == "lift" and pattern.name.startswith(prefixes):
                return pattern, reason
        level = [user for node in level for user in node.users]
    return None


def _unknown(anchor: Anchor) -> str:
    """Why an anchor that no pattern came near is kept."""
    if anchor.kind == "activation" and not anchor.detail.startswith("gated"):
        if anchor.detail.endswith(WRITTEN_OUT):
            return f"{anchor.detail} as single operations, which no pattern covers"
        return f"{anchor.detail} does not take a linear layer's result as it is: alone it is one kernel of stock torch"
    if anchor.kind == "linear" and anchor.detail == "experts":
        return (
            "expert weights stored [E, K, N] are multiplied by stock torch; quantised to int8 they are stored [E, N, K]"
        )
    if anchor.kind == "linear" and anchor.detail in ("bmm", "baddbmm"):
        return f"a stack of weights is multiplied at once by stock torch ({anchor.detail}), which reads each once"
    if anchor.detail == "softmax, softcap":
        return "its scores pass through a softcap (tanh) in a form that no pattern covers"
    if anchor.detail == "softmax":
        return "it is written as products around a softmax in a form that no pattern covers"
    return f"it is written ({anchor.detail or anchor.node.name}) in a form that no pattern covers"


def report_of(model: torch.nn.Module) -> Report:
    """What was compiled so far for a model that :func:`tinyfuse.optimize` returned; raises ValueError for others."""
    runtime = vars(model).get("_tinyfuse")
    if runtime is None:
        raise ValueError(f"report_of: this {type(model).__name__} was not optimized; call tinyfuse.optimize(model)")
    report = Report(type(model).__name__, _device(model)).merge(runtime.report)
    for path, module in model.named_modules():
        if module is not model and (inner := vars(module).get("_tinyfuse")) is not None:
            report.merge(inner.report.under(path))
    return report


def explain(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Compile and run ``model`` once on the given inputs and report what is fused in it, what is not, and why.

    ``args``, ``kwargs``: what ``model.forward`` takes; a single mapping, such as a tokenizer returns, is taken for
    keyword arguments. Without any, 16 token ids [1, 16] are made up. For a model that generates, one decoding step
    over a static cache is explained too. The model is left as it was, and gradients are off.

    Raises TypeError if ``model`` is no ``nn.Module``, ValueError without inputs for a model that takes no tokens.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"explain: model is a {type(model).__name__}, pass a torch.nn.Module")
    if len(args) == 1 and isinstance(args[0], Mapping):
        args, kwargs = (), {**args[0], **kwargs}
    if not args and not kwargs:
        kwargs = {"input_ids": _made_up_tokens(model)}
    forward = _stock_forward(model)
    report = Report(type(model).__name__, _device(model))
    with torch.no_grad():
        with collect(report):
            _compiled(forward)(*args, **kwargs)
        _name(report.graphs, "prompt")
        prompted = len(report.graphs)
        if not args and "input_ids" in kwargs and _generates(model):
            with collect(report):
                _decode_step(model, forward, kwargs)
            _name(report.graphs[prompted:], "token")
    return report


def _name(graphs: Sequence[GraphReport], name: str) -> None:
    for number, graph in enumerate(graphs, 1):
        graph.name = name if len(graphs) == 1 else f"{name} {number}"


def _made_up_tokens(model: torch.nn.Module) -> torch.Tensor:
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    if size is None:
        raise ValueError(f"explain: {type(model).__name__} has no vocabulary to make up inputs from, pass its inputs")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.arange(1, 17, device=device)[None] % size


def _device(model: torch.nn.Module) -> str:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _stock_forward(model: torch.nn.Module) -> Callable[..., Any]:
    runtime = vars(model).get("_tinyfuse")
    return model.forward if runtime is None else runtime.stock("forward")


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` through the backend, with graphs and a shape history of its own: Dynamo keeps both per code name."""

    def explained(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    explained.__code__ = explained.__code__.replace(co_name=f"explained_{next(_serial)}")
    return torch.compile(explained, backend="tinyfuse")


def _generates(model: torch.nn.Module) -> bool:
    return (
        callable(getattr(model, "can_generate", None)) and model.can_generate() and not model.config.is_encoder_decoder
    )


def _decode_step(model: torch.nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> None:
    """Compile one decoding step as ``generate`` prepares it, over a static cache where the model takes one."""

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        outputs = forward(**model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs))
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        ids = torch.cat([input_ids, outputs.logits[:, -1:].argmax(-1)], dim=1)
        _compiled(forward)(**model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs))
        return ids

    generate = type(model).generate.__get__(model)
    static = {"cache_implementation": "static"} if model._can_compile_fullgraph else {}
    kept = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    attributes = dict(vars(model))
    try:
        generate(**kept, custom_generate=loop, max_new_tokens=2, do_sample=False, **static)
    finally:  # generate leaves notes for its next call
        for name in vars(model).keys() - attributes:
            del vars(model)[name]
        vars(model).update(attributes)
