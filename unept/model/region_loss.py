"""Losses of the overlap of whole regions, from segmentation-models-pytorch, beside Eq. 7: Dice and Lovász."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

STEP = 2  # rows and columns from one compared pixel to the next


def region_loss(name: str, ignore_index: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of logits (B, K, h, w) and labels (B, H, W): the sum over the images of their losses.

    Each image is up-sampled and compared alone, so that the full-size logits of one image are held at a time, and that
    the loss of a batch does not depend on how it is split. The pixels of every second row and column stand for all, at
    a quarter of the time: Lovász sorts them once per class.

    Args:
        name: `"dice"` or `"lovasz"`.
        ignore_index: label of the pixels that are left out.

    Raises:
        ValueError: segmentation-models-pytorch is not installed.
    """
    try:
        from segmentation_models_pytorch.losses import DiceLoss, LovaszLoss
    except ImportError as error:
        raise ValueError(
            f"the {name} loss (--{name}-weight) is that of segmentation-models-pytorch, which is not installed: "
            'pip install "unept[losses]"'
        ) from error
    compare = {"dice": DiceLoss, "lovasz": LovaszLoss}[name]("multiclass", ignore_index=ignore_index)

    def one_image(logits: Tensor, labels: Tensor) -> Tensor:
        full = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
        return compare(full[..., ::STEP, ::STEP], labels[:, ::STEP, ::STEP].long())

    @torch.compiler.disable
    def total(logits: Tensor, labels: Tensor) -> Tensor:
        return _SumOverImages.apply(logits, labels, lambda z, y: one_image(z, y) if (y != ignore_index).any() else None)

    return total


class _SumOverImages(torch.autograd.Function):
    """The sum of a loss over images, whose gradient is taken with it: a backward need not compute the loss again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor | None]) -> Tensor:
        """Sum `loss`, which gives None for an image that has none, of each image's logits and labels."""
        total = torch.zeros((), device=logits.device)
        ctx.dtype, ctx.grad = logits.dtype, torch.zeros_like(logits, dtype=torch.float32)
        for image, z in enumerate(logits.detach().float().split(1)):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                z.requires_grad_(ctx.needs_input_grad[0])
                value = loss(z, labels[image : image + 1])
            if value is not None:
                total += value.detach()
            if value is not None and value.requires_grad:
                ctx.grad[image : image + 1] = torch.autograd.grad(value, z)[0]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None]:
        return (grad_total * ctx.grad).to(ctx.dtype), None, None
