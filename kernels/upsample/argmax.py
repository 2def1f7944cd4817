"""Argmax of up-sampled logits, without up-sampled logits: the predicted classes, refined with an offset (Sec. 3.2).

    best(p) = argmax_k z[k, p], the lowest of equals

with z[k, p], the up-sampled logits read at p + offset(p), as `tiles_torch` defines them.

Legend
    B batch, K classes, h x w the logits' map, H x W the full-size map.
    logits    (B, K, h, w)
    offset    (B, 2, H, W), (dx, dy) in pixels of the full-size map
    best      (B, H, W) int64
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._autotune import autotuned
from .._triton import device_guard, tl, triton
from ..backend import runs_on_triton
from .tiles_torch import Where, check_maps, visit_tiles
from .tiles_triton import (
    CLASS_POOL,
    GATHERED_K,
    corner_pointers,
    corners_in_tile,
    num_tiles,
    pixels_of_tile,
    split,
    tile_arguments,
    window_of_tile,
    z_of_corners,
    z_of_window,
)


def _argmax_torch(logits: Tensor, size: tuple[int, int], offset: Tensor | None) -> Tensor:
    best = torch.empty((logits.shape[0], *size), dtype=torch.int64, device=logits.device)

    def visit(where: Where, z: Tensor) -> None:
        best[where] = z.argmax(1).view(best[where].shape)

    visit_tiles(logits, size, offset, visit)
    return best


# What bfloat16, of which products of float32 are made, still rounds to a finite number.
LARGEST = tl.constexpr(3.38e38)


@triton.jit
def _better(largest, best, z, first):
    """Takes another block of classes, from `first` on, into the largest z and its class, the first of equals or NaN."""
    # As in PyTorch, a NaN is larger than any number; tl.max passes it over.
    is_nan = z != z
    nan = tl.max(is_nan.to(tl.int32), 1) == 1
    found, position = tl.max(tl.where(is_nan, float("-inf"), z), 1, return_indices=True)
    position = tl.where(nan, tl.argmax(is_nan.to(tl.int32), 1), position)
    found = tl.where(nan, float("nan"), found)
    better = ((found > largest) | nan) & (largest == largest)
    return tl.where(better, found, largest), tl.where(better, first + position, best)


@autotuned(CLASS_POOL, key=["K", "HAS_OFFSET"])
def argmax_kernel(
    table_ptr,  # (B, h, w, padded_K): logits
    offset_ptr,  # (B, 2, H, W) or unused
    best_ptr,  # (B, H, W), contiguous int64
    offset_stride_b,
    offset_stride_xy,
    offset_stride_h,
    offset_stride_w,
    K,
    padded_K,
    h,
    w,
    H,
    W,
    scale_y,  # h / H
    scale_x,  # w / W
    shift_y,
    shift_x,
    size_bucket,
    HAS_OFFSET: tl.constexpr,
    OPERAND: tl.constexpr,
    NO_CLASS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The classes of one tile."""
    b, y, x, live = pixels_of_tile(H, W, shift_y, shift_x)
    y0, y1, x0, x1, fy, fx = corners_in_tile(
        offset_ptr, offset_stride_b, offset_stride_xy, offset_stride_h, offset_stride_w, b, y, x, live, H, W, h, w,
        scale_y, scale_x, HAS_OFFSET,
    )  # fmt: skip
    weights, index, used, in_window = window_of_tile(y0, y1, x0, x1, fy, fx, live, w)
    high, low = split(weights, OPERAND)
    table_ptr += b * h * w * padded_K
    largest = tl.full(fy.shape, float("-inf"), tl.float32)
    best = tl.zeros(fy.shape, tl.int32)
    if in_window:
        finite = tl.full((16, BLOCK_K), 1, tl.int1)
        for first in range(0, K, BLOCK_K):
            z, window = z_of_window(
                high, low, table_ptr + index * padded_K, used, first, padded_K, BLOCK_K, OPERAND, NO_CLASS
            )
            finite &= tl.abs(window.to(tl.float32)) < LARGEST
            found, position = tl.max(z, 1, return_indices=True)
            best = tl.where(found > largest, first + position, best)
            largest = tl.maximum(largest, found)
        # 0 * infinity in the product: a pixel may have met what it doesn't read. And where each class is at the lowest
        # number, padding must not win.
        above_padding = tl.where(live, largest, 0.0) > 0.9 * NO_CLASS
        in_window = tl.min(tl.min(finite.to(tl.int32), 1), 0) + tl.min(above_padding.to(tl.int32), 0) == 2
    if in_window == 0:
        largest = tl.full(fy.shape, float("-inf"), tl.float32)
        best = tl.zeros(fy.shape, tl.int32)
        p00, p01, p10, p11 = corner_pointers(table_ptr, y0, y1, x0, x1, w, padded_K)
        for first in range(0, K, GATHERED_K):
            largest, best = _better(
                largest, best, z_of_corners(p00, p01, p10, p11, fy, fx, live, first, K, padded_K), first
            )
    tl.store(best_ptr + b * H * W + y * W + x, best.to(tl.int64), mask=live)


def _argmax_triton(logits: Tensor, size: tuple[int, int], offset: Tensor | None) -> Tensor:
    (B, _, h, w), (H, W) = logits.shape, size
    best = torch.empty((B, H, W), dtype=torch.int64, device=logits.device)
    if best.numel() == 0:
        return best
    with device_guard(logits):
        argmax_kernel[(num_tiles(B, size, (h, w)),)](best_ptr=best, **tile_arguments(logits, size, offset))
    return best


@torch.library.custom_op("unept::upsample_argmax", mutates_args=())
def _upsample_argmax(logits: Tensor, height: int, width: int, offset: Tensor | None) -> Tensor:
    run = _argmax_triton if runs_on_triton(logits) else _argmax_torch
    return run(logits, (height, width), offset)


@_upsample_argmax.register_fake
def _(logits: Tensor, height: int, width: int, offset: Tensor | None) -> Tensor:
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)


def upsample_argmax(logits: Tensor, size: tuple[int, int], offset: Tensor | None = None) -> Tensor:
    """Class ids of logits that are up-sampled bilinearly to `size` on the way: the prediction, refined with an offset.

    Equals `F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)`, but never holds (B, K, H, W).

    Args:
        logits: (B, K, h, w), float32, float16, bfloat16 or (torch backend) float64.
        size: (H, W), ints.
        offset: (B, 2, H, W), as in `upsample_cross_entropy`.

    Returns:
        (B, H, W) int64; among equals the lowest id, and a NaN is the largest. No gradient.

    Raises:
        TypeError: a dtype doesn't fit.
        ValueError: shapes or devices don't fit, size is no pair of sizes, or an image of more than 2**30 pixels.
    """
    if not (
        isinstance(size, Sequence)
        and len(size) == 2
        and all(isinstance(n, (int, torch.SymInt)) and n >= 0 for n in size)
    ):
        raise ValueError(f"size is {size!r}; it must be (height, width), two ints >= 0, such as labels.shape[-2:]")
    height, width = size
    check_maps(logits, offset, (height, width))
    return _upsample_argmax(logits, height, width, offset)
