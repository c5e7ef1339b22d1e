"""tinyfuse: unmodified Hugging Face models at the speed of the hardware."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "kernels").is_dir() and (_root / "pyproject.toml").is_file():
    # A checkout: `kernels/` and `patterns/` lie beside the package and are its subpackages.
    __path__.append(str(_root))
