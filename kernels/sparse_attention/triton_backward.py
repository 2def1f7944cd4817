"""Sparse sampling attention in Triton, backward: the gradients of points, scores and reference points.

`triton_common` has the legend and `triton_value` the gradient of the value. The forward saves nothing but its inputs:
the softmax is computed again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._autotune import autotuned
from .._triton import LOWEST, device_guard, tl, triton
from .forms import should_pad
from .triton_arguments import make_maps, make_samples, pad_value, query_grid, scale_block_q
from .triton_common import (
    LOG2_E,
    channels,
    corner_pointers,
    corner_step,
    head_maps,
    load_corner,
    load_level,
    load_origin,
    load_positions,
    load_scores,
    load_tile,
    load_weights,
    pack_xy,
    point_pointers,
    split_position,
)
from .triton_value import value_gradient

POINTS_POOL = [
    triton.Config({"BLOCK_Q": 32, "BLOCK_N": 4}, num_warps=4),
    triton.Config({"BLOCK_Q": 64, "BLOCK_N": 4}, num_warps=8),
    triton.Config({"BLOCK_Q": 8, "BLOCK_N": 4}, num_warps=1),
    triton.Config({"BLOCK_Q": 16, "BLOCK_N": 4}, num_warps=1),  # for 64 channels, see `scale_block_q`
]


# --- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def softmax_statistics(scores, L, N: tl.constexpr, BLOCK_Q: tl.constexpr, INT64_INDEX: tl.constexpr):
    """The largest logit of each query and 1 / (sum of exponentials), [1, BLOCK_Q] each."""
    BLOCK_N: tl.constexpr = 4 if N >= 4 else 1
    # Finite from the start: points whose logits are all -inf must not turn the rest into NaN.
    largest = tl.full([BLOCK_N, BLOCK_Q], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    for index in tl.range(L):
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            logits = load_scores(point_pointers(scores, index, n, INT64_INDEX), n, float("-inf"), N, BLOCK_N)
            larger = tl.maximum(largest, logits)
            total = total * tl.exp2((largest - larger) * LOG2_E) + tl.exp2((logits - larger) * LOG2_E)
            largest = larger
    overall = tl.max(largest, 0)[None, :]
    # Zero is added so that the products are rounded. The compiler otherwise makes multiply-adds of them and the sum
    # over lanes, another one in each lane: the copies of one sum would differ, and which is stored is undefined.
    total = tl.sum(total * tl.exp2((largest - overall) * LOG2_E) + 0.0, 0)[None, :]
    return overall, 1.0 / total


@triton.jit
def load_grad_out(grad_out_ptr, row, D: tl.constexpr, WORDS: tl.constexpr, PACKED: tl.constexpr):
    """float32 [1, BLOCK_Q, WORDS]: even and odd channels if PACKED, otherwise all, twice; row [BLOCK_Q]."""
    STEP: tl.constexpr = 2 if PACKED else 1
    channel = tl.arange(0, WORDS)[None, :] * STEP
    pointers = grad_out_ptr + row[:, None] * D + channel
    even = tl.load(pointers, mask=channel < D, other=0.0).to(tl.float32)[None, :, :]
    if PACKED:
        return even, tl.load(pointers + 1, mask=channel + 1 < D, other=0.0).to(tl.float32)[None, :, :]
    else:
        return even, even


@triton.jit
def corner_dot(
    pointers, x, y, level, grad, D: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr, PACKED: tl.constexpr
):
    """The pixels (x, y) times grad_out, [BLOCK_N, BLOCK_Q]; grad is what `load_grad_out` gives."""
    even, odd = channels(load_corner(pointers, x, y, level, D, WORDS, PADDED), PACKED)
    products = even * grad[0]
    if PACKED:
        products += odd * grad[1]
    elif not PADDED:
        products += 0.0  # as in `softmax_statistics`: a lane may hold a single channel
    return tl.sum(products, 2)


@triton.jit
def softmax_backward(
    grad_scores_ptr,  # [1, BLOCK_Q], contiguous points
    grad_weights_ptr,  # the same
    scores,  # QueryPoints
    statistics,  # the largest logit and 1 / (sum of exponentials), [1, BLOCK_Q] each
    mean,  # [1, BLOCK_Q], of grad_weights, weighted
    mask,  # [1, BLOCK_Q]
    L,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INT64_INDEX: tl.constexpr,
):
    """From the gradients of the weights, which this program has written, to those of the logits."""
    largest, inverse_total = statistics
    for index in tl.range(L):
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            valid = (n < N) & mask
            # [BLOCK_N, BLOCK_Q]
            weight = load_weights(point_pointers(scores, index, n, INT64_INDEX), n, largest, N, BLOCK_N, False)
            grad_weight = tl.load(grad_weights_ptr + index * N + n, mask=valid, other=0.0).to(tl.float32)
            grad_score = weight * inverse_total * (grad_weight - mean)
            tl.store(grad_scores_ptr + index * N + n, grad_score.to(grad_scores_ptr.dtype.element_ty), mask=valid)


# --- kernels ----------------------------------------------------------------------------------------------------------


@autotuned(
    POINTS_POOL,
    key=["N", "D", "LOCATIONS", "PADDED", "NEEDS_REFERENCE", "JOINT"],
    unspecialised=["Q", "L"],
    fit=scale_block_q,
)
def points_backward_kernel(
    grad_pairs_ptr,  # (B, Q, M, L, N), contiguous unless JOINT
    grad_weights_ptr,  # (B, Q, M, L, N), contiguous; float32 if scores are logits
    grad_scores_ptr,  # (B, Q, M, L, N), contiguous unless JOINT; may be grad_weights_ptr, and is if LOCATIONS
    grad_reference_ptr,  # (B, Q, M, 2) float32, contiguous, or None
    normaliser_ptr,  # (B, Q, M, 2) float32, contiguous, written for `value_gradient`; unused if LOCATIONS
    grad_out_ptr,  # (B, Q, M, D), contiguous
    value_ptr,  # the rest as in the forward kernel
    pairs_ptr,
    scores_ptr,
    reference_ptr,
    order_ptr,
    geometry_ptr,
    value_strides,
    pairs_stride_b,
    pairs_stride_q,
    pairs_stride_m,
    pairs_stride_l,
    pairs_stride_n,
    scores_stride_b,
    scores_stride_q,
    scores_stride_m,
    scores_stride_l,
    scores_stride_n,
    reference_stride_b,
    reference_stride_q,
    reference_stride_i,
    M,
    Q,
    L,
    size_bucket,
    N: tl.constexpr,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    UNIT: tl.constexpr,
    POINT_TYPE: tl.constexpr,
    LOCATIONS: tl.constexpr,
    PADDED: tl.constexpr,
    PACKED: tl.constexpr,
    NEEDS_REFERENCE: tl.constexpr,
    JOINT: tl.constexpr,  # gradients are (B, Q, M, 3 * L * N) bfloat16, L * N pairs and then L * N scores; N is even
    INT64_INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradients of points, scores and reference points for BLOCK_Q queries."""
    reference_strides = (reference_stride_b, reference_stride_q, reference_stride_i)
    pairs_strides = (pairs_stride_b, pairs_stride_q, pairs_stride_m, pairs_stride_l, pairs_stride_n)
    scores_strides = (scores_stride_b, scores_stride_q, scores_stride_m, scores_stride_l, scores_stride_n)
    tile = load_tile(
        order_ptr, (pairs_ptr, pairs_strides), (scores_ptr, scores_strides), M, Q, UNIT, BLOCK_Q, INT64_INDEX
    )
    maps = head_maps(value_ptr, value_strides, tile.batch, tile.head, WORDS, PADDED)
    row, mask = tile.row[None, :], tile.mask[None, :]  # [1, BLOCK_Q]
    GRAD_TYPE: tl.constexpr = tl.bfloat16 if JOINT else POINT_TYPE
    PAIRS_N: tl.constexpr = 3 * N // 2 if JOINT else N
    SCORES_N: tl.constexpr = 3 * N if JOINT else N
    grad_pairs_ptr += row * (L * PAIRS_N)
    grad_weights_ptr += row * (L * N)
    grad_scores_ptr += row * (L * SCORES_N)
    grad = load_grad_out(grad_out_ptr, tile.row, D, WORDS, PACKED)
    if LOCATIONS:
        largest = 0.0
        inverse_total = 1.0
    else:
        largest, inverse_total = softmax_statistics(tile.scores, L, N, BLOCK_Q, INT64_INDEX)
        tl.store(normaliser_ptr + row * 2, largest, mask=mask)
        tl.store(normaliser_ptr + row * 2 + 1, inverse_total, mask=mask)

    mean = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)  # of the gradients of the weights, weighted: parts of a sum
    grad_reference_x = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    grad_reference_y = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    for index in tl.range(L):
        level = load_level(geometry_ptr, index)
        origin = load_origin((reference_ptr, reference_strides), tile, level, LOCATIONS)
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            # [BLOCK_N, BLOCK_Q]
            x, y = load_positions(tile.pairs, origin, level, n, N, BLOCK_N, POINT_TYPE, LOCATIONS, INT64_INDEX)
            x0, y0, fx, fy = split_position(x, y, level, PADDED)
            score_pointers = point_pointers(tile.scores, level.index, n, INT64_INDEX)
            weight = load_weights(score_pointers, n, largest, N, BLOCK_N, LOCATIONS) * inverse_total
            # [BLOCK_N, BLOCK_Q, WORDS]
            pointers = corner_pointers(maps, level, x0, y0, WORDS, INT64_INDEX)
            grad_weight = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
            slope_x = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
            slope_y = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
            for dy in tl.static_range(2):
                along_y = fy if dy == 1 else 1 - fy
                corner = pointers + corner_step(maps, level, 0, dy, INT64_INDEX)
                left = corner_dot(corner, x0, y0 + dy, level, grad, D, WORDS, PADDED, PACKED)
                corner += maps.stride_s
                right = corner_dot(corner, x0 + 1, y0 + dy, level, grad, D, WORDS, PADDED, PACKED)
                between = left + fx * (right - left)
                grad_weight += along_y * between
                slope_x += along_y * (right - left)
                slope_y += between if dy == 1 else -between

            valid = (n < N) & mask
            grad_x = weight * slope_x
            grad_y = weight * slope_y
            if NEEDS_REFERENCE:
                grad_reference_x += grad_x * level.width
                grad_reference_y += grad_y * level.height
            if LOCATIONS:
                grad_x *= level.width
                grad_y *= level.height
            column = index * N + n
            tl.store(grad_pairs_ptr + column, pack_xy(grad_x, grad_y, GRAD_TYPE), mask=valid)
            tl.store(grad_weights_ptr + column, grad_weight.to(grad_weights_ptr.dtype.element_ty), mask=valid)
            mean += weight * grad_weight

    if not LOCATIONS:
        # The mean is over all points: what was written before it was known is read back.
        tl.debug_barrier()
        softmax_backward(
            grad_scores_ptr, grad_weights_ptr, tile.scores, (largest, inverse_total), tl.sum(mean, 0)[None, :], mask, L,
            N, BLOCK_N, INT64_INDEX,
        )  # fmt: skip
    if NEEDS_REFERENCE:
        tl.store(grad_reference_ptr + row * 2, tl.sum(grad_reference_x, 0)[None, :], mask=mask)
        tl.store(grad_reference_ptr + row * 2 + 1, tl.sum(grad_reference_y, 0)[None, :], mask=mask)


# --- launchers --------------------------------------------------------------------------------------------------------


def backward(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    scores: Tensor,
    reference: Tensor | None,
    needs_value: bool,
    needs_reference: bool,
    joint: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """The gradients of value, points, scores and, per image (B, Q, 2), reference; see `op` for the arguments.

    Those of points and scores are written into `joint` (B, Q, M, 3 * L * N) bfloat16, if it is given; N is even then.
    """
    grad_out = grad_out.contiguous()
    samples = make_samples(shapes, points, scores, reference)
    maps = make_maps(value, pad_value(value, shapes) if should_pad(value, points) else None, shapes)
    _, Q, M, L, N = samples.pairs.shape
    if joint is None:
        grad_pairs = torch.empty(scores.shape, dtype=samples.pairs.dtype, device=scores.device)
        grad_scores = scores.new_empty(scores.shape)
        point_type = torch.float32 if points.dtype == torch.float64 else points.dtype
    else:
        columns = joint.unflatten(3, (3 * L, N))
        grad_pairs, grad_scores = columns[:, :, :, : 2 * L].view(torch.int32), columns[:, :, :, 2 * L :]
        grad_pairs = grad_pairs.flatten(3).unflatten(3, (L, N))
        point_type = joint.dtype
    in_place = reference is None or grad_scores.dtype == torch.float32
    grad_weights = grad_scores if in_place else grad_scores.new_empty(scores.shape, dtype=torch.float32)
    grad_reference = value.new_empty((*scores.shape[:3], 2), dtype=torch.float32) if needs_reference else None
    normaliser = None if reference is None else value.new_empty((*scores.shape[:3], 2), dtype=torch.float32)
    with device_guard(value):
        points_backward_kernel[query_grid(samples)](
            grad_pairs_ptr=grad_pairs,
            grad_weights_ptr=grad_weights,
            grad_scores_ptr=grad_scores,
            grad_reference_ptr=grad_reference,
            normaliser_ptr=normaliser,
            grad_out_ptr=grad_out,
            value_ptr=maps.value,
            pairs_ptr=samples.pairs,
            scores_ptr=samples.scores,
            reference_ptr=samples.reference,
            order_ptr=samples.order,
            geometry_ptr=maps.geometry,
            value_strides=maps.value.stride(),
            **samples.strides,
            M=M,
            Q=Q,
            L=L,
            size_bucket=samples.size_bucket,
            N=N,
            D=maps.D,
            WORDS=maps.words,
            UNIT=samples.unit,
            POINT_TYPE=samples.point_type,
            LOCATIONS=reference is None,
            PADDED=maps.padded,
            PACKED=maps.packed,
            NEEDS_REFERENCE=needs_reference,
            JOINT=joint is not None,
            INT64_INDEX=maps.int64_index or samples.int64_index,
            enable_fp_fusion=True,
        )
        grad_value = value_gradient(grad_out, value, shapes, samples, normaliser) if needs_value else None
    grad_points = grad_pairs.unsqueeze(-1).view(point_type).to(points.dtype if joint is None else joint.dtype)
    return grad_value, grad_points, grad_scores, None if grad_reference is None else grad_reference.sum(2)
