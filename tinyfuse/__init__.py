"""tinyfuse: unmodified Hugging Face models at the speed of the hardware."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "kernels").is_dir() and (_root / "pyproject.toml").is_file():
    # A checkout: `kernels/` and `patterns/` lie beside the package and are its subpackages.
    __path__.append(str(_root))

_LAZY = {
    "optimize": "tinyfuse.api",
    "restore": "tinyfuse.api",
    "quantize_": "tinyfuse.quantize",
    "explain": "tinyfuse.report",
    "report_of": "tinyfuse.report",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tinyfuse' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
