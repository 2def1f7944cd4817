"""Argmax of up-sampled logits in Triton: see `argmax` for the equation and `tiles_triton` for letters and tiles."""

from torch import Tensor

from .._autotune import autotuned
from .._triton import device_guard, new_ids, strides, tl, triton
from .tiles_triton import (
    CLASS_POOL,
    GATHERED_K,
    SIZES,
    Strided,
    Tiles,
    channels_last,
    corner_pointers,
    corners_of_pixels,
    pixels_of_tile,
    window_of_corners,
    z_of_corners,
    z_of_window,
)

# What bfloat16, of which products of float32 are made, still rounds to a finite number.
LARGEST = tl.constexpr(3.38e38)


@triton.jit
def take_classes(largest, best, z, first):
    """Take another block of classes, from `first` on, into the largest z and its class, the first of equals or NaN."""
    # As in PyTorch, a NaN is larger than any number; tl.max passes it over.
    is_nan = z != z
    nan = tl.max(is_nan.to(tl.int32), 1) == 1
    found, position = tl.max(tl.where(is_nan, float("-inf"), z), 1, return_indices=True)
    position = tl.where(nan, tl.argmax(is_nan.to(tl.int32), 1), position)
    found = tl.where(nan, float("nan"), found)
    better = ((found > largest) | nan) & (largest == largest)
    return tl.where(better, found, largest), tl.where(better, first + position, best)


@autotuned(CLASS_POOL, key=["HAS_OFFSET"], unspecialised=SIZES)
def argmax_kernel(
    table_ptr,  # (B, h, w, padded_K), contiguous: logits
    offset_ptr,  # (B, 2, H, W) or None
    best_ptr,  # (B, H, W), contiguous int64
    offset_stride_b,
    offset_stride_i,
    offset_stride_h,
    offset_stride_w,
    K,
    padded_K,
    h,
    w,
    H,
    W,
    scales,
    shift_y,
    shift_x,
    size_bucket,
    HAS_OFFSET: tl.constexpr,
    OPERAND: tl.constexpr,
    NO_CLASS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The classes of one tile."""
    offset_strides = (offset_stride_b, offset_stride_i, offset_stride_h, offset_stride_w)
    pixels = pixels_of_tile((H, W), (shift_y, shift_x))
    mask = pixels.in_bounds
    corners = corners_of_pixels(
        Strided(ptr=offset_ptr, strides=offset_strides), pixels, mask, (h, w), (H, W), scales, HAS_OFFSET
    )
    window = window_of_corners(corners, mask, w, padded_K, OPERAND)
    image_ptr = table_ptr + pixels.b * h * w * padded_K
    # [PIXELS]
    largest = tl.full(mask.shape, float("-inf"), tl.float32)
    best = tl.zeros(mask.shape, tl.int32)
    in_window = window.holds_tile
    if in_window:
        finite = tl.full((16, BLOCK_K), 1, tl.int1)
        for first in range(0, K, BLOCK_K):
            z, logits = z_of_window(image_ptr, window, first, padded_K, BLOCK_K, OPERAND, NO_CLASS)
            finite &= tl.abs(logits.to(tl.float32)) < LARGEST
            found, position = tl.max(z, 1, return_indices=True)
            best = tl.where(found > largest, first + position, best)
            largest = tl.maximum(largest, found)
        # 0 * infinity in the product: a pixel may have met what it does not read. And where each class is at the lowest
        # number, padding must not win.
        above_padding = tl.where(mask, largest, 0.0) > 0.9 * NO_CLASS
        in_window = tl.min(tl.min(finite.to(tl.int32), 1), 0) + tl.min(above_padding.to(tl.int32), 0) == 2
    if in_window == 0:
        largest = tl.full(mask.shape, float("-inf"), tl.float32)
        best = tl.zeros(mask.shape, tl.int32)
        pointers = corner_pointers(image_ptr, corners, w, padded_K)
        for first in range(0, K, GATHERED_K):
            z = z_of_corners(pointers, corners, mask, first, K, padded_K)
            largest, best = take_classes(largest, best, z, first)
    tl.store(best_ptr + pixels.b * H * W + pixels.y * W + pixels.x, best.to(tl.int64), mask=mask)


def forward(logits: Tensor, size: tuple[int, int], offset: Tensor | None) -> Tensor:
    """best (B, H, W) int64."""
    best = new_ids((logits.shape[0], *size), logits.device)
    if best.numel() == 0:
        return best
    table = channels_last(logits)
    tiles = Tiles.over(logits, size)
    with device_guard(logits):
        argmax_kernel[tiles.grid](
            table_ptr=table,
            offset_ptr=offset,
            best_ptr=best,
            **strides("offset", "bihw", offset),
            K=tiles.K,
            padded_K=tiles.padded_K,
            h=tiles.h,
            w=tiles.w,
            H=tiles.H,
            W=tiles.W,
            scales=tiles.scales,
            shift_y=tiles.shifts[0],
            shift_x=tiles.shifts[1],
            size_bucket=tiles.size_bucket,
            HAS_OFFSET=offset is not None,
            OPERAND=tiles.operand,
            NO_CLASS=tiles.no_class,
            enable_fp_fusion=True,
        )
    return best
