"""Bilinear gather: a feature map read at continuous points (the interpolation of Eq. 2; the shift of Sec. 3.2).

    out[b, c, p] = sum over the corners (i, j) around (x, y) = points[b, p] of
                   (1 - |x - i|) * (1 - |y - j|) * features[b, c, j, i]

Legend
    B batch, C channels, H x W map, P points of an image.
    features  (B, C, H, W)
    points    (B, P, 2), (x, y) in pixels, pixel centres at integers: (0, 0) is the first pixel's centre.
    out       (B, C, P)
Padding
    "zeros"   corners outside the map count as zero. A point with x outside (-1, W) or y outside (-1, H), a NaN or
              infinite one included, reads zero and has no gradient.
    "border"  coordinates are clamped to [0, W - 1] and [0, H - 1], without a gradient where clamped. A point with a NaN
              reads zero.
Kernels: program axis 0 = (image, tile of BLOCK_P points), axis 1 of the forward = BLOCK_C channels; points are lanes,
channels a loop.
"""

import math

import torch
from torch import Tensor

from ._autotune import autotune_pool, autotuned, size_bucket
from ._scatter import ScatterBuffer, scatter_add
from ._triton import device_guard, tl, triton
from .backend import runs_on_triton
from .checks import check_count, check_floating, check_same_device, check_shape, compute_dtype

PADDINGS = ("zeros", "border")

# Where a point that reads nothing is put: both of its corners lie outside any map.
NOWHERE = -2.0


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch
# ---------------------------------------------------------------------------------------------------------------------


def _axis(coordinate: Tensor, size: int, padding: str) -> tuple[Tensor, Tensor]:
    """The lower corner (int64) and the fraction beyond it along one axis; every point ends in [-2, size - 1]."""
    if padding == "border":
        coordinate = coordinate.clamp(0, size - 1)
        reads = coordinate == coordinate
    else:
        reads = (coordinate > -1) & (coordinate < size)
    coordinate = torch.where(reads, coordinate, NOWHERE)
    lower = coordinate.floor()
    return lower.long(), coordinate - lower


def _table(features: Tensor) -> Tensor:
    """(B*H*W + 1, C) channels-last rows; the last one is zero and stands for everything outside."""
    B, C, H, W = features.shape
    table = features.new_empty((B * H * W + 1, C), dtype=compute_dtype(features))
    table[-1] = 0
    table[:-1].view(B, H, W, C).copy_(features.permute(0, 2, 3, 1))
    return table


def _corners(features: Tensor, points: Tensor, padding: str) -> tuple[Tensor, Tensor, Tensor]:
    """Table rows (B*P, 4) of the corners 00, 01, 10, 11 (y first), and the fractions fx, fy (B*P,)."""
    B, _, H, W = features.shape
    points = points.to(compute_dtype(features))
    x, fx = _axis(points[..., 0], W, padding)
    y, fy = _axis(points[..., 1], H, padding)
    image = torch.arange(B, device=points.device)[:, None] * (H * W)
    rows = []
    for j in (y, y + 1):
        for i in (x, x + 1):
            inside = (i >= 0) & (i < W) & (j >= 0) & (j < H)
            rows.append(torch.where(inside, image + j * W + i, B * H * W).flatten())
    return torch.stack(rows, 1), fx.flatten(), fy.flatten()


def _corner_weights(fx: Tensor, fy: Tensor) -> Tensor:
    return torch.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], 1)


def _forward_torch(features: Tensor, points: Tensor, padding: str) -> Tensor:
    rows, fx, fy = _corners(features, points, padding)
    weights = _corner_weights(fx, fy)
    gathered = torch.nn.functional.embedding_bag(rows, _table(features), per_sample_weights=weights, mode="sum")
    B, P, _ = points.shape
    return gathered.view(B, P, features.shape[1]).transpose(1, 2).to(features.dtype).contiguous()


def _backward_torch(
    grad_out: Tensor, features: Tensor, points: Tensor, padding: str, needs_features: bool, needs_points: bool
) -> tuple[Tensor, Tensor]:
    B, C, H, W = features.shape
    rows, fx, fy = _corners(features, points, padding)
    grad_rows = grad_out.transpose(1, 2).to(compute_dtype(features)).reshape(len(rows), C)
    grad_features, grad_points = features.new_empty(0), points.new_empty(0)
    if needs_features:
        weights = _corner_weights(fx, fy)
        grad_table = grad_rows.new_zeros(B * H * W + 1, C)
        for corner in range(4):
            grad_table.index_add_(0, rows[:, corner], grad_rows * weights[:, corner, None])
        grad_features = grad_table[:-1].view(B, H, W, C).permute(0, 3, 1, 2).to(features.dtype).contiguous()
    if needs_points:
        table = _table(features)
        v00, v01, v10, v11 = ((table[rows[:, corner]] * grad_rows).sum(1) for corner in range(4))
        grad_x = (1 - fy) * (v01 - v00) + fy * (v11 - v10)
        grad_y = (1 - fx) * (v10 - v00) + fx * (v11 - v01)
        grad_points = torch.stack([grad_x, grad_y], 1).view(points.shape)
        if padding == "border":
            x, y = points.unbind(-1)
            moves = torch.stack([(x > 0) & (x < W - 1), (y > 0) & (y < H - 1)], -1)
            grad_points = torch.where(moves, grad_points, 0)
        grad_points = grad_points.to(points.dtype)
    return grad_features, grad_points


# ---------------------------------------------------------------------------------------------------------------------
# Triton
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _axis_in_tile(coordinate, size, BORDER: tl.constexpr):
    """As `_axis`: lower corner (int32) and fraction."""
    if BORDER:
        reads = coordinate == coordinate
        coordinate = tl.minimum(tl.maximum(coordinate, 0.0), size - 1.0)
    else:
        reads = (coordinate > -1.0) & (coordinate < size)
    coordinate = tl.where(reads, coordinate, -2.0)
    lower = tl.floor(coordinate)
    return lower.to(tl.int32), coordinate - lower


@triton.jit
def _locate(points_ptr, stride_b, stride_p, stride_xy, b, p, P, H, W, BORDER: tl.constexpr):
    """The raw point, its lower corner and the fractions beyond it, each [BLOCK_P]."""
    base = points_ptr + b * stride_b + p.to(tl.int64) * stride_p
    point_x = tl.load(base, mask=p < P, other=-2.0).to(tl.float32)
    point_y = tl.load(base + stride_xy, mask=p < P, other=-2.0).to(tl.float32)
    x, fx = _axis_in_tile(point_x, W, BORDER)
    y, fy = _axis_in_tile(point_y, H, BORDER)
    return point_x, point_y, x, y, fx, fy


GATHER_CONFIGS = autotune_pool(
    triton.Config({"BLOCK_P": 128, "BLOCK_C": 16}, num_warps=4),
    triton.Config({"BLOCK_P": 128, "BLOCK_C": 64}, num_warps=4),
    triton.Config({"BLOCK_P": 512, "BLOCK_C": 16}, num_warps=4),
)


@autotuned(GATHER_CONFIGS, key=["C", "BORDER"])
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
    points_stride_xy,
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
    tiles = tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    _, _, x, y, fx, fy = _locate(points_ptr, points_stride_b, points_stride_p, points_stride_xy, b, p, P, H, W, BORDER)

    in_x0 = (x >= 0) & (x < W)
    in_x1 = (x + 1 >= 0) & (x + 1 < W)
    in_y0 = (y >= 0) & (y < H)
    in_y1 = (y + 1 >= 0) & (y + 1 < H)

    first = tl.program_id(1) * BLOCK_C
    corner = y.to(tl.int64) * features_stride_h + x.to(tl.int64) * features_stride_w
    pointers = features_ptr + b * features_stride_b + first.to(tl.int64) * features_stride_c + corner
    out_pointers = out_ptr + (b * C + first) * P + p
    for _ in range(first, tl.minimum(first + BLOCK_C, C)):
        # [BLOCK_P]
        v00 = tl.load(pointers, mask=in_y0 & in_x0, other=0.0).to(tl.float32)
        v01 = tl.load(pointers + features_stride_w, mask=in_y0 & in_x1, other=0.0).to(tl.float32)
        v10 = tl.load(pointers + features_stride_h, mask=in_y1 & in_x0, other=0.0).to(tl.float32)
        v11 = tl.load(pointers + features_stride_h + features_stride_w, mask=in_y1 & in_x1, other=0.0).to(tl.float32)
        value = (1 - fy) * ((1 - fx) * v00 + fx * v01) + fy * ((1 - fx) * v10 + fx * v11)
        tl.store(out_pointers, value, mask=p < P)
        pointers += features_stride_c
        out_pointers += P


GATHER_BACKWARD_CONFIGS = autotune_pool(
    triton.Config({"BLOCK_P": 64}, num_warps=2),
    triton.Config({"BLOCK_P": 128}, num_warps=4),
    triton.Config({"BLOCK_P": 256}, num_warps=4),
)


@autotuned(
    GATHER_BACKWARD_CONFIGS,
    key=["C", "BORDER", "NEEDS_FEATURES", "NEEDS_POINTS"],
    adds_into=["grad_features_ptr"],
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
    points_stride_xy,
    grad_stride_c,  # H * W
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
    tiles = tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    point_x, point_y, x, y, fx, fy = _locate(
        points_ptr, points_stride_b, points_stride_p, points_stride_xy, b, p, P, H, W, BORDER
    )

    in_00 = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    in_01 = (y >= 0) & (y < H) & (x + 1 >= 0) & (x + 1 < W)
    in_10 = (y + 1 >= 0) & (y + 1 < H) & (x >= 0) & (x < W)
    in_11 = (y + 1 >= 0) & (y + 1 < H) & (x + 1 >= 0) & (x + 1 < W)

    grad_x = tl.zeros((BLOCK_P,), tl.float32)
    grad_y = tl.zeros((BLOCK_P,), tl.float32)
    grad_out_pointers = grad_out_ptr + b * grad_out_stride_b + p.to(tl.int64) * grad_out_stride_p
    corner = y.to(tl.int64) * features_stride_h + x.to(tl.int64) * features_stride_w
    pointers = features_ptr + b * features_stride_b + corner
    grad_pointers = grad_features_ptr + (b * C * H + y) * W + x
    for _ in range(0, C):
        grad = tl.load(grad_out_pointers, mask=p < P, other=0.0).to(tl.float32)
        if NEEDS_FEATURES:
            scatter_add(grad_pointers, grad * (1 - fy) * (1 - fx), in_00, scale_ptr, DETERMINISTIC)
            scatter_add(grad_pointers + 1, grad * (1 - fy) * fx, in_01, scale_ptr, DETERMINISTIC)
            scatter_add(grad_pointers + W, grad * fy * (1 - fx), in_10, scale_ptr, DETERMINISTIC)
            scatter_add(grad_pointers + W + 1, grad * fy * fx, in_11, scale_ptr, DETERMINISTIC)
            grad_pointers += grad_stride_c
        if NEEDS_POINTS:
            v00 = tl.load(pointers, mask=in_00, other=0.0).to(tl.float32)
            v01 = tl.load(pointers + features_stride_w, mask=in_01, other=0.0).to(tl.float32)
            v10 = tl.load(pointers + features_stride_h, mask=in_10, other=0.0).to(tl.float32)
            v11 = tl.load(pointers + features_stride_h + features_stride_w, mask=in_11, other=0.0).to(tl.float32)
            grad_x += grad * ((1 - fy) * (v01 - v00) + fy * (v11 - v10))
            grad_y += grad * ((1 - fx) * (v10 - v00) + fx * (v11 - v01))
            pointers += features_stride_c
        grad_out_pointers += grad_out_stride_c

    if NEEDS_POINTS:
        if BORDER:
            grad_x = tl.where((point_x > 0) & (point_x < W - 1), grad_x, 0.0)
            grad_y = tl.where((point_y > 0) & (point_y < H - 1), grad_y, 0.0)
        grad_points_pointers = grad_points_ptr + (b * P + p) * 2
        tl.store(grad_points_pointers, grad_x, mask=p < P)
        tl.store(grad_points_pointers + 1, grad_y, mask=p < P)


def _forward_triton(features: Tensor, points: Tensor, padding: str) -> Tensor:
    (B, C, H, W), P = features.shape, points.shape[1]
    out = features.new_empty(B, C, P)
    grid = lambda meta: (B * triton.cdiv(P, meta["BLOCK_P"]), triton.cdiv(C, meta["BLOCK_C"]))
    with device_guard(features):
        gather_kernel[grid](
            features,
            points,
            out,
            *features.stride(),
            *points.stride(),
            C,
            H,
            W,
            P,
            size_bucket=size_bucket(B * P),
            BORDER=padding == "border",
            enable_fp_fusion=True,
        )
    return out


def _backward_triton(
    grad_out: Tensor, features: Tensor, points: Tensor, padding: str, needs_features: bool, needs_points: bool
) -> tuple[Tensor, Tensor]:
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
            grad_out,
            features,
            points,
            buffer.data,
            grad_points,
            buffer.scale,
            *grad_out.stride(),
            *features.stride(),
            *points.stride(),
            H * W,
            C,
            H,
            W,
            P,
            size_bucket=size_bucket(B * P),
            BORDER=padding == "border",
            NEEDS_FEATURES=needs_features,
            NEEDS_POINTS=needs_points,
            DETERMINISTIC=buffer.deterministic,
            enable_fp_fusion=True,
        )
    return buffer.result(features.dtype), grad_points


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("unept::bilinear_gather", mutates_args=())
def _bilinear_gather(features: Tensor, points: Tensor, padding: str) -> Tensor:
    shape = features.shape[0], features.shape[1], points.shape[1]
    if 0 in shape:
        return features.new_empty(shape)
    run = _forward_triton if runs_on_triton(features) else _forward_torch
    return run(features, points, padding)


@_bilinear_gather.register_fake
def _(features: Tensor, points: Tensor, padding: str) -> Tensor:
    return features.new_empty(features.shape[0], features.shape[1], points.shape[1])


@torch.library.custom_op("unept::bilinear_gather_backward", mutates_args=())
def _bilinear_gather_backward(
    grad_out: Tensor, features: Tensor, points: Tensor, padding: str, needs_features: bool, needs_points: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of features and points; one that isn't needed comes back empty."""
    run = _backward_triton if runs_on_triton(features) else _backward_torch
    return run(grad_out, features, points, padding, needs_features, needs_points)


@_bilinear_gather_backward.register_fake
def _(
    grad_out: Tensor, features: Tensor, points: Tensor, padding: str, needs_features: bool, needs_points: bool
) -> tuple[Tensor, Tensor]:
    return (
        features.new_empty(features.shape if needs_features else (0,)),
        points.new_empty(points.shape if needs_points else (0,)),
    )


class BilinearGather(torch.autograd.Function):
    """Saves features and points, nothing else."""

    @staticmethod
    def forward(ctx, features, points, padding):
        """See `bilinear_gather`."""
        ctx.save_for_backward(features, points)
        ctx.padding = padding
        return _bilinear_gather(features, points, padding)

    @staticmethod
    def backward(ctx, grad_out):
        """Gradients of features and points."""
        needs_features, needs_points = ctx.needs_input_grad[:2]
        grad_features, grad_points = _bilinear_gather_backward(
            grad_out, *ctx.saved_tensors, ctx.padding, needs_features, needs_points
        )
        return grad_features if needs_features else None, grad_points if needs_points else None, None


def bilinear_gather(features: Tensor, points: Tensor, padding: str = "zeros") -> Tensor:
    """Read a feature map at continuous points by bilinear interpolation (Eq. 2; the shift of Sec. 3.2).

    Equals `grid_sample` with `align_corners=True` on points scaled to [-1, 1], but takes pixels.

    Args:
        features: (B, C, H, W), float32, float16, bfloat16 or (torch backend) float64.
        points: (B, ..., 2), any of these dtypes, (x, y) in pixels, pixel centres at integers, (0, 0) the first pixel.
            Keep them in float32: bfloat16 has a step of 1/2 pixel beyond 64.
        padding: `"zeros"`: outside the map everything is zero; NaN, infinite and huge points read zero, with zero
            gradients. `"border"`: coordinates are clamped to the map, with a zero gradient where clamped; a point with
            a NaN reads zero.

    Returns:
        (B, C, *points.shape[1:-1]) in the dtype of features; interpolated in float32 (float64 for float64).
        Differentiable in features and in points.

    Raises:
        TypeError: features or points are not floating point.
        ValueError: shapes or devices don't fit, more than 2**30 pixels or points an image, or an unknown padding.
    """
    check_floating(features=features, points=points)
    check_same_device(features=features, points=points)
    check_shape("features", features, ("B", "C", "H", "W"))
    B = features.shape[0]
    if points.dim() < 2 or points.shape[0] != B or points.shape[-1] != 2:
        raise ValueError(
            f"points has shape {tuple(points.shape)}; it must be ({B}, ..., 2), (x, y) in pixels for each of the images"
        )
    if padding not in PADDINGS:
        raise ValueError(f"padding is {padding!r}; it must be one of {', '.join(map(repr, PADDINGS))}")
    sizes = points.shape[1:-1]
    check_count("pixels in features", features.shape[2] * features.shape[3])
    check_count("points", math.prod(sizes))
    gathered = BilinearGather.apply(features, points.reshape(B, math.prod(sizes), 2), padding)
    return gathered.reshape(B, features.shape[1], *sizes)
