"""The table of rows that the PyTorch backend of sparse sampling attention reads; `op` has the letters.

The maps lie in rows of D channels, each map in a frame of zeros wide enough for samples outside it, so that nothing has
to be masked.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..checks import compute_dtype
from .levels import levels

# Zeros on each side of a map. Samples outside go to -2 or to the map's size, where both neighbours are zero; with one
# zero fewer a NaN on the border would be read times zero.
FRAME = 2

Block = tuple[slice, slice, slice]  # images, queries, heads: an index into tensors (B, Q, M, ...)


class Layout:
    """Where the maps lie in the table: (B, M, rows) rows and FRAME more at the end.

    A level has height + 2 * FRAME lines of width + FRAME pixels: the zeros right of a line are those left of the next.
    """

    def __init__(self, value: Tensor, shapes: Sequence[int], N: int):
        heights, widths = shapes[::2], shapes[1::2]
        lines, pitches = [height + 2 * FRAME for height in heights], [width + FRAME for width in widths]
        self.B, _, self.M, self.D = value.shape
        self.level_rows = [line * pitch for line, pitch in zip(lines, pitches, strict=True)]
        self.rows = sum(self.level_rows)
        self.shapes = shapes
        self.dtype = compute_dtype(value)
        self.device = value.device
        self.index_dtype = torch.int32 if self.B * self.M * self.rows < 2**31 - 1 else torch.int64
        origins = [sum(self.level_rows[:level]) + FRAME * pitch + FRAME for level, pitch in enumerate(pitches)]

        def by_sample(numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
            """(L * N,), filled rather than copied to the device: a copy would make the host wait for it."""
            return torch.cat([torch.full((N,), number, dtype=dtype, device=self.device) for number in numbers])

        self.pitch, self.origin = by_sample(pitches, self.index_dtype), by_sample(origins, self.index_dtype)
        self.width, self.height = by_sample(widths, self.dtype), by_sample(heights, self.dtype)

    def zeros(self) -> Tensor:
        """An empty table."""
        return torch.zeros(self.B * self.M * self.rows + FRAME, self.D, dtype=self.dtype, device=self.device)

    def lines(self, rows: Tensor) -> Iterator[Tensor]:
        """Views (maps, lines, pitch, D) of whole maps' `rows` (maps * rows, D), level by level."""
        maps = rows.view(-1, self.rows, self.D)
        for (_, _, _, width), level in zip(levels(self.shapes), maps.split(self.level_rows, 1), strict=True):
            yield level.unflatten(1, (-1, width + FRAME))

    def pixels(self, table: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Level by level, its slice of S and the view (B, M, H_l, W_l, D) of its pixels in the table."""
        for (_, start, height, width), lines in zip(levels(self.shapes), self.lines(table[:-FRAME]), strict=True):
            inner = lines[:, FRAME:-FRAME, FRAME:].unflatten(0, (self.B, self.M))
            yield slice(start, start + height * width), inner

    def first_row(self, block: Block) -> int:
        """The row of the table at which a block's maps begin; they lie one after another."""
        images, _, heads = block
        return (images.start * self.M + heads.start) * self.rows


def value_table(value: Tensor, layout: Layout) -> Tensor:
    """The table that holds `value` (B, S, M, D)."""
    table = layout.zeros()
    for pixels, inner in layout.pixels(table):
        inner.copy_(value[:, pixels].unflatten(1, inner.shape[2:4]).permute(0, 3, 1, 2, 4))
    return table


def map_values(table: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """The pixels of a table as a tensor like `value`."""
    maps = torch.empty_like(value, memory_format=torch.contiguous_format)
    for pixels, inner in layout.pixels(table):
        maps[:, pixels].unflatten(1, inner.shape[2:4]).copy_(inner.permute(0, 2, 3, 1, 4))
    return maps
