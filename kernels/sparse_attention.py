"""Sparse sampling attention over one or many scales: Eq. 2-4 and 6 of the paper.

    out[b, q, m] = sum over l, n of  softmax(logits[b, q, m])[l, n] * value_l[b, :, m] at (c_q + offset[b, q, m, l, n])

Letters: B batch, S = sum of H_l * W_l, M heads, D channels a head, Q queries, L levels, N points a level.

    value      (B, S, M, D)        the levels one after another, each in row-major order
    points     (B, Q, M, L, N, 2)  (x, y): offsets in pixels of level l, or locations in [0, 1]
    scores     (B, Q, M, L, N)     logits, normalised inside over L * N, or weights that are used as they are
    reference  (B or 1, Q, 2)      (x, y) in [0, 1], the paper's c_q; None: points are locations, scores are weights
    out        (B, Q, M * D)

Pixel centres lie at (i + 0.5) / size, so a sample is at x = reference_x * W_l - 0.5 + offset_x pixels, counted from the
centre of pixel 0. Between centres values are bilinear; what lies outside the map counts as zero, so a sample reads
something only where -1 < x < W_l and -1 < y < H_l. Comparisons with NaN are false: NaN is outside, and so is infinity.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_floating, check_same_device, check_shape

# --- torch backend ----------------------------------------------------------------------------------------------------

# Elements of the largest temporary; queries are taken in chunks to stay below it.
MAX_TEMPORARY = 1 << 24


def _compute_dtype(value: Tensor) -> torch.dtype:
    """Of coordinates and sums."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _levels(shapes: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (level, start in S, height, width) from the flat list H_0, W_0, H_1, ..."""
    start = 0
    for level, (height, width) in enumerate(zip(shapes[::2], shapes[1::2], strict=True)):
        yield level, start, height, width
        start += height * width


def _value_table(value: Tensor) -> Tensor:
    """(B, S, M, D) -> (B * S * M + 1, D) in the compute dtype; the last row is the zero that lies outside the maps."""
    return F.pad(value.to(_compute_dtype(value)).reshape(-1, value.shape[-1]), (0, 0, 0, 1))


def _corners(
    value: Tensor, points: Tensor, reference: Tensor | None, start: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the samples of one level lie.

    Args:
        value: (B, S, M, D), for its shape and dtype.
        points: (B, Q, M, N, 2) of this level.
        reference: (B or 1, Q, 2) or None.

    Returns:
        rows (B, Q, M, N, 4) int64 into `_value_table`, of the corners (x0, y0), (x0 + 1, y0), (x0, y0 + 1),
        (x0 + 1, y0 + 1); and the fractions fx and fy (B, Q, M, N) by which the sample is past (x0, y0).
    """
    batch, length, heads, _ = value.shape
    dtype = _compute_dtype(value)
    x, y = points.to(dtype).unbind(-1)
    if reference is None:
        x, y = x * width - 0.5, y * height - 0.5
    else:
        ref_x, ref_y = reference.to(dtype)[:, :, None, None].unbind(-1)
        x, y = (ref_x * width - 0.5) + x, (ref_y * height - 0.5) + y
    # At -2 all four corners are outside; nothing huge or NaN reaches the conversion to integers.
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)
    x, y = torch.where(inside, x, -2.0), torch.where(inside, y, -2.0)
    left, top = x.floor(), y.floor()
    x0, y0 = left.long(), top.long()
    left_in, right_in = x0 >= 0, (x0 >= -1) & (x0 < width - 1)
    top_in, bottom_in = y0 >= 0, (y0 >= -1) & (y0 < height - 1)

    image = torch.arange(batch, device=value.device)[:, None, None, None] * length
    head = torch.arange(heads, device=value.device)[:, None]
    row = (image + start + y0 * width + x0) * heads + head
    outside = batch * length * heads
    rows = torch.stack(
        (
            torch.where(left_in & top_in, row, outside),
            torch.where(right_in & top_in, row + heads, outside),
            torch.where(left_in & bottom_in, row + width * heads, outside),
            torch.where(right_in & bottom_in, row + (width + 1) * heads, outside),
        ),
        dim=-1,
    )
    return rows, x - left, y - top


def _corner_weights(weight: Tensor, fx: Tensor, fy: Tensor) -> Tensor:
    """The bilinear weights of the four corners times `weight`: (...) -> (..., 4)."""
    upper, lower = weight * (1 - fy), weight * fy
    return torch.stack((upper * (1 - fx), upper * fx, lower * (1 - fx), lower * fx), dim=-1)


def _attention_weights(value: Tensor, scores: Tensor, reference: Tensor | None) -> Tensor:
    """(B, Q, M, L, N) in the compute dtype."""
    weights = scores.to(_compute_dtype(value))
    return weights if reference is None else weights.flatten(-2).softmax(-1).view(weights.shape)


def _query_chunks(points: Tensor, elements_per_sample: int) -> Iterator[slice]:
    batch, queries, heads, _, num_points, _ = points.shape
    size = max(1, MAX_TEMPORARY // (batch * heads * num_points * elements_per_sample))
    return (slice(i, i + size) for i in range(0, queries, size))


def _forward_torch(
    value: Tensor, shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None
) -> Tensor:
    batch, _, heads, channels = value.shape
    table = _value_table(value)
    out = value.new_empty((batch, points.shape[1], heads * channels))
    for chunk in _query_chunks(points, elements_per_sample=4):
        weights = _attention_weights(value, scores[:, chunk], reference)
        ref = None if reference is None else reference[:, chunk]
        total = torch.zeros((), dtype=table.dtype, device=table.device)
        for level, start, height, width in _levels(shapes):
            rows, fx, fy = _corners(value, points[:, chunk, :, level], ref, start, height, width)
            per_sample = _corner_weights(weights[:, :, :, level], fx, fy)
            total = total + F.embedding_bag(
                rows.flatten(-2).flatten(0, 2),
                table,
                per_sample_weights=per_sample.flatten(-2).flatten(0, 2),
                mode="sum",
            )
        out[:, chunk] = total.view(batch, -1, heads * channels)
    return out


def _backward_torch(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    scores: Tensor,
    reference: Tensor | None,
    value_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of value (zeros unless `value_grad`), points, scores and reference."""
    batch, channels = value.shape[0], value.shape[-1]
    table = _value_table(value)
    grad_table = torch.zeros_like(table)
    grad_points, grad_scores = torch.empty_like(points), torch.empty_like(scores)
    grad_reference = None if reference is None else table.new_zeros((batch, points.shape[1], 2))
    for chunk in _query_chunks(points, elements_per_sample=4 * channels):
        weights = _attention_weights(value, scores[:, chunk], reference)
        ref = None if reference is None else reference[:, chunk]
        grad = grad_out[:, chunk].to(table.dtype).reshape(-1, channels, 1)
        grad_weights = torch.empty_like(weights)
        for level, start, height, width in _levels(shapes):
            weight = weights[:, :, :, level]
            rows, fx, fy = _corners(value, points[:, chunk, :, level], ref, start, height, width)
            dots = (table[rows.view(grad.shape[0], -1)] @ grad).view(rows.shape)
            if value_grad:
                per_sample = _corner_weights(weight, fx, fy).view(grad.shape[0], -1, 1)
                grad_table.index_add_(0, rows.flatten(), (per_sample * grad.mT).view(-1, channels))
            top_left, top_right, bottom_left, bottom_right = dots.unbind(-1)
            top = torch.lerp(top_left, top_right, fx)
            bottom = torch.lerp(bottom_left, bottom_right, fx)
            grad_weights[:, :, :, level] = torch.lerp(top, bottom, fy)
            slope_x = torch.lerp(top_right - top_left, bottom_right - bottom_left, fy)
            grad_pixels = weight[..., None] * torch.stack((slope_x, bottom - top), dim=-1)
            if grad_reference is None:
                grad_pixels[..., 0] *= width
                grad_pixels[..., 1] *= height
            else:
                grad_reference[:, chunk, 0] += grad_pixels[..., 0].sum((-1, -2)) * width
                grad_reference[:, chunk, 1] += grad_pixels[..., 1].sum((-1, -2)) * height
            grad_points[:, chunk, :, level] = grad_pixels.to(points.dtype)
        if reference is not None:
            mean = (weights * grad_weights).sum((-1, -2), keepdim=True)
            grad_weights = weights * (grad_weights - mean)
        grad_scores[:, chunk] = grad_weights.to(scores.dtype)
    return grad_table[:-1].view(value.shape).to(value.dtype), grad_points, grad_scores, grad_reference


# --- custom ops -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("unept::sparse_sampling", mutates_args=())
def _sparse_sampling(
    value: Tensor, shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None
) -> Tensor:
    return _forward_torch(value, shapes, points, scores, reference)


@_sparse_sampling.register_fake
def _(value: Tensor, shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None) -> Tensor:
    return value.new_empty((value.shape[0], points.shape[1], value.shape[2] * value.shape[3]))


@torch.library.custom_op("unept::sparse_sampling_backward", mutates_args=())
def _sparse_sampling_backward(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    scores: Tensor,
    reference: Tensor | None,
    value_grad: bool,
    reference_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_value, grad_points, grad_scores, grad_reference = _backward_torch(
        grad_out, value, shapes, points, scores, reference, value_grad
    )
    if reference is None or grad_reference is None:
        return grad_value, grad_points, grad_scores, value.new_empty(0)
    if reference.shape[0] != value.shape[0]:
        grad_reference = grad_reference.sum(0, keepdim=True)
    return grad_value, grad_points, grad_scores, grad_reference.to(reference.dtype)


@_sparse_sampling_backward.register_fake
def _(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    scores: Tensor,
    reference: Tensor | None,
    value_grad: bool,
    reference_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        points.new_empty(points.shape),
        scores.new_empty(scores.shape),
        value.new_empty(0) if reference is None else reference.new_empty(reference.shape),
    )


class _SparseSampling(torch.autograd.Function):
    """Saves its inputs and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, shapes: list[int], points: Tensor, scores: Tensor, reference: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(value, points, scores, reference)
        ctx.shapes = shapes
        return _sparse_sampling(value, shapes, points, scores, reference)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        value, points, scores, reference = ctx.saved_tensors
        needs_value, _, needs_points, needs_scores, needs_reference = ctx.needs_input_grad
        grads = _sparse_sampling_backward(
            grad_out, value, ctx.shapes, points, scores, reference, needs_value, needs_reference
        )
        return (
            grads[0] if needs_value else None,
            None,
            grads[1] if needs_points else None,
            grads[2] if needs_scores else None,
            grads[3] if needs_reference else None,
        )


# --- public functions -------------------------------------------------------------------------------------------------


def _flat_shapes(spatial_shapes: Sequence[tuple[int, int]], value: Tensor) -> list[int]:
    """[(H_0, W_0), ...] -> [H_0, W_0, ...], checked against `value`."""
    shapes = [size for shape in spatial_shapes for size in shape]
    if not shapes or any(len(shape) != 2 for shape in spatial_shapes) or any(size < 1 for size in shapes):
        raise ValueError(f"spatial_shapes is {spatial_shapes}; it must list a (height, width) of at least 1 per level")
    length = sum(height * width for height, width in spatial_shapes)
    if value.dim() == 4 and value.shape[1] != length:
        raise ValueError(
            f"spatial_shapes {spatial_shapes} have {length} pixels in all, but value has {value.shape[1]}, in shape "
            f"{tuple(value.shape)}: flatten each level's (H, W) and concatenate the levels along dimension 1"
        )
    return shapes


def sparse_sampling_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    offsets: Tensor,
    logits: Tensor,
    reference_points: Tensor,
) -> Tensor:
    """Attend from each query to N sampled points on each of L feature maps (Eq. 2-4, 6).

    Coordinates and sums are float32 (float64 for float64 values), whatever the dtypes of the tensors, which may differ.

    Args:
        value: (B, S, M, D) float, S = sum of H_l * W_l, the levels one after another.
        spatial_shapes: [(H_0, W_0), ...], L pairs of Python ints.
        offsets: (B, Q, M, L, N, 2) float, (x, y) in pixels of level l. Views with any strides are read in place.
        logits: (B, Q, M, L, N) float; the softmax over L * N is taken inside.
        reference_points: (B or 1, Q, 2) float, (x, y) in [0, 1], pixel centres at (i + 0.5) / size.

    Returns:
        (B, Q, M * D) in value's dtype. Samples outside a map, at NaN and at infinity count as zero.

    Raises:
        TypeError: for tensors that hold no floats, and spatial_shapes that are no Python ints.
        ValueError: for shapes that don't fit together and tensors on several devices.
    """
    if isinstance(spatial_shapes, Tensor) or not all(isinstance(size, int) for pair in spatial_shapes for size in pair):
        raise TypeError(
            f"spatial_shapes is {spatial_shapes}; it must hold Python ints, so that no read of the device is needed: "
            "convert it once with spatial_shapes.tolist()"
        )
    shapes = _flat_shapes(spatial_shapes, value)
    check_floating(value=value, offsets=offsets, logits=logits, reference_points=reference_points)
    check_same_device(value=value, offsets=offsets, logits=logits, reference_points=reference_points)
    check_shape("value", value, ("B", "S", "M", "D"))
    batch, _, heads, _ = value.shape
    levels = len(spatial_shapes)
    check_shape("offsets", offsets, (batch, "Q", heads, levels, "N", 2))
    queries, num_points = offsets.shape[1], offsets.shape[4]
    check_shape("logits", logits, (batch, queries, heads, levels, num_points))
    check_shape("reference_points", reference_points, ("B or 1", queries, 2))
    return _SparseSampling.apply(value, shapes, offsets, logits, reference_points)
