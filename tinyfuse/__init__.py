"""tinyfuse: unmodified Hugging Face models at the speed of the hardware."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "kernels").is_dir() and (_root / "pyproject.toml").is_file():
    # A checkout: `kernels/` and `patterns/` lie beside the package and are its subpackages.
    __path__.append(str(_root))

_LAZY = {
    "Int8Config": "tinyfuse.pretrained",
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


class _WhenTransformersIsImported:
    """An import finder that lets transformers know int8 checkpoints once it has its registry. To import it here would
    take seconds, for those too who do not use it."""

    REGISTRY = "transformers.quantizers.auto"

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name != cls.REGISTRY:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_register(module: Any) -> None:
            run(module)
            importlib.import_module("tinyfuse.pretrained")

        spec.loader.exec_module = run_and_register
        return spec


if _WhenTransformersIsImported.REGISTRY in sys.modules:
    importlib.import_module("tinyfuse.pretrained")
else:
    sys.meta_path.insert(0, _WhenTransformersIsImported)
