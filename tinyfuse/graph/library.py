"""The patterns: every :class:`Pattern`, alone or in a list, in every module of ``tinyfuse.patterns``."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import tinyfuse.patterns
from tinyfuse.graph.pattern import Pattern


@cache
def all_patterns() -> tuple[Pattern, ...]:
    """All patterns, in the order of their files and names. Two of one name are an error."""
    found: dict[str, Pattern] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(tinyfuse.patterns.__path__)):
        for value in vars(importlib.import_module(f"tinyfuse.patterns.{module}")).values():
            for pattern in value if isinstance(value, list) else [value]:
                if isinstance(pattern, Pattern) and found.setdefault(pattern.name, pattern) is not pattern:
                    raise ValueError(f"two patterns are named {pattern.name!r}: {pattern.source}")
    return tuple(found.values())
