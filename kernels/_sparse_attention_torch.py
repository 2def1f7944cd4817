"""Sparse sampling attention in PyTorch: see `sparse_attention` for the equation, the letters and the conventions."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import compute_dtype

# Elements of the largest temporary; queries are taken in chunks to stay below it.
MAX_TEMPORARY = 1 << 22


def levels(shapes: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (level, start in S, height, width) from the flat list H_0, W_0, H_1, ..."""
    start = 0
    for level, (height, width) in enumerate(zip(shapes[::2], shapes[1::2], strict=True)):
        yield level, start, height, width
        start += height * width


def _value_table(value: Tensor) -> Tensor:
    """(B, S, M, D) -> (B * S * M + 1, D) in the compute dtype; the last row is the zero that lies outside the maps."""
    return F.pad(value.to(compute_dtype(value)).reshape(-1, value.shape[-1]), (0, 0, 0, 1))


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
    dtype = compute_dtype(value)
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
    weights = scores.to(compute_dtype(value))
    return weights if reference is None else weights.flatten(-2).softmax(-1).view(weights.shape)


def _query_chunks(points: Tensor, elements_per_sample: int) -> Iterator[slice]:
    batch, queries, heads, _, num_points, _ = points.shape
    size = max(1, MAX_TEMPORARY // (batch * heads * num_points * elements_per_sample))
    return (slice(i, i + size) for i in range(0, queries, size))


def forward(value: Tensor, shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None) -> Tensor:
    batch, _, heads, channels = value.shape
    table = _value_table(value)
    out = value.new_empty((batch, points.shape[1], heads * channels))
    for chunk in _query_chunks(points, elements_per_sample=4):
        weights = _attention_weights(value, scores[:, chunk], reference)
        ref = None if reference is None else reference[:, chunk]
        total = torch.zeros((), dtype=table.dtype, device=table.device)
        for level, start, height, width in levels(shapes):
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


def backward(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    scores: Tensor,
    reference: Tensor | None,
    value_grad: bool,
    reference_grad: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """The gradients of value, points, scores and, per image (B, Q, 2), reference."""
    batch, channels = value.shape[0], value.shape[-1]
    table = _value_table(value)
    grad_table = torch.zeros_like(table) if value_grad else None
    grad_points, grad_scores = points.new_empty(points.shape), scores.new_empty(scores.shape)
    grad_reference = table.new_zeros((batch, points.shape[1], 2)) if reference_grad else None
    for chunk in _query_chunks(points, elements_per_sample=4 * channels):
        weights = _attention_weights(value, scores[:, chunk], reference)
        ref = None if reference is None else reference[:, chunk]
        grad = grad_out[:, chunk].to(table.dtype).reshape(-1, channels, 1)
        grad_weights = torch.empty_like(weights)
        for level, start, height, width in levels(shapes):
            weight = weights[:, :, :, level]
            rows, fx, fy = _corners(value, points[:, chunk, :, level], ref, start, height, width)
            corners = table.index_select(0, rows.flatten()).view(grad.shape[0], -1, channels)
            dots = (corners @ grad).view(rows.shape)
            if grad_table is not None:
                per_sample = _corner_weights(weight, fx, fy).view(grad.shape[0], -1, 1)
                grad_table.index_add_(0, rows.flatten(), (per_sample * grad.mT).view(-1, channels))
            top_left, top_right, bottom_left, bottom_right = dots.unbind(-1)
            top = torch.lerp(top_left, top_right, fx)
            bottom = torch.lerp(bottom_left, bottom_right, fx)
            grad_weights[:, :, :, level] = torch.lerp(top, bottom, fy)
            slope_x = torch.lerp(top_right - top_left, bottom_right - bottom_left, fy)
            grad_pixels = weight[..., None] * torch.stack((slope_x, bottom - top), dim=-1)
            if grad_reference is not None:
                grad_reference[:, chunk, 0] += grad_pixels[..., 0].sum((-1, -2)) * width
                grad_reference[:, chunk, 1] += grad_pixels[..., 1].sum((-1, -2)) * height
            if reference is None:
                grad_pixels[..., 0] *= width
                grad_pixels[..., 1] *= height
            grad_points[:, chunk, :, level] = grad_pixels.to(points.dtype)
        if reference is not None:
            mean = (weights * grad_weights).sum((-1, -2), keepdim=True)
            grad_weights = weights * (grad_weights - mean)
        grad_scores[:, chunk] = grad_weights.to(scores.dtype)
    grad_value = None if grad_table is None else grad_table[:-1].view(value.shape).to(value.dtype)
    return grad_value, grad_points, grad_scores, grad_reference
