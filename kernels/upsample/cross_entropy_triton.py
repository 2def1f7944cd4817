"""Cross-entropy of up-sampled logits in Triton: see `cross_entropy` for the equation and `tiles_triton` for the tiles.

The gradient of a window of 16 low-size pixels is a matrix product too,

    grad[16, BLOCK_K] = weights^T @ (factor * (softmax(z) - onehot(target)))        factor = grad_losses * class weight

and 16 x BLOCK_K atomic adds instead of four for each of the 64 pixels and each class.

Losses at several offsets share the table and the gradient, and are launched one by one. One kernel for both losses of
Eq. 7 would save the loads of a window that both read: 4 to 13 % of the instructions (sm_90, bfloat16, 150 classes; per
warp and block of classes 712 instead of twice 404 in the first configuration of the pool), for 124 to 167 registers
instead of 72 to 96.

Legend (see `tiles_triton` for the other letters and the programs)
    target         (B, H, W), integers
    class_weights  (K,)
    losses         (B, H, W) float32
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autotune import autotuned
from .._scatter import ScatterBuffer, scatter_add
from .._triton import INTERPRETED, LOWEST, PRECISION, device_guard, strides, tl, triton
from .tiles_triton import (
    CLASS_POOL,
    GATHERED_K,
    PIXELS,
    SIZES,
    Strided,
    Tiles,
    channels_last,
    corner_pointers,
    corners_of_pixels,
    exp,
    limit_classes_per_warp,
    pixels_of_tile,
    window_of_corners,
    z_of_corners,
    z_of_window,
)

LABEL_STRIDES = ("target_stride_b", "target_stride_h")


# --- device functions -------------------------------------------------------------------------------------------------


class Labels(NamedTuple):
    """What the pixels of a tile are labelled, [PIXELS] each, and over the tile."""

    label: Any  # int32; 0 where the id is no class
    weight: Any  # float32; 0 where ignored, NaN where the id is no class
    valid: Any  # whether the weight is not 0
    lowest: Any  # of the valid labels; K if there is none
    highest: Any  # of the valid labels; -1 if there is none


class Tile(NamedTuple):
    """All that a program reads before it goes through the classes."""

    pixels: Any
    labels: Any
    corners: Any
    window: Any
    first_element: Any  # int64, of the image in the table (B, h, w, padded_K)
    num_classes: Any  # K, or 0 if no pixel is valid


@triton.jit
def labels_of_pixels(target, class_weights, ignore_index, pixels, K, HAS_WEIGHTS: tl.constexpr):
    """The labels of a tile; target and class_weights are `Strided`."""
    pointers = target.ptr + pixels.b * target.strides[0]
    pointers += pixels.y.to(tl.int64) * target.strides[1] + pixels.x.to(tl.int64) * target.strides[2]
    # [PIXELS]
    label = tl.load(pointers, mask=pixels.in_bounds, other=0).to(tl.int64)
    not_ignored = pixels.in_bounds & (label != ignore_index)
    is_class = (label >= 0) & (label < K)
    weight = tl.full(label.shape, 1.0, tl.float32)
    if HAS_WEIGHTS:
        pointers = class_weights.ptr + label * class_weights.strides[0]
        weight = tl.load(pointers, mask=not_ignored & is_class, other=0.0).to(tl.float32)
    weight = tl.where(not_ignored, tl.where(is_class, weight, float("nan")), 0.0)
    label = tl.where(is_class, label, 0).to(tl.int32)
    valid = weight != 0
    lowest, highest = tl.min(tl.where(valid, label, K), 0), tl.max(tl.where(valid, label, -1), 0)
    return Labels(label=label, weight=weight, valid=valid, lowest=lowest, highest=highest)


@triton.jit
def load_tile(
    target, class_weights, ignore_index, offset, K, padded_K, low_size, size, scales, shifts,
    HAS_OFFSET: tl.constexpr, HAS_WEIGHTS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """What both kernels start with. Pixels without a loss are read as if they were not there."""
    pixels = pixels_of_tile(size, shifts)
    labels = labels_of_pixels(target, class_weights, ignore_index, pixels, K, HAS_WEIGHTS)
    corners = corners_of_pixels(offset, pixels, labels.valid, low_size, size, scales, HAS_OFFSET)
    h, w = low_size
    return Tile(
        pixels=pixels,
        labels=labels,
        corners=corners,
        window=window_of_corners(corners, labels.valid, w, padded_K, OPERAND),
        first_element=pixels.b * h * w * padded_K,
        num_classes=tl.where(labels.highest >= 0, K, 0),
    )


@triton.jit
def is_label(z, first, labels):
    """Whether the classes of z, from `first` on, are the labels, as z."""
    return (first + tl.arange(0, z.shape[1]))[None, :] == labels.label[:, None]


@triton.jit
def take_classes(largest, total, z_label, z, first, labels):
    """Take the classes of z, from `first` on, into total = sum_k exp(z[k] - largest) and z[label], [PIXELS] each."""
    # Of the blocks of classes, most hold the label of no pixel.
    if (labels.lowest < first + z.shape[1]) & (first <= labels.highest):
        z_label += tl.sum(tl.where(is_label(z, first, labels), z, 0.0), 1)
    larger = tl.maximum(largest, tl.max(z, 1))
    return larger, total * exp(largest - larger) + tl.sum(exp(z - larger[:, None]), 1), z_label


@triton.jit
def sum_exp(
    image_ptr, tile, in_window, K, w, padded_K, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, NO_CLASS: tl.constexpr
):
    """largest = max_k z[k], total = sum_k exp(z[k] - largest) and z[label], [PIXELS] each; and whether they came from
    the window: all corners lie there, and it is finite."""
    zero = tl.zeros(tile.labels.label.shape, tl.float32)
    # The lowest finite number, so that a class at -inf adds exp(-inf) and not exp(-inf + inf).
    lowest = zero + LOWEST
    largest, total, z_label = lowest, zero, zero
    if in_window:
        for first in range(0, tile.num_classes, BLOCK_K):
            z, _logits = z_of_window(image_ptr, tile.window, first, padded_K, BLOCK_K, OPERAND, NO_CLASS)
            largest, total, z_label = take_classes(largest, total, z_label, z, first, tile.labels)
        # NaN is 0 * infinity: some pixel, perhaps one without a loss, met what it does not read. And where each class
        # is at -inf, padding must not win.
        finite = tl.abs(largest + tl.log(total)) < -0.9 * NO_CLASS
        in_window = tl.min(finite.to(tl.int32), 0) == 1
    if in_window == 0:
        largest, total, z_label = lowest, zero, zero
        pointers = corner_pointers(image_ptr, tile.corners, w, padded_K)
        for first in range(0, tile.num_classes, GATHERED_K):
            z = z_of_corners(pointers, tile.corners, tile.labels.valid, first, K, padded_K)
            largest, total, z_label = take_classes(largest, total, z_label, z, first, tile.labels)
    return largest, total, z_label, in_window


@triton.jit
def add_through_window(
    grad_image_ptr, scale_ptr, image_ptr, tile, factor, largest, total, padded_K, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, GRAD_OPERAND: tl.constexpr, GRAD_PRECISION: tl.constexpr, NO_CLASS: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """Add the gradient of a tile whose corners all lie in its window."""
    window, labels = tile.window, tile.labels
    # Mean reduction's factors are too small for float16; relative to the largest they fit.
    scale = tl.max(tl.abs(factor), 0)
    relative = factor / tl.where(scale > 0, scale, 1.0)
    relative_to_total = relative / total
    transposed = tl.trans(window.weights.to(GRAD_OPERAND))
    for first in range(0, tile.num_classes, BLOCK_K):
        z, _logits = z_of_window(image_ptr, window, first, padded_K, BLOCK_K, OPERAND, NO_CLASS)
        # [PIXELS, BLOCK_K]
        grad_z = exp(z - largest[:, None]) * relative_to_total[:, None]
        if (labels.lowest < first + BLOCK_K) & (first <= labels.highest):
            grad_z -= tl.where(is_label(z, first, labels), relative[:, None], 0.0)
        k = first + tl.arange(0, BLOCK_K)
        # [16, BLOCK_K]
        grad = tl.dot(transposed, grad_z.to(GRAD_OPERAND), input_precision=GRAD_PRECISION) * scale
        mask = window.mask[:, None] & (k < padded_K)[None, :]
        pointers = (grad_image_ptr + window.elements)[:, None] + k[None, :]
        scatter_add(pointers, grad, mask, scale_ptr, DETERMINISTIC)


@triton.jit
def add_through_corners(
    grad_image_ptr, scale_ptr, image_ptr, tile, factor, largest, total, K, w, padded_K, DETERMINISTIC: tl.constexpr
):
    """Add the gradient of a tile pixel by pixel, into four corners each."""
    corners, labels = tile.corners, tile.labels
    fy, fx = corners.fy, corners.fx
    pointers = corner_pointers(image_ptr, corners, w, padded_K)
    g00, g01, g10, g11 = corner_pointers(grad_image_ptr, corners, w, padded_K)
    for first in range(0, tile.num_classes, GATHERED_K):
        z = z_of_corners(pointers, corners, labels.valid, first, K, padded_K)
        # [PIXELS, GATHERED_K]
        grad = exp(z - largest[:, None]) / total[:, None] - tl.where(is_label(z, first, labels), 1.0, 0.0)
        grad *= factor[:, None]
        k = (first + tl.arange(0, GATHERED_K))[None, :]
        mask = labels.valid[:, None] & (k < padded_K)
        mask_x, mask_y = mask & (fx > 0)[:, None], mask & (fy > 0)[:, None]
        scatter_add(g00[:, None] + k, grad * ((1 - fy) * (1 - fx))[:, None], mask, scale_ptr, DETERMINISTIC)
        scatter_add(g01[:, None] + k, grad * ((1 - fy) * fx)[:, None], mask_x, scale_ptr, DETERMINISTIC)
        scatter_add(g10[:, None] + k, grad * (fy * (1 - fx))[:, None], mask_y, scale_ptr, DETERMINISTIC)
        scatter_add(g11[:, None] + k, grad * (fy * fx)[:, None], mask_x & mask_y, scale_ptr, DETERMINISTIC)


# --- kernels ----------------------------------------------------------------------------------------------------------


@autotuned(
    CLASS_POOL,
    key=["HAS_OFFSET"],
    unspecialised=[*SIZES, *LABEL_STRIDES],
    fit=limit_classes_per_warp,
)
def losses_kernel(
    table_ptr,  # (B, h, w, padded_K), contiguous: logits
    target_ptr,  # (B, H, W)
    offset_ptr,  # (B, 2, H, W) or None
    class_weights_ptr,  # (K,) or None
    losses_ptr,  # (B, H, W), contiguous float32
    target_stride_b,
    target_stride_h,
    target_stride_w,
    offset_stride_b,
    offset_stride_i,
    offset_stride_h,
    offset_stride_w,
    class_weights_stride_k,
    ignore_index,
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
    HAS_WEIGHTS: tl.constexpr,
    OPERAND: tl.constexpr,
    NO_CLASS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The losses of one tile."""
    target_strides = (target_stride_b, target_stride_h, target_stride_w)
    offset_strides = (offset_stride_b, offset_stride_i, offset_stride_h, offset_stride_w)
    tile = load_tile(
        Strided(ptr=target_ptr, strides=target_strides),
        Strided(ptr=class_weights_ptr, strides=(class_weights_stride_k,)),
        ignore_index,
        Strided(ptr=offset_ptr, strides=offset_strides),
        K, padded_K, (h, w), (H, W), scales, (shift_y, shift_x), HAS_OFFSET, HAS_WEIGHTS, OPERAND,
    )  # fmt: skip
    image_ptr = table_ptr + tile.first_element
    largest, total, z_label, _ = sum_exp(
        image_ptr, tile, tile.window.holds_tile, K, w, padded_K, BLOCK_K, OPERAND, NO_CLASS
    )
    # [PIXELS]
    pixels, labels = tile.pixels, tile.labels
    loss = tl.where(labels.valid, labels.weight * (largest - z_label + tl.log(total)), 0.0)
    tl.store(losses_ptr + pixels.b * H * W + pixels.y * W + pixels.x, loss, mask=pixels.in_bounds)


@autotuned(
    CLASS_POOL,
    key=["HAS_OFFSET"],
    adds_into=["grad_table_ptr"],
    unspecialised=[*SIZES, *LABEL_STRIDES, "grad_losses_stride_b", "grad_losses_stride_h"],
    fit=limit_classes_per_warp,
)
def losses_backward_kernel(
    grad_losses_ptr,  # (B, H, W)
    table_ptr,  # (B, h, w, padded_K), contiguous: logits
    target_ptr,  # (B, H, W)
    offset_ptr,  # (B, 2, H, W) or None
    class_weights_ptr,  # (K,) or None
    grad_table_ptr,  # (B, h, w, padded_K), contiguous, a ScatterBuffer
    scale_ptr,  # (2,): the ScatterBuffer's scale, or None
    grad_losses_stride_b,
    grad_losses_stride_h,
    grad_losses_stride_w,
    target_stride_b,
    target_stride_h,
    target_stride_w,
    offset_stride_b,
    offset_stride_i,
    offset_stride_h,
    offset_stride_w,
    class_weights_stride_k,
    ignore_index,
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
    HAS_WEIGHTS: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    OPERAND: tl.constexpr,
    GRAD_OPERAND: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
    NO_CLASS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The part that one tile has in the gradient."""
    grad_losses_strides = (grad_losses_stride_b, grad_losses_stride_h, grad_losses_stride_w)
    target_strides = (target_stride_b, target_stride_h, target_stride_w)
    offset_strides = (offset_stride_b, offset_stride_i, offset_stride_h, offset_stride_w)
    tile = load_tile(
        Strided(ptr=target_ptr, strides=target_strides),
        Strided(ptr=class_weights_ptr, strides=(class_weights_stride_k,)),
        ignore_index,
        Strided(ptr=offset_ptr, strides=offset_strides),
        K, padded_K, (h, w), (H, W), scales, (shift_y, shift_x), HAS_OFFSET, HAS_WEIGHTS, OPERAND,
    )  # fmt: skip
    pixels, valid = tile.pixels, tile.labels.valid
    pointers = grad_losses_ptr + pixels.b * grad_losses_strides[0] + pixels.y.to(tl.int64) * grad_losses_strides[1]
    pointers += pixels.x.to(tl.int64) * grad_losses_strides[2]
    # [PIXELS]
    factor = tl.load(pointers, mask=valid, other=0.0).to(tl.float32) * tile.labels.weight
    # An infinite factor would spread over the window.
    finite = tl.abs(factor) < float("inf")
    in_window = tile.window.holds_tile & (tl.max((valid & (finite == 0)).to(tl.int32), 0) == 0)

    image_ptr, grad_image_ptr = table_ptr + tile.first_element, grad_table_ptr + tile.first_element
    largest, total, _z_label, in_window = sum_exp(
        image_ptr, tile, in_window, K, w, padded_K, BLOCK_K, OPERAND, NO_CLASS
    )
    if in_window:
        add_through_window(
            grad_image_ptr, scale_ptr, image_ptr, tile, factor, largest, total, padded_K, BLOCK_K,
            OPERAND, GRAD_OPERAND, GRAD_PRECISION, NO_CLASS, DETERMINISTIC,
        )  # fmt: skip
    else:
        add_through_corners(
            grad_image_ptr, scale_ptr, image_ptr, tile, factor, largest, total, K, w, padded_K, DETERMINISTIC
        )


# --- launchers --------------------------------------------------------------------------------------------------------


def shared_arguments(
    table: Tensor,
    target: Tensor,
    offset: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
    tiles: Tiles,
) -> dict[str, Any]:
    """The arguments that both kernels take."""
    return {
        "table_ptr": table,
        "target_ptr": target,
        "offset_ptr": offset,
        "class_weights_ptr": class_weights,
        **strides("target", "bhw", target),
        **strides("offset", "bihw", offset),
        **strides("class_weights", "k", class_weights),
        "ignore_index": ignore_index,
        "K": tiles.K,
        "padded_K": tiles.padded_K,
        "h": tiles.h,
        "w": tiles.w,
        "H": tiles.H,
        "W": tiles.W,
        "scales": tiles.scales,
        "shift_y": tiles.shifts[0],
        "shift_x": tiles.shifts[1],
        "size_bucket": tiles.size_bucket,
        "HAS_OFFSET": offset is not None,
        "HAS_WEIGHTS": class_weights is not None,
        "OPERAND": tiles.operand,
        "NO_CLASS": tiles.no_class,
        "enable_fp_fusion": True,
    }


def forward(
    logits: Tensor,
    target: Tensor,
    offsets: Sequence[Tensor | None],
    class_weights: Tensor | None,
    ignore_index: int,
) -> list[Tensor]:
    """losses (B, H, W), float32, at each of the offsets."""
    losses = [logits.new_empty(target.shape, dtype=torch.float32) for _ in offsets]
    if target.numel() == 0:
        return losses
    table = channels_last(logits)
    tiles = Tiles.over(logits, target.shape[1:])
    with device_guard(logits):
        for out, offset in zip(losses, offsets, strict=True):
            losses_kernel[tiles.grid](
                losses_ptr=out, **shared_arguments(table, target, offset, class_weights, ignore_index, tiles)
            )
    return losses


def backward(
    grads: Sequence[Tensor],
    logits: Tensor,
    target: Tensor,
    offsets: Sequence[Tensor | None],
    class_weights: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Gradient of logits (B, K, h, w), from those of the losses at each of the offsets."""
    if target.numel() == 0:
        return torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)

    def bound() -> Tensor:
        # |softmax - onehot| and a pixel's weight in a corner are at most 1.
        largest = torch.stack([grad.abs().amax() for grad in grads]).amax() * PIXELS
        return largest if class_weights is None else largest * class_weights.abs().amax()

    # Gradients of bfloat16 in float16, which has three more digits; those of float16 need more than it has.
    grad_operand = tl.float16 if logits.dtype == torch.bfloat16 else tl.float32
    grad_precision = "bf16x3" if logits.dtype == torch.float16 and not INTERPRETED else PRECISION
    table = channels_last(logits)
    buffer = ScatterBuffer(table.shape, logits.device, bound)
    tiles = Tiles.over(logits, target.shape[1:])
    with device_guard(logits):
        for grad, offset in zip(grads, offsets, strict=True):
            losses_backward_kernel[tiles.grid](
                grad_losses_ptr=grad,
                grad_table_ptr=buffer.data,
                scale_ptr=buffer.scale,
                **strides("grad_losses", "bhw", grad),
                **shared_arguments(table, target, offset, class_weights, ignore_index, tiles),
                DETERMINISTIC=buffer.deterministic,
                GRAD_OPERAND=grad_operand,
                GRAD_PRECISION=grad_precision,
            )
    return buffer.result(logits.dtype)[..., : tiles.K].permute(0, 3, 1, 2).contiguous()
