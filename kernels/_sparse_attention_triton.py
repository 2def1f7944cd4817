"""Sparse sampling attention in Triton: see `sparse_attention` for the equation, the letters and the conventions."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._triton import ScatterBuffer, autotune_pool, autotuned, device_guard, scatter_add, size_class, tl, triton

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
def forward_kernel(
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
def backward_kernel(
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


def forward(value: Tensor, shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None) -> Tensor:
    out = value.new_empty((value.shape[0], points.shape[1], value.shape[2] * value.shape[3]))
    with device_guard(value):
        forward_kernel[_grid(value, points)](out_ptr=out, **_shared_arguments(value, shapes, points, scores, reference))
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
        backward_kernel[_grid(value, points)](
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
