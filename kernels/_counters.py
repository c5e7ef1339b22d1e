"""How the last of several programs, each with a share of a sum, knows that it is, and what it then reads."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyfuse.kernels._triton import jit, rehearsing, tl, triton

# (device, stream, splits) to counters of finished programs, of which the last made are in use: an older tensor
# may be in a captured graph. They are never reset, so a multiple of `splits` stands in each between launches, and a
# launch that counts to another number must not share them; nor must launches that run at the same time, such as
# a graph replayed beside calls on the stream it was captured on. An int32 would wrap within hours.
_counters: dict[tuple[torch.device, int, int], list[Tensor]] = {}


def counters(device: torch.device, splits: int, count: int) -> Tensor | None:
    """At least ``count`` counters, or None where a capture would make them part of its graph."""
    if rehearsing():
        return torch.zeros(count, dtype=torch.int64, device=device)
    on_gpu = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    made = _counters.setdefault((device, stream, splits), [])
    if not made or made[-1].numel() < count:
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return None
        made.append(torch.zeros(triton.next_power_of_2(max(256, count)), dtype=torch.int64, device=device))
    return made[-1]


@jit
def is_last(counter, programs):
    """Whether this is the last of the ``programs`` that add to ``counter``, after all that they have stored."""
    tl.debug_barrier()  # one thread adds, for the stores of all
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") % programs == programs - 1


@jit
def sum_shares(parts, step, PARTS: tl.constexpr):
    """The sum of what lies at ``parts`` and behind it, ``step`` apart, in that order: past L1 (.cg), which does not see
    what other programs of the same launch have written."""
    total = tl.load(parts, cache_modifier=".cg")
    for other in tl.static_range(1, PARTS):
        total += tl.load(parts + other * step, cache_modifier=".cg")
    return total
