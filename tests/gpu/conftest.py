"""What the tests of single kernels share."""

import pytest

from tinyfuse import fallback


@pytest.fixture
def strict(monkeypatch, poisoned):
    """Uninitialised memory holds NaN, and a kernel that fails is an error."""
    monkeypatch.setattr(fallback, "mode", "error")
