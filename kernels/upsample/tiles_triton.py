"""Up-sampled logits as tile matrix products, in Triton: see `tiles_torch` for the equation and the letters.

A program takes a tile of 8 x 8 pixels of one image. Mostly their corners lie in a window of 4 x 4 low-size pixels, and
z is a product

    z[64, BLOCK_K] = weights[64, 16] @ window[16, BLOCK_K]              16: what a matrix product sums over at the least

whose weights are computed once. That holds without an offset from an up-sampling of 3.5 on; where a whole number of
tiles or a part of one is as wide as a low-size pixel, tiles start half-way between two of these, and all 64 pixels
have the same 4 corners. An offset moves a pixel out of the window only if it is larger than a low-size pixel or so.
Other tiles, and those where NaN or infinity would spread over the window, read four corners for each pixel and class.

Logits are read as (B, h, w, padded_K), classes last and padded to whole 16-byte loads: in (B, K, h, w) each of the
16 * K loads of a window is a memory sector of its own, three times over; the copy is read and written once.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._autotune import autotune_pool, size_bucket
from .._triton import INTERPRETED, operand, tl, triton

CLASS_POOL = autotune_pool(
    triton.Config({"BLOCK_K": 32}, num_warps=2),
    triton.Config({"BLOCK_K": 16}, num_warps=2),
    triton.Config({"BLOCK_K": 32}, num_warps=4),
)


def fewer_classes_a_warp(config: "triton.Config", arguments: Mapping[str, Any]) -> "triton.Config":
    """The configuration for logits of any dtype: float32's products are sums of several, whose parts stay in registers
    only with at most 8 classes a warp."""
    if arguments["OPERAND"] != tl.float32:
        return config
    return triton.Config(config.kwargs, num_warps=max(config.num_warps, config.kwargs["BLOCK_K"] // 8))


TILE = 8
PIXELS = TILE * TILE
CLASS_PADDING = 16

_TILE = tl.constexpr(TILE)
_PIXELS = tl.constexpr(PIXELS)
# Classes that a tile outside of its window takes at a time: 64 pixels x 4 corners x these are in registers.
GATHERED_K = tl.constexpr(8)
# float32 as the sum of three bfloat16, on tensor cores of all makes; its error is that of float32.
FLOAT32_PRECISION = tl.constexpr("ieee" if INTERPRETED else "bf16x6")


# --- Where a tile lies and what it reads ------------------------------------------------------------------------------


@triton.jit
def pixels_of_tile(H, W, shift_y, shift_x):
    """Image (int64) and pixels y, x of the program's tile, and which of them exist, [PIXELS] each."""
    tiles_y, tiles_x = tl.cdiv(H + shift_y, _TILE), tl.cdiv(W + shift_x, _TILE)
    tile = tl.program_id(0)
    p = tl.arange(0, _PIXELS)
    y = tile // tiles_x % tiles_y * _TILE - shift_y + p // _TILE
    x = tile % tiles_x * _TILE - shift_x + p % _TILE
    return (tile // (tiles_x * tiles_y)).to(tl.int64), y, x, (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def _axis_in_tile(position, size, low_size, scale):
    """Lower corner, upper corner (int32) and fraction of [PIXELS] float32 positions; scale is low_size / size."""
    source = (tl.minimum(tl.maximum(position, 0.0), size - 1.0) + 0.5) * scale - 0.5
    source = tl.minimum(tl.maximum(source, 0.0), low_size - 1.0)
    lower = source.to(tl.int32)
    return lower, tl.minimum(lower + 1, low_size - 1), source - lower


@triton.jit
def corners_in_tile(
    offset_ptr, stride_b, stride_xy, stride_h, stride_w, b, y, x, mask, H, W, h, w, scale_y, scale_x,
    HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """y0, y1, x0, x1 (int32) and the fractions fy, fx of the pixels (y, x), [PIXELS] each."""
    position_y = y.to(tl.float32)
    position_x = x.to(tl.float32)
    if HAS_OFFSET:
        pointers = offset_ptr + b * stride_b + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
        shift_x = tl.load(pointers, mask=mask, other=0).to(tl.float32)
        shift_y = tl.load(pointers + stride_xy, mask=mask, other=0).to(tl.float32)
        # A NaN means no offset; infinities are for the clamp.
        position_x += tl.where(shift_x == shift_x, shift_x, 0.0)
        position_y += tl.where(shift_y == shift_y, shift_y, 0.0)
    y0, y1, fy = _axis_in_tile(position_y, H, h, scale_y)
    x0, x1, fx = _axis_in_tile(position_x, W, w, scale_x)
    return y0, y1, x0, x1, fy, fx


@triton.jit
def window_of_tile(y0, y1, x0, x1, fy, fx, mask, w):
    """The 4 x 4 low-size pixels from the first corner of the pixels in `mask` on.

    Returns the weights [PIXELS, 16], zero for other pixels; the index (int64) of each low-size pixel among the image's
    and whether one of the pixels reads it, [16] each; and whether all corners lie here.
    """
    FAR: tl.constexpr = 1 << 30
    top, bottom = tl.min(tl.where(mask, y0, FAR), 0), tl.max(tl.where(mask, y0, -1), 0)
    left, right = tl.min(tl.where(mask, x0, FAR), 0), tl.max(tl.where(mask, x0, -1), 0)
    i = tl.arange(0, 16)
    row, column = top + i // 4, left + i % 4
    # Both corners of a position that was clamped to the border are the same pixel.
    weight_y = tl.where(row[None, :] == y0[:, None], (1 - fy)[:, None], 0.0)
    weight_y += tl.where(row[None, :] == y1[:, None], fy[:, None], 0.0)
    weight_x = tl.where(column[None, :] == x0[:, None], (1 - fx)[:, None], 0.0)
    weight_x += tl.where(column[None, :] == x1[:, None], fx[:, None], 0.0)
    weights = tl.where(mask[:, None], weight_y * weight_x, 0.0)
    index = row.to(tl.int64) * w + column
    return weights, index, tl.max(weights, 0) > 0, (bottom - top <= 2) & (right - left <= 2)


# --- z in blocks of classes -------------------------------------------------------------------------------------------


@triton.jit
def split(weights, OPERAND: tl.constexpr):
    """Two parts that add up to `weights` with twice the digits of OPERAND: one is exact at x4 and x8, not at x16 in
    bfloat16, nor at x7."""
    high = weights.to(OPERAND)
    return high, (weights - high.to(tl.float32)).to(OPERAND)


@triton.jit
def z_of_window(
    high, low, pointers, used, first, padded_K, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, NO_CLASS: tl.constexpr
):
    """z [PIXELS, BLOCK_K] of the classes from `first` on, NO_CLASS past the last; and their window [16, BLOCK_K]."""
    k = first + tl.arange(0, BLOCK_K)
    mask = used[:, None] & (k < padded_K)[None, :]
    window = tl.load(pointers[:, None] + k[None, :], mask=mask, other=NO_CLASS).to(OPERAND)
    if OPERAND == tl.float32:  # noqa: SIM300
        z = tl.dot(high, window, input_precision=FLOAT32_PRECISION)
    else:
        z = tl.dot(low, window, tl.dot(high, window))
    return z, window


@triton.jit
def exp(x):
    """As tl.exp, which takes three more instructions to get numbers below 2^-126 right."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def corner_pointers(map_ptr, y0, y1, x0, x1, w, padded_K):
    """The first class of the four corners in one image (h, w, padded_K), [PIXELS] each."""
    row0, row1 = y0.to(tl.int64) * w, y1.to(tl.int64) * w
    return (
        map_ptr + (row0 + x0) * padded_K,
        map_ptr + (row0 + x1) * padded_K,
        map_ptr + (row1 + x0) * padded_K,
        map_ptr + (row1 + x1) * padded_K,
    )


@triton.jit
def interpolate_in_tile(p00, p01, p10, p11, fy, fx, mask):
    """A corner without weight is not read: infinity times 0 is NaN."""
    mask_x, mask_y = mask & (fx > 0), mask & (fy > 0)
    z00 = tl.load(p00, mask=mask, other=0.0).to(tl.float32)
    z01 = tl.load(p01, mask=mask_x, other=0.0).to(tl.float32)
    z10 = tl.load(p10, mask=mask_y, other=0.0).to(tl.float32)
    z11 = tl.load(p11, mask=mask_x & mask_y, other=0.0).to(tl.float32)
    return (1 - fy) * ((1 - fx) * z00 + fx * z01) + fy * ((1 - fx) * z10 + fx * z11)


@triton.jit
def z_of_corners(p00, p01, p10, p11, fy, fx, mask, first, K, padded_K):
    """z [PIXELS, GATHERED_K] of the classes from `first` on, -inf past the last."""
    k = (first + tl.arange(0, GATHERED_K))[None, :]
    z = interpolate_in_tile(
        p00[:, None] + k, p01[:, None] + k, p10[:, None] + k, p11[:, None] + k, fy[:, None], fx[:, None],
        mask[:, None] & (k < padded_K),
    )  # fmt: skip
    return tl.where(k < K, z, float("-inf"))


# --- Launches ---------------------------------------------------------------------------------------------------------


def channels_last(logits: Tensor) -> Tensor:
    """(B, K, h, w) -> (B, h, w, padded K), contiguous; no copy if it lies so already."""
    B, K, h, w = logits.shape
    if K % CLASS_PADDING == 0:
        return logits.permute(0, 2, 3, 1).contiguous()
    table = logits.new_full((B, h, w, padded(K)), no_class(logits.dtype))
    table[..., :K] = logits.permute(0, 2, 3, 1)
    return table


def padded(K: int) -> int:
    return -(-K // CLASS_PADDING) * CLASS_PADDING


def no_class(dtype: torch.dtype) -> float:
    """The logit of what only pads the classes: its softmax is 0, and it remains finite in products and bfloat16."""
    return torch.finfo(torch.float16).min if dtype == torch.float16 else -1e38


def tile_shift(size: int, low_size: int) -> int:
    """How far before the first pixel the tiles start, so that an edge lies half-way between two low-size pixels."""
    return -(size // low_size // 2) % TILE if size % low_size == 0 else 0


def num_tiles(B: int, size: tuple[int, int], low_size: tuple[int, int]) -> int:
    rows, columns = (-(-(n + tile_shift(n, low)) // TILE) for n, low in zip(size, low_size, strict=True))
    return B * rows * columns


def tile_arguments(logits: Tensor, size: tuple[int, int], offset: Tensor | None) -> dict[str, Any]:
    """What all kernels over tiles take of the logits (B, K, h, w), the full size and the offset."""
    (B, K, h, w), (H, W) = logits.shape, size
    offset_strides = (0, 0, 0, 0) if offset is None else offset.stride()
    return {
        "table_ptr": channels_last(logits),
        "offset_ptr": offset,
        **{f"offset_stride_{axis}": stride for axis, stride in zip(("b", "xy", "h", "w"), offset_strides, strict=True)},
        "K": K,
        "padded_K": padded(K),
        "h": h,
        "w": w,
        "H": H,
        "W": W,
        "scale_y": h / H,
        "scale_x": w / W,
        "shift_y": tile_shift(H, h),
        "shift_x": tile_shift(W, w),
        "size_bucket": size_bucket(B * H * W),
        "HAS_OFFSET": offset is not None,
        "OPERAND": operand(logits.dtype),
        "NO_CLASS": no_class(logits.dtype),
        "enable_fp_fusion": True,
    }
