"""Up-sampled logits read pixel by pixel, never held: what the cross-entropy and the argmax of them share.

    s(p)     = clamp(p + offset(p), 0, (W - 1, H - 1))         position on the full-size map; offset is 0 without one
    src(s)   = clamp((s + 1/2) * (w / W, h / H) - 1/2, 0, (w - 1, h - 1))       the same position on the logits' map
    z[k, p]  = bilinear(logits[k], src(s(p)))

Without an offset z is `interpolate(logits, (H, W), mode="bilinear", align_corners=False)`; with an integer offset it
is that map read at p + offset. z exists for a slab of rows (PyTorch) or a class of a tile of pixels (Triton) at a time.

Legend
    B batch, K classes, h x w the logits' map, H x W the full-size map; K, h, w, H, W are any positive numbers.
    logits    (B, K, h, w)
    offset    (B, 2, H, W), (dx, dy) in pixels of the full-size map
In the kernels that read so, a program is a tile of BLOCK_P pixels of one image; pixels are lanes, classes a loop, so
that every sum over classes has one order whatever the block size.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._triton import autotune_pool, tl, triton
from .checks import check_count, check_floating, check_same_device, check_shape, compute_dtype

# Bytes of up-sampled logits that the PyTorch path holds at a time (one row of the image at the least): on a CPU they
# should stay in the cache, on a GPU they should fill it.
SLAB_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}


def check_maps(logits: Tensor, offset: Tensor | None, size: tuple[int, int]) -> None:
    """Raise TypeError or ValueError unless logits (B, K, h, w) and offset (B, 2, *size) or None fit."""
    check_floating(logits=logits)
    check_shape("logits", logits, ("B", "K", "h", "w"))
    if 0 in logits.shape[1:]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it needs at least one class and one pixel")
    check_count("pixels in logits", logits.shape[2] * logits.shape[3])
    check_count("pixels in the output", size[0] * size[1])
    if offset is not None:
        if offset.is_complex() or offset.dtype == torch.bool:
            raise TypeError(f"offset has dtype {offset.dtype}; it must hold integers or floating-point numbers")
        check_same_device(logits=logits, offset=offset)
        check_shape("offset", offset, (logits.shape[0], 2, *size), "one (dx, dy) for each pixel of the output")


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch
# ---------------------------------------------------------------------------------------------------------------------


def slabs(logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[int, slice]]:
    """(image, rows of the full-size map), few enough rows for SLAB_BYTES."""
    B, K = logits.shape[:2]
    H, W = size
    slab_bytes = SLAB_BYTES.get(logits.device.type, SLAB_BYTES["cuda"])
    rows = max(1, slab_bytes // max(1, K * W * compute_dtype(logits).itemsize))
    for b in range(B):
        for first in range(0, H, rows):
            yield b, slice(first, min(first + rows, H))


def _axis(position: Tensor, size: int, low_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper corner (int64) on the logits' map and the fraction beyond the lower, of full-size positions."""
    source = (position.clamp(0, size - 1) + 0.5) * (low_size / size) - 0.5
    source = source.clamp(0, low_size - 1)
    lower = source.floor()
    fraction = source - lower
    lower = lower.long()
    return lower, (lower + 1).clamp(max=low_size - 1), fraction


def corners(logits: Tensor, size: tuple[int, int], offset: Tensor | None, b: int, rows: slice) -> tuple[Tensor, Tensor]:
    """Indices into the h*w low-size pixels and weights, (pixels, 4) each, for the rows of image b."""
    h, w = logits.shape[2:]
    H, W = size
    make = {"dtype": compute_dtype(logits), "device": logits.device}
    y = torch.arange(rows.start, rows.stop, **make)[:, None]
    x = torch.arange(W, **make)[None, :]
    if offset is not None:
        # A NaN means no offset; infinities are for the clamp.
        shift = offset[b, :, rows].to(make["dtype"]).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
        x, y = x + shift[0], y + shift[1]
    x0, x1, fx = _axis(x, W, w)
    y0, y1, fy = _axis(y, H, h)
    index = torch.stack([y0 * w + x0, y0 * w + x1, y1 * w + x0, y1 * w + x1], -1)
    weight = torch.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], -1)
    return index.view(-1, 4), weight.view(-1, 4)


def channels_last_table(logits: Tensor, b: int) -> Tensor:
    """(h*w, K) logits of image b, a row for each pixel."""
    return logits[b].permute(1, 2, 0).to(compute_dtype(logits)).reshape(-1, logits.shape[1])


def interpolate(index: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """(K, pixels) up-sampled logits. Classes first: a softmax along a short last axis is 20 times slower on a CPU."""
    return torch.nn.functional.embedding_bag(index, table, per_sample_weights=weight, mode="sum").t().contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Triton
# ---------------------------------------------------------------------------------------------------------------------

PIXEL_CONFIGS = autotune_pool(
    triton.Config({"BLOCK_P": 128}, num_warps=4),
    triton.Config({"BLOCK_P": 256}, num_warps=4),
    triton.Config({"BLOCK_P": 64}, num_warps=2),
)


@triton.jit
def _axis_in_tile(position, size, low_size, scale):
    """As `_axis`, for [BLOCK_P] float32 positions; scale is low_size / size."""
    source = (tl.minimum(tl.maximum(position, 0.0), size - 1.0) + 0.5) * scale - 0.5
    source = tl.minimum(tl.maximum(source, 0.0), low_size - 1.0)
    lower = source.to(tl.int32)
    return lower, tl.minimum(lower + 1, low_size - 1), source - lower


@triton.jit
def corners_in_tile(
    offset_ptr, stride_b, stride_xy, stride_h, stride_w, b, y, x, live, H, W, h, w, scale_y, scale_x,
    HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """As `corners`: y0, y1, x0, x1 (int32) and the fractions fy, fx of the pixels (y, x), [BLOCK_P] each."""
    position_y = y.to(tl.float32)
    position_x = x.to(tl.float32)
    if HAS_OFFSET:
        pointers = offset_ptr + b * stride_b + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
        shift_x = tl.load(pointers, mask=live, other=0).to(tl.float32)
        shift_y = tl.load(pointers + stride_xy, mask=live, other=0).to(tl.float32)
        position_x += tl.where(shift_x == shift_x, shift_x, 0.0)
        position_y += tl.where(shift_y == shift_y, shift_y, 0.0)
    y0, y1, fy = _axis_in_tile(position_y, H, h, scale_y)
    x0, x1, fx = _axis_in_tile(position_x, W, w, scale_x)
    return y0, y1, x0, x1, fy, fx


@triton.jit
def corner_pointers(map_ptr, y0, y1, x0, x1, stride_h, stride_w):
    """The four corners in one channel of one image, [BLOCK_P] each."""
    row0 = map_ptr + y0.to(tl.int64) * stride_h
    row1 = map_ptr + y1.to(tl.int64) * stride_h
    column0 = x0.to(tl.int64) * stride_w
    column1 = x1.to(tl.int64) * stride_w
    return row0 + column0, row0 + column1, row1 + column0, row1 + column1


@triton.jit
def interpolate_in_tile(p00, p01, p10, p11, fy, fx, mask):
    z00 = tl.load(p00, mask=mask, other=0.0).to(tl.float32)
    z01 = tl.load(p01, mask=mask, other=0.0).to(tl.float32)
    z10 = tl.load(p10, mask=mask, other=0.0).to(tl.float32)
    z11 = tl.load(p11, mask=mask, other=0.0).to(tl.float32)
    return (1 - fy) * ((1 - fx) * z00 + fx * z01) + fy * ((1 - fx) * z10 + fx * z11)


def offset_strides(offset: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if offset is None else offset.stride()
