"""Checks of options, shared by the network and its loss."""

from typing import Any


def check_choice(name: str, value: Any, *choices: Any) -> None:
    """Raise ValueError for an option that is none of its choices."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices[:-1])
        raise ValueError(f"{name} is {value!r}; it must be {listed} or {choices[-1]!r}")
