"""Cross-entropy of up-sampled logits in Triton: see `upsample_cross_entropy` for the equation and the letters, and
`tiles_triton` for the tiles.

The gradient of a window of 16 low-size pixels is a matrix product too,

    grad[16, BLOCK_K] = weights^T @ (factor * (softmax(z) - onehot(target)))        factor = grad_losses * class weight

and 16 x BLOCK_K atomic adds instead of four for each of the 64 pixels and each class.
"""

from typing import Any

import torch
from torch import Tensor

from .._autotune import autotuned
from .._scatter import ScatterBuffer, scatter_add
from .._triton import INTERPRETED, LOWEST, PRECISION, device_guard, tl, triton
from .tiles_triton import (
    CLASS_POOL,
    GATHERED_K,
    PIXELS,
    corner_pointers,
    corners_in_tile,
    exp,
    fewer_classes_a_warp,
    num_tiles,
    padded,
    pixels_of_tile,
    split,
    tile_arguments,
    window_of_tile,
    z_of_corners,
    z_of_window,
)


@triton.jit
def _labels_in_tile(
    target_ptr, stride_b, stride_h, stride_w, weights_ptr, weights_stride, b, y, x, live, K, ignore_index,
    HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The label (int32; 0 if it is no class) and the weight, NaN if it is no class and 0 if ignored, [PIXELS] each."""
    pointers = target_ptr + b * stride_b + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    label = tl.load(pointers, mask=live, other=0).to(tl.int64)
    counts = live & (label != ignore_index)
    known = (label >= 0) & (label < K)
    weight = tl.full(y.shape, 1.0, tl.float32)
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + label * weights_stride, mask=counts & known, other=0.0).to(tl.float32)
    weight = tl.where(known, weight, float("nan"))
    return tl.where(known, label, 0).to(tl.int32), tl.where(counts, weight, 0.0)


@triton.jit
def _take_classes(largest, total, z_label, z, first, label, lowest_label, highest_label):
    """Takes the classes of z, from `first` on, into total = sum_k exp(z[k] - largest) and z[label], [PIXELS] each."""
    # Of the blocks of classes, most hold the label of no pixel.
    if (lowest_label < first + z.shape[1]) & (first <= highest_label):
        z_label += tl.sum(tl.where(_is_label(z, first, label), z, 0.0), 1)
    larger = tl.maximum(largest, tl.max(z, 1))
    return larger, total * exp(largest - larger) + tl.sum(exp(z - larger[:, None]), 1), z_label


@triton.jit
def _is_label(z, first, label):
    return (first + tl.arange(0, z.shape[1]))[None, :] == label[:, None]


@triton.jit
def _sum_exp(
    high, low, window_pointers, used, in_window, p00, p01, p10, p11, fy, fx, mask, label, lowest_label, highest_label,
    num_classes, K, padded_K, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, NO_CLASS: tl.constexpr,
):  # fmt: skip
    """largest = max_k z[k], total = sum_k exp(z[k] - largest) and z[label], [PIXELS] each; and whether they came from
    the window: all corners lie there, and it is finite."""
    zero = tl.zeros(fy.shape, tl.float32)
    # The lowest finite number, so that a class at -inf adds exp(-inf) and not exp(-inf + inf).
    lowest = zero + LOWEST
    largest, total, z_label = lowest, zero, zero
    if in_window:
        for first in range(0, num_classes, BLOCK_K):
            z, _window = z_of_window(high, low, window_pointers, used, first, padded_K, BLOCK_K, OPERAND, NO_CLASS)
            largest, total, z_label = _take_classes(
                largest, total, z_label, z, first, label, lowest_label, highest_label
            )
        # NaN is 0 * infinity: some pixel, perhaps one that does not count, met what it does not read. And where each
        # class is at -inf, padding must not win.
        finite = tl.abs(largest + tl.log(total)) < -0.9 * NO_CLASS
        in_window = tl.min(finite.to(tl.int32), 0) == 1
    if in_window == 0:
        largest, total, z_label = lowest, zero, zero
        for first in range(0, num_classes, GATHERED_K):
            z = z_of_corners(p00, p01, p10, p11, fy, fx, mask, first, K, padded_K)
            largest, total, z_label = _take_classes(
                largest, total, z_label, z, first, label, lowest_label, highest_label
            )
    return largest, total, z_label, in_window


@autotuned(CLASS_POOL, key=["K", "HAS_OFFSET"], fit=fewer_classes_a_warp)
def losses_kernel(
    table_ptr,  # (B, h, w, padded_K): logits
    target_ptr,  # (B, H, W)
    offset_ptr,  # (B, 2, H, W) or unused
    weights_ptr,  # (K,) or unused
    losses_ptr,  # (B, H, W), contiguous float32
    target_stride_b,
    target_stride_h,
    target_stride_w,
    offset_stride_b,
    offset_stride_xy,
    offset_stride_h,
    offset_stride_w,
    weights_stride,
    ignore_index,
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
    HAS_WEIGHTS: tl.constexpr,
    OPERAND: tl.constexpr,
    NO_CLASS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The losses of one tile."""
    b, y, x, live = pixels_of_tile(H, W, shift_y, shift_x)
    label, weight = _labels_in_tile(
        target_ptr, target_stride_b, target_stride_h, target_stride_w, weights_ptr, weights_stride, b, y, x, live, K,
        ignore_index, HAS_WEIGHTS,
    )  # fmt: skip
    counts = weight != 0
    lowest_label, highest_label = tl.min(tl.where(counts, label, K), 0), tl.max(tl.where(counts, label, -1), 0)
    y0, y1, x0, x1, fy, fx = corners_in_tile(
        offset_ptr, offset_stride_b, offset_stride_xy, offset_stride_h, offset_stride_w, b, y, x, counts, H, W, h, w,
        scale_y, scale_x, HAS_OFFSET,
    )  # fmt: skip
    weights, index, used, in_window = window_of_tile(y0, y1, x0, x1, fy, fx, counts, w)
    high, low = split(weights, OPERAND)
    table_ptr += b * h * w * padded_K
    p00, p01, p10, p11 = corner_pointers(table_ptr, y0, y1, x0, x1, w, padded_K)
    largest, total, z_label, _ = _sum_exp(
        high, low, table_ptr + index * padded_K, used, in_window, p00, p01, p10, p11, fy, fx, counts, label,
        lowest_label, highest_label, tl.where(highest_label >= 0, K, 0), K, padded_K, BLOCK_K, OPERAND, NO_CLASS,
    )  # fmt: skip
    loss = tl.where(counts, weight * (largest - z_label + tl.log(total)), 0.0)
    tl.store(losses_ptr + b * H * W + y * W + x, loss, mask=live)


@autotuned(CLASS_POOL, key=["K", "HAS_OFFSET"], adds_into=["grad_table_ptr"], fit=fewer_classes_a_warp)
def losses_backward_kernel(
    grad_losses_ptr,  # (B, H, W)
    table_ptr,  # (B, h, w, padded_K): logits
    target_ptr,  # (B, H, W)
    offset_ptr,  # (B, 2, H, W) or unused
    weights_ptr,  # (K,) or unused
    grad_table_ptr,  # (B, h, w, padded_K), contiguous, a ScatterBuffer
    scale_ptr,  # (2,): the ScatterBuffer's scale, or None
    grad_losses_stride_b,
    grad_losses_stride_h,
    grad_losses_stride_w,
    target_stride_b,
    target_stride_h,
    target_stride_w,
    offset_stride_b,
    offset_stride_xy,
    offset_stride_h,
    offset_stride_w,
    weights_stride,
    ignore_index,
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
    HAS_WEIGHTS: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    OPERAND: tl.constexpr,
    GRAD_OPERAND: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
    NO_CLASS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The part that one tile has in the gradient."""
    b, y, x, live = pixels_of_tile(H, W, shift_y, shift_x)
    label, weight = _labels_in_tile(
        target_ptr, target_stride_b, target_stride_h, target_stride_w, weights_ptr, weights_stride, b, y, x, live, K,
        ignore_index, HAS_WEIGHTS,
    )  # fmt: skip
    counts = weight != 0
    lowest_label, highest_label = tl.min(tl.where(counts, label, K), 0), tl.max(tl.where(counts, label, -1), 0)
    pointers = grad_losses_ptr + b * grad_losses_stride_b + y.to(tl.int64) * grad_losses_stride_h
    factor = tl.load(pointers + x.to(tl.int64) * grad_losses_stride_w, mask=counts, other=0.0).to(tl.float32) * weight
    y0, y1, x0, x1, fy, fx = corners_in_tile(
        offset_ptr, offset_stride_b, offset_stride_xy, offset_stride_h, offset_stride_w, b, y, x, counts, H, W, h, w,
        scale_y, scale_x, HAS_OFFSET,
    )  # fmt: skip
    weights, index, used, in_window = window_of_tile(y0, y1, x0, x1, fy, fx, counts, w)
    # An infinite factor would spread over the window too.
    finite = tl.abs(factor) < float("inf")
    in_window &= tl.max((counts & (finite == 0)).to(tl.int32), 0) == 0
    high, low = split(weights, OPERAND)
    image = b * h * w * padded_K
    p00, p01, p10, p11 = corner_pointers(table_ptr + image, y0, y1, x0, x1, w, padded_K)
    window_pointers = table_ptr + image + index * padded_K
    num_classes = tl.where(highest_label >= 0, K, 0)
    largest, total, _z_label, in_window = _sum_exp(
        high, low, window_pointers, used, in_window, p00, p01, p10, p11, fy, fx, counts, label, lowest_label,
        highest_label, num_classes, K, padded_K, BLOCK_K, OPERAND, NO_CLASS,
    )  # fmt: skip
    grad_table_ptr += image
    if in_window:
        # Mean reduction's factors are too small for float16; relative to the largest they fit.
        scale = tl.max(tl.abs(factor), 0)
        relative = factor / tl.where(scale > 0, scale, 1.0)
        relative_to_total = relative / total
        transposed = tl.trans(weights.to(GRAD_OPERAND))
        grad_pointers = grad_table_ptr + index * padded_K
        for first in range(0, num_classes, BLOCK_K):
            z, _window = z_of_window(high, low, window_pointers, used, first, padded_K, BLOCK_K, OPERAND, NO_CLASS)
            grad = exp(z - largest[:, None]) * relative_to_total[:, None]
            if (lowest_label < first + BLOCK_K) & (first <= highest_label):
                grad -= tl.where(_is_label(z, first, label), relative[:, None], 0.0)
            k = first + tl.arange(0, BLOCK_K)
            grad = tl.dot(transposed, grad.to(GRAD_OPERAND), input_precision=GRAD_PRECISION) * scale
            mask = used[:, None] & (k < padded_K)[None, :]
            scatter_add(grad_pointers[:, None] + k[None, :], grad, mask, scale_ptr, DETERMINISTIC)
    else:
        g00, g01, g10, g11 = corner_pointers(grad_table_ptr, y0, y1, x0, x1, w, padded_K)
        for first in range(0, num_classes, GATHERED_K):
            z = z_of_corners(p00, p01, p10, p11, fy, fx, counts, first, K, padded_K)
            grad = exp(z - largest[:, None]) / total[:, None] - tl.where(_is_label(z, first, label), 1.0, 0.0)
            grad *= factor[:, None]
            k = first + tl.arange(0, GATHERED_K)
            mask = counts[:, None] & (k < padded_K)[None, :]
            mask_x, mask_y = mask & (fx > 0)[:, None], mask & (fy > 0)[:, None]
            scatter_add(
                g00[:, None] + k[None, :], grad * ((1 - fy) * (1 - fx))[:, None], mask, scale_ptr, DETERMINISTIC
            )
            scatter_add(g01[:, None] + k[None, :], grad * ((1 - fy) * fx)[:, None], mask_x, scale_ptr, DETERMINISTIC)
            scatter_add(g10[:, None] + k[None, :], grad * (fy * (1 - fx))[:, None], mask_y, scale_ptr, DETERMINISTIC)
            mask &= mask_x & mask_y
            scatter_add(g11[:, None] + k[None, :], grad * (fy * fx)[:, None], mask, scale_ptr, DETERMINISTIC)


def _label_arguments(target: Tensor, class_weights: Tensor | None, ignore_index: int) -> dict[str, Any]:
    """What both kernels take of these."""
    return {
        "target_ptr": target,
        **{f"target_stride_{axis}": stride for axis, stride in zip("bhw", target.stride(), strict=True)},
        "weights_ptr": class_weights,
        "weights_stride": 0 if class_weights is None else class_weights.stride(0),
        "ignore_index": ignore_index,
        "HAS_WEIGHTS": class_weights is not None,
    }


def forward(
    logits: Tensor, target: Tensor, offset: Tensor | None, class_weights: Tensor | None, ignore_index: int
) -> Tensor:
    """losses (B, H, W), float32."""
    (B, _, h, w), (H, W) = logits.shape, target.shape[1:]
    losses = logits.new_empty(target.shape, dtype=torch.float32)
    if losses.numel() == 0:
        return losses
    with device_guard(logits):
        losses_kernel[(num_tiles(B, (H, W), (h, w)),)](
            losses_ptr=losses,
            **_label_arguments(target, class_weights, ignore_index),
            **tile_arguments(logits, (H, W), offset),
        )
    return losses


def backward(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    offset: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Gradient of logits (B, K, h, w)."""
    (B, K, h, w), (H, W) = logits.shape, target.shape[1:]
    if grad_losses.numel() == 0:
        return torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    # |softmax - onehot| and a pixel's weight in a corner are at most 1.
    largest_weight = lambda: 1 if class_weights is None else class_weights.abs().amax()
    bound = lambda: grad_losses.abs().amax() * largest_weight() * PIXELS
    # Gradients of bfloat16 in float16, which has three more digits; those of float16 need more than it has.
    grad_operand = tl.float16 if logits.dtype == torch.bfloat16 else tl.float32
    grad_precision = "bf16x3" if logits.dtype == torch.float16 and not INTERPRETED else PRECISION
    buffer = ScatterBuffer((B, h, w, padded(K)), logits.device, bound)
    with device_guard(logits):
        losses_backward_kernel[(num_tiles(B, (H, W), (h, w)),)](
            grad_losses_ptr=grad_losses,
            **{f"grad_losses_stride_{axis}": stride for axis, stride in zip("bhw", grad_losses.stride(), strict=True)},
            grad_table_ptr=buffer.data,
            scale_ptr=buffer.scale,
            DETERMINISTIC=buffer.deterministic,
            GRAD_OPERAND=grad_operand,
            GRAD_PRECISION=grad_precision,
            **_label_arguments(target, class_weights, ignore_index),
            **tile_arguments(logits, (H, W), offset),
        )
    return buffer.result(logits.dtype)[..., :K].permute(0, 3, 1, 2).contiguous()
