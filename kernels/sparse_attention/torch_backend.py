"""Sparse sampling attention in PyTorch: `op` has the equation, the letters and the conventions.

The maps lie in one table (`torch_table`), in which nothing has to be masked. Samples are read by `embedding_bag`, whose
bag is one query in one head: it gathers rows and adds them up with weights, and keeps nothing. The gradient of the
table is the same gather the other way round: samples are sorted by row, a bag is one row, and what it gathers are rows
of `grad_out`. The other gradients take the products of a row of `grad_out` with four rows of the table, which
`sampled_addmm` computes without copying rows. No sum depends on the order in which threads run.

Work goes image by image and head by head, in blocks that stay in a CPU's cache: one head's maps are small enough to.
"""

import functools
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .torch_table import Block, Layout, map_values, value_table

# Elements of the largest temporary apart from tables; images, heads and queries are taken in blocks to stay below it.
# Steps with many temporaries take a part of it each, small enough for a CPU's cache and large enough for its threads.
MAX_TEMPORARY = 1 << 20


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


def _samples(layout: Layout, points: Tensor, scores: Tensor, reference: Tensor | None, block: Block) -> _Samples:
    reference_x, reference_y = (None, None) if reference is None else reference.unbind(-1)
    x0, fx = _axis(points[..., 0], reference_x, block, layout.width)
    y0, fy = _axis(points[..., 1], reference_y, block, layout.height)
    rows = y0.to(layout.index_dtype).mul_(layout.pitch).add_(x0.to(layout.index_dtype)).add_(layout.origin)
    map_starts = torch.arange(_num_maps(block), dtype=layout.index_dtype, device=layout.device) * layout.rows
    rows.view(len(map_starts), -1).add_(map_starts[:, None])
    weights = _by_map(scores, block, layout.dtype).view(fx.shape)
    if reference is not None:
        # Along rows that are shorter than a vector of a CPU a softmax takes 6 times as long as across them.
        short = weights.shape[-1] < 16
        weights = weights.t().softmax(0).t().contiguous() if short else weights.softmax(-1)
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
    layout = Layout(value, shapes, points.shape[4])
    table = value_table(value, layout)
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
    layout = Layout(value, shapes, points.shape[4])
    grad_out = grad_out.unflatten(-1, (layout.M, layout.D))
    if reference is not None:
        reference = reference.expand(layout.B, -1, -1)
    table = value_table(value, layout)
    grads = _SampleGradients(
        points.new_empty(points.shape),
        scores.new_empty(scores.shape),
        table.new_zeros((layout.B, points.shape[1], 2)) if needs_reference else None,
    )
    grad_table = layout.zeros() if needs_value else None
    # A block walks over all rows of its maps: with fewer samples than rows most of that would be for nothing.
    limit = max(layout.rows if needs_value else 0, MAX_TEMPORARY // 8)
    for block in blocks(points, limit, map_size=layout.rows * layout.D // 4):
        samples = _samples(layout, points, scores, reference, block)
        grad = _by_map(grad_out, block, layout.dtype).view(-1, layout.D)
        first = layout.first_row(block)
        if grad_table is not None:
            block_rows = _num_maps(block) * layout.rows
            grad_table[first : first + block_rows] += _value_gradient(layout, samples, grad, block_rows)
        dots = _corner_dots(layout, table[first:], samples.rows, grad)
        _write_sample_gradients(layout, samples, dots, grads, block, softmax=reference is not None)
    return None if grad_table is None else map_values(grad_table, value, layout), *grads


class _SampleGradients(NamedTuple):
    points: Tensor
    scores: Tensor
    reference: Tensor | None


def _corner_dots(layout: Layout, table: Tensor, rows: Tensor, grad: Tensor) -> Sequence[Tensor]:
    """`grad` times the pixels at upper left, upper right, lower left and lower right of each sample.

    Args:
        layout: of the table.
        table: from the block's first row on.
        rows: (b * m * q, L * N).
        grad: (b * m * q, D).

    Returns:
        Four tensors of the shape of `rows`.
    """
    # A product in CSR format has at most as many entries in a row as columns, even where a pixel is read several times.
    if not table.is_cpu or 4 * rows.shape[1] > len(table):
        return [*_gathered_dots(table, rows, grad), *_gathered_dots(table, rows + layout.pitch, grad)]
    _silence_beta_warning()
    # Four entries for each sample of the product of grad and the table: a sparse matrix in CSR format.
    below = rows + layout.pitch
    corners = torch.cat([rows, rows + 1, below, below + 1], 1)
    starts = torch.arange(0, corners.numel() + 1, corners.shape[1], dtype=corners.dtype)
    zeros = grad.new_zeros(corners.numel())
    wanted = torch.sparse_csr_tensor(starts, corners.flatten(), zeros, (len(grad), len(table)), check_invariants=False)
    dots = torch.sparse.sampled_addmm(wanted, grad, table.t(), beta=0, out=wanted)
    return dots.values().view(corners.shape).chunk(4, 1)


@functools.cache
def _silence_beta_warning() -> None:
    """Make a sparse matrix: PyTorch warns of the first one in a process, which is of no use to the caller."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0], [], [], (0, 0))


def _gathered_dots(table: Tensor, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """`grad` times the pixel in each row, and times its right neighbour."""
    bags, samples = rows.shape
    D = grad.shape[1]
    # A pixel and its right neighbour, (rows, 2 * D): one gather reads both.
    pairs = table.flatten().unfold(0, 2 * D, D)
    step = max(1, MAX_TEMPORARY // (samples * 2 * D))
    dots = grad.new_empty((bags, 1, 2 * samples))
    for part, part_grad, out in zip(rows.split(step), grad[:, None].split(step), dots.split(step), strict=True):
        corners = pairs.index_select(0, part.flatten())
        torch.bmm(part_grad, corners.view(len(part), -1, D).mT, out=out)
    left, right = dots.view(bags, samples, 2).unbind(-1)
    return left, right


def _write_sample_gradients(
    layout: Layout,
    samples: _Samples,
    dots: Sequence[Tensor],
    grads: _SampleGradients,
    block: Block,
    softmax: bool,
) -> None:
    """Write a block's gradients of points and scores, and add those of the reference."""
    upper_left, upper_right, lower_left, lower_right = dots
    fx, fy, weights = samples.fx, samples.fy, samples.weights
    top_slope, bottom_slope = upper_right - upper_left, lower_right - lower_left
    top = torch.addcmul(upper_left, top_slope, fx)
    slope_y = torch.addcmul(lower_left, bottom_slope, fx).sub_(top)
    slope_x = torch.lerp(top_slope, bottom_slope, fy)
    grad_weights = torch.addcmul(top, slope_y, fy)

    shape = grads.points[block].transpose(1, 2).shape[:-1]  # (b, m, q, L, N)
    for axis, (slope, size) in enumerate(((slope_x, layout.width), (slope_y, layout.height))):
        slope *= weights
        if grads.reference is not None:
            grads.reference[..., axis][block[:2]] += (slope * size).view(shape).sum((1, 3, 4))
        if not softmax:
            slope *= size
        grads.points[..., axis][block].transpose(1, 2).copy_(slope.view(shape))
    if softmax:
        mean = (weights * grad_weights).sum(-1, keepdim=True)
        grad_weights.sub_(mean).mul_(weights)
    grads.scores[block].transpose(1, 2).copy_(grad_weights.view(shape))


def _value_gradient(layout: Layout, samples: _Samples, grad: Tensor, block_rows: int) -> Tensor:
    """What a block's samples add to the gradient of its `block_rows` rows of the table.

    Args:
        layout: of the table.
        samples: of the block.
        grad: (b * m * q, D).
        block_rows: rows of the block's maps.

    Returns:
        (block_rows, D).
    """
    # A radix sort takes half the time in 16 bits.
    narrow = torch.int16 if block_rows < 2**15 else samples.rows.dtype
    rows, order = samples.rows.flatten().to(narrow).sort(stable=True)
    bags, L_N = samples.rows.shape
    bag_of = torch.arange(bags, dtype=layout.index_dtype, device=layout.device).repeat_interleave(L_N)
    sorted_bags, *sorted_samples = (
        t.flatten().index_select(0, order) for t in (bag_of, samples.weights, samples.fx, samples.fy)
    )
    weights = _corner_weights(*sorted_samples)
    all_rows = torch.arange(block_rows, dtype=narrow, device=layout.device)
    starts = torch.searchsorted(rows, all_rows, out_int32=layout.index_dtype == torch.int32)
    upper, lower = (_bag(sorted_bags, grad, weights[corner], starts) for corner in (0, 2))
    upper[1:] += _bag(sorted_bags, grad, weights[1], starts)[:-1]
    lower[1:] += _bag(sorted_bags, grad, weights[3], starts)[:-1]
    for above, below in zip(layout.lines(upper), layout.lines(lower), strict=True):
        above[:, 1:] += below[:, :-1]
    return upper
