"""The names that users import."""

from __future__ import annotations

import importlib

import pytest

import tinyfuse


@pytest.mark.parametrize("name", tinyfuse.__all__)
def test_public_names_are_no_modules(name: str) -> None:
    """A submodule named like a function would replace it on the package as soon as it is imported."""
    value = getattr(tinyfuse, name)
    assert isinstance(value, str) or callable(value)
    with pytest.raises(ImportError):
        importlib.import_module(f"tinyfuse.{name}")
