"""Boundary targets in Triton: see `boundary_targets` for the equations. Both backends agree to the bit.

Legend
    B batch, H x W map, n directions.
    labels     (B, H, W), integers
    nearest    (B, H, W) int32, the class of the nearest pixel in the column that is not ignored
    squares    (B, H, W) int32, second * 2**16 + first, where
    first      squared distance to that pixel: 0 unless ignored itself
    second     squared distance to the nearest pixel in the column of any other class
    distance   (B, H, W) float32
    direction  (B, H, W) int64
Programs
    Axis 0 = (image, tile row, tile column), columns fastest. The BLOCK_H x BLOCK_W pixels of a tile are block axes.
"""

import math

import torch
from torch import Tensor

from ._autotune import autotuned, size_bucket
from ._tables import cached_table
from ._triton import device_guard, new_ids, tl, triton

NO_DIRECTION = tl.constexpr(255)
# More directions than these are read from a table in a loop: unrolled, 255 of them take the compiler 39 seconds.
MAX_UNROLLED = 16
# Widths and strides are multiples of it, and are passed in units of it: kernels then load and store several pixels at a
# time, and other sizes compile nothing. Labels that lie otherwise are copied.
UNIT = tl.constexpr(16)
SIZES = ("labels_units_b", "labels_units_h", "H", "W_units")

TILE_POOL = [
    triton.Config({"BLOCK_H": 4, "BLOCK_W": 128}, num_warps=4),
    triton.Config({"BLOCK_H": 2, "BLOCK_W": 128}, num_warps=4),
]


# --- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def pixels_of_tile(H, W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """The program's image (int64) and its pixels' y [BLOCK_H, 1] and x [1, BLOCK_W], which may lie past the end."""
    across = tl.cdiv(W, BLOCK_W)
    down = tl.cdiv(H, BLOCK_H)
    tile = tl.program_id(0)
    y = tile // across % down * BLOCK_H + tl.arange(0, BLOCK_H)
    x = tile % across * BLOCK_W + tl.arange(0, BLOCK_W)
    return (tile // (across * down)).to(tl.int64), y[:, None], x[None, :]


@triton.jit
def load_neighbour(image_ptr, strides, distance_ptr, y, x, H, W, ignore_index, centre, distance):
    """v of the pixels (y, x) of one image, seen from pixels of class centre, never ignore_index, at this distance."""
    in_bounds = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    pointers = image_ptr + y.to(tl.int64) * strides[1] + x
    # [BLOCK_H, BLOCK_W]
    label = tl.where(in_bounds, tl.load(pointers, mask=in_bounds, other=0).to(tl.int32), ignore_index)
    near = tl.load(distance_ptr + y * W + x, mask=label == centre, other=0.0)
    return tl.where(label == ignore_index, distance, near)


# --- kernels ----------------------------------------------------------------------------------------------------------


@autotuned(TILE_POOL, key=["REACH"], unspecialised=SIZES)
def column_kernel(
    labels_ptr,  # (B, H, W), whose rows are contiguous
    nearest_ptr,  # (B, H, W), contiguous int32
    squares_ptr,  # (B, H, W), contiguous int32
    labels_units_b,
    labels_units_h,
    ignore_index,
    H,
    W_units,
    size_bucket,
    SATURATION: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """nearest and squares. Where a row is outside, the last one inside stands for it, farther off than it is: that
    changes nothing, as it is met again where it is."""
    W = W_units * UNIT
    labels_strides = (tl.cast(labels_units_b, tl.int64) * UNIT, tl.cast(labels_units_h, tl.int64) * UNIT)
    b, y, x = pixels_of_tile(H, W, BLOCK_H, BLOCK_W)
    pointers = labels_ptr + b * labels_strides[0] + x
    # [BLOCK_H, BLOCK_W]
    nearest = tl.full((BLOCK_H, BLOCK_W), ignore_index, tl.int32)
    first = tl.full((BLOCK_H, BLOCK_W), SATURATION, tl.int32)
    second = tl.full((BLOCK_H, BLOCK_W), SATURATION, tl.int32)
    for i in range(0, 2 * REACH + 1):  # from far to near, below and above
        dy = (REACH - i // 2) * (1 - 2 * (i % 2))
        row = tl.minimum(tl.maximum(y + dy, 0), H - 1)
        met = tl.load(pointers + row.to(tl.int64) * labels_strides[1], mask=x < W, other=0).to(tl.int32)
        valid = met != ignore_index
        other = valid & (met != nearest)
        second = tl.where(other, first, second)
        nearest = tl.where(other, met, nearest)
        first = tl.where(valid, dy * dy, first)
    at = b * H * W + y * W + x
    in_bounds = (y < H) & (x < W)
    tl.store(nearest_ptr + at, nearest, mask=in_bounds)
    tl.store(squares_ptr + at, second << 16 | first, mask=in_bounds)


@autotuned(TILE_POOL, key=["REACH"], unspecialised=SIZES[2:])
def row_kernel(
    nearest_ptr,  # (B, H, W), contiguous int32
    squares_ptr,  # (B, H, W), contiguous int32
    distance_ptr,  # (B, H, W), contiguous float32
    H,
    W_units,
    size_bucket,
    SATURATION: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The distance: the least over the columns at hand, and its root, correctly rounded."""
    W = W_units * UNIT
    b, y, x = pixels_of_tile(H, W, BLOCK_H, BLOCK_W)
    at = b * H * W + y * W + x
    in_bounds = (y < H) & (x < W)
    # [BLOCK_H, BLOCK_W]
    # A pixel that is not ignored is the nearest to itself: its class, at distance 0.
    centre = tl.load(nearest_ptr + at, mask=in_bounds, other=0)
    ignored = (tl.load(squares_ptr + at, mask=in_bounds, other=0) & 0xFFFF) != 0
    squared = tl.full((BLOCK_H, BLOCK_W), SATURATION, tl.int32)
    for dx in range(-REACH, REACH + 1):
        mask = (y < H) & (x + dx >= 0) & (x + dx < W)
        nearest = tl.load(nearest_ptr + at + dx, mask=mask, other=0)
        squares = tl.load(squares_ptr + at + dx, mask=mask, other=SATURATION << 16 | SATURATION)
        other = tl.where(nearest == centre, squares >> 16, squares & 0xFFFF)
        squared = tl.minimum(squared, other + dx * dx)
    squared = tl.where(ignored, SATURATION, squared)
    tl.store(distance_ptr + at, tl.sqrt_rn(squared.to(tl.float32)), mask=in_bounds)


@autotuned(TILE_POOL, key=["NUM_DIRECTIONS"], unspecialised=SIZES)
def direction_kernel(
    labels_ptr,  # (B, H, W), whose rows are contiguous
    distance_ptr,  # (B, H, W), contiguous float32
    direction_ptr,  # (B, H, W), contiguous int64
    centres_ptr,  # (n, 2) float32, contiguous: x and y of the unit vector at the centre of each bin; or None
    labels_units_b,
    labels_units_h,
    ignore_index,
    H,
    W_units,
    largest_distance,
    size_bucket,
    CENTRES: tl.constexpr,  # the same, 2 n numbers, if centres_ptr is None
    NUM_DIRECTIONS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The direction where the distance is at most largest_distance: the bin nearest in angle to the gradient."""
    W = W_units * UNIT
    labels_strides = (tl.cast(labels_units_b, tl.int64) * UNIT, tl.cast(labels_units_h, tl.int64) * UNIT)
    b, y, x = pixels_of_tile(H, W, BLOCK_H, BLOCK_W)
    labels_ptr += b * labels_strides[0]
    distance_ptr += b * H * W
    in_bounds = (y < H) & (x < W)
    pointers = labels_ptr + y.to(tl.int64) * labels_strides[1] + x
    # [BLOCK_H, BLOCK_W]
    centre = tl.load(pointers, mask=in_bounds, other=0).to(tl.int32)
    # An ignored pixel's own gradient is not used; but what lies outside must not pass for its class and be read.
    centre = tl.where(centre == ignore_index, ~centre, centre)
    # Saturated, and so beyond the radius, where the label is ignored.
    distance = tl.load(distance_ptr + y * W + x, mask=in_bounds, other=0.0)

    g_x = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    g_y = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    for i in tl.static_range(13, 25):  # the second half of the 5x5 neighbourhood, row by row
        dy = i // 5 - 2
        dx = i % 5 - 2
        ahead = load_neighbour(
            labels_ptr, labels_strides, distance_ptr, y + dy, x + dx, H, W, ignore_index, centre, distance
        )
        behind = load_neighbour(
            labels_ptr, labels_strides, distance_ptr, y - dy, x - dx, H, W, ignore_index, centre, distance
        )
        g_x += (ahead - behind) * (dx / (dx * dx + dy * dy))
        g_y += (ahead - behind) * (dy / (dx * dx + dy * dy))

    direction = tl.full((BLOCK_H, BLOCK_W), NUM_DIRECTIONS // 2, tl.int32)
    largest = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    if centres_ptr is None:
        for k in tl.static_range(NUM_DIRECTIONS):
            cosine = g_x * CENTRES[2 * k] + g_y * CENTRES[2 * k + 1]
            direction = tl.where(cosine > largest, k, direction)
            largest = tl.maximum(largest, cosine)
    else:
        for k in range(0, NUM_DIRECTIONS):
            cosine = g_x * tl.load(centres_ptr + 2 * k) + g_y * tl.load(centres_ptr + 2 * k + 1)
            direction = tl.where(cosine > largest, k, direction)
            largest = tl.maximum(largest, cosine)
    direction = tl.where(distance > largest_distance, NO_DIRECTION, direction)
    tl.store(direction_ptr + b * H * W + y * W + x, direction.to(tl.int64), mask=in_bounds)


# --- launchers --------------------------------------------------------------------------------------------------------


@cached_table
def table_of_centres(centres: tuple[float, ...], device: torch.device) -> Tensor:
    """The same (2 n,) numbers on a device."""
    return torch.tensor(centres, dtype=torch.float32, device=device)


def pad_rows(labels: Tensor, ignore_index: int) -> Tensor:
    """labels (B, H, W), followed in each row by ignored pixels where W or a stride is not a multiple of UNIT. These
    count for as much as what lies outside the map: nothing."""
    unit = UNIT.value
    *strides, last = labels.stride()
    if last == 1 and not any(n % unit for n in (labels.shape[2], *strides, labels.data_ptr())):
        return labels
    limits = torch.iinfo(labels.dtype)
    if not limits.min <= ignore_index <= limits.max:
        labels = labels.long()
    B, H, W = labels.shape
    padded = labels.new_full((B, H, -(-W // unit) * unit), ignore_index)
    padded[:, :, :W] = labels
    return padded


def forward(
    labels: Tensor, *, saturation: int, largest_distance: float, centres: tuple[float, ...], ignore_index: int
) -> tuple[Tensor, Tensor]:
    """distance and direction of labels (B, H, W).

    Args:
        labels: class ids.
        saturation: the largest squared distance.
        largest_distance: up to which there is a direction.
        centres: x and y of the unit vector at the centre of each of the n bins.
        ignore_index: the id of pixels that belong to no class.
    """
    if labels.numel() == 0:
        return labels.new_empty(labels.shape, dtype=torch.float32), labels.new_empty(labels.shape, dtype=torch.int64)
    width = labels.shape[2]
    labels = pad_rows(labels, ignore_index)
    B, H, W = labels.shape
    distance = labels.new_empty(labels.shape, dtype=torch.float32)
    direction = new_ids(labels.shape, labels.device)
    # Two allocations: the second half of one might not be aligned, which would compile the kernels anew.
    nearest, squares = (labels.new_empty(labels.shape, dtype=torch.int32) for _ in range(2))
    grid = lambda meta: (B * triton.cdiv(H, meta["BLOCK_H"]) * triton.cdiv(W, meta["BLOCK_W"]),)
    bucket, reach = size_bucket(labels.numel()), math.isqrt(saturation - 1)
    units_b, units_h, _ = (stride // UNIT.value for stride in labels.stride())
    labels_units = {"labels_units_b": units_b, "labels_units_h": units_h}
    unrolled = len(centres) <= 2 * MAX_UNROLLED
    table = None if unrolled else table_of_centres(centres, labels.device)
    with device_guard(labels):
        column_kernel[grid](
            labels_ptr=labels,
            nearest_ptr=nearest,
            squares_ptr=squares,
            **labels_units,
            ignore_index=ignore_index,
            H=H,
            W_units=W // UNIT.value,
            size_bucket=bucket,
            SATURATION=saturation,
            REACH=reach,
            enable_fp_fusion=False,
        )
        row_kernel[grid](
            nearest_ptr=nearest,
            squares_ptr=squares,
            distance_ptr=distance,
            H=H,
            W_units=W // UNIT.value,
            size_bucket=bucket,
            SATURATION=saturation,
            REACH=reach,
            enable_fp_fusion=False,
        )
        direction_kernel[grid](
            labels_ptr=labels,
            distance_ptr=distance,
            direction_ptr=direction,
            centres_ptr=table,
            **labels_units,
            ignore_index=ignore_index,
            H=H,
            W_units=W // UNIT.value,
            largest_distance=largest_distance,
            size_bucket=bucket,
            CENTRES=centres if unrolled else None,
            NUM_DIRECTIONS=len(centres) // 2,
            enable_fp_fusion=False,  # fused, products would be rounded otherwise than on a CPU
        )
    if width == W:
        return distance, direction
    return distance[:, :, :width].contiguous(), direction[:, :, :width].contiguous()
