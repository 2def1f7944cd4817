"""Up-sampled logits as tile matrix products, in Triton: see `tiles_torch` for the equation.

A program takes a tile of 8 x 8 pixels of one image. Mostly their corners lie in a window of 4 x 4 low-size pixels, and
z is a product

    z[64, BLOCK_K] = weights[64, 16] @ window[16, BLOCK_K]              16: what a matrix product sums over at the least

whose weights are computed once. That holds without an offset from an up-sampling of 3.5 on; where a whole number of
tiles or a part of one is as wide as a low-size pixel, tiles start half-way between two of these, and all 64 pixels
have the same 4 corners. An offset moves a pixel out of the window only if it is larger than a low-size pixel or so.
Other tiles, and those where NaN or infinity would spread over the window, read four corners for each pixel and class.

Logits are read as a table (B, h, w, padded_K), classes last and padded to whole 16-byte loads: in (B, K, h, w) each of
the 16 * K loads of a window is a memory sector of its own, three times over; the copy is read and written once.

Legend
    B batch, K classes, h x w the logits' map, H x W the full-size map.
    table     (B, h, w, padded_K): logits, NO_CLASS past the last class
    offset    (B, 2, H, W), (dx, dy) in pixels of the full-size map
    scales    (h / H, w / W), and shifts: pixels before the first at which the tiles start, both (y, x)
Programs
    Axis 0 = (image, tile row, tile column), columns fastest. The PIXELS = 64 pixels of a tile are a block axis, and so
    are BLOCK_K classes; blocks of classes are a loop.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autotune import size_bucket
from .._triton import INTERPRETED, operand, tl, triton

CLASS_POOL = [
    triton.Config({"BLOCK_K": 32}, num_warps=2),
    triton.Config({"BLOCK_K": 16}, num_warps=2),
    triton.Config({"BLOCK_K": 32}, num_warps=4),
]


def limit_classes_per_warp(config: "triton.Config", arguments: Mapping[str, Any]) -> "triton.Config":
    """The configuration for logits of any dtype: float32's products are sums of several, whose parts stay in registers
    only with at most 8 classes per warp."""
    if arguments["OPERAND"] != tl.float32:
        return config
    return triton.Config(config.kwargs, num_warps=max(config.num_warps, config.kwargs["BLOCK_K"] // 8))


TILE = 8
PIXELS = TILE * TILE
CLASS_PADDING = 16
# All values of these arguments share one compiled kernel: neither another size nor another number of classes compiles.
SIZES = ("K", "h", "w", "H", "W", "shift_y", "shift_x", "offset_stride_b", "offset_stride_i", "offset_stride_h")

_TILE = tl.constexpr(TILE)
_PIXELS = tl.constexpr(PIXELS)
# Classes that a tile outside of its window takes at a time: 64 pixels x 4 corners x these are in registers.
GATHERED_K = tl.constexpr(8)
# float32 as the sum of three bfloat16, on tensor cores of all makes; its error is that of float32.
FLOAT32_PRECISION = tl.constexpr("ieee" if INTERPRETED else "bf16x6")


# --- device functions: where a tile lies and what it reads ------------------------------------------------------------


class Strided(NamedTuple):
    """A tensor in memory."""

    ptr: Any
    strides: Any


class Pixels(NamedTuple):
    """The pixels of a program's tile: the image b (int64), and y, x and whether they exist, [PIXELS] each."""

    b: Any
    y: Any
    x: Any
    in_bounds: Any


class Corners(NamedTuple):
    """The four low-size pixels around each pixel (int32), and the fractions beyond (y0, x0), [PIXELS] each."""

    y0: Any
    y1: Any
    x0: Any
    x1: Any
    fy: Any
    fx: Any


class Window(NamedTuple):
    """The 4 x 4 low-size pixels from the first corner of a tile on."""

    weights: Any  # [PIXELS, 16] float32, zero for pixels that are masked
    high: Any  # [PIXELS, 16] OPERAND: the weights, rounded
    low: Any  # [PIXELS, 16] OPERAND: what the rounding left
    elements: Any  # [16] int64, each low-size pixel's first class among the elements of its image
    mask: Any  # [16], whether a pixel reads it
    holds_tile: Any  # whether all corners of the tile lie here


@triton.jit
def pixels_of_tile(size, shifts):
    """The pixels of the program's tile; size is (H, W)."""
    H, W = size
    tiles_y, tiles_x = tl.cdiv(H + shifts[0], _TILE), tl.cdiv(W + shifts[1], _TILE)
    tile = tl.program_id(0)
    p = tl.arange(0, _PIXELS)
    y = tile // tiles_x % tiles_y * _TILE - shifts[0] + p // _TILE
    x = tile % tiles_x * _TILE - shifts[1] + p % _TILE
    b = (tile // (tiles_x * tiles_y)).to(tl.int64)
    return Pixels(b=b, y=y, x=x, in_bounds=(y >= 0) & (y < H) & (x >= 0) & (x < W))


@triton.jit
def split_position(position, size, low_size, scale):
    """Lower corner, upper corner (int32) and fraction of [PIXELS] float32 positions; scale is low_size / size."""
    source = (tl.minimum(tl.maximum(position, 0.0), size - 1.0) + 0.5) * scale - 0.5
    source = tl.minimum(tl.maximum(source, 0.0), low_size - 1.0)
    lower = source.to(tl.int32)
    return lower, tl.minimum(lower + 1, low_size - 1), source - lower


@triton.jit
def corners_of_pixels(offset, pixels, mask, low_size, size, scales, HAS_OFFSET: tl.constexpr):
    """The corners of the pixels, moved by the offset (`Strided`) where there is one; low_size is (h, w)."""
    position_y = pixels.y.to(tl.float32)
    position_x = pixels.x.to(tl.float32)
    if HAS_OFFSET:
        pointers = offset.ptr + pixels.b * offset.strides[0]
        pointers += pixels.y.to(tl.int64) * offset.strides[2] + pixels.x.to(tl.int64) * offset.strides[3]
        # [PIXELS]
        dx = tl.load(pointers, mask=mask, other=0).to(tl.float32)
        dy = tl.load(pointers + offset.strides[1], mask=mask, other=0).to(tl.float32)
        # A NaN means no offset; infinities are for the clamp.
        position_x += tl.where(dx == dx, dx, 0.0)
        position_y += tl.where(dy == dy, dy, 0.0)
    y0, y1, fy = split_position(position_y, size[0], low_size[0], scales[0])
    x0, x1, fx = split_position(position_x, size[1], low_size[1], scales[1])
    return Corners(y0=y0, y1=y1, x0=x0, x1=x1, fy=fy, fx=fx)


@triton.jit
def window_of_corners(corners, mask, w, padded_K, OPERAND: tl.constexpr):
    """The window from the first corner of the pixels in `mask` on."""
    y0, y1, x0, x1, fy, fx = corners
    FAR: tl.constexpr = 1 << 30
    top, bottom = tl.min(tl.where(mask, y0, FAR), 0), tl.max(tl.where(mask, y0, -1), 0)
    left, right = tl.min(tl.where(mask, x0, FAR), 0), tl.max(tl.where(mask, x0, -1), 0)
    i = tl.arange(0, 16)
    row, column = top + i // 4, left + i % 4
    # Both corners of a position that was clamped to the border are the same pixel.
    # [PIXELS, 16]
    weight_y = tl.where(row[None, :] == y0[:, None], (1 - fy)[:, None], 0.0)
    weight_y += tl.where(row[None, :] == y1[:, None], fy[:, None], 0.0)
    weight_x = tl.where(column[None, :] == x0[:, None], (1 - fx)[:, None], 0.0)
    weight_x += tl.where(column[None, :] == x1[:, None], fx[:, None], 0.0)
    weights = tl.where(mask[:, None], weight_y * weight_x, 0.0)
    # Two parts add up to twice the digits of OPERAND: one is exact at x4 and x8, not at x16 in bfloat16, nor at x7.
    high = weights.to(OPERAND)
    return Window(
        weights=weights,
        high=high,
        low=(weights - high.to(tl.float32)).to(OPERAND),
        elements=(row.to(tl.int64) * w + column) * padded_K,
        mask=tl.max(weights, 0) > 0,
        holds_tile=(bottom - top <= 2) & (right - left <= 2),
    )


# --- device functions: z in blocks of classes -------------------------------------------------------------------------


@triton.jit
def z_of_window(
    image_ptr, window, first, padded_K, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, NO_CLASS: tl.constexpr
):
    """z [PIXELS, BLOCK_K] of the classes from `first` on, NO_CLASS past the last; and their logits [16, BLOCK_K]."""
    k = first + tl.arange(0, BLOCK_K)
    mask = window.mask[:, None] & (k < padded_K)[None, :]
    # [16, BLOCK_K]
    logits = tl.load((image_ptr + window.elements)[:, None] + k[None, :], mask=mask, other=NO_CLASS).to(OPERAND)
    if OPERAND == tl.float32:  # noqa: SIM300
        z = tl.dot(window.high, logits, input_precision=FLOAT32_PRECISION)
    else:
        z = tl.dot(window.low, logits, tl.dot(window.high, logits))
    return z, logits


@triton.jit
def exp(x):
    """As tl.exp, which takes three more instructions to get numbers below 2^-126 right."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def corner_pointers(image_ptr, corners, w, padded_K):
    """The first class of the four corners in one image (h, w, padded_K), [PIXELS] each."""
    row0, row1 = corners.y0.to(tl.int64) * w, corners.y1.to(tl.int64) * w
    return (
        image_ptr + (row0 + corners.x0) * padded_K,
        image_ptr + (row0 + corners.x1) * padded_K,
        image_ptr + (row1 + corners.x0) * padded_K,
        image_ptr + (row1 + corners.x1) * padded_K,
    )


@triton.jit
def z_of_corners(pointers, corners, mask, first, K, padded_K):
    """z [PIXELS, GATHERED_K] of the classes from `first` on, -inf past the last; four `corner_pointers`."""
    k = (first + tl.arange(0, GATHERED_K))[None, :]
    fy, fx = corners.fy[:, None], corners.fx[:, None]
    mask = mask[:, None] & (k < padded_K)
    # A corner without weight is not read: infinity times 0 is NaN.
    mask_x, mask_y = mask & (fx > 0), mask & (fy > 0)
    # [PIXELS, GATHERED_K]
    z00 = tl.load(pointers[0][:, None] + k, mask=mask, other=0.0).to(tl.float32)
    z01 = tl.load(pointers[1][:, None] + k, mask=mask_x, other=0.0).to(tl.float32)
    z10 = tl.load(pointers[2][:, None] + k, mask=mask_y, other=0.0).to(tl.float32)
    z11 = tl.load(pointers[3][:, None] + k, mask=mask_x & mask_y, other=0.0).to(tl.float32)
    z = (1 - fy) * ((1 - fx) * z00 + fx * z01) + fy * ((1 - fx) * z10 + fx * z11)
    return tl.where(k < K, z, float("-inf"))


# --- launchers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """What kernels over tiles take, besides the tensors, of logits (B, K, h, w) and a full size (H, W)."""

    B: int
    K: int
    padded_K: int
    h: int
    w: int
    H: int
    W: int
    operand: Any
    """The tl.dtype that matrix products take."""
    no_class: float
    """The logit of what only pads the classes."""

    @classmethod
    def over(cls, logits: Tensor, size: tuple[int, int]) -> "Tiles":
        """The tiles of maps of `size` (H, W)."""
        B, K, h, w = logits.shape
        return cls(B, K, padded(K), h, w, *size, operand=operand(logits.dtype), no_class=no_class(logits.dtype))

    @property
    def scales(self) -> tuple[float, float]:
        """Low-size pixels per pixel, (y, x)."""
        return self.h / self.H, self.w / self.W

    @property
    def shifts(self) -> tuple[int, int]:
        """How far before the first pixel the tiles start, (y, x)."""
        return tile_shift(self.H, self.h), tile_shift(self.W, self.w)

    @property
    def grid(self) -> tuple[int]:
        """One program per tile."""
        rows, columns = (-(-(n + shift) // TILE) for n, shift in zip((self.H, self.W), self.shifts, strict=True))
        return (self.B * rows * columns,)

    @property
    def size_bucket(self) -> int:
        """The part of the autotune key that tells sizes apart."""
        return size_bucket(self.B * self.H * self.W, self.K)


def channels_last(logits: Tensor) -> Tensor:
    """(B, K, h, w) -> (B, h, w, padded_K), contiguous; not copied if it lies so already."""
    B, K, h, w = logits.shape
    if K % CLASS_PADDING == 0:
        return logits.permute(0, 2, 3, 1).contiguous()
    table = logits.new_full((B, h, w, padded(K)), no_class(logits.dtype))
    table[..., :K] = logits.permute(0, 2, 3, 1)
    return table


def padded(K: int) -> int:
    """K, rounded up to a multiple of CLASS_PADDING."""
    return -(-K // CLASS_PADDING) * CLASS_PADDING


def no_class(dtype: torch.dtype) -> float:
    """The logit of what only pads the classes: its softmax is 0, and it remains finite in products and bfloat16."""
    return torch.finfo(torch.float16).min if dtype == torch.float16 else -1e38


def tile_shift(size: int, low_size: int) -> int:
    """How far before the first pixel the tiles start, so that an edge lies half-way between two low-size pixels."""
    return -(size // low_size // 2) % TILE if size % low_size == 0 else 0
