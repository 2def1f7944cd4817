"""Bilinear gather in Triton: see `bilinear_gather` for the equation, the padding modes and the names of the corners.

Legend
    B batch, C channels, H x W map, P points per image.
    features  (B, C, H, W)
    points    (B, P, 2), (x, y) in pixels, pixel centres at integers
    out       (B, C, P)
Programs
    Axis 0 = (image, tile of BLOCK_C channels, tile of BLOCK_P points), points fastest; the backward takes all channels
    in one program. Points are block axes, channels a loop.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._autotune import autotuned, size_bucket
from ._scatter import ScatterBuffer, scatter_add
from ._triton import device_guard, strides, tl, triton

# Where a point that reads nothing is put: both of its corners lie outside any map.
NOWHERE = tl.constexpr(-2.0)

GATHER_POOL = [
    triton.Config({"BLOCK_P": 128, "BLOCK_C": 16}, num_warps=4),
    triton.Config({"BLOCK_P": 128, "BLOCK_C": 64}, num_warps=4),
    triton.Config({"BLOCK_P": 512, "BLOCK_C": 16}, num_warps=4),
]

# These are 1 where a side is: no reason to compile anew.
STRIDES = ("features_stride_b", "features_stride_c", "features_stride_h", "points_stride_b", "points_stride_p")

GATHER_BACKWARD_POOL = [
    triton.Config({"BLOCK_P": 64}, num_warps=2),
    triton.Config({"BLOCK_P": 128}, num_warps=4),
    triton.Config({"BLOCK_P": 256}, num_warps=4),
]


# --- device functions -------------------------------------------------------------------------------------------------


class Cells(NamedTuple):
    """Where points lie between pixels: corner 00 (int32) and the fractions beyond it, [BLOCK_P] each."""

    x: Any
    y: Any
    fx: Any
    fy: Any


@triton.jit
def split_coordinate(coordinate, size, BORDER: tl.constexpr):
    """The lower corner (int32) and the fraction beyond it along one axis: `_axis` for a tile of points."""
    if BORDER:
        valid = coordinate == coordinate
        coordinate = tl.minimum(tl.maximum(coordinate, 0.0), size - 1.0)
    else:
        valid = (coordinate > -1.0) & (coordinate < size)
    coordinate = tl.where(valid, coordinate, NOWHERE)
    lower = tl.floor(coordinate)
    return lower.to(tl.int32), coordinate - lower


@triton.jit
def load_points(points_ptr, points_strides, b, p, P, H, W, BORDER: tl.constexpr):
    """The points' own x and y [BLOCK_P], float32, and the cells in which they lie."""
    pointers = points_ptr + b * points_strides[0] + p.to(tl.int64) * points_strides[1]
    # [BLOCK_P]
    point_x = tl.load(pointers, mask=p < P, other=NOWHERE).to(tl.float32)
    point_y = tl.load(pointers + points_strides[2], mask=p < P, other=NOWHERE).to(tl.float32)
    x, fx = split_coordinate(point_x, W, BORDER)
    y, fy = split_coordinate(point_y, H, BORDER)
    return point_x, point_y, Cells(x=x, y=y, fx=fx, fy=fy)


@triton.jit
def corners_in_bounds(cells, H, W):
    """Which of the four corners lie in the map, [BLOCK_P] each."""
    x0, x1 = (cells.x >= 0) & (cells.x < W), (cells.x + 1 >= 0) & (cells.x + 1 < W)
    y0, y1 = (cells.y >= 0) & (cells.y < H), (cells.y + 1 >= 0) & (cells.y + 1 < H)
    return y0 & x0, y0 & x1, y1 & x0, y1 & x1


@triton.jit
def load_corners(pointers, features_strides, in_bounds):
    """One channel's values at the four corners, float32 [BLOCK_P] each; zero outside the map."""
    below, right = features_strides[2], features_strides[3]
    # [BLOCK_P]
    v00 = tl.load(pointers, mask=in_bounds[0], other=0.0).to(tl.float32)
    v01 = tl.load(pointers + right, mask=in_bounds[1], other=0.0).to(tl.float32)
    v10 = tl.load(pointers + below, mask=in_bounds[2], other=0.0).to(tl.float32)
    v11 = tl.load(pointers + below + right, mask=in_bounds[3], other=0.0).to(tl.float32)
    return v00, v01, v10, v11


# --- kernels ----------------------------------------------------------------------------------------------------------


@autotuned(
    GATHER_POOL,
    key=["BORDER"],
    unspecialised=["C", "H", "W", "P", *STRIDES],
)
def gather_kernel(
    features_ptr,  # (B, C, H, W)
    points_ptr,  # (B, P, 2)
    out_ptr,  # (B, C, P), contiguous
    features_stride_b,
    features_stride_c,
    features_stride_h,
    features_stride_w,
    points_stride_b,
    points_stride_p,
    points_stride_i,
    C,
    H,
    W,
    P,
    size_bucket,
    BORDER: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[b, c, p] for BLOCK_P points and BLOCK_C channels."""
    features_strides = (features_stride_b, features_stride_c, features_stride_h, features_stride_w)
    points_strides = (points_stride_b, points_stride_p, points_stride_i)
    point_tiles, channel_tiles = tl.cdiv(P, BLOCK_P), tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    p = program % point_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    c = program // point_tiles % channel_tiles * BLOCK_C
    b = (program // point_tiles // channel_tiles).to(tl.int64)
    _, _, cells = load_points(points_ptr, points_strides, b, p, P, H, W, BORDER)
    in_bounds = corners_in_bounds(cells, H, W)
    fx, fy = cells.fx, cells.fy

    corner = cells.y.to(tl.int64) * features_strides[2] + cells.x.to(tl.int64) * features_strides[3]
    pointers = features_ptr + b * features_strides[0] + c.to(tl.int64) * features_strides[1] + corner
    out_pointers = out_ptr + (b * C + c) * P + p
    for _ in range(0, tl.minimum(BLOCK_C, C - c)):
        v00, v01, v10, v11 = load_corners(pointers, features_strides, in_bounds)
        value = (1 - fy) * ((1 - fx) * v00 + fx * v01) + fy * ((1 - fx) * v10 + fx * v11)
        tl.store(out_pointers, value, mask=p < P)
        pointers += features_strides[1]
        out_pointers += P


@autotuned(
    GATHER_BACKWARD_POOL,
    key=["BORDER", "NEEDS_FEATURES", "NEEDS_POINTS"],
    adds_into=["grad_features_ptr"],
    unspecialised=["grad_stride_c", "C", "H", "W", "P", "grad_out_stride_b", "grad_out_stride_c", *STRIDES],
)
def gather_backward_kernel(
    grad_out_ptr,  # (B, C, P)
    features_ptr,  # (B, C, H, W)
    points_ptr,  # (B, P, 2)
    grad_features_ptr,  # (B, C, H, W), contiguous, a ScatterBuffer
    grad_points_ptr,  # (B, P, 2), contiguous
    scale_ptr,  # (2,): the ScatterBuffer's scale, or None
    grad_out_stride_b,
    grad_out_stride_c,
    grad_out_stride_p,
    features_stride_b,
    features_stride_c,
    features_stride_h,
    features_stride_w,
    points_stride_b,
    points_stride_p,
    points_stride_i,
    grad_stride_c,  # H * W, of grad_features; a product in the kernel costs the loop registers
    C,
    H,
    W,
    P,
    size_bucket,
    BORDER: tl.constexpr,
    NEEDS_FEATURES: tl.constexpr,
    NEEDS_POINTS: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Both gradients for BLOCK_P points; all channels in one program, so that the points' gradient has one writer."""
    grad_out_strides = (grad_out_stride_b, grad_out_stride_c, grad_out_stride_p)
    features_strides = (features_stride_b, features_stride_c, features_stride_h, features_stride_w)
    points_strides = (points_stride_b, points_stride_p, points_stride_i)
    point_tiles = tl.cdiv(P, BLOCK_P)
    p = tl.program_id(0) % point_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    b = (tl.program_id(0) // point_tiles).to(tl.int64)
    point_x, point_y, cells = load_points(points_ptr, points_strides, b, p, P, H, W, BORDER)
    in_bounds = corners_in_bounds(cells, H, W)
    in_00, in_01, in_10, in_11 = in_bounds
    fx, fy = cells.fx, cells.fy

    grad_x = tl.zeros((BLOCK_P,), tl.float32)
    grad_y = tl.zeros((BLOCK_P,), tl.float32)
    grad_out_pointers = grad_out_ptr + b * grad_out_strides[0] + p.to(tl.int64) * grad_out_strides[2]
    corner = cells.y.to(tl.int64) * features_strides[2] + cells.x.to(tl.int64) * features_strides[3]
    pointers = features_ptr + b * features_strides[0] + corner
    grad_pointers = grad_features_ptr + (b * C * H + cells.y) * W + cells.x
    for _ in range(0, C):
        # [BLOCK_P]
        grad = tl.load(grad_out_pointers, mask=p < P, other=0.0).to(tl.float32)
        if NEEDS_FEATURES:
            scatter_add(grad_pointers, grad * (1 - fy) * (1 - fx), in_00, scale_ptr, DETERMINISTIC)
            scatter_add(grad_pointers + 1, grad * (1 - fy) * fx, in_01, scale_ptr, DETERMINISTIC)
            scatter_add(grad_pointers + W, grad * fy * (1 - fx), in_10, scale_ptr, DETERMINISTIC)
            scatter_add(grad_pointers + W + 1, grad * fy * fx, in_11, scale_ptr, DETERMINISTIC)
            grad_pointers += grad_stride_c
        if NEEDS_POINTS:
            v00, v01, v10, v11 = load_corners(pointers, features_strides, in_bounds)
            grad_x += grad * ((1 - fy) * (v01 - v00) + fy * (v11 - v10))
            grad_y += grad * ((1 - fx) * (v10 - v00) + fx * (v11 - v01))
            pointers += features_strides[1]
        grad_out_pointers += grad_out_strides[1]

    if NEEDS_POINTS:
        if BORDER:
            grad_x = tl.where((point_x > 0) & (point_x < W - 1), grad_x, 0.0)
            grad_y = tl.where((point_y > 0) & (point_y < H - 1), grad_y, 0.0)
        grad_points_pointers = grad_points_ptr + (b * P + p) * 2
        tl.store(grad_points_pointers, grad_x, mask=p < P)
        tl.store(grad_points_pointers + 1, grad_y, mask=p < P)


# --- launchers --------------------------------------------------------------------------------------------------------


def forward(features: Tensor, points: Tensor, padding: str) -> Tensor:
    """out (B, C, P)."""
    (B, C, H, W), P = features.shape, points.shape[1]
    out = features.new_empty(B, C, P)
    grid = lambda meta: (B * triton.cdiv(C, meta["BLOCK_C"]) * triton.cdiv(P, meta["BLOCK_P"]),)
    with device_guard(features):
        gather_kernel[grid](
            features_ptr=features,
            points_ptr=points,
            out_ptr=out,
            **strides("features", "bchw", features),
            **strides("points", "bpi", points),
            C=C,
            H=H,
            W=W,
            P=P,
            size_bucket=size_bucket(B * P, C),
            BORDER=padding == "border",
            enable_fp_fusion=True,
        )
    return out


def backward(
    grad_out: Tensor, features: Tensor, points: Tensor, padding: str, needs_features: bool, needs_points: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of features and points; one that is not needed comes back empty."""
    (B, C, H, W), P = features.shape, points.shape[1]
    if grad_out.numel() == 0:
        return (
            torch.zeros(features.shape if needs_features else (0,), dtype=features.dtype, device=features.device),
            torch.zeros(points.shape if needs_points else (0,), dtype=points.dtype, device=points.device),
        )
    # A corner's weight is at most 1.
    bound = lambda: grad_out.abs().amax()
    buffer = ScatterBuffer(features.shape if needs_features else (0,), features.device, bound)
    grad_points = points.new_empty(points.shape if needs_points else (0,))
    grid = lambda meta: (B * triton.cdiv(P, meta["BLOCK_P"]),)
    with device_guard(features):
        gather_backward_kernel[grid](
            grad_out_ptr=grad_out,
            features_ptr=features,
            points_ptr=points,
            grad_features_ptr=buffer.data,
            grad_points_ptr=grad_points,
            scale_ptr=buffer.scale,
            **strides("grad_out", "bcp", grad_out),
            **strides("features", "bchw", features),
            **strides("points", "bpi", points),
            grad_stride_c=H * W,
            C=C,
            H=H,
            W=W,
            P=P,
            size_bucket=size_bucket(B * P, C),
            BORDER=padding == "border",
            NEEDS_FEATURES=needs_features,
            NEEDS_POINTS=needs_points,
            DETERMINISTIC=buffer.deterministic,
            enable_fp_fusion=True,
        )
    return buffer.result(features.dtype), grad_points
