"""The forms of the Triton kernels: how maps are read, and how the gradient of the value is summed.

Normally `should_pad` predicts the first and `_autotune.fastest` measures the second; `force_form` fixes either.
"""

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

from torch import Tensor

ValueGradient = Literal["binned", "atomic"]

_padded: bool | None = None
_value_gradient: ValueGradient | None = None


@contextlib.contextmanager
def force_form(*, padded: bool | None = None, value_gradient: ValueGradient | None = None) -> Iterator[None]:
    """Fix the form of the Triton kernels inside a `with` block, for tests, measurements and offline compilation.

    The block must contain the backward pass as well. In deterministic mode, and for problems whose records 32-bit
    integers cannot count, the gradient of the value is summed by atomics whatever is given here.

    Args:
        padded: True reads a zero-padded copy of the maps, False the maps themselves with masks; None leaves the choice
            to `should_pad`.
        value_gradient: `"binned"` sorts the samples by position, `"atomic"` adds into a buffer; None leaves the choice
            to a measurement.

    Raises:
        ValueError: if value_gradient has any other value.

    Example:
        >>> with force_form(padded=True, value_gradient="binned"):
        ...     sparse_sampling_attention(value, shapes, offsets, logits, reference_points).sum().backward()
    """
    global _padded, _value_gradient
    if value_gradient is not None and value_gradient not in get_args(ValueGradient):
        choices = ", ".join(map(repr, get_args(ValueGradient)))
        raise ValueError(f"value_gradient is {value_gradient!r}; it must be one of {choices}, or None")
    before = _padded, _value_gradient
    _padded, _value_gradient = padded, value_gradient
    try:
        yield
    finally:
        _padded, _value_gradient = before


def forced_value_gradient() -> ValueGradient | None:
    """The way to sum the gradient of the value that `force_form` asks for, if any."""
    return _value_gradient


def should_pad(value: Tensor, points: Tensor) -> bool:
    """Whether the kernels read a padded copy of value: what `force_form` asks for, otherwise whether the copy pays.

    The copy costs time for each byte of the maps, masks cost time for each sample. The limit is predicted from
    instruction counts and the bandwidth of an H200, not measured.
    """
    if _padded is not None:
        return _padded
    _, S, _, D = value.shape
    _, Q, _, L, N, _ = points.shape
    return S * D * value.itemsize < 8 * Q * L * N
