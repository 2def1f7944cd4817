"""Marks of single cases of a parametrised test."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case that is left to `pytest -m slow` where Triton's interpreter runs the kernels."""
    return pytest.param(*values, marks=pytest.mark.slow_interpreted)
