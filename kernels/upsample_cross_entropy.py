"""Cross-entropy of up-sampled logits, without up-sampled logits (the losses on Y and the refined Y' of Eq. 7).

    loss(p) = class_weights[t] * (log sum_k exp z[k, p] - z[t, p]),  t = target(p);  0 where t = ignore_index

with z[k, p], the up-sampled logits read at p + offset(p), as `_upsample` defines them.

Legend
    B batch, K classes, h x w the logits' map, H x W the labels' map; K, h, w, H, W are any positive numbers.
    logits    (B, K, h, w)
    target    (B, H, W), integers
    offset    (B, 2, H, W), (dx, dy) in pixels of the labels' map
    losses    (B, H, W)
Kernels: a program is a tile of BLOCK_P pixels of one image; pixels are lanes, classes a loop.
"""

import math

import torch
from torch import Tensor

from ._triton import ScatterBuffer, autotuned, device_guard, scatter_add, size_class, tl, triton
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
from .checks import check_floating, check_integer, check_same_device, check_shape, compute_dtype

REDUCTIONS = ("mean", "sum", "none")

# ---------------------------------------------------------------------------------------------------------------------
# PyTorch
# ---------------------------------------------------------------------------------------------------------------------


def _labels(
    target: Tensor, class_weights: Tensor | None, K: int, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Class ids that are safe to index with, and the weight of each pixel: 0 if ignored, NaN if the id is no class."""
    label = target.long()
    safe = label.clamp(0, K - 1)
    weight = (
        torch.ones((), dtype=dtype, device=label.device) if class_weights is None else class_weights[safe].to(dtype)
    )
    return safe, torch.where(label == ignore_index, 0, torch.where(safe == label, weight, math.nan))


def _losses_torch(
    logits: Tensor, target: Tensor, offset: Tensor | None, class_weights: Tensor | None, ignore_index: int
) -> Tensor:
    dtype = compute_dtype(logits)
    losses = torch.empty(target.shape, dtype=dtype, device=logits.device)

    def visit(where: Where, z: Tensor) -> None:
        label, weight = _labels(target[where], class_weights, z.shape[1], ignore_index, dtype)
        loss = weight * -z.log_softmax(1).gather(1, label.view(len(z), 1, -1)).view(label.shape)
        losses[where] = torch.where(weight == 0, 0, loss)

    visit_tiles(logits, target.shape[1:], offset, visit)
    return losses


def _backward_torch(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    offset: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
) -> Tensor:
    dtype = compute_dtype(logits)

    def visit(where: Where, z: Tensor) -> Tensor:
        label, weight = _labels(target[where], class_weights, z.shape[1], ignore_index, dtype)
        factor = (weight * grad_losses[where]).view(len(z), 1, -1)
        grad = z.softmax(1).mul_(factor)
        grad.scatter_add_(1, label.view(factor.shape), -factor)
        # All bits or none: where no weight meets infinite logits there is a NaN, and 0 * NaN is one too.
        bits = torch.int64 if dtype == torch.float64 else torch.int32
        grad.view(bits).bitwise_and_(torch.where(weight == 0, 0, -1).to(bits).view(factor.shape))
        return grad

    return visit_tiles(logits, target.shape[1:], offset, visit, with_gradient=True).to(logits.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Triton
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _log_sum_exp(p00, p01, p10, p11, fy, fx, mask, label, stride_k, K):
    """log sum_k exp z[k], and z[label], [BLOCK_P] each."""
    # The lowest finite number, so that a class at -inf adds exp(-inf) and not exp(-inf + inf).
    largest = tl.full(fy.shape, -3.4028234663852886e38, tl.float32)
    total = tl.zeros(fy.shape, tl.float32)
    z_label = tl.zeros(fy.shape, tl.float32)
    for k in range(0, K):
        z = interpolate_in_tile(p00, p01, p10, p11, fy, fx, mask)
        z_label = tl.where(label == k, z, z_label)
        larger = tl.maximum(largest, z)
        total = total * tl.exp(largest - larger) + tl.exp(z - larger)
        largest = larger
        p00 += stride_k
        p01 += stride_k
        p10 += stride_k
        p11 += stride_k
    return largest + tl.log(total), z_label


@triton.jit
def _labels_in_tile(
    target_ptr,
    stride_b,
    stride_h,
    stride_w,
    weights_ptr,
    weights_stride,
    b,
    y,
    x,
    live,
    K,
    ignore_index,
    HAS_WEIGHTS: tl.constexpr,
):
    """As `_labels`: the label (int64), whether the pixel takes part, and its weight, [BLOCK_P] each."""
    pointers = target_ptr + b * stride_b + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    label = tl.load(pointers, mask=live, other=0).to(tl.int64)
    counts = live & (label != ignore_index)
    known = (label >= 0) & (label < K)
    weight = tl.full(y.shape, 1.0, tl.float32)
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + label * weights_stride, mask=counts & known, other=0.0).to(tl.float32)
    return label, counts, tl.where(counts & (known == 0), float("nan"), weight)


@autotuned(PIXEL_CONFIGS, key=["K", "HAS_OFFSET"])
def losses_kernel(
    logits_ptr,  # (B, K, h, w)
    target_ptr,  # (B, H, W)
    offset_ptr,  # (B, 2, H, W) or unused
    weights_ptr,  # (K,) or unused
    losses_ptr,  # (B, H, W), contiguous float32
    logits_stride_b,
    logits_stride_k,
    logits_stride_h,
    logits_stride_w,
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
    h,
    w,
    H,
    W,
    scale_y,  # h / H
    scale_x,  # w / W
    size_class,
    HAS_OFFSET: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The losses of BLOCK_P pixels of one image, row by row."""
    tiles = tl.cdiv(H * W, BLOCK_P)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    live = p < H * W
    y, x = p // W, p % W
    label, counts, weight = _labels_in_tile(
        target_ptr, target_stride_b, target_stride_h, target_stride_w, weights_ptr, weights_stride, b, y, x, live, K,
        ignore_index, HAS_WEIGHTS,
    )  # fmt: skip
    y0, y1, x0, x1, fy, fx = corners_in_tile(
        offset_ptr, offset_stride_b, offset_stride_xy, offset_stride_h, offset_stride_w, b, y, x, counts, H, W, h, w,
        scale_y, scale_x, HAS_OFFSET,
    )  # fmt: skip
    p00, p01, p10, p11 = corner_pointers(
        logits_ptr + b * logits_stride_b, y0, y1, x0, x1, logits_stride_h, logits_stride_w
    )
    lse, z_label = _log_sum_exp(p00, p01, p10, p11, fy, fx, counts, label, logits_stride_k, K)
    loss = tl.where(counts & (weight != 0), weight * (lse - z_label), 0.0)
    tl.store(losses_ptr + b * H * W + p, loss, mask=live)


@autotuned(PIXEL_CONFIGS, key=["K", "HAS_OFFSET"], adds_into=["grad_logits_ptr"])
def losses_backward_kernel(
    grad_losses_ptr,  # (B, H, W)
    logits_ptr,  # (B, K, h, w)
    target_ptr,  # (B, H, W)
    offset_ptr,  # (B, 2, H, W) or unused
    weights_ptr,  # (K,) or unused
    grad_logits_ptr,  # (B, K, h, w), contiguous, a ScatterBuffer
    scale_ptr,  # (): of the ScatterBuffer, or None
    grad_losses_stride_b,
    grad_losses_stride_h,
    grad_losses_stride_w,
    logits_stride_b,
    logits_stride_k,
    logits_stride_h,
    logits_stride_w,
    target_stride_b,
    target_stride_h,
    target_stride_w,
    offset_stride_b,
    offset_stride_xy,
    offset_stride_h,
    offset_stride_w,
    weights_stride,
    grad_logits_stride_b,  # K * h * w
    grad_logits_stride_k,  # h * w
    ignore_index,
    K,
    h,
    w,
    H,
    W,
    scale_y,  # h / H
    scale_x,  # w / W
    size_class,
    HAS_OFFSET: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The part that BLOCK_P pixels of one image have in the gradient."""
    # Neighbouring lanes take pixels of a row about one low-size pixel apart, so that they add to neighbouring addresses
    # and not to the same one.
    step = tl.cdiv(W, w)
    columns = tl.cdiv(W, step)
    tiles = tl.cdiv(H * columns * step, BLOCK_P)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    lane = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    y = lane // (columns * step)
    lane = lane % (columns * step)
    x = lane % columns * step + lane // columns
    live = (y < H) & (x < W)
    label, counts, weight = _labels_in_tile(
        target_ptr, target_stride_b, target_stride_h, target_stride_w, weights_ptr, weights_stride, b, y, x, live, K,
        ignore_index, HAS_WEIGHTS,
    )  # fmt: skip
    y0, y1, x0, x1, fy, fx = corners_in_tile(
        offset_ptr, offset_stride_b, offset_stride_xy, offset_stride_h, offset_stride_w, b, y, x, counts, H, W, h, w,
        scale_y, scale_x, HAS_OFFSET,
    )  # fmt: skip
    p00, p01, p10, p11 = corner_pointers(
        logits_ptr + b * logits_stride_b, y0, y1, x0, x1, logits_stride_h, logits_stride_w
    )
    lse, _ = _log_sum_exp(p00, p01, p10, p11, fy, fx, counts, label, logits_stride_k, K)

    pointers = grad_losses_ptr + b * grad_losses_stride_b + y.to(tl.int64) * grad_losses_stride_h
    factor = tl.load(pointers + x.to(tl.int64) * grad_losses_stride_w, mask=counts, other=0.0).to(tl.float32) * weight
    adds = counts & (weight != 0)
    g00, g01, g10, g11 = corner_pointers(grad_logits_ptr + b * grad_logits_stride_b, y0, y1, x0, x1, w, 1)
    for k in range(0, K):
        z = interpolate_in_tile(p00, p01, p10, p11, fy, fx, adds)
        grad = factor * (tl.exp(z - lse) - tl.where(label == k, 1.0, 0.0))
        scatter_add(g00, grad * (1 - fy) * (1 - fx), adds, scale_ptr, DETERMINISTIC)
        scatter_add(g01, grad * (1 - fy) * fx, adds, scale_ptr, DETERMINISTIC)
        scatter_add(g10, grad * fy * (1 - fx), adds, scale_ptr, DETERMINISTIC)
        scatter_add(g11, grad * fy * fx, adds, scale_ptr, DETERMINISTIC)
        p00 += logits_stride_k
        p01 += logits_stride_k
        p10 += logits_stride_k
        p11 += logits_stride_k
        g00 += grad_logits_stride_k
        g01 += grad_logits_stride_k
        g10 += grad_logits_stride_k
        g11 += grad_logits_stride_k


def _losses_triton(
    logits: Tensor, target: Tensor, offset: Tensor | None, class_weights: Tensor | None, ignore_index: int
) -> Tensor:
    (B, K, h, w), (H, W) = logits.shape, target.shape[1:]
    losses = logits.new_empty(target.shape, dtype=torch.float32)
    if losses.numel() == 0:
        return losses
    grid = lambda meta: (B * triton.cdiv(H * W, meta["BLOCK_P"]),)
    with device_guard(logits):
        losses_kernel[grid](
            logits,
            target,
            offset,
            class_weights,
            losses,
            *logits.stride(),
            *target.stride(),
            *offset_strides(offset),
            0 if class_weights is None else class_weights.stride(0),
            ignore_index,
            K,
            h,
            w,
            H,
            W,
            h / H,
            w / W,
            size_class=size_class(B * H * W),
            HAS_OFFSET=offset is not None,
            HAS_WEIGHTS=class_weights is not None,
            enable_fp_fusion=True,
        )
    return losses


def _backward_triton(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    offset: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
) -> Tensor:
    (B, K, h, w), (H, W) = logits.shape, target.shape[1:]
    if grad_losses.numel() == 0:
        return torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    # |softmax - onehot| and a corner's weight are at most 1.
    largest_weight = lambda: 1 if class_weights is None else class_weights.abs().amax()
    buffer = ScatterBuffer(logits.shape, logits.device, bound=lambda: grad_losses.abs().amax() * largest_weight())
    step = -(-W // w)
    lanes = H * step * -(-W // step)
    grid = lambda meta: (B * triton.cdiv(lanes, meta["BLOCK_P"]),)
    with device_guard(logits):
        losses_backward_kernel[grid](
            grad_losses,
            logits,
            target,
            offset,
            class_weights,
            buffer.data,
            buffer.scale,
            *grad_losses.stride(),
            *logits.stride(),
            *target.stride(),
            *offset_strides(offset),
            0 if class_weights is None else class_weights.stride(0),
            K * h * w,
            h * w,
            ignore_index,
            K,
            h,
            w,
            H,
            W,
            h / H,
            w / W,
            size_class=size_class(B * H * W),
            HAS_OFFSET=offset is not None,
            HAS_WEIGHTS=class_weights is not None,
            DETERMINISTIC=buffer.deterministic,
            enable_fp_fusion=True,
        )
    return buffer.result(logits.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


def _check_ids(target: Tensor, K: int, ignore_index: int) -> None:
    """Raise ValueError for an id that is neither a class nor ignored; only where looking doesn't stall a GPU."""
    if target.device.type != "cpu":
        return
    label = target.long()
    wrong = (label.clamp(0, K - 1) != label) & (label != ignore_index)
    if wrong.any():
        raise ValueError(
            f"target holds the id {int(label[wrong][0])} ({int(wrong.sum())} pixels hold no class); ids must be in "
            f"[0, {K}), the classes of logits, or ignore_index={ignore_index}: map the others to one of these"
        )


@torch.library.custom_op("unept::upsample_cross_entropy", mutates_args=())
def _upsample_cross_entropy(
    logits: Tensor, target: Tensor, offset: Tensor | None, class_weights: Tensor | None, ignore_index: int
) -> Tensor:
    """losses (B, H, W), float32 (float64 for float64 logits)."""
    _check_ids(target, logits.shape[1], ignore_index)
    run = _losses_triton if runs_on_triton(logits) else _losses_torch
    return run(logits, target, offset, class_weights, ignore_index)


@_upsample_cross_entropy.register_fake
def _(logits: Tensor, target: Tensor, offset: Tensor | None, class_weights: Tensor | None, ignore_index: int) -> Tensor:
    return logits.new_empty(target.shape, dtype=compute_dtype(logits))


@torch.library.custom_op("unept::upsample_cross_entropy_backward", mutates_args=())
def _upsample_cross_entropy_backward(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    offset: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Gradient of logits."""
    run = _backward_triton if runs_on_triton(logits) else _backward_torch
    return run(grad_losses, logits, target, offset, class_weights, ignore_index)


@_upsample_cross_entropy_backward.register_fake
def _(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    offset: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
) -> Tensor:
    return logits.new_empty(logits.shape)


class UpsampleCrossEntropy(torch.autograd.Function):
    """Saves its inputs, nothing else; returns the loss of each pixel."""

    @staticmethod
    def forward(ctx, logits, target, offset, class_weights, ignore_index):
        """See `upsample_cross_entropy`."""
        ctx.save_for_backward(logits, target, offset, class_weights)
        ctx.ignore_index = ignore_index
        return _upsample_cross_entropy(logits, target, offset, class_weights, ignore_index)

    @staticmethod
    def backward(ctx, grad_losses):
        """Gradient of logits."""
        grad = _upsample_cross_entropy_backward(grad_losses, *ctx.saved_tensors, ctx.ignore_index)
        return grad, None, None, None, None


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    offset: Tensor | None = None,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of logits that are up-sampled bilinearly to the target's size on the way (the losses of Eq. 7).

    Equals `F.cross_entropy(F.interpolate(logits, (H, W), mode="bilinear", align_corners=False), target.long(), ...)`
    for any ratio of sizes, but never holds (B, K, H, W), neither here nor in the backward.

    Args:
        logits: (B, K, h, w), float32, float16, bfloat16 or (torch backend) float64. The only input with a gradient.
        target: (B, H, W), class ids in [0, K) or ignore_index, of any integer dtype.
        offset: (B, 2, H, W), (dx, dy) in pixels of the target, integer or floating point: pixel p is predicted by what
            the up-sampled map holds at p + offset(p), clamped to the map (the refined prediction). NaN means no offset.
        ignore_index: the id of pixels that do not count.
        class_weights: (K,), floating point: the weight of a pixel by its target.
        reduction: `"mean"` divides the sum by the summed weights of the pixels that count (1 each without
            class_weights) and is zero, with a zero gradient, where none counts; `"sum"`; or `"none"`, with 0 at ignored
            pixels.

    Returns:
        () or, for `"none"`, (B, H, W), in float32 whatever the logits (float64 for float64): a sum over an image would
        overflow float16.

    Raises:
        TypeError: a dtype doesn't fit.
        ValueError: shapes or devices don't fit, an image of more than 2**30 pixels, an unknown reduction, or, with
            tensors on a CPU, a target that is neither a class nor ignored. On a GPU, where looking would stall it, such
            a pixel's loss is NaN.
    """
    check_shape("target", target, ("B", "H", "W"))
    check_integer(target=target)
    check_maps(logits, offset, (target.shape[1], target.shape[2]))
    check_shape("target", target, (logits.shape[0], "H", "W"), "as many label maps as there are images in logits")
    check_same_device(logits=logits, target=target)
    if class_weights is not None:
        check_floating(class_weights=class_weights)
        check_shape("class_weights", class_weights, (logits.shape[1],), "one weight for each class of logits")
        check_same_device(logits=logits, class_weights=class_weights)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(map(repr, REDUCTIONS))}")

    losses = UpsampleCrossEntropy.apply(logits, target, offset, class_weights, ignore_index)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if class_weights is None:
        total = (target != ignore_index).sum()
    else:
        total = _labels(target, class_weights, logits.shape[1], ignore_index, losses.dtype)[1].sum()
    return losses.sum() / torch.where(total == 0, 1, total)
