"""Sparse sampling attention in Triton, backward: the gradient of the value, in one of two ways.

Every sample adds weight * grad_out to its four corners.

    atomic   A program takes a tile of queries, as in the forward, and adds float32 (integers where results must repeat)
             into a buffer, which other programs add to at the same time.
    binned   The samples are sorted by where they lie, and each pixel is written once: `triton_value_binned`.

Which is faster depends on the GPU and on how many samples a pixel gets: `fastest` measures. `triton_common` has the
legend.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .._autotune import autotuned, fastest
from .._scatter import ScatterBuffer, scatter_add
from .._triton import tl, triton
from .forms import forced_value_gradient
from .triton_arguments import Samples, geometry, query_grid, scale_block_q
from .triton_common import load_level, load_sample, load_tile, split_position
from .triton_value_binned import can_bin, value_gradient_binned

SCATTER_POOL = [
    triton.Config({"BLOCK_Q": 32, "BLOCK_N": 1}, num_warps=4),
    triton.Config({"BLOCK_Q": 16, "BLOCK_N": 2}, num_warps=4),
    triton.Config({"BLOCK_Q": 16, "BLOCK_N": 1}, num_warps=2),
]


# --- kernels ----------------------------------------------------------------------------------------------------------


@autotuned(
    SCATTER_POOL,
    key=["N", "D", "LOCATIONS"],
    adds_into=["grad_value_ptr"],
    unspecialised=["S", "Q", "L"],
    fit=scale_block_q,
)
def scatter_backward_kernel(
    grad_value_ptr,  # (B, S, M, D), contiguous, the data of a ScatterBuffer
    scale_ptr,  # its scale, or None
    grad_out_ptr,  # (B, Q, M, D), contiguous
    normaliser_ptr,  # (B, Q, M, 2), or None
    pairs_ptr,  # (B, Q, M, L, N)
    scores_ptr,  # (B, Q, M, L, N)
    reference_ptr,  # (B, Q, 2), or None
    order_ptr,  # (Q,)
    geometry_ptr,  # (L, 5), of maps that are not padded
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
    S,
    M,
    Q,
    L,
    size_bucket,
    N: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    POINT_TYPE: tl.constexpr,
    LOCATIONS: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add what the samples of BLOCK_Q queries give to their four corners."""
    reference_strides = (reference_stride_b, reference_stride_q, reference_stride_i)
    pairs_strides = (pairs_stride_b, pairs_stride_q, pairs_stride_m, pairs_stride_l, pairs_stride_n)
    scores_strides = (scores_stride_b, scores_stride_q, scores_stride_m, scores_stride_l, scores_stride_n)
    tile = load_tile(
        order_ptr, (pairs_ptr, pairs_strides), (scores_ptr, scores_strides), M, Q, UNIT, BLOCK_Q, INT64_INDEX
    )
    reference = (reference_ptr, reference_strides)
    channel = tl.arange(0, BLOCK_D)[None, :]
    # [BLOCK_Q, BLOCK_D]
    grad_out = tl.load(grad_out_ptr + tile.row[:, None] * D + channel, mask=channel < D, other=0.0).to(tl.float32)

    for index in tl.range(L):
        level = load_level(geometry_ptr, index)
        first_row = tile.batch * S + level.first_row
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            # [BLOCK_N, BLOCK_Q]
            x, y, weight, valid = load_sample(
                tile, reference, normaliser_ptr, level, n, N, BLOCK_N, POINT_TYPE, LOCATIONS, INT64_INDEX
            )
            x0, y0, fx, fy = split_position(x, y, level, False)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    along_x = fx if dx == 1 else 1 - fx
                    along_y = fy if dy == 1 else 1 - fy
                    # [BLOCK_N, BLOCK_Q, BLOCK_D]
                    part = (weight * along_y * along_x)[:, :, None] * grad_out[None, :, :]
                    pixel_x = x0 + dx
                    pixel_y = y0 + dy
                    mask = valid & (pixel_x >= 0) & (pixel_x < level.width) & (pixel_y >= 0) & (pixel_y < level.height)
                    row = (first_row + pixel_y * level.width + pixel_x) * M + tile.head  # int64
                    mask = mask[:, :, None] & (channel < D)[None, :, :] if D != BLOCK_D else mask[:, :, None]
                    pointers = grad_value_ptr + (row * D)[:, :, None] + channel[None, :, :]
                    scatter_add(pointers, part, mask, scale_ptr, DETERMINISTIC)


# --- launchers --------------------------------------------------------------------------------------------------------


def value_gradient_atomic(
    grad_out: Tensor, value: Tensor, shapes: Sequence[int], samples: Samples, normaliser: Tensor | None
) -> Tensor:
    """The gradient of value, (B, S, M, D); see `value_gradient` for the arguments."""
    _, S, M, D = value.shape
    _, Q, _, L, N = samples.pairs.shape

    def largest_contribution() -> Tensor:
        largest = torch.linalg.vector_norm(grad_out, float("inf"), dtype=torch.float32)
        if normaliser is not None:
            return largest  # a softmax's weights are at most 1
        return largest * torch.linalg.vector_norm(samples.scores, float("inf"), dtype=torch.float32)

    buffer = ScatterBuffer(value.shape, value.device, largest_contribution)
    scatter_backward_kernel[query_grid(samples)](
        grad_value_ptr=buffer.data,
        scale_ptr=buffer.scale,
        grad_out_ptr=grad_out,
        normaliser_ptr=normaliser,
        pairs_ptr=samples.pairs,
        scores_ptr=samples.scores,
        reference_ptr=samples.reference,
        order_ptr=samples.order,
        geometry_ptr=geometry(tuple(shapes), False, value.device),
        **samples.strides,
        S=S,
        M=M,
        Q=Q,
        L=L,
        size_bucket=samples.size_bucket,
        N=N,
        D=D,
        UNIT=samples.unit,
        POINT_TYPE=samples.point_type,
        LOCATIONS=samples.reference is None,
        DETERMINISTIC=buffer.deterministic,
        INT64_INDEX=samples.int64_index,
        BLOCK_D=triton.next_power_of_2(D),
        enable_fp_fusion=True,
    )
    return buffer.result(value.dtype)


def value_gradient(
    grad_out: Tensor, value: Tensor, shapes: Sequence[int], samples: Samples, normaliser: Tensor | None
) -> Tensor:
    """The gradient of value, (B, S, M, D).

    Args:
        grad_out: (B, Q, M * D), contiguous.
        value: (B, S, M, D).
        shapes: H_0, W_0, H_1, ...
        samples: what `make_samples` gives.
        normaliser: (B, Q, M, 2) float32, each softmax's largest logit and 1 / (sum of exponentials); None if scores
            are weights.
    """
    arguments = grad_out, value, shapes, samples, normaliser
    methods = {
        "binned": partial(value_gradient_binned, *arguments),
        "atomic": partial(value_gradient_atomic, *arguments),
    }
    if torch.are_deterministic_algorithms_enabled() or not can_bin(value.shape[3], shapes, samples):
        return methods["atomic"]()
    if forced := forced_value_gradient():
        return methods[forced]()
    # Samples a pixel decide: records share the work of a window, atomics don't.
    _, Q, _, L, N = samples.pairs.shape
    density = Q * L * N // value.shape[1]
    key = (str(value.dtype), value.shape[3], N, samples.size_bucket, density.bit_length())
    return fastest("value_gradient", methods, key)()
