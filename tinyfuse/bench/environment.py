"""What a measurement ran on: the block that stands at the head of every result file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import tinyfuse


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """Versions, hardware, source commit, date and command line; JSON-ready, ``None`` where unknown.

    ``device`` is the one measured on; by default the GPU if there is one, else the CPU.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "device": device.type,
        **_gpu(device),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "torchao": version("torchao"),
        "tinyfuse": tinyfuse.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def version(package: str) -> str | None:
    """The installed version of ``package``, or None; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout tinyfuse runs from, with ``-dirty`` where tracked files differ; None if installed."""
    root = Path(tinyfuse.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    return _output("git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*")


def cpu_name() -> str:
    """The processor's name as Linux gives it, else as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def append(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Add ``record``, which holds its ``environment``, to the list in ``<name>-<gpu, or cpu>.json``."""
    gpu = record["environment"]["gpu"]
    device = gpu.lower().replace("nvidia", "").split()[0] if gpu else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{device}.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*kept, record], indent=1) + "\n")


def _gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"gpu": None, "driver": None}
    properties = torch.cuda.get_device_properties(device)
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": properties.name,
        "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": drivers.splitlines()[0] if drivers else None,
    }


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
