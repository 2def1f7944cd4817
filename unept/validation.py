"""Check values against the types that options are declared with, wherever they come from: a flag, a call or a file."""

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


def check_fields(instance: Any) -> None:
    """Raise ValueError if a field of a dataclass has a value of another type than declared, or a number not finite."""
    hints = _hints(instance.__class__)
    for field in dataclasses.fields(instance):
        check_type(field.name, getattr(instance, field.name), hints[field.name])


def check_arguments(function: Any, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if an argument of a function has another type than its annotation, or is a number not finite."""
    hints = _hints(function)
    for name, value in arguments.items():
        check_type(name, value, hints[name])


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError unless a value, called `name` in the message, has a type."""
    if not _fits(value, hint):
        raise ValueError(f"{name} is {_shown(value)}; it must be {_describe(hint)}")


def check_choice(name: str, value: Any, *choices: Any) -> None:
    """Raise ValueError for an option that is none of its choices."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices[:-1])
        raise ValueError(f"{name} is {value!r}; it must be {listed} or {choices[-1]!r}")


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless low <= value <= high."""
    if not low <= value <= high:
        limits = f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} is {value}; it must be {limits}")


@functools.cache
def _hints(declared: Any) -> dict[str, Any]:
    return typing.get_type_hints(declared)


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is float:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    if hint is int:
        return isinstance(value, numbers.Integral)
    if origin is tuple and parts[-1] is not Ellipsis:
        return _is_sequence(value) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin in (tuple, list, Sequence):
        return _is_sequence(value) and all(_fits(item, parts[0]) for item in value)
    return isinstance(value, str if hint is Path and isinstance(value, str) else origin or hint)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _describe(hint: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in parts)
    if origin is Literal:
        return " or ".join(repr(part) for part in parts)
    if origin is tuple and parts[-1] is not Ellipsis:
        return f"{len(parts)} values, each {_describe(parts[0])}"
    if origin in (tuple, list, Sequence):
        return f"a list of values, each {_describe(parts[0])}"
    words: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "text",
        Path: "a path",
        types.NoneType: "None",
    }
    return words.get(hint, f"of type {getattr(origin or hint, '__name__', hint)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}... ({type(value).__name__})"
