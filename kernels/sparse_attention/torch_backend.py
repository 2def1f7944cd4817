"""Sparse sampling attention in PyTorch: `op` has the equation, the letters and the conventions.

The maps lie in one table of rows of D channels, each map in a frame of zeros wide enough for samples outside it, so
that nothing has to be masked. Samples are read by `embedding_bag`, whose bag is one query in one head: it gathers rows
and adds them up with weights, and keeps nothing. The gradient of the table is the same gather the other way round:
samples are sorted by row, a bag is one row, and what it gathers are rows of `grad_out`. No sum depends on the order in
which threads run.

Work goes image by image and head by head, in blocks that stay in a CPU's cache: one head's maps are small enough to.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import compute_dtype
from .levels import levels

# Elements of the largest temporary apart from tables; images, heads and queries are taken in blocks to stay below it.
# Steps with many temporaries take a part of it each, small enough for a CPU's cache and large enough for its threads.
MAX_TEMPORARY = 1 << 20

# Zeros on each side of a map. Samples outside go to -2 or to the map's size, where both neighbours are zero; with one
# zero fewer a NaN on the border would be read times zero.
FRAME = 2

Block = tuple[slice, slice, slice]  # images, queries, heads: an index into tensors (B, Q, M, ...)


# --- the table --------------------------------------------------------------------------------------------------------


class _Layout:
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


def _value_table(value: Tensor, layout: _Layout) -> Tensor:
    table = layout.zeros()
    for pixels, inner in layout.pixels(table):
        inner.copy_(value[:, pixels].unflatten(1, inner.shape[2:4]).permute(0, 3, 1, 2, 4))
    return table


# --- samples ----------------------------------------------------------------------------------------------------------


def blocks(points: Tensor, limit: int, map_size: int = 0) -> Iterator[Block]:
    """Blocks of at most `limit` samples: as many queries as fit, then heads, then images.

    A block takes several heads only with all queries, several images only with all heads, and only so many that
    `map_size` times the number of its maps stays below `limit`.
    """
    B, Q, M, L, N, _ = points.shape
    block_queries = min(Q, max(1, limit // (L * N)))
    map_size = max(map_size, block_queries * L * N)
    block_heads = min(M, max(1, limit // map_size))
    block_images = min(B, max(1, limit // (map_size * block_heads)))

    def slices(size: int, step: int) -> list[slice]:
        return [slice(i, min(i + step, size)) for i in range(0, size, step)]

    return product(slices(B, block_images), slices(Q, block_queries), slices(M, block_heads))


def _num_maps(block: Block) -> int:
    images, _, heads = block
    return (images.stop - images.start) * (heads.stop - heads.start)


def _by_map(tensor: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of a block of (B, Q, M, ...), heads before queries: (b, m, q, ...)."""
    return tensor[block].transpose(1, 2).to(dtype, copy=True, memory_format=torch.contiguous_format)


class _Samples(NamedTuple):
    """The samples of a block, (b * m * q, L * N) each."""

    rows: Tensor
    """Row of the pixel (x0, y0) at a sample's upper left, counted from the block's first row; (x0 + 1, y0) follows,
    (x0, y0 + 1) is `pitch` rows further."""
    fx: Tensor
    """By how much the sample is past x0, in [0, 1)."""
    fy: Tensor
    weights: Tensor
    """Attention weights, after the softmax."""


def _axis(points: Tensor, reference: Tensor | None, block: Block, size: Tensor) -> tuple[Tensor, Tensor]:
    """Floor and fraction (b * m * q, L * N) of one coordinate in pixels.

    Args:
        points: (B, Q, M, L, N), that coordinate alone.
        reference: (B, Q) or None.
        block: what to take of them.
        size: the maps' size along this axis, (L * N,).
    """
    position = _by_map(points, block, size.dtype)
    if reference is None:
        position.flatten(-2).mul_(size).sub_(0.5)
    else:
        level_size = size[:: points.shape[-1]]
        centre = reference[block[:2]].to(size.dtype)[:, None, :, None] * level_size - 0.5  # (b, 1, q, L)
        position.add_(centre[..., None])
    position = position.view(-1, len(size))
    # What is not in (-1, size), NaN included, goes to the zeros at -2 or at size.
    position.nan_to_num_(nan=-2.0)
    F.threshold(position, -1.0, -2.0, inplace=True)
    torch.minimum(position, size, out=position)
    low = position.floor()
    return low, position.sub_(low)


def _samples(layout: _Layout, points: Tensor, scores: Tensor, reference: Tensor | None, block: Block) -> _Samples:
    reference_x, reference_y = (None, None) if reference is None else reference.unbind(-1)
    x0, fx = _axis(points[..., 0], reference_x, block, layout.width)
    y0, fy = _axis(points[..., 1], reference_y, block, layout.height)
    rows = y0.to(layout.index_dtype).mul_(layout.pitch).add_(x0.to(layout.index_dtype)).add_(layout.origin)
    map_starts = torch.arange(_num_maps(block), dtype=layout.index_dtype, device=layout.device) * layout.rows
    rows.view(len(map_starts), -1).add_(map_starts[:, None])
    weights = _by_map(scores, block, layout.dtype).view(fx.shape)
    if reference is not None:
        weights = weights.softmax(-1)
    return _Samples(rows, fx, fy, weights)


def _corner_weights(weights: Tensor, fx: Tensor, fy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`weights` split over upper left, upper right, lower left and lower right; in place, so `weights` is gone."""
    right = weights * fx
    left = weights.sub_(right)
    lower_left, lower_right = left * fy, right * fy
    return left.sub_(lower_left), right.sub_(lower_right), lower_left, lower_right


# --- forward and backward ---------------------------------------------------------------------------------------------


def _bag(rows: Tensor, table: Tensor, weights: Tensor, starts: Tensor | None = None) -> Tensor:
    return F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights)


def forward(value: Tensor, shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None) -> Tensor:
    """The output (B, Q, M * D); see `op` for the arguments."""
    layout = _Layout(value, shapes, points.shape[4])
    table = _value_table(value, layout)
    if reference is not None:
        reference = reference.expand(layout.B, -1, -1)
    out = value.new_empty((*points.shape[:3], layout.D))
    for block in blocks(points, MAX_TEMPORARY // 8):
        samples = _samples(layout, points, scores, reference, block)
        weights = _corner_weights(samples.weights, samples.fx, samples.fy)
        left = table[layout.first_row(block) :]
        right = left[1:]
        total = _bag(samples.rows, left, weights[0])
        total += _bag(samples.rows, right, weights[1])
        rows_below = samples.rows.add_(layout.pitch)
        total += _bag(rows_below, left, weights[2])
        total += _bag(rows_below, right, weights[3])
        target = out[block].transpose(1, 2)
        target.copy_(total.view(target.shape))
    return out.flatten(2)


def backward(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    scores: Tensor,
    reference: Tensor | None,
    needs_value: bool,
    needs_reference: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """The gradients of value, points, scores and, per image (B, Q, 2), reference; see `op` for the arguments."""
    layout = _Layout(value, shapes, points.shape[4])
    grad_out = grad_out.unflatten(-1, (layout.M, layout.D))
    if reference is not None:
        reference = reference.expand(layout.B, -1, -1)
    grad_samples = _sample_gradients(layout, grad_out, value, points, scores, reference, needs_reference)
    grad_value = _value_gradient(layout, grad_out, value, points, scores, reference) if needs_value else None
    return grad_value, *grad_samples


def _dots(pairs: Tensor, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """`grad` times the pixel in each row, and times the difference to its right neighbour.

    Args:
        pairs: (all rows, 2 * D), a pixel and its right neighbour.
        rows: (b * m * q, L * N).
        grad: (b * m * q, 1, D).

    Returns:
        Two tensors of the shape of `rows`.
    """
    bags, samples = rows.shape
    step = max(1, MAX_TEMPORARY // (samples * pairs.shape[1]))
    dots = grad.new_empty((bags, 1, 2 * samples))
    gathered = grad.new_empty((min(step, bags) * samples, pairs.shape[1]))
    for part, part_grad, out in zip(rows.split(step), grad.split(step), dots.split(step), strict=True):
        corners = torch.index_select(pairs, 0, part.flatten(), out=gathered[: part.numel()])
        torch.bmm(part_grad, corners.view(len(part), -1, grad.shape[-1]).mT, out=out)
    left, right = dots.view(bags, samples, 2).unbind(-1)
    return left, right - left


def _sample_gradients(
    layout: _Layout,
    grad_out: Tensor,
    value: Tensor,
    points: Tensor,
    scores: Tensor,
    reference: Tensor | None,
    needs_reference: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    table = _value_table(value, layout)
    # A pixel and its right neighbour, (rows, 2 * D): one gather reads both.
    pairs = table.flatten().unfold(0, 2 * layout.D, layout.D)
    grad_points, grad_scores = points.new_empty(points.shape), scores.new_empty(scores.shape)
    grad_reference = table.new_zeros((layout.B, points.shape[1], 2)) if needs_reference else None
    for block in blocks(points, MAX_TEMPORARY // 8):
        samples = _samples(layout, points, scores, reference, block)
        fx, fy, weights = samples.fx, samples.fy, samples.weights
        grad = _by_map(grad_out, block, layout.dtype).view(-1, 1, layout.D)
        first = pairs[layout.first_row(block) :]
        top, top_slope = _dots(first, samples.rows, grad)
        bottom, bottom_slope = _dots(first, samples.rows.add_(layout.pitch), grad)
        top = torch.addcmul(top, top_slope, fx)
        slope_y = torch.addcmul(bottom, bottom_slope, fx).sub_(top)
        slope_x = torch.lerp(top_slope, bottom_slope, fy)
        grad_weights = torch.addcmul(top, slope_y, fy)

        shape = points[block].transpose(1, 2).shape[:-1]  # (b, m, q, L, N)
        for axis, (slope, size) in enumerate(((slope_x, layout.width), (slope_y, layout.height))):
            slope *= weights
            if grad_reference is not None:
                grad_reference[..., axis][block[:2]] += (slope * size).view(shape).sum((1, 3, 4))
            if reference is None:
                slope *= size
            grad_points[..., axis][block].transpose(1, 2).copy_(slope.view(shape))
        if reference is not None:
            mean = (weights * grad_weights).sum(-1, keepdim=True)
            grad_weights.sub_(mean).mul_(weights)
        grad_scores[block].transpose(1, 2).copy_(grad_weights.view(shape))
    return grad_points, grad_scores, grad_reference


def _value_gradient(
    layout: _Layout, grad_out: Tensor, value: Tensor, points: Tensor, scores: Tensor, reference: Tensor | None
) -> Tensor:
    grad_table = layout.zeros()
    # A block walks over all rows of its maps: with fewer samples than rows most of that would be for nothing.
    limit = max(layout.rows, MAX_TEMPORARY // 2)
    for block in blocks(points, limit, map_size=layout.rows * layout.D // 2):
        samples = _samples(layout, points, scores, reference, block)
        grad = _by_map(grad_out, block, layout.dtype).view(-1, layout.D)
        rows, order = samples.rows.flatten().sort(stable=True)
        bags = order // samples.rows.shape[1]
        sorted_samples = (t.flatten().index_select(0, order) for t in (samples.weights, samples.fx, samples.fy))
        weights = _corner_weights(*sorted_samples)
        all_rows = torch.arange(_num_maps(block) * layout.rows, dtype=rows.dtype, device=rows.device)
        starts = torch.searchsorted(rows, all_rows)
        upper, lower = _bag(bags, grad, weights[0], starts), _bag(bags, grad, weights[2], starts)
        upper[1:] += _bag(bags, grad, weights[1], starts)[:-1]
        lower[1:] += _bag(bags, grad, weights[3], starts)[:-1]
        for above, below in zip(layout.lines(upper), layout.lines(lower), strict=True):
            above[:, 1:] += below[:, :-1]
        grad_table[layout.first_row(block) :][: len(upper)] += upper
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    for pixels, inner in layout.pixels(grad_table):
        grad_value[:, pixels].unflatten(1, inner.shape[2:4]).copy_(inner.permute(0, 2, 3, 1, 4))
    return grad_value
