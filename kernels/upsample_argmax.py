"""Argmax of up-sampled logits, without up-sampled logits: the predicted classes, refined with an offset (Sec. 3.2).

    best(p) = argmax_k z[k, p], the lowest of equals

with z[k, p], the up-sampled logits read at p + offset(p), as `_upsample` defines them.

Legend
    B batch, K classes, h x w the logits' map, H x W the full-size map.
    logits    (B, K, h, w)
    offset    (B, 2, H, W), (dx, dy) in pixels of the full-size map
    best      (B, H, W) int64
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import autotuned, device_guard, size_class, tl, triton
from ._upsample import (
    PIXEL_CONFIGS,
    Where,
    check_maps,
    corner_pointers,
    corners_in_tile,
    interpolate_in_tile,
    offset_strides,
    visit_tiles,
)
from .backend import runs_on_triton


def _argmax_torch(logits: Tensor, size: tuple[int, int], offset: Tensor | None) -> Tensor:
    best = torch.empty((logits.shape[0], *size), dtype=torch.int64, device=logits.device)

    def visit(where: Where, z: Tensor) -> None:
        best[where] = z.argmax(1).view(best[where].shape)

    visit_tiles(logits, size, offset, visit)
    return best


@autotuned(PIXEL_CONFIGS, key=["K", "HAS_OFFSET"])
def argmax_kernel(
    logits_ptr,  # (B, K, h, w)
    offset_ptr,  # (B, 2, H, W) or unused
    best_ptr,  # (B, H, W), contiguous int64
    logits_stride_b,
    logits_stride_k,
    logits_stride_h,
    logits_stride_w,
    offset_stride_b,
    offset_stride_xy,
    offset_stride_h,
    offset_stride_w,
    K,
    h,
    w,
    H,
    W,
    scale_y,  # h / H
    scale_x,  # w / W
    size_class,
    HAS_OFFSET: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The classes of BLOCK_P pixels of one image, row by row."""
    tiles = tl.cdiv(H * W, BLOCK_P)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    live = p < H * W
    y0, y1, x0, x1, fy, fx = corners_in_tile(
        offset_ptr, offset_stride_b, offset_stride_xy, offset_stride_h, offset_stride_w, b, p // W, p % W, live, H, W,
        h, w, scale_y, scale_x, HAS_OFFSET,
    )  # fmt: skip
    p00, p01, p10, p11 = corner_pointers(
        logits_ptr + b * logits_stride_b, y0, y1, x0, x1, logits_stride_h, logits_stride_w
    )
    largest = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    best = tl.zeros((BLOCK_P,), tl.int64)
    for k in range(0, K):
        z = interpolate_in_tile(p00, p01, p10, p11, fy, fx, live)
        # The first NaN wins and stays, as in PyTorch.
        better = (z > largest) | ((z != z) & (largest == largest))
        best = tl.where(better, k, best)
        largest = tl.where(better, z, largest)
        p00 += logits_stride_k
        p01 += logits_stride_k
        p10 += logits_stride_k
        p11 += logits_stride_k
    tl.store(best_ptr + b * H * W + p, best, mask=live)


def _argmax_triton(logits: Tensor, size: tuple[int, int], offset: Tensor | None) -> Tensor:
    (B, K, h, w), (H, W) = logits.shape, size
    best = torch.empty((B, H, W), dtype=torch.int64, device=logits.device)
    if best.numel() == 0:
        return best
    grid = lambda meta: (B * triton.cdiv(H * W, meta["BLOCK_P"]),)
    with device_guard(logits):
        argmax_kernel[grid](
            logits,
            offset,
            best,
            *logits.stride(),
            *offset_strides(offset),
            K,
            h,
            w,
            H,
            W,
            h / H,
            w / W,
            size_class=size_class(B * H * W),
            HAS_OFFSET=offset is not None,
            enable_fp_fusion=True,
        )
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
    if not (isinstance(size, Sequence) and len(size) == 2 and all(isinstance(n, int) and n >= 0 for n in size)):
        raise ValueError(f"size is {size!r}; it must be (height, width), two ints >= 0, such as labels.shape[-2:]")
    height, width = size
    check_maps(logits, offset, (height, width))
    return _upsample_argmax(logits, height, width, offset)
