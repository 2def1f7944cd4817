"""The levels of a flat list of spatial shapes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class LevelSlice(NamedTuple):
    """Where one level lies along the dimension S of value."""

    level: int
    start: int
    height: int
    width: int


def levels(shapes: Sequence[int]) -> Iterator[LevelSlice]:
    """Yield each level of the flat list H_0, W_0, H_1, W_1, ..."""
    start = 0
    for level, (height, width) in enumerate(zip(shapes[::2], shapes[1::2], strict=True)):
        yield LevelSlice(level, start, height, width)
        start += height * width
