"""The fallback ladder's memory: every step down is recorded, and warned about once per reason."""

from __future__ import annotations

import logging
import os
from collections import Counter

log = logging.getLogger("tinyfuse")


class FallbackError(RuntimeError):
    """Raised instead of falling back when ``fallback="error"`` or ``TINYFUSE_FALLBACK=error``."""


MODES = ("warn", "error")
mode = os.environ.get("TINYFUSE_FALLBACK", "warn")
if mode not in MODES:
    raise ValueError(f"TINYFUSE_FALLBACK is {mode!r}: set it to {' or '.join(MODES)}, or not at all")
seen: Counter[tuple[str, str]] = Counter()


def note(where: str, reason: str) -> None:
    """Count a step down that is expected (a shape no kernel takes): debug log only."""
    if (where, reason) not in seen:
        log.debug("%s: %s", where, reason)
    seen[where, reason] += 1


def hint(where: str, advice: str) -> None:
    """Tell once what would serve the user better; nothing failed."""
    if (where, advice) not in seen:
        log.warning("%s: %s", where, advice)
    seen[where, advice] += 1


def record(where: str, reason: str, error: BaseException | None = None) -> None:
    """Count a step down and warn the first time; raise in error mode."""
    if mode == "error":
        raise FallbackError(f"{where}: {reason}") from error
    if (where, reason) not in seen:
        log.warning("%s: %s", where, reason)
    seen[where, reason] += 1
