"""Triton where it is installed, inert stand-ins where it is not, so that op files import anywhere."""

from __future__ import annotations

import os
from functools import cache
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    missing: str | None = None
except ImportError as error:
    triton, tl = None, SimpleNamespace(constexpr=object)
    missing = f"Triton is not installed ({error}): pip install 'triton>=3.6'"

    def jit(function=None, **_):
        return function or jit


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` runs the kernels in Python on the CPU."""
    return triton is not None and triton.knobs.runtime.interpret


@cache
def pdl(device: torch.device) -> bool:
    """Whether kernels on ``device`` are launched with programmatic dependent launch (SM90 and later)."""
    if interpreted() or device.type != "cuda" or os.environ.get("TINYFUSE_PDL") == "0":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def options(num_warps: int, ahead: bool) -> dict[str, object]:
    """Launch options of a kernel whose ``PDL`` flag is ``ahead``."""
    return {"num_warps": num_warps, "launch_pdl": True} if ahead else {"num_warps": num_warps}
