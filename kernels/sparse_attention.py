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

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import ScatterBuffer, autotune_pool, autotuned, device_guard, scatter_add, size_class, tl, triton
from .backend import runs_on_triton
from .checks import check_count, check_floating, check_integer, check_same_device, check_shape, compute_dtype

# --- torch backend ----------------------------------------------------------------------------------------------------

# Elements of the largest temporary; queries are taken in chunks to stay below it.
MAX_TEMPORARY = 1 << 22


def _levels(shapes: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
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
        for level, start, height, width in _levels(shapes):
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


# --- Triton kernels ---------------------------------------------------------------------------------------------------
# A program takes one image, one head and BLOCK_Q queries; heads and images are the slow program axes, so that programs
# that run together read the same rows. Tiles are [BLOCK_N, BLOCK_Q, BLOCK_D], points first: a sum over points then
# stays within a thread. Strides are those of the shapes above.

_FORWARD_POOL = autotune_pool(
    triton.Config({"BLOCK_Q": 64, "BLOCK_N": 4}, num_warps=8),
    triton.Config({"BLOCK_Q": 32, "BLOCK_N": 2}, num_warps=4),
    triton.Config({"BLOCK_Q": 64, "BLOCK_N": 1}, num_warps=4),
    triton.Config({"BLOCK_Q": 64, "BLOCK_N": 2}, num_warps=4),
    triton.Config({"BLOCK_Q": 64, "BLOCK_N": 2}, num_warps=8),
    triton.Config({"BLOCK_Q": 128, "BLOCK_N": 2}, num_warps=8),
    triton.Config({"BLOCK_Q": 16, "BLOCK_N": 1}, num_warps=4),
)
_BACKWARD_POOL = autotune_pool(
    triton.Config({"BLOCK_Q": 32, "BLOCK_N": 4}, num_warps=4),
    triton.Config({"BLOCK_Q": 32, "BLOCK_N": 2}, num_warps=4),
    triton.Config({"BLOCK_Q": 32, "BLOCK_N": 1}, num_warps=4),
    triton.Config({"BLOCK_Q": 64, "BLOCK_N": 1}, num_warps=4),
    triton.Config({"BLOCK_Q": 64, "BLOCK_N": 1}, num_warps=8),
    triton.Config({"BLOCK_Q": 64, "BLOCK_N": 2}, num_warps=8),
    triton.Config({"BLOCK_Q": 16, "BLOCK_N": 1}, num_warps=4),
)


@triton.jit
def _program_work(num_heads, num_queries, BLOCK_Q: tl.constexpr):
    """The program's image, head, queries [BLOCK_Q] and their mask: past the end the last query repeats, masked."""
    tiles = tl.cdiv(num_queries, BLOCK_Q)
    program = tl.program_id(0)
    index = program % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query = tl.minimum(index, num_queries - 1).to(tl.int64)
    program = program // tiles
    return (program // num_heads).to(tl.int64), (program % num_heads).to(tl.int64), query, index < num_queries


@triton.jit
def _corner(x, y, width, height, stride_s, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets [BLOCK_N, BLOCK_Q, BLOCK_D] of the channels at pixels (x, y) from the level's first pixel; their mask."""
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    channel = tl.arange(0, BLOCK_D)[None, None, :]
    row = (y * width + x).to(tl.int64) * stride_s
    return row[:, :, None] + channel.to(tl.int64) * stride_d, inside[:, :, None] & (channel < D)


@triton.jit
def _score_pointers(scores_ptr, scores_strides, level, n):
    """The scores of the points n [BLOCK_N, 1]; scores_ptr [1, BLOCK_Q]. A stride of 32 bits times an index may not fit
    into 32 bits."""
    return scores_ptr + tl.cast(level, tl.int64) * scores_strides[3] + n.to(tl.int64) * scores_strides[4]


@triton.jit
def _softmax_statistics(
    scores_ptr, scores_strides, L: tl.constexpr, N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Largest logit and 1 / (sum of exponentials), each [1, BLOCK_Q]; scores_ptr [1, BLOCK_Q]."""
    # Finite from the start: a level whose logits are all -inf must not turn the rest into NaN.
    largest = tl.full([1, BLOCK_Q], -3.0e38, tl.float32)
    total = tl.zeros([1, BLOCK_Q], tl.float32)
    for level in tl.range(L):
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            pointers = _score_pointers(scores_ptr, scores_strides, level, n)
            logits = tl.load(pointers, mask=n < N, other=float("-inf")).to(tl.float32)  # [BLOCK_N, BLOCK_Q]
            new_largest = tl.maximum(largest, tl.max(logits, 0)[None, :])
            total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest), 0)[None, :]
            largest = new_largest
    return largest, 1.0 / total


@triton.jit
def _load_weights(pointers, mask, largest, inverse_total, LOCATIONS: tl.constexpr):
    """Attention weights [BLOCK_N, BLOCK_Q], zero outside the mask."""
    if LOCATIONS:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    else:
        logits = tl.load(pointers, mask=mask, other=float("-inf")).to(tl.float32)
        return tl.exp(logits - largest) * inverse_total


@triton.jit
def _load_query(
    reference_ptr,  # [1, BLOCK_Q]
    reference_stride,  # from x to y
    scores_ptr,  # [1, BLOCK_Q]
    scores_strides,
    L: tl.constexpr,
    N: tl.constexpr,
    LOCATIONS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Reference x and y and the softmax's statistics, each [1, BLOCK_Q]; neutral numbers where there are none."""
    if LOCATIONS:
        return 0.0, 0.0, 0.0, 1.0
    else:
        ref_x = tl.load(reference_ptr).to(tl.float32)
        ref_y = tl.load(reference_ptr + reference_stride).to(tl.float32)
        largest, inverse_total = _softmax_statistics(scores_ptr, scores_strides, L, N, BLOCK_Q, BLOCK_N)
        return ref_x, ref_y, largest, inverse_total


@triton.jit
def _load_samples(
    points_ptr,  # [1, BLOCK_Q], at the level
    points_strides,
    n,  # [BLOCK_N, 1]
    mask,
    ref_x,
    ref_y,
    width,
    height,
    LOCATIONS: tl.constexpr,
):
    """Pixel (x0, y0) at the upper left of each sample and the fractions fx, fy past it, each [BLOCK_N, BLOCK_Q].

    Where the mask is false, or where nothing is read, x0 = y0 = -2: all four corners are outside.
    """
    x_ptrs = points_ptr + n.to(tl.int64) * points_strides[4]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(x_ptrs + points_strides[5], mask=mask, other=0.0).to(tl.float32)
    if LOCATIONS:
        x = x * width - 0.5
        y = y * height - 0.5
    else:
        x = (ref_x * width - 0.5) + x
        y = (ref_y * height - 0.5) + y
    inside = mask & (x > -1.0) & (x < width) & (y > -1.0) & (y < height)
    x = tl.where(inside, x, -2.0)
    y = tl.where(inside, y, -2.0)
    left = tl.floor(x)
    top = tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top


@autotuned(_FORWARD_POOL, key=["L", "N", "D", "LOCATIONS"])
def _forward_kernel(
    out_ptr,  # (B, Q, M, D), contiguous
    value_ptr,  # (B, S, M, D)
    value_strides,
    points_ptr,  # (B, Q, M, L, N, 2)
    points_strides,
    scores_ptr,  # (B, Q, M, L, N)
    scores_strides,
    reference_ptr,  # (B, Q, 2), or None
    reference_strides,
    shapes_ptr,  # (2 * L,) int32: H_0, W_0, H_1, ...
    num_heads,
    num_queries,
    size_class,
    L: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    LOCATIONS: tl.constexpr,  # no reference: points are in [0, 1] and scores are weights
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch, head, queries, counts = _program_work(num_heads, num_queries, BLOCK_Q)
    query = queries[None, :]  # [1, BLOCK_Q]
    points_ptr += batch * points_strides[0] + head * points_strides[2] + query * points_strides[1]
    scores_ptr += batch * scores_strides[0] + head * scores_strides[2] + query * scores_strides[1]
    value_ptr += batch * value_strides[0] + head * value_strides[2]
    if not LOCATIONS:
        reference_ptr += batch * reference_strides[0] + query * reference_strides[1]
    ref_x, ref_y, largest, inverse_total = _load_query(
        reference_ptr, reference_strides[2], scores_ptr, scores_strides, L, N, LOCATIONS, BLOCK_Q, BLOCK_N
    )

    out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for level in tl.range(L):
        height = tl.load(shapes_ptr + 2 * level)
        width = tl.load(shapes_ptr + 2 * level + 1)
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            level_ptr = points_ptr + tl.cast(level, tl.int64) * points_strides[3]
            x0, y0, fx, fy = _load_samples(level_ptr, points_strides, n, n < N, ref_x, ref_y, width, height, LOCATIONS)
            score_ptrs = _score_pointers(scores_ptr, scores_strides, level, n)
            weight = _load_weights(score_ptrs, n < N, largest, inverse_total, LOCATIONS)
            samples = tl.zeros([BLOCK_N, BLOCK_Q, BLOCK_D], tl.float32)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    offset, mask = _corner(
                        x0 + dx, y0 + dy, width, height, value_strides[1], value_strides[3], D, BLOCK_D
                    )
                    corner = tl.load(value_ptr + offset, mask=mask, other=0.0).to(tl.float32)
                    along_x = fx if dx == 1 else 1 - fx
                    along_y = fy if dy == 1 else 1 - fy
                    samples += corner * (weight * along_y * along_x)[:, :, None]
            out += tl.sum(samples, 0)
        value_ptr += (height * width).to(tl.int64) * value_strides[1]

    channel = tl.arange(0, BLOCK_D)[None, :]
    rows = (batch * num_queries + queries) * num_heads + head
    mask = counts[:, None] & (channel < D)
    tl.store(out_ptr + rows[:, None] * D + channel, out.to(out_ptr.dtype.element_ty), mask=mask)


@autotuned(_BACKWARD_POOL, key=["L", "N", "D", "LOCATIONS", "VALUE_GRAD"], adds_into=["grad_value_ptr"])
def _backward_kernel(
    grad_value_ptr,  # (B, S, M, D), the data of a ScatterBuffer
    grad_value_strides,
    scale_ptr,  # its scale, or None
    grad_points_ptr,  # (B, Q, M, L, N, 2), contiguous
    grad_weights_ptr,  # (B, Q, M, L, N), contiguous; float32 if scores are logits
    grad_scores_ptr,  # (B, Q, M, L, N), contiguous; may be grad_weights_ptr, and is if LOCATIONS
    grad_reference_ptr,  # (B, Q, M, 2) float32, contiguous, or None
    grad_out_ptr,  # (B, Q, M, D), contiguous
    value_ptr,  # the rest as in the forward kernel
    value_strides,
    points_ptr,
    points_strides,
    scores_ptr,
    scores_strides,
    reference_ptr,
    reference_strides,
    shapes_ptr,
    num_heads,
    num_queries,
    size_class,
    L: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    LOCATIONS: tl.constexpr,
    VALUE_GRAD: tl.constexpr,
    REFERENCE_GRAD: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch, head, queries, counts = _program_work(num_heads, num_queries, BLOCK_Q)
    query = queries[None, :]  # [1, BLOCK_Q]

    points_ptr += batch * points_strides[0] + head * points_strides[2] + query * points_strides[1]
    scores_ptr += batch * scores_strides[0] + head * scores_strides[2] + query * scores_strides[1]
    value_ptr += batch * value_strides[0] + head * value_strides[2]
    grad_value_ptr += batch * grad_value_strides[0] + head * grad_value_strides[2]
    rows = (batch * num_queries + queries) * num_heads + head  # [BLOCK_Q]
    row = rows[None, :]
    grad_points_ptr += row * (L * N * 2)
    grad_weights_ptr += row * (L * N)
    grad_scores_ptr += row * (L * N)
    channel = tl.arange(0, BLOCK_D)[None, :]
    grad_out_ptrs = grad_out_ptr + rows[:, None] * D + channel
    grad_out = tl.load(grad_out_ptrs, mask=channel < D, other=0.0).to(tl.float32)[None, :, :]
    if not LOCATIONS:
        reference_ptr += batch * reference_strides[0] + query * reference_strides[1]
    ref_x, ref_y, largest, inverse_total = _load_query(
        reference_ptr, reference_strides[2], scores_ptr, scores_strides, L, N, LOCATIONS, BLOCK_Q, BLOCK_N
    )

    mean = tl.zeros([1, BLOCK_Q], tl.float32)  # of grad_weights, weighted
    grad_ref_x = tl.zeros([1, BLOCK_Q], tl.float32)
    grad_ref_y = tl.zeros([1, BLOCK_Q], tl.float32)
    for level in tl.range(L):
        height = tl.load(shapes_ptr + 2 * level)
        width = tl.load(shapes_ptr + 2 * level + 1)
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            usable = (n < N) & counts[None, :]  # [BLOCK_N, BLOCK_Q]
            level_ptr = points_ptr + tl.cast(level, tl.int64) * points_strides[3]
            x0, y0, fx, fy = _load_samples(level_ptr, points_strides, n, usable, ref_x, ref_y, width, height, LOCATIONS)
            score_ptrs = _score_pointers(scores_ptr, scores_strides, level, n)
            weight = _load_weights(score_ptrs, usable, largest, inverse_total, LOCATIONS)

            grad_weight = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
            slope_x = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
            slope_y = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    along_x = fx if dx == 1 else 1 - fx
                    along_y = fy if dy == 1 else 1 - fy
                    offset, mask = _corner(
                        x0 + dx, y0 + dy, width, height, value_strides[1], value_strides[3], D, BLOCK_D
                    )
                    corner = tl.load(value_ptr + offset, mask=mask, other=0.0).to(tl.float32)
                    dot = tl.sum(corner * grad_out, 2)
                    grad_weight += dot * along_y * along_x
                    slope_x += dot * along_y * (2 * dx - 1)
                    slope_y += dot * along_x * (2 * dy - 1)
                    if VALUE_GRAD:
                        offset, mask = _corner(x0 + dx, y0 + dy, width, height, grad_value_strides[1], 1, D, BLOCK_D)
                        part = (weight * along_y * along_x)[:, :, None] * grad_out
                        scatter_add(grad_value_ptr + offset, part, mask, scale_ptr, DETERMINISTIC)

            if REFERENCE_GRAD:
                grad_ref_x += tl.sum(weight * slope_x, 0)[None, :] * width
                grad_ref_y += tl.sum(weight * slope_y, 0)[None, :] * height
            if LOCATIONS:
                slope_x *= width
                slope_y *= height
            column = level * N + n
            grad_type = grad_points_ptr.dtype.element_ty
            tl.store(grad_points_ptr + column * 2, (weight * slope_x).to(grad_type), mask=usable)
            tl.store(grad_points_ptr + column * 2 + 1, (weight * slope_y).to(grad_type), mask=usable)
            tl.store(grad_weights_ptr + column, grad_weight.to(grad_weights_ptr.dtype.element_ty), mask=usable)
            mean += tl.sum(weight * grad_weight, 0)[None, :]
        value_ptr += (height * width).to(tl.int64) * value_strides[1]
        grad_value_ptr += (height * width).to(tl.int64) * grad_value_strides[1]

    if not LOCATIONS:
        # The softmax's gradient needs the mean over all points: read back what this program has written.
        tl.debug_barrier()
        for level in tl.range(L):
            for n0 in tl.range(0, N, BLOCK_N):
                n = n0 + tl.arange(0, BLOCK_N)[:, None]
                usable = (n < N) & counts[None, :]
                column = level * N + n
                score_ptrs = _score_pointers(scores_ptr, scores_strides, level, n)
                weight = _load_weights(score_ptrs, usable, largest, inverse_total, LOCATIONS)
                grad_weight = tl.load(grad_weights_ptr + column, mask=usable, other=0.0)
                grad_score = weight * (grad_weight - mean)
                tl.store(grad_scores_ptr + column, grad_score.to(grad_scores_ptr.dtype.element_ty), mask=usable)
    if REFERENCE_GRAD:
        tl.store(grad_reference_ptr + row * 2, grad_ref_x, mask=counts[None, :])
        tl.store(grad_reference_ptr + row * 2 + 1, grad_ref_y, mask=counts[None, :])


# --- launchers --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _shapes_on_device(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """A copy to a GPU waits for it, so that each list of shapes is copied once. A tensor and not constants: every size
    of image then runs the same compiled kernel."""
    return torch.tensor(shapes, dtype=torch.int32, device=device)


def _shared_arguments(
    value: Tensor, shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None
) -> dict[str, Any]:
    """What both kernels take."""
    batch, _, heads, channels = value.shape
    _, queries, _, levels, num_points, _ = points.shape
    if reference is not None:
        reference = reference.expand(batch, -1, -1)
    return {
        "value_ptr": value,
        "value_strides": value.stride(),
        "points_ptr": points,
        "points_strides": points.stride(),
        "scores_ptr": scores,
        "scores_strides": scores.stride(),
        "reference_ptr": reference,
        "reference_strides": (0, 0, 0) if reference is None else reference.stride(),
        "shapes_ptr": _shapes_on_device(tuple(shapes), value.device),
        "num_heads": heads,
        "num_queries": queries,
        "size_class": size_class(batch * heads * queries),
        "L": levels,
        "N": num_points,
        "D": channels,
        "LOCATIONS": reference is None,
        "BLOCK_D": triton.next_power_of_2(channels),
        "enable_fp_fusion": True,
    }


def _grid(value: Tensor, points: Tensor) -> Callable[[dict[str, int]], tuple[int]]:
    return lambda config: (triton.cdiv(points.shape[1], config["BLOCK_Q"]) * value.shape[0] * value.shape[2],)


def _forward_triton(
    value: Tensor, shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None
) -> Tensor:
    out = value.new_empty((value.shape[0], points.shape[1], value.shape[2] * value.shape[3]))
    with device_guard(value):
        _forward_kernel[_grid(value, points)](
            out_ptr=out, **_shared_arguments(value, shapes, points, scores, reference)
        )
    return out


def _backward_triton(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    scores: Tensor,
    reference: Tensor | None,
    value_grad: bool,
    reference_grad: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    grad_out = grad_out.contiguous()

    def largest_contribution() -> Tensor:
        largest = torch.linalg.vector_norm(grad_out, float("inf"), dtype=torch.float32)
        if reference is not None:
            return largest  # a softmax's weights are at most 1
        return largest * torch.linalg.vector_norm(scores, float("inf"), dtype=torch.float32)

    grad_value = ScatterBuffer(value.shape if value_grad else (0, 0, 0, 0), value.device, largest_contribution)
    grad_points, grad_scores = points.new_empty(points.shape), scores.new_empty(scores.shape)
    in_place = reference is None or scores.dtype == torch.float32
    grad_weights = grad_scores if in_place else grad_scores.new_empty(scores.shape, dtype=torch.float32)
    grad_reference = value.new_empty((*scores.shape[:3], 2), dtype=torch.float32) if reference_grad else None
    with device_guard(value):
        _backward_kernel[_grid(value, points)](
            grad_value_ptr=grad_value.data,
            grad_value_strides=grad_value.data.stride(),
            scale_ptr=grad_value.scale,
            grad_points_ptr=grad_points,
            grad_weights_ptr=grad_weights,
            grad_scores_ptr=grad_scores,
            grad_reference_ptr=grad_reference,
            grad_out_ptr=grad_out,
            VALUE_GRAD=value_grad,
            REFERENCE_GRAD=reference_grad,
            DETERMINISTIC=grad_value.deterministic,
            **_shared_arguments(value, shapes, points, scores, reference),
        )
    return (
        grad_value.result(value.dtype) if value_grad else None,
        grad_points,
        grad_scores,
        None if grad_reference is None else grad_reference.sum(2),
    )


# --- custom ops -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("unept::sparse_sampling", mutates_args=())
def _sparse_sampling(
    value: Tensor, shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None
) -> Tensor:
    if value.numel() == 0 or points.numel() == 0:
        return value.new_empty((value.shape[0], points.shape[1], value.shape[2] * value.shape[3]))
    run = _forward_triton if runs_on_triton(value) else _forward_torch
    return run(value, shapes, points, scores, reference)


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
    """The gradients of value, points, scores and reference; empty ones for value and reference where not wanted."""
    if grad_out.numel() == 0:
        grad_value, grad_points, grad_scores = (t.new_zeros(t.shape) for t in (value, points, scores))
        grad_reference = None if reference is None else reference.new_zeros(reference.shape)
    else:
        run = _backward_triton if runs_on_triton(value) else _backward_torch
        grad_value, grad_points, grad_scores, grad_reference = run(
            grad_out, value, shapes, points, scores, reference, value_grad, reference_grad
        )
        if reference is not None and grad_reference is not None:
            shared = reference.shape[0] != value.shape[0]
            grad_reference = (grad_reference.sum(0, keepdim=True) if shared else grad_reference).to(reference.dtype)
    # A custom op returns no None.
    grad_value = grad_value if value_grad else value.new_empty(0)
    grad_reference = grad_reference if reference_grad else value.new_empty(0)
    return grad_value, grad_points, grad_scores, grad_reference


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
        value.new_empty(value.shape if value_grad else (0,)),
        points.new_empty(points.shape),
        scores.new_empty(scores.shape),
        reference.new_empty(reference.shape) if reference is not None and reference_grad else value.new_empty(0),
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


def _flat_shapes(spatial_shapes: Sequence[Sequence[int]], value: Tensor) -> list[int]:
    """[(H_0, W_0), ...] -> [H_0, W_0, ...], checked against `value`."""
    a_list = isinstance(spatial_shapes, Sequence)
    pairs = a_list and all(isinstance(shape, Sequence) and len(shape) == 2 for shape in spatial_shapes)
    shapes = [size for shape in spatial_shapes for size in shape] if pairs else []
    if not (a_list and all(isinstance(size, int) for size in shapes)):
        raise TypeError(
            f"spatial_shapes is {spatial_shapes}; it must hold Python ints, so that no read of the device is needed: "
            "convert it once, outside the training loop, with spatial_shapes.tolist()"
        )
    if not shapes or any(size < 1 for size in shapes):
        raise ValueError(
            f"spatial_shapes is {spatial_shapes}; it must hold one (height, width), each >= 1, per level: "
            "[(height, width)] for a single one"
        )
    check_shape("value", value, ("B", "S", "M", "D"))
    length = sum(height * width for height, width in spatial_shapes)
    check_count("pixels in spatial_shapes", length)
    if value.shape[1] != length:
        raise ValueError(
            f"spatial_shapes {spatial_shapes} make S = {length} pixels, but value has {value.shape[1]} (shape "
            f"{tuple(value.shape)}): flatten each level's height and width and concatenate the levels along dimension 1"
        )
    return shapes


def _check_samples(value: Tensor, levels: int, **named: Tensor) -> None:
    """Raise unless the two tensors, points and scores in this order, fit `value`, `levels` and each other."""
    (points_name, points), (scores_name, scores) = named.items()
    batch, _, heads, _ = value.shape
    check_shape(points_name, points, (batch, "Q", heads, levels, "N", 2), "B, M and L as in value and spatial_shapes")
    check_shape(scores_name, scores, tuple(points.shape[:-1]), f"as {points_name} without its last dimension")
    check_count("queries", points.shape[1])
    if points.shape[4] == 0:
        raise ValueError(f"{points_name} has shape {tuple(points.shape)}; there must be at least one point a level")


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
        ValueError: for shapes that don't fit together, more than 2**30 pixels or queries an image, and tensors on
            several devices.
    """
    shapes = _flat_shapes(spatial_shapes, value)
    check_floating(value=value, offsets=offsets, logits=logits, reference_points=reference_points)
    check_same_device(value=value, offsets=offsets, logits=logits, reference_points=reference_points)
    _check_samples(value, len(spatial_shapes), offsets=offsets, logits=logits)
    batch, queries = offsets.shape[:2]
    images = 1 if reference_points.dim() and reference_points.shape[0] == 1 else batch
    check_shape(
        "reference_points", reference_points, (images, queries, 2), "one point a query, the first dimension may be 1"
    )
    return _SparseSampling.apply(value, shapes, offsets, logits, reference_points)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """The same op under the signature of Deformable DETR's MSDeformAttn.

    Args:
        value: (B, S, M, D) float, S = sum of H_l * W_l, the levels one after another.
        spatial_shapes: (L, 2), (height, width) of each level. A tensor on a GPU is read to the host, which waits for
            the GPU; a list of pairs of ints avoids that, and is required under `torch.compile`.
        level_start_index: (L,), the first row of each level in value, which spatial_shapes already tell: checked where
            that needs no read of a device beyond the one above, otherwise unused. None will do.
        sampling_locations: (B, Q, M, L, N, 2) float, (x, y) in [0, 1], pixel centres at (i + 0.5) / size.
        attention_weights: (B, Q, M, L, N) float, used as they are.
        im2col_step: accepted for the signature's sake; batches are not cut.

    Returns:
        (B, Q, M * D) in value's dtype. Samples outside a map, at NaN and at infinity count as zero.

    Raises:
        TypeError: for tensors that hold no floats, or spatial_shapes without integers.
        ValueError: as `sparse_sampling_attention`, and for levels that are not consecutive.
    """
    starts = None if isinstance(level_start_index, Tensor) else level_start_index
    if isinstance(spatial_shapes, Tensor):
        check_integer(spatial_shapes=spatial_shapes)
        check_shape("spatial_shapes", spatial_shapes, ("L", 2))
        spatial_shapes = spatial_shapes.tolist()
        if isinstance(level_start_index, Tensor):
            starts = level_start_index.tolist()
    shapes = _flat_shapes(spatial_shapes, value)
    consecutive = [start for _, start, _, _ in _levels(shapes)]
    if starts is not None and list(starts) != consecutive:
        raise ValueError(
            f"level_start_index is {list(starts)}; the levels must lie one after another in value, which makes it "
            f"{consecutive} for spatial_shapes {spatial_shapes}: pass None"
        )
    check_floating(value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    check_same_device(value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    _check_samples(
        value, len(spatial_shapes), sampling_locations=sampling_locations, attention_weights=attention_weights
    )
    return _SparseSampling.apply(value, shapes, sampling_locations, attention_weights, None)


class MSDeformAttnFunction:
    """`ms_deform_attn` under the name and calling convention that models written for Deformable DETR's op expect."""

    apply = staticmethod(ms_deform_attn)
