"""Cross-entropy and argmax of up-sampled logits, without up-sampled logits (the losses on Y and on the refined Y' of Eq. 7).

    s(p)     = clamp(p + offset(p), 0, (W - 1, H - 1))         position on the full-size map; offset is 0 without one
    src(s)   = clamp((s + 1/2) * (w / W, h / H) - 1/2, 0, (w - 1, h - 1))       the same position on the logits' map
    z[k, p]  = bilinear(logits[k], src(s(p)))
    loss(p)  = class_weights[t] * (log sum_k exp z[k, p] - z[t, p]),  t = target(p);  0 where t = ignore_index

Without an offset z is `interpolate(logits, (H, W), mode="bilinear", align_corners=False)`; with an integer offset it is
that map read at p + offset. z exists for a slab of rows (PyTorch) or one class of one tile of pixels (Triton) at a time.

Legend
    B batch, K classes, h x w the logits' map, H x W the labels' map; K, h, w, H, W are any positive numbers.
    logits    (B, K, h, w)
    target    (B, H, W), integers
    offset    (B, 2, H, W), (dx, dy) in pixels of the labels' map
    losses    (B, H, W)
Kernels: a program is a tile of BLOCK_P pixels of one image; pixels are lanes, classes a loop, so that every sum has one
order whatever the block size.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._triton import ScatterBuffer, autotune_pool, device_guard, scatter_add, tl, triton
from .backend import runs_on_triton
from .checks import check_floating, check_integer, check_same_device, check_shape

REDUCTIONS = ("mean", "sum", "none")

# Bytes of up-sampled logits that the PyTorch path holds at a time (one row of the image at the least): on a CPU they
# should stay in the cache, on a GPU they should fill it.
SLAB_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch
# ---------------------------------------------------------------------------------------------------------------------


def _slabs(logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[int, slice]]:
    """(image, rows of the labels' map), few enough rows for SLAB_BYTES."""
    B, K = logits.shape[:2]
    H, W = size
    slab_bytes = SLAB_BYTES.get(logits.device.type, SLAB_BYTES["cuda"])
    rows = max(1, slab_bytes // max(1, K * W * _compute_dtype(logits).itemsize))
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


def _corners(logits: Tensor, size: tuple[int, int], offset: Tensor | None, b: int, rows: slice) -> tuple[Tensor, Tensor]:
    """Indices into the h*w low-size pixels and weights, (pixels, 4) each, for the rows of image b."""
    h, w = logits.shape[2:]
    H, W = size
    make = {"dtype": _compute_dtype(logits), "device": logits.device}
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


def _table(logits: Tensor, b: int) -> Tensor:
    """(h*w, K) logits of image b, a row for each pixel."""
    return logits[b].permute(1, 2, 0).to(_compute_dtype(logits)).reshape(-1, logits.shape[1])


def _interpolate(index: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(index, table, per_sample_weights=weight, mode="sum")


def _labels(
    target: Tensor, class_weights: Tensor | None, K: int, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Class ids that are safe to index with, and the weight of each pixel: 0 if ignored, NaN if the id is no class."""
    label = target.long()
    known = (label >= 0) & (label < K) & (label != ignore_index)
    safe = torch.where(known, label, 0)
    weight = torch.ones(safe.shape, dtype=dtype, device=safe.device) if class_weights is None else class_weights[safe]
    other = torch.where(label == ignore_index, 0.0, math.nan).to(dtype)
    return safe, torch.where(known, weight.to(dtype), other)


def _losses_torch(
    logits: Tensor, target: Tensor, offset: Tensor | None, class_weights: Tensor | None, ignore_index: int
) -> Tensor:
    K, size = logits.shape[1], target.shape[1:]
    losses = torch.empty(target.shape, dtype=_compute_dtype(logits), device=logits.device)
    for b, rows in _slabs(logits, size):
        z = _interpolate(*_corners(logits, size, offset, b, rows), _table(logits, b))
        label, weight = _labels(target[b, rows].flatten(), class_weights, K, ignore_index, z.dtype)
        loss = weight * (z.logsumexp(1) - z.gather(1, label[:, None])[:, 0])
        losses[b, rows] = torch.where(weight == 0, 0, loss).view(-1, size[1])
    return losses


def _backward_torch(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    offset: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
) -> Tensor:
    B, K, h, w = logits.shape
    size = target.shape[1:]
    grad_table = torch.zeros(B, h * w, K, dtype=_compute_dtype(logits), device=logits.device)
    for b, rows in _slabs(logits, size):
        index, corner_weight = _corners(logits, size, offset, b, rows)
        grad = _interpolate(index, corner_weight, _table(logits, b)).softmax(1)
        label, weight = _labels(target[b, rows].flatten(), class_weights, K, ignore_index, grad.dtype)
        weight = torch.where(weight == 0, 0, weight * grad_losses[b, rows].flatten())
        grad[torch.arange(len(label), device=label.device), label] -= 1
        grad *= weight[:, None]
        for corner in range(4):
            grad_table[b].index_add_(0, index[:, corner], grad * corner_weight[:, corner, None])
    return grad_table.view(B, h, w, K).permute(0, 3, 1, 2).to(logits.dtype).contiguous()


def _argmax_torch(logits: Tensor, size: tuple[int, int], offset: Tensor | None) -> Tensor:
    best = torch.empty((logits.shape[0], *size), dtype=torch.int64, device=logits.device)
    for b, rows in _slabs(logits, size):
        z = _interpolate(*_corners(logits, size, offset, b, rows), _table(logits, b))
        best[b, rows] = z.argmax(1).view(-1, size[1])
    return best


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


def _check_ids(target: Tensor, K: int, ignore_index: int) -> None:
    """Raise ValueError for an id that is neither a class nor ignored; only where looking doesn't stall a GPU."""
    if target.device.type != "cpu":
        return
    label = target.long()
    wrong = ((label < 0) | (label >= K)) & (label != ignore_index)
    if wrong.any():
        raise ValueError(
            f"target holds the id {int(label[wrong][0])} ({int(wrong.sum())} pixels hold no class); it must hold ids in "
            f"[0, {K}), the classes of logits, or ignore_index={ignore_index}: map the other ids to one of these"
        )


@torch.library.custom_op("unept::upsample_cross_entropy", mutates_args=())
def _upsample_cross_entropy(
    logits: Tensor, target: Tensor, offset: Tensor | None, class_weights: Tensor | None, ignore_index: int
) -> Tensor:
    """losses (B, H, W), float32 (float64 for float64 logits)."""
    _check_ids(target, logits.shape[1], ignore_index)
    return _losses_torch(logits, target, offset, class_weights, ignore_index)


@_upsample_cross_entropy.register_fake
def _(
    logits: Tensor, target: Tensor, offset: Tensor | None, class_weights: Tensor | None, ignore_index: int
) -> Tensor:
    return logits.new_empty(target.shape, dtype=_compute_dtype(logits))


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
    return _backward_torch(grad_losses, logits, target, offset, class_weights, ignore_index)


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


@torch.library.custom_op("unept::upsample_argmax", mutates_args=())
def _upsample_argmax(logits: Tensor, height: int, width: int, offset: Tensor | None) -> Tensor:
    return _argmax_torch(logits, (height, width), offset)


@_upsample_argmax.register_fake
def _(logits: Tensor, height: int, width: int, offset: Tensor | None) -> Tensor:
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)


def _check_maps(logits: Tensor, offset: Tensor | None, size: tuple[int, int]) -> None:
    check_floating(logits=logits)
    check_shape("logits", logits, ("B", "K", "h", "w"))
    if 0 in logits.shape[1:]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it needs at least one class and one pixel")
    if offset is not None:
        if offset.is_complex() or offset.dtype == torch.bool:
            raise TypeError(f"offset has dtype {offset.dtype}; it must hold integers or floating-point numbers")
        check_same_device(logits=logits, offset=offset)
        check_shape("offset", offset, (logits.shape[0], 2, *size), "one (dx, dy) for each pixel of the output")


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

    Equals `F.cross_entropy(F.interpolate(logits, (H, W), mode="bilinear", align_corners=False), target.long(), ...)` for
    any ratio of sizes, but never holds (B, K, H, W), neither here nor in the backward.

    Args:
        logits: (B, K, h, w), float32, float16, bfloat16 or (torch backend) float64. The only input with a gradient.
        target: (B, H, W), class ids in [0, K) or ignore_index, of any integer dtype.
        offset: (B, 2, H, W), (dx, dy) in pixels of the target, integer or floating point: pixel p is predicted by what
            the up-sampled map holds at p + offset(p), clamped to the map (the refined prediction). NaN means no offset.
        ignore_index: the id of pixels that do not count.
        class_weights: (K,), floating point: the weight of a pixel by its target.
        reduction: `"mean"` divides the sum by the summed weights of the pixels that count (1 each without class_weights)
            and is zero, with a zero gradient, where none counts; `"sum"`; or `"none"`, with 0 at ignored pixels.

    Returns:
        () or, for `"none"`, (B, H, W), in float32 whatever the logits (float64 for float64): a sum over an image would
        overflow float16.

    Raises:
        TypeError: a dtype doesn't fit.
        ValueError: shapes or devices don't fit, an unknown reduction, or, with tensors on a CPU, a target that is
            neither a class nor ignored. On a GPU, where looking would stall it, such a pixel's loss is NaN.
    """
    check_shape("target", target, ("B", "H", "W"))
    check_integer(target=target)
    _check_maps(logits, offset, (target.shape[1], target.shape[2]))
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
    _, weight = _labels(target, class_weights, logits.shape[1], ignore_index, losses.dtype)
    total = weight.sum()
    return losses.sum() / torch.where(total == 0, 1, total)


def upsample_argmax(logits: Tensor, size: tuple[int, int], offset: Tensor | None = None) -> Tensor:
    """Class ids of logits that are up-sampled bilinearly to `size` on the way: the prediction, refined with an offset.

    Equals `F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)`, but never holds (B, K, H, W).

    Args:
        logits: (B, K, h, w), float32, float16, bfloat16 or (torch backend) float64.
        size: (H, W).
        offset: (B, 2, H, W), as in `upsample_cross_entropy`.

    Returns:
        (B, H, W) int64; among equals the lowest id. No gradient.

    Raises:
        TypeError: a dtype doesn't fit.
        ValueError: shapes or devices don't fit.
    """
    height, width = size
    _check_maps(logits, offset, (height, width))
    return _upsample_argmax(logits, height, width, offset)
