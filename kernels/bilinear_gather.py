"""Bilinear gather: a feature map read at continuous points (the interpolation of Eq. 2; the shift of Sec. 3.2).

    out[b, c, p] = sum over the corners (i, j) around (x, y) = points[b, p] of
                   (1 - |x - i|) * (1 - |y - j|) * features[b, c, j, i]

Legend
    B batch, C channels, H x W map, P points per image.
    features  (B, C, H, W)
    points    (B, P, 2), (x, y) in pixels, pixel centres at integers: (0, 0) is the first pixel's centre.
    out       (B, C, P)
    Corners are counted 00, 01, 10, 11, y first: the point lies between corner 00, at (floor x, floor y), and corner 11.
Padding
    "zeros"   Corners outside the map count as zero. A point with x outside (-1, W) or y outside (-1, H), a NaN or
              infinite one included, reads zero and has no gradient.
    "border"  Coordinates are clamped to [0, W - 1] and [0, H - 1], without a gradient where clamped. A point with a NaN
              reads zero.
Kernels: `bilinear_gather_triton`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import bilinear_gather_triton
from . import reference as plain
from ._registration import refuse_second_derivatives, register_autograd, register_vmap
from .backend import backend_argument, runs_on_triton
from .checks import check_count, check_floating, check_same_device, check_shape, compute_dtype

PADDINGS = ("zeros", "border")

# Where a point that reads nothing is put: both of its corners lie outside any map.
NOWHERE = -2.0


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def _axis(coordinate: Tensor, size: int, padding: str) -> tuple[Tensor, Tensor]:
    """The lower corner (int64) and the fraction beyond it along one axis; every point ends in [-2, size - 1]."""
    if padding == "border":
        coordinate = coordinate.clamp(0, size - 1)
        valid = coordinate == coordinate
    else:
        valid = (coordinate > -1) & (coordinate < size)
    coordinate = torch.where(valid, coordinate, NOWHERE)
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
    """The table's rows (B*P, 4) of the four corners, and the fractions fx, fy (B*P,)."""
    B, _, H, W = features.shape
    points = points.to(compute_dtype(features))
    x, fx = _axis(points[..., 0], W, padding)
    y, fy = _axis(points[..., 1], H, padding)
    image = torch.arange(B, device=points.device)[:, None] * (H * W)
    rows = []
    for j in (y, y + 1):
        for i in (x, x + 1):
            in_bounds = (i >= 0) & (i < W) & (j >= 0) & (j < H)
            rows.append(torch.where(in_bounds, image + j * W + i, B * H * W).flatten())
    return torch.stack(rows, 1), fx.flatten(), fy.flatten()


def _corner_weights(fx: Tensor, fy: Tensor) -> Tensor:
    return torch.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], 1)


def _forward_torch(features: Tensor, points: Tensor, padding: str) -> Tensor:
    """out (B, C, P)."""
    rows, fx, fy = _corners(features, points, padding)
    weights = _corner_weights(fx, fy)
    gathered = torch.nn.functional.embedding_bag(rows, _table(features), per_sample_weights=weights, mode="sum")
    B, P, _ = points.shape
    return gathered.view(B, P, features.shape[1]).transpose(1, 2).to(features.dtype).contiguous()


def _backward_torch(
    grad_out: Tensor, features: Tensor, points: Tensor, padding: str, needs_features: bool, needs_points: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of features and points; one that is not needed comes back empty."""
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
            x, y = points.to(grad_points.dtype).unbind(-1)  # in half precision W - 1 may be another number
            not_clamped = torch.stack([(x > 0) & (x < W - 1), (y > 0) & (y < H - 1)], -1)
            grad_points = torch.where(not_clamped, grad_points, 0)
        grad_points = grad_points.to(points.dtype)
    return grad_features, grad_points


# --- custom ops and autograd ------------------------------------------------------------------------------------------


@torch.library.custom_op("unept::bilinear_gather", mutates_args=())
def _bilinear_gather(features: Tensor, points: Tensor, padding: str, backend: str | None = None) -> Tensor:
    shape = features.shape[0], features.shape[1], points.shape[1]
    if 0 in shape:
        return features.new_empty(shape)
    run = bilinear_gather_triton.forward if runs_on_triton(features, backend) else _forward_torch
    return run(features, points, padding)


@_bilinear_gather.register_fake
def _bilinear_gather_fake(features: Tensor, points: Tensor, padding: str, backend: str | None = None) -> Tensor:
    return features.new_empty(features.shape[0], features.shape[1], points.shape[1])


@torch.library.custom_op("unept::bilinear_gather_backward", mutates_args=())
def _bilinear_gather_backward(
    grad_out: Tensor,
    features: Tensor,
    points: Tensor,
    padding: str,
    needs_features: bool,
    needs_points: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of features and points; one that is not needed comes back empty."""
    run = bilinear_gather_triton.backward if runs_on_triton(features, backend) else _backward_torch
    return run(grad_out, features, points, padding, needs_features, needs_points)


@_bilinear_gather_backward.register_fake
def _(
    grad_out: Tensor,
    features: Tensor,
    points: Tensor,
    padding: str,
    needs_features: bool,
    needs_points: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    return (
        features.new_empty(features.shape if needs_features else (0,)),
        points.new_empty(points.shape if needs_points else (0,)),
    )


_run_backward = refuse_second_derivatives(_bilinear_gather_backward, "bilinear_gather")


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """The forward saves features and points, and nothing else."""
    features, points, ctx.padding, ctx.backend = inputs
    ctx.save_for_backward(features, points)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    needs_features, needs_points = ctx.needs_input_grad[:2]
    grad_features, grad_points = _run_backward(
        grad_out, *ctx.saved_tensors, ctx.padding, needs_features, needs_points, ctx.backend
    )
    return grad_features if needs_features else None, grad_points if needs_points else None, None, None


_run = register_autograd(_bilinear_gather, _save_inputs, _backward)
register_vmap(_bilinear_gather)
register_vmap(_bilinear_gather_backward)


# --- public function --------------------------------------------------------------------------------------------------


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
        ValueError: shapes or devices do not fit, an image has more than 2**30 pixels or points, or padding is unknown.
    """
    if torch.jit.is_tracing():  # sizes may be tensors now, which no check may read
        return plain.bilinear_gather(features, points, padding)
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
    gathered = _run(features, points.reshape(B, math.prod(sizes), 2), padding, backend_argument())
    return gathered.reshape(B, features.shape[1], *sizes)
