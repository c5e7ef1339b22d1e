"""An operation is a schema, a reference and the kernels that may run it.

Every op file in ``tinyfuse.kernels`` calls :func:`register` once. The op is then

* ``torch.ops.tinyfuse.<name>`` for graphs, tracing and ``torch.compile``,
* an :class:`Op` for the lowering, which picks a kernel from metadata alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

from tinyfuse import choices, fallback
from tinyfuse.kernels._triton import once, rehearsing

_library = torch.library.Library("tinyfuse", "DEF")
OPS: dict[str, Op] = {}
_UNKNOWN: Any = object()
MOST_CHOICES = 4096  # remembered per op; prompts of ever new lengths each add one


@dataclass(frozen=True)
class Kernel:
    """One way to run an op on one device type.

    ``supports`` takes the op's arguments, reads metadata only (so fake tensors do) and returns
    ``None`` or the reason, as a sentence for users, why it cannot run them. ``run`` takes the same
    arguments and returns what the reference returns.
    """

    name: str
    device: str
    supports: Callable[..., str | None]
    run: Callable[..., Any]


@dataclass
class Op:
    """``reference`` is the oracle and the last fallback; ``fake`` gives metadata of the result; a ``pure`` op writes
    none of its arguments; those ``ahead`` its GPU kernels read before they wait for the kernels in front of them."""

    name: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    kernels: Sequence[Kernel]
    pure: bool = False
    ahead: range = range(0)
    broken: dict[str, str] = field(default_factory=dict)
    chosen: dict[Hashable, Kernel | None] = field(default_factory=dict)

    def choose(self, *args: Any) -> tuple[Kernel | None, str | None]:
        """The first kernel that supports ``args``, else ``None`` and why the reference runs."""
        if any(tensor.numel() == 0 for tensor in _tensors(args)):
            return None, "a tensor is empty"
        device = next(_tensors(args)).device.type
        reason = f"no {device} kernel for {self.name}"
        for kernel in self.kernels:
            if kernel.device != device:
                continue
            reason = self.broken.get(kernel.name) or kernel.supports(*args)
            if reason is None:
                return kernel, None
        return None, reason

    def run(self, kernel: Kernel, *args: Any) -> Any:
        """Run ``kernel``; one that cannot be built or launched is replaced by the reference from then on, but where the
        reference fails too: on wrong arguments, or in a capture that an error before has ended."""
        if rehearsing():
            return once((self.name, kernel.name, metadata(args)), partial(_run, kernel, args))
        try:
            return _run(kernel, args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            result = self.reference(*args)
            reason = f"kernel {self.name}/{kernel.name} failed: {type(error).__name__}: {error}"
            fallback.record(f"{self.name}/{kernel.name}", reason, error)
            self.broken[kernel.name] = reason
            self.chosen.clear()
            return result

    def __call__(self, *args: Any) -> Any:
        """Run the op on the kernel for its arguments."""
        return self.dispatch(metadata(args), args)

    def dispatch(self, key: Hashable, args: Sequence[Any], moving: Sequence[int] = ()) -> Any:
        """Run the op; the choice of the kernel is remembered by ``key``, which stands for the metadata of ``args``, of
        which those at ``moving`` change with the prompt."""
        kernel = self.chosen.get(key, _UNKNOWN)  # once: another thread may clear them
        if kernel is _UNKNOWN:
            if len(self.chosen) >= MOST_CHOICES:
                self.chosen.clear()
            kernel, reason = self.choose(*args)
            if reason is not None:
                fallback.note(self.name, reason)
            elif self.timed(args):
                if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                    return self.run(kernel, *args)
                kernel = self._fastest(args, moving)
            self.chosen[key] = kernel
        return self.reference(*args) if kernel is None else self.run(kernel, *args)

    def timed(self, args: Sequence[Any]) -> bool:
        """Whether the kernel for ``args`` is chosen by time, not by the kernels' rules."""
        return self.pure and choices.measures(next(_tensors(args)).device)

    def _fastest(self, args: Sequence[Any], moving: Sequence[int]) -> Kernel | None:
        device = next(_tensors(args)).device
        able = (k for k in self.kernels if k.device == device.type and k.name not in self.broken)
        kernels = {kernel.name: kernel for kernel in able if kernel.supports(*args) is None}
        candidates = {name: partial(self.run, kernel, *args) for name, kernel in kernels.items()}
        candidates[choices.STOCK] = partial(self.reference, *args)
        name = choices.of(device).fastest(choices.describe(self.name, args, moving), candidates)
        if name == choices.STOCK:
            fallback.note(self.name, "stock torch measured faster")
        return None if name in self.broken else kernels.get(name)


def _run(kernel: Kernel, args: Sequence[Any]) -> Any:
    if kernel.device == "cuda" and _several_gpus():
        with torch.cuda.device(next(_tensors(args)).device):  # Triton launches on the current device
            return kernel.run(*args)
    return kernel.run(*args)


@cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def metadata(args: Sequence[Any]) -> tuple:
    """What :meth:`Op.choose` may look at. Of the place in a storage it sees how rows are aligned."""
    return tuple(
        (a.dtype, a.shape, a.stride(), a.device, a.storage_offset() % 16)
        if isinstance(a, torch.Tensor)
        else metadata(a)
        if isinstance(a, list)
        else a
        for a in args
    )


def _tensors(args: Sequence[Any]):
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def register(
    signature: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    kernels: Sequence[Kernel] = (),
    ahead: range = range(0),
) -> Op:
    """Define ``torch.ops.tinyfuse`` op with the schema ``signature``, for example
    ``"scale(Tensor x, float by) -> Tensor"``. Mutated arguments are marked as in ATen: ``Tensor(a!) x``.
    Kernels are tried in the order given. ``fake`` stands in for the reference where only metadata counts."""
    name = signature.partition("(")[0]
    op = Op(name, reference, fake or reference, tuple(kernels), "!" not in signature, ahead)
    _library.define(signature)
    _library.impl(name, op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tinyfuse::{name}", op.fake, lib=_library)
    OPS[name] = op
    return op
