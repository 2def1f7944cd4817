"""The spatial shapes of sparse sampling attention: lists, arrays and tensors of them, read and checked."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_integer, check_shape, check_sides
from .levels import levels


def flat_shapes(spatial_shapes: Any, value: Tensor) -> list[int]:
    """[(H_0, W_0), ...] -> [H_0, W_0, ...], checked against `value`; anything with `__index__` counts as an int."""
    if not isinstance(spatial_shapes, (Tensor, Sequence)) and hasattr(spatial_shapes, "tolist"):
        spatial_shapes = spatial_shapes.tolist()  # an array of NumPy
    shapes = _ints(spatial_shapes)
    for size in shapes:
        _require(size >= 1, lambda: _must_hold_pairs(spatial_shapes))
    check_shape("value", value, ("B", "S", "M", "D"))
    length = sum(height * width for height, width in zip(shapes[::2], shapes[1::2], strict=True))
    if isinstance(length, int):
        check_count("pixels in spatial_shapes", length)
        check_sides("a level of spatial_shapes", *shapes)
    _require(
        value.shape[1] == length,
        lambda: (
            f"spatial_shapes {spatial_shapes} make S = {length} pixels, but value has {value.shape[1]} (shape "
            f"{tuple(value.shape)}): flatten each level's height and width and concatenate the levels along dimension 1"
        ),
    )
    return shapes


def _ints(spatial_shapes: Any) -> list[int]:
    is_sequence = isinstance(spatial_shapes, Sequence)
    pairs = is_sequence and all(isinstance(shape, Sequence) and len(shape) == 2 for shape in spatial_shapes)
    if is_sequence and not (pairs and spatial_shapes):
        raise ValueError(_must_hold_pairs(spatial_shapes))
    try:
        sizes: list[Any] = [size for shape in spatial_shapes for size in shape] if pairs else [None]
        return [size if isinstance(size, (int, torch.SymInt)) else operator.index(size) for size in sizes]
    except (TypeError, RuntimeError, ValueError):  # a tensor of several numbers raises any of these
        raise TypeError(
            f"spatial_shapes is {spatial_shapes}; it must hold Python ints, so that the host need not wait for the "
            "device: convert it once, outside the training loop, with spatial_shapes.tolist()"
        ) from None


def _must_hold_pairs(spatial_shapes: Any) -> str:
    return (
        f"spatial_shapes is {spatial_shapes}; it must hold one (height, width), each >= 1, for every level: "
        "[(height, width)] for a single one"
    )


def _require(condition: Any, message: Callable[[], str]) -> None:
    """Raise ValueError unless a condition holds; one on sizes that are not known while tracing is checked later."""
    if isinstance(condition, torch.SymBool):
        torch._check(condition, message)
    elif not condition:
        raise ValueError(message())


def read(spatial_shapes: Any, level_start_index: Any, value: Tensor) -> tuple[list[int], Tensor | None]:
    """Shapes under Deformable DETR's signature, as ints; or, while they cannot be read, [] and the tensor (L, 2).

    Raises:
        TypeError, ValueError: see `op.ms_deform_attn`.
    """
    if isinstance(spatial_shapes, Tensor):
        check_integer(spatial_shapes=spatial_shapes)
        check_shape("spatial_shapes", spatial_shapes, ("L", 2))
        if not is_readable(spatial_shapes):
            if spatial_shapes.is_meta and not value.is_meta:
                raise ValueError(f"spatial_shapes has no values on the device meta: move it to {value.device}")
            check_shape("value", value, ("B", "S", "M", "D"))
            return [], spatial_shapes
        spatial_shapes = spatial_shapes.tolist()
    shapes = flat_shapes(spatial_shapes, value)
    starts = level_start_index
    if isinstance(starts, Tensor):
        starts = starts.tolist() if starts.device.type == "cpu" and is_readable(starts) else None
    consecutive = [start for _, start, _, _ in levels(shapes)]
    if starts is not None and list(starts) != consecutive:
        raise ValueError(
            f"level_start_index is {list(starts)}; the levels must lie one after another in value, which makes it "
            f"{consecutive} for spatial_shapes {spatial_shapes}: pass None"
        )
    return shapes, None


def is_readable(tensor: Tensor) -> bool:
    """Whether a tensor has values now: it does not while a graph is captured, nor on the device meta."""
    return not (torch.compiler.is_compiling() or tensor.is_meta or type(tensor) is not Tensor)
