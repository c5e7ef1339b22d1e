"""What the tests of single kernels share."""

import pytest
import torch

from tinyfuse import fallback


@pytest.fixture
def strict(monkeypatch):
    """Uninitialised memory holds NaN, and a kernel that fails is an error."""
    monkeypatch.setattr(fallback, "mode", "error")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
