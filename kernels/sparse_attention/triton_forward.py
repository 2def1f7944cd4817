"""Sparse sampling attention in Triton, forward: `triton_common` has the legend."""

from collections.abc import Sequence

from torch import Tensor

from .._autotune import autotuned
from .._triton import LOWEST, device_guard, tl, triton
from .forms import should_pad
from .triton_arguments import make_maps, make_samples, pad_value, query_grid, scale_block_q
from .triton_common import (
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
    point_pointers,
    split_position,
)

FORWARD_POOL = [
    triton.Config({"BLOCK_Q": 64, "BLOCK_N": 2}, num_warps=4),
    triton.Config({"BLOCK_Q": 64, "BLOCK_N": 4}, num_warps=8),
    triton.Config({"BLOCK_Q": 32, "BLOCK_N": 2}, num_warps=2),
    triton.Config({"BLOCK_Q": 16, "BLOCK_N": 2}, num_warps=1),
    triton.Config({"BLOCK_Q": 32, "BLOCK_N": 2}, num_warps=1),  # for 64 channels, see `scale_block_q`
]


# --- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def largest_score(scores, L, N: tl.constexpr, BLOCK_Q: tl.constexpr, INT64_INDEX: tl.constexpr):
    """The largest logit of each query, [1, BLOCK_Q]."""
    BLOCK_N: tl.constexpr = 4 if N >= 4 else 1
    # Finite from the start: a query whose logits are all -inf must not turn the others into NaN.
    largest = tl.full([BLOCK_N, BLOCK_Q], LOWEST, tl.float32)
    for index in tl.range(L):
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            pointers = point_pointers(scores, index, n, INT64_INDEX)
            largest = tl.maximum(largest, load_scores(pointers, n, float("-inf"), N, BLOCK_N))
    return tl.max(largest, 0)[None, :]


# --- kernels ----------------------------------------------------------------------------------------------------------


@autotuned(
    FORWARD_POOL,
    key=["N", "D", "LOCATIONS", "PADDED"],
    unspecialised=["Q", "L"],
    fit=scale_block_q,
)
def forward_kernel(
    out_ptr,  # (B, Q, M, D), contiguous
    value_ptr,  # (B, M, R, WORDS), or (B, M, S, D) with any strides
    pairs_ptr,  # (B, Q, M, L, N)
    scores_ptr,  # (B, Q, M, L, N)
    reference_ptr,  # (B, Q, 2), or None
    order_ptr,  # (Q,)
    geometry_ptr,  # (L, 5)
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
    LOCATIONS: tl.constexpr,  # no reference: points are in [0, 1] and scores are weights
    PADDED: tl.constexpr,
    PACKED: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The weighted sum of the samples of BLOCK_Q queries; logits become weights on the way."""
    reference_strides = (reference_stride_b, reference_stride_q, reference_stride_i)
    pairs_strides = (pairs_stride_b, pairs_stride_q, pairs_stride_m, pairs_stride_l, pairs_stride_n)
    scores_strides = (scores_stride_b, scores_stride_q, scores_stride_m, scores_stride_l, scores_stride_n)
    tile = load_tile(
        order_ptr, (pairs_ptr, pairs_strides), (scores_ptr, scores_strides), M, Q, UNIT, BLOCK_Q, INT64_INDEX
    )
    maps = head_maps(value_ptr, value_strides, tile.batch, tile.head, WORDS, PADDED)
    if LOCATIONS:
        largest = 0.0
    else:
        largest = largest_score(tile.scores, L, N, BLOCK_Q, INT64_INDEX)

    even = tl.zeros([BLOCK_N, BLOCK_Q, WORDS], tl.float32)
    odd = tl.zeros([BLOCK_N, BLOCK_Q, WORDS], tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    for index in tl.range(L):
        level = load_level(geometry_ptr, index)
        origin = load_origin((reference_ptr, reference_strides), tile, level, LOCATIONS)
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            # [BLOCK_N, BLOCK_Q]
            x, y = load_positions(tile.pairs, origin, level, n, N, BLOCK_N, POINT_TYPE, LOCATIONS, INT64_INDEX)
            x0, y0, fx, fy = split_position(x, y, level, PADDED)
            score_pointers = point_pointers(tile.scores, level.index, n, INT64_INDEX)
            weight = load_weights(score_pointers, n, largest, N, BLOCK_N, LOCATIONS)
            total += weight
            # [BLOCK_N, BLOCK_Q, WORDS]
            pointers = corner_pointers(maps, level, x0, y0, WORDS, INT64_INDEX)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    corner = pointers + corner_step(maps, level, dx, dy, INT64_INDEX)
                    words = load_corner(corner, x0 + dx, y0 + dy, level, D, WORDS, PADDED)
                    along_y = weight * fy if dy == 1 else weight - weight * fy
                    share = (along_y * fx if dx == 1 else along_y - along_y * fx)[:, :, None]
                    first, second = channels(words, PACKED)
                    even += first * share
                    if PACKED:
                        odd += second * share

    out = tl.sum(even, 0)
    if PACKED:
        out = tl.join(out, tl.sum(odd, 0)).reshape(BLOCK_Q, 2 * WORDS)
    if not LOCATIONS:
        out = out / tl.sum(total, 0)[:, None]
    BLOCK_D: tl.constexpr = 2 * WORDS if PACKED else WORDS
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = tile.mask[:, None] & (channel < D)
    tl.store(out_ptr + tile.row[:, None] * D + channel, out.to(out_ptr.dtype.element_ty), mask=mask)


# --- launchers --------------------------------------------------------------------------------------------------------


def forward(value: Tensor, shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None) -> Tensor:
    """The output (B, Q, M * D); see `op` for the arguments."""
    B, _, M, D = value.shape
    _, Q, _, L, N, _ = points.shape
    out = value.new_empty((B, Q, M * D))
    samples = make_samples(shapes, points, scores, reference)
    maps = make_maps(value, pad_value(value, shapes) if should_pad(value, points) else None, shapes)
    with device_guard(value):
        forward_kernel[query_grid(samples)](
            out_ptr=out,
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
            D=D,
            WORDS=maps.words,
            UNIT=samples.unit,
            POINT_TYPE=samples.point_type,
            LOCATIONS=reference is None,
            PADDED=maps.padded,
            PACKED=maps.packed,
            INT64_INDEX=maps.int64_index or samples.int64_index,
            enable_fp_fusion=True,
        )
    return out
