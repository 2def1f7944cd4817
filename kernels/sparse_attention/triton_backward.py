"""Sparse sampling attention in Triton, backward: the gradients of points, scores and reference points.

`triton_common` has the legend and what the kernels share, `triton_value` the gradient of
the value. Nothing is saved by the forward: the softmax is computed again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._autotune import autotune_pool, autotuned
from .._triton import LOWEST, device_guard, tl, triton
from .triton_common import (
    LOG2_E,
    channels,
    corner_pointers,
    fewer_queries,
    load_corner,
    load_positions,
    load_scores,
    load_weights,
    map_arguments,
    merged,
    of_query,
    origin,
    program_work,
    sample_arguments,
    sample_offset,
    split_position,
    tile_grid,
)
from .triton_value import grad_of_value

POINTS_POOL = autotune_pool(
    triton.Config({"BLOCK_Q": 32, "BLOCK_N": 4}, num_warps=4),
    triton.Config({"BLOCK_Q": 64, "BLOCK_N": 4}, num_warps=8),
    triton.Config({"BLOCK_Q": 8, "BLOCK_N": 4}, num_warps=1),
)


@triton.jit
def softmax_statistics(scores_ptr, strides, num_levels, N: tl.constexpr, BLOCK_Q: tl.constexpr, WIDE: tl.constexpr):
    """Each query's largest logit and 1 / (sum of exponentials), [1, BLOCK_Q] each; scores_ptr [1, BLOCK_Q]."""
    BLOCK_N: tl.constexpr = 4 if N >= 4 else 1
    # Finite from the start: points whose logits are all -inf must not turn the rest into NaN.
    largest = tl.full([BLOCK_N, BLOCK_Q], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    for level in tl.range(num_levels):
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            pointers = scores_ptr + sample_offset(level, n, strides, WIDE)
            logits = load_scores(pointers, n, float("-inf"), N, BLOCK_N)
            larger = tl.maximum(largest, logits)
            total = total * tl.exp2((largest - larger) * LOG2_E) + tl.exp2((logits - larger) * LOG2_E)
            largest = larger
    overall = tl.max(largest, 0)[None, :]
    total = tl.sum(total * tl.exp2((largest - overall) * LOG2_E), 0)[None, :]
    return overall, 1.0 / total


@triton.jit
def paired_gradient(x, y, POINT_TYPE: tl.constexpr):
    """The inverse of `unpaired`."""
    if tl.float32 == POINT_TYPE:
        low = x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        return low | (y.to(tl.int32, bitcast=True).to(tl.int64) << 32)
    else:
        low = x.to(POINT_TYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (y.to(POINT_TYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def load_grad_out(grad_out_ptr, row, stride, D: tl.constexpr, WORDS: tl.constexpr, PACKED: tl.constexpr):
    """float32 [1, BLOCK_Q, WORDS]: even and odd channels if PACKED, otherwise all, twice; row [BLOCK_Q, 1]."""
    STEP: tl.constexpr = 2 if PACKED else 1
    channel = tl.arange(0, WORDS)[None, :] * STEP
    pointers = grad_out_ptr + row * stride + channel
    even = tl.load(pointers, mask=channel < D, other=0.0).to(tl.float32)[None, :, :]
    if PACKED:
        return even, tl.load(pointers + 1, mask=channel + 1 < D, other=0.0).to(tl.float32)[None, :, :]
    else:
        return even, even


@triton.jit
def softmax_backward(
    grad_scores_ptr,  # [1, BLOCK_Q], contiguous points
    grad_weights_ptr,  # the same
    scores_ptr,
    scores_strides,
    largest,  # [1, BLOCK_Q]
    inverse_total,  # [1, BLOCK_Q]
    mean,  # [1, BLOCK_Q], of grad_weights, weighted
    counts,  # [1, BLOCK_Q]
    num_levels,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """From the gradients of the weights, which this program has written, to those of the logits."""
    for level in tl.range(num_levels):
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            usable = (n < N) & counts
            weight = load_weights(
                scores_ptr + sample_offset(level, n, scores_strides, WIDE), n, largest, N, BLOCK_N, False
            )
            grad_weight = tl.load(grad_weights_ptr + level * N + n, mask=usable, other=0.0).to(tl.float32)
            grad_score = weight * inverse_total * (grad_weight - mean)
            tl.store(grad_scores_ptr + level * N + n, grad_score.to(grad_scores_ptr.dtype.element_ty), mask=usable)


@autotuned(
    POINTS_POOL,
    key=["N", "D", "LOCATIONS", "PADDED", "REFERENCE_GRAD"],
    unspecialised=["num_levels", "num_queries"],
    fit=fewer_queries,
)
def points_backward_kernel(
    grad_pairs_ptr,  # (B, Q, M, L, N), contiguous
    grad_weights_ptr,  # (B, Q, M, L, N), contiguous; float32 if scores are logits
    grad_scores_ptr,  # (B, Q, M, L, N), contiguous; may be grad_weights_ptr, and is if LOCATIONS
    grad_reference_ptr,  # (B, Q, M, 2) float32, contiguous, or None
    normaliser_ptr,  # (B, Q, M, 2) float32, contiguous, written for grad_of_value; unused if LOCATIONS
    grad_out_ptr,  # (B, Q, M, D), contiguous
    value_ptr,  # the rest as in the forward kernel
    value_strides,
    pairs_ptr,
    pairs_strides,
    scores_ptr,
    scores_strides,
    reference_ptr,
    reference_strides,
    order_ptr,
    geometry_ptr,
    num_levels,
    num_heads,
    num_queries,
    size_bucket,
    N: tl.constexpr,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    POINT_TYPE: tl.constexpr,
    LOCATIONS: tl.constexpr,
    PADDED: tl.constexpr,
    PACKED: tl.constexpr,
    REFERENCE_GRAD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch, head, queries, counts = program_work(order_ptr, num_heads, num_queries, BLOCK_Q)
    query, counts = queries[None, :], counts[None, :]  # [1, BLOCK_Q]
    pairs_ptr = of_query(pairs_ptr, pairs_strides, batch, query, head)
    scores_ptr = of_query(scores_ptr, scores_strides, batch, query, head)
    value_ptr += batch * value_strides[0] + head * value_strides[1]
    stride_s = WORDS if PADDED else value_strides[2]
    stride_d = 1 if PADDED else value_strides[3]
    row = (batch * num_queries + query) * num_heads + head
    grad_pairs_ptr += row * (num_levels * N)
    grad_weights_ptr += row * (num_levels * N)
    grad_scores_ptr += row * (num_levels * N)
    grad_even, grad_odd = load_grad_out(
        grad_out_ptr, ((batch * num_queries + queries) * num_heads + head)[:, None], D, D, WORDS, PACKED
    )
    if not LOCATIONS:
        reference_ptr += batch * reference_strides[0] + query * reference_strides[1]
        largest, inverse_total = softmax_statistics(scores_ptr, scores_strides, num_levels, N, BLOCK_Q, WIDE)
        tl.store(normaliser_ptr + row * 2, largest, mask=counts)
        tl.store(normaliser_ptr + row * 2 + 1, inverse_total, mask=counts)
    else:
        largest = 0.0
        inverse_total = 1.0

    mean = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)  # of the gradients of the weights, weighted: parts of a sum
    grad_reference_x = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    grad_reference_y = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    for level in tl.range(num_levels):
        height = tl.load(geometry_ptr + 5 * level)
        width = tl.load(geometry_ptr + 5 * level + 1)
        pitch = tl.load(geometry_ptr + 5 * level + 2)
        origin_x, origin_y = origin(reference_ptr, reference_strides, width, height, LOCATIONS)
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            x, y = load_positions(
                pairs_ptr, pairs_strides, level, n, origin_x, origin_y, width, height, N, BLOCK_N, POINT_TYPE,
                LOCATIONS, WIDE,
            )  # fmt: skip
            x0, y0, fx, fy = split_position(x, y, width, height, PADDED)
            score_ptrs = scores_ptr + sample_offset(level, n, scores_strides, WIDE)
            weight = load_weights(score_ptrs, n, largest, N, BLOCK_N, LOCATIONS) * inverse_total
            pointers = corner_pointers(value_ptr, stride_s, stride_d, geometry_ptr, level, x0, y0, pitch, WORDS, WIDE)
            grad_weight = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
            slope_x = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
            slope_y = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
            for dy in tl.static_range(2):
                along_y = fy if dy == 1 else 1 - fy
                step = dy * pitch * stride_s
                words = load_corner(pointers + step, x0, y0 + dy, width, height, D, WORDS, PADDED)
                even, odd = channels(words, PACKED)
                left = tl.sum(even * grad_even + odd * grad_odd if PACKED else even * grad_even, 2)
                words = load_corner(pointers + step + stride_s, x0 + 1, y0 + dy, width, height, D, WORDS, PADDED)
                even, odd = channels(words, PACKED)
                right = tl.sum(even * grad_even + odd * grad_odd if PACKED else even * grad_even, 2)
                between = left + fx * (right - left)
                grad_weight += along_y * between
                slope_x += along_y * (right - left)
                slope_y += between if dy == 1 else -between

            usable = (n < N) & counts
            grad_x = weight * slope_x
            grad_y = weight * slope_y
            if REFERENCE_GRAD:
                grad_reference_x += grad_x * width
                grad_reference_y += grad_y * height
            if LOCATIONS:
                grad_x *= width
                grad_y *= height
            column = level * N + n
            tl.store(grad_pairs_ptr + column, paired_gradient(grad_x, grad_y, POINT_TYPE), mask=usable)
            tl.store(grad_weights_ptr + column, grad_weight.to(grad_weights_ptr.dtype.element_ty), mask=usable)
            mean += weight * grad_weight

    if not LOCATIONS:
        # The mean is over all points: what was written before it was known is read back.
        tl.debug_barrier()
        softmax_backward(
            grad_scores_ptr, grad_weights_ptr, scores_ptr, scores_strides, largest, inverse_total,
            tl.sum(mean, 0)[None, :], counts, num_levels, N, BLOCK_N, WIDE,
        )  # fmt: skip
    if REFERENCE_GRAD:
        tl.store(grad_reference_ptr + row * 2, tl.sum(grad_reference_x, 0)[None, :], mask=counts)
        tl.store(grad_reference_ptr + row * 2 + 1, tl.sum(grad_reference_y, 0)[None, :], mask=counts)


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
    grad_out = grad_out.contiguous()
    samples = sample_arguments(shapes, points, scores, reference)
    pairs = samples["pairs_ptr"]
    grad_pairs = torch.empty(pairs.shape, dtype=pairs.dtype, device=pairs.device)
    grad_scores = scores.new_empty(scores.shape)
    in_place = reference is None or scores.dtype == torch.float32
    grad_weights = grad_scores if in_place else grad_scores.new_empty(scores.shape, dtype=torch.float32)
    grad_reference = value.new_empty((*scores.shape[:3], 2), dtype=torch.float32) if reference_grad else None
    normaliser = None if reference is None else value.new_empty((*scores.shape[:3], 2), dtype=torch.float32)
    with device_guard(value):
        points_backward_kernel[tile_grid(points)](
            grad_pairs_ptr=grad_pairs,
            grad_weights_ptr=grad_weights,
            grad_scores_ptr=grad_scores,
            grad_reference_ptr=grad_reference,
            normaliser_ptr=normaliser,
            grad_out_ptr=grad_out,
            REFERENCE_GRAD=reference_grad,
            **merged(map_arguments(value, shapes, points), samples),
        )
        grad_value = grad_of_value(grad_out, value, shapes, scores, samples, normaliser) if value_grad else None
    point_type = torch.float32 if points.dtype == torch.float64 else points.dtype
    grad_points = grad_pairs.unsqueeze(-1).view(point_type).to(points.dtype)
    return grad_value, grad_points, grad_scores, None if grad_reference is None else grad_reference.sum(2)
