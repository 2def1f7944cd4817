"""Cross-entropy of up-sampled logits, without up-sampled logits (the losses on Y and the refined Y' of Eq. 7).

    loss(p) = class_weights[t] * (log sum_k exp z[k, p] - z[t, p]),  t = target(p);  0 where t = ignore_index

with z[k, p], the up-sampled logits read at p + offset(p), as `tiles_torch` defines them.

Legend
    B batch, K classes, h x w the logits' map, H x W the labels' map; K, h, w, H, W are any positive numbers.
    logits    (B, K, h, w)
    target    (B, H, W), integers
    offset    (B, 2, H, W), (dx, dy) in pixels of the labels' map
    losses    (B, H, W)
Kernels: `cross_entropy_triton`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._registration import refuse_second_derivatives, register_autograd, register_vmap
from ..backend import backend_argument, runs_on_triton
from ..checks import check_floating, check_integer, check_same_device, check_shape, compute_dtype
from . import cross_entropy_triton
from .tiles_torch import Where, check_maps, visit_tiles

REDUCTIONS = ("mean", "sum", "none")

# --- PyTorch ----------------------------------------------------------------------------------------------------------


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
    logits: Tensor,
    target: Tensor,
    offsets: Sequence[Tensor | None],
    class_weights: Tensor | None,
    ignore_index: int,
) -> list[Tensor]:
    dtype = compute_dtype(logits)

    def losses_at(offset: Tensor | None) -> Tensor:
        losses = torch.empty(target.shape, dtype=dtype, device=logits.device)

        def visit(where: Where, z: Tensor) -> None:
            label, weight = _labels(target[where], class_weights, z.shape[1], ignore_index, dtype)
            loss = weight * -z.log_softmax(1).gather(1, label.reshape(len(z), 1, -1)).view(label.shape)
            losses[where] = torch.where(weight == 0, 0, loss)

        visit_tiles(logits, target.shape[1:], offset, visit)
        return losses

    return [losses_at(offset) for offset in offsets]


def _backward_torch(
    grads: Sequence[Tensor],
    logits: Tensor,
    target: Tensor,
    offsets: Sequence[Tensor | None],
    class_weights: Tensor | None,
    ignore_index: int,
) -> Tensor:
    dtype = compute_dtype(logits)

    def gradient_at(offset: Tensor | None, grad_losses: Tensor) -> Tensor:
        def visit(where: Where, z: Tensor) -> Tensor:
            label, weight = _labels(target[where], class_weights, z.shape[1], ignore_index, dtype)
            # Reshaped, not viewed: they lie in memory as the target does, which may be transposed.
            label, weight, grad_loss = (t.reshape(len(z), 1, -1) for t in (label, weight, grad_losses[where]))
            factor = weight * grad_loss
            grad = z.softmax(1).mul_(factor)
            grad.scatter_add_(1, label, -factor)
            # All bits or none: where no weight meets infinite logits there is a NaN, and 0 * NaN is one too.
            bits = torch.int64 if dtype == torch.float64 else torch.int32
            grad.view(bits).bitwise_and_(torch.where(weight == 0, 0, -1).to(bits))
            return grad

        return visit_tiles(logits, target.shape[1:], offset, visit, with_gradient=True)

    total, *others = (gradient_at(offset, grad) for offset, grad in zip(offsets, grads, strict=True))
    return sum(others, start=total).to(logits.dtype)


# --- custom ops and autograd ------------------------------------------------------------------------------------------


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
    logits: Tensor,
    target: Tensor,
    offset: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
    backend: str | None = None,
) -> Tensor:
    """losses (B, H, W), float32 (float64 for float64 logits)."""
    _check_ids(target, logits.shape[1], ignore_index)
    run = cross_entropy_triton.forward if runs_on_triton(logits, backend) else _losses_torch
    (losses,) = run(logits, target, (offset,), class_weights, ignore_index)
    return losses


@_upsample_cross_entropy.register_fake
def _upsample_cross_entropy_fake(
    logits: Tensor,
    target: Tensor,
    offset: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
    backend: str | None = None,
) -> Tensor:
    return logits.new_empty(target.shape, dtype=compute_dtype(logits))


@torch.library.custom_op("unept::upsample_cross_entropy_backward", mutates_args=())
def _upsample_cross_entropy_backward(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    offset: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
    backend: str | None = None,
) -> Tensor:
    """Gradient of logits."""
    run = cross_entropy_triton.backward if runs_on_triton(logits, backend) else _backward_torch
    return run((grad_losses,), logits, target, (offset,), class_weights, ignore_index)


@_upsample_cross_entropy_backward.register_fake
def _(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    offset: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
    backend: str | None = None,
) -> Tensor:
    return logits.new_empty(logits.shape)


_run_backward = refuse_second_derivatives(_upsample_cross_entropy_backward, "upsample_cross_entropy")


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """The forward saves its inputs and nothing else."""
    logits, target, offset, class_weights, ctx.ignore_index, ctx.backend = inputs
    ctx.save_for_backward(logits, target, offset, class_weights)


def _backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
    grad_logits = _run_backward(grad_losses, *ctx.saved_tensors, ctx.ignore_index, ctx.backend)
    return grad_logits, None, None, None, None, None


_run = register_autograd(_upsample_cross_entropy, _save_inputs, _backward)
register_vmap(_upsample_cross_entropy, unbatched=(3,))
register_vmap(_upsample_cross_entropy_backward, unbatched=(4,))


# --- custom ops and autograd: two losses at once ----------------------------------------------------------------------


@torch.library.custom_op("unept::upsample_cross_entropy_pair", mutates_args=())
def _upsample_cross_entropy_pair(
    logits: Tensor,
    target: Tensor,
    offset: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """losses (B, H, W) without and with the offset, in the dtype of `unept::upsample_cross_entropy`."""
    _check_ids(target, logits.shape[1], ignore_index)
    run = cross_entropy_triton.forward if runs_on_triton(logits, backend) else _losses_torch
    plain, moved = run(logits, target, (None, offset), class_weights, ignore_index)
    return plain, moved


@_upsample_cross_entropy_pair.register_fake
def _upsample_cross_entropy_pair_fake(
    logits: Tensor,
    target: Tensor,
    offset: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    plain, moved = (logits.new_empty(target.shape, dtype=compute_dtype(logits)) for _ in range(2))
    return plain, moved


@torch.library.custom_op("unept::upsample_cross_entropy_pair_backward", mutates_args=())
def _upsample_cross_entropy_pair_backward(
    grad_plain: Tensor,
    grad_moved: Tensor,
    logits: Tensor,
    target: Tensor,
    offset: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    backend: str | None = None,
) -> Tensor:
    """Gradient of logits."""
    run = cross_entropy_triton.backward if runs_on_triton(logits, backend) else _backward_torch
    return run((grad_plain, grad_moved), logits, target, (None, offset), class_weights, ignore_index)


@_upsample_cross_entropy_pair_backward.register_fake
def _(
    grad_plain: Tensor,
    grad_moved: Tensor,
    logits: Tensor,
    target: Tensor,
    offset: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    backend: str | None = None,
) -> Tensor:
    return logits.new_empty(logits.shape)


_run_pair_backward = refuse_second_derivatives(_upsample_cross_entropy_pair_backward, "upsample_cross_entropy")


def _backward_pair(ctx: Any, grad_plain: Tensor, grad_moved: Tensor) -> tuple[Tensor | None, ...]:
    grad_logits = _run_pair_backward(grad_plain, grad_moved, *ctx.saved_tensors, ctx.ignore_index, ctx.backend)
    return grad_logits, None, None, None, None, None


_run_pair = register_autograd(_upsample_cross_entropy_pair, _save_inputs, _backward_pair)
register_vmap(_upsample_cross_entropy_pair, unbatched=(3,))
register_vmap(_upsample_cross_entropy_pair_backward, unbatched=(5,))


# --- public functions -------------------------------------------------------------------------------------------------


def _check(logits: Tensor, target: Tensor, offset: Tensor | None, class_weights: Tensor | None) -> None:
    """Raise for arguments that do not fit together, but for the ids in the target."""
    check_shape("target", target, ("B", "H", "W"))
    check_integer(target=target)
    check_maps(logits, offset, (target.shape[1], target.shape[2]))
    check_shape("target", target, (logits.shape[0], "H", "W"), "as many label maps as there are images in logits")
    check_same_device(logits=logits, target=target)
    if class_weights is not None:
        check_floating(class_weights=class_weights)
        check_shape("class_weights", class_weights, (logits.shape[1],), "one weight for each class of logits")
        check_same_device(logits=logits, class_weights=class_weights)


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
        TypeError: a tensor has a dtype that is not listed.
        ValueError: shapes or devices do not fit, an image has more than 2**30 pixels, the reduction is unknown, or, for
            tensors on a CPU, a target is neither a class nor ignored. On a GPU, where looking would stall it, the loss
            of such a pixel is NaN.
    """
    _check(logits, target, offset, class_weights)
    class_weights = None if class_weights is None else class_weights.detach()  # logits alone have a gradient
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(map(repr, REDUCTIONS))}")

    losses = _run(logits, target, offset, class_weights, ignore_index, backend_argument())
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if class_weights is None:
        total = (target.long() != ignore_index).sum()  # not in a type that cannot hold ignore_index
    else:
        total = _labels(target, class_weights, logits.shape[1], ignore_index, losses.dtype)[1].sum()
    return losses.sum() / torch.where(total == 0, 1, total)


def upsample_cross_entropy_pair(
    logits: Tensor,
    target: Tensor,
    offset: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both segmentation losses of Eq. 7 per pixel: `upsample_cross_entropy` without an offset, and with it.

    The logits are laid out for the kernels once, not once per loss, and both gradients are summed in one buffer.

    Args:
        logits: (B, K, h, w), see `upsample_cross_entropy`. The only input with a gradient.
        target: (B, H, W), likewise.
        offset: (B, 2, H, W), likewise.
        ignore_index: likewise.
        class_weights: (K,), likewise.

    Returns:
        Two tensors (B, H, W), the losses of the prediction and of the refined prediction, 0 at ignored pixels: what
        `upsample_cross_entropy` returns with `reduction="none"`.

    Raises:
        TypeError, ValueError: see `upsample_cross_entropy`.
    """
    _check(logits, target, offset, class_weights)
    class_weights = None if class_weights is None else class_weights.detach()  # logits alone have a gradient
    return _run_pair(logits, target, offset, class_weights, ignore_index, backend_argument())
